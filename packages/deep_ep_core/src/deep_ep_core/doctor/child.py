"""Owns the running of a module in a process of its own that may crash or hang without harm to this one."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import IO, Any

__all__ = ["ChildOutcome", "run_child"]

# A process that waits inside the driver ends only when the driver lets it.
_KILL_WAIT_S = 5.0
_NUM_LOG_LINES = 3


@dataclass(frozen=True, slots=True, kw_only=True)
class ChildOutcome:
    """What became of a child.

    Attributes:
        records: The JSON objects that it printed, one a line, up to where it ended.
        failure: How it ended, if not well, with the last lines of its error output; else an empty string.
    """

    records: tuple[dict[str, Any], ...]
    failure: str


def run_child(
    module: str, arguments: Sequence[str], *, timeout_s: float, environ: Mapping[str, str] | None = None
) -> ChildOutcome:
    """Run `python -m module` and collect what it prints. It and all that it started are ended at the deadline.

    Args:
        module: The module, which prints one JSON object a line.
        arguments: Its command line.
        timeout_s: Deadline.
        environ: Its environment, or None for that of this process.

    Raises:
        OSError: It does not start.
    """
    # Files, not pipes: what a child that cannot be killed holds open must not be waited for.
    with tempfile.TemporaryFile() as output, tempfile.TemporaryFile() as log:
        process = subprocess.Popen(
            [sys.executable, "-m", module, *arguments],
            env=environ,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=log,
            start_new_session=True,
        )
        try:
            status: int | None = process.wait(timeout=timeout_s)
        except subprocess.TimeoutExpired:
            status = None
        finally:
            if process.poll() is None:
                _end_group(process)
        failure = ""
        if status != 0:
            last_lines = [line for line in _read(log).splitlines() if line.strip()][-_NUM_LOG_LINES:]
            said = f"; it said: {' / '.join(line.strip() for line in last_lines)}" if last_lines else ""
            failure = _describe(status, timeout_s) + said
        return ChildOutcome(records=tuple(_records(_read(output))), failure=failure)


def _end_group(process: subprocess.Popen[bytes]) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(timeout=_KILL_WAIT_S)


def _describe(status: int | None, timeout_s: float) -> str:
    if status is None:
        return f"it was not done within {timeout_s:g} s and was ended"
    if status >= 0:
        return f"it ended with exit status {status}"
    with contextlib.suppress(ValueError):
        return f"it was ended by {signal.Signals(-status).name}"
    return f"it was ended by signal {-status}"


def _read(file: IO[bytes]) -> str:
    file.seek(0)
    return file.read().decode(errors="replace")


def _records(text: str) -> list[dict[str, Any]]:
    records = []
    for line in text.splitlines():
        # The last line of a child that was ended may be cut.
        with contextlib.suppress(ValueError):
            record = json.loads(line)
            if isinstance(record, dict):
                records.append(record)
    return records
