"""Owns the round of all probes: none of them may end it, whatever it raises."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from deep_ep_core.doctor.findings import Finding, Section, Status
from deep_ep_core.doctor.gpu_answer import GpuAnswer, ask_gpus
from deep_ep_core.doctor.machine import Machine, read_all_settings
from deep_ep_core.doctor.probes.cache import look_at_cache
from deep_ep_core.doctor.probes.compilers import look_at_compilers
from deep_ep_core.doctor.probes.gpus import look_at_gpus
from deep_ep_core.doctor.probes.nccl import look_at_nccl
from deep_ep_core.doctor.probes.network import look_at_network
from deep_ep_core.doctor.probes.packages import look_at_packages
from deep_ep_core.doctor.probes.settings import look_at_settings
from deep_ep_core.doctor.probes.torch_build import look_at_torch, torch_cuda_version
from deep_ep_core.doctor.report import Report
from deep_ep_core.env import settings_paths

__all__ = ["DEFAULT_TIMEOUT_S", "PROBES", "Probe", "examine"]

DEFAULT_TIMEOUT_S = 60.0
"""How long the driver, torch's CUDA and NCCL together may take: the first use of many GPUs takes tens of seconds."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Probe:
    """One section of the report.

    Attributes:
        key: Name for programs.
        title: Name for people.
        look: Gives the findings; what it raises becomes one.
        is_needed: Whether the device backend depends on what it finds.
    """

    key: str
    title: str
    look: Callable[[Machine], Sequence[Finding]]
    is_needed: bool


PROBES: tuple[Probe, ...] = (
    Probe(key="torch", title="Python and torch", look=look_at_torch, is_needed=True),
    Probe(key="gpus", title="GPUs", look=look_at_gpus, is_needed=True),
    Probe(key="nccl", title="NCCL", look=look_at_nccl, is_needed=True),
    Probe(key="network", title="Network", look=look_at_network, is_needed=False),
    Probe(key="compilers", title="Compilers", look=look_at_compilers, is_needed=True),
    Probe(key="cache", title="Compiled kernels", look=look_at_cache, is_needed=False),
    Probe(key="settings", title="Settings", look=look_at_settings, is_needed=True),
    Probe(key="packages", title="Packages", look=look_at_packages, is_needed=False),
)
"""All that is looked at, in the order of the report."""


def examine(
    *,
    is_gpu_allowed: bool = True,
    timeout_s: float = DEFAULT_TIMEOUT_S,
    environ: Mapping[str, str] | None = None,
    settings_files: Sequence[Path] | None = None,
    probes: Sequence[Probe] = PROBES,
    ask: Callable[..., GpuAnswer] = ask_gpus,
) -> Report:
    """Look at everything. Raises nothing of its own: what fails is reported.

    Args:
        is_gpu_allowed: Whether the driver and CUDA may be touched. It is done in a process of its own.
        timeout_s: Deadline of that process.
        environ: The environment whose settings are read; None takes that of this process.
        settings_files: The settings files; None takes those of this process.
        probes: What to look at.
        ask: Asks the GPUs, for tests.

    Collective: no.
    """
    if is_gpu_allowed:
        gpus = ask(timeout_s, driver_only=torch_cuda_version() is None)
    else:
        gpus = GpuAnswer(not_asked_because="--no-gpu")
    environ = dict(os.environ) if environ is None else environ
    paths = settings_paths() if settings_files is None else tuple(settings_files)
    machine = Machine(environ=environ, settings_paths=paths, settings=read_all_settings(environ, paths), gpus=gpus)
    sections = tuple(_section(probe, machine) for probe in probes)
    return Report(sections=sections, has_gpu=gpus.has_gpu, is_gpu_allowed=is_gpu_allowed)


def _section(probe: Probe, machine: Machine) -> Section:
    try:
        findings = tuple(probe.look(machine))
    except Exception as error:
        text = f"this check failed: {type(error).__name__}: {error}"
        why = "please report it"
        findings = (Finding(name=probe.key, status=Status.UNKNOWN, text=text, why=why, is_needed=probe.is_needed),)
    return Section(key=probe.key, title=probe.title, findings=findings)
