"""The part of gpu_check.py that needs one rank: every wrapper family against torch, flags, messages, and deadlines."""

from __future__ import annotations

import torch
from check_bench import Bench
from device_kernels import (
    COPY_VARIANTS,
    NUM_COPY_STAGES,
    CacheHint,
    ChainParams,
    CopyBytesParams,
    CopyWordsParams,
    CountParams,
    ExpireParams,
    InspectParams,
    MeetPairsParams,
    PingPongParams,
    Scope,
    TalkParams,
    VouchParams,
    WaitKind,
    chain_spec,
    copy_bytes_spec,
    copy_words_spec,
    count_spec,
    expire_spec,
    inspect_spec,
    meet_pairs_spec,
    ping_pong_spec,
    talk_spec,
    vouch_spec,
)

from deep_ep_core.errors import CommTimeoutError
from deep_ep_core.jit import KernelSpec

EXPIRE_S = 0.3
GUARD_BYTES = 64


def run_checks(bench: Bench) -> None:
    check_words(bench)
    check_atomics(bench)
    check_warps_and_clocks(bench)
    check_dependent_launches(bench)
    check_pairs_of_warps(bench)
    for hint, is_inverted in COPY_VARIANTS:
        check_bulk_copies(bench, hint, is_inverted)
    for scope in Scope:
        for is_counted in (False, True):
            check_flags(bench, scope, is_counted)
    check_messages(bench)
    check_vouching_messages(bench)
    for kind in WaitKind:
        check_deadline(bench, kind)


def random_words(bench: Bench, *shape: int, dtype: torch.dtype) -> torch.Tensor:
    info = torch.iinfo(dtype)
    return torch.randint(info.min, info.max, shape, dtype=dtype, device=bench.device)


