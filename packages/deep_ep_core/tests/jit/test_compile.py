"""Real compilers, where they are there, and what a user is told when one fails."""

from __future__ import annotations

import dataclasses
import os
import re
import stat
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from deep_ep_core.errors import CompileError, ConfigError
from deep_ep_core.jit import Builder, Compiler, JitOptions, ParamsStruct, arch_name, parse_arch
from deep_ep_core.jit.compiler import NvccCompiler
from deep_ep_core.jit.resources import parse_usage
from deep_ep_core.jit.toolchain import Nvcc, find_nccl_headers


@pytest.mark.parametrize("arch", ["sm_90a", "sm_100a"])
def test_every_variant_compiles_without_local_memory(
    real_compiler: Compiler, options: JitOptions, toy: ModuleType, arch: str
) -> None:
    builder = Builder(dataclasses.replace(options, ptxas_check=True), compiler=real_compiler)
    for spec in toy.all_specs():
        kernel = builder.build(spec, arch)
        assert kernel.cubin.startswith(b"\x7fELF")
        assert b"\0scale_kernel\0" in kernel.cubin
        assert kernel.usage is not None
        assert kernel.usage.num_registers > 0


def test_cubin_is_the_same_with_and_without_a_cache_hit(
    real_compiler: Compiler, options: JitOptions, toy: ModuleType
) -> None:
    first = Builder(options, compiler=real_compiler).build(toy.scale_spec(), "sm_90a")
    assert Builder(options, compiler=real_compiler).build(toy.scale_spec(), "sm_90a") == first


def test_local_memory_fails_under_ptxas_check(real_compiler: Compiler, options: JitOptions, toy: ModuleType) -> None:
    spec = toy.scale_spec(label="spilling", function="toy::scale_in_local_memory")
    usage = Builder(options, compiler=real_compiler).build(spec, "sm_90a").usage
    assert usage is not None
    assert usage.stack_bytes >= 256
    # Also when the entry is in the cache already.
    checked = Builder(dataclasses.replace(options, ptxas_check=True), compiler=real_compiler)
    with pytest.raises(CompileError, match=r"EP_JIT_PTXAS_CHECK is set and the kernel uses local memory: .*256 B"):
        checked.build(spec, "sm_90a")


def test_ptxas_check_without_a_word_from_ptxas_fails(options: JitOptions, fake_compiler: Any, toy: ModuleType) -> None:
    builder = Builder(dataclasses.replace(options, ptxas_check=True), compiler=fake_compiler)
    with pytest.raises(CompileError, match="ptxas did not say"):
        builder.build(toy.scale_spec(), "sm_90a")


def test_error_says_what_to_look_at(real_compiler: Compiler, options: JitOptions, toy: ModuleType) -> None:
    spec = toy.scale_spec(label="broken", function="toy::no_such_function")
    with pytest.raises(CompileError) as caught:
        Builder(options, compiler=real_compiler).build(spec, "sm_90a")
    error = caught.value
    assert re.search("the kernel broken for sm_90a", str(error))
    assert real_compiler.identity in str(error)
    assert "no_such_function" in error.log
    assert error.log.strip() in str(error)
    assert str(toy.INCLUDE_DIR) in error.command
    assert "sm_90a" in error.command
    assert error.source_path is not None
    assert Path(error.source_path).read_text() == spec.source()
    assert str(options.cache_dir) in error.source_path


def test_parameter_that_differs_from_its_mirror_does_not_compile(
    real_compiler: Compiler, options: JitOptions, toy: ModuleType
) -> None:
    """Such a kernel would read its parameters from the wrong places."""

    class Short(ParamsStruct):
        __slots__ = ()
        cuda_name = "toy::ScaleParams"
        _fields_ = toy.ScaleParams._fields_[:-1]

    spec = dataclasses.replace(toy.scale_spec(), params_type=Short)
    with pytest.raises(CompileError, match="the Python mirror differs"):
        Builder(options, compiler=real_compiler).build(spec, "sm_90a")


def test_mirrors_of_a_spec_are_proved(real_compiler: Compiler, options: JitOptions, toy: ModuleType) -> None:
    Builder(options, compiler=real_compiler).prove_mirrors(toy.scale_spec(), "sm_90a")


