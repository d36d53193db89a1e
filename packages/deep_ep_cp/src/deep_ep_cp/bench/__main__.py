"""Owns the command line of the benchmark and the start of its ranks.

Without the variables of a launcher it starts the ranks itself, on this machine; under torchrun it is one of them.
"""

from __future__ import annotations

import argparse
import os
import shlex
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import torch
import torch.distributed as dist

from deep_ep_core.bench_machine import read_machine
from deep_ep_core.errors import ConfigError
from deep_ep_core.launch import main as launch_main
from deep_ep_core.topology import host_identity
from deep_ep_cp.bench.cases import OPS, Case
from deep_ep_cp.bench.measure import Session, make_call, measure_baseline, measure_call, measure_copy_gbs
from deep_ep_cp.bench.profile import device_activities, kernels_among
from deep_ep_cp.bench.report import make_record
from deep_ep_cp.buffer import ContextBuffer
from deep_ep_cp.region import REGION_ALIGNMENT_BYTES

__all__ = ["main"]

_MODULE = "deep_ep_cp.bench"
_DEFAULT_NUM_RANKS = 4
_BYTES_PER_KIB = 1 << 10
# The tensor by which ranks begin together, and the one that is measured.
_CALLS_PER_SESSION = 2


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the benchmark; returns the exit code: 1 where a profile shows a kernel, or the ranks cannot run as asked."""
    arguments = sys.argv[1:] if arguments is None else list(arguments)
    options = _parser().parse_args(arguments)
    if "RANK" not in os.environ:
        ranks = ["--ranks", str(options.ranks), "--device", _device_kind(options)]
        return launch_main([*ranks, "--no-prefix", "-m", _MODULE, *arguments])
    try:
        return _run_rank(options, shlex.join(["python", "-m", _MODULE, *arguments]))
    except ConfigError as error:
        print(f"rank {os.environ['RANK']}: {error}", file=sys.stderr, flush=True)
        return 1


def _run_rank(options: argparse.Namespace, command: str) -> int:
    session = _open_session(options)
    rank, num_ranks = dist.get_rank(), dist.get_world_size()
    machine = read_machine(session.device, file=Path(__file__))
    if session.device.type == "cpu":
        # Records name GPUs only.
        machine = replace(machine, device=None)
    copy_gbs = 0.0 if options.profile else measure_copy_gbs(session)
    num_kernels = 0
    for kib in options.kib:
        region_bytes = num_ranks * kib * _BYTES_PER_KIB + num_ranks * REGION_ALIGNMENT_BYTES
        with ContextBuffer(
            session.group,
            ContextBuffer.get_agrs_buffer_size_hint(session.group, region_bytes),
            device=session.device,
            backend=options.backend,
        ) as buffer:
            buffer.agrs_set_config(region_bytes, _CALLS_PER_SESSION)
            for op in options.ops:
                case = Case(op=op, slot_bytes=kib * _BYTES_PER_KIB, num_ranks=num_ranks)
                if options.profile:
                    num_kernels += _profile(case, buffer, session)
                    continue
                times = measure_call(case, buffer, session)
                baseline = None if options.no_baseline else measure_baseline(case, session)
                record = make_record(
                    case,
                    times,
                    baseline,
                    machine,
                    backend=buffer.backend_name,
                    command=command,
                    num_ranks_of_device=session.num_ranks_of_device,
                    copy_gbs=copy_gbs,
                )
                if rank == 0:
                    print(record.to_json(), flush=True)
            # No rank withdraws its memory while another one still writes there.
            dist.barrier(session.host_group)
    dist.barrier(session.host_group)
    dist.destroy_process_group()
    return int(num_kernels > 0)


def _profile(case: Case, buffer: ContextBuffer, session: Session) -> int:
    """Tell what the GPU did for this rank in one call; returns the number of kernels in an all-gather. Collective."""
    call = make_call(case, buffer, session.device)
    for _ in range(2):
        # The first time without the profiler, which would see what is loaded for it.
        with buffer.agrs_new_session():
            activities = device_activities(call, session.device)
    kernels = kernels_among(activities)
    if dist.get_rank() == 0:
        print(f"{case.op}, {case.slot_bytes} bytes a rank, backend {buffer.backend_name}, on rank 0:")
        for name, count in sorted(activities.items()):
            print(f"  {count:4} x {name}")
        print(f"  kernels: {', '.join(kernels) or 'none'}", flush=True)
    # A sum is computed by kernels.
    return 0 if case.op == "reduce_scatter" else len(kernels)


def _open_session(options: argparse.Namespace) -> Session:
    """Join the ranks' groups."""
    kind = _device_kind(options)
    if kind == "cpu" and options.profile:
        raise ConfigError("--profile needs a GPU that torch can use (got none); leave it out")
    dist.init_process_group("gloo")
    host_group = dist.group.WORLD
    assert host_group is not None
    device, device_name = torch.device("cpu"), f"{host_identity()} cpu"
    group: dist.ProcessGroup = host_group
    if kind == "cuda":
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]) % torch.cuda.device_count())
        torch.cuda.set_device(device)
        device_name = f"{host_identity()} {torch.cuda.get_device_properties(device).uuid}"
        made = dist.new_group(backend="cpu:gloo,cuda:nccl")
        assert isinstance(made, dist.ProcessGroup)
        group = made
    device_of_rank: list[str] = [""] * dist.get_world_size()
    dist.all_gather_object(device_of_rank, device_name)
    return Session(
        group=group,
        host_group=host_group,
        device=device,
        device_of_rank=device_of_rank,
        num_rounds=options.rounds,
        num_warmup=options.warmup,
    )


