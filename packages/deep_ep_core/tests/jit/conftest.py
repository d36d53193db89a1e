from __future__ import annotations

import dataclasses
import importlib.util
import os
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest

from deep_ep_core.env import get_env
from deep_ep_core.jit.compiler import CompileJob, CompileOutput, NvccCompiler, NvrtcCompiler
from deep_ep_core.jit.options import JitOptions
from deep_ep_core.jit.toolchain import Nvcc, find_nccl_headers, find_nvcc, find_nvrtc, find_toolkit_headers


@pytest.fixture(scope="session")
def toy() -> ModuleType:
    """The module of toy kernels beside this file, which GPU scripts import by name."""
    path = Path(__file__).with_name("toy_kernels.py")
    spec = importlib.util.spec_from_file_location("toy_kernels", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["toy_kernels"] = module
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def options(tmp_path: Path) -> JitOptions:
    return JitOptions(cache_dir=tmp_path / "jit")


class FakeCompiler:
    """Turns a source into bytes without any tool, and counts how often it is asked."""

    def __init__(self, *, identity: str = "fake 1.0", flags: tuple[str, ...] = (), log: str = "", failure: str = ""):
        self.identity = identity
        self.flags = flags
        self.log = log
        self.failure = failure
        self.num_calls = 0

    def key_flags(self, job: CompileJob) -> tuple[str, ...]:
        return self.flags

    def compile(self, job: CompileJob) -> CompileOutput:
        self.num_calls += 1
        cubin = None if self.failure else f"{job.arch} {job.source}".encode()
        ptx = "ptx" if job.with_ptx else None
        return CompileOutput(cubin=cubin, log=self.log, command="fake --compile", failure=self.failure, ptx=ptx)


@pytest.fixture
def fake_compiler() -> FakeCompiler:
    return FakeCompiler()


@pytest.fixture
def make_compiler() -> type[FakeCompiler]:
    return FakeCompiler


@pytest.fixture(scope="session")
def nvcc() -> Nvcc:
    found = find_nvcc(JitOptions(cache_dir=Path("unused")))
    if found is None:
        pytest.skip("no nvcc was found")
    return found


MakeNvcc = Callable[..., NvccCompiler]


@pytest.fixture
def make_nvcc(nvcc: Nvcc) -> MakeNvcc:
    def make(options: JitOptions, environ: dict[str, str] | None = None) -> NvccCompiler:
        return NvccCompiler(nvcc, options, None, dict(os.environ) if environ is None else environ)

    return make


@pytest.fixture(params=["nvcc", "nvrtc"])
def real_compiler(request: pytest.FixtureRequest, options: JitOptions) -> NvccCompiler | NvrtcCompiler:
    """Each of the two compilers in turn, where it is there."""
    if request.param == "nvcc":
        found: Nvcc = request.getfixturevalue("nvcc")
        return NvccCompiler(found, options, None, os.environ)
    nvrtc = find_nvrtc()
    if isinstance(nvrtc, str):
        pytest.skip(f"no NVRTC: {nvrtc}")
    return NvrtcCompiler(nvrtc, find_toolkit_headers(options), options)


@pytest.fixture
def nccl_options(nvcc: Nvcc, options: JitOptions) -> JitOptions:
    """Options under which NCCL's device headers are found."""
    found = dataclasses.replace(options, nccl_root_dir=get_env().nccl_root_dir)
    if find_nccl_headers(found) is None:
        pytest.skip("no NCCL device headers were found")
    return found
