from __future__ import annotations

import ctypes
import shutil
import subprocess

import pytest

from deep_ep_core.nccl.device_comm import GinConnection
from deep_ep_core.nccl.library import _RESULT_NAMES
from deep_ep_core.nccl.properties import GinType
from deep_ep_core.nccl.structs import (
    NEWEST_KNOWN_VERSION,
    STRUCTS,
    UNDEFINED_INT,
    TeamStruct,
    UniqueId,
    claimed_version,
    dev_comm_fields,
    fixed_dev_comm_bytes,
    new_struct,
    struct_type,
)
from deep_ep_core.nccl.window import WINDOW_ALIGNMENT, WindowFlags

# NCCL's headers take from CUDA's only these names, all of them pointers and enumerations.
CUDA_STUBS = {
    "cuda_runtime.h": (
        "#pragma once\n#include <stddef.h>\n#define CUDART_VERSION 13000\n#define __host__\n#define __device__\n"
        "typedef struct CUstream_st* cudaStream_t;\ntypedef struct CUevent_st* cudaEvent_t;\n"
    ),
    "cuda.h": "#pragma once\ntypedef enum { kOneLocation } CUmemLocationType;\n",
    "cuda_fp16.h": "#pragma once\n",
    "cuda_bf16.h": "#pragma once\n",
    "cuda_fp8.h": "#pragma once\n",
}
INITIALISERS = {
    "ncclConfig_t": "NCCL_CONFIG_INITIALIZER",
    "ncclCommProperties": "NCCL_COMM_PROPERTIES_INITIALIZER",
    "ncclDevCommRequirements": "NCCL_DEV_COMM_REQUIREMENTS_INITIALIZER",
}


@pytest.fixture(scope="session")
def compiler() -> str:
    found = shutil.which("c++") or shutil.which("g++") or shutil.which("clang++")
    if found is None:
        pytest.skip("no host compiler was found")
    return found


@pytest.fixture
def run_against_headers(nccl_headers, compiler, tmp_path):
    """Compiles statements against the headers, runs them, and returns the lines that they print."""

    def run(statements: list[str]) -> list[str]:
        stubs = tmp_path / "stubs"
        stubs.mkdir()
        for name, text in CUDA_STUBS.items():
            (stubs / name).write_text(text)
        # The device functions need CUDA's headers; what is passed from the host does not.
        host_header = nccl_headers.include_dir / "nccl_device" / "host.h"
        header = "nccl_device/host.h" if host_header.is_file() else "nccl_device/impl/comm__types.h"
        source = tmp_path / "layout.cc"
        lines = ["#include <cstddef>", "#include <cstdio>", "#include <cuda_runtime.h>", f"#include <{header}>"]
        lines += ['#define SHOW(x) std::printf("%lld\\n", (long long)(x));']
        # Static, so that padding is zero.
        lines += [f"static {name} a_{name} = {text};" for name, text in INITIALISERS.items()]
        lines += ["static void bytes_of(void* p, size_t n) {"]
        lines += [
            '  for (size_t i = 0; i < n; ++i) std::printf("%02x", ((unsigned char*)p)[i]);',
            '  std::printf("\\n");',
            "}",
        ]
        source.write_text("\n".join([*lines, "int main() {", *statements, "}"]))
        program = tmp_path / "layout"
        command = [compiler, "-std=c++17", "-w", "-I", str(nccl_headers.include_dir), "-I", str(stubs), str(source)]
        answer = subprocess.run([*command, "-o", str(program)], capture_output=True, text=True, check=False)
        assert answer.returncode == 0, answer.stderr
        return subprocess.run([str(program)], capture_output=True, text=True, check=True).stdout.splitlines()

    return run


def test_the_headers_are_of_the_version_that_is_asked_for(nccl_headers, run_against_headers):
    assert run_against_headers(["SHOW(NCCL_VERSION_CODE)"]) == [str(nccl_headers.version_code)]
    assert nccl_headers.version_code <= NEWEST_KNOWN_VERSION


