"""What changes the name of a cache entry, and what must not."""

from __future__ import annotations

import dataclasses
import os
import shutil
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from deep_ep_core.jit import Builder, JitOptions, KernelSpec
from deep_ep_core.jit.compiler import NvccCompiler, NvrtcCompiler
from deep_ep_core.jit.toolchain import NcclHeaders, Nvcc, Nvrtc, ToolkitHeaders


def name_of(options: JitOptions, compiler: Any, spec: KernelSpec, arch: str = "sm_90a") -> str:
    return Builder(options, compiler=compiler).plan(spec, arch).name


def test_name_is_the_label_and_a_digest(options: JitOptions, fake_compiler: Any, toy: ModuleType) -> None:
    label, _, digest = name_of(options, fake_compiler, toy.scale_spec()).partition(".")
    assert label == "scale"
    assert len(digest) == 32
    assert int(digest, 16) > 0


def test_same_kernel_has_the_same_name_in_another_process(
    options: JitOptions, make_compiler: Any, toy: ModuleType
) -> None:
    names = {name_of(options, make_compiler(), toy.scale_spec()) for _ in range(3)}
    assert len(names) == 1


@pytest.mark.parametrize("header", ["scale.cuh", "vector.cuh"])
def test_text_of_any_header_reached_changes_it(
    options: JitOptions, fake_compiler: Any, toy: ModuleType, tmp_path: Path, header: str
) -> None:
    copy = tmp_path / "include"
    shutil.copytree(toy.INCLUDE_DIR, copy)
    spec = toy.scale_spec(include_dirs=[copy])
    before = name_of(options, fake_compiler, spec)
    with (copy / "toy" / header).open("a") as file:
        file.write("\n// one more line\n")
    assert name_of(options, fake_compiler, spec) != before


def test_text_of_a_header_not_reached_does_not_change_it(
    options: JitOptions, fake_compiler: Any, toy: ModuleType, tmp_path: Path
) -> None:
    copy = tmp_path / "include"
    shutil.copytree(toy.INCLUDE_DIR, copy)
    spec = toy.scale_spec(include_dirs=[copy])
    before = name_of(options, fake_compiler, spec)
    (copy / "toy" / "another.cuh").write_text("int x;")
    assert name_of(options, fake_compiler, spec) == before


def test_place_of_the_installation_does_not_change_it(
    options: JitOptions, nvcc: Nvcc, toy: ModuleType, tmp_path: Path
) -> None:
    """Two environments with the same packages share a cache."""
    copy = tmp_path / "another place"
    shutil.copytree(toy.INCLUDE_DIR, copy)
    moved_nvcc = dataclasses.replace(nvcc, path=Path("/elsewhere/nvcc"))
    here = name_of(options, NvccCompiler(nvcc, options, None, {}), toy.scale_spec())
    there = name_of(options, NvccCompiler(moved_nvcc, options, None, {}), toy.scale_spec(include_dirs=[copy]))
    assert here == there


def test_config_arch_and_source_change_it(options: JitOptions, fake_compiler: Any, toy: ModuleType) -> None:
    names = {
        name_of(options, fake_compiler, toy.scale_spec()),
        name_of(options, fake_compiler, toy.scale_spec(toy.ScaleConfig(factor=4))),
        name_of(options, fake_compiler, toy.scale_spec(), "sm_100a"),
        name_of(options, fake_compiler, dataclasses.replace(toy.scale_spec(), max_threads_per_block=128)),
        name_of(options, fake_compiler, dataclasses.replace(toy.scale_spec(), cluster=(2, 1, 1))),
    }
    assert len(names) == 5


def test_kind_version_and_flags_of_the_compiler_change_it(
    options: JitOptions, make_compiler: Any, toy: ModuleType
) -> None:
    compilers = [
        make_compiler(identity="fake 1.0"),
        make_compiler(identity="fake 1.1"),
        make_compiler(identity="other 1.0"),
        make_compiler(flags=("-O3",)),
        make_compiler(flags=("-O", "3")),
    ]
    assert len({name_of(options, compiler, toy.scale_spec()) for compiler in compilers}) == 5


def nvcc_name(
    toy: ModuleType,
    options: JitOptions,
    nccl: NcclHeaders | None = None,
    environ: dict[str, str] | None = None,
    needs_nccl: bool = True,
) -> str:
    nvcc = Nvcc(path=Path("nvcc"), version="13.0.88", found_via="a test")
    spec = toy.scale_spec(needs_nccl=needs_nccl)
    return name_of(options, NvccCompiler(nvcc, options, nccl, environ or {}), spec)


def test_options_that_change_the_code_change_it(options: JitOptions, toy: ModuleType) -> None:
    changes: list[dict[str, Any]] = [{}, {"cpp_standard": 23}, {"with_lineinfo": True}, {"gin_gdaki_debug": True}]
    assert len({nvcc_name(toy, dataclasses.replace(options, **change)) for change in changes}) == 4


def test_options_that_only_print_or_keep_do_not_change_it(options: JitOptions, toy: ModuleType) -> None:
    names = ("debug", "print_compiler_command", "ptxas_verbose", "ptxas_check", "dump_ptx", "dump_sass")
    changes: list[dict[str, Any]] = [{name: True} for name in names]
    assert {nvcc_name(toy, dataclasses.replace(options, **change)) for change in changes} == {nvcc_name(toy, options)}


def test_flags_that_nvcc_takes_from_the_environment_change_it(options: JitOptions, toy: ModuleType) -> None:
    """nvcc obeys them whatever the command line says."""
    assert nvcc_name(toy, options, environ={"NVCC_APPEND_FLAGS": "-G"}) != nvcc_name(toy, options)
    assert nvcc_name(toy, options, environ={"HOME": "/root"}) == nvcc_name(toy, options)


def test_text_of_nccl_headers_changes_only_kernels_that_include_them(options: JitOptions, toy: ModuleType) -> None:
    old = NcclHeaders(include_dir=Path("a"), version=(2, 30, 7), digest="old", found_via="a test")
    new = NcclHeaders(include_dir=Path("b"), version=(2, 30, 7), digest="new", found_via="a test")
    moved = NcclHeaders(include_dir=Path("b"), version=(2, 30, 7), digest="old", found_via="a test")
    assert nvcc_name(toy, options, old) != nvcc_name(toy, options, new)
    assert nvcc_name(toy, options, old) == nvcc_name(toy, options, moved)
    assert nvcc_name(toy, options, old, needs_nccl=False) == nvcc_name(toy, options, new, needs_nccl=False)


def test_version_of_the_toolkit_headers_changes_what_nvrtc_compiles(options: JitOptions, toy: ModuleType) -> None:
    nvrtc = Nvrtc(api=None, version="13.0.88")

    def name(version: str, folder: str) -> str:
        toolkit = ToolkitHeaders(include_dirs=(Path(folder),), version=version, found_via="a test")
        return name_of(options, NvrtcCompiler(nvrtc, toolkit, options), toy.scale_spec())

    assert name("13000", "a") != name("13010", "a")
    assert name("13000", "a") == name("13000", os.path.join("b", "c"))