def test_cluster_is_compiled_in(real_compiler: Compiler, options: JitOptions, toy: ModuleType) -> None:
    builder = Builder(options, compiler=real_compiler)
    spec = dataclasses.replace(toy.scale_spec(toy.ScaleConfig(wait=toy.Wait.CLUSTER)), cluster=(2, 1, 1))
    assert "__cluster_dims__(2, 1, 1)" in spec.source()
    assert builder.build(spec, "sm_90a").cubin != builder.build(dataclasses.replace(spec, cluster=None), "sm_90a").cubin


def test_line_info_is_embedded_when_asked_for(
    make_nvcc: Callable[..., NvccCompiler], options: JitOptions, toy: ModuleType
) -> None:
    plain = Builder(options, compiler=make_nvcc(options)).build(toy.scale_spec(), "sm_90a")
    with_info = dataclasses.replace(options, with_lineinfo=True)
    informed = Builder(with_info, compiler=make_nvcc(with_info)).build(toy.scale_spec(), "sm_90a")
    assert b".debug_line" in informed.cubin
    assert b".debug_line" not in plain.cubin


def test_ptx_is_kept_when_asked_for(real_compiler: Compiler, options: JitOptions, toy: ModuleType) -> None:
    builder = Builder(dataclasses.replace(options, dump_ptx=True), compiler=real_compiler)
    kernel = builder.build(toy.scale_spec(), "sm_90a")
    ptx = (options.cache_dir / "cache" / kernel.name / "kernel.ptx").read_text()
    assert ".entry scale_kernel" in ptx


def test_messages_are_printed_when_asked_for(
    real_compiler: Compiler, options: JitOptions, toy: ModuleType, capfd: pytest.CaptureFixture[str]
) -> None:
    Builder(options, compiler=real_compiler).build(toy.scale_spec(), "sm_90a")
    assert capfd.readouterr() == ("", "")
    loud = dataclasses.replace(options, debug=True, print_compiler_command=True, ptxas_verbose=True)
    Builder(loud, compiler=real_compiler).build(toy.scale_spec(toy.ScaleConfig(factor=9)), "sm_90a")
    printed = capfd.readouterr().err
    assert "compiling scale." in printed
    assert str(toy.INCLUDE_DIR) in printed
    assert "Compiling entry function 'scale_kernel'" in printed


def test_kernel_with_nccl_headers_compiles(nccl_options: JitOptions, toy: ModuleType) -> None:
    spec = toy.scale_spec(
        label="version", header="toy/nccl_version.cuh", function="toy::write_nccl_version", needs_nccl=True
    )
    builder = Builder(dataclasses.replace(nccl_options, ptxas_check=True))
    plan = builder.plan(spec, "sm_90a")
    nccl = find_nccl_headers(nccl_options)
    assert nccl is not None
    assert f"nccl={nccl.digest}" in plan.compiler.key_flags(plan.job)
    assert builder.build(spec, "sm_90a").cubin.startswith(b"\x7fELF")


def fake_nvcc(folder: Path, body: str) -> Nvcc:
    """A program in the place of nvcc."""
    path = folder / "nvcc"
    path.write_text(f"#!{sys.executable}\nimport os, signal, sys, time\n{body}\n")
    path.chmod(path.stat().st_mode | stat.S_IXUSR)
    return Nvcc(path=path, version="13.0.88", found_via="a test")


@pytest.mark.parametrize(
    ("body", "failure"),
    [
        ("os.kill(os.getpid(), signal.SIGKILL)", "killed by SIGKILL"),
        ("open('kernel.cubin', 'wb').write(b'half'); os.kill(os.getpid(), signal.SIGSEGV)", "killed by SIGSEGV"),
        ("open('kernel.cubin', 'wb').write(b'half'); sys.exit(3)", "exit status 3"),
        ("pass", "no output, though it reported success"),
        ("open('kernel.cubin', 'wb')", "no output, though it reported success"),
    ],
)
def test_compiler_that_does_not_end_well_is_a_failure(
    options: JitOptions, toy: ModuleType, tmp_path: Path, body: str, failure: str
) -> None:
    compiler = NvccCompiler(fake_nvcc(tmp_path, f"print('last words', flush=True); {body}"), options, None, os.environ)
    builder = Builder(options, compiler=compiler)
    with pytest.raises(CompileError, match=re.escape(f"it failed ({failure})")) as caught:
        builder.build(toy.scale_spec(), "sm_90a")
    assert caught.value.log == "last words\n"
    assert builder.cache.names() == []


