"""No file of the packages uses what belongs to one network backend of NCCL: only the public device functions.

Kernels that reach into the structs of a backend work with that backend and that version alone, and read garbage with
the next one.
"""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from deep_ep_core.env import get_env
from deep_ep_core.jit import JitOptions
from deep_ep_core.jit.toolchain import find_nccl_headers

ROOT = Path(__file__).parents[1]
SOURCES = sorted(
    path for path in ROOT.glob("packages/*/src/**/*") if path.suffix in (".py", ".c", ".h", ".cuh") and path.is_file()
)
# Folders of nccl_device that are NCCL's own; what lies beside them is public.
PRIVATE_FOLDERS = ("gin", "impl", "transport")
PRIVATE = {
    "a header of NCCL's own": rf"\bnccl_device/(?:{'|'.join(PRIVATE_FOLDERS)})/",
    "the structs and functions of a backend": r"\bnccl(?:Gin|Net)(?:Gdaki|Gpi|CpuProxy|Proxy|EfaGda)\w*",
    "what GIN calls its backends by": r"\bnccl(?:GinApi_\w+|GinCall\w*|GinCtx\w*|GinGpuCtx\w*)",
    "the libraries under a backend": r"\b(?:doca_|DOCA_|gpi_|nccl_ofi_)\w+",
    "members of ncclDevComm for a backend": r"\bgin(?:Handles|NetDeviceTypes|SignalShadows|ConnectionCount|Wins)\b",
    "members of ncclGin": r"\b_(?:ginHandle|ginBackend|signalShadows)\b",
    "choosing a backend at compile time": r"\bNCCL_GIN_\w+_ENABLE\b|\bncclGin_Backend\w+|\bNCCL_GIN_BACKEND_MASK\w*",
}
_IDENTIFIER = re.compile(r"\b[A-Za-z_]\w*\b")
# Names that can only be meant as NCCL's.
_NAME_OF_NCCL = re.compile(r"nccl[A-Z]|NCCL_GIN|NCCL_DEVICE|doca_|DOCA_|gpi_")
_LINE_COMMENT = re.compile(r"//[^\n]*|/\*.*?\*/", re.DOTALL)


def name_of(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def test_sources_of_every_language_are_looked_at() -> None:
    """Guards the tests below against passing over an empty list."""
    assert {path.suffix for path in SOURCES} == {".py", ".c", ".h", ".cuh"}
    assert {path.relative_to(ROOT).parts[1] for path in SOURCES} == {
        path.name for path in ROOT.glob("packages/deep_ep_*")
    }


@pytest.mark.parametrize("what", PRIVATE)
def test_nothing_of_a_network_backend_is_used(what: str) -> None:
    pattern = re.compile(PRIVATE[what])
    found = [
        f"{name_of(path)}: {match[0]}"
        for path in SOURCES
        for match in pattern.finditer(path.read_text(encoding="utf-8"))
    ]
    assert not found, found


@pytest.mark.parametrize(
    ("what", "text"),
    [
        ("a header of NCCL's own", "#include <nccl_device/gin/gdaki/gin_gdaki.h>"),
        ("the structs and functions of a backend", "auto* c = (ncclGinGdakiGPUContext*)handle;"),
        ("what GIN calls its backends by", "ncclGinApi_Put<NCCL_NET_DEVICE_GIN_PROXY>::call(ctx)"),
        ("the libraries under a backend", "doca_gpu_dev_verbs_qp* qp"),
        ("members of ncclDevComm for a backend", "comm.ginHandles[0]"),
        ("members of ncclGin", "gin._ginBackend"),
        ("choosing a backend at compile time", "using Gin = ncclGin_BackendOne<kType>;"),
    ],
)
def test_use_of_a_private_name_is_found(what: str, text: str) -> None:
    assert re.search(PRIVATE[what], text)


@pytest.fixture
def nccl_device() -> Path:
    """The folder of NCCL's device headers."""
    headers = find_nccl_headers(JitOptions.from_env(get_env()))
    if headers is None:
        pytest.skip("there are no NCCL headers")
    return headers.include_dir / "nccl_device"


def names_in(paths: list[Path]) -> set[str]:
    text = "\n".join(path.read_text(encoding="utf-8", errors="replace") for path in paths)
    return {name for name in _IDENTIFIER.findall(_LINE_COMMENT.sub("", text)) if _NAME_OF_NCCL.match(name)}


def test_names_that_only_private_headers_have_are_not_used(nccl_device: Path) -> None:
    """The same, from the headers that are there: whatever a new NCCL calls its own."""
    private = names_in([path for folder in PRIVATE_FOLDERS for path in (nccl_device / folder).rglob("*.*h")])
    public = names_in([*nccl_device.glob("*.h"), nccl_device.parent / "nccl.h", nccl_device.parent / "nccl_device.h"])
    assert "ncclGin" in public
    only_private = private - public
    assert any("Gdaki" in name for name in only_private)
    used = {f"{name_of(path)}: {name}" for path in SOURCES for name in names_in([path]) if name in only_private}
    assert not used, sorted(used)
