"""Checks of the device backend beside those that all backends share; what is refused is in `engram_device_failures`.

usage: python -m deep_ep_core.launch --device cuda --ranks 4 [--nodes 2] engram_device.py [--memory device] [check ...]
       [--without check ...]

Without names all checks run, those of `engram_cases` too, with entries in device and in host memory.
"""

from __future__ import annotations

import argparse
import os
import random
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import engram_device_failures
import torch
import torch.distributed as dist
from engram_cases import BF16, FP8, MIB, SETTING, Whole, even_counts, fetch_and_check, make_table
from engram_setting import MEMORIES, on_device, run_case

from deep_ep_core.local import run_as_script
from deep_ep_core.loopback import read_counters
from deep_ep_engram import EngramTable

SHARED_CASES: dict[str, tuple[object, ...]] = {
    "check_sizes": (),
    "check_scale_layouts": (torch.float32, 3),
    "check_uneven_tables": (),
    "check_empty_table": (),
    "check_unlike_fetches": (),
    "check_hooks_in_any_order": (),
    "check_hook_waits_for_no_other_hook": (),
    "check_rewrite_between_fetches": (),
    "check_close_completes_fetches": (),
    "check_two_tables": (),
    "check_functions": (),
    "check_random_rounds": (200,),
}
"""Of `engram_cases`, with their arguments."""


def run_case_on_collective(name: str, memory: str, *arguments: object) -> object:
    """The same case with CUDA tensors on the collective backend."""
    return run_case(name, memory, *arguments, backend="collective")


def check_row_sizes(memory: str) -> None:
    """Rows of every word, around a segment of 256 words, and of several segments; few and many of them."""
    rng = random.Random(dist.get_rank())
    with on_device(memory), make_table() as table:
        for row_bytes in (1, 2, 15, 16, 17, 255, 256, 1020, 1024, 2040, 4080, 4096, 4112, 12304, 2 * 1023, 4 * 257):
            whole = Whole(counts=even_counts(9), hidden=row_bytes, dtype=FP8, num_packs=1)
            whole.write(table)
            for num_tokens, num_each in ((1, 1), (33, 2), (67, 5)):
                fetch_and_check(table, whole, whole.random_indices(num_tokens, num_each, rng))


def check_many_rows(memory: str) -> None:
    """More rows than warps, so that each warp takes several turns; shapes of real tables."""
    rng = random.Random(dist.get_rank())
    num_cpu_bytes = 4 * MIB if MEMORIES[memory] else 0
    with on_device(memory), EngramTable(None, 40 * MIB, num_cpu_bytes, backend="device") as table:
        for hidden, dtype, num_tokens, num_each in ((128, BF16, 512, 24), (4, BF16, 4099, 9), (2048, BF16, 3000, 2)):
            whole = Whole(counts=even_counts(300), hidden=hidden, dtype=dtype)
            whole.write(table)
            fetch_and_check(table, whole, whole.random_indices(num_tokens, num_each, rng))


def check_fetch_needs_no_peer(memory: str) -> None:
    """Only rank 0 fetches, 20 times, while all others wait for it on the host."""
    with on_device(memory), make_table() as table:
        whole = Whole(counts=even_counts(), hidden=300)
        whole.write(table)
        if dist.get_rank() == 0:
            for seed in range(20):
                fetch_and_check(table, whole, whole.random_indices(40, 3, random.Random(seed)))
        dist.barrier()


def check_streams(memory: str) -> None:
    """Work before a fetch, and after its hook on another stream, is ordered with it without a wait of the host."""
    with on_device(memory), make_table() as table:
        whole = Whole(counts=even_counts(), hidden=512)
        whole.write(table)
        first, second = torch.cuda.Stream(), torch.cuda.Stream()
        for seed in range(5):
            wanted = whole.random_indices(50, 4, random.Random(seed))
            torch.cuda.synchronize()
            with torch.cuda.stream(first):
                indices = torch.zeros_like(wanted)
                torch.cuda._sleep(20_000_000)
                indices.copy_(wanted)
                hook = table.engram_fetch(indices)
                # Its memory may be used again at once, on this stream.
                del indices
                torch.zeros_like(wanted)
            with torch.cuda.stream(second):
                # Not `clone`, which may be a job of a copy engine that the loopback network needs.
                copy = hook().data.view(torch.uint8).bitwise_or(0)
            del hook
            second.synchronize()
            assert torch.equal(copy, whole.entries[wanted.view(-1).long()].view(50, -1).view(torch.uint8))


