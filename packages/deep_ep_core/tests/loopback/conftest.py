from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType

import pytest

from deep_ep_core.env import reset_env
from deep_ep_core.loopback.build import COMPILER_FLAGS, SOURCE_DIR, find_compiler

HERE = Path(__file__).resolve().parent
_STRICT = ("-Wall", "-Wextra", "-Werror", "-g")
_SANITIZERS = ("-fsanitize=address,undefined", "-fno-omit-frame-pointer")


def _load(path: Path, name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


# The headers of each NCCL, in the cache that the tests of core's NCCL runtime fill too.
_nccl_fixtures = _load(HERE.parent / "nccl" / "conftest.py", "nccl_header_fixtures")
get_wheel = _nccl_fixtures.get_wheel
nccl_headers = _nccl_fixtures.nccl_headers

RunDriver = Callable[..., "subprocess.CompletedProcess[str]"]


def _build(folder: Path, *extra_flags: str) -> Path:
    """The plugin, the driver and the stand-in for CUDA, all with warnings as errors."""
    plugin_flags = [*COMPILER_FLAGS, *_STRICT, *extra_flags]
    other_flags = ["-std=gnu11", "-O1", *_STRICT, *extra_flags]
    plugin_sources = sorted(map(str, SOURCE_DIR.glob("*.c")))
    driver_sources = (HERE / "driver.c", HERE / "scenarios.c")
    commands = [
        [*plugin_flags, *plugin_sources, "-o", str(folder / "plugin.so"), "-ldl"],
        [*other_flags, "-shared", "-fPIC", str(HERE / "fake_cuda.c"), "-o", str(folder / "libcuda.so.1")],
        [*other_flags, "-I", str(SOURCE_DIR), *map(str, driver_sources), "-o", str(folder / "driver"), "-ldl"],
    ]
    for command in commands:
        done = subprocess.run([find_compiler(), *command], capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
    return folder


@pytest.fixture(scope="session")
def gin_kernels() -> ModuleType:
    """The module of the test kernel beside this file, which GPU scripts import by name."""
    return _load(HERE / "gin_kernels.py", "gin_kernels")


@pytest.fixture(scope="session")
def plain_build(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Binaries built with the flags that users get."""
    return _build(tmp_path_factory.mktemp("loopback"))


@pytest.fixture(scope="session")
def sanitized_build(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Binaries that find wrong memory accesses, leaks and undefined behaviour."""
    return _build(tmp_path_factory.mktemp("loopback_sanitized"), *_SANITIZERS)


@pytest.fixture
def run_driver(plain_build: Path) -> RunDriver:
    """Runs a scenario of the driver and fails with its output unless it ends well."""

    def run(
        scenario: str,
        *,
        num_ranks: int = 2,
        seed: int = 1,
        num_rounds: int = 1,
        kind: str = "host",
        window_bytes: int = 1 << 16,
        build: Path = plain_build,
        **variables: object,
    ) -> subprocess.CompletedProcess[str]:
        environment = {name: text for name, text in os.environ.items() if not name.startswith("EP_LOOPBACK_")}
        environment.update({name: str(value) for name, value in variables.items()})
        if kind == "cuda":
            environment["LD_LIBRARY_PATH"] = str(build)
        arguments = [scenario, num_ranks, seed, num_rounds, kind, window_bytes]
        done = subprocess.run(
            [str(build / "driver"), str(build / "plugin.so"), *map(str, arguments)],
            env=environment,
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, done.stderr
        return done

    return run


@pytest.fixture
def fresh_env(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[pytest.MonkeyPatch]:
    """A process without settings of its own; changes are seen after the next `reset_env`."""
    for name in [name for name in os.environ if name.startswith(("EP_", "NCCL_"))]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("EP_JIT_CACHE_DIR", str(tmp_path / "cache"))
    reset_env()
    yield monkeypatch
    reset_env()
