"""Owns the look at Python and at torch: versions, CUDA build, the backends of `torch.distributed`."""

from __future__ import annotations

import platform
import re

from deep_ep_core.doctor.findings import Finding, Status
from deep_ep_core.doctor.machine import Machine

__all__ = ["GLOO", "look_at_torch", "torch_cuda_version"]

GLOO = "gloo"
"""Name of the finding that tells whether the collective backend runs on CPU tensors."""

_MIN_TORCH_VERSION = (2, 10)
_INSTALL = 'pip install --upgrade "torch>=2.10"'


def look_at_torch(machine: Machine) -> list[Finding]:
    """Python, torch, its CUDA build, gloo."""
    python = Finding(
        name="Python",
        status=Status.OK,
        text=f"{platform.python_version()}, {platform.system()} {platform.machine()}",
        facts={"version": platform.python_version(), "system": platform.system(), "machine": platform.machine()},
    )
    try:
        import torch
    except Exception as error:
        why = "every package needs it"
        text = f"does not import ({type(error).__name__}: {error})"
        return [
            python,
            Finding(name="torch", status=Status.MISSING, text=text, why=why, fix=_INSTALL, is_needed=True),
        ]
    return [python, _version_finding(str(torch.__version__)), _cuda_finding(), _gloo_finding()]


def torch_cuda_version() -> str | None:
    """The CUDA that torch is built for, for example `13.0`; None where it is built without, or does not import."""
    try:
        import torch
    except Exception:
        return None
    return torch.version.cuda


def _version_finding(version: str) -> Finding:
    numbers = tuple(int(number) for number in re.findall(r"\d+", version)[:2])
    facts = {"version": version}
    if numbers < _MIN_TORCH_VERSION:
        why = "the packages need 2.10 or newer"
        return Finding(
            name="torch",
            status=Status.MISSING,
            text=f"{version} is too old",
            why=why,
            fix=_INSTALL,
            is_needed=True,
            facts=facts,
        )
    return Finding(name="torch", status=Status.OK, text=version, is_needed=True, facts=facts)


def _cuda_finding() -> Finding:
    import torch

    cuda, rocm = torch.version.cuda, torch.version.hip
    facts = {"cuda": cuda, "rocm": rocm}
    if cuda is None:
        return Finding(
            name="torch's CUDA",
            status=Status.MISSING,
            text=f"torch is built for ROCm {rocm}" if rocm else "torch is built without CUDA",
            why="the device backend works on CUDA tensors",
            fix='pip install --force-reinstall "torch>=2.10" (from an index with CUDA builds)',
            is_needed=True,
            facts=facts,
        )
    return Finding(name="torch's CUDA", status=Status.OK, text=f"built for {cuda}", is_needed=True, facts=facts)


def _gloo_finding() -> Finding:
    import torch.distributed as dist

    if dist.is_available() and dist.is_gloo_available():
        return Finding(name=GLOO, status=Status.OK, text="in torch.distributed, for CPU tensors")
    return Finding(
        name=GLOO,
        status=Status.MISSING,
        text="torch.distributed has none",
        why="the collective backend sends CPU tensors with it",
        fix='pip install --force-reinstall "torch>=2.10"',
    )