def check_host_does_not_wait(memory: str) -> None:
    """The call and the hook return while the stream is still busy with what came before."""
    with on_device(memory), make_table() as table:
        whole = Whole(counts=even_counts())
        whole.write(table)
        indices = whole.random_indices(5, 2, random.Random(1))
        fetch_and_check(table, whole, indices)
        busy = torch.cuda.Event()
        torch.cuda._sleep(2_000_000_000)
        busy.record()
        fetched = table.engram_fetch(indices)()
        assert not busy.query(), "the host has waited for the device"
        whole.check(fetched, indices)


def check_graph(memory: str) -> int:
    """A graph fetches what its indices say at each replay, from the table as it is then; returns the replays."""
    num_replays = 0
    for dtype in (BF16, FP8):
        with on_device(memory), make_table() as table:
            first = Whole(counts=even_counts(), hidden=40, dtype=dtype)
            first.write(table)
            indices = first.random_indices(33, 3, random.Random(0)).long()
            fetch_and_check(table, first, indices)
            torch.cuda.synchronize()
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                fetched = table.engram_fetch(indices, use_tma_aligned_col_major_sf=True)()
            # Other scales would lie where the graph does not look.
            tables = [first] if dtype == FP8 else [first, Whole(counts=even_counts(23), hidden=40, seed=5)]
            for whole in tables:
                if whole is not first:
                    whole.write(table)
                for seed in range(5):
                    indices.copy_(whole.random_indices(33, 3, random.Random(seed)))
                    graph.replay()
                    whole.check(fetched, indices, is_col_major=True)
                    num_replays += 1
            torch.cuda.synchronize()
            del graph
    return num_replays


def check_capture_is_refused_where_entries_cross_the_network(memory: str) -> str:
    """Returns what is said."""
    with on_device(memory), make_table() as table:
        whole = Whole(counts=even_counts())
        whole.write(table)
        indices = whole.random_indices(3, 3, random.Random(0))
        fetch_and_check(table, whole, indices)
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        said = ""
        with torch.cuda.graph(graph):
            # A graph must hold something.
            torch.zeros(1, device="cuda")
            try:
                table.engram_fetch(indices)
            except ValueError as error:
                said = str(error)
        fetch_and_check(table, whole, indices)
        dist.barrier()
    return said


def check_cpu_table(memory: str) -> None:
    """A table that is written from the CPU is one of the collective backend, and the next may be one of the GPU."""
    with on_device(memory), make_table() as table:
        for device in ("cpu", "cuda", "cpu"):
            SETTING.device = device
            whole = Whole(counts=even_counts(), dtype=FP8, seed=3)
            whole.write(table)
            fetch_and_check(table, whole, whole.random_indices(7, 3, random.Random(dist.get_rank())))
        SETTING.device = "cuda"


def check_full_stage(memory: str) -> None:
    """More fetches under way than the stage has room for, hooks from the last to the first."""
    rng = random.Random(dist.get_rank())
    with on_device(memory), make_table() as table:
        whole = Whole(counts=even_counts(), hidden=4096)
        whole.write(table)
        wanted = [whole.random_indices(120, 2, rng) for _ in range(8)]
        hooks = [table.engram_fetch(indices) for indices in wanted]
        for hook, indices in reversed(list(zip(hooks, wanted, strict=True))):
            whole.check(hook(), indices)
        dist.barrier()


