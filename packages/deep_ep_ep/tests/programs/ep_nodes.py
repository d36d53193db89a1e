"""The checks of the device backend where ranks are on several nodes: make-believe ones, over the loopback network.

usage: python -m deep_ep_core.launch --device cuda --ranks 4 --nodes 2 ep_nodes.py [--mode M] [--memory M] [check ...]

The checks are those of `ep_device`, which say nothing of nodes. Without names all of them run, and those of here, in
both modes; with `check_traffic` set `EP_LOOPBACK_COUNTERS`.
"""

from __future__ import annotations

import argparse
import contextlib
import os
from collections.abc import Callable, Iterator
from pathlib import Path

import ep_device
import ep_device_random
import ep_device_setting
import ep_modes
import torch
import torch.distributed as dist
from ep_cases import SETTING
from ep_device_setting import context_of, on_device
from ep_device_shapes import make_large_buffer
from ep_rows import Problem, make_problem

from deep_ep_core.local import run_as_script
from deep_ep_core.loopback import PeerCounts, read_counters
from deep_ep_ep import ElasticBuffer

MODES = ("hybrid", "direct")


@contextlib.contextmanager
def in_mode(mode: str) -> Iterator[None]:
    """Let buffers use the network in a mode."""
    options = ep_device_setting.NETWORK_OPTIONS
    before = dict(options), SETTING.ranks_per_node, SETTING.before_compare
    # A few contexts: each costs the loopback network a queue a peer.
    options.update(allow_hybrid_mode=mode == "hybrid", num_allocated_qps=4)
    SETTING.ranks_per_node = num_node_ranks() if mode == "hybrid" else None
    SETTING.before_compare = wait_for_network
    try:
        yield
    finally:
        options.clear()
        options.update(before[0])
        SETTING.ranks_per_node, SETTING.before_compare = before[1:]


def wait_for_network(buffer: ElasticBuffer) -> None:
    """Wait for the device, and raise what its kernels reported: what a wait that expired left behind is no result."""
    torch.cuda.synchronize()
    context_of(buffer).check()


def num_node_ranks() -> int:
    """Ranks of a node, as the launcher told NCCL."""
    return int(os.environ["NCCL_LSA_TEAM_SIZE"])


def run_in_mode(mode: str, check: Callable[..., object], *arguments: object) -> object:
    """A check with its arguments."""
    with in_mode(mode):
        return check(*arguments)


def check_topologies(recv_memory: str = "auto") -> None:
    """With and without the hierarchy of nodes, with and without partial sums, whatever the mode."""
    with on_device(recv_memory, num_bytes=64 << 20):
        ep_modes.check_topologies()