def test_every_member_lies_where_the_headers_put_it(nccl_headers, run_against_headers):
    statements, wanted = [], []
    for name in STRUCTS:
        kind = struct_type(name, nccl_headers.version_code)
        statements += [f"SHOW(sizeof({name}))", f"SHOW(alignof({name}))"]
        wanted += [ctypes.sizeof(kind), ctypes.alignment(kind)]
        for field in kind._fields_:
            statements += [f"SHOW(offsetof({name}, {field[0]}))", f"SHOW(sizeof((({name}*)0)->{field[0]}))"]
            wanted += [getattr(kind, field[0]).offset, getattr(kind, field[0]).size]
    for name, kind in (("ncclTeam", TeamStruct), ("ncclUniqueId", UniqueId)):
        statements += [f"SHOW(sizeof({name}))", f"SHOW(alignof({name}) <= {ctypes.alignment(kind)})"]
        wanted += [ctypes.sizeof(kind), 1]
    for place, field in enumerate(TeamStruct._fields_):
        statements += [f"SHOW(offsetof(ncclTeam, {field[0]}))"]
        wanted += [4 * place]
    assert run_against_headers(statements) == [str(value) for value in wanted]


def test_a_new_struct_has_the_bytes_of_nccls_own_initialiser(nccl_headers, run_against_headers):
    """Sizes, magic number, version and every default at once."""
    shown = run_against_headers([f"bytes_of(&a_{name}, sizeof(a_{name}));" for name in INITIALISERS])
    assert shown == [bytes(new_struct(name, nccl_headers.version_code)).hex() for name in INITIALISERS]


def test_the_device_communicator_is_as_large_as_the_headers_say(nccl_headers, run_against_headers):
    fields = dev_comm_fields(nccl_headers.version_code)
    assert set(fields) == {"ginSignalCount", "ginContextCount"}
    statements = ["SHOW(sizeof(ncclDevComm))", "SHOW(alignof(ncclDevComm))"]
    statements += [f"SHOW(offsetof(ncclDevComm, {name}))" for name in fields]
    statements += [f"SHOW(sizeof(((ncclDevComm*)0)->{name}))" for name in fields]
    size, alignment, *rest = map(int, run_against_headers(statements))
    assert alignment == 8
    assert size % 8 == 0
    assert rest == [*fields.values(), 4, 4]
    fixed = fixed_dev_comm_bytes(nccl_headers.version_code)
    assert fixed == (size if nccl_headers.version_code < 23100 else None)


def test_numbers_are_those_of_the_headers(nccl_headers, run_against_headers):
    numbers = {name: code for code, name in enumerate(_RESULT_NAMES)}
    numbers |= {f"NCCL_GIN_CONNECTION_{member.name}": member.value for member in GinConnection}
    numbers |= {
        f"NCCL_GIN_TYPE_{member.name}": member.value
        for member in GinType
        if member is not GinType.OTHER and (member is not GinType.EFA_GDA or nccl_headers.version_code >= 23100)
    }
    numbers |= {
        f"NCCL_WIN_{flag.name}": flag.value for flag in (WindowFlags.COLL_SYMMETRIC, WindowFlags.STRICT_ORDERING)
    }
    numbers |= {
        "NCCL_WIN_DEFAULT": WindowFlags.DEFAULT.value,
        "NCCL_WIN_REQUIRED_ALIGNMENT": WINDOW_ALIGNMENT,
        "NCCL_CONFIG_UNDEF_INT": UNDEFINED_INT,
    }
    shown = run_against_headers([f"SHOW({name})" for name in numbers])
    assert dict(zip(numbers, map(int, shown), strict=True)) == numbers


def test_a_newer_nccl_is_told_the_newest_version_that_is_known():
    found = new_struct("ncclCommProperties", NEWEST_KNOWN_VERSION + 100)
    assert (found.version, found.size) == (NEWEST_KNOWN_VERSION, ctypes.sizeof(found))
    assert claimed_version(23007) == 23007
    assert dev_comm_fields(NEWEST_KNOWN_VERSION + 1) == {}


def test_a_member_that_a_library_does_not_know_yet_is_left_out():
    old = new_struct("ncclDevCommRequirements", 23007, useRuntimeVersion=True, ginSignalCount=3)
    new = new_struct("ncclDevCommRequirements", 23102, useRuntimeVersion=True, ginSignalCount=3)
    assert not hasattr(old, "useRuntimeVersion")
    assert new.useRuntimeVersion
    assert (old.ginSignalCount, new.ginSignalCount) == (3, 3)


def test_nccl_includes_no_header_of_cuda_that_has_no_stub(nccl_headers):
    """Should NCCL come to need more of CUDA, the layouts could depend on it."""
    lines = (nccl_headers.include_dir / "nccl.h").read_text().splitlines()
    included = {line.split("<")[1].split(">")[0] for line in lines if line.startswith("#include <cuda")}
    assert included
    assert included <= set(CUDA_STUBS)