def check_words(bench: Bench) -> None:
    sizes = (1, 31, 32, 33, bench.size(100_003, 1003))
    is_right = True
    for num_words in sizes:
        x32 = random_words(bench, num_words, dtype=torch.int32)
        x64 = random_words(bench, num_words, dtype=torch.int64)
        x128 = random_words(bench, num_words, 2, dtype=torch.int64)
        y32, y64 = bench.zeros(4, num_words, dtype=torch.int32), bench.zeros(4, num_words)
        y128 = bench.zeros(2, num_words, 2)
        params = CopyWordsParams(
            x32=x32.data_ptr(),
            y32=y32.data_ptr(),
            x64=x64.data_ptr(),
            y64=y64.data_ptr(),
            x128=x128.data_ptr(),
            y128=y128.data_ptr(),
            num_words=num_words,
        )
        bench.run(copy_words_spec(), params, grid=-(-num_words // 128), block=128)
        is_right &= all(torch.equal(y, x.expand_as(y)) for x, y in ((x32, y32), (x64, y64), (x128, y128)))
    bench.report("loads and stores, scalar and vector", f"{sum(sizes)} words x 10 pairs", is_right)


def check_atomics(bench: Bench) -> None:
    grid, block = 8, 128
    num_threads = grid * block
    num_claims = num_threads // 32
    words = {32: torch.int32, 64: torch.int64}
    sums, counters, tickets, claims = (
        {bits: bench.zeros(*shape, dtype=dtype) for bits, dtype in words.items()}
        for shape in ((4,), (4,), (4, num_threads), (2, num_claims))
    )
    num_winners, values, num_blocks_done = (bench.zeros(n, dtype=torch.int32) for n in (4, num_threads, 1))
    total = bench.zeros(1)
    params = CountParams(
        sums32=sums[32].data_ptr(),
        sums64=sums[64].data_ptr(),
        counters32=counters[32].data_ptr(),
        counters64=counters[64].data_ptr(),
        tickets32=tickets[32].data_ptr(),
        tickets64=tickets[64].data_ptr(),
        claims32=claims[32].data_ptr(),
        claims64=claims[64].data_ptr(),
        num_winners=num_winners.data_ptr(),
        values=values.data_ptr(),
        num_blocks_done=num_blocks_done.data_ptr(),
        total=total.data_ptr(),
    )
    bench.run(count_spec(), params, grid=grid, block=block)
    idx = torch.arange(num_threads, device=bench.device)
    wanted_sum = num_threads * (num_threads + 1) // 2
    is_right = bool((sums[32] == wanted_sum).all() and (sums[64] == wanted_sum << 24).all())
    is_right &= int(total) == int((idx * idx).sum()) and bool((num_winners == num_claims).all())
    for bits in words:
        is_right &= bool((counters[bits] == num_threads).all())
        is_right &= bool((tickets[bits].sort(dim=1).values == idx).all())
        is_winner = (claims[bits] > 0) & ((claims[bits] - 1) % num_claims == idx[:num_claims])
        is_right &= bool(is_winner.all())
    bench.report("additions, compare-and-swap, last block", f"{num_threads} threads on one word", is_right)


def check_warps_and_clocks(bench: Bench) -> None:
    grid, block, delay_ns = 2, 96, 2_000_000
    lanes, is_elected = (bench.zeros(grid * block, dtype=torch.int32) for _ in range(2))
    elapsed_ns, elapsed_cycles = bench.zeros(grid * block), bench.zeros(grid * block)
    params = InspectParams(
        lanes=lanes.data_ptr(),
        is_elected=is_elected.data_ptr(),
        elapsed_ns=elapsed_ns.data_ptr(),
        elapsed_cycles=elapsed_cycles.data_ptr(),
        delay_ns=delay_ns,
    )
    event_ns = bench.run(inspect_spec(), params, grid=grid, block=block) * 1e6
    is_right = torch.equal(lanes, (torch.arange(grid * block, device=bench.device) % 32).int())
    is_right &= bool((is_elected.view(-1, 32).sum(dim=1) == 1).all())
    longest_ns = int(elapsed_ns.max())
    # The events' clock agrees with the kernel's, and both have seen the delay; cycles are of a GPU of 0.1 to 4 GHz.
    is_right &= int(elapsed_ns.min()) >= delay_ns and longest_ns <= event_ns * 1.1
    cycles_per_ns = float(elapsed_cycles.double().mean()) / float(elapsed_ns.double().mean())
    is_right &= 0.1 < cycles_per_ns < 4
    bench.report("lanes, election, clocks", f"{longest_ns / 1e6:.3f} ms waited, {cycles_per_ns:.2f} GHz", is_right)


def check_dependent_launches(bench: Bench) -> None:
    grid, block, num_launches = 8, 128, bench.size(200, 10)
    values = bench.zeros(grid * block, dtype=torch.int32)
    launch = bench.prepare(chain_spec(), grid=grid, block=block, programmatic=True)
    params = ChainParams(values=values.data_ptr(), delay_ns=20_000)
    for _ in range(num_launches):
        launch(params, bench.stream)
    torch.cuda.synchronize(bench.device)
    is_right = bool((values == num_launches).all())
    bench.report("programmatic dependent launches", f"{num_launches} in a chain", is_right)


def check_pairs_of_warps(bench: Bench) -> None:
    grid, block, num_rounds = 4, 256, bench.size(10_000, 20)
    num_wrong = torch.full((grid * block,), -1, dtype=torch.int32, device=bench.device)
    params = MeetPairsParams(num_wrong=num_wrong.data_ptr(), num_rounds=num_rounds)
    bench.run(meet_pairs_spec(), params, grid=grid, block=block)
    bench.report("barriers of pairs of warps", f"{num_rounds} rounds", bool((num_wrong == 0).all()))


def check_bulk_copies(bench: Bench, hint: CacheHint, is_inverted: bool) -> None:
    spec = copy_bytes_spec(hint=hint, is_inverted=is_inverted)
    is_right, num_bytes_moved = True, 0
    for chunk_bytes in (16, 48, 1008, 4096, 16384):
        for num_chunks in (0, 1, 2, 3, 4, 33, bench.size(20_011, 67)):
            for offset in (0, 16, 112):
                is_right &= is_copy_right(bench, spec, chunk_bytes, num_chunks, offset, is_inverted)
                num_bytes_moved += chunk_bytes * num_chunks
    what = f"bulk copies, {hint.name.lower()}{', changed on the way' if is_inverted else ''}"
    bench.report(what, f"{num_bytes_moved / 1e9:.2f} GB in chunks of 16 B to 16 KiB", is_right)


def is_copy_right(
    bench: Bench, spec: KernelSpec, chunk_bytes: int, num_chunks: int, offset: int, is_inverted: bool
) -> bool:
    num_bytes = chunk_bytes * num_chunks
    x = torch.randint(0, 256, (offset + num_bytes + 16,), dtype=torch.uint8, device=bench.device)
    y = torch.full((offset + num_bytes + GUARD_BYTES,), 0xA5, dtype=torch.uint8, device=bench.device)
    num_failures = bench.zeros(1, dtype=torch.int32)
    stage_bytes = chunk_bytes + 16
    params = CopyBytesParams(
        wait=bench.wait("bulk load", "change"),
        x=x.data_ptr() + offset,
        y=y.data_ptr() + offset,
        num_chunks=num_chunks,
        chunk_bytes=chunk_bytes,
        stage_bytes=stage_bytes,
        smem_offset=offset,
        num_failures=num_failures.data_ptr(),
    )
    smem_bytes = offset + NUM_COPY_STAGES * stage_bytes
    bench.run(spec, params, grid=min(max(num_chunks, 1), 48), block=128, smem_bytes=smem_bytes)
    wanted = x[offset : offset + num_bytes]
    copied = y[offset : offset + num_bytes]
    is_around_untouched = bool((y[:offset] == 0xA5).all() and (y[offset + num_bytes :] == 0xA5).all())
    return torch.equal(copied, ~wanted if is_inverted else wanted) and is_around_untouched and not int(num_failures)


def check_flags(bench: Bench, scope: Scope, is_counted: bool) -> None:
    num_rounds, num_words = bench.size(10_000, 50), bench.size(1000, 200)
    flags, payloads = bench.zeros(2), bench.zeros(2, num_words)
    num_wrong, num_late = bench.zeros(1, dtype=torch.int32), bench.zeros(1, dtype=torch.int32)
    spec = ping_pong_spec(scope=scope, is_counted=is_counted)
    elapsed_ms = 0.0
    for launch_idx in range(2):
        params = PingPongParams(
            wait=bench.wait("block 0 waits", "block 1 waits"),
            flags=flags.data_ptr(),
            payloads=payloads.data_ptr(),
            first_round=1 + launch_idx * num_rounds,
            num_rounds=num_rounds,
            num_words=num_words,
            num_wrong=num_wrong.data_ptr(),
            num_late=num_late.data_ptr(),
        )
        elapsed_ms = bench.run(spec, params, grid=2, block=128)
    bench.log.check()
    wanted_flag = 2 * num_rounds * (4 if is_counted else 1)
    is_right = not int(num_wrong) and not int(num_late) and flags.tolist() == [wanted_flag] * 2
    what = f"flags between blocks, {scope.name.lower()}, {'raised by each warp' if is_counted else 'published'}"
    bench.report(what, f"{2 * num_rounds} rounds, {elapsed_ms / num_rounds * 1e3:.2f} us each", is_right)


def check_messages(bench: Bench) -> None:
    num_epochs, block = bench.size(10_000, 50), 128
    slots, epochs = bench.zeros(2, 2, block, 2), bench.zeros(2)
    num_wrong, num_late = bench.zeros(1, dtype=torch.int32), bench.zeros(1, dtype=torch.int32)
    params = TalkParams(
        wait=bench.wait("block 0 waits", "block 1 waits"),
        slots=slots.data_ptr(),
        epochs=epochs.data_ptr(),
        num_epochs=num_epochs,
        num_wrong=num_wrong.data_ptr(),
        num_late=num_late.data_ptr(),
    )
    elapsed_ms = bench.run(talk_spec(), params, grid=2, block=block)
    num_launches = 1 + run_in_graph(bench, talk_spec(), params, grid=2, block=block)
    bench.log.check()
    is_right = not int(num_wrong) and not int(num_late) and epochs.tolist() == [num_launches * num_epochs] * 2
    bench.report("messages, launched and in a graph", f"{elapsed_ms / num_epochs * 1e3:.2f} us each", is_right)


def check_vouching_messages(bench: Bench) -> None:
    num_epochs, num_words = bench.size(10_000, 50), 512
    slots, words, epochs = bench.zeros(2, 2, 2), bench.zeros(2, num_words), bench.zeros(2)
    num_wrong, num_late = bench.zeros(1, dtype=torch.int32), bench.zeros(1, dtype=torch.int32)
    params = VouchParams(
        wait=bench.wait("block 0 waits", "block 1 waits"),
        slots=slots.data_ptr(),
        words=words.data_ptr(),
        epochs=epochs.data_ptr(),
        num_epochs=num_epochs,
        num_words=num_words,
        num_wrong=num_wrong.data_ptr(),
        num_late=num_late.data_ptr(),
    )
    elapsed_ms = bench.run(vouch_spec(), params, grid=2, block=128)
    bench.log.check()
    is_right = not int(num_wrong) and not int(num_late) and epochs.tolist() == [num_epochs] * 2
    bench.report("messages with fences, for plain writes", f"{elapsed_ms / num_epochs * 1e3:.2f} us each", is_right)


def run_in_graph(bench: Bench, spec: KernelSpec, params: TalkParams, *, grid: int, block: int) -> int:
    """Capture two launches and replay them three times; returns how often the kernel ran."""
    launch = bench.prepare(spec, grid=grid, block=block)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(2):
            launch(params, bench.stream)
    for _ in range(3):
        graph.replay()
    torch.cuda.synchronize(bench.device)
    return 6


def check_deadline(bench: Bench, kind: WaitKind) -> None:
    """The right record, all waits end, later ones too, the context lives, and after a reset waits wait again."""
    grid, block = 4, 64
    num_threads = grid * block
    idx = torch.arange(num_threads, device=bench.device)
    flags = idx + 5
    slots = torch.stack([(idx + 5) << 32] * 2, dim=1)
    num_arrived, num_late = bench.zeros(1, dtype=torch.int32), bench.zeros(1, dtype=torch.int32)

    def launch(timeout_s: float) -> float:
        params = ExpireParams(
            wait=bench.wait("not this one", f"wait for a {kind.name.lower()}", timeout_s=timeout_s),
            flags=flags.data_ptr(),
            slots=slots.data_ptr(),
            num_arrived=num_arrived.data_ptr(),
            num_late=num_late.data_ptr(),
        )
        return bench.run(expire_spec(kind), params, grid=grid, block=block)

    expired_ms = launch(EXPIRE_S)
    is_right = int(num_late) == num_threads and bench.log.has_record and bench.works()
    is_right &= is_error_right(bench, kind, num_threads)
    # Waits of 1000 s end at once, and do not overwrite the record.
    left_ms = launch(1000.0)
    is_right &= int(num_late) == 2 * num_threads and is_error_right(bench, kind, num_threads)
    bench.log.reset()
    bench.log.check()
    if kind is not WaitKind.MBARRIER:
        flags += 995
        slots += 995 << 32
        launch(bench.timeout_s)
        bench.log.check()
        is_right &= int(num_arrived) == num_threads
    bench.report(
        f"deadline of {EXPIRE_S * 1e3:.0f} ms for a {kind.name.lower()}",
        f"kernel ended after {expired_ms:.1f} ms, the next one after {left_ms:.2f} ms",
        # Two clocks tell the time here, so one percent is theirs.
        is_right and expired_ms >= EXPIRE_S * 990,
    )


def is_error_right(bench: Bench, kind: WaitKind, num_threads: int) -> bool:
    try:
        bench.log.check()
    except CommTimeoutError as error:
        thread_idx = error.peers[0] - 100
        wanted = (0, 1) if kind is WaitKind.MBARRIER else (thread_idx + 1000, thread_idx + 5)
        is_right = 0 <= thread_idx < num_threads and (error.expected, error.seen) == wanted
        return is_right and error.rank == bench.rank and error.phase == f"wait for a {kind.name.lower()}"
    return False
