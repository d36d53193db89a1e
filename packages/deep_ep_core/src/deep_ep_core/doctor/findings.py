"""Owns the form of what the doctor finds. What is looked at is in `probes`, what follows from it in `report`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import Enum
from typing import Any

__all__ = ["CU13_INSTALL", "Finding", "Section", "Status"]

CU13_INSTALL = 'pip install "deep-ep-core[cu13]"'
"""Installs NVIDIA's parts for run-time compilation and NCCL, where torch does not bring them."""


class Status(Enum):
    """How something stands."""

    OK = "ok"
    NOTE = "note"
    WARNING = "warning"
    MISSING = "missing"
    UNKNOWN = "unknown"


@dataclass(frozen=True, slots=True, kw_only=True)
class Finding:
    """One thing that was looked at: one line of the report.

    Attributes:
        name: What was looked at.
        status: How it stands.
        text: What was found.
        why: What it is for, where it is not there.
        fix: What to do, the exact command where there is one.
        is_needed: Whether the device backend runs only if this is no warning, not missing and not unknown.
        facts: The same for programs; values that JSON has.
    """

    name: str
    status: Status
    text: str
    why: str = ""
    fix: str = ""
    is_needed: bool = False
    facts: Mapping[str, Any] = field(default_factory=dict)

    @property
    def blocks_device(self) -> bool:
        """Whether the device backend cannot run because of it."""
        return self.is_needed and self.status in (Status.MISSING, Status.WARNING)

    @property
    def leaves_device_open(self) -> bool:
        """Whether it is not known if the device backend can run because of it."""
        return self.is_needed and self.status is Status.UNKNOWN

    @property
    def sentence(self) -> str:
        """All that is said of it, on one line."""
        return " ".join("; ".join(part for part in (self.text, self.why, self.fix) if part).split())


@dataclass(frozen=True, slots=True, kw_only=True)
class Section:
    """What one probe found.

    Attributes:
        key: Name for programs.
        title: Name for people.
        findings: What was found, in the order of the report.
    """

    key: str
    title: str
    findings: tuple[Finding, ...]
