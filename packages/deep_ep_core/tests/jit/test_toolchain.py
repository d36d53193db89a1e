"""Where compilers and headers are looked for, and in which order."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from deep_ep_core.errors import CompileError, ConfigError
from deep_ep_core.jit import JitOptions, toolchain
from deep_ep_core.jit.choice import CompilerChoice
from deep_ep_core.jit.compiler import NvccCompiler, NvrtcCompiler
from deep_ep_core.jit.toolchain import Nvrtc, find_nccl_headers, find_nvcc, find_toolkit_headers


def make_program(path: Path, output: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"#!{sys.executable}\nprint({output!r})\n")
    path.chmod(0o755)
    return path


def make_nvcc_at(root: Path, version: str = "13.0.88") -> Path:
    return make_program(root / "bin" / "nvcc", f"Cuda compilation tools, release 13.0, V{version}")


def make_nccl_at(root: Path, patch: int = 7) -> Path:
    folder = root / "include" / "nccl_device"
    folder.mkdir(parents=True)
    (root / "include" / "nccl.h").write_text(
        f'#define NCCL_MAJOR 2\n#define NCCL_MINOR 30\n#define NCCL_PATCH {patch}\n#define NCCL_SUFFIX ""\n'
    )
    (root / "include" / "nccl_device.h").write_text('#include "nccl_device/core.h"\n')
    (folder / "core.h").write_text("struct ncclTeam;\n")
    return root


@pytest.fixture
def bare_machine(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """A machine without any tool or wheel; returns the folder that PATH names."""
    (tmp_path / "path").mkdir()
    monkeypatch.setenv("PATH", str(tmp_path / "path"))
    monkeypatch.setattr(toolchain, "_SYSTEM_TOOLKIT", tmp_path / "no toolkit")
    monkeypatch.setattr(toolchain, "_SYSTEM_PREFIXES", ())
    monkeypatch.setattr(toolchain, "site_folders", lambda package, names: iter(()))
    monkeypatch.setattr("deep_ep_core.jit.choice.find_nvrtc", lambda: "it is not there")
    return tmp_path / "path"


def test_nvcc_is_taken_from_the_first_place_that_has_one(
    bare_machine: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    named = make_nvcc_at(tmp_path / "named")
    home, wheel, system = tmp_path / "home", tmp_path / "wheel", tmp_path / "system"
    for root in (home, wheel, system):
        make_nvcc_at(root)
    make_program(bare_machine / "nvcc", "release 13.0, V13.0.88")
    monkeypatch.setattr(toolchain, "_SYSTEM_TOOLKIT", system)
    monkeypatch.setattr(toolchain, "site_folders", lambda package, names: iter([wheel]))
    found = []
    for options in (
        JitOptions(cache_dir=tmp_path, nvcc_compiler=named, cuda_home=home),
        JitOptions(cache_dir=tmp_path, cuda_home=home),
        JitOptions(cache_dir=tmp_path),
    ):
        found.append(find_nvcc(options))
    (bare_machine / "nvcc").unlink()
    found.append(find_nvcc(JitOptions(cache_dir=tmp_path)))
    (wheel / "bin" / "nvcc").unlink()
    found.append(find_nvcc(JitOptions(cache_dir=tmp_path)))
    (system / "bin" / "nvcc").unlink()
    assert find_nvcc(JitOptions(cache_dir=tmp_path)) is None
    assert [nvcc.found_via for nvcc in found if nvcc is not None] == [
        "EP_JIT_NVCC_COMPILER",
        "CUDA_HOME",
        "PATH",
        "the nvidia-cuda-nvcc wheel",
        str(system),
    ]
    assert {nvcc.version for nvcc in found if nvcc is not None} == {"13.0.88"}


def test_nvcc_that_is_named_but_not_there_is_an_error(bare_machine: Path, tmp_path: Path) -> None:
    """Another one must not be taken silently."""
    make_program(bare_machine / "nvcc", "release 13.0, V13.0.88")
    with pytest.raises(ConfigError, match="EP_JIT_NVCC_COMPILER must name an executable file"):
        find_nvcc(JitOptions(cache_dir=tmp_path, nvcc_compiler=tmp_path / "gone"))


def test_old_nvcc_is_refused_with_its_version(bare_machine: Path, tmp_path: Path) -> None:
    make_program(bare_machine / "nvcc", "release 12.1, V12.1.105")
    with pytest.raises(ConfigError, match=r"nvcc must be 12\.3 or newer \(got 12\.1\.105, .*found via PATH"):
        find_nvcc(JitOptions(cache_dir=tmp_path))


def test_nvcc_that_does_not_say_its_version_is_an_error(bare_machine: Path, tmp_path: Path) -> None:
    make_program(bare_machine / "nvcc", "something else")
    with pytest.raises(CompileError, match="must print a version") as caught:
        find_nvcc(JitOptions(cache_dir=tmp_path))
    assert caught.value.log == "something else\n"


def test_no_compiler_at_all_says_where_it_was_looked_for(bare_machine: Path, tmp_path: Path) -> None:
    with pytest.raises(CompileError, match=r"there is no compiler: .*CUDA_HOME.*nvidia-cuda-nvcc.*it is not there"):
        CompilerChoice(JitOptions(cache_dir=tmp_path)).choose(needs_nccl=False)


def test_nvrtc_is_preferred_but_for_nccl_headers_and_a_named_nvcc(
    bare_machine: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    nvcc = make_nvcc_at(tmp_path / "cuda")
    nccl = make_nccl_at(tmp_path / "nccl")
    monkeypatch.setattr("deep_ep_core.jit.choice.find_nvrtc", lambda: Nvrtc(api=None, version="13.0.88"))
    choice = CompilerChoice(JitOptions(cache_dir=tmp_path, cuda_home=tmp_path / "cuda", nccl_root_dir=nccl))
    assert isinstance(choice.choose(needs_nccl=False), NvrtcCompiler)
    assert isinstance(choice.choose(needs_nccl=True), NvccCompiler)
    named = CompilerChoice(JitOptions(cache_dir=tmp_path, nvcc_compiler=nvcc))
    assert isinstance(named.choose(needs_nccl=False), NvccCompiler)


def test_nvcc_compiles_where_nvrtc_is_missing(bare_machine: Path, tmp_path: Path) -> None:
    make_nvcc_at(tmp_path / "cuda")
    choice = CompilerChoice(JitOptions(cache_dir=tmp_path, cuda_home=tmp_path / "cuda"))
    assert choice.choose(needs_nccl=False).identity == "nvcc 13.0.88"


def test_missing_nccl_headers_are_an_error_only_where_they_are_needed(bare_machine: Path, tmp_path: Path) -> None:
    make_nvcc_at(tmp_path / "cuda")
    choice = CompilerChoice(JitOptions(cache_dir=tmp_path, cuda_home=tmp_path / "cuda"))
    choice.choose(needs_nccl=False)
    with pytest.raises(CompileError, match=r"nccl_device\.h is neither .* set EP_NCCL_ROOT_DIR"):
        choice.choose(needs_nccl=True)


def test_nccl_headers_are_read_for_version_and_text(bare_machine: Path, tmp_path: Path) -> None:
    root = make_nccl_at(tmp_path / "nccl")
    options = JitOptions(cache_dir=tmp_path, nccl_root_dir=root)
    before = find_nccl_headers(options)
    assert before is not None
    assert (before.version, before.include_dir, before.found_via) == ((2, 30, 7), root / "include", "EP_NCCL_ROOT_DIR")
    (root / "include" / "nccl_device" / "core.h").write_text("struct ncclTeam { int rank; };\n")
    after = find_nccl_headers(options)
    assert after is not None
    assert after.digest != before.digest


def test_nccl_root_without_device_headers_is_an_error(bare_machine: Path, tmp_path: Path) -> None:
    """NCCL before 2.28 has none, and another NCCL must not be taken silently."""
    with pytest.raises(ConfigError, match=r"EP_NCCL_ROOT_DIR must be an NCCL installation with include/nccl_device\.h"):
        find_nccl_headers(JitOptions(cache_dir=tmp_path, nccl_root_dir=tmp_path))


def test_nccl_wheel_is_found(bare_machine: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    root = make_nccl_at(tmp_path / "nccl")
    monkeypatch.setattr(toolchain, "site_folders", lambda package, names: iter([root]))
    found = find_nccl_headers(JitOptions(cache_dir=tmp_path))
    assert found is not None
    assert found.found_via == "the nvidia-nccl wheel"


def make_toolkit_at(root: Path, *, has_libcudacxx: bool = True) -> Path:
    (root / "include" / "cccl" / "nv").mkdir(parents=True)
    (root / "include" / "cuda_bf16.h").write_text("")
    (root / "include" / "cuda_runtime_api.h").write_text("#define CUDART_VERSION  13000\n")
    if has_libcudacxx:
        (root / "include" / "cccl" / "nv" / "target").write_text("")
    return root


def test_toolkit_headers_come_with_libcudacxx_and_version(bare_machine: Path, tmp_path: Path) -> None:
    root = make_toolkit_at(tmp_path / "cuda")
    found = find_toolkit_headers(JitOptions(cache_dir=tmp_path, cuda_home=root))
    assert found is not None
    assert (found.include_dirs, found.version) == ((root / "include", root / "include" / "cccl"), "13000")
    assert find_toolkit_headers(JitOptions(cache_dir=tmp_path)) is None


def test_incomplete_toolkit_headers_are_passed_over(
    bare_machine: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """torch may bring the wheel of the runtime without that of libcu++, which the runtime's headers include."""
    wheel, home = make_toolkit_at(tmp_path / "wheel", has_libcudacxx=False), make_toolkit_at(tmp_path / "cuda")
    monkeypatch.setattr(toolchain, "site_folders", lambda package, names: iter([wheel]))
    options = JitOptions(cache_dir=tmp_path, cuda_home=home)
    assert [found and found.found_via for found in [find_toolkit_headers(options)]] == ["CUDA_HOME"]
    make_toolkit_at(tmp_path / "whole wheel")
    monkeypatch.setattr(toolchain, "site_folders", lambda package, names: iter([tmp_path / "whole wheel"]))
    assert [found and found.found_via for found in [find_toolkit_headers(options)]] == ["NVIDIA's wheels"]


def test_old_nvcc_does_not_keep_nvrtc_from_work(
    bare_machine: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    make_program(bare_machine / "nvcc", "release 12.1, V12.1.105")
    monkeypatch.setattr("deep_ep_core.jit.choice.find_nvrtc", lambda: Nvrtc(api=None, version="13.0.88"))
    choice = CompilerChoice(JitOptions(cache_dir=tmp_path))
    assert choice.choose(needs_nccl=False).identity == "nvrtc 13.0.88"


def test_folders_of_a_namespace_package_are_found(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """NVIDIA's wheels share the package `nvidia`, and may lie in several site folders."""
    for name in ("a", "b"):
        (tmp_path / name / "some_vendor" / f"only_in_{name}").mkdir(parents=True)
        monkeypatch.syspath_prepend(str(tmp_path / name))
    found = list(toolchain.site_folders("some_vendor", ("only_in_a", "only_in_b", "nowhere")))
    assert found == [tmp_path / "a" / "some_vendor" / "only_in_a", tmp_path / "b" / "some_vendor" / "only_in_b"]
    assert list(toolchain.site_folders("no_such_vendor", ("a",))) == []
