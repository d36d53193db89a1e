from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from deep_ep_core.jit import Builder, JitOptions, find_ninja, precompile_specs
from deep_ep_core.jit.__main__ import main
from deep_ep_core.jit.compiler import NvccCompiler
from deep_ep_core.jit.toolchain import Nvcc

ARCHS = ["sm_90a", "sm_100a"]


@pytest.fixture(params=["ninja", "threads"])
def ninja(request: pytest.FixtureRequest) -> Path | None:
    """Both ways to run many compilers."""
    if request.param == "threads":
        return None
    found = find_ninja()
    if found is None:
        pytest.skip("no ninja was found")
    return found


@pytest.fixture
def builder(nvcc: Nvcc, options: JitOptions) -> Builder:
    return Builder(options, compiler=NvccCompiler(nvcc, options, None, os.environ))


def test_precompiled_kernels_are_what_a_run_would_compile(
    builder: Builder, options: JitOptions, ninja: Path | None, toy: ModuleType, make_compiler: Any
) -> None:
    report = precompile_specs(builder, toy.all_specs()[:2], ARCHS, num_jobs=2, ninja=ninja)
    assert report.errors == ()
    assert [kernel.arch for kernel in report.kernels] == [*ARCHS, *ARCHS]
    for kernel, spec in zip(report.kernels[::2], toy.all_specs(), strict=False):
        plan = builder.plan(spec, "sm_90a")
        assert builder.is_cached(plan)
        output = plan.compiler.compile(plan.job)
        assert (kernel.name, kernel.cubin) == (plan.name, output.cubin)


def test_failure_does_not_stop_the_others(builder: Builder, ninja: Path | None, toy: ModuleType) -> None:
    report = precompile_specs(builder, toy.broken_specs(), ["sm_90a"], num_jobs=1, ninja=ninja)
    assert [kernel.entry_name for kernel in report.kernels] == ["scale_kernel"]
    assert len(report.errors) == 2
    for error in report.errors:
        assert "no_such_function" in error.log
        assert "it failed (exit status" in str(error)


def test_equal_specs_are_built_once(options: JitOptions, fake_compiler: Any, toy: ModuleType) -> None:
    builder = Builder(options, compiler=fake_compiler)
    report = precompile_specs(builder, [toy.scale_spec()] * 3, ["sm_90a", "sm_90a"], num_jobs=2, ninja=None)
    assert (len(report.kernels), fake_compiler.num_calls) == (1, 1)


def test_what_is_cached_is_not_built_again(
    builder: Builder, options: JitOptions, ninja: Path | None, toy: ModuleType, tmp_path: Path
) -> None:
    first = precompile_specs(builder, [toy.scale_spec()], ["sm_90a"], num_jobs=1, ninja=ninja)
    dead = NvccCompiler(Nvcc(path=tmp_path / "gone", version="x", found_via="a test"), options, None, {})
    dead_builder = Builder(options, compiler=_SameKey(dead, builder.plan(toy.scale_spec(), "sm_90a").compiler))
    assert precompile_specs(dead_builder, [toy.scale_spec()], ["sm_90a"], num_jobs=1, ninja=ninja) == first


class _SameKey(NvccCompiler):
    """A compiler that cannot run, with the key of one that could."""

    def __init__(self, dead: NvccCompiler, model: Any) -> None:
        self.__dict__.update(dead.__dict__)
        self._model = model

    @property
    def identity(self) -> str:
        return str(self._model.identity)

    def key_flags(self, job: Any) -> tuple[str, ...]:
        return tuple(self._model.key_flags(job))


def run(*arguments: str) -> tuple[int, list[str], str]:
    """Run the command line as a user does; return status, lines and error output."""
    command = [sys.executable, "-m", "deep_ep_core.jit", *arguments]
    environ = os.environ | {"PYTHONPATH": str(Path(__file__).parent)}
    answer = subprocess.run(command, capture_output=True, text=True, env=environ, timeout=240, check=False)
    return answer.returncode, answer.stdout.splitlines(), answer.stderr


@pytest.mark.usefixtures("nvcc")
def test_kernels_are_precompiled_listed_checked_and_cleared(tmp_path: Path) -> None:
    cache = ("--cache-dir", str(tmp_path))
    status, lines, errors = run(*cache, "precompile", "toy_kernels:all_specs", "--arch", "9.0", "10.0", "--jobs", "2")
    assert (status, errors) == (0, "")
    assert lines[-1] == f"8 kernels in {tmp_path}, 0 failed"

    status, lines, _ = run(*cache, "list")
    assert status == 0
    assert lines[0].split() == ["LABEL", "ARCH", "COMPILER", "KIB", "ENTRY"]
    assert sorted(line.split()[1] for line in lines[1:]) == ["sm_100a"] * 4 + ["sm_90a"] * 4

    status, lines, errors = run(*cache, "check", "toy_kernels:all_specs")
    assert (status, lines, errors) == (0, ["8 entries, 0 corrupt", "1 sets of struct mirrors, 0 wrong"], "")

    status, lines, _ = run(*cache, "clear")
    assert (status, lines) == (0, [f"8 entries removed from {tmp_path}"])
    assert run(*cache, "list")[1] == ["LABEL  ARCH  COMPILER  KIB  ENTRY"]


def test_corrupt_entry_is_listed_and_fails_the_check(
    options: JitOptions, fake_compiler: Any, toy: ModuleType, capsys: pytest.CaptureFixture[str]
) -> None:
    kernel = Builder(options, compiler=fake_compiler).build(toy.scale_spec(), "sm_90a")
    (options.cache_dir / "cache" / kernel.name / "kernel.cubin").write_bytes(b"x")
    cache = ["--cache-dir", str(options.cache_dir)]
    assert main([*cache, "list"]) == 1
    assert capsys.readouterr().out.splitlines()[1].split()[:3] == ["scale", "?", "corrupt"]
    assert main([*cache, "check"]) == 1
    printed = capsys.readouterr()
    assert printed.out == "1 entries, 1 corrupt\n"
    assert "the checksum of kernel.cubin does not match" in printed.err


def test_wrong_mirror_fails_the_check(
    options: JitOptions, nvcc: Nvcc, toy: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    copy = tmp_path / "include"
    shutil.copytree(toy.INCLUDE_DIR, copy)
    header = copy / "toy" / "scale.cuh"
    header.write_text(header.read_text().replace("kGrid = 1, kCluster = 2", "kGrid = 2, kCluster = 1"))
    module = type(sys)("wrong_kernels")
    module.specs = lambda: [toy.scale_spec(include_dirs=[copy])] * 2  # type: ignore[attr-defined]
    sys.modules["wrong_kernels"] = module
    try:
        assert main(["--cache-dir", str(options.cache_dir), "check", "wrong_kernels:specs"]) == 1
    finally:
        del sys.modules["wrong_kernels"]
    printed = capsys.readouterr()
    assert printed.out.splitlines()[-1] == "1 sets of struct mirrors, 1 wrong"
    assert "kGrid) == 1" in printed.err


@pytest.mark.parametrize("target", ["no_such_module:specs", "os:no_such_function", "os", "os:getcwd"])
def test_target_that_gives_no_specs_is_an_error(
    target: str, options: JitOptions, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["--cache-dir", str(options.cache_dir), "precompile", target, "--arch", "9.0"]) == 1
    assert target in capsys.readouterr().err


def test_cache_of_a_broken_path_is_an_error_in_words(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "file").write_text("")
    assert main(["--cache-dir", str(tmp_path / "file" / "cache"), "list"]) == 1
    assert "Not a directory" in capsys.readouterr().err
