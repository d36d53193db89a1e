"""Runs GIN between make-believe nodes on GPUs, over the loopback network: a ring of puts, signals and gets.

usage: python -m deep_ep_core.launch --device cuda --ranks 4 --nodes 2 gpu_check.py [--max-bytes N] [--lost RANK]

Not a pytest module. Prints a table on rank 0; the exit status is 1 if something is wrong. It also runs over a real
network. What a rank sent is held against the counters where EP_LOOPBACK_COUNTERS names a new, empty folder.

With --lost, start it with EP_LOOPBACK_DROP_RANK at the same rank: its followers must name it when their waits expire.
"""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from gin_kernels import NUM_THREADS, PHASES, WORD_STEP, ring_params_type, ring_spec

from deep_ep_core.jit import LaunchShape, PreparedLaunch, get_kernel
from deep_ep_core.loopback import PeerCounts, read_counters
from deep_ep_core.nccl import Communicator, DeviceComm, DeviceCommConfig, GinConfig, GinConnection
from deep_ep_core.wait import TimeoutLog
from deep_ep_core.window import ControlRegion, SymmetricMemory

SIZES = (8, 64, 4096, 14336, 65536, 1 << 20, (1 << 20) + 8, 16 << 20, 64 << 20)
NUM_CONTEXTS = 4
NUM_ROUNDS = 3
OPEN_TIMEOUT_S = 120.0
WAIT_TIMEOUT_S = 20.0
LOST_TIMEOUT_S = 3.0
# At 1 to 2 GHz, about a minute.
TIMEOUT_CYCLES = 100_000_000_000
WORD = ControlRegion(name="check.word", num_bytes=8)
VALUE = ControlRegion(name="check.value", num_bytes=8)


class Ring:
    """The kernel, its memory, and how often each context has gone round."""

    def __init__(self, max_bytes: int, timeout_s: float) -> None:
        self.rank, self.num_ranks = dist.get_rank(), dist.get_world_size()
        self.device = torch.device("cuda", torch.cuda.current_device())
        self.communicator = Communicator.open(None, self.device, reuse=False, timeout_s=OPEN_TIMEOUT_S)
        assert self.communicator.needs_gin, "every rank is reached by load and store: start with --nodes"
        heap_bytes = 4 * max_bytes + (1 << 20)
        self.memory = SymmetricMemory(self.communicator, regions=[WORD, VALUE], heap_bytes=heap_bytes)
        gin = GinConfig(connection=GinConnection.FULL, num_contexts=NUM_CONTEXTS, num_signals=2)
        self.device_comm = DeviceComm(self.communicator, DeviceCommConfig(gin=gin))
        self.log = TimeoutLog(rank=self.rank, device=self.device)
        first_phase = self.log.add_phases(PHASES)
        self.wait = self.log.params(first_phase=first_phase, timeout_s=timeout_s)
        self.params_type = ring_params_type(self.device_comm.num_bytes)
        kernel = get_kernel(ring_spec(self.params_type), self.device.index or 0)
        self.launch = PreparedLaunch(kernel, LaunchShape(grid=(1, 1, 1), block=(NUM_THREADS, 1, 1)))
        self.source, self.signalled, self.covered, self.fetched = (
            self.memory.heap.empty((max_bytes,), torch.uint8) for _ in range(4)
        )
        self.rounds = [0] * NUM_CONTEXTS
        offsets = [self.memory.offset_of(it) for it in (self.source, self.signalled, self.covered, self.fetched)]
        assert len({tuple(found) for found in gather(offsets)}) == 1, "the heaps differ"
        self.offsets = offsets

    def neighbours(self, *, is_world: bool) -> tuple[int, int]:
        """The previous and the next rank of the ring."""
        team = self.communicator.world if is_world else self.communicator.rail
        first = self.rank - team.rank * team.stride
        previous = first + (team.rank - 1) % team.num_ranks * team.stride
        return previous, first + (team.rank + 1) % team.num_ranks * team.stride

    def enqueue(self, num_bytes: int, context_idx: int, *, is_world: bool, has_local_waits: bool = True) -> None:
        self.rounds[context_idx] += 1
        source, signalled, covered, fetched = self.offsets
        params = self.params_type(
            dev_comm=self.device_comm.data,
            window=self.memory.window.handle,
            wait=self.wait,
            source_offset=source,
            signalled_offset=signalled,
            covered_offset=covered,
            fetched_offset=fetched,
            value_offset=self.memory.layout.offset_of(VALUE.name),
            word_offset=self.memory.layout.offset_of(WORD.name),
            num_bytes=num_bytes,
            round=self.rounds[context_idx],
            word_round=sum(self.rounds),
            timeout_cycles=TIMEOUT_CYCLES,
            is_world=is_world,
            context_idx=context_idx,
            has_local_waits=has_local_waits,
        )
        self.launch(params, torch.cuda.current_stream().cuda_stream)

    def run(self, num_bytes: int, context_idx: int, *, is_world: bool) -> float:
        """One round, verified; returns its time in us."""
        previous, next_rank = self.neighbours(is_world=is_world)
        round_idx = sum(self.rounds)
        self.source[:num_bytes] = pattern(self.rank, round_idx, num_bytes, self.device)
        for landing in (self.signalled, self.covered, self.fetched):
            landing[:num_bytes] = 0
        before = self.counts()
        meet()
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        self.enqueue(num_bytes, context_idx, is_world=is_world)
        end.record()
        torch.cuda.synchronize()
        self.log.check()
        where = f"rank {self.rank}, {num_bytes} bytes, context {context_idx}, {'world' if is_world else 'rail'}"
        for name, landing, rank in (
            ("put with signal", self.signalled, previous),
            ("put before a strong signal", self.covered, previous),
            ("get", self.fetched, next_rank),
        ):
            wanted = pattern(rank, round_idx, num_bytes, self.device)
            num_wrong = int((landing[:num_bytes] != wanted).sum().item())
            assert num_wrong == 0, f"{name}: {num_wrong} bytes are wrong ({where})"
        place_of_previous = previous if is_world else previous // self.communicator.rail.stride
        value = self.memory.control(VALUE.name, torch.int64).item()
        assert value == self.rounds[context_idx] * 1000 + place_of_previous, f"value {value} ({where})"
        word = self.memory.control(WORD.name, torch.int64).item()
        assert word == WORD_STEP * sum(self.rounds), f"word {word} ({where})"
        self.check_counts(before, next_rank, num_bytes, where)
        meet()
        return float(start.elapsed_time(end)) * 1e3

    def counts(self) -> tuple[PeerCounts, ...] | None:
        folder = os.environ.get("EP_LOOPBACK_COUNTERS")
        return read_counters(Path(folder))[self.rank] if folder else None

    def check_counts(self, before: tuple[PeerCounts, ...] | None, peer: int, num_bytes: int, where: str) -> None:
        """Three puts, one of them of a value, with three signals, and a get."""
        after = self.counts()
        if before is None or after is None:
            return
        sent = after[peer] - before[peer]
        found = (sent.num_puts, sent.put_bytes, sent.num_signals, sent.num_gets, sent.get_bytes)
        assert found == (3, 2 * num_bytes + 8, 3, 1, num_bytes), f"counted {sent} ({where})"

    def close(self) -> None:
        self.device_comm.close()
        self.memory.close()
        self.communicator.close()


