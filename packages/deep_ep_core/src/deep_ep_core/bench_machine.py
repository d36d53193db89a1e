"""Owns the facts about the machine that the records of benchmarks carry: device, versions, the library's commit.

A value that is not known is None; none is made up. What is measured belongs to the features.
"""

from __future__ import annotations

import platform
import re
import subprocess
from dataclasses import dataclass
from pathlib import Path

import torch

from deep_ep_core.errors import TransportError
from deep_ep_core.nccl import load_nccl

__all__ = ["Machine", "commit_of", "nccl_version", "read_machine"]

_CPU_MODEL = re.compile(r"^model name\s*:\s*(.+)$", flags=re.MULTILINE)


@dataclass(frozen=True, slots=True, kw_only=True)
class Machine:
    """What a run stands on.

    Attributes:
        device: Name of the GPU or of the processor.
        driver: Version of the NVIDIA driver.
        nccl: Version of the NCCL that is used.
        torch: Version of torch.
        commit: Commit of the library's checkout, with `-dirty` if files in it differ.
    """

    device: str | None
    driver: str | None
    nccl: str | None
    torch: str
    commit: str | None


def read_machine(device: torch.device, *, file: Path) -> Machine:
    """Look up the facts about this rank's machine.

    Args:
        device: What the rank runs on: a CUDA device, or the CPU.
        file: A file of the library that is measured, for its commit.

    Collective: no. Starts programs and loads libraries, so call it once a run.
    """
    is_cuda = device.type == "cuda"
    return Machine(
        device=torch.cuda.get_device_name(device) if is_cuda else _cpu_name(),
        driver=_driver_version() if is_cuda else None,
        nccl=".".join(map(str, nccl_version())) if is_cuda else None,
        torch=str(torch.__version__),
        commit=commit_of(file),
    )


def nccl_version() -> tuple[int, ...]:
    """Version of the NCCL that is used, which need not be the one that torch was built with. Collective: no."""
    try:
        code = load_nccl().version
    except TransportError:
        # Too old for windows, as that of torch may be.
        return tuple(torch.cuda.nccl.version())
    return code // 10000, code // 100 % 100, code % 100


def commit_of(file: Path) -> str | None:
    """The commit of the checkout that a file is tracked in, with `-dirty` if tracked files in it differ.

    None for a file that is not tracked, even inside a checkout: an installed library may lie in someone else's.
    """
    try:
        for command in (["ls-files", "--error-unmatch", file.name], ["describe", "--always", "--abbrev=40", "--dirty"]):
            # A tag that happens to be there would stand in for the hash.
            options = ["--exclude=*"] if command[0] == "describe" else []
            done = subprocess.run(
                ["git", "-C", str(file.parent), *command, *options], capture_output=True, text=True, check=True
            )
    # No git, no checkout, or one that git does not trust.
    except (OSError, subprocess.CalledProcessError):
        return None
    return done.stdout.strip()


def _driver_version() -> str | None:
    import pynvml  # loads the driver's library at the first call, which importing this module must not do

    try:
        pynvml.nvmlInit()
        try:
            return str(pynvml.nvmlSystemGetDriverVersion())
        finally:
            pynvml.nvmlShutdown()
    # Another maker's GPU.
    except (pynvml.NVMLError_LibraryNotFound, pynvml.NVMLError_DriverNotLoaded):
        return None


def _cpu_name() -> str | None:
    try:
        match = _CPU_MODEL.search(Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace"))
    except OSError:
        match = None
    return match[1] if match else platform.processor() or None
