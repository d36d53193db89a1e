"""Owns the local launcher, `python -m deep_ep_core.launch`: it runs a program in several ranks on this machine.

It does not start ranks on other machines and keeps no restart policy: torchrun does. A script sees the variables that
torchrun would set, so it runs unchanged under either.
"""

from __future__ import annotations

import argparse
import contextlib
import signal
import sys
import time
from collections.abc import Iterator, Sequence
from functools import partial
from types import FrameType
from typing import get_args

from deep_ep_core.errors import ConfigError
from deep_ep_core.local.config import Device, LaunchConfig
from deep_ep_core.local.mps import MpsMode
from deep_ep_core.local.processes import RankExit, RankProcesses, forward_line

__all__ = ["launch", "main"]

_POLL_S = 0.05
# The exit codes of argparse, of timeout(1) and of a shell.
_EXIT_USAGE = 2
_EXIT_TIMEOUT = 124
_EXIT_INTERRUPT = 128 + signal.SIGINT


def launch(
    config: LaunchConfig, command: Sequence[str], *, timeout_s: float | None = None, has_prefix: bool = True
) -> int:
    """Run one program in every rank and wait for all; when one fails, end the others.

    The ranks' output goes to this process's own streams, line by line. What failed is told on standard error.

    Args:
        config: The launch.
        command: Arguments for this interpreter: `["script.py", ...]` or `["-m", "package.module", ...]`.
        timeout_s: Seconds that all ranks together may take, or None.
        has_prefix: Whether each output line starts with `[rank 2] `.

    Returns:
        0 if every rank ended with exit code 0. Otherwise the exit code of the rank that failed first (128 + n if
        signal n killed it), or 124 past the deadline.

    Raises:
        ConfigError: The launch needs a GPU or MPS, and there is none.
    """
    deadline = None if timeout_s is None else time.monotonic() + timeout_s
    with RankProcesses(config, command, on_line=partial(forward_line, has_prefix=has_prefix)) as ranks:
        while ranks.running:
            ranks.pump(_POLL_S)
            failures = [end for end in ranks.poll() if end.is_failure]
            if failures:
                ranks.stop()
                _tell(_describe_failure(failures[0], ranks.error_tail(failures[0].rank)))
                code = failures[0].return_code
                return code if code > 0 else 128 - code
            if deadline is not None and time.monotonic() > deadline and ranks.running:
                stacks = ranks.abort_with_stacks(ranks.running)
                ranks.stop(grace_s=0)
                _tell(_describe_timeout(stacks, timeout_s))
                return _EXIT_TIMEOUT
    return 0


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; returns the exit code. Prints its usage and exits with 2 when the arguments are wrong."""
    parser = _parser()
    options = parser.parse_args(arguments)
    try:
        config = LaunchConfig(
            num_ranks=options.ranks,
            num_nodes=options.nodes,
            num_threads=options.threads,
            device=options.device,
            mps=options.mps,
        )
    except ConfigError as error:
        parser.error(str(error))
    if options.timeout is not None and options.timeout <= 0:
        parser.error(f"--timeout must be above 0 seconds (got {options.timeout:g})")
    command = [*(["-m"] if options.module else []), options.program, *options.arguments]
    try:
        with _termination_unwinds():
            return launch(config, command, timeout_s=options.timeout, has_prefix=not options.no_prefix)
    except ConfigError as error:
        _tell(str(error))
        return _EXIT_USAGE
    except KeyboardInterrupt:
        _tell("interrupted; all ranks were ended")
        return _EXIT_INTERRUPT


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m deep_ep_core.launch",
        description="Run a program in several ranks on this machine. When one rank fails, all are ended.",
    )
    parser.add_argument("--ranks", type=int, required=True, metavar="N", help="number of processes")
    parser.add_argument(
        "--nodes",
        type=int,
        default=1,
        metavar="N",
        help="make-believe nodes that the ranks are cut into: sets NCCL_LSA_TEAM_SIZE to ranks / nodes, and on GPUs "
        "gives NCCL a loopback network, unless you chose another (default: 1)",
    )
    parser.add_argument(
        "--device",
        choices=get_args(Device),
        default="cpu",
        help="cuda: give each rank a GPU, shared where there are fewer GPUs than ranks; cpu: set nothing about GPUs "
        "(default)",
    )
    parser.add_argument(
        "--mps",
        choices=get_args(MpsMode),
        default="auto",
        help="let the ranks of a shared GPU run at the same time, through an MPS daemon of this launch; auto: where it "
        "can be started (default)",
    )
    parser.add_argument(
        "--timeout",
        type=float,
        metavar="SECONDS",
        help="show the Python stacks of the ranks that still run after this time, and end them (default: no limit)",
    )
    parser.add_argument(
        "--threads", type=int, default=1, metavar="N", help="OMP_NUM_THREADS of a rank, if unset (default: 1)"
    )
    parser.add_argument("--no-prefix", action="store_true", help="print output lines without `[rank N] `")
    parser.add_argument("-m", dest="module", action="store_true", help="the program is a module, as in `python -m`")
    parser.add_argument("program", help="script, or module after -m")
    parser.add_argument("arguments", nargs=argparse.REMAINDER, help="arguments of the program")
    return parser


@contextlib.contextmanager
def _termination_unwinds() -> Iterator[None]:
    """Let SIGTERM and SIGHUP end this process through its `finally` blocks, which end the ranks and their children."""

    def leave(number: int, _: FrameType | None) -> None:
        raise SystemExit(128 + number)

    # nohup and the like let a signal be ignored, which stays so.
    numbers = [n for n in (signal.SIGTERM, signal.SIGHUP) if signal.getsignal(n) is not signal.SIG_IGN]
    previous = {number: signal.signal(number, leave) for number in numbers}
    try:
        yield
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


def _describe_failure(end: RankExit, error_tail: str) -> str:
    head = f"rank {end.rank} failed first: {end.how}; all other ranks were ended"
    return f"{head}. The end of its error output:\n{error_tail}" if error_tail else f"{head}. It printed no error."


def _describe_timeout(stacks: dict[int, str], timeout_s: float | None) -> str:
    names = f"{'rank' if len(stacks) == 1 else 'ranks'} {', '.join(map(str, stacks))}"
    parts = [f"{names} still ran after {timeout_s:g} s (--timeout); all ranks were ended"]
    parts += [f"stack of rank {rank}:\n{stack}" for rank, stack in stacks.items()]
    return "\n".join(parts)


def _tell(text: str) -> None:
    print(f"deep_ep_core.launch: {text}", file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
