"""Imports the modules that are named on the command line and prints, as JSON, what work they did on the way.

Run by itself, in a fresh process: what is imported cannot be unimported, and an audit hook stays.
"""

from __future__ import annotations

import contextlib
import importlib
import io
import json
import os
import sys
import threading
import warnings
from collections.abc import Callable
from typing import Any
from unittest import mock

# Events of `sys.audit` that mean work. Files that are opened to be written are looked for by their mode.
_WORK_EVENTS = (
    "ctypes.dlopen",
    "os.exec",
    "os.fork",
    "os.mkdir",
    "os.putenv",
    "os.remove",
    "os.rename",
    "os.system",
    "os.posix_spawn",
    "shutil.rmtree",
    "socket.__new__",
    "socket.connect",
    "subprocess.Popen",
    "tempfile.mkdtemp",
    "tempfile.mkstemp",
)
_OWN_PREFIX = "deep_ep_"


def _own_caller() -> str | None:
    """The module of ours whose code runs now, or None; what the import system does on the way is not its work."""
    frame = sys._getframe(2)
    while frame is not None:
        name = frame.f_globals.get("__name__", "")
        if name.startswith("importlib."):
            return None
        if name.startswith(_OWN_PREFIX):
            return name
        frame = frame.f_back
    return None


def _report_to(work: list[str]) -> Callable[[str], None]:
    def report(what: str) -> None:
        if (module := _own_caller()) is not None:
            work.append(f"{module}: {what}")

    return report


class _WatchedEnvironment(dict):  # type: ignore[type-arg]
    """The environment, which notes who reads and writes it."""

    def __init__(self, report: Callable[[str], None]) -> None:
        super().__init__(os.environ)
        self._report = report

    def __getitem__(self, name: str) -> str:
        self._report(f"reads {name}")
        return super().__getitem__(name)

    def get(self, name: str, default: Any = None) -> Any:
        self._report(f"reads {name}")
        return super().get(name, default)

    def __contains__(self, name: object) -> bool:
        self._report(f"reads {name}")
        return super().__contains__(name)

    def __setitem__(self, name: str, value: str) -> None:
        self._report(f"writes {name}")
        super().__setitem__(name, value)

    def setdefault(self, name: str, default: Any = None) -> Any:
        self._report(f"writes {name}")
        return super().setdefault(name, default)


def _import_others() -> None:
    """All that the packages may import, so that none of it is imported while we watch."""
    import platformdirs  # noqa: F401
    import pynvml  # noqa: F401
    import torch.distributed as dist
    import torch.library  # noqa: F401

    dist.is_available()


def import_and_watch(module_names: list[str]) -> list[str]:
    """Import the modules; returns what they did."""
    import torch

    work: list[str] = []
    report = _report_to(work)

    def audit(event: str, arguments: tuple[Any, ...]) -> None:
        is_written = event == "open" and isinstance(arguments[1], str) and set(arguments[1]) & set("wxa+")
        if event in _WORK_EVENTS or is_written:
            report(f"{event} {arguments[0] if arguments else ''}")

    num_threads = threading.active_count()
    sys.addaudithook(audit)
    printed = io.StringIO()
    with contextlib.ExitStack() as stack:
        stack.enter_context(mock.patch.object(os, "environ", _WatchedEnvironment(report)))
        start = _noting(threading.Thread.start, report, "starts a thread")
        stack.enter_context(mock.patch.object(threading.Thread, "start", start))
        stack.enter_context(contextlib.redirect_stdout(printed))
        stack.enter_context(contextlib.redirect_stderr(printed))
        caught = stack.enter_context(warnings.catch_warnings(record=True))
        warnings.simplefilter("always")
        for name in module_names:
            importlib.import_module(name)
            if printed.getvalue():
                work.append(f"{name}: prints {printed.getvalue()!r}")
                printed.truncate(0)
            work += [f"{name}: warns {warning.message}" for warning in caught]
            caught.clear()
    if threading.active_count() > num_threads:
        work.append(f"all: starts {threading.active_count() - num_threads} threads that live on")
    if torch.cuda.is_initialized():
        work.append("all: initialises CUDA")
    if torch.distributed.is_initialized():
        work.append("all: initialises torch.distributed")
    return work


def _noting(function: Callable[..., Any], report: Callable[[str], None], what: str) -> Callable[..., Any]:
    def noted(*args: Any, **kwargs: Any) -> Any:
        report(what)
        return function(*args, **kwargs)

    return noted


if __name__ == "__main__":
    _import_others()
    names = sys.argv[1:]
    print(json.dumps({"modules": names, "work": import_and_watch(names)}))
