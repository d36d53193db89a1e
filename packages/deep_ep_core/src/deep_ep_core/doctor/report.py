"""Owns what follows from the findings, and how they are shown: as text, as JSON, and as an exit status."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

from deep_ep_core import __version__
from deep_ep_core.doctor.findings import Finding, Section, Status
from deep_ep_core.doctor.probes.torch_build import GLOO

__all__ = ["SCHEMA_VERSION", "Report"]

SCHEMA_VERSION = 1
"""Goes up when a key of the JSON object is removed or changes its meaning."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Report:
    """What was found on this machine.

    Attributes:
        sections: The findings.
        has_gpu: Whether there is a GPU; None if unknown.
        is_gpu_allowed: Whether GPUs were looked for.
    """

    sections: tuple[Section, ...]
    has_gpu: bool | None
    is_gpu_allowed: bool

    @property
    def findings(self) -> list[Finding]:
        """The findings of all sections."""
        return [finding for section in self.sections for finding in section.findings]

    @property
    def can_run_device(self) -> bool | None:
        """Whether the device backend can run here; None if unknown."""
        if self.has_gpu is False:
            return False
        if self.is_gpu_allowed and any(finding.blocks_device for finding in self.findings):
            return False
        if self.has_gpu is None or any(finding.leaves_device_open for finding in self.findings):
            return None
        return True

    @property
    def can_run_collective_on_cpu(self) -> bool:
        """Whether the collective backend can run here on CPU tensors."""
        return any(finding.name == GLOO and finding.status is Status.OK for finding in self.findings)

    @property
    def reasons(self) -> list[str]:
        """Why the device backend cannot run, or why that is unknown; empty if it can."""
        if self.can_run_device:
            return []
        if self.has_gpu is False:
            return ["this machine has no GPU"]
        if not self.is_gpu_allowed:
            return ["GPUs were not looked for (--no-gpu)"]
        chosen = [finding for finding in self.findings if finding.blocks_device]
        chosen = chosen or [finding for finding in self.findings if finding.leaves_device_open]
        # Several may fail for one reason.
        return list(dict.fromkeys(f"{finding.name}: {finding.text}" for finding in chosen)) or [
            "whether there is a GPU is unknown"
        ]

    @property
    def auto_backend(self) -> str | None:
        """What `backend="auto"` takes for CUDA tensors in a package that has both backends; None if unknown."""
        return {True: "device", False: "collective", None: None}[self.can_run_device]

    def exit_status(self, *, is_device_required: bool = False) -> int:
        """0 if the device backend can run, or there is no GPU that it could run on; else 1.

        Args:
            is_device_required: Whether it must be able to run.
        """
        if self.can_run_device:
            return 0
        is_without_gpu = self.has_gpu is False or not self.is_gpu_allowed
        return 0 if is_without_gpu and self.can_run_collective_on_cpu and not is_device_required else 1

    def json_text(self, *, is_device_required: bool = False) -> str:
        """One JSON object; `docs/guides/doctor.md` describes it.

        Args:
            is_device_required: As for `exit_status`.
        """
        return json.dumps(
            {
                "schema": SCHEMA_VERSION,
                "deep_ep_core": __version__,
                "has_gpu": self.has_gpu,
                "can_run_device": self.can_run_device,
                "can_run_collective_on_cpu": self.can_run_collective_on_cpu,
                "auto_backend": self.auto_backend,
                "reasons": self.reasons,
                "exit_status": self.exit_status(is_device_required=is_device_required),
                "sections": [
                    {
                        "key": section.key,
                        "title": section.title,
                        "findings": [_as_json(finding) for finding in section.findings],
                    }
                    for section in self.sections
                ],
            },
            indent=1,
        )

    def text(self) -> str:
        """The report for people: a line a finding, the sections apart, and at the end what follows."""
        width = max((len(finding.name) for finding in self.findings), default=0)
        lines = [f"deep-ep-core {__version__}"]
        for section in self.sections:
            lines += ["", section.title]
            lines += [_line(finding, width) for finding in section.findings]
        return "\n".join([*lines, "", *self._conclusion()]) + "\n"

    def _conclusion(self) -> list[str]:
        on_cpu = "works" if self.can_run_collective_on_cpu else "does not work, see above,"
        cpu = f"CPU tensors: the collective backend {on_cpu} on this machine."
        if self.can_run_device:
            return ["CUDA tensors: auto takes the device backend, where a package has one.", cpu]
        if self.can_run_device is None:
            head = "CUDA tensors: whether the device backend can run is unknown:"
        elif self.has_gpu is False:
            return ["CUDA tensors: none, this machine has no GPU.", cpu]
        else:
            head = "CUDA tensors: auto takes the collective backend. The device backend cannot run:"
        return [head, *(f"  {reason}" for reason in self.reasons), cpu]


def _line(finding: Finding, width: int) -> str:
    return f"  {finding.status.value:<7}  {finding.name:<{width}}  {finding.sentence}"


def _as_json(finding: Finding) -> dict[str, Any]:
    return {
        "name": finding.name,
        "status": finding.status.value,
        "text": finding.text,
        "why": finding.why,
        "fix": finding.fix,
        "is_needed": finding.is_needed,
        "facts": dict(finding.facts),
    }
