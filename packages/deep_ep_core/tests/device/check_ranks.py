"""The part of gpu_check.py that needs several ranks: writes into peers' windows, barriers, and a rank that is late."""

from __future__ import annotations

import time

import torch
import torch.distributed as dist
from check_bench import Bench
from device_kernels import ExchangeParams, TimeBarrierParams, Transfer, exchange_spec, time_barrier_spec

from deep_ep_core.barrier import LSA_BARRIER_SLOT_BYTES, LsaBarrier
from deep_ep_core.errors import CommTimeoutError
from deep_ep_core.lsa_team import MAX_LSA_RANKS, LsaTeam, make_lsa_team
from deep_ep_core.nccl import Communicator
from deep_ep_core.window import ControlRegion, SymmetricMemory

NUM_WORDS = 256
NUM_THREADS = 128
LATE_S = 2.0


def num_exchange_blocks(bench: Bench, num_ranks: int) -> int:
    """Blocks of each rank: those of all ranks must be resident at once if the ranks share one GPU."""
    num_sms = torch.cuda.get_device_properties(bench.device).multi_processor_count
    return max(1, min(bench.size(8, 2), num_sms // (2 * num_ranks)))


def run_checks(bench: Bench) -> None:
    num_ranks = dist.get_world_size()
    num_blocks = num_exchange_blocks(bench, num_ranks)
    with Communicator.open(None, bench.device) as communicator:
        team_size = communicator.lsa.num_ranks
        regions = [
            ControlRegion(name="check.exchange", num_bytes=num_blocks * LSA_BARRIER_SLOT_BYTES),
            ControlRegion(name="check.words", num_bytes=2 * num_blocks * team_size * NUM_WORDS * 8),
            ControlRegion(name="check.time", num_bytes=LSA_BARRIER_SLOT_BYTES),
            ControlRegion(name="check.barrier", num_bytes=LSA_BARRIER_SLOT_BYTES),
        ]
        with SymmetricMemory(communicator, regions=regions, heap_bytes=1 << 20) as memory:
            team = make_lsa_team(memory, rank=bench.rank)
            bench.report("LSA team", f"{team.num_ranks} of {num_ranks} ranks", team.num_ranks == team_size)
            first_round = 1
            for transfer in Transfer:
                first_round = check_exchange(bench, memory, team, transfer, num_blocks, first_round)
            check_barrier_time(bench, memory, team)
            barrier = LsaBarrier(
                memory,
                slot_offset=memory.layout.offset_of("check.barrier"),
                rank=bench.rank,
                log=bench.log,
                timeout_s=bench.timeout_s,
                builder=bench.builder,
            )
            check_barrier_kernel(bench, memory, barrier)
            check_barrier_in_graph(bench, memory, barrier)
            check_late_rank(bench, memory, team)
            # No window may go while a peer's kernel still writes to it.
            meet(bench)


def meet(bench: Bench) -> None:
    torch.cuda.synchronize(bench.device)
    dist.barrier()


def check_exchange(
    bench: Bench, memory: SymmetricMemory, team: LsaTeam, transfer: Transfer, num_blocks: int, first_round: int
) -> int:
    """Returns the number of the round after the last."""
    num_rounds = bench.size(10_000, 20)
    num_wrong, num_late = bench.zeros(1, dtype=torch.int32), bench.zeros(1, dtype=torch.int32)
    params = ExchangeParams(
        team=team,
        wait=bench.wait("exchange: barrier", "exchange: load"),
        slots_offset=memory.layout.offset_of("check.exchange"),
        words_offset=memory.layout.offset_of("check.words"),
        first_round=first_round,
        num_rounds=num_rounds,
        num_words=NUM_WORDS,
        num_wrong=num_wrong.data_ptr(),
        num_late=num_late.data_ptr(),
    )
    # Compiled before the ranks meet, so that no kernel that is timed waits for a compiler of another rank.
    launch = bench.prepare(exchange_spec(transfer), grid=num_blocks, block=NUM_THREADS, smem_bytes=NUM_WORDS * 8)
    meet(bench)
    elapsed_ms = bench.time_ms(launch, params)
    bench.log.check()
    end_round = first_round + num_rounds
    # The window between this and the next kernel must stay as it is for torch to look at it.
    meet(bench)
    is_right = not int(num_wrong) and not int(num_late)
    is_right &= is_window_right(memory, team, transfer, num_blocks, end_round - 1)
    what = f"{num_rounds} rounds by {transfer.name.lower().replace('_', ' ')}, all words checked"
    per_round_us = elapsed_ms / num_rounds * 1e3
    figure = f"{per_round_us:.2f} us each, {num_blocks} blocks, {NUM_WORDS * 8} B a peer and block"
    bench.report(what, figure, is_right)
    meet(bench)
    return end_round


def is_window_right(
    memory: SymmetricMemory, team: LsaTeam, transfer: Transfer, num_blocks: int, last_round: int
) -> bool:
    """What torch finds in this rank's window of the last two rounds: the kernels' own check is thereby checked."""
    words = memory.control("check.words", torch.int64).view(2, num_blocks, team.num_ranks, NUM_WORDS)
    senders = range(team.num_ranks)
    is_right = True
    for round_idx in (last_round - 1, last_round):
        for block_idx in range(num_blocks):
            for sender in [team.rank] if transfer is Transfer.BULK_LOAD else senders:
                wanted = exchanged(round_idx, block_idx, sender, team.rank)
                is_right &= torch.equal(words[round_idx % 2, block_idx, sender].cpu(), wanted)
    return is_right


def exchanged(round_idx: int, block_idx: int, sender: int, receiver: int) -> torch.Tensor:
    """`exchanged` of exchange.cuh, on signed integers of 64 bits that wrap."""
    position = torch.arange(NUM_WORDS) * 64 + block_idx
    bits = (round_idx << 40) ^ (position << 16) ^ (sender * MAX_LSA_RANKS + receiver)
    bits = (bits ^ shift_right(bits, 31)) * (0x9E3779B97F4A7C15 - 2**64)
    return bits ^ shift_right(bits, 29)


def shift_right(bits: torch.Tensor, num_bits: int) -> torch.Tensor:
    """Unsigned."""
    return (bits >> num_bits) & ((1 << (64 - num_bits)) - 1)


def check_barrier_time(bench: Bench, memory: SymmetricMemory, team: LsaTeam) -> None:
    num_rounds, elapsed_ns = bench.size(10_000, 20), bench.zeros(1)
    params = TimeBarrierParams(
        team=team,
        wait=bench.wait("timed barrier"),
        slot_offset=memory.layout.offset_of("check.time"),
        num_rounds=num_rounds,
        elapsed_ns=elapsed_ns.data_ptr(),
    )
    meet(bench)
    bench.run(time_barrier_spec(), params, grid=1, block=-(-team.num_ranks // 32) * 32)
    bench.log.check()
    per_round_us = int(elapsed_ns) / (num_rounds - 1) / 1e3
    bench.report("barrier inside a kernel", f"{per_round_us:.2f} us each", int(elapsed_ns) > 0)


def check_barrier_kernel(bench: Bench, memory: SymmetricMemory, barrier: LsaBarrier) -> None:
    num_barriers = bench.size(1000, 10)
    before = barrier_epoch(memory)
    meet(bench)
    # The clock of the events starts when the ranks have met in this one.
    barrier.enqueue()

    def enqueue_all() -> None:
        for _ in range(num_barriers):
            barrier.enqueue()

    elapsed_ms = bench.time_work_ms(enqueue_all)
    bench.log.check()
    figure = f"{elapsed_ms / num_barriers * 1e3:.2f} us each, launches included"
    bench.report("barrier as a kernel", figure, barrier_epoch(memory) == before + num_barriers + 1)


def check_barrier_in_graph(bench: Bench, memory: SymmetricMemory, barrier: LsaBarrier) -> None:
    """A replayed graph goes on counting, also between launches outside of it."""
    num_captured, num_replays = 10, bench.size(100, 3)
    before = barrier_epoch(memory)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(num_captured):
            barrier.enqueue()
    meet(bench)

    def replay_all() -> None:
        for _ in range(num_replays):
            graph.replay()
            barrier.enqueue()

    elapsed_ms = bench.time_work_ms(replay_all)
    bench.log.check()
    num_barriers = (num_captured + 1) * num_replays
    figure = f"{elapsed_ms / num_barriers * 1e3:.2f} us each"
    bench.report("barrier in a CUDA graph", figure, barrier_epoch(memory) == before + num_barriers)


def barrier_epoch(memory: SymmetricMemory) -> int:
    return int(memory.control("check.barrier", torch.int64)[MAX_LSA_RANKS])


def check_late_rank(bench: Bench, memory: SymmetricMemory, team: LsaTeam) -> None:
    """The last rank of each team stays away: the others name it, go on, and meet it when it comes."""
    late_place = team.num_ranks - 1
    barrier = LsaBarrier(
        memory,
        slot_offset=memory.layout.offset_of("check.barrier"),
        rank=bench.rank,
        log=bench.log,
        timeout_s=LATE_S,
        phase="barrier with a late rank",
        builder=bench.builder,
    )
    wanted_epoch = barrier_epoch(memory) + 1
    meet(bench)
    is_right, figure = True, "this rank was late"
    if team.rank != late_place:
        begin = time.monotonic()
        barrier.enqueue()
        torch.cuda.synchronize(bench.device)
        waited_s = time.monotonic() - begin
        try:
            bench.log.check()
            is_right, figure = False, "nobody was missed"
        except CommTimeoutError as error:
            figure = f"named rank {error.peers[0]} after {waited_s:.3f} s of {LATE_S:g} s"
            is_right = error.peers == (team.first_rank + late_place,) and error.rank == bench.rank
            is_right &= (error.expected, error.seen) == (wanted_epoch, wanted_epoch - 1)
            is_right &= error.phase == "barrier with a late rank" and LATE_S <= waited_s < LATE_S + 10.0
        bench.log.reset()
        is_right &= bench.works()
    meet(bench)
    # The late rank finds the round complete that it missed, and then all meet.
    if team.rank == late_place:
        barrier.enqueue()
        torch.cuda.synchronize(bench.device)
    meet(bench)
    barrier.enqueue()
    torch.cuda.synchronize(bench.device)
    bench.log.check()
    is_right &= barrier_epoch(memory) == wanted_epoch + 1 and bench.works()
    bench.report("late rank is named, survivors go on", figure, is_right)
