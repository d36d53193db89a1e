"""Owns the command line of the benchmark, the start of its ranks and their groups.

Without the variables of a launcher it starts the ranks itself, on this machine; under torchrun it is one of them.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import shlex
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TextIO, TypeVar

import torch
import torch.distributed as dist

from deep_ep_core.bench_machine import read_machine
from deep_ep_core.domains import detect_topology
from deep_ep_core.errors import ConfigError
from deep_ep_core.launch import main as launch_main
from deep_ep_core.topology import host_identity
from deep_ep_pp.bench.measure import Session, Spread, measure_copies, time_rounds
from deep_ep_pp.bench.report import Record, make_record
from deep_ep_pp.bench.tasks import MODES, OPS, Case, busiest_device_bytes, make_task
from deep_ep_pp.buffer import BackendName, PipelineBuffer

__all__ = ["main"]

_MODULE = "deep_ep_pp.bench"
_DEFAULT_BYTES = [64 << 20, 1 << 20, 4096]
_T = TypeVar("_T")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the benchmark; returns the exit code. Prints its usage and exits with 2 when the arguments are wrong."""
    arguments = sys.argv[1:] if arguments is None else list(arguments)
    options = _parser().parse_args(arguments)
    if "RANK" not in os.environ:
        nodes = [] if options.nodes is None else ["--nodes", str(options.nodes)]
        starting = ["--ranks", str(options.ranks), *nodes, "--device", _device_kind(options), "--no-prefix"]
        return launch_main([*starting, "-m", _MODULE, *arguments])
    cases = [
        Case(op=op, mode=mode, message_bytes=message_bytes, window=options.window)
        for mode in options.mode
        for op in options.ops
        for message_bytes in options.bytes
    ]
    try:
        _run_rank(options, cases, shlex.join(["python", "-m", _MODULE, *arguments]))
    except ConfigError as error:
        print(f"rank {os.environ['RANK']}: {error}", file=sys.stderr, flush=True)
        return 1
    return 0


def _run_rank(options: argparse.Namespace, cases: Sequence[Case], command: str) -> None:
    """Join the other ranks and run all cases; rank 0 reports each as it ends."""
    session = _open_session(options)
    rank = dist.get_rank()
    copy_gbs, engine_gbs = measure_copies(session)
    machine = read_machine(session.device, file=Path(__file__))
    with _json_file(options.json, is_reporting=rank == 0) as json_file, _stream(session, options):
        for case in cases:
            library, baseline, backend = _measure(session, case, options.backend, has_baseline=not options.no_baseline)
            record = make_record(
                case,
                machine,
                library,
                baseline,
                backend=backend,
                command=command,
                num_nodes=detect_topology(session.group).num_scaleout_ranks,
                device_of_rank=session.device_of_rank,
                bytes_moved=busiest_device_bytes(case, session.device_of_rank),
                copy_gbs=copy_gbs,
                engine_gbs=engine_gbs,
            )
            if rank == 0:
                print(_line(record), file=sys.stderr if options.json == "-" else sys.stdout, flush=True)
                if json_file is not None:
                    print(record.to_json(), file=json_file, flush=True)
    dist.barrier(session.host_group)
    dist.destroy_process_group()


def _measure(
    session: Session, case: Case, backend: BackendName, *, has_baseline: bool
) -> tuple[Spread, Spread | None, str]:
    """Check what a case delivers, then time it. Returns the library's times, the baseline's, and the backend."""
    baseline = None
    with PipelineBuffer(session.group, backend=backend) as buffer:
        assert buffer.runtime is not None
        name = buffer.runtime.name
        buffer.pp_set_config(case.message_bytes, case.window)
        task = make_task(case, buffer, session.device)
        task.run()
        task.check("the library")
        library = time_rounds(session, task.run, is_host=case.mode == "host")
        task.check("the library")
        if has_baseline:
            task.run_baseline()
            task.check("the baseline")
            baseline = time_rounds(session, task.run_baseline, is_host=case.mode == "host")
    return library, baseline, name


def _open_session(options: argparse.Namespace) -> Session:
    """Join the ranks' groups."""
    kind = _device_kind(options)
    if kind == "cuda" and not torch.cuda.is_available():
        raise ConfigError("--device cuda needs a GPU that torch can use (got none); use --device cpu")
    if os.environ.get("LOCAL_WORLD_SIZE") == os.environ["WORLD_SIZE"]:
        # One machine: loopback does, and the machine's own name need not resolve.
        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    dist.init_process_group("gloo")
    host_group = group = dist.group.WORLD
    assert host_group is not None
    device, device_name = torch.device("cpu"), f"{host_identity()} cpu"
    if kind == "cuda":
        # Right in make-believe nodes too: the launcher turns the list of GPUs for each.
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]) % torch.cuda.device_count())
        torch.cuda.set_device(device)
        device_name = f"{host_identity()} {torch.cuda.get_device_properties(device).uuid}"
        group = dist.new_group(backend="cpu:gloo,cuda:nccl")
    assert isinstance(group, dist.ProcessGroup)
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


