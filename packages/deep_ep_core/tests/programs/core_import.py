"""Imports every module of a package, except `__main__`, and prints as JSON what that did besides.

Usage: core_import.py PACKAGE. Torch is imported before. Run it with -B, since a cache of byte code is a file too.
"""

import importlib
import importlib.util
import json
import os
import pkgutil
import sys
import threading
from collections.abc import Iterator, MutableMapping
from pathlib import Path

import torch
import torch.distributed

# What an import must leave to the first call that needs it, as the interpreter reports it.
WORK_EVENTS = {
    "ctypes.dlopen",
    "os.exec",
    "os.fork",
    "os.forkpty",
    "os.link",
    "os.mkdir",
    "os.posix_spawn",
    "os.putenv",
    "os.remove",
    "os.rename",
    "os.symlink",
    "os.system",
    "os.unsetenv",
    "socket.bind",
    "socket.connect",
    "subprocess.Popen",
}


class RecordingEnvironment(MutableMapping):
    """The environment, and the names that were asked for; `*` if they were listed."""

    def __init__(self, environ: MutableMapping[str, str]) -> None:
        self._environ = environ
        self.names_read: set[str] = set()

    def __getitem__(self, name: str) -> str:
        self.names_read.add(name)
        return self._environ[name]

    def __setitem__(self, name: str, value: str) -> None:
        self._environ[name] = value

    def __delitem__(self, name: str) -> None:
        del self._environ[name]

    def __iter__(self) -> Iterator[str]:
        self.names_read.add("*")
        return iter(self._environ)

    def __len__(self) -> int:
        return len(self._environ)


def module_names(package: str) -> Iterator[str]:
    """Found without importing, which `pkgutil.walk_packages` does: no import may happen before the watch begins."""

    def walk(folder: Path, prefix: str) -> Iterator[str]:
        for module in pkgutil.iter_modules([str(folder)], prefix):
            if not module.name.endswith(".__main__"):
                yield module.name
            if module.ispkg:
                yield from walk(folder / module.name.rpartition(".")[2], f"{module.name}.")

    spec = importlib.util.find_spec(package)
    assert spec is not None
    assert spec.origin is not None
    yield package
    yield from walk(Path(spec.origin).parent, f"{package}.")


def count_threads() -> int:
    """Threads of the process, those of other languages too."""
    return len(os.listdir("/proc/self/task"))


def main(package: str) -> None:
    names = list(module_names(package))
    work: list[str] = []

    def watch(event: str, args: tuple[object, ...]) -> None:
        if event in WORK_EVENTS:
            work.append(f"{event} {args[:1]}")
        elif event == "open" and args[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT):
            work.append(f"open to write {args[0]}")

    start_thread = threading.Thread.start

    def start_watched(thread: threading.Thread) -> None:
        # Not every Python reports threads as events.
        work.append(f"start of a thread {thread.name}")
        start_thread(thread)

    threading.Thread.start = start_watched
    environ = os.environ = RecordingEnvironment(os.environ)
    num_threads = count_threads()
    sys.addaudithook(watch)
    for name in names:
        importlib.import_module(name)
    facts = {
        "modules": names,
        "work": list(work),
        "num_new_threads": count_threads() - num_threads,
        "variables": sorted(map(str, environ.names_read)),
        "has_cuda_context": torch.cuda.is_initialized(),
    }
    print(json.dumps(facts))


if __name__ == "__main__":
    main(sys.argv[1])
