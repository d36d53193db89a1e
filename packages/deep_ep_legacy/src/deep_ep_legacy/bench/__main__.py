"""Owns the command line of the benchmark of low-latency calls, and the start of its ranks.

Without the variables of a launcher it starts the ranks itself, on this machine; under torchrun it is one of them.
"""

from __future__ import annotations

import argparse
import os
import shlex
import sys
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import torch
import torch.distributed as dist

from deep_ep_core.bench_machine import Machine, read_machine
from deep_ep_core.launch import main as launch_main
from deep_ep_legacy.bench.low_latency import Sizes, Timing, measure_copy_gbs, measure_low_latency
from deep_ep_legacy.bench.report import Record, table_head, table_row
from deep_ep_legacy.buffer import Buffer

__all__ = ["main"]

_MODULE = "deep_ep_legacy.bench"


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the benchmark; returns the exit code. Prints its usage and exits with 2 when the arguments are wrong."""
    arguments = sys.argv[1:] if arguments is None else list(arguments)
    parser = _parser()
    options = parser.parse_args(arguments)
    sizes = Sizes(num_tokens=options.tokens, hidden=options.hidden, num_topk=options.topk, num_experts=options.experts)
    if "RANK" not in os.environ:
        launch = ["--ranks", str(options.ranks), "--device", "cuda", "--no-prefix", "-m", _MODULE]
        return launch_main([*launch, *arguments])
    if not torch.cuda.is_available():
        parser.error("low-latency calls are timed on GPUs (torch finds none)")
    _run_rank(options, sizes, shlex.join(["python", "-m", _MODULE, *arguments]))
    return 0


def _run_rank(options: argparse.Namespace, sizes: Sizes, command: str) -> None:
    """Join the other ranks and measure; rank 0 reports each case as it ends."""
    if os.environ.get("LOCAL_WORLD_SIZE") == os.environ["WORLD_SIZE"]:
        # One machine: loopback does, and the machine's own name need not resolve.
        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    dist.init_process_group("gloo")
    device = torch.device("cuda", int(os.environ["LOCAL_RANK"]) % torch.cuda.device_count())
    torch.cuda.set_device(device)
    num_rdma_bytes = Buffer.get_low_latency_rdma_size_hint(
        sizes.num_tokens, sizes.hidden, dist.get_world_size(), sizes.num_experts
    )
    buffer = Buffer(
        dist.group.WORLD, 0, num_rdma_bytes, low_latency_mode=True, explicitly_destroy=True, backend="device"
    )
    gpus: list[str] = [""] * dist.get_world_size()
    dist.all_gather_object(gpus, str(torch.cuda.get_device_properties(device).uuid))
    num_gpu_ranks = max(Counter(gpus).values())
    copy_gbs, machine = measure_copy_gbs(), read_machine(device, file=Path(__file__))
    json_file = None if options.json is None or dist.get_rank() else open(options.json, "w", encoding="utf-8")  # noqa: SIM115
    has_head = False
    for timing in measure_low_latency(buffer, sizes, seed=options.seed, num_rounds=options.rounds):
        if dist.get_rank():
            continue
        record = _record(timing, sizes, machine, buffer, command, copy_gbs=copy_gbs, num_gpu_ranks=num_gpu_ranks)
        if not has_head:
            print(table_head(record))
            has_head = True
        print(table_row(record), flush=True)
        if json_file is not None:
            print(record.to_json(), file=json_file, flush=True)
    if json_file is not None:
        json_file.close()
    dist.barrier()
    buffer.destroy()
    dist.destroy_process_group()


def _record(
    timing: Timing,
    sizes: Sizes,
    machine: Machine,
    buffer: Buffer,
    command: str,
    *,
    copy_gbs: float,
    num_gpu_ranks: int,
) -> Record:
    op, _, half = timing.op.partition("-")
    bytes_moved = sizes.least_bytes(op, timing.dtype) * num_gpu_ranks
    is_whole = not half and timing.mode != "host"
    floor_ms = bytes_moved / copy_gbs / 1e6 if is_whole else None
    sent_bytes = sizes.num_selections * sizes.row_bytes(timing.dtype)
    num_sms = torch.cuda.get_device_properties(torch.cuda.current_device()).multi_processor_count
    return Record(
        op=timing.op,
        backend="device",
        device=machine.device,
        driver=machine.driver,
        nccl=machine.nccl,
        torch=machine.torch,
        commit=machine.commit,
        command=command,
        num_ranks=buffer.group_size,
        num_nodes=1,
        num_tokens=sizes.num_tokens,
        hidden=sizes.hidden,
        num_topk=sizes.num_topk,
        num_experts=sizes.num_experts,
        dtype=timing.dtype,
        layout="expert",
        num_sms=max(num_sms // num_gpu_ranks, 1),
        median_ms=timing.median_ms,
        min_ms=min(timing.times_ms),
        max_ms=max(timing.times_ms),
        bytes_moved=bytes_moved,
        copy_gbs=copy_gbs,
        floor_ms=floor_ms,
        ratio_to_floor=None if floor_ms is None else timing.median_ms / floor_ms,
        baseline_ms=None,
        mode=timing.mode,
        has_hook=timing.has_hook,
        v1_gbs=sent_bytes / timing.median_ms / 1e6 if is_whole else None,
    )


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog=f"python -m {_MODULE}",
        description="Time V1's low-latency calls on the device backend. Starts its ranks on this machine, or joins "
        "those that torchrun started.",
    )
    parser.add_argument("--ranks", type=int, default=8, metavar="N", help="processes (default: 8)")
    parser.add_argument("--tokens", type=int, default=128, metavar="N", help="of each rank (default: 128)")
    parser.add_argument("--hidden", type=int, default=7168, metavar="N", help="channels (default: 7168)")
    parser.add_argument("--topk", type=int, default=8, metavar="N", help="experts of a token (default: 8)")
    parser.add_argument("--experts", type=int, default=256, metavar="N", help="in all (default: 256)")
    parser.add_argument("--rounds", type=int, default=20, metavar="N", help="timed rounds (default: 20)")
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="of the routing (default: 0)")
    parser.add_argument("--json", metavar="PATH", help="also write a JSON line a case")
    return parser


if __name__ == "__main__":
    sys.exit(main())
