"""Runs the NCCL runtime on GPUs: communicators, windows, peers' memory, heap, device communicators, closing.

usage: python -m deep_ep_core.launch --ranks N [--nodes M] gpu_check.py

Not a pytest module. N ranks may share one GPU, which needs NCCL 2.30 or newer, and takes long without MPS. With M nodes
there are M LSA teams. Prints a table on rank 0; the exit status is 1 if something is wrong. The last rank of several
ends early, on purpose: the others must close without it.
"""

from __future__ import annotations

import functools
import os
import statistics
import struct
import sys
import time
import traceback
from collections.abc import Callable
from math import gcd
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from deep_ep_core.env import get_env
from deep_ep_core.errors import TransportError
from deep_ep_core.heap import Heap
from deep_ep_core.jit import JitOptions
from deep_ep_core.jit.toolchain import find_nccl_headers
from deep_ep_core.nccl import (
    Communicator,
    DeviceComm,
    DeviceCommConfig,
    GinConfig,
    GinConnection,
    GinType,
    Window,
    load_nccl,
)
from deep_ep_core.nccl.library import version_text
from deep_ep_core.raw_tensor import tensor_over
from deep_ep_core.window import ControlRegion, SymmetricMemory

TIMEOUT_S = 120.0
HEAP_BYTES = 64 << 20
NUM_VALUES = 100_003  # no multiple of anything that is counted in
MAX_RANKS = 64
INBOX = ControlRegion(name="check.inbox", num_bytes=8 * MAX_RANKS)
FLAGS = ControlRegion(name="check.flags", num_bytes=100)
# At 1 to 2 GHz, far longer than a launch takes.
SLEEP_CYCLES = 100_000_000
MAX_CLOSE_MS = 10_000

# What the interpreter finds open when it ends.
left_open: list[object] = []


class Check:
    """The ranks of this run, and the table of what they found."""

    def __init__(self) -> None:
        self.rank, self.num_ranks = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
        local_rank = int(os.environ["LOCAL_RANK"])
        num_gpus = torch.cuda.device_count()
        if num_gpus < self.num_ranks:
            os.environ.setdefault("NCCL_MULTI_RANK_GPU_ENABLE", "1")
            # All ranks' kernels must fit on the GPU at once.
            os.environ.setdefault("NCCL_MAX_CTAS", "2")
        self.device = torch.device("cuda", local_rank % num_gpus)
        torch.cuda.set_device(self.device)
        torch.zeros(1, device=self.device)
        dist.init_process_group("cpu:gloo,cuda:nccl")
        self.host_group = dist.new_group(backend="gloo")
        self.is_right = True

    def gather(self, value: object) -> list[Any]:
        values: list[Any] = [None] * self.num_ranks
        dist.all_gather_object(values, value, group=self.host_group)
        return values

    def meet(self) -> None:
        torch.cuda.synchronize(self.device)
        dist.barrier(group=self.host_group)

    def run(self, name: str, work: Callable[[], str]) -> None:
        """Run a check on all ranks and print a line of the table."""
        self.meet()
        start = time.perf_counter()
        try:
            outcome = (True, work())
        except Exception:
            outcome = (False, traceback.format_exc())
        elapsed_ms = (time.perf_counter() - start) * 1e3
        outcomes = self.gather(outcome)
        wrong = [(rank, text) for rank, (is_right, text) in enumerate(outcomes) if not is_right]
        self.is_right &= not wrong
        if self.rank == 0:
            print(f"{name:<44}{elapsed_ms:>10.1f}  {'WRONG' if wrong else 'right'}  {'' if wrong else outcome[1]}")
            for rank, text in wrong:
                print(f"--- rank {rank}:\n{text}", flush=True)

    def open(self, *, reuse: bool, group: dist.ProcessGroup | None = None) -> Communicator:
        return Communicator.open(group, self.device, reuse=reuse, timeout_s=TIMEOUT_S)

    def memory(self, communicator: Communicator) -> SymmetricMemory:
        return SymmetricMemory(communicator, regions=[FLAGS, INBOX], heap_bytes=HEAP_BYTES)


def main() -> int:
    check = Check()
    if check.rank == 0:
        print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}, CUDA {torch.version.cuda}")
        print(f"{check.num_ranks} ranks on {torch.cuda.device_count()} GPUs")
        print(f"\n{'check':<44}{'ms':>10}")
    check.run("one libnccl, and torch's", check_library)
    check_kind(check, "torch's", reuse=True)
    check_kind(check, "own", reuse=False)
    for order in ("memory, device, comm", "comm, memory, device", "device, comm, memory", "dropped"):
        check.run(f"own: close {order}", functools.partial(check_close_order, check, order))
    check.run("torch's: destroyed by torch first", lambda: check_torch_first(check))
    return check_lost_rank(check)


