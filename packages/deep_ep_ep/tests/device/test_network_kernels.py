"""The kernels across nodes: headers stand alone, variants compile without local memory, mirrors agree with structs."""

from __future__ import annotations

import os
import re
from pathlib import Path

import pytest
import torch

from deep_ep_core.jit import CompileJob, Compiler, JitOptions, KernelSpec, mirror_source
from deep_ep_core.jit.compiler import NvccCompiler, NvrtcCompiler
from deep_ep_core.jit.resources import parse_usage
from deep_ep_core.jit.toolchain import NcclHeaders, find_nccl_headers, find_nvcc, find_nvrtc, find_toolkit_headers
from deep_ep_ep.device.network import combine_kernels, dispatch_kernels, params

FOLDER = params.INCLUDE_DIRS[0] / "deep_ep_ep" / "network"
HEADERS = sorted(path.name for path in FOLDER.glob("*.cuh"))
ARCHS = ("sm_90a", "sm_100a")
# `sizeof(ncclDevComm)` by NCCL's version.
DEV_COMM_BYTES = {(2, 30, 7): 240, (2, 32, 3): 248}
_STRICT_FLAGS = "-Werror all-warnings -Xcompiler -Wall,-Wextra,-Werror"
# What NCCL's own code in a put takes of the stack: a request that it passes by address.
_MAX_STACK_BYTES = 16

pytestmark = pytest.mark.timeout(300)


def specs_of(dev_comm_bytes: int) -> list[KernelSpec]:
    """Every kernel across nodes, in each of its variants."""
    found = [params.exchange_spec(dev_comm_bytes), params.drain_spec(dev_comm_bytes)]
    for is_idx64 in (True, False):
        found += dispatch_kernels.all_dispatch_specs(dev_comm_bytes, is_idx64=is_idx64)
    for dtype in (torch.bfloat16, torch.float16, torch.float32, torch.float64):
        for idx_dtype in (torch.int64, torch.int32):
            found += combine_kernels.all_combine_specs(dev_comm_bytes, dtype=dtype, idx_dtype=idx_dtype)
    return list(dict.fromkeys(found))


LABELS = sorted({spec.label for spec in specs_of(240)})


@pytest.fixture(scope="module")
def nccl() -> NcclHeaders:
    root = os.environ.get("EP_NCCL_ROOT_DIR")
    headers = find_nccl_headers(JitOptions(cache_dir=Path(), nccl_root_dir=Path(root) if root else None))
    if headers is None or headers.version not in DEV_COMM_BYTES:
        pytest.skip(f"needs the headers of an NCCL of {', '.join(map(str, DEV_COMM_BYTES))}")
    return headers


def nvcc_for(nccl: NcclHeaders, folder: Path, extra_flags: str = "") -> NvccCompiler:
    options = JitOptions(cache_dir=folder)
    nvcc = find_nvcc(options)
    if nvcc is None:
        pytest.skip("no nvcc was found")
    flags = f"{os.environ.get('NVCC_APPEND_FLAGS', '')} {extra_flags}"
    return NvccCompiler(nvcc, options, nccl, {**os.environ, "NVCC_APPEND_FLAGS": flags})


def compiler_of(spec: KernelSpec, nccl: NcclHeaders, folder: Path) -> Compiler:
    """NVRTC for what reaches no header of NCCL, as the library itself does."""
    if spec.needs_nccl:
        return nvcc_for(nccl, folder)
    nvrtc = find_nvrtc()
    if isinstance(nvrtc, str):
        pytest.skip(f"no NVRTC: {nvrtc}")
    options = JitOptions(cache_dir=folder)
    return NvrtcCompiler(nvrtc, find_toolkit_headers(options), options)


@pytest.mark.parametrize("header", HEADERS)
def test_header_compiles_alone_without_warnings(nccl: NcclHeaders, tmp_path: Path, header: str) -> None:
    source = f"#include <deep_ep_ep/network/{header}>\n"
    job = CompileJob(source=source, arch="sm_90a", include_dirs=params.INCLUDE_DIRS, needs_nccl=True)
    output = nvcc_for(nccl, tmp_path, _STRICT_FLAGS).compile(job)
    assert output.failure == "", output.log


