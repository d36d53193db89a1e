"""Owns the look at the environment variables and settings files."""

from __future__ import annotations

from deep_ep_core.doctor.findings import Finding, Status
from deep_ep_core.doctor.machine import Machine
from deep_ep_core.env import VARIABLES, Variable, read_settings
from deep_ep_core.errors import ConfigError

__all__ = ["look_at_settings"]


def look_at_settings(machine: Machine) -> list[Finding]:
    """What is set, where, and what is wrong with it."""
    findings = []
    if machine.settings.refusal:
        why, text = "every package refuses to work with it", machine.settings.refusal
        fix = "`python -m deep_ep_core.config list` shows what is stored"
        findings.append(Finding(name="settings", status=Status.MISSING, text=text, why=why, fix=fix, is_needed=True))
    findings += [Finding(name="settings", status=Status.WARNING, text=text) for text in machine.settings.warnings]
    set_at = _set_at(machine)
    for variable in VARIABLES:
        for value, source in set_at.get(variable.name, []):
            status = Status.OK if _is_allowed(variable, value) else Status.WARNING
            text = f"{value!r}, from {source}"
            if not variable.is_used:
                status, text = Status.NOTE, f"{text}, without effect: {variable.no_effect_because}"
            facts = {"value": value, "source": source}
            findings.append(Finding(name=variable.name, status=status, text=text, facts=facts))
    return findings or [Finding(name="settings", status=Status.OK, text="none is set")]


def _is_allowed(variable: Variable, value: str) -> bool:
    try:
        variable.parse(value, "")
    except ConfigError:
        return False
    return True


def _set_at(machine: Machine) -> dict[str, list[tuple[str, str]]]:
    """By variable, the value that holds and where it is set, then those that it hides."""
    layers = [("the environment", dict(machine.environ))]
    for path in machine.settings_paths:
        try:
            layers.append((str(path), read_settings(path)))
        except (ConfigError, OSError):
            # Among the refusals and warnings already.
            continue
    found: dict[str, list[tuple[str, str]]] = {}
    for variable in VARIABLES:
        for source, texts in layers:
            text = texts.get(variable.name)
            if text is not None and variable.is_set_by(text):
                hidden = " (hidden)" if variable.name in found else ""
                found.setdefault(variable.name, []).append((text, source + hidden))
    return found
