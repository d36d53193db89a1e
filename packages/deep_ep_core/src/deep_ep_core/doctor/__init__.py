"""Tells what this machine can do, what is missing and what to install: `python -m deep_ep_core.doctor`.

`examine` looks and returns a `Report`. Nothing is looked at when this is imported, and torch is not imported here: one
that does not import is among the findings.
"""

from __future__ import annotations

from deep_ep_core.doctor.examine import examine
from deep_ep_core.doctor.findings import Finding, Section, Status
from deep_ep_core.doctor.report import Report

__all__ = ["Finding", "Report", "Section", "Status", "examine"]
