"""The kernels of this package: each header stands alone, and every variant compiles without local memory."""

from __future__ import annotations

import dataclasses

import pytest

from deep_ep_core.jit import CompileJob, Compiler, KernelSpec, mirror_source, package_include_dir
from deep_ep_core.jit.resources import parse_usage
from deep_ep_ep.device import combine_kernel, dispatch_kernel, opening, state

INCLUDE_DIRS = (package_include_dir("deep_ep_core"), package_include_dir("deep_ep_ep"))
# Those of kernels across nodes are in `test_network_kernels`: they need NCCL's.
HEADERS = sorted(
    path.relative_to(INCLUDE_DIRS[1]).as_posix()
    for path in INCLUDE_DIRS[1].rglob("*.cuh")
    if path.parent.name != "network"
)
ARCHS = ("sm_90a", "sm_100a")

# Every variant of every kernel of this package.
SPECS: list[KernelSpec] = [
    *combine_kernel.all_combine_specs(),
    *(dispatch_kernel.dispatch_spec(config) for config in dispatch_kernel.all_dispatch_configs()),
]


@pytest.mark.parametrize("arch", ARCHS)
@pytest.mark.parametrize("header", HEADERS)
def test_header_compiles_alone_without_warnings(compiler: Compiler, header: str, arch: str) -> None:
    output = compiler.compile(CompileJob(source=f"#include <{header}>\n", arch=arch, include_dirs=INCLUDE_DIRS))
    assert output.failure == "", output.log
    assert "warning" not in output.log


@pytest.mark.parametrize("arch", ARCHS)
@pytest.mark.parametrize("header", sorted({spec.header for spec in SPECS}))
def test_variants_compile_without_warnings_or_local_memory(compiler: Compiler, header: str, arch: str) -> None:
    """Local memory, which spilled registers and arrays that are indexed at run time go to, is slow."""
    # All of a header in one translation unit, since a run of nvcc takes seconds. So each needs a name of its own.
    specs = [
        dataclasses.replace(spec, label=f"{spec.label}{spec_idx}")
        for spec_idx, spec in enumerate(SPECS)
        if spec.header == header
    ]
    source = "\n".join(spec.source() for spec in specs)
    output = compiler.compile(CompileJob(source=source, arch=arch, include_dirs=INCLUDE_DIRS))
    assert output.failure == "", output.log
    assert "warning" not in output.log
    for spec in specs:
        usage = parse_usage(output.log, spec.entry_name)
        assert usage is not None
        print(f"{arch} {spec.label} {spec.config}: {usage}")
        assert not usage.uses_local_memory, f"{spec.label} {spec.config}: {usage}"
        # A block must fit an SM, which has 65,536 registers.
        assert usage.num_registers * spec.max_threads_per_block <= 65536, f"{spec.label} {spec.config}: {usage}"


@pytest.mark.parametrize("header", sorted({spec.header for spec in SPECS}))
def test_structs_agree_with_their_mirrors(compiler: Compiler, header: str) -> None:
    specs = [spec for spec in SPECS if spec.header == header]
    structs = {spec.params_type for spec in specs} | {type(spec.config) for spec in specs if spec.config is not None}
    source = mirror_source(header, sorted(structs, key=lambda struct: struct.__name__))
    output = compiler.compile(CompileJob(source=source, arch="sm_90a", include_dirs=INCLUDE_DIRS))
    assert output.failure == "", output.log


def test_launch_shape_of_combine_is_that_of_its_ring(compiler: Compiler) -> None:
    source = (
        "#include <deep_ep_ep/row_ring.cuh>\n"
        f"static_assert(deep_ep_ep::RowRing::kNumWarps * 32 == {combine_kernel.COMBINE_THREADS});\n"
        f"static_assert(deep_ep_ep::RowRing::kNumBlockBytes == {combine_kernel.COMBINE_SMEM_BYTES});\n"
    )
    output = compiler.compile(CompileJob(source=source, arch="sm_90a", include_dirs=INCLUDE_DIRS))
    assert output.failure == "", output.log


def test_state_that_outlives_kernels_agrees_with_its_mirrors(compiler: Compiler) -> None:
    source = mirror_source("deep_ep_ep/rank_state.cuh", [state.RankState, state.Arrivals])
    output = compiler.compile(CompileJob(source=source, arch="sm_90a", include_dirs=INCLUDE_DIRS))
    assert output.failure == "", output.log


def test_sizes_and_constants_agree_with_their_mirrors(compiler: Compiler) -> None:
    """What Python allots, counts or compares on its own, and what the kernels make of it."""
    equal = {
        "sizeof(RankState)": state.RANK_STATE_BYTES,
        "sizeof(Arrivals)": state.ARRIVALS_BYTES,
        "kPhaseDisagree": state.PHASE_DISAGREE,
        "kPhaseInvalid": state.PHASE_INVALID,
        "kPhaseInvalid + 1": len(state.PHASES),
        "sizeof(OpeningSlots)": opening.OPENING_SLOTS_BYTES,
        "kInvalidToken": opening._NUM_AGREED - 1,
        "kByExpert": opening.BY_EXPERT,
        "kPushed": f"{opening.PUSHED}ull",
        "kNumThreads": dispatch_kernel._NUM_THREADS,
        "kNumWarps - kNumSideWarps": dispatch_kernel._NUM_ROW_WARPS,
        "kStageAlignment": dispatch_kernel._STAGE_ALIGNMENT,
        # A plan's bytes for 128 columns: beside it begin the stages.
        "128 * (kNumWarps * (sizeof(*PlanMemory::masks) + sizeof(*PlanMemory::before))"
        " + sizeof(*PlanMemory::counts) + sizeof(*PlanMemory::before_block)"
        " + sizeof(*PlanMemory::totals) + sizeof(*PlanMemory::before_us))": dispatch_kernel.row_stages(
            16, plan_columns=128
        ).offset,
    }
    source = "\n".join(
        [
            "#include <deep_ep_ep/combine_kernel.cuh>",
            "#include <deep_ep_ep/dispatch_kernel.cuh>",
            "using namespace deep_ep_ep;",
            *(f"static_assert({name} == {value});" for name, value in equal.items()),
        ]
    )
    output = compiler.compile(CompileJob(source=source, arch="sm_90a", include_dirs=INCLUDE_DIRS))
    assert output.failure == "", output.log