def _stream(session: Session, options: argparse.Namespace) -> contextlib.AbstractContextManager[object]:
    """The stream that messages are on: one of their own, since the default stream takes no batches of copies."""
    if session.device.type == "cpu" or options.default_stream:
        return contextlib.nullcontext()
    torch.cuda.synchronize(session.device)
    return torch.cuda.stream(torch.cuda.Stream(session.device))


def _line(record: Record) -> str:
    """A record for people."""
    text = (
        f"{record.op:<5} {record.mode:<7} {record.message_bytes:>10} B, {record.num_ranks} ranks, {record.backend}: "
        f"{record.median_ms:.4f} ms (least {record.min_ms:.4f}, most {record.max_ms:.4f})"
    )
    if record.floor_ms is not None and record.ratio_to_floor is not None:
        text += f", {record.ratio_to_floor:.2f} x the floor of {record.floor_ms:.4f}"
    if record.baseline_ms is not None:
        text += f"; torch {record.baseline_ms:.4f}"
    return f"{text} [copy {record.copy_gbs:.0f} GB/s, engines {record.engine_gbs or 0:.0f}]"


def _device_kind(options: argparse.Namespace) -> str:
    return options.device or ("cuda" if torch.cuda.is_available() else "cpu")


@contextlib.contextmanager
def _json_file(path: str | None, *, is_reporting: bool) -> Iterator[TextIO | None]:
    if path is None or not is_reporting:
        yield None
    elif path == "-":
        yield sys.stdout
    else:
        with open(path, "w", encoding="utf-8") as file:
            yield file


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog=f"python -m {_MODULE}",
        description="Time messages between neighbours in the ring, beside the same with torch's batch_isend_irecv and "
        "the time that the memory needs at least. Starts its ranks on this machine, or joins those of torchrun.",
        epilog="LIST is one value or several with commas between; all combinations are measured.",
    )
    parser.add_argument("--bytes", type=_list_of(_number), default=_DEFAULT_BYTES, metavar="LIST", help="of a message")
    parser.add_argument("--ops", type=_list_of(_of(OPS)), default=list(OPS), metavar="LIST", help="of ring, both")
    parser.add_argument(
        "--mode",
        type=_list_of(_of(MODES)),
        default=["stream"],
        metavar="LIST",
        help="stream: of a step (default); host: the host's time of its calls",
    )
    parser.add_argument("--window", type=_number, default=4, metavar="N", help="messages on their way (default: 4)")
    parser.add_argument("--ranks", type=_number, default=2, metavar="N", help="processes to start (default: 2)")
    parser.add_argument("--nodes", type=_number, metavar="N", help="make-believe nodes that the ranks are cut into")
    parser.add_argument("--device", choices=("cpu", "cuda"), help="(default: cuda if there is one)")
    parser.add_argument("--backend", choices=("auto", "collective", "device"), default="auto", help="(default: auto)")
    parser.add_argument("--rounds", type=_number, default=20, metavar="N", help="timed rounds (default: 20)")
    parser.add_argument("--warmup", type=_number, default=3, metavar="N", help="rounds before them (default: 3)")
    parser.add_argument(
        "--default-stream", action="store_true", help="messages on the default stream, not on their own"
    )
    parser.add_argument("--no-baseline", action="store_true", help="do not run torch's calls")
    parser.add_argument("--json", metavar="PATH", help="write a JSON line a case; - for the standard output")
    return parser


def _number(text: str) -> int:
    value = int(text) if text.strip().isdecimal() else 0
    if value < 1:
        raise argparse.ArgumentTypeError(f"must be an integer of at least 1 (got {text!r})")
    return value


def _of(names: Sequence[_T]) -> Callable[[str], _T]:
    def parse(text: str) -> _T:
        found = [name for name in names if name == text.strip()]
        if not found:
            raise argparse.ArgumentTypeError(f"must be of {', '.join(map(str, names))} (got {text!r})")
        return found[0]

    return parse


def _list_of(parse_one: Callable[[str], _T]) -> Callable[[str], list[_T]]:
    return lambda text: [parse_one(part) for part in text.split(",")]


if __name__ == "__main__":
    sys.exit(main())
