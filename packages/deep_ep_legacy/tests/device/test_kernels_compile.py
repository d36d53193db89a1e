"""The kernels of this package: each header stands alone, and every variant compiles without local memory."""

from __future__ import annotations

import dataclasses

import pytest

from deep_ep_core.jit import mirror_source, package_include_dir
from deep_ep_core.jit.resources import parse_usage
from deep_ep_legacy.device import low_latency_kernels, low_latency_memory, normal_kernels

INCLUDE_DIR = package_include_dir("deep_ep_legacy")
HEADERS = sorted(path.relative_to(INCLUDE_DIR).as_posix() for path in INCLUDE_DIR.rglob("*.cuh"))
ARCHS = ("sm_90a", "sm_100a")
LATENCY_SPECS = low_latency_kernels.all_latency_specs()
SPECS = [*LATENCY_SPECS, *normal_kernels.all_specs()]
KERNEL_HEADERS = sorted({spec.header for spec in SPECS})
LATENCY_HEADERS = {spec.header for spec in LATENCY_SPECS}


@pytest.mark.parametrize("arch", ARCHS)
def test_headers_compile_without_warnings(compile_without_warnings, arch: str) -> None:
    for header in HEADERS:
        # The kernels' headers are compiled below, as first lines too.
        if header not in KERNEL_HEADERS:
            compile_without_warnings(f"#include <{header}>\n", arch)


@pytest.mark.parametrize("arch", ARCHS)
@pytest.mark.parametrize("header", KERNEL_HEADERS)
def test_variants_compile_without_warnings_or_local_memory(compile_without_warnings, header: str, arch: str) -> None:
    """Local memory, which spilled registers and arrays that are indexed at run time go to, is slow."""
    # All of a header in one translation unit, since a run of nvcc takes seconds. So each needs a name of its own.
    specs = [
        dataclasses.replace(spec, label=f"{spec.label}{spec_idx}")
        for spec_idx, spec in enumerate(SPECS)
        if spec.header == header
    ]
    log = compile_without_warnings("\n".join(spec.source() for spec in specs), arch)
    for spec in specs:
        usage = parse_usage(log, spec.entry_name)
        assert usage is not None
        print(f"{arch} {spec.label}: {usage}")
        assert not usage.uses_local_memory, f"{spec.label}: {usage}"
        # A block must fit an SM, which has 65,536 registers.
        assert usage.num_registers * spec.max_threads_per_block <= 65536, f"{spec.label}: {usage}"


@pytest.mark.parametrize("header", KERNEL_HEADERS)
def test_structs_agree_with_their_mirrors(compile_without_warnings, header: str) -> None:
    specs = [spec for spec in SPECS if spec.header == header]
    structs = {spec.params_type for spec in specs} | {type(spec.config) for spec in specs if spec.config is not None}
    if header in LATENCY_HEADERS:
        structs |= {low_latency_memory.LatencyState, low_latency_memory.Signals}
    source = mirror_source(header, sorted(structs, key=lambda struct: struct.__name__))
    compile_without_warnings(source, "sm_90a")