@pytest.mark.parametrize("arch", ARCHS)
@pytest.mark.parametrize("label", LABELS)
def test_variants_compile_without_spills_and_agree_with_their_mirrors(
    nccl: NcclHeaders, tmp_path: Path, label: str, arch: str
) -> None:
    for spec in specs_of(DEV_COMM_BYTES[nccl.version]):
        if spec.label != label:
            continue
        structs = [spec.params_type] + ([type(spec.config)] if spec.config is not None else [])
        job = CompileJob(
            source=spec.source() + mirror_source(spec.header, structs),
            arch=arch,
            include_dirs=params.INCLUDE_DIRS,
            needs_nccl=spec.needs_nccl,
        )
        output = compiler_of(spec, nccl, tmp_path).compile(job)
        assert output.failure == "", output.log
        usage = parse_usage(output.log, spec.entry_name)
        assert usage is not None
        assert usage.num_registers * spec.max_threads_per_block <= 65536, f"{spec.label} {spec.config}: {usage}"
        if spec.needs_nccl:
            assert usage.spill_store_bytes == 0, f"{spec.label} {spec.config}: {usage}"
            assert usage.stack_bytes <= _MAX_STACK_BYTES, f"{spec.label} {spec.config}: {usage}"
        else:
            assert not usage.uses_local_memory, f"{spec.label} {spec.config}: {usage}"


@pytest.mark.parametrize("backend", ["PROXY", "GDAKI", "GPI"])
def test_kernels_compile_for_each_backend_of_gin_alone(nccl: NcclHeaders, tmp_path: Path, backend: str) -> None:
    """A use of one backend's own structs would show where only another one is there."""
    text = (nccl.include_dir / "nccl_device" / "gin" / "gin_device_common.h").read_text()
    macros = re.findall(r"^#ifndef NCCL_GIN_(\w+)_ENABLE$", text, re.MULTILINE)
    assert backend in macros
    flags = " ".join(f"-DNCCL_GIN_{name}_ENABLE={int(name == backend)}" for name in macros)
    compiler = nvcc_for(nccl, tmp_path, flags)
    done = set()
    for spec in specs_of(DEV_COMM_BYTES[nccl.version]):
        if spec.needs_nccl and spec.label not in done:
            done.add(spec.label)
            job = CompileJob(source=spec.source(), arch="sm_90a", include_dirs=params.INCLUDE_DIRS, needs_nccl=True)
            output = compiler.compile(job)
            assert output.failure == "", output.log


def test_constants_agree_with_their_mirrors(nccl: NcclHeaders, tmp_path: Path) -> None:
    equal = {
        "sizeof(Opening)": params.OPENING_BYTES,
        "kNumNetworkWords": len(params.NetworkWord),
        "kWordOpened": int(params.NetworkWord.OPENED),
        "kNumRelayCounts": dispatch_kernels.NUM_RELAY_COUNTS,
        "kPlanTileTokens": dispatch_kernels.PLAN_TILE_TOKENS,
        "kPlanThreads": dispatch_kernels._PLAN_THREADS,
        "kMoveThreads": dispatch_kernels._MOVE_THREADS,
        "kNumThreads": dispatch_kernels._RECEIVE_THREADS,
        "kExchangeThreads": params._EXCHANGE_THREADS,
        "kDrainThreads": params._DRAIN_THREADS,
    }
    source = "\n".join(
        [
            "#include <deep_ep_ep/network/drain.cuh>",
            "#include <deep_ep_ep/network/exchange.cuh>",
            "#include <deep_ep_ep/network/send_rows.cuh>",
            "using namespace deep_ep_ep;",
            *(f"static_assert({name} == {value});" for name, value in equal.items()),
        ]
    )
    job = CompileJob(source=source, arch="sm_90a", include_dirs=params.INCLUDE_DIRS, needs_nccl=True)
    output = nvcc_for(nccl, tmp_path).compile(job)
    assert output.failure == "", output.log


def test_nothing_private_of_nccl_is_used() -> None:
    """Members with an underscore, and headers and names of one backend, may change without notice."""
    for path in FOLDER.glob("*.cuh"):
        code = re.sub(r"//.*", "", path.read_text())
        assert not re.search(r"[.>]_\w|gdaki|gpi|gin_proxy|doca|nccl_device/|flush", code, re.IGNORECASE), path