def pattern(rank: int, round_idx: int, num_bytes: int, device: torch.device) -> torch.Tensor:
    idx = torch.arange(num_bytes, dtype=torch.int64, device=device)
    return ((idx * 131 + (idx >> 8) * 17 + rank * 29 + round_idx * 7) % 251).to(torch.uint8)


def gather(value: object) -> list[Any]:
    values: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values


def meet() -> None:
    torch.cuda.synchronize()
    dist.barrier()


def check_sizes(max_bytes: int) -> None:
    ring = Ring(max_bytes, WAIT_TIMEOUT_S)
    if ring.rank == 0:
        print(f"{torch.cuda.get_device_name()}, {ring.communicator.library}, GIN {ring.device_comm.gin_type.name}, ")
        print(f"{ring.device_comm.num_gin_contexts} contexts, {ring.communicator.topology}", flush=True)
        print(f"{'team':<8}{'bytes':>12}{'us':>12}", flush=True)
    for num_bytes in (size for size in SIZES if size <= max_bytes):
        for is_world in (False, True):
            times_us = [
                ring.run(num_bytes, (3 * round_idx + is_world) % NUM_CONTEXTS, is_world=is_world)
                for round_idx in range(NUM_ROUNDS)
            ]
            if ring.rank == 0:
                print(f"{'world' if is_world else 'rail':<8}{num_bytes:>12}{min(times_us):>12.1f}", flush=True)
    ring.close()


def check_lost(lost: int) -> None:
    """Whoever waits for the lost rank names it; the others go round."""
    ring = Ring(1 << 20, LOST_TIMEOUT_S)
    previous, _ = ring.neighbours(is_world=False)
    meet()
    ring.enqueue(4096, 0, is_world=False, has_local_waits=False)
    torch.cuda.synchronize()
    report = ring.log.read()
    if lost in (ring.rank, previous):
        assert report is not None, f"rank {ring.rank} heard from rank {previous}"
        assert report.peer == previous, report
    else:
        assert report is None, report
    reports = gather(report)
    if ring.rank == 0:
        print("\n".join(map(str, reports)), flush=True)
    meet()
    ring.close()


def main() -> int:
    parser = argparse.ArgumentParser(description="Run GIN's operations between make-believe nodes.")
    parser.add_argument("--max-bytes", type=int, default=SIZES[-1])
    parser.add_argument("--lost", type=int, default=None, metavar="RANK")
    arguments = parser.parse_args()
    torch.cuda.set_device(int(os.environ["LOCAL_RANK"]) % torch.cuda.device_count())
    torch.zeros(1, device="cuda")
    dist.init_process_group("gloo")
    if arguments.lost is None:
        check_sizes(arguments.max_bytes)
    else:
        check_lost(arguments.lost)
    # A rank that exits takes its network with it, which peers may still need.
    dist.barrier()
    if dist.get_rank() == 0:
        print("all right", flush=True)
    dist.destroy_process_group()
    return 0


if __name__ == "__main__":
    sys.exit(main())