def check_kind(check: Check, kind: str, *, reuse: bool) -> None:
    """All checks of a communicator that is borrowed from torch, or made."""
    opened: list[Communicator] = []

    def open_communicator() -> str:
        opened.append(check.open(reuse=reuse))
        return check_communicator(check, opened[0], is_owned=not reuse)

    check.run(f"{kind}: open, properties, teams", open_communicator)
    if not all(check.gather(bool(opened))):
        return
    communicator = opened[0]
    memory = check.memory(communicator)
    heap = memory.heap
    works: dict[str, Callable[[], str]] = {
        "control area": lambda: check_control(memory),
        "peers' heap tensors, read": lambda: check_reads(check, communicator, memory),
        "peers' control area, written": lambda: check_writes(check, communicator, memory),
        "two windows at once": lambda: check_second_window(check, communicator, memory),
        "heap: full, reuse on one stream": lambda: check_heap(heap),
        "heap: reuse by another stream": lambda: check_streams(check, heap),
        "heap: graph": lambda: check_graph(check, heap),
        "heap: host time": lambda: check_heap_time(heap),
        "device communicator": lambda: check_device_comm(check, communicator),
        "device communicator with GIN": lambda: check_gin(communicator),
        "close": lambda: check_close(check, communicator, memory),
    }
    for name, work in works.items():
        check.run(f"{kind}: {name}", work)


def check_library() -> str:
    library = load_nccl()
    assert library.is_torchs, library
    assert library.has("ncclDevCommCreate"), library
    headers = find_nccl_headers(JitOptions(cache_dir=Path("unused"), nccl_root_dir=get_env().nccl_root_dir))
    if headers is not None:
        library.check_headers(headers.version, headers.found_via)
    found = "no headers" if headers is None else f"headers of {headers.found_via}"
    return f"NCCL {version_text(library.version)}, {library.path}, {found}"