def gets_for_duplicates(memory: str) -> list[int] | None:
    """Gets from each peer where three of its entries are wanted 40 times each; None where nothing counts them."""
    folder = os.environ.get("EP_LOOPBACK_COUNTERS")
    rank, num_ranks = dist.get_rank(), dist.get_world_size()
    with on_device(memory), make_table() as table:
        whole = Whole(counts=even_counts(), hidden=128)
        whole.write(table)
        wanted = (torch.arange(num_ranks).view(-1, 1) * 20 + torch.arange(3)).view(-1).repeat(40)
        before = read_counters(Path(folder))[rank] if folder else ()
        fetch_and_check(table, whole, wanted[torch.randperm(len(wanted))].view(40, -1))
        torch.cuda.synchronize()
        after = read_counters(Path(folder))[rank] if folder else ()
        dist.barrier()
        if not folder:
            return None
        num_gets = [new.num_gets - old.num_gets for new, old in zip(after, before, strict=True)]
        reached = table.runtime._storage.addresses  # type: ignore[union-attr]
        assert num_gets == [0 if address else 3 for address in reached], num_gets
    return num_gets


def kernels_of_a_fetch(memory: str) -> dict[str, int]:
    """Names and numbers of the kernels that a fetch and its hook run."""
    from torch.profiler import ProfilerActivity, profile

    with on_device(memory), make_table() as table:
        whole = Whole(counts=even_counts(), hidden=128)
        whole.write(table)
        indices = torch.arange(sum(whole.counts), device="cuda").view(-1, 2)
        for _ in range(3):
            fetch_and_check(table, whole, indices)
        torch.cuda.synchronize()
        with profile(activities=[ProfilerActivity.CUDA], acc_events=True) as profiled:
            table.engram_fetch(indices)()
            torch.cuda.synchronize()
        names: dict[str, int] = {}
        for event in profiled.events():
            if "DeviceType.CUDA" in str(event.device_type):
                names[event.name] = names.get(event.name, 0) + 1
        dist.barrier()
    return names


CHECKS: tuple[Callable[[str], Any], ...] = (
    check_row_sizes,
    check_many_rows,
    check_fetch_needs_no_peer,
    check_streams,
    check_host_does_not_wait,
    check_cpu_table,
    check_full_stage,
    gets_for_duplicates,
    kernels_of_a_fetch,
)


def timed(name: str, memory: str, check: Callable[[], object]) -> Callable[[], None]:
    def run() -> None:
        begin = time.monotonic()
        result = check()
        if dist.get_rank() == 0:
            shown = "" if result is None else f" -> {result}"
            print(f"right: {name} {memory}, {time.monotonic() - begin:.1f} s{shown}", flush=True)

    run.__name__ = f"{name} {memory}"
    return run


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("names", nargs="*", metavar="check", help="which checks to run (default: all)")
    parser.add_argument("--without", nargs="*", default=[], metavar="check", help="which to leave out")
    parser.add_argument("--memory", choices=list(MEMORIES), help="with entries there only")
    parsed = parser.parse_args()
    checks = []
    for memory in MEMORIES if parsed.memory is None else (parsed.memory,):
        for name, arguments in SHARED_CASES.items():
            call = lambda name=name, memory=memory, arguments=arguments: run_case(name, memory, *arguments)  # noqa: E731
            checks.append((name, memory, call))
        graph = check_graph if _is_one_node(memory) else check_capture_is_refused_where_entries_cross_the_network
        for check in (
            *CHECKS,
            graph,
            engram_device_failures.fetch_out_of_range,
            engram_device_failures.write_after_wrong_index,
            engram_device_failures.write_elsewhere,
        ):
            checks.append((check.__name__, memory, lambda check=check, memory=memory: check(memory)))
    chosen = [
        timed(*check)
        for check in checks
        if (not parsed.names or check[0] in parsed.names) and check[0] not in parsed.without
    ]
    if not chosen:
        parser.error(f"no such check; there are {', '.join(sorted({name for name, _, _ in checks}))}")
    run_as_script(*chosen)


def _is_one_node(memory: str) -> bool:
    return memory == "host" or "NCCL_LSA_TEAM_SIZE" not in os.environ


if __name__ == "__main__":
    main()
