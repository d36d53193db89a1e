"""Owns the look at which packages of this family are installed. None is imported."""

from __future__ import annotations

import importlib.metadata

from deep_ep_core.doctor.findings import Finding, Status
from deep_ep_core.doctor.machine import Machine

__all__ = ["look_at_packages"]

_PACKAGES = ("deep-ep-core", "deep-ep-ep", "deep-ep-pp", "deep-ep-cp", "deep-ep-engram", "deep-ep-legacy")


def look_at_packages(machine: Machine) -> list[Finding]:
    """A line a package."""
    return [_package(name) for name in _PACKAGES]


def _package(name: str) -> Finding:
    try:
        version = importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return Finding(name=name, status=Status.NOTE, text="not installed", facts={"version": None})
    return Finding(name=name, status=Status.OK, text=version, facts={"version": version})