def _align(value: int, alignment: int) -> int:
    return -(-value // alignment) * alignment


def check_the_choice(recv_memory: str = "auto") -> None:
    """Where nothing else is said, the network is not used."""
    with on_device(recv_memory, num_bytes=2 << 20, backend="auto"):
        buffer = make_large_buffer(8, 64)
        assert buffer.runtime is not None
        assert buffer.runtime.name == "collective"
        buffer.close()


def check_200_random_calls(recv_memory: str = "auto") -> None:
    """As many as a network with faults is given."""
    assert ep_device_random.check_random_calls(recv_memory, 200) == 200


def _num_sent(problem: Problem, source: int, ranks: range) -> int:
    """Tokens of a rank with an expert on some of these ranks."""
    rank_of_entry = problem.topk_idx[source] // problem.num_local_experts
    is_there = (problem.topk_idx[source] >= 0) & (rank_of_entry >= ranks.start) & (rank_of_entry < ranks.stop)
    return int(is_there.any(1).sum())


def expected_traffic(problem: Problem, mode: str, rank: int, peer: int) -> tuple[PeerCounts, PeerCounts]:
    """What a rank asks its network to do toward a peer in one dispatch without CPU sync, and in one combine of it.

    Rows of bfloat16 with weights, partial sums allowed. Every put has one signal, of 8 bytes that do not count.
    """
    num_ranks, node_ranks, num_topk = len(problem.topk_idx), num_node_ranks(), problem.num_topk
    is_rail = rank % node_ranks == peer % node_ranks and rank != peer
    num_relays = num_ranks // node_ranks if mode == "hybrid" else num_ranks
    row_bytes = 2 * problem.hidden
    record_bytes = _align(row_bytes + _align(4 * (2 * num_topk + 1), 16) + 4 * num_topk, 16)
    return_bytes = row_bytes + _align(4 * num_topk, 16)

    def node_of(number: int) -> range:
        first = number // node_ranks * node_ranks
        return range(first, first + node_ranks)

    if mode == "hybrid":
        num_sent = _num_sent(problem, rank, node_of(peer)) if is_rail else 0
        num_back = _num_sent(problem, peer, node_of(rank)) if is_rail else 0
    else:
        is_remote = rank // node_ranks != peer // node_ranks
        num_sent = _num_sent(problem, rank, range(peer, peer + 1)) if is_remote else 0
        num_back = _num_sent(problem, peer, range(rank, rank + 1)) if is_remote else 0

    def puts(num_rows: int, num_bytes: int, opening_bytes: int, *, one_by_one: bool = False) -> PeerCounts:
        chunk_rows = 1 if one_by_one else max(1, min((256 << 10) // num_bytes, 256))
        num_puts = is_rail + -(-num_rows // chunk_rows)
        put_bytes = is_rail * opening_bytes + num_rows * num_bytes
        return PeerCounts(num_puts=num_puts, put_bytes=put_bytes, num_signals=num_puts)

    counts_bytes = _align(64 + 4 * (num_ranks + problem.num_experts + num_relays), 16)
    dispatched = puts(num_sent, record_bytes, counts_bytes)
    return dispatched, puts(num_back, return_bytes, 64, one_by_one=mode == "direct")


def check_traffic(recv_memory: str = "auto", mode: str = "hybrid") -> None:
    """One row a (token, remote node), or a (token, remote rank), in both directions; openings only along the rails."""
    rank, num_ranks = dist.get_rank(), dist.get_world_size()
    folder = Path(os.environ["EP_LOOPBACK_COUNTERS"])
    num_tokens = [(600, 33, 0, 217)[rank % 4] for rank in range(num_ranks)]
    problem = make_problem(5, num_tokens, num_experts=4 * num_ranks, num_topk=4, hidden=1024)
    with on_device(recv_memory, num_bytes=64 << 20):
        buffer = make_large_buffer(problem.num_max_tokens, problem.hidden)
        x, topk_idx, weights = problem.inputs(rank)

        def counted(call: Callable[[], object]) -> tuple[object, list[PeerCounts]]:
            torch.cuda.synchronize()
            dist.barrier()
            before = read_counters(folder)[rank]
            result = call()
            torch.cuda.synchronize()
            dist.barrier()
            after = read_counters(folder)[rank]
            return result, [new - old for new, old in zip(after, before, strict=True)]

        sent, dispatched = counted(
            lambda: buffer.dispatch(
                x,  # type: ignore[arg-type]
                topk_idx=topk_idx,
                topk_weights=weights,
                num_experts=problem.num_experts,
                do_cpu_sync=False,
            )
        )
        _, combined = counted(lambda: buffer.combine(sent[0], sent[3], topk_weights=sent[2]))  # type: ignore[index]
        for peer in range(num_ranks):
            wanted = expected_traffic(problem, mode, rank, peer)
            found = dispatched[peer], combined[peer]
            assert found == wanted, f"from rank {rank} to {peer}: {found}, not {wanted}"
        buffer.close()


def _checks(mode: str) -> list[tuple[str, str, Callable[[], object]]]:
    own: list[Callable[[], object]] = [check_topologies, check_the_choice, check_200_random_calls]
    checks = [*ep_device.all_checks(), *((check.__name__, "auto", check) for check in own)]
    if "EP_LOOPBACK_COUNTERS" in os.environ:
        checks.append(("check_traffic", "auto", lambda: check_traffic("auto", mode)))
    return checks


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("names", nargs="*", metavar="check", help="which checks to run (default: all)")
    parser.add_argument("--memory", choices=ep_device_setting.RECV_MEMORIES, help="run them in this recv_memory only")
    parser.add_argument("--mode", choices=MODES, help="with or without the hierarchy of nodes only")
    parsed = parser.parse_args()
    chosen = [
        ep_device.timed(f"{mode} {name}", memory, lambda mode=mode, check=check: run_in_mode(mode, check))
        for mode in MODES
        for name, memory, check in _checks(mode)
        if (not parsed.names or name in parsed.names)
        and parsed.memory in (None, memory)
        and parsed.mode in (None, mode)
    ]
    if not chosen:
        parser.error("no such check")
    run_as_script(*chosen)


if __name__ == "__main__":
    main()
