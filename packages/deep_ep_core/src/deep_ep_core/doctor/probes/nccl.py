"""Owns the look at NCCL: the library, its headers, and what a communicator of it can do here."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from deep_ep_core.doctor.findings import CU13_INSTALL, Finding, Status
from deep_ep_core.doctor.machine import Machine
from deep_ep_core.doctor.probes.torch_build import torch_cuda_version
from deep_ep_core.errors import ConfigError, TransportError

__all__ = ["look_at_nccl"]

_MAPS_PATH = Path("/proc/self/maps")
_WHY_LIBRARY = "the device backend reaches other GPUs through it"
_WHY_HEADERS = "kernels that reach GPUs of other machines are compiled with them"


def look_at_nccl(machine: Machine) -> list[Finding]:
    """Library, headers, windows, GIN."""
    library = _library_finding(machine)
    headers = _headers_finding(machine, library.facts.get("version"))
    if library.blocks_device:
        # What else fails then fails for that reason.
        later = [Finding(name=name, status=Status.UNKNOWN, text="see NCCL") for name in ("windows", "GIN")]
        return [library, headers, *later]
    return [library, headers, *_communicator_findings(machine)]


def _library_finding(machine: Machine) -> Finding:
    from deep_ep_core.nccl.library import MIN_NCCL_VERSION, find_nccl, version_text

    env = machine.settings.env
    maps_text = _MAPS_PATH.read_text() if _MAPS_PATH.exists() else ""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            # With the checks off, so that a library that will not do is described nevertheless.
            library = find_nccl(maps_text, root_dir=env.nccl_root_dir, suppress_check=True)
        except TransportError as error:
            return Finding(
                name="NCCL",
                status=Status.MISSING,
                text=str(error),
                why=_WHY_LIBRARY,
                fix=CU13_INSTALL,
                is_needed=True,
            )
    version = version_text(library.version)
    is_new_enough = library.version >= MIN_NCCL_VERSION
    facts = {"version": version, "path": library.path, "found_via": library.found_via, "is_new_enough": is_new_enough}
    text = f"{version}, {library.path}, found via {library.found_via}"
    if not is_new_enough:
        return Finding(
            name="NCCL",
            status=Status.MISSING,
            text=f"{text}, is older than {version_text(MIN_NCCL_VERSION)}",
            why=_WHY_LIBRARY,
            fix=_upgrade_command(),
            is_needed=not env.suppress_nccl_check,
            facts=facts,
        )
    if caught:
        # Of a second library.
        text, is_needed = "; ".join(str(warning.message) for warning in caught), not env.suppress_nccl_check
        return Finding(name="NCCL", status=Status.WARNING, text=text, is_needed=is_needed, facts=facts)
    return Finding(name="NCCL", status=Status.OK, text=text, is_needed=True, facts=facts)


def _upgrade_command() -> str:
    """Puts a newer NCCL in the place of torch's; for the extra pip would look for a torch that pins such a one."""
    cuda = torch_cuda_version()
    major = "13" if cuda is None else cuda.partition(".")[0]
    return f'pip install "nvidia-nccl-cu{major}>=2.30.4"'


def _headers_finding(machine: Machine, library_version: str | None) -> Finding:
    from deep_ep_core.jit.toolchain import find_nccl_headers

    missing = "nccl_device.h is in no wheel and not in /usr/local/include or /usr/include"
    try:
        headers = find_nccl_headers(machine.jit_options)
    except ConfigError as error:
        headers, missing = None, str(error)
    if headers is None:
        return Finding(name="NCCL headers", status=Status.MISSING, text=missing, why=_WHY_HEADERS, fix=CU13_INSTALL)
    version = ".".join(map(str, headers.version))
    facts = {"version": version, "include_dir": str(headers.include_dir), "found_via": headers.found_via}
    text = f"{version}, {headers.include_dir}, found via {headers.found_via}"
    if library_version is not None and version != library_version:
        return Finding(
            name="NCCL headers",
            status=Status.WARNING,
            text=f"{text}: not the version of the library, {library_version}",
            why=_WHY_HEADERS,
            fix="set EP_NCCL_ROOT_DIR to headers of that version",
            facts=facts,
        )
    return Finding(name="NCCL headers", status=Status.OK, text=text, facts=facts)


def _communicator_findings(machine: Machine) -> list[Finding]:
    found = machine.gpus.answers.get("nccl")
    if found is None:
        reason = machine.gpus.why_unknown("nccl")
        has_refused = "nccl" in machine.gpus.errors and machine.gpus.crashed_step != "nccl"
        windows = Finding(
            name="windows",
            # A crash is not a refusal: what a job would meet is not known.
            status=Status.MISSING if has_refused else Status.UNKNOWN,
            text=f"a communicator of one rank does not open: {reason}" if has_refused else reason,
            why="kernels write to other GPUs through them" if has_refused else "",
            fix="NCCL_DEBUG=INFO tells more" if has_refused else "",
            is_needed=True,
        )
        return [windows, Finding(name="GIN", status=Status.UNKNOWN, text="see windows")]
    return [_windows_finding(found), _gin_finding(machine, found)]


def _windows_finding(found: Mapping[str, Any]) -> Finding:
    extras = [("NVLink multicast", "has_multimem"), ("stream-ordered one-sided calls", "has_host_rma")]
    listed = ", ".join(f"{'' if found[key] else 'no '}{name}" for name, key in extras)
    facts = {key: found[key] for key in ("has_device_api", "has_multimem", "has_host_rma")}
    text = f"a communicator of one rank opens and can register windows; {listed}"
    return Finding(name="windows", status=Status.OK, text=text, is_needed=True, facts=facts)


def _gin_finding(machine: Machine, found: Mapping[str, Any]) -> Finding:
    gin, railed = found["gin_type"], found["railed_gin_type"]
    facts = {"gin_type": gin, "railed_gin_type": railed}
    off = "; EP_DISABLE_GIN turns it off" if machine.settings.env.disable_gin else ""
    if gin == railed == "NONE":
        text = f"none with a communicator of one rank: ranks on several machines use the collective backend{off}"
        return Finding(name="GIN", status=Status.NOTE, text=text, facts=facts)
    text = f"{gin} to any rank, {railed} along rails{off}"
    return Finding(name="GIN", status=Status.NOTE if off else Status.OK, text=text, facts=facts)
