"""Runs signals between streams, and copies by the copy engines, on a GPU; one line a check, exit status 1 if one fails.

usage: python -m deep_ep_core.launch --ranks 2 --device cuda check_signals.py [PART ...]

Not a pytest module: it needs a GPU, torch with CUDA, cuda-bindings and NCCL 2.30.4 or newer, and MPS where ranks share
the GPU. `tests/test_stream_signals.py` has what can be shown without one.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable, Sequence

import torch
import torch.distributed as dist

from deep_ep_core.copy_engine import Copy, copy_batch
from deep_ep_core.errors import CommTimeoutError, ConfigError
from deep_ep_core.jit.driver import load_driver
from deep_ep_core.nccl import Communicator
from deep_ep_core.stream_signals import Awaited, StreamSignals
from deep_ep_core.window import ControlRegion, SymmetricMemory

NUM_WORDS = 64
DATA_BYTES = 64 << 20
NUM_ROUNDS = 200
NUM_STREAMS = 40
NUM_HOST_CALLS = 300
TIMEOUT_S = 20.0
SHORT_S = 0.5


class Checks:
    """Two ranks with a window each: words, and data that the peer fills."""

    def __init__(self, memory: SymmetricMemory, rank: int) -> None:
        self.memory, self.rank, self.peer = memory, rank, 1 - rank
        self.device = memory.device
        self.words_offset = memory.layout.offset_of("check.words")
        self.stream = torch.cuda.Stream(self.device)
        # A heap's first region lies at one offset on both ranks.
        self.inbox = memory.heap.try_empty((DATA_BYTES // 8,), torch.int64)
        assert self.inbox is not None
        offset = memory.offset_of(self.inbox)
        assert offset is not None
        self.inbox_there = memory.peer_address(self.peer, offset)
        self.is_right = True

    def mine(self, idx: int) -> int:
        return self.memory.address + self.words_offset + 8 * idx

    def theirs(self, idx: int) -> int:
        address = self.memory.peer_address(self.peer, self.words_offset + 8 * idx)
        assert address is not None
        return address

    def signals(self, timeout_s: float) -> StreamSignals:
        return StreamSignals(self.device, rank=self.rank, timeout_s=timeout_s, name="check")

    def report(self, name: str, is_right: bool, figures: str) -> None:
        self.is_right &= is_right
        if self.rank == 0 or not is_right:
            print(f"{'ok   ' if is_right else 'WRONG'} {name}: {figures}", flush=True)

    def meet(self) -> None:
        torch.cuda.synchronize(self.device)
        dist.barrier()

    def us_of(self, work: Callable[[], None], num_times: int) -> float:
        work()
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        begin.record(self.stream)
        for _ in range(num_times):
            work()
        end.record(self.stream)
        end.synchronize()
        return begin.elapsed_time(end) * 1000 / num_times

    # The checks

    def ping_pong(self) -> None:
        handle = self.stream.cuda_stream
        with torch.cuda.stream(self.stream):
            signals = self.signals(TIMEOUT_S)
            begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            self.meet()
            for value in range(1, NUM_ROUNDS + 1):
                if value == 11:
                    begin.record(self.stream)
                if self.rank == 0:
                    signals.write(handle, self.theirs(0), value)
                signals.wait(handle, self.mine(0), value, peer=self.peer, phase="ping-pong")
                if self.rank == 1:
                    signals.write(handle, self.theirs(0), value)
            end.record(self.stream)
        self.meet()
        signals.check()
        signals.close()
        self.report("ping-pong", True, f"{begin.elapsed_time(end) * 1000 / (NUM_ROUNDS - 10):.1f} us a round trip")

    def data_before_signal(self) -> None:
        """What was copied before the write of a word is there for who waits for the word."""
        handle = self.stream.cuda_stream
        assert self.inbox is not None
        assert self.inbox_there is not None
        signals = self.signals(TIMEOUT_S)
        num_wrong = torch.zeros(1, dtype=torch.int64, device=self.device)
        with torch.cuda.stream(self.stream):
            source = torch.empty_like(self.inbox)
            for value in range(1, 31):
                source.fill_(value * 2 + self.rank)
                signals.wait(handle, self.mine(2), value - 1, peer=self.peer, phase="credit")
                copy_batch(handle, [Copy(self.inbox_there, source.data_ptr(), DATA_BYTES)])
                signals.write(handle, self.theirs(1), value)
                signals.wait(handle, self.mine(1), value, peer=self.peer, phase="data")
                num_wrong += (self.inbox != value * 2 + self.peer).sum()
                signals.write(handle, self.theirs(2), value)
        self.meet()
        signals.check()
        signals.close()
        self.report("data before signal", int(num_wrong) == 0, f"{int(num_wrong)} wrong elements in 30 rounds")

    def copy_rates(self) -> None:
        """One rank at a time: 64 MiB within the GPU, by each call that there is."""
        driver = load_driver()
        handle = self.stream.cuda_stream
        source = torch.zeros(DATA_BYTES, dtype=torch.uint8, device=self.device)
        target = torch.zeros_like(source)
        torch.cuda.synchronize(self.device)
        pair = target.data_ptr(), source.data_ptr()
        plain = driver.CUmemcpyAttributes()
        plain.srcAccessOrder = driver.CUmemcpySrcAccessOrder.CU_MEMCPY_SRC_ACCESS_ORDER_STREAM
        pointers = [driver.CUdeviceptr(address) for address in pair]
        quarter, half = DATA_BYTES // 4, DATA_BYTES // 2
        there = self.inbox_there or 0
        ways: dict[str, Callable[[], None]] = {
            "cuMemcpyAsync": lambda: driver.cuMemcpyAsync(*pair, DATA_BYTES, handle),
            "batch without a hint": lambda: driver.cuMemcpyBatchAsync(
                pointers[:1], pointers[1:], [DATA_BYTES], 1, [plain], [0], 1, handle
            ),
            "copy_batch in 2": lambda: copy_batch(
                handle, [Copy(pair[0] + at, pair[1] + at, half) for at in range(0, DATA_BYTES, half)]
            ),
            "copy_batch in 4": lambda: copy_batch(
                handle, [Copy(pair[0] + at, pair[1] + at, quarter) for at in range(0, DATA_BYTES, quarter)]
            ),
            "copy_batch to the peer": lambda: copy_batch(handle, [Copy(there, pair[1], DATA_BYTES)]),
            "copy_batch to the peer in 4": lambda: copy_batch(
                handle, [Copy(there + at, pair[1] + at, quarter) for at in range(0, DATA_BYTES, quarter)]
            ),
            "cuMemcpyAsync to the peer": lambda: driver.cuMemcpyAsync(there, pair[1], DATA_BYTES, handle),
        }
        for turn in (0, 1):
            self.meet()
            if turn == self.rank:
                for name, work in ways.items():
                    rate = 2 * DATA_BYTES / self.us_of(work, 20) / 1e3
                    self.report(name, True, f"{rate:.0f} GB/s, read and written")
        self.meet()

    def host_cost(self) -> None:
        handle = self.stream.cuda_stream
        signals = self.signals(TIMEOUT_S)
        words = [Awaited(self.mine(8 + idx), 0, self.peer) for idx in range(3)]
        copies = [Copy(self.inbox_there or 0, self.mine(0), 32)] * 4
        ways: dict[str, Callable[[], None]] = {
            "write": lambda: signals.write(handle, self.theirs(20), 1),
            "wait": lambda: signals.wait(handle, self.mine(8), 0, peer=self.peer, phase="cost"),
            "wait_all of 3": lambda: signals.wait_all(handle, words, phase="cost"),
            "copy_batch of 1": lambda: copy_batch(handle, copies[:1]),
            "copy_batch of 4": lambda: copy_batch(handle, copies),
        }
        for name, work in ways.items():
            work()
            torch.cuda.synchronize(self.device)
            begin = time.perf_counter()
            for _ in range(NUM_HOST_CALLS):
                work()
            cost_us = (time.perf_counter() - begin) / NUM_HOST_CALLS * 1e6
            torch.cuda.synchronize(self.device)
            self.report(f"host time of {name}", True, f"{cost_us:.1f} us")
        signals.close()
        self.meet()

    def expiry(
        self, name: str, block: Callable[[], None], *, num_streams: int = 1, streams: Sequence[torch.cuda.Stream] = ()
    ) -> None:
        """Both ranks wait for what nobody writes; the host is blocked meanwhile in the way given."""
        signals = self.signals(SHORT_S)
        streams = streams or [torch.cuda.Stream(self.device) for _ in range(num_streams)]
        dist.barrier()
        begin = time.perf_counter()
        for idx, stream in enumerate(streams):
            value = 10**6 + int(time.time())  # above what any check before wrote
            signals.wait(stream.cuda_stream, self.mine(24 + idx % 32), value, peer=self.peer, phase="expiry")
        block()
        torch.cuda.synchronize(self.device)
        took_s = time.perf_counter() - begin
        figures = f"no error after {took_s:.2f} s"
        is_right = False
        try:
            signals.check()
        except CommTimeoutError as error:
            is_right = error.peers == (self.peer,) and error.phase == "expiry" and SHORT_S <= took_s < SHORT_S + 3
            figures = f"{took_s:.2f} s of {SHORT_S} s; peers {error.peers}, seen {error.seen}"
        sum_after = int(torch.arange(1000, device=self.device).sum())
        signals.close()
        self.memory.control("check.words").zero_()
        self.report(f"expiry, {name}", is_right and sum_after == 499500, f"{figures}; sum after it {sum_after}")
        self.meet()

    def expiry_behind_copies(self) -> None:
        """The wait stands in the queue of a copy engine, as behind the copies of an all-gather."""
        source = torch.zeros(DATA_BYTES, dtype=torch.uint8, device=self.device)
        streams = [torch.cuda.Stream(self.device) for _ in range(4)]
        torch.cuda.synchronize(self.device)
        for stream in streams:
            copy_batch(stream.cuda_stream, [Copy(self.inbox_there or 0, source.data_ptr(), DATA_BYTES)])
        self.expiry("behind copies", lambda: None, streams=streams)

    def expiry_in_free(self) -> None:
        """`cudaFree` waits for the device, and holds up most calls of other threads."""
        spare = torch.empty(1 << 30, dtype=torch.uint8, device=self.device)
        del spare
        self.expiry("host in cudaFree", torch.cuda.empty_cache)

    def capture(self) -> None:
        signals = self.signals(TIMEOUT_S)
        signals.wait(self.stream.cuda_stream, self.mine(60), 0, peer=self.peer, phase="capture")
        graph = torch.cuda.CUDAGraph()
        said = "nothing"
        counter = torch.zeros(1, device=self.device)
        with torch.cuda.graph(graph):
            try:
                signals.write(torch.cuda.current_stream(self.device).cuda_stream, self.theirs(60), 1)
            except ConfigError as error:
                said = str(error)
            counter += 1
            # The watcher asks about the wait of before meanwhile.
            time.sleep(0.1)
        graph.replay()
        torch.cuda.synchronize(self.device)
        is_right = "must not be captured" in said and float(counter) == 1
        self.report("capture", is_right, f"refused, and the capture goes on; counter {float(counter)}")
        signals.close()
        self.meet()


PARTS: dict[str, Callable[[Checks], None]] = {
    "ping-pong": Checks.ping_pong,
    "data": Checks.data_before_signal,
    "rates": Checks.copy_rates,
    "host": Checks.host_cost,
    "expiry": lambda checks: checks.expiry("host in synchronize", lambda: None),
    "expiry-asleep": lambda checks: checks.expiry("host asleep", lambda: time.sleep(2 * SHORT_S)),
    "expiry-streams": lambda checks: checks.expiry("40 streams wait", lambda: None, num_streams=NUM_STREAMS),
    "expiry-copies": Checks.expiry_behind_copies,
    "capture": Checks.capture,
    "expiry-free": Checks.expiry_in_free,
}


def main() -> int:
    parts = sys.argv[1:] or list(PARTS)
    if unknown := [part for part in parts if part not in PARTS]:
        raise SystemExit(f"parts are {', '.join(PARTS)} (got {unknown[0]})")
    rank, num_ranks = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    if num_ranks != 2:
        raise SystemExit("check_signals.py needs two ranks")
    device = torch.device("cuda", int(os.environ["LOCAL_RANK"]) % torch.cuda.device_count())
    torch.cuda.set_device(device)
    dist.init_process_group("gloo")
    with Communicator.open(None, device) as communicator:
        regions = [ControlRegion(name="check.words", num_bytes=8 * NUM_WORDS)]
        with SymmetricMemory(communicator, regions=regions, heap_bytes=2 * DATA_BYTES) as memory:
            checks = Checks(memory, rank)
            for part in parts:
                PARTS[part](checks)
    outcomes = [None] * num_ranks
    dist.all_gather_object(outcomes, checks.is_right)
    if rank == 0:
        print("all right" if all(outcomes) else "WRONG", flush=True)
    dist.barrier()
    dist.destroy_process_group()
    return 0 if all(outcomes) else 1


if __name__ == "__main__":
    sys.exit(main())
