"""Owns the command line of the benchmark, the start of its ranks and their groups.

Without the variables of a launcher it starts the ranks itself, on this machine; under torchrun it is one of them.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import shlex
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TextIO

import torch
import torch.distributed as dist

from deep_ep_core.bench_machine import nccl_version, read_machine
from deep_ep_core.errors import ConfigError
from deep_ep_core.launch import main as launch_main
from deep_ep_core.topology import host_identity
from deep_ep_ep.bench.cases import DTYPES, LAYOUTS, MODES, OPS, RECV_MEMORIES, Case, Sweep
from deep_ep_ep.bench.measure import CaseRunner, Session, measure_copy_gbs
from deep_ep_ep.bench.report import make_record, table_head, table_row
from deep_ep_ep.bench.suites import SUITES
from deep_ep_ep.buffer import get_physical_domain_size

__all__ = ["main"]

_MODULE = "deep_ep_ep.bench"
_DEFAULT_NUM_RANKS = 2
# Before it, NCCL refuses two ranks on one GPU whatever is set.
_FIRST_NCCL_WITH_SHARED_GPUS = (2, 30)
# What a sweep has where nothing is said; a suite has values of its own.
_SWEEP_DEFAULTS: dict[str, object] = {
    "ops": list(OPS[:2]),
    "tokens": [128],
    "hidden": [7168],
    "topk": [8],
    "experts": [256],
    "layout": ["token"],
    "dtype": ["bf16"],
    "num_sms": [0],
    "mode": ["stream"],
    "recv_memory": ["auto"],
    "alignment": 1,
    "imbalance": 1.0,
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the benchmark; returns the exit code. Prints its usage and exits with 2 when the arguments are wrong."""
    arguments = sys.argv[1:] if arguments is None else list(arguments)
    parser = _parser()
    options = parser.parse_args(arguments)
    is_rank = "RANK" in os.environ
    default_num_ranks = SUITES[options.suite].num_ranks if options.suite else _DEFAULT_NUM_RANKS
    num_ranks = int(os.environ["WORLD_SIZE"]) if is_rank else options.ranks or default_num_ranks
    if options.ranks not in (None, num_ranks):
        parser.error(
            f"--ranks must be the number of ranks that the launcher started, {num_ranks} (got {options.ranks})"
        )
    try:
        cases = _cases(options, num_ranks)
    except ConfigError as error:
        parser.error(str(error))
    if not is_rank:
        nodes = [] if options.nodes is None else ["--nodes", str(options.nodes)]
        device = ["--device", _device_kind(options)]
        return launch_main(["--ranks", str(num_ranks), *nodes, *device, "--no-prefix", "-m", _MODULE, *arguments])
    command = shlex.join(["python", "-m", _MODULE, *arguments])
    try:
        _run_rank(options, cases, command)
    except ConfigError as error:
        print(f"rank {os.environ['RANK']}: {error}", file=sys.stderr, flush=True)
        return 1
    return 0


def _run_rank(options: argparse.Namespace, cases: Sequence[Case], command: str) -> None:
    """Join the other ranks and run all cases; rank 0 reports each as it ends."""
    session, num_nodes = _open_session(options)
    rank = dist.get_rank()
    with _report_files(options.json, is_reporting=rank == 0) as (table_file, json_file):
        copy_gbs = measure_copy_gbs(session)
        machine = read_machine(session.device, file=Path(__file__))
        runner = CaseRunner(session)
        for number, case in enumerate(cases):
            measurement = runner.run(case)
            if rank != 0:
                continue
            record = make_record(case, measurement, machine, command=command, num_nodes=num_nodes, copy_gbs=copy_gbs)
            if number == 0:
                group_backend = "gloo" if session.group is session.host_group else "nccl"
                print(table_head(record, group_backend=group_backend), file=table_file)
            print(table_row(record), file=table_file, flush=True)
            if json_file is not None:
                print(record.to_json(), file=json_file, flush=True)
        runner.close()
    dist.barrier(session.host_group)
    dist.destroy_process_group()


