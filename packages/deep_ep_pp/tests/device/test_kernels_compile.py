"""The kernels for the network compile without a GPU: each header stands alone, and mirrors agree."""

from __future__ import annotations

import dataclasses
import os
from pathlib import Path

import pytest

from deep_ep_core.env import get_env
from deep_ep_core.jit import CompileJob, KernelSpec, mirror_source, package_include_dir
from deep_ep_core.jit.compiler import NvccCompiler
from deep_ep_core.jit.options import JitOptions
from deep_ep_core.jit.resources import parse_usage
from deep_ep_core.jit.toolchain import NcclHeaders, find_nccl_headers, find_nvcc
from deep_ep_pp.device.network import drain_spec, put_and_signal_spec

INCLUDE_DIRS = (package_include_dir("deep_ep_core"), package_include_dir("deep_ep_pp"))
HEADERS = sorted(path.relative_to(INCLUDE_DIRS[1]).as_posix() for path in INCLUDE_DIRS[1].rglob("*.cuh"))
ARCHS = ("sm_90a", "sm_100a")
# `sizeof(ncclDevComm)` before NCCL 2.31 and since then.
OLD_DEV_COMM_BYTES, NEW_DEV_COMM_BYTES = 240, 248
_STRICT_FLAGS = "-Werror all-warnings"

pytestmark = pytest.mark.timeout(300)


@pytest.fixture
def nccl() -> NcclHeaders:
    """NCCL's headers, where they are there."""
    found = find_nccl_headers(JitOptions.from_env(get_env()))
    if found is None:
        pytest.skip("no NCCL headers were found")
    return found


@pytest.fixture
def compiler(nccl: NcclHeaders, tmp_path: Path) -> NvccCompiler:
    """nvcc, where it is there."""
    options = dataclasses.replace(JitOptions.from_env(get_env()), cache_dir=tmp_path)
    nvcc = find_nvcc(options)
    if nvcc is None:
        pytest.skip("no nvcc was found")
    flags = f"{os.environ.get('NVCC_APPEND_FLAGS', '')} {_STRICT_FLAGS}"
    return NvccCompiler(nvcc, options, nccl, {**os.environ, "NVCC_APPEND_FLAGS": flags})


def specs_for(nccl: NcclHeaders) -> list[KernelSpec]:
    dev_comm_bytes = OLD_DEV_COMM_BYTES if nccl.version < (2, 31) else NEW_DEV_COMM_BYTES
    return [put_and_signal_spec(dev_comm_bytes), drain_spec(dev_comm_bytes)]


@pytest.mark.parametrize("arch", ARCHS)
def test_headers_compile_alone_without_warnings(compiler: NvccCompiler, arch: str) -> None:
    for header in HEADERS:
        job = CompileJob(source=f"#include <{header}>\n", arch=arch, include_dirs=INCLUDE_DIRS, needs_nccl=True)
        output = compiler.compile(job)
        assert output.failure == "", output.log


@pytest.mark.parametrize("arch", ARCHS)
def test_kernels_compile_without_warnings_and_agree_with_their_mirrors(
    compiler: NvccCompiler, nccl: NcclHeaders, arch: str
) -> None:
    for spec in specs_for(nccl):
        source = spec.source() + mirror_source(spec.header, [spec.params_type])
        output = compiler.compile(CompileJob(source=source, arch=arch, include_dirs=INCLUDE_DIRS, needs_nccl=True))
        assert output.failure == "", output.log
        usage = parse_usage(output.log, spec.entry_name)
        assert usage is not None
        print(f"{arch} {spec.label}: {usage}")
