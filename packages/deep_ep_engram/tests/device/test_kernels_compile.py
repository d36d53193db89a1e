"""The kernels of this package: each header stands alone, and every variant compiles without local memory."""

from __future__ import annotations

import dataclasses
import importlib.util
import os
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from deep_ep_core.jit import CompileJob, Compiler, JitOptions, KernelSpec, mirror_source, package_include_dir
from deep_ep_core.jit.compiler import NvccCompiler
from deep_ep_core.jit.resources import parse_usage
from deep_ep_core.jit.toolchain import NcclHeaders, find_nvcc
from deep_ep_engram.device import fetch_kernel, network_kernel

INCLUDE_DIRS = (package_include_dir("deep_ep_core"), package_include_dir("deep_ep_engram"))
HEADER_DIR = INCLUDE_DIRS[1] / "deep_ep_engram"
NEEDS_NCCL = ("get_rows.cuh", "wait_rows.cuh")
HEADERS = sorted(path.name for path in HEADER_DIR.glob("*.cuh") if path.name not in NEEDS_NCCL)
ARCHS = ("sm_90a", "sm_100a")
# `sizeof(ncclDevComm)` by NCCL's version.
DEV_COMM_BYTES = {"2.30.7": 240, "2.32.3": 248}


def _load_fixtures() -> ModuleType:
    """Those that download NCCL's headers once for all tests of the repository."""
    path = Path(__file__).resolve().parents[3] / "deep_ep_core" / "tests" / "nccl" / "conftest.py"
    spec = importlib.util.spec_from_file_location("nccl_header_fixtures_of_engram", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


_nccl_fixtures = _load_fixtures()
get_wheel = _nccl_fixtures.get_wheel
nccl_headers = _nccl_fixtures.nccl_headers


def nvcc_compiler(tmp_path: Path, headers: NcclHeaders | None, flags: str) -> Compiler:
    options = JitOptions(cache_dir=tmp_path)
    nvcc = find_nvcc(options)
    if nvcc is None:
        pytest.skip("no nvcc was found")
    flags = f"{os.environ.get('NVCC_APPEND_FLAGS', '')} {flags}"
    return NvccCompiler(nvcc, options, headers, {**os.environ, "NVCC_APPEND_FLAGS": flags})


def check_compiled(compiler: Compiler, specs: list[KernelSpec], arch: str) -> None:
    """All specs compile, in one translation unit; no one uses local memory, or more registers than an SM has."""
    named = [dataclasses.replace(spec, label=f"{spec.label}{idx}") for idx, spec in enumerate(specs)]
    source = "\n".join(spec.source() for spec in named)
    needs_nccl = any(spec.needs_nccl for spec in specs)
    output = compiler.compile(CompileJob(source=source, arch=arch, include_dirs=INCLUDE_DIRS, needs_nccl=needs_nccl))
    assert output.failure == "", output.log
    assert "warning" not in output.log
    for spec in named:
        usage = parse_usage(output.log, spec.entry_name)
        assert usage is not None
        print(f"{arch} {spec.label} {spec.config}: {usage}")
        assert not usage.uses_local_memory, f"{spec.label} {spec.config}: {usage}"
        assert usage.num_registers * spec.max_threads_per_block <= 65536, f"{spec.label} {spec.config}: {usage}"


@pytest.mark.parametrize("arch", ARCHS)
@pytest.mark.parametrize("header", HEADERS)
def test_header_compiles_alone_without_warnings(compiler: Compiler, header: str, arch: str) -> None:
    source = f"#include <deep_ep_engram/{header}>\n"
    output = compiler.compile(CompileJob(source=source, arch=arch, include_dirs=INCLUDE_DIRS))
    assert output.failure == "", output.log
    assert "warning" not in output.log


@pytest.mark.parametrize("arch", ARCHS)
def test_fetch_compiles_without_warnings_or_local_memory(compiler: Compiler, arch: str) -> None:
    check_compiled(compiler, fetch_kernel.all_fetch_specs(), arch)


@pytest.mark.timeout(300)
@pytest.mark.parametrize("arch", ARCHS)
def test_network_kernels_compile_without_warnings(nccl_headers: Any, tmp_path: Path, arch: str) -> None:
    """NCCL's own functions may use local memory, so that is not looked at."""
    version = nccl_headers.version
    headers = NcclHeaders(
        include_dir=nccl_headers.include_dir,
        version=tuple(map(int, version.split("."))),  # type: ignore[arg-type]
        digest="",
        found_via="a test",
    )
    compiler = nvcc_compiler(tmp_path, headers, "-Werror all-warnings")
    for spec in (
        network_kernel.get_rows_spec(DEV_COMM_BYTES[version]),
        network_kernel.wait_rows_spec(DEV_COMM_BYTES[version]),
    ):
        source = spec.source() + mirror_source(spec.header, [spec.params_type])
        job = CompileJob(source=source, arch=arch, include_dirs=INCLUDE_DIRS, needs_nccl=True)
        output = compiler.compile(job)
        assert output.failure == "", output.log
        print(f"{arch} {spec.label}: {parse_usage(output.log, spec.entry_name)}")


def test_structs_agree_with_their_mirrors(compiler: Compiler) -> None:
    for header, structs in (
        ("deep_ep_engram/fetch_rows.cuh", [fetch_kernel.FetchConfig, fetch_kernel.FetchParams]),
        ("deep_ep_engram/row_claims.cuh", [network_kernel.RowClaims]),
    ):
        job = CompileJob(source=mirror_source(header, structs), arch="sm_90a", include_dirs=INCLUDE_DIRS)
        output = compiler.compile(job)
        assert output.failure == "", output.log


def test_constants_agree_with_their_mirrors(compiler: Compiler) -> None:
    source = (
        "#include <deep_ep_engram/row_copy.cuh>\n"
        f"static_assert(deep_ep_engram::kSegmentWords == {fetch_kernel._SEGMENT_WORDS});\n"
        f"static_assert(deep_ep_engram::kWarpThreads == {fetch_kernel._WARP_THREADS});\n"
    )
    output = compiler.compile(CompileJob(source=source, arch="sm_90a", include_dirs=INCLUDE_DIRS))
    assert output.failure == "", output.log


@pytest.mark.parametrize(
    ("row_bytes", "word_bytes"), [(4096, 16), (264, 8), (12, 4), (66, 2), (33, 1), (1, 1), (16, 16)]
)
def test_rows_move_in_the_largest_words_that_fit(row_bytes: int, word_bytes: int) -> None:
    assert fetch_kernel.word_bytes_of(row_bytes) == word_bytes


@pytest.mark.parametrize(
    ("num_rows", "row_bytes", "num_blocks"),
    [
        pytest.param(1, 2, 1, id="a single row"),
        pytest.param(8192, 4096, 32, id="many segments"),
        pytest.param(16, 4096, 1, id="a block of segments"),
        pytest.param(17, 4096, 2, id="a segment more"),
        pytest.param(1, 17 * 4096, 2, id="one long row"),
        pytest.param(512, 256, 2, id="16 short rows a segment"),
        pytest.param(513, 16, 2, id="32 rows at most are looked up at once"),
    ],
)
def test_small_fetches_take_few_blocks(num_rows: int, row_bytes: int, num_blocks: int) -> None:
    shape = fetch_kernel.fetch_launch_shape(num_rows, row_bytes, max_blocks=32)
    assert shape.grid == (num_blocks, 1, 1)
    assert shape.block == (fetch_kernel.FETCH_THREADS, 1, 1)


def test_a_shared_gpu_bounds_the_blocks() -> None:
    assert fetch_kernel.fetch_launch_shape(8192, 4096, max_blocks=3).grid == (3, 1, 1)


def test_the_row_of_a_word_is_exact() -> None:
    """What `copy_short_rows` multiplies by instead of dividing, for every word of every group of short rows."""
    for row_words in range(2, fetch_kernel._SEGMENT_WORDS):
        words = torch.arange(32 * row_words)
        reciprocal = 0xFFFFFFFF // row_words + 1
        assert torch.equal((words * reciprocal) >> 32, words // row_words), row_words