def check_communicator(check: Check, communicator: Communicator, *, is_owned: bool) -> str:
    assert communicator.is_owned == is_owned, communicator
    assert (communicator.world.num_ranks, communicator.world.rank) == (check.num_ranks, check.rank)
    lsa, rail = communicator.lsa, communicator.rail
    assert check.num_ranks % lsa.num_ranks == 0
    assert (lsa.rank, lsa.stride) == (check.rank % lsa.num_ranks, 1)
    assert (rail.num_ranks, rail.stride) == (check.num_ranks // lsa.num_ranks, lsa.num_ranks)
    assert rail.rank == check.rank // lsa.num_ranks
    wanted = os.environ.get("NCCL_LSA_TEAM_SIZE")
    if wanted is not None:
        assert lsa.num_ranks == gcd(int(wanted), check.num_ranks), (lsa, wanted)
    assert communicator.topology.scaleup_rank == lsa.rank
    properties = communicator.properties
    assert properties.device_idx == check.device.index
    assert properties.num_lsa_teams == rail.num_ranks
    gin = f"GIN {properties.gin_type.name}, rails {properties.railed_gin_type.name}"
    return f"LSA {lsa.num_ranks} x {rail.num_ranks}, {gin}, multicast {int(properties.has_multimem)}"


def check_control(memory: SymmetricMemory) -> str:
    assert memory.address % 4096 == 0
    assert memory.control("check.flags").sum().item() == 0
    inbox = memory.control("check.inbox", torch.int64)
    assert inbox.shape == (MAX_RANKS,)
    assert inbox.data_ptr() == memory.address + memory.layout.offset_of("check.inbox")
    assert not inbox.any()
    return f"window of {memory.num_bytes} bytes at {memory.address:#x}"


def pattern(rank: int, device: torch.device) -> torch.Tensor:
    return torch.arange(NUM_VALUES, dtype=torch.int64, device=device) * MAX_RANKS + rank


def check_reads(check: Check, communicator: Communicator, memory: SymmetricMemory) -> str:
    """Every rank puts its tensor at another offset and tells the others."""
    padding = memory.heap.empty((4096 * check.rank + 1,), torch.uint8)
    mine = memory.heap.empty((NUM_VALUES,), torch.int64).copy_(pattern(check.rank, check.device))
    offsets = check.gather(memory.offset_of(mine))
    check.meet()
    num_reached = 0
    for peer, offset in enumerate(offsets):
        address = memory.peer_address(peer, offset)
        place = communicator.lsa_rank_of(peer)
        assert (address is not None) == (place is not None), (peer, address, place)
        if address is None or place is None:
            continue
        num_reached += 1
        addresses = {address, memory.window.lsa_address(place, offset), memory.lsa_addresses(offset)[place]}
        for found in addresses:
            theirs = tensor_over(found, 8 * NUM_VALUES, check.device, memory).view(torch.int64)
            assert torch.equal(theirs.clone(), pattern(peer, check.device)), f"rank {peer} at {found:#x}"
    assert num_reached == communicator.lsa.num_ranks
    check.meet()
    del padding
    return f"{num_reached} ranks reached, offsets {sorted(set(offsets))[:3]}..."


def check_writes(check: Check, communicator: Communicator, memory: SymmetricMemory) -> str:
    inbox_offset = memory.layout.offset_of("check.inbox")
    for peer in range(check.num_ranks):
        address = memory.peer_address(peer, inbox_offset + 8 * check.rank)
        if address is not None:
            theirs = tensor_over(address, 8, check.device, memory).view(torch.int64)
            theirs.copy_(torch.tensor([1 + MAX_RANKS * check.rank + peer], device=check.device))
    check.meet()
    heard = memory.control("check.inbox", torch.int64).tolist()
    wanted = [
        1 + MAX_RANKS * peer + check.rank if communicator.lsa_rank_of(peer) is not None else 0
        for peer in range(check.num_ranks)
    ]
    assert heard == wanted + [0] * (MAX_RANKS - check.num_ranks), heard
    check.meet()
    return f"inbox {heard[:3]}..."


def check_second_window(check: Check, communicator: Communicator, first: SymmetricMemory) -> str:
    with check.memory(communicator) as second:
        assert second.window.handle != first.window.handle
        assert second.control("check.inbox").sum().item() == 0
        tensor = second.heap.empty((8,), torch.float32)
        assert first.offset_of(tensor) is None
        assert second.offset_of(tensor) == second.layout.num_bytes
        check.meet()
    return "independent"


def check_heap(heap: Heap) -> str:
    num_bytes = heap.stats().num_bytes
    tensor = heap.empty((num_bytes,), torch.uint8)
    assert heap.try_empty((1,), torch.uint8) is None
    view = tensor.view(torch.bfloat16)[7:]
    del tensor
    assert heap.try_empty((1,), torch.uint8) is None
    del view
    again = heap.empty((num_bytes // 2,), torch.bfloat16)
    again.fill_(2)
    assert again[-1].item() == 2
    weight = torch.ones(16, device=heap.device, requires_grad=True)
    del again
    loss = (weight * heap.empty((16,), torch.float32).fill_(3)).sum()
    assert heap.stats().num_regions == 1
    loss.backward()
    assert weight.grad is not None
    assert weight.grad.tolist() == [3] * 16
    del loss
    stats = heap.stats()
    assert (stats.used_bytes, stats.graph_bytes) == (0, 0), stats
    assert stats.largest_free_bytes == num_bytes, stats
    return f"{num_bytes} bytes"


def check_streams(check: Check, heap: Heap) -> str:
    """A second stream takes a region that the first still reads, once by itself and once by a stream that told so."""
    num_bytes = heap.stats().num_bytes
    first, second = torch.cuda.Stream(check.device), torch.cuda.Stream(check.device)
    copies = []
    for is_recorded in (False, True):
        with torch.cuda.stream(first):
            tensor = heap.empty((num_bytes,), torch.uint8).fill_(1)
        reader = second if is_recorded else first
        if is_recorded:
            second.wait_stream(first)
            heap.record_stream(tensor, second)
        with torch.cuda.stream(reader):
            torch.cuda._sleep(SLEEP_CYCLES)
            copies.append(tensor[: 1 << 20].clone())
        del tensor
        with torch.cuda.stream(first if is_recorded else second):
            heap.empty((num_bytes,), torch.uint8).fill_(2)
    torch.cuda.synchronize(check.device)
    assert [(copy == 1).all().item() for copy in copies] == [True, True]
    return "in order"


def check_graph(check: Check, heap: Heap) -> str:
    used_before = heap.stats().used_bytes
    stream = torch.cuda.Stream(check.device)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        first = heap.empty((1000,), torch.float32).fill_(3)
        result = first + 1
        offset = heap.offset_of(first)
        del first
        # In the graph's own order the region may be used again.
        second = heap.empty((1000,), torch.float32).fill_(5)
        assert heap.offset_of(second) == offset
        result += second
        del second
    outside = [heap.empty((1000,), torch.float32).fill_(-1) for _ in range(4)]
    assert offset not in [heap.offset_of(tensor) for tensor in outside]
    for _ in range(3):
        result.zero_()
        graph.replay()
        assert result.unique().tolist() == [9]
    assert all((tensor == -1).all() for tensor in outside)
    del outside
    stats = heap.stats()
    assert (stats.used_bytes, stats.graph_bytes) == (used_before, 4096), stats
    return f"{stats.graph_bytes} bytes stay with the graph"


def check_heap_time(heap: Heap) -> str:
    times = []
    for _ in range(20):
        torch.cuda.synchronize(heap.device)
        start = time.perf_counter()
        for _ in range(100):
            heap.empty((128, 7168), torch.bfloat16)
        times.append((time.perf_counter() - start) * 1e4)
    return f"{statistics.median(times):.1f} us for one tensor, made and dropped"


def check_device_comm(check: Check, communicator: Communicator) -> str:
    with DeviceComm(communicator, DeviceCommConfig(num_lsa_barriers=4)) as device_comm:
        _, version, rank, num_ranks, _, lsa_rank, lsa_size = struct.unpack_from("=IIiiIii", device_comm.data)
        assert version == communicator.library.version, version
        assert (rank, num_ranks) == (check.rank, check.num_ranks)
        assert (lsa_rank, lsa_size) == (communicator.lsa.rank, communicator.lsa.num_ranks)
        assert device_comm.gin_type is GinType.NONE
        check.meet()
        return f"{device_comm.num_bytes} bytes"


def check_gin(communicator: Communicator) -> str:
    """GIN as it is there: made where some rank needs it, refused in words where NCCL has none, left out elsewhere."""
    properties = communicator.properties
    is_railed = properties.gin_type is GinType.NONE
    connection = GinConnection.RAIL if is_railed else GinConnection.FULL
    config = DeviceCommConfig(gin=GinConfig(connection=connection, num_contexts=4, num_signals=8))
    refusal = ""
    try:
        device_comm = DeviceComm(communicator, config)
    except TransportError as error:
        refusal = str(error)
    if refusal:
        assert communicator.needs_gin, refusal
        assert properties.railed_gin_type is GinType.NONE, refusal
        assert "GIN" in refusal, refusal
        return "NCCL has none, and says so"
    with device_comm:
        assert (device_comm.gin_type is not GinType.NONE) == communicator.needs_gin
        return f"{device_comm.gin_type.name}, {device_comm.num_gin_contexts} contexts of 4"


def check_close(check: Check, communicator: Communicator, memory: SymmetricMemory) -> str:
    tensor = memory.heap.empty((1000,), torch.float32).fill_(7)
    check.meet()
    for _ in range(2):
        memory.close()
        communicator.close()
    assert not communicator.is_alive
    assert (tensor == 7).all().item()
    free_before = torch.cuda.mem_get_info(check.device)[0]
    del tensor
    torch.cuda.synchronize(check.device)
    return (
        f"tensors outlive it; {(torch.cuda.mem_get_info(check.device)[0] - free_before) >> 20} MiB freed with the last"
    )


def check_close_order(check: Check, order: str) -> str:
    communicator = check.open(reuse=False)
    memory = check.memory(communicator)
    device_comm = DeviceComm(communicator, DeviceCommConfig(num_lsa_barriers=1))
    check.meet()
    things: dict[str, Any] = {"memory": memory, "device": device_comm, "comm": communicator}
    if order == "dropped":
        del communicator, memory, device_comm
        things.clear()
        return ""
    start = time.perf_counter()
    for name in order.split(", "):
        things[name].close()
    return f"{(time.perf_counter() - start) * 1e3:.1f} ms"


def check_torch_first(check: Check) -> str:
    group = dist.new_group(backend="cpu:gloo,cuda:nccl")
    communicator = check.open(reuse=True, group=group)
    assert not communicator.is_owned
    memory = check.memory(communicator)
    tensor = memory.heap.empty((1000,), torch.float32).fill_(7)
    window: Window = memory.window
    check.meet()
    dist.destroy_process_group(group)
    assert not communicator.is_alive
    window.close()
    memory.close()
    communicator.close()
    assert (tensor == 7).all().item()
    return "noticed"


def check_lost_rank(check: Check) -> int:
    """The last rank ends with everything open; the others close without it, then end with another window open."""
    communicator = check.open(reuse=False)
    memory = check.memory(communicator)
    left_open.extend((check.memory(communicator), check.open(reuse=False)))
    check.meet()
    if check.num_ranks > 1 and check.rank == check.num_ranks - 1:
        sys.stdout.flush()
        os._exit(0 if check.is_right else 1)
    time.sleep(3)
    start = time.perf_counter()
    memory.close()
    communicator.close()
    elapsed_ms = (time.perf_counter() - start) * 1e3
    is_fast = elapsed_ms < MAX_CLOSE_MS
    check.is_right &= is_fast
    if check.rank == 0:
        print(f"{'own: close with a lost rank':<44}{elapsed_ms:>10.1f}  {'right' if is_fast else 'SLOW'}")
        print("\nall right" if check.is_right else "\nWRONG", flush=True)
    return 0 if check.is_right else 1


if __name__ == "__main__":
    sys.exit(main())
