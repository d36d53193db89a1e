"""The low-latency kernels: each header stands alone, and every variant compiles without local memory."""

from __future__ import annotations

import dataclasses
import os
import random
from pathlib import Path

import pytest

from deep_ep_core.jit import CompileJob, Compiler, JitOptions, mirror_source, package_include_dir
from deep_ep_core.jit.compiler import NvccCompiler, NvrtcCompiler
from deep_ep_core.jit.resources import parse_usage
from deep_ep_core.jit.toolchain import find_nvcc, find_nvrtc, find_toolkit_headers
from deep_ep_legacy import Buffer
from deep_ep_legacy.device import low_latency_kernels, low_latency_memory

INCLUDE_DIRS = (package_include_dir("deep_ep_core"), package_include_dir("deep_ep_legacy"))
FOLDER = INCLUDE_DIRS[1] / "deep_ep_legacy" / "low_latency"
HEADERS = sorted(path.relative_to(INCLUDE_DIRS[1]).as_posix() for path in FOLDER.glob("*.cuh"))
ARCHS = ("sm_90a", "sm_100a")
SPECS = low_latency_kernels.all_latency_specs()
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
    structs |= {low_latency_memory.LatencyState, low_latency_memory.Signals}
    source = mirror_source(header, sorted(structs, key=lambda struct: struct.__name__))
    compile_without_warnings(compiler, source, "sm_90a")


def test_sizes_and_constants_agree_with_their_mirrors(compiler: Compiler) -> None:
    """What Python allots, counts or compares on its own, and what the kernels make of it."""
    equal: dict[str, int] = {
        "sizeof(LatencyState)": low_latency_memory.STATE_BYTES,
        "kNumThreads": low_latency_kernels.NUM_THREADS,
        "kMaxExperts": low_latency_memory.MAX_NUM_EXPERTS,
        "kRoundEntries": low_latency_memory.MAX_NUM_TOPK,
        "kPhaseDecide + 1": len(low_latency_memory.PHASES),
        "kNoteTooMany + 1": len(low_latency_memory.NOTES),
    }
    lines = ["#include <deep_ep_legacy/low_latency/combine_kernel.cuh>"]
    lines += [
        "#include <deep_ep_legacy/low_latency/dispatch_kernel.cuh>",
        "using namespace deep_ep_legacy::low_latency;",
    ]
    lines += [f"static_assert({name} == {value});" for name, value in equal.items()]
    compile_without_warnings(compiler, "\n".join(lines) + "\n", "sm_90a")


def test_buffer_of_v1_size_holds_what_a_call_needs() -> None:
    """For every call: callers pass the hint, and must not be refused."""
    choose = random.Random(0)
    for _ in range(5000):
        num_ranks, experts_per_rank = choose.choice((1, 2, 4, 8, 16)), choose.randint(1, 64)
        num_max_tokens, hidden = choose.randint(1, 600), 128 * choose.randint(1, 80)
        num_experts = num_ranks * experts_per_rank
        hint = Buffer.get_low_latency_rdma_size_hint(num_max_tokens, hidden, num_ranks, num_experts)
        slot_bytes = max(
            *(low_latency_memory.dispatch_slot_bytes(hidden, use_fp8=use_fp8) for use_fp8 in (True, False)),
            *(low_latency_memory.combine_slot_bytes(hidden, use_logfmt=use_logfmt) for use_logfmt in (True, False)),
        )
        needed_bytes = num_experts * num_max_tokens * slot_bytes
        assert needed_bytes <= low_latency_memory.slab_bytes(hint), (num_max_tokens, hidden, num_experts)
        # With the buffers that zero-copy calls are given, the memory is about V1's.
        assert 2 * low_latency_memory.slab_bytes(hint) <= 0.54 * hint + 256


def test_launch_has_a_block_for_each_sm_and_room_for_its_tables() -> None:
    shape = low_latency_kernels.launch_shape(num_sms=16, num_experts=256)
    assert (shape.grid, shape.block, shape.smem_bytes) == ((16, 1, 1), (512, 1, 1), 4 * 513)
