from __future__ import annotations

import importlib.util
import os
import sys
from pathlib import Path
from types import ModuleType

import pytest

from deep_ep_core.jit import JitOptions
from deep_ep_core.jit.compiler import NvccCompiler, NvrtcCompiler
from deep_ep_core.jit.toolchain import find_nvcc, find_nvrtc, find_toolkit_headers

# Every warning of nvcc is an error, and the host compiler reads the headers too.
_STRICT_FLAGS = "-Werror all-warnings -Xcompiler -Wall,-Wextra,-Werror"


@pytest.fixture(scope="session")
def kernels() -> ModuleType:
    """The module of test kernels beside this file, which GPU scripts import by name."""
    path = Path(__file__).with_name("device_kernels.py")
    spec = importlib.util.spec_from_file_location("device_kernels", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["device_kernels"] = module
    spec.loader.exec_module(module)
    return module


@pytest.fixture(params=["nvcc", "nvrtc"])
def compiler(request: pytest.FixtureRequest, tmp_path: Path) -> NvccCompiler | NvrtcCompiler:
    """Each of the two compilers in turn, where it is there."""
    options = JitOptions(cache_dir=tmp_path)
    if request.param == "nvrtc":
        nvrtc = find_nvrtc()
        if isinstance(nvrtc, str):
            pytest.skip(f"no NVRTC: {nvrtc}")
        return NvrtcCompiler(nvrtc, find_toolkit_headers(options), options)
    nvcc = find_nvcc(options)
    if nvcc is None:
        pytest.skip("no nvcc was found")
    flags = f"{os.environ.get('NVCC_APPEND_FLAGS', '')} {_STRICT_FLAGS}"
    return NvccCompiler(nvcc, options, None, {**os.environ, "NVCC_APPEND_FLAGS": flags})
