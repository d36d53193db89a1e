"""The wrapper of GIN and its test kernel compile with both forms of NCCL, any choice of backends, both targets."""

from __future__ import annotations

import itertools
import os
import re
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from deep_ep_core.jit import CompileJob, JitOptions, mirror_source, package_include_dir
from deep_ep_core.jit.compiler import NvccCompiler
from deep_ep_core.jit.toolchain import NcclHeaders, find_nvcc
from deep_ep_core.loopback.build import SOURCE_DIR, find_compiler

# Those that every NCCL has; newer ones have more.
BACKENDS = ("PROXY", "GDAKI", "GPI")
# `sizeof(ncclDevComm)` by NCCL's version.
DEV_COMM_BYTES = {"2.30.7": 240, "2.32.3": 248}

pytestmark = pytest.mark.timeout(300)


def compiler_for(nccl: Any, tmp_path: Path, extra_flags: str = "") -> NvccCompiler:
    options = JitOptions(cache_dir=tmp_path)
    nvcc = find_nvcc(options)
    if nvcc is None:
        pytest.skip("no nvcc was found")
    version = tuple(map(int, nccl.version.split(".")))
    headers = NcclHeaders(include_dir=nccl.include_dir, version=version, digest="", found_via="a test")
    flags = f"{os.environ.get('NVCC_APPEND_FLAGS', '')} -Werror all-warnings {extra_flags}"
    return NvccCompiler(nvcc, options, headers, {**os.environ, "NVCC_APPEND_FLAGS": flags})


def compile_ring(gin_kernels: ModuleType, compiler: NvccCompiler, arch: str, version: str) -> str:
    """Compile the kernel, and hold the mirror of its parameters against them; returns what is wrong."""
    params_type = gin_kernels.ring_params_type(DEV_COMM_BYTES[version])
    source = gin_kernels.ring_spec(params_type).source() + mirror_source(gin_kernels.HEADER, [params_type])
    job = CompileJob(source=source, arch=arch, include_dirs=gin_kernels.INCLUDE_DIRS, needs_nccl=True)
    output = compiler.compile(job)
    return f"{output.failure}\n{output.log}" if output.failure else ""


@pytest.mark.parametrize("arch", ["sm_90a", "sm_100a"])
def test_kernel_compiles_without_warnings(
    gin_kernels: ModuleType, nccl_headers: Any, tmp_path: Path, arch: str
) -> None:
    compiler = compiler_for(nccl_headers, tmp_path)
    assert compile_ring(gin_kernels, compiler, arch, nccl_headers.version) == ""


def backend_macros(include_dir: Path) -> list[str]:
    """The backends that these headers let one leave out, by the names in their macros."""
    text = (include_dir / "nccl_device" / "gin" / "gin_device_common.h").read_text()
    return re.findall(r"^#ifndef NCCL_GIN_(\w+)_ENABLE$", text, re.MULTILINE)


def test_kernel_compiles_for_every_choice_of_backends(
    gin_kernels: ModuleType, nccl_headers: Any, tmp_path: Path
) -> None:
    """A use of one backend's own structs would show where that backend is left out."""
    backends = backend_macros(nccl_headers.include_dir)
    assert set(BACKENDS) <= set(backends)
    choices = [each for each in itertools.product((0, 1), repeat=len(backends)) if any(each) and not all(each)]

    def compile_for(choice: tuple[int, ...]) -> str:
        flags = [f"-DNCCL_GIN_{name}_ENABLE={is_on}" for name, is_on in zip(backends, choice, strict=True)]
        compiler = compiler_for(nccl_headers, tmp_path, " ".join(flags))
        return compile_ring(gin_kernels, compiler, "sm_90a", nccl_headers.version)

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        problems = dict(zip(choices, pool.map(compile_for, choices), strict=True))
    assert problems == dict.fromkeys(choices, ""), backends


def test_nothing_private_of_nccl_is_used(gin_kernels: ModuleType) -> None:
    """Names with an underscore in front, and headers and types of one backend, are NCCL's own."""
    headers = sorted((package_include_dir("deep_ep_core") / "deep_ep_core" / "comm").glob("gin*.cuh"))
    assert headers
    for path in [*headers, gin_kernels.INCLUDE_DIRS[1] / gin_kernels.HEADER]:
        code = "\n".join(line.split("//")[0] for line in path.read_text().splitlines())
        assert not re.search(r"[.>]_\w|gdaki|gpi|proxy|doca|nccl_device/", code, re.IGNORECASE), path


def test_abi_agrees_with_the_public_headers(nccl_headers: Any, tmp_path: Path) -> None:
    """Codes come from nccl.h and the kind of device from net_device.h; sizes and places are what the C ABI makes of
    the order of NCCL's fields, of which there are 21 functions in version 14, and 22 in version 16."""
    source = tmp_path / "abi.c"
    source.write_text(
        """
#include <nccl.h>
#include <nccl_device/net_device.h>
#include "nccl_abi.h"
_Static_assert((int)kNcclSuccess == (int)ncclSuccess, "");
_Static_assert((int)kNcclUnhandledCudaError == (int)ncclUnhandledCudaError, "");
_Static_assert((int)kNcclSystemError == (int)ncclSystemError, "");
_Static_assert((int)kNcclInternalError == (int)ncclInternalError, "");
_Static_assert((int)kNcclInvalidArgument == (int)ncclInvalidArgument, "");
_Static_assert((int)kNcclInvalidUsage == (int)ncclInvalidUsage, "");
_Static_assert((int)kNcclRemoteError == (int)ncclRemoteError, "");
_Static_assert(sizeof(NcclResult) == sizeof(ncclResult_t), "");
_Static_assert((int)kNcclDeviceGinProxy == (int)NCCL_NET_DEVICE_GIN_PROXY, "");
_Static_assert(sizeof(NcclNetProperties) == 128, "");
_Static_assert(offsetof(NcclNetProperties, device_type) == 56, "");
_Static_assert(offsetof(NcclNetProperties, max_p2p_bytes) == 104, "");
_Static_assert(offsetof(NcclNetProperties, plane_id) == 126, "");
_Static_assert(sizeof(NcclRmaPluginV14) == 21 * sizeof(void*), "");
_Static_assert(offsetof(NcclRmaPluginV14, put) == 13 * sizeof(void*), "");
_Static_assert(offsetof(NcclRmaPluginV14, progress) == 18 * sizeof(void*), "");
_Static_assert(sizeof(NcclRmaPluginV16) == 22 * sizeof(void*), "");
_Static_assert(offsetof(NcclRmaPluginV16, get_rma_properties) == 3 * sizeof(void*), "");
_Static_assert(offsetof(NcclRmaPluginV16, put) == 14 * sizeof(void*), "");
"""
    )
    (tmp_path / "cuda_runtime.h").write_text("#include <stddef.h>\ntypedef void *cudaStream_t, *cudaEvent_t;\n")
    (tmp_path / "cuda_fp16.h").write_text("\n")
    include_dirs = [f"-I{folder}" for folder in (tmp_path, SOURCE_DIR, nccl_headers.include_dir)]
    command = [find_compiler(), "-std=gnu11", "-fsyntax-only", *include_dirs, str(source)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
