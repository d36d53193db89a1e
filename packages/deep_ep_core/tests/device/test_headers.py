"""Core's device headers: each stands alone, says what it wraps, and is used by a kernel that both compilers take."""

from __future__ import annotations

import dataclasses
import importlib.metadata
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

import pytest

from deep_ep_core.barrier import LsaBarrierSlot
from deep_ep_core.jit import CompileJob, Compiler, ConfigStruct, ParamsStruct, mirror_source, package_include_dir
from deep_ep_core.jit.resources import parse_usage
from deep_ep_core.wait import TimeoutRecord

INCLUDE_DIR = package_include_dir("deep_ep_core")
# The wrapper of GIN needs NCCL's headers, and so nvcc; the tests of the loopback network compile it.
HEADERS = sorted(
    path.relative_to(INCLUDE_DIR).as_posix() for path in INCLUDE_DIR.rglob("*.cuh") if path.name != "gin.cuh"
)
ARCHS = ("sm_90a", "sm_100a")

_FUNCTION = re.compile(
    r"^(?:template <[^\n]*>\n)?[^\n/]*__device__ __forceinline__ [^(]*?(?P<name>\w+)\(", re.MULTILINE
)
# The first instruction of an assembly text, behind the registers that it may declare.
_INSTRUCTION = re.compile(r'asm(?: volatile)?\(\s*"(?:\{\\n"\s*" \.reg [^"]*"\s*")? *(?P<name>[a-z_]+)')


@dataclass(frozen=True)
class Function:
    name: str
    header: str
    comment: str
    body: str


def device_functions(header: str) -> Iterator[Function]:
    """The device functions of a header, each with the comment in front of it."""
    text = (INCLUDE_DIR / header).read_text()
    starts = list(_FUNCTION.finditer(text))
    ends = [*(found.start() for found in starts), len(text)][1:]
    for start, end in zip(starts, ends, strict=True):
        comment = re.search(r"(?:^//[^\n]*\n)*\Z", text[: start.start()], re.MULTILINE)
        assert comment is not None
        yield Function(start["name"], header, comment[0], text[start.start() : end])


ALL_FUNCTIONS = [function for header in HEADERS for function in device_functions(header)]


def test_headers_are_found() -> None:
    """Guards the tests below against passing over an empty list."""
    folders = {Path(header).parent.name for header in HEADERS}
    assert folders == {"deep_ep_core", "ptx", "comm"}
    assert {"st_release", "mbarrier_try_wait", "wait_flag", "lsa_barrier"} <= {it.name for it in ALL_FUNCTIONS}


@pytest.mark.parametrize("arch", ARCHS)
@pytest.mark.parametrize("header", HEADERS)
def test_header_compiles_alone_without_warnings(compiler: Compiler, header: str, arch: str) -> None:
    output = compiler.compile(CompileJob(source=f"#include <{header}>\n", arch=arch, include_dirs=(INCLUDE_DIR,)))
    assert output.failure == "", output.log
    assert "warning" not in output.log


@pytest.mark.parametrize("arch", ARCHS)
def test_kernels_compile_without_warnings_or_local_memory(compiler: Compiler, kernels: ModuleType, arch: str) -> None:
    # In one translation unit, since a run of nvcc takes a second. So each variant needs a name of its own.
    specs = [
        dataclasses.replace(spec, label=f"{spec.label}{spec_idx}") for spec_idx, spec in enumerate(kernels.all_specs())
    ]
    source = "\n".join(spec.source() for spec in specs)
    include_dirs = tuple(dict.fromkeys(folder for spec in specs for folder in spec.include_dirs))
    output = compiler.compile(CompileJob(source=source, arch=arch, include_dirs=include_dirs))
    assert output.failure == "", output.log
    assert "warning" not in output.log
    for spec in specs:
        usage = parse_usage(output.log, spec.entry_name)
        assert usage is not None
        assert not usage.uses_local_memory, f"{spec.label} {spec.config}: {usage}"


def test_structs_agree_with_their_mirrors(compiler: Compiler, kernels: ModuleType) -> None:
    structs: dict[str, dict[type[ConfigStruct] | type[ParamsStruct], None]] = {}
    for spec in kernels.all_specs():
        found = structs.setdefault(spec.header, {})
        found[spec.params_type] = None
        if spec.config is not None:
            found[type(spec.config)] = None
    # These two are no parameters: the host reads the one, and takes the size of the other.
    structs["deep_ep_core/comm/lsa_barrier_kernel.cuh"] |= {LsaBarrierSlot: None, TimeoutRecord: None}
    include_dirs = (kernels.CORE_INCLUDE_DIR, kernels.TEST_INCLUDE_DIR)
    for header, found in structs.items():
        source = mirror_source(header, list(found))
        output = compiler.compile(CompileJob(source=source, arch="sm_90a", include_dirs=include_dirs))
        assert output.failure == "", output.log


def test_every_function_is_used_by_a_kernel(kernels: ModuleType) -> None:
    """A wrapper that no kernel uses is one whose assembly no compiler has read."""
    texts = {path.as_posix(): path.read_text() for path in kernels.TEST_INCLUDE_DIR.rglob("*.cuh")}
    texts |= {header: (INCLUDE_DIR / header).read_text() for header in HEADERS}
    # The JIT calls the one that is a kernel's body.
    called = {spec.function.split("::")[-1] for spec in kernels.all_specs()}
    for function in ALL_FUNCTIONS:
        others = "\n".join(text for path, text in texts.items() if path != function.header)
        assert function.name in called or re.search(rf"\b{function.name}\b[<(]", others), function


def test_every_wrapper_names_its_instruction_and_section() -> None:
    wrappers = [it for it in ALL_FUNCTIONS if "asm" in it.body]
    assert len(wrappers) > 30
    for wrapper in wrappers:
        assert "PTX ISA" in wrapper.comment, wrapper
        instruction = _INSTRUCTION.search(wrapper.body)
        assert instruction is not None, wrapper
        # A special register is read by a `mov`, and is named instead of it.
        name = "%" if instruction["name"] == "mov" else instruction["name"]
        assert re.search(rf"^// {name}", wrapper.comment, re.MULTILINE), wrapper


@pytest.mark.parametrize("header", HEADERS)
def test_header_is_plain(header: str) -> None:
    """No macro, no branch by architecture, nothing included that NVRTC might not have."""
    text = (INCLUDE_DIR / header).read_text()
    directives = re.findall(r"^\s*#\s*(\w+)(.*)$", text, re.MULTILINE)
    assert directives[0] == ("pragma", " once")
    for name, rest in directives[1:]:
        assert name == "include"
        assert rest.startswith(" <deep_ep_core/"), rest
    assert text.startswith("// ")
    assert max(map(len, text.splitlines())) <= 120


def test_version_of_headers_is_that_of_the_package() -> None:
    text = (INCLUDE_DIR / "deep_ep_core/version.cuh").read_text()
    numbers = dict(re.findall(r"constexpr int k(\w+)Version = (\d+);", text))
    version = importlib.metadata.version("deep-ep-core")
    assert f"{numbers['Major']}.{numbers['Minor']}.{numbers['Patch']}" == version
    assert f"headers_fit({numbers['Major']}, {numbers['Minor']})" in text
