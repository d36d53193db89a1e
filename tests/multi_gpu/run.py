"""Runs all that is to be known of a machine with several GPUs in one call, one rank a GPU.

usage: python tests/multi_gpu/run.py [--num-gpus N] [--budget-s 440] [--json PATH] [--only NAME,...]

Peer copies give the ceiling; then come the benches of EP, CP and PP, and the GPU tests of every package. Prints a short
table, and writes everything to --json, anew after each part. When the budget is spent no further part starts, and what
was left out is said. The exit status is 1 if a part went wrong, and 0 if parts were only left out.

It needs torch with CUDA, NCCL 2.30.4 or newer and pytest; the packages need not be installed. NVLink multicast stays
off. With --device cpu small stand-ins of all parts run on ranks without GPUs: that shows that the script works, and no
more.
"""

from __future__ import annotations

import argparse
import datetime
import functools
import os
import shlex
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gpu_parts import PACKAGES, ROOT, Part, make_parts, part_environment

if TYPE_CHECKING:
    from gpu_report import PartResult

_DEFAULT_BUDGET_S = 440.0
# A part that has less would only be cut off.
_LEAST_TIME_S = 20.0
_GRACE_S = 10.0
_NUM_CPU_RANKS = 2
# pytest's exit status where nothing was collected.
_NO_TESTS = 5


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; returns the exit code."""
    options = _parse(arguments)
    # The packages may not be installed; what imports them comes after this.
    sys.path[:0] = [str(ROOT / "packages" / package / "src") for package in PACKAGES]
    from gpu_report import PartResult, render, to_json

    started = time.monotonic()
    is_cuda = options.device == "cuda"
    num_gpus = options.num_gpus or (_count_gpus() if is_cuda else _NUM_CPU_RANKS)
    if num_gpus < 2 or (is_cuda and num_gpus > _count_gpus()):
        found = f", there are {_count_gpus()} GPUs" if is_cuda else ""
        print(
            f"run.py: it needs at least 2 ranks with a GPU each (got {num_gpus}{found}); --device cpu shows the script",
            file=sys.stderr,
        )
        return 2
    facts: dict[str, Any] = {
        "command": shlex.join([sys.executable, *sys.argv]),
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "num_gpus": num_gpus,
        "device": options.device,
        "budget_s": options.budget_s,
        "commit": _output_of(["git", "-C", str(ROOT), "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]),
        "links": _output_of(["nvidia-smi", "topo", "-m"]) if is_cuda else None,
    }
    results: list[PartResult] = []
    with tempfile.TemporaryDirectory(prefix="multi-gpu-") as name:
        folder = Path(name)
        for part in _chosen(make_parts(num_gpus=num_gpus, device=options.device, folder=folder), options.only):
            left_s = options.budget_s - (time.monotonic() - started)
            if part.missing is not None:
                result = PartResult(part=part, status="not there", reason=part.missing)
            elif left_s < _LEAST_TIME_S:
                result = PartResult(part=part, status="left out", reason=f"{left_s:.0f} s of the budget were left")
            else:
                print(f"[{time.monotonic() - started:4.0f} s] {part.name}", file=sys.stderr, flush=True)
                result = run_part(part, folder, limit_s=min(part.limit_s, left_s))
            results.append(result)
            facts["seconds"] = round(time.monotonic() - started, 1)
            if options.json is not None:
                _write_whole(options.json, to_json(results, facts))
    where = f"one each on {_device_name(results) or 'a GPU'}" if is_cuda else "on a CPU: the rates say nothing"
    head = f"{num_gpus} ranks, {where}; {facts['seconds']:.0f} s"
    print(render(results, head=head))
    return int(any(result.status in ("failed", "too long") for result in results))


def run_part(part: Part, folder: Path, *, limit_s: float) -> PartResult:
    """Run one part, end it with all its children when its time is over, and read what it left.

    Args:
        part: The part.
        folder: Where its output goes.
        limit_s: Seconds that it may take.
    """
    from gpu_report import PartResult, outcome_counts, parse_lines, tail_of

    started = time.monotonic()
    paths = [folder / f"{part.name.replace(' ', '-')}.{stream}" for stream in ("out", "err")]
    with paths[0].open("wb") as out, paths[1].open("wb") as err:
        # A session of its own, so that a signal reaches all that it started.
        process = subprocess.Popen(
            part.command,
            cwd=ROOT,
            env=part_environment(os.environ),
            stdin=subprocess.DEVNULL,
            stdout=out,
            stderr=err,
            start_new_session=True,
        )
        try:
            code: int | None = process.wait(limit_s)
        except subprocess.TimeoutExpired:
            code = None
        finally:
            _end_session(process)
    texts = [path.read_text(encoding="utf-8", errors="replace") for path in paths]
    lines_path = part.lines_path
    lines = texts[0] if lines_path is None else lines_path.read_text() if lines_path.exists() else ""
    result = PartResult(part=part, status="ok", seconds=time.monotonic() - started, records=parse_lines(lines))
    if code is None:
        result.status, result.reason = "too long", f"ended after {limit_s:.0f} s"
    elif code != 0:
        result.status, result.reason = "failed", f"exit status {code}"
        if part.kind == "tests" and code == _NO_TESTS:
            result.status, result.reason = "not there", "it has no GPU tests"
    elif part.kind == "tests" and outcome_counts(result.records)["passed"] == 0:
        # As bad as no tests, and not to be taken for a success.
        result.status, result.reason = "not there", "all of its GPU tests were skipped"
    if result.status in ("failed", "too long"):
        result.tail = tail_of(*texts)
    return result


def _end_session(process: subprocess.Popen[bytes]) -> None:
    """End what is left of a part: gently first, so that a launcher can end its ranks and servers."""
    for number in (signal.SIGTERM, signal.SIGKILL):
        try:
            os.killpg(process.pid, number)
        except ProcessLookupError:
            return
        try:
            process.wait(_GRACE_S)
        except subprocess.TimeoutExpired:
            continue


def _chosen(parts: Sequence[Part], names: Sequence[str]) -> list[Part]:
    unknown = set(names) - {part.name for part in parts}
    if unknown:
        raise SystemExit(
            f"run.py: --only must name parts (got {', '.join(sorted(unknown))} of "
            f"{', '.join(part.name for part in parts)})"
        )
    return [part for part in parts if not names or part.name in names]


@functools.cache
def _count_gpus() -> int:
    """GPUs, counted in a process of its own: this one opens none."""
    output = _output_of([sys.executable, "-c", "import torch; print(torch.cuda.device_count())"])
    return int(output) if output is not None and output.isdecimal() else 0


def _device_name(results: Sequence[PartResult]) -> str | None:
    names = [record["device"] for result in results if result.part.kind == "ep" for record in result.records]
    return names[0] if names else None


def _output_of(command: Sequence[str]) -> str | None:
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()


def _write_whole(path: Path, text: str) -> None:
    """Replace a file at once, so that a reader never meets half of it."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    temporary.write_text(text + "\n", encoding="utf-8")
    os.replace(temporary, path)


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="run.py", description=(__doc__ or "").split("\n", maxsplit=1)[0])
    parser.add_argument("--num-gpus", type=int, metavar="N", help="(default: all)")
    parser.add_argument(
        "--budget-s", type=float, default=_DEFAULT_BUDGET_S, metavar="S", help="start no part after it (default: 440)"
    )
    parser.add_argument("--json", type=Path, metavar="PATH", help="write all results there")
    parser.add_argument(
        "--only", type=lambda text: text.split(","), default=[], metavar="NAMES", help="parts to run, by their names"
    )
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda", help="cpu: small, to try the script")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    # The part that runs has a session of its own, and must not outlive this process.
    signal.signal(signal.SIGTERM, lambda number, _: sys.exit(128 + number))
    sys.exit(main())
