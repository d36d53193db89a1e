"""Owns the look at the driver, the GPUs, how they reach each other, and MPS."""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence
from typing import Any

from deep_ep_core.doctor.findings import Finding, Status
from deep_ep_core.doctor.machine import Machine

__all__ = ["look_at_gpus"]

# Hopper: the device headers use its instructions.
_MIN_CAPABILITY = (9, 0)
_GIB_BYTES = 2**30
_MPS_PROGRAM = "nvidia-cuda-mps-control"


def look_at_gpus(machine: Machine) -> list[Finding]:
    """Driver, GPUs, peer access, NVLink, MPS."""
    findings = [_driver_finding(machine)]
    gpus = machine.gpus.gpus
    if gpus is None:
        # Without a driver there is nothing more to say; otherwise torch was not asked, or did not answer.
        if machine.gpus.has_gpu is not False:
            names = machine.gpus.driver["gpu_names"] if machine.gpus.driver is not None else []
            text = "; ".join((*(f"{name}" for name in names), machine.gpus.why_unknown("gpus")))
            facts = {"num_gpus": len(names) or None}
            findings.append(Finding(name="GPUs", status=Status.UNKNOWN, text=text, is_needed=True, facts=facts))
        return [*findings, _mps_finding()]
    findings.append(_visible_finding(machine, gpus))
    has_one_that_will_do = any(tuple(gpu["capability"]) >= _MIN_CAPABILITY for gpu in gpus)
    findings += [_gpu_finding(idx, gpu, has_one_that_will_do) for idx, gpu in enumerate(gpus)]
    if gpus:
        findings += [_peer_finding(machine.gpus.answers["gpus"]["peers"]), _nvlink_finding(gpus)]
    return [*findings, _mps_finding()]


def _driver_finding(machine: Machine) -> Finding:
    driver = machine.gpus.driver
    if driver is None:
        # Not needed to be known: what torch says of GPUs decides.
        return Finding(name="driver", status=Status.UNKNOWN, text=machine.gpus.why_unknown("driver"))
    if not driver["is_present"]:
        return Finding(
            name="driver",
            status=Status.MISSING,
            text=f"no NVIDIA driver ({driver['reason']})",
            why="nothing uses a GPU without it",
            fix="where there is a GPU, install NVIDIA's driver with the system's package manager",
            is_needed=True,
        )
    if driver["version"] is None:
        return Finding(name="driver", status=Status.UNKNOWN, text=f"there, of unknown version ({driver['reason']})")
    cuda = ".".join(map(str, driver["cuda_version"]))
    facts = {"version": driver["version"], "cuda": cuda}
    return Finding(name="driver", status=Status.OK, text=f"{driver['version']}, up to CUDA {cuda}", facts=facts)


def _visible_finding(machine: Machine, gpus: Sequence[Mapping[str, Any]]) -> Finding:
    num_torch = len(gpus)
    driver = machine.gpus.driver
    num_all = max(num_torch, len(driver["gpu_names"]) if driver is not None else 0)
    facts = {"num_gpus": num_all, "num_visible_gpus": num_torch}
    visible = machine.environ.get("CUDA_VISIBLE_DEVICES")
    limit = "" if visible is None else f" (CUDA_VISIBLE_DEVICES={visible})"
    if num_all == 0:
        return Finding(name="GPUs", status=Status.NOTE, text="none", facts=facts)
    if num_torch == 0:
        reason = machine.gpus.answers["gpus"]["reason"]
        return Finding(
            name="GPUs",
            status=Status.MISSING,
            text=f"torch can use none of {num_all}{limit}: {reason}",
            why="the device backend runs on GPUs",
            fix="unset CUDA_VISIBLE_DEVICES, or install the driver that torch's CUDA asks for",
            is_needed=True,
            facts=facts,
        )
    text = f"{num_torch}" if num_torch == num_all else f"torch sees {num_torch} of {num_all}{limit}"
    status = Status.OK if num_torch == num_all else Status.NOTE
    return Finding(name="GPUs", status=status, text=text, is_needed=True, facts=facts)


def _gpu_finding(idx: int, gpu: Mapping[str, Any], has_one_that_will_do: bool) -> Finding:
    major, minor = gpu["capability"]
    text = (
        f"{gpu['name']}, compute capability {major}.{minor}, {gpu['memory_bytes'] / _GIB_BYTES:.1f} GiB, "
        f"{gpu['num_sms']} SMs"
    )
    facts = {name: gpu[name] for name in ("name", "capability", "memory_bytes", "num_sms")}
    if (major, minor) >= _MIN_CAPABILITY:
        return Finding(name=f"GPU {idx}", status=Status.OK, text=text, facts=facts)
    return Finding(
        name=f"GPU {idx}",
        status=Status.MISSING,
        text=text,
        why="the kernels need compute capability 9.0 (Hopper) or newer",
        fix="use the collective backend on it",
        is_needed=not has_one_that_will_do,
        facts=facts,
    )


def _peer_finding(peers: Sequence[Sequence[bool]]) -> Finding:
    num_gpus, facts = len(peers), {"reaches": [list(row) for row in peers]}
    if num_gpus == 1:
        return Finding(name="peer access", status=Status.OK, text="one GPU, no peers", facts=facts)
    apart = [f"{a}-{b}" for a in range(num_gpus) for b in range(a + 1, num_gpus) if not (peers[a][b] and peers[b][a])]
    if not apart:
        text = f"all {num_gpus} GPUs reach each other"
        return Finding(name="peer access", status=Status.OK, text=text, facts=facts)
    return Finding(
        name="peer access",
        status=Status.WARNING,
        text=f"GPUs {', '.join(apart)} do not reach each other",
        why="kernels write to the GPUs of their node directly",
        fix="`nvidia-smi topo -p2p rw` shows why; ranks on such GPUs use the collective backend",
        facts=facts,
    )


def _nvlink_finding(gpus: Sequence[Mapping[str, Any]]) -> Finding:
    rates = [gpu["nvlink_gbs"] for gpu in gpus]
    facts = {"gbs": rates}
    known = [rate for rate in rates if rate is not None]
    if not known:
        reason = gpus[0]["nvlink_reason"] or "the driver does not tell"
        return Finding(name="NVLink", status=Status.UNKNOWN, text=reason, facts=facts)
    if len(known) == len(rates) and len(set(known)) == 1:
        text = f"{known[0]:g} GB/s a GPU each way"
        return Finding(name="NVLink", status=Status.OK, text=text, facts=facts)
    each = ", ".join(f"GPU {idx} {'unknown' if rate is None else f'{rate:g}'}" for idx, rate in enumerate(rates))
    return Finding(name="NVLink", status=Status.NOTE, text=f"GB/s each way: {each}", facts=facts)


def _mps_finding() -> Finding:
    path = shutil.which(_MPS_PROGRAM)
    if path is not None:
        return Finding(name="MPS", status=Status.OK, text=path, facts={"path": path})
    return Finding(
        name="MPS",
        status=Status.NOTE,
        text=f"{_MPS_PROGRAM} is not on PATH; ranks that share one GPU need it to run at once; the driver brings it",
    )