def _open_session(options: argparse.Namespace) -> tuple[Session, int]:
    """Join the ranks' groups; returns the session and the number of physical scale-up domains."""
    kind = _device_kind(options)
    if kind == "cuda" and not torch.cuda.is_available():
        raise ConfigError("--device cuda needs a GPU that torch can use (got none); use --device cpu")
    if os.environ.get("LOCAL_WORLD_SIZE") == os.environ["WORLD_SIZE"]:
        # One machine: loopback does, and the machine's own name need not resolve.
        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    dist.init_process_group("gloo")
    host_group = dist.group.WORLD
    assert host_group is not None
    device, device_name = torch.device("cpu"), f"{host_identity()} cpu"
    if kind == "cuda":
        # Right in make-believe nodes too: the launcher turns the list of GPUs for each.
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]) % torch.cuda.device_count())
        torch.cuda.set_device(device)
        device_name = f"{host_identity()} {torch.cuda.get_device_properties(device).uuid}"
    device_of_rank: list[str] = [""] * dist.get_world_size()
    dist.all_gather_object(device_of_rank, device_name)
    session = Session(
        group=_row_group(kind, options.group_backend, host_group, device_of_rank),
        host_group=host_group,
        device=device,
        device_of_rank=device_of_rank,
        backend=options.backend,
        num_rounds=options.rounds,
        num_warmup=options.warmup,
        has_baseline=not options.no_baseline,
    )
    num_nodes = get_physical_domain_size(session.group)[0]
    if options.nodes not in (None, num_nodes):
        raise ConfigError(
            f"--nodes {options.nodes} must be the number of nodes that the ranks see (got {num_nodes}); set "
            f"NCCL_LSA_TEAM_SIZE={dist.get_world_size() // options.nodes} for the launcher, or leave --nodes out"
        )
    return session, num_nodes


def _row_group(
    kind: str, group_backend: str, host_group: dist.ProcessGroup, device_of_rank: Sequence[str]
) -> dist.ProcessGroup:
    """The group that exchanges rows; NCCL refuses two ranks on one GPU unless it is told otherwise."""
    if kind == "cpu" or group_backend == "gloo":
        return host_group
    if group_backend == "auto" and max(Counter(device_of_rank).values()) > 1 and not _shares_gpus():
        return host_group
    group = dist.new_group(backend="cpu:gloo,cuda:nccl")
    assert isinstance(group, dist.ProcessGroup)
    return group


def _shares_gpus() -> bool:
    """Whether NCCL takes several ranks on one GPU; the launcher sets the variable where they share one."""
    is_new_enough = nccl_version()[:2] >= _FIRST_NCCL_WITH_SHARED_GPUS
    return is_new_enough and os.environ.get("NCCL_MULTI_RANK_GPU_ENABLE") == "1"


def _device_kind(options: argparse.Namespace) -> str:
    return options.device or ("cuda" if torch.cuda.is_available() else "cpu")


@contextlib.contextmanager
def _report_files(json_path: str | None, *, is_reporting: bool) -> Iterator[tuple[TextIO, TextIO | None]]:
    """Where the table goes, and where JSON lines go; a standard output that holds JSON holds nothing else."""
    if json_path is None or not is_reporting:
        yield sys.stdout, None
    elif json_path == "-":
        yield sys.stderr, sys.stdout
    else:
        with open(json_path, "w", encoding="utf-8") as json_file:
            yield sys.stdout, json_file


