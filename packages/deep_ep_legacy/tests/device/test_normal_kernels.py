"""The kernels of V1's normal calls: each header stands alone, and every variant compiles without local memory."""

from __future__ import annotations

import dataclasses
import os
from pathlib import Path

import pytest

from deep_ep_core.jit import CompileJob, Compiler, JitOptions, mirror_source, package_include_dir
from deep_ep_core.jit.compiler import NvccCompiler, NvrtcCompiler
from deep_ep_core.jit.resources import parse_usage
from deep_ep_core.jit.toolchain import find_nvcc, find_nvrtc, find_toolkit_headers
from deep_ep_legacy.device import normal_failures, normal_kernels

INCLUDE_DIRS = (package_include_dir("deep_ep_core"), package_include_dir("deep_ep_legacy"))
FOLDER = INCLUDE_DIRS[1] / "deep_ep_legacy" / "normal"
HEADERS = sorted(path.relative_to(INCLUDE_DIRS[1]).as_posix() for path in FOLDER.glob("*.cuh"))
ARCHS = ("sm_90a", "sm_100a")
SPECS = normal_kernels.all_specs()
KERNEL_HEADERS = sorted({spec.header for spec in SPECS})

# Every warning of nvcc is an error, and the host compiler reads the headers too.
_STRICT_FLAGS = "-Werror all-warnings -Xcompiler -Wall,-Wextra,-Werror"


@pytest.fixture(params=["nvcc", "nvrtc"])
def compiler(request: pytest.FixtureRequest, tmp_path: Path) -> Compiler:
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


def compile_without_warnings(compiler: Compiler, source: str, arch: str) -> str:
    output = compiler.compile(CompileJob(source=source, arch=arch, include_dirs=INCLUDE_DIRS))
    assert output.failure == "", output.log
    assert "warning" not in output.log
    return output.log


@pytest.mark.parametrize("arch", ARCHS)
def test_headers_compile_without_warnings(compiler: Compiler, arch: str) -> None:
    for header in HEADERS:
        # The kernels' headers are compiled below, as first lines too.
        if header not in KERNEL_HEADERS:
            compile_without_warnings(compiler, f"#include <{header}>\n", arch)


@pytest.mark.parametrize("arch", ARCHS)
@pytest.mark.parametrize("header", KERNEL_HEADERS)
def test_variants_compile_without_warnings_or_local_memory(compiler: Compiler, header: str, arch: str) -> None:
    """Local memory, which spilled registers and arrays that are indexed at run time go to, is slow."""
    # All of a header in one translation unit, since a run of nvcc takes seconds. So each needs a name of its own.
    specs = [
        dataclasses.replace(spec, label=f"{spec.label}{spec_idx}")
        for spec_idx, spec in enumerate(SPECS)
        if spec.header == header
    ]
    log = compile_without_warnings(compiler, "\n".join(spec.source() for spec in specs), arch)
    for spec in specs:
        usage = parse_usage(log, spec.entry_name)
        assert usage is not None
        print(f"{arch} {spec.label}: {usage}")
        assert not usage.uses_local_memory, f"{spec.label}: {usage}"
        # A block must fit an SM, which has 65,536 registers.
        assert usage.num_registers * spec.max_threads_per_block <= 65536, f"{spec.label}: {usage}"


@pytest.mark.parametrize("header", KERNEL_HEADERS)
def test_structs_agree_with_their_mirrors(compiler: Compiler, header: str) -> None:
    specs = [spec for spec in SPECS if spec.header == header]
    structs = {spec.params_type for spec in specs} | {type(spec.config) for spec in specs if spec.config is not None}
    source = mirror_source(header, sorted(structs, key=lambda struct: struct.__name__))
    compile_without_warnings(compiler, source, "sm_90a")


def test_state_and_constants_agree_with_their_mirrors(compiler: Compiler) -> None:
    """What Python allots, counts or compares on its own, and what the kernels make of it."""
    equal = {
        "sizeof(OpeningSlots)": normal_kernels.OPENING_SLOTS_BYTES,
        "kNumAgreed": normal_kernels.NUM_AGREED,
        "kNumThreads": normal_kernels._NUM_THREADS,
        "kMaxLocalExperts": normal_kernels.MAX_LOCAL_EXPERTS,
        "kMaxBiases": normal_kernels._MAX_BIASES,
        "DispatchStage::kHeadBytes": normal_kernels._HEAD_BYTES,
        "kPhaseDisagree": normal_failures.PHASE_DISAGREE,
        "kPhaseClaim": normal_failures.PHASE_CLAIM,
        "kPhaseWorst": normal_failures.PHASE_WORST,
        "kPhaseWorst + 1": len(normal_failures.PHASES),
        "sizeof(comm::Message)": normal_kernels.counts_bytes(2) // (2 * 2 * (2 + normal_kernels.MAX_LOCAL_EXPERTS)),
    }
    source = "\n".join(
        [
            mirror_source("deep_ep_legacy/normal/rank_state.cuh", [normal_kernels.RankState, normal_kernels.Flags]),
            "#include <deep_ep_legacy/normal/combine_kernel.cuh>",
            "#include <deep_ep_legacy/normal/plan_kernel.cuh>",
            "using namespace deep_ep_legacy::normal;",
            *(f"static_assert({name} == {value});" for name, value in equal.items()),
        ]
    )
    compile_without_warnings(compiler, source, "sm_90a")
