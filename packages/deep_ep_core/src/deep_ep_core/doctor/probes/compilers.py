"""Owns the look at what compiles and launches kernels: cuda-bindings, NVRTC, nvcc, the host compiler, ninja."""

from __future__ import annotations

import importlib
import importlib.metadata
import shutil
import subprocess
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from deep_ep_core.doctor.findings import CU13_INSTALL, Finding, Status
from deep_ep_core.doctor.machine import Machine
from deep_ep_core.errors import CompileError, ConfigError

__all__ = ["look_at_compilers"]

_TOOL_TIMEOUT_S = 10.0


def look_at_compilers(machine: Machine) -> list[Finding]:
    """Every part alone, then whether the parts make a compiler, and whether the driver loads what it compiles."""
    nvrtc, headers, nvcc, host = _nvrtc(), _toolkit_headers(machine), _nvcc(machine), _host_compiler(machine.environ)
    findings = [_bindings(), nvrtc, headers, nvcc, host, _ninja()]
    # As `jit.choice` does for kernels without NCCL's headers.
    is_nvrtc_used = nvrtc.status is Status.OK and machine.settings.env.jit_nvcc_compiler is None
    parts = (nvrtc, headers) if is_nvrtc_used else (nvcc, host)
    lacking = [part.name for part in parts if part.status is not Status.OK]
    if lacking:
        text = f"no kernel can be compiled: {' and '.join(lacking)} is not there"
        choice = Finding(
            name="compiling",
            status=Status.MISSING,
            text=text,
            why="kernels are compiled when they are first used",
            fix=CU13_INSTALL,
            is_needed=True,
        )
        return [*findings, choice]
    compiler = parts[0]
    text = f"{compiler.name} compiles kernels"
    if is_nvrtc_used:
        can_reach_others = nvcc.status is Status.OK and host.status is Status.OK
        text += f"; for those that reach other machines, nvcc is {'there' if can_reach_others else 'not ready'}"
    findings.append(Finding(name="compiling", status=Status.OK, text=text, is_needed=True))
    too_old = _driver_too_old(machine, compiler)
    return findings if too_old is None else [*findings, too_old]


def _bindings() -> Finding:
    why = "kernels are launched through it"
    try:
        importlib.import_module("cuda.bindings.driver")
        version = importlib.metadata.version("cuda-bindings")
    except ImportError as error:
        text = f"does not import ({error})"
        return Finding(
            name="cuda-bindings", status=Status.MISSING, text=text, why=why, fix=CU13_INSTALL, is_needed=True
        )
    return Finding(name="cuda-bindings", status=Status.OK, text=version, is_needed=True, facts={"version": version})


def _nvrtc() -> Finding:
    from deep_ep_core.jit.toolchain import find_nvrtc

    found = find_nvrtc()
    if isinstance(found, str):
        why = "it compiles most kernels, faster than nvcc"
        return Finding(name="NVRTC", status=Status.MISSING, text=found, why=why, fix=CU13_INSTALL)
    return Finding(name="NVRTC", status=Status.OK, text=found.version, facts={"version": found.version})


def _toolkit_headers(machine: Machine) -> Finding:
    from deep_ep_core.jit.toolchain import find_toolkit_headers

    found = find_toolkit_headers(machine.jit_options)
    if found is None:
        text, why = "no cuda_bf16.h with libcu++ in NVIDIA's wheels or a toolkit", "NVRTC needs them"
        return Finding(name="CUDA headers", status=Status.MISSING, text=text, why=why, fix=CU13_INSTALL)
    facts = {"include_dir": str(found.include_dirs[0]), "version": found.version, "found_via": found.found_via}
    text = f"{found.version}, {found.include_dirs[0]}, found via {found.found_via}"
    return Finding(name="CUDA headers", status=Status.OK, text=text, facts=facts)


def _nvcc(machine: Machine) -> Finding:
    from deep_ep_core.jit.toolchain import find_nvcc

    text = "not in CUDA_HOME, on PATH, in a wheel or in /usr/local/cuda"
    try:
        found = find_nvcc(machine.jit_options)
    except (ConfigError, CompileError) as error:
        found, text = None, str(error)
    if found is None:
        why = "it compiles kernels that reach other machines, and all where NVRTC is missing"
        return Finding(name="nvcc", status=Status.MISSING, text=text, why=why, fix=CU13_INSTALL)
    facts = {"version": found.version, "path": str(found.path), "found_via": found.found_via}
    text = f"{found.version}, {found.path}, found via {found.found_via}"
    return Finding(name="nvcc", status=Status.OK, text=text, facts=facts)


def _host_compiler(environ: Mapping[str, str]) -> Finding:
    # What nvcc runs: the program or folder of NVCC_CCBIN, else the g++ on PATH.
    wanted = environ.get("NVCC_CCBIN", "")
    path = shutil.which(str(Path(wanted, "g++")) if wanted and Path(wanted).is_dir() else wanted or "g++")
    if path is None:
        return Finding(
            name="host compiler",
            status=Status.MISSING,
            text=f"{wanted or 'g++'} is not on PATH",
            why="nvcc needs one",
            fix="install g++ with the system's package manager, for example apt-get install g++",
        )
    return _program("host compiler", path)


def _ninja() -> Finding:
    from deep_ep_core.jit.precompile import find_ninja

    path = find_ninja()
    if path is None:
        why = "precompiling many kernels with nvcc uses it, and threads without it"
        return Finding(name="ninja", status=Status.MISSING, text="not on PATH", why=why, fix="pip install ninja")
    return _program("ninja", str(path))


def _program(name: str, path: str) -> Finding:
    facts: dict[str, Any] = {"path": path, "version": None}
    try:
        answer = subprocess.run(
            [path, "--version"], capture_output=True, text=True, errors="replace", timeout=_TOOL_TIMEOUT_S, check=True
        )
    except (OSError, subprocess.SubprocessError) as error:
        return Finding(name=name, status=Status.UNKNOWN, text=f"{path} --version fails: {error}", facts=facts)
    version = (answer.stdout.strip().splitlines() or [""])[0]
    return Finding(name=name, status=Status.OK, text=f"{version}, {path}", facts={**facts, "version": version})


def _driver_too_old(machine: Machine, compiler: Finding) -> Finding | None:
    """A driver loads machine code of compilers of its own major version of CUDA and of older ones."""
    driver = machine.gpus.driver
    cuda_version = None if driver is None else driver["cuda_version"]
    if cuda_version is None:
        return None
    major = int(compiler.facts["version"].split(".")[0])
    if major <= cuda_version[0]:
        return None
    return Finding(
        name="driver for it",
        status=Status.MISSING,
        text=f"{compiler.name} is of CUDA {major}, the driver of CUDA {cuda_version[0]}",
        why="the driver does not load what a newer major version compiles",
        fix=f"install a driver for CUDA {major}, a package of the system",
        is_needed=True,
        facts={"compiler_cuda_major": major, "driver_cuda_major": cuda_version[0]},
    )
