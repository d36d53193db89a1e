"""Many processes, or threads, that want one kernel at once; and one that dies in the middle of it."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from deep_ep_core.jit import Builder, CompiledKernel, JitOptions

WORKER = Path(__file__).with_name("race_worker.py")
NEVER_S = 3600.0
DEADLINE_S = 120.0

Start = Callable[[float], "subprocess.Popen[str]"]


@pytest.fixture
def calls_path(tmp_path: Path) -> Path:
    return tmp_path / "calls"


@pytest.fixture
def start(tmp_path: Path, calls_path: Path) -> Iterator[Start]:
    """Starts workers that are ready to build; all are gone when the test ends."""
    workers: list[subprocess.Popen[str]] = []

    def run(compile_s: float) -> subprocess.Popen[str]:
        command = [sys.executable, str(WORKER), str(tmp_path / "cache"), str(calls_path), str(compile_s)]
        worker = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        workers.append(worker)
        return worker

    yield run
    for worker in workers:
        worker.kill()
        worker.communicate()


def wait_until_ready(worker: subprocess.Popen[str]) -> None:
    assert worker.stdout is not None
    assert worker.stdout.readline() == "ready\n"


def go(worker: subprocess.Popen[str]) -> None:
    assert worker.stdin is not None
    worker.stdin.write("go\n")
    worker.stdin.flush()


def wait_for_calls(path: Path, num_calls: int) -> None:
    deadline = time.monotonic() + DEADLINE_S
    while not path.exists() or len(path.read_text().splitlines()) < num_calls:
        assert time.monotonic() < deadline, f"no {num_calls} compilations within {DEADLINE_S} s"
        time.sleep(0.01)


def test_eight_processes_compile_once_and_get_the_same_cubin(start: Start, calls_path: Path) -> None:
    workers = [start(1.0) for _ in range(8)]
    for worker in workers:
        wait_until_ready(worker)
    for worker in workers:
        go(worker)
    answers = [worker.communicate(timeout=DEADLINE_S)[0] for worker in workers]
    assert [worker.returncode for worker in workers] == [0] * 8
    assert len(set(answers)) == 1
    assert len(calls_path.read_text().splitlines()) == 1


def test_killed_holder_leaves_nothing_half_installed_and_the_next_builds(
    start: Start, calls_path: Path, tmp_path: Path
) -> None:
    holder, waiter = start(NEVER_S), start(0.0)
    for worker in (holder, waiter):
        wait_until_ready(worker)
    go(holder)
    wait_for_calls(calls_path, 1)
    go(waiter)
    holder.kill()
    holder.wait(timeout=DEADLINE_S)
    answer = waiter.communicate(timeout=DEADLINE_S)[0]
    assert waiter.returncode == 0
    name, digest = answer.split()
    assert len(calls_path.read_text().splitlines()) == 2
    assert os.listdir(tmp_path / "cache" / "cache") == [name]
    assert os.listdir(tmp_path / "cache" / "tmp") == []
    late = start(0.0)
    wait_until_ready(late)
    go(late)
    assert late.communicate(timeout=DEADLINE_S)[0].split() == [name, digest]
    assert len(calls_path.read_text().splitlines()) == 2


def test_eight_threads_compile_once(options: JitOptions, toy: ModuleType, make_compiler: Any) -> None:
    compiler = make_compiler()
    builder = Builder(options, compiler=compiler)
    barrier = threading.Barrier(8)
    kernels: list[CompiledKernel] = []

    def run() -> None:
        barrier.wait()
        kernels.append(builder.build(toy.scale_spec(), "sm_90a"))

    threads = [threading.Thread(target=run) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert compiler.num_calls == 1
    assert len(kernels) == 8
    assert all(kernel is kernels[0] for kernel in kernels)