def _cases(options: argparse.Namespace, num_ranks: int) -> list[Case]:
    """What the options ask for.

    Raises:
        ConfigError: They do not fit together.
    """
    if options.suite:
        for name in _SWEEP_DEFAULTS:
            if getattr(options, name) is not None:
                raise ConfigError(f"--suite has values of its own; leave out --{name.replace('_', '-')}")
        cases = SUITES[options.suite].select(options.only or [], num_ranks=num_ranks)
        return [replace(case, seed=options.seed) for case in cases]
    if options.only:
        raise ConfigError("--only names cases of a suite; pass --suite too, or leave it out")
    for name, value in _SWEEP_DEFAULTS.items():
        if getattr(options, name) is None:
            setattr(options, name, value)
    return Sweep(
        ops=options.ops,
        layouts=options.layout,
        dtypes=options.dtype,
        num_ranks=num_ranks,
        num_tokens=options.tokens,
        hidden=options.hidden,
        num_topk=options.topk,
        num_experts=options.experts,
        num_sms=options.num_sms,
        expert_alignment=options.alignment,
        imbalance=options.imbalance,
        seed=options.seed,
        recv_memories=options.recv_memory,
        modes=options.mode,
    ).cases()


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog=f"python -m {_MODULE}",
        description="Time dispatch and combine, beside the same work with torch's all-to-all and the time that the "
        "memory needs at least. Starts its ranks on this machine, or joins those that torchrun started.",
        epilog="LIST is one value or several with commas between; all combinations are measured.",
    )
    sizes = parser.add_argument_group("what is measured")
    sizes.add_argument("--ops", type=_names(OPS), metavar="LIST", help=f"of {', '.join(OPS)} (default: first 2)")
    sizes.add_argument("--tokens", type=_numbers(1), metavar="LIST", help="tokens a rank (default: 128)")
    sizes.add_argument("--hidden", type=_numbers(1), metavar="LIST", help="elements (default: 7168)")
    sizes.add_argument("--topk", type=_numbers(1), metavar="LIST", help="experts a token (default: 8)")
    sizes.add_argument("--experts", type=_numbers(1), metavar="LIST", help="in all (default: 256)")
    sizes.add_argument(
        "--layout",
        type=_names(LAYOUTS, all_of_them="both"),
        metavar="LIST",
        help="token, expert, or both (default: token)",
    )
    sizes.add_argument("--dtype", type=_names(DTYPES), metavar="LIST", help="of bf16, fp8 (default: bf16)")
    sizes.add_argument("--num-sms", type=_numbers(0), metavar="LIST", help="0: the library's choice (default)")
    sizes.add_argument(
        "--mode",
        type=_names(MODES),
        metavar="LIST",
        help="stream: calls on the device, with CPU sync (default); graph: operations inside a CUDA graph; host: the "
        "host's time of a call; these two without CPU sync",
    )
    sizes.add_argument(
        "--recv-memory",
        type=_names(RECV_MEMORIES),
        metavar="LIST",
        help="where the device backend keeps received rows: auto, window, torch (default: auto)",
    )
    sizes.add_argument("--alignment", type=_number(1), metavar="N", help="of each expert's rows (default: 1)")
    sizes.add_argument(
        "--imbalance", type=float, metavar="X", help="hottest rank's load over the mean (default: 1, even)"
    )
    sizes.add_argument("--seed", type=_number(0), default=0, metavar="N", help="of the routing (default: 0)")
    suites = parser.add_argument_group("suites, instead of the above")
    suites.add_argument("--suite", choices=sorted(SUITES), help="run the named cases of a suite")
    suites.add_argument(
        "--only", type=lambda text: text.split(","), metavar="LIST", help="names of cases of it, * for anything"
    )
    where = parser.add_argument_group("where it runs")
    where.add_argument(
        "--ranks",
        type=_number(1),
        metavar="N",
        help=f"processes (default: {_DEFAULT_NUM_RANKS}, the suite's, or the launcher's)",
    )
    where.add_argument("--nodes", type=_number(1), metavar="N", help="make-believe nodes that the ranks are cut into")
    where.add_argument("--device", choices=("cpu", "cuda"), help="(default: cuda if there is one)")
    where.add_argument("--backend", choices=("auto", "collective", "device"), default="auto", help="(default: auto)")
    where.add_argument(
        "--group-backend",
        choices=("auto", "gloo", "nccl"),
        default="auto",
        help="of the process group on cuda; auto: nccl where it takes these ranks, which it does on a shared GPU only "
        "with NCCL_MULTI_RANK_GPU_ENABLE=1, else gloo",
    )
    how = parser.add_argument_group("how it is measured and told")
    how.add_argument("--rounds", type=_number(1), default=20, metavar="N", help="timed rounds (default: 20)")
    how.add_argument("--warmup", type=_number(0), default=5, metavar="N", help="rounds before them (default: 5)")
    how.add_argument("--no-baseline", action="store_true", help="do not run torch's all-to-all")
    how.add_argument(
        "--json",
        metavar="PATH",
        help="write a JSON line a case; -: to the standard output, the table to the standard error",
    )
    return parser


def _number(minimum: int) -> Callable[[str], int]:
    def parse(text: str) -> int:
        value = int(text) if text.strip().isdecimal() else -1
        if value < minimum:
            raise argparse.ArgumentTypeError(f"must be an integer of at least {minimum} (got {text!r})")
        return value

    return parse


def _numbers(minimum: int) -> Callable[[str], list[int]]:
    parse_one = _number(minimum)
    return lambda text: [parse_one(part) for part in text.split(",")]


def _names(allowed: Sequence[str], *, all_of_them: str | None = None) -> Callable[[str], list[str]]:
    def parse(text: str) -> list[str]:
        names = list(allowed) if text == all_of_them else [part.strip() for part in text.split(",")]
        if unknown := [name for name in names if name not in allowed]:
            raise argparse.ArgumentTypeError(f"must be of {', '.join(allowed)} (got {unknown[0]!r})")
        return names

    return parse


if __name__ == "__main__":
    sys.exit(main())
