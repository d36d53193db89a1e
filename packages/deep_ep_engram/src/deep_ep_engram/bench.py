"""Owns the benchmark, `python -m deep_ep_engram.bench`: fetches of random entries, one JSON line a case.

Beside each stands, from the same run: a plain `index_select` of as many bytes in the rank's own memory, which no fetch
can beat; and what a program without this package would do, an all-gather of the table and an `index_select` of it.
Without the variables of a launcher it starts its ranks on this machine; under torchrun it is one of them.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
import torch.distributed as dist

from deep_ep_core.backend_choice import BackendName
from deep_ep_core.bench_machine import read_machine
from deep_ep_core.domains import detect_topology
from deep_ep_core.errors import ConfigError
from deep_ep_core.launch import main as launch_main
from deep_ep_core.topology import host_identity
from deep_ep_engram.sizing import get_engram_storage_size_hint
from deep_ep_engram.table import EngramTable

__all__ = ["CASES", "FetchCase", "main"]

_MODULE = "deep_ep_engram.bench"
_DEFAULT_NUM_RANKS = 4
_MS_PER_S = 1e3
_BYTES_PER_GB = 1e9
# More than a cache holds, with its target.
_COPY_BYTES = {"cpu": 64 << 20, "cuda": 256 << 20}
# Enough that the launch of a graph does not count.
_CALLS_PER_GRAPH = 20
# It is slow, and no one tunes it.
_BASELINE_ROUNDS = 5
_MEMORIES = ("device", "host")

Times = list[float]


@dataclass(frozen=True, slots=True, kw_only=True)
class FetchCase:
    """What is fetched.

    Attributes:
        name: What the command line calls it.
        num_tokens: Tokens of each rank.
        num_each: Entries of a token.
        hidden: bfloat16 elements of an entry.
        num_entries: Entries of each rank.
        memory: Where they lie: "device" or "host".
    """

    name: str
    num_tokens: int
    num_each: int
    hidden: int
    num_entries: int
    memory: str = "device"

    @property
    def num_rows(self) -> int:
        """Entries of a fetch."""
        return self.num_tokens * self.num_each


CASES = {
    "rows-4k": FetchCase(name="rows-4k", num_tokens=8192, num_each=1, hidden=2048, num_entries=16384),
    # The defaults of DeepEP's own test of Engram.
    "ngrams": FetchCase(name="ngrams", num_tokens=512, num_each=24, hidden=128, num_entries=524288),
}
"""The cases, by name."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class _Session:
    """The ranks of a run: their group, the device of this one, how many share it, and how they measure."""

    group: dist.ProcessGroup
    device: torch.device
    num_device_ranks: int
    num_nodes: int
    backend: BackendName
    num_rounds: int


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the benchmark; returns the exit code. Prints its usage and exits with 2 when the arguments are wrong."""
    arguments = sys.argv[1:] if arguments is None else list(arguments)
    parser = _parser()
    options = parser.parse_args(arguments)
    if unknown := set(options.cases) - set(CASES):
        parser.error(f"--cases must be of {', '.join(CASES)} (got {', '.join(sorted(unknown))})")
    if "RANK" not in os.environ:
        nodes = [] if options.nodes is None else ["--nodes", str(options.nodes)]
        device = ["--device", _device_kind(options)]
        num_ranks = str(options.ranks)
        return launch_main(["--ranks", num_ranks, *nodes, *device, "--no-prefix", "-m", _MODULE, *arguments])
    try:
        _run_rank(options, shlex.join(["python", "-m", _MODULE, *arguments]))
    except ConfigError as error:
        print(f"rank {os.environ['RANK']}: {error}", file=sys.stderr, flush=True)
        return 1
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog=f"python -m {_MODULE}", description=__doc__)
    parser.add_argument("--cases", nargs="+", default=list(CASES), metavar="CASE", help=f"of {', '.join(CASES)}")
    parser.add_argument("--memory", nargs="+", default=list(_MEMORIES), choices=_MEMORIES, help="where entries lie")
    parser.add_argument("--scale-down", type=int, default=1, metavar="N", help="divide tokens and entries by N")
    parser.add_argument("--ranks", type=int, default=_DEFAULT_NUM_RANKS, metavar="N", help="(default: %(default)s)")
    parser.add_argument("--nodes", type=int, metavar="N", help="make-believe nodes")
    parser.add_argument("--device", choices=("cpu", "cuda"), help="(default: cuda where torch has it)")
    parser.add_argument("--backend", default="auto", choices=("auto", "collective", "device"), help="of the table")
    parser.add_argument("--rounds", type=int, default=20, metavar="N", help="that count (default: %(default)s)")
    return parser


def _device_kind(options: argparse.Namespace) -> str:
    return options.device or ("cuda" if torch.cuda.is_available() else "cpu")


def _run_rank(options: argparse.Namespace, command: str) -> None:
    session = _open_session(options)
    copy_gbs = _measure_copy_gbs(session)
    facts = asdict(read_machine(session.device, file=Path(__file__)))
    for name in options.cases:
        for memory in options.memory:
            case = CASES[name]
            case = replace(
                case,
                memory=memory,
                num_tokens=max(case.num_tokens // options.scale_down, 1),
                num_entries=max(case.num_entries // options.scale_down, 1),
            )
            record = _run_case(session, case, copy_gbs)
            if dist.get_rank() == 0:
                print(json.dumps({"command": command, **facts, **record}), flush=True)
    dist.barrier()
    dist.destroy_process_group()


def _open_session(options: argparse.Namespace) -> _Session:
    if os.environ.get("LOCAL_WORLD_SIZE") == os.environ["WORLD_SIZE"]:
        # One machine: loopback does, and the machine's own name need not resolve.
        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    device, name = torch.device("cpu"), f"{host_identity()} cpu"
    if _device_kind(options) == "cuda":
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]) % torch.cuda.device_count())
        torch.cuda.set_device(device)
        name = f"{host_identity()} {torch.cuda.get_device_properties(device).uuid}"
    dist.init_process_group("gloo")
    names: list[str] = [""] * dist.get_world_size()
    dist.all_gather_object(names, name)
    group = dist.group.WORLD
    # NCCL refuses two ranks on one GPU, unless the launcher has set that it does not.
    if device.type == "cuda" and (len(set(names)) == len(names) or os.environ.get("NCCL_MULTI_RANK_GPU_ENABLE") == "1"):
        group = dist.new_group(backend="cpu:gloo,cuda:nccl")
    assert isinstance(group, dist.ProcessGroup)
    return _Session(
        group=group,
        device=device,
        num_device_ranks=names.count(name),
        num_nodes=detect_topology(group).num_scaleout_ranks,
        backend=options.backend,
        num_rounds=options.rounds,
    )


def _run_case(session: _Session, case: FetchCase, copy_gbs: float) -> dict[str, object]:
    """Measure one case; alike on all ranks. Collective: yes."""
    rank, num_ranks, device = dist.get_rank(), dist.get_world_size(), session.device
    generator = torch.Generator(device).manual_seed(rank)
    entries = torch.randn(case.num_entries, case.hidden, generator=generator, device=device).bfloat16()
    shape = (case.num_tokens, case.num_each)
    indices = torch.randint(num_ranks * case.num_entries, shape, generator=generator, device=device, dtype=torch.int32)
    own_indices = indices.view(-1) % case.num_entries
    num_gpu_bytes, num_cpu_bytes = get_engram_storage_size_hint(case.num_entries, case.hidden, case.num_rows)
    num_host_bytes = num_cpu_bytes if case.memory == "host" else 0
    with EngramTable(session.group, num_gpu_bytes + num_cpu_bytes, num_host_bytes, backend=session.backend) as table:
        assert table.runtime is not None
        table.engram_write(entries)
        backend = table.runtime.name
        wide = indices.view(-1).long()

        def fetch() -> torch.Tensor:
            return table.engram_fetch(indices)().data

        def select_from_all() -> torch.Tensor:
            shares = [torch.empty_like(entries) for _ in range(num_ranks)]
            dist.all_gather(shares, entries, group=session.group)
            return torch.cat(shares).index_select(0, wide).view(case.num_tokens, -1)

        assert torch.equal(fetch(), select_from_all()), f"{case.name}: a fetch differs from a lookup in the whole table"
        # Where a graph can hold a fetch the device's own time is taken, without that of the host's launches.
        mode = "graph" if device.type == "cuda" and backend == "device" and session.num_nodes == 1 else "stream"
        times = _measure(session, fetch, mode)
        local = _measure(session, lambda: entries.index_select(0, own_indices), mode)
        baseline = _measure(session, select_from_all, "stream", num_rounds=_BASELINE_ROUNDS)
        host_ms = _time_host(session, fetch)
        dist.barrier()
    # Every rank of a device reads its rows and writes them.
    bytes_moved = 2 * case.num_rows * case.hidden * entries.element_size() * session.num_device_ranks
    floor_ms = None if case.memory == "host" else bytes_moved / _BYTES_PER_GB / copy_gbs * _MS_PER_S
    median_ms, local_ms = statistics.median(times), statistics.median(local)
    return {
        "op": "fetch",
        "backend": backend,
        "num_ranks": num_ranks,
        "num_nodes": session.num_nodes,
        "case": case.name,
        "num_tokens": case.num_tokens,
        "num_each": case.num_each,
        "hidden": case.hidden,
        "num_entries": case.num_entries,
        "dtype": "bf16",
        "memory": case.memory,
        "mode": mode,
        "median_ms": median_ms,
        "min_ms": min(times),
        "max_ms": max(times),
        "bytes_moved": bytes_moved,
        "copy_gbs": copy_gbs,
        "floor_ms": floor_ms,
        "ratio_to_floor": None if floor_ms is None else median_ms / floor_ms,
        "local_ms": local_ms,
        "ratio_to_local": median_ms / local_ms,
        "baseline_ms": statistics.median(baseline),
        "host_ms": host_ms,
    }


def _measure(session: _Session, call: Callable[[], torch.Tensor], mode: str, *, num_rounds: int | None = None) -> Times:
    """Milliseconds of a call, that of the slowest rank of each round. Collective: yes."""
    num_calls = 1
    run: Callable[[], object] = call
    # Kernels are loaded before a capture.
    call()
    if mode == "graph":
        num_calls, run = _CALLS_PER_GRAPH, _capture(call)
    num_warmup = 3
    times: Times = []
    for _ in range(num_warmup + (num_rounds or session.num_rounds)):
        if session.device.type == "cuda":
            torch.cuda.synchronize()
        dist.barrier()
        times.append(_time(session.device, run) / num_calls)
    slowest = torch.tensor(times[num_warmup:], dtype=torch.float64)
    dist.all_reduce(slowest, op=dist.ReduceOp.MAX)
    result: Times = slowest.tolist()
    return result


def _capture(call: Callable[[], torch.Tensor]) -> Callable[[], object]:
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    # NCCL's watchdog asks for events in a thread of its own meanwhile.
    with torch.cuda.graph(graph, capture_error_mode="thread_local"):
        for _ in range(_CALLS_PER_GRAPH):
            call()
    return graph.replay


def _time(device: torch.device, run: Callable[[], object]) -> float:
    if device.type == "cpu":
        begin = time.perf_counter()
        run()
        return (time.perf_counter() - begin) * _MS_PER_S
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    start.record()
    run()
    end.record()
    torch.cuda.synchronize()
    return float(start.elapsed_time(end))


def _time_host(session: _Session, call: Callable[[], torch.Tensor]) -> float:
    """Milliseconds that a call keeps the host, the median of the slowest rank. Collective: yes."""
    times: Times = []
    for _ in range(session.num_rounds):
        if session.device.type == "cuda":
            torch.cuda.synchronize()
        begin = time.perf_counter()
        call()
        times.append((time.perf_counter() - begin) * _MS_PER_S)
    median = torch.tensor(statistics.median(times), dtype=torch.float64)
    dist.all_reduce(median, op=dist.ReduceOp.MAX)
    return float(median.item())


def _measure_copy_gbs(session: _Session) -> float:
    """GB/s (1e9 bytes) of a copy within a device, bytes read plus written: of the slowest rank, copying by itself.

    Collective: yes.
    """
    num_bytes, fastest = _COPY_BYTES[session.device.type], float("inf")
    for turn in range(dist.get_world_size()):
        dist.barrier()
        if turn == dist.get_rank():
            source = torch.ones(num_bytes, dtype=torch.uint8, device=session.device)
            target = torch.empty_like(source)
            fastest = min(_time(session.device, lambda: target.copy_(source)) for _ in range(10))  # noqa: B023
            del source, target
    slowest = torch.tensor(fastest, dtype=torch.float64)
    dist.all_reduce(slowest, op=dist.ReduceOp.MAX)
    return float(2 * num_bytes / slowest.item() * _MS_PER_S / _BYTES_PER_GB)


if __name__ == "__main__":
    sys.exit(main())