def test_compiler_that_hangs_is_stopped_with_its_children(
    options: JitOptions, toy: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """nvcc starts programs of its own; one that lives on would hold the pipe open, and with it this test."""
    started = tmp_path / "started"
    body = f"""
import subprocess
child = subprocess.Popen(["sleep", "3600"])
open({str(started)!r}, "w").close()
child.wait()
"""
    communicate = subprocess.Popen.communicate

    def communicate_too_long(process: Any, timeout: float | None = None) -> Any:
        if timeout is None:
            return communicate(process)
        deadline = time.monotonic() + 120.0
        while not started.exists():
            assert time.monotonic() < deadline
            time.sleep(0.01)
        raise subprocess.TimeoutExpired("nvcc", timeout)

    monkeypatch.setattr(subprocess.Popen, "communicate", communicate_too_long)
    compiler = NvccCompiler(fake_nvcc(tmp_path, body), options, None, os.environ)
    with pytest.raises(CompileError, match=r"it failed \(it was stopped after 1800 s\)"):
        Builder(options, compiler=compiler).build(toy.scale_spec(), "sm_90a")


def test_compiler_that_does_not_start_is_a_failure(options: JitOptions, toy: ModuleType, tmp_path: Path) -> None:
    nvcc = Nvcc(path=tmp_path / "gone", version="13.0.88", found_via="a test")
    with pytest.raises(CompileError, match="it did not start"):
        Builder(options, compiler=NvccCompiler(nvcc, options, None, {})).build(toy.scale_spec(), "sm_90a")


def test_sass_without_cuobjdump_says_what_is_missing(
    options: JitOptions, fake_compiler: Any, toy: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("deep_ep_core.jit.builder.find_cuobjdump", lambda options: None)
    builder = Builder(dataclasses.replace(options, dump_sass=True), compiler=fake_compiler)
    with pytest.raises(ConfigError, match="EP_JIT_DUMP_SASS and EP_JIT_DUMP_ASM need the program cuobjdump"):
        builder.build(toy.scale_spec(), "sm_90a")


def test_sass_is_kept_when_asked_for(
    options: JitOptions, fake_compiler: Any, toy: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    program = tmp_path / "cuobjdump"
    program.write_text('#!/bin/sh\necho "$1 of $(wc -c < "$2") bytes"\n')
    program.chmod(0o755)
    monkeypatch.setattr("deep_ep_core.jit.builder.find_cuobjdump", lambda options: program)
    builder = Builder(dataclasses.replace(options, dump_sass=True), compiler=fake_compiler)
    kernel = builder.build(toy.scale_spec(), "sm_90a")
    sass = (options.cache_dir / "cache" / kernel.name / "kernel.sass").read_text()
    assert sass == f"--dump-sass of {len(kernel.cubin)} bytes\n"


@pytest.mark.parametrize(
    ("capability", "name"), [((8, 6), "sm_86"), ((9, 0), "sm_90a"), ((10, 0), "sm_100a"), ((10, 3), "sm_103a")]
)
def test_architecture_of_a_compute_capability(capability: tuple[int, int], name: str) -> None:
    assert arch_name(*capability) == name


@pytest.mark.parametrize("text", ["9.0", "90", "90a", "sm_90", "sm_90a", " 9.0 "])
def test_architecture_is_read_as_people_write_it(text: str) -> None:
    assert parse_arch(text) == "sm_90a"


@pytest.mark.parametrize("text", ["", "hopper", "9", "sm_x0", "compute_90"])
def test_what_is_no_architecture_is_refused(text: str) -> None:
    with pytest.raises(ConfigError, match=r"must be like 9\.0 or sm_90a"):
        parse_arch(text)


def test_old_cpp_standard_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="cpp_standard must be at least 20"):
        JitOptions(cache_dir=tmp_path, cpp_standard=17)


def test_usage_is_read_for_the_kernel_asked_for() -> None:
    log = """\
ptxas info    : Compiling entry function 'other' for 'sm_90a'
ptxas info    : Function properties for other
    64 bytes stack frame, 8 bytes spill stores, 8 bytes spill loads
ptxas info    : Used 255 registers, used 1 barriers
ptxas info    : Compiling entry function 'mine' for 'sm_90a'
ptxas info    : Function properties for mine
ptxas         .     0 bytes stack frame, 4 bytes spill stores, 12 bytes spill loads
ptxas info    : Used 40 registers, used 2 barriers, 28 bytes smem
"""
    usage = parse_usage(log, "mine")
    assert usage is not None
    assert dataclasses.astuple(usage) == (40, 0, 4, 12, 28)
    assert usage.uses_local_memory
    assert parse_usage(log, "another") is None