def _device_kind(options: argparse.Namespace) -> str:
    return options.device or ("cuda" if torch.cuda.is_available() else "cpu")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog=f"python -m {_MODULE}",
        description="Time calls of a session, beside the same with torch's collectives and the time that the memory "
        "needs at least. Prints a JSON line a case. Starts its ranks on this machine, or joins those of torchrun.",
        epilog="LIST is one value or several with commas between; all combinations are measured.",
    )
    parser.add_argument(
        "--ops", type=_names, default=list(OPS), metavar="LIST", help=f"of {', '.join(OPS)} (default: all)"
    )
    parser.add_argument(
        "--kib", type=_numbers, default=[64 << 10], metavar="LIST", help="KiB of a slot (default: 65536)"
    )
    parser.add_argument(
        "--ranks", type=_number(1), default=_DEFAULT_NUM_RANKS, metavar="N", help="processes (default: %(default)s)"
    )
    parser.add_argument("--device", choices=("cpu", "cuda"), help="(default: cuda if there is one)")
    parser.add_argument("--backend", choices=("auto", "collective", "device"), default="auto", help="(default: auto)")
    parser.add_argument("--rounds", type=_number(1), default=20, metavar="N", help="timed rounds (default: 20)")
    parser.add_argument("--warmup", type=_number(0), default=5, metavar="N", help="rounds before them (default: 5)")
    parser.add_argument("--no-baseline", action="store_true", help="do not run torch's collectives")
    parser.add_argument(
        "--profile",
        action="store_true",
        help="instead of timing, tell what the GPU did in each call; exit status 1 if an all-gather ran a kernel",
    )
    return parser


def _number(minimum: int) -> Callable[[str], int]:
    def parse(text: str) -> int:
        value = int(text) if text.strip().isdecimal() else -1
        if value < minimum:
            raise argparse.ArgumentTypeError(f"must be an integer of at least {minimum} (got {text!r})")
        return value

    return parse


def _numbers(text: str) -> list[int]:
    return [_number(1)(part) for part in text.split(",")]


def _names(text: str) -> list[str]:
    names = [part.strip() for part in text.split(",")]
    if unknown := [name for name in names if name not in OPS]:
        raise argparse.ArgumentTypeError(f"must be of {', '.join(OPS)} (got {unknown[0]!r})")
    return names


if __name__ == "__main__":
    sys.exit(main())
