"""Owns the two compilers, nvcc as a process and NVRTC as a library, behind one protocol: source text in, cubin out.

Which of the two compiles a kernel, where the result is kept and how a failure is reported is decided in `builder`.
"""

from __future__ import annotations

import contextlib
import os
import re
import shlex
import signal
import subprocess
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from deep_ep_core.errors import ConfigError
from deep_ep_core.jit.options import JitOptions
from deep_ep_core.jit.toolchain import SYSTEM_INCLUDE_DIRS, NcclHeaders, Nvcc, Nvrtc, ToolkitHeaders, nvrtc_call

__all__ = [
    "CompileJob",
    "CompileOutput",
    "Compiler",
    "NvccCompiler",
    "NvrtcCompiler",
    "arch_name",
    "describe_status",
    "parse_arch",
]

# A kernel with NCCL's headers takes seconds. This only ends a compiler that hangs, so that no rank waits for ever.
_COMPILER_TIMEOUT_S = 1800.0
# Variables with which a user changes what nvcc does, so they belong to the key like any flag.
_NVCC_FLAG_VARIABLES = ("NVCC_PREPEND_FLAGS", "NVCC_APPEND_FLAGS")
# ptxas: spend registers up to the launch bounds instead of saving them; 10 is the highest level.
_REGISTER_USAGE_LEVEL = "--register-usage-level=10"


@dataclass(frozen=True, slots=True, kw_only=True)
class CompileJob:
    """What a compiler is given.

    Attributes:
        source: The translation unit.
        arch: Architecture, for example `sm_90a`.
        include_dirs: Include directories of our own headers.
        needs_nccl: Whether NCCL's headers are included.
        with_ptx: Whether PTX is wanted too.
    """

    source: str
    arch: str
    include_dirs: tuple[Path, ...]
    needs_nccl: bool = False
    with_ptx: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class CompileOutput:
    """What a compiler gave back.

    Attributes:
        cubin: The machine code, or None when it failed.
        log: All that it printed.
        command: The command, or the option list of NVRTC, to be read by a person.
        failure: How it failed, for example `exit status 2`; empty when it did not.
        ptx: The PTX, if it was wanted.
    """

    cubin: bytes | None
    log: str
    command: str
    failure: str = ""
    ptx: str | None = None


class Compiler(Protocol):
    """A compiler of CUDA C++ for one architecture at a time. Methods may be called from several threads at once."""

    @property
    def identity(self) -> str:
        """Kind and full version, for example `nvcc 13.0.88`."""

    def key_flags(self, job: CompileJob) -> tuple[str, ...]:
        """All that decides the machine code besides texts: flags and versions, without any absolute include path."""

    def compile(self, job: CompileJob) -> CompileOutput:
        """Compile. A failure of the program is in the result; it is not raised."""


def arch_name(major: int, minor: int) -> str:
    """The compiler's name of a compute capability, with the instructions of just that architecture from 9.0 on.

    `(9, 0)` gives `sm_90a`, `(10, 0)` gives `sm_100a`, `(8, 6)` gives `sm_86`.
    """
    return f"sm_{major}{minor}{'a' if major >= 9 else ''}"


def parse_arch(text: str) -> str:
    """Read an architecture as a person writes it: `9.0`, `90`, `90a`, `sm_90` or `sm_90a` all give `sm_90a`.

    Raises:
        ConfigError: It is none of these.
    """
    match = re.fullmatch(r"(?:sm_)?(\d+)\.?(\d)[af]?", text.strip())
    if match is None:
        raise ConfigError(f"an architecture must be like 9.0 or sm_90a (got {text!r})")
    return arch_name(int(match[1]), int(match[2]))


class NvccCompiler:
    """Nvcc, run as a process in a folder of its own.

    Args:
        nvcc: The program.
        options: The C++ standard and what to embed.
        nccl: NCCL's headers, for jobs that need them.
        environ: The environment that the program runs in, kept as the attribute of that name.
    """

    def __init__(self, nvcc: Nvcc, options: JitOptions, nccl: NcclHeaders | None, environ: Mapping[str, str]) -> None:
        self._nvcc = nvcc
        self._options = options
        self._nccl = nccl
        self.environ = dict(environ)

    @property
    def identity(self) -> str:
        """Kind and full version."""
        return f"nvcc {self._nvcc.version}"

    def key_flags(self, job: CompileJob) -> tuple[str, ...]:
        """All that decides the machine code besides texts."""
        versions = () if self._nccl is None or not job.needs_nccl else (f"nccl={self._nccl.digest}",)
        user_flags = (f"{name}={self.environ[name]}" for name in _NVCC_FLAG_VARIABLES if self.environ.get(name))
        return (*self._flags(job), *versions, *user_flags)

    def _flags(self, job: CompileJob) -> tuple[str, ...]:
        flags = [
            f"-std=c++{self._options.cpp_standard}",
            "-O3",
            "--expt-relaxed-constexpr",
            # The short form -arch may compile for the plain architecture as well.
            f"-gencode=arch={job.arch.replace('sm_', 'compute_')},code={job.arch}",
            f"-Xptxas=-v,{_REGISTER_USAGE_LEVEL}",
        ]
        if self._options.with_lineinfo:
            flags.append("-lineinfo")
        if self._options.gin_gdaki_debug and job.needs_nccl:
            flags.append("-DNCCL_DEVICE_GIN_GDAKI_ENABLE_DEBUG=1")
        return tuple(flags)

    def compile(self, job: CompileJob) -> CompileOutput:
        """Compile in a temporary folder."""
        with tempfile.TemporaryDirectory(prefix="deep_ep_jit_") as folder_name:
            folder = Path(folder_name)
            self.write_source(job, folder)
            log, failure = "", ""
            for command in self.commands(job):
                step_log, failure = self._run(command, folder)
                log += step_log
                if failure:
                    break
            return self.collect(job, folder, log=log, failure=failure)

    def write_source(self, job: CompileJob, folder: Path) -> None:
        """Put the source where `commands` expects it."""
        (folder / "kernel.cu").write_text(job.source, encoding="utf-8")

    def commands(self, job: CompileJob) -> list[list[str]]:
        """The commands, to be run in a folder with the source, that write `kernel.cubin` there, and PTX if wanted."""
        shared = [str(self._nvcc.path), *self._flags(job), *(f"-I{path}" for path in job.include_dirs)]
        if job.needs_nccl and self._nccl is not None and self._nccl.include_dir not in SYSTEM_INCLUDE_DIRS:
            # As a system directory: warnings in headers that are not ours help nobody.
            shared += ["-isystem", str(self._nccl.include_dir)]
        kinds = ("cubin", "ptx") if job.with_ptx else ("cubin",)
        return [[*shared, f"-{kind}", "kernel.cu", "-o", f"kernel.{kind}"] for kind in kinds]

    def collect(self, job: CompileJob, folder: Path, *, log: str, failure: str) -> CompileOutput:
        """Turn what the commands left in `folder` into an output."""
        command = "\n".join(shlex.join(command) for command in self.commands(job))
        cubin_path = folder / "kernel.cubin"
        cubin = cubin_path.read_bytes() if not failure and cubin_path.is_file() else None
        if not failure and not cubin:
            cubin, failure = None, "no output, though it reported success"
        ptx = (folder / "kernel.ptx").read_text(encoding="utf-8") if cubin is not None and job.with_ptx else None
        return CompileOutput(cubin=cubin, log=log, command=command, failure=failure, ptx=ptx)

    def _run(self, command: Sequence[str], folder: Path) -> tuple[str, str]:
        """Run one command; return what it printed and how it failed, if it did."""
        try:
            process = subprocess.Popen(
                command,
                # A file of the caller's folder must not shadow a standard header.
                cwd=folder,
                env=self.environ,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                encoding="utf-8",
                errors="replace",
                start_new_session=True,
            )
        except OSError as error:
            return "", f"it did not start: {error}"
        try:
            log, _ = process.communicate(timeout=_COMPILER_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            _kill_group(process)
            return process.communicate()[0], f"it was stopped after {_COMPILER_TIMEOUT_S:.0f} s"
        except BaseException:
            # nvcc starts programs of its own; an interrupt must end them too.
            _kill_group(process)
            process.wait()
            raise
        return log, describe_status(process.returncode)


def describe_status(status: int) -> str:
    """Say how a program ended, in Python's numbering of exit statuses; empty for success."""
    if status < 0:
        try:
            return f"killed by {signal.Signals(-status).name}"
        except ValueError:
            return f"killed by signal {-status}"
    return f"exit status {status}" if status else ""


def _kill_group(process: subprocess.Popen[str]) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)


class NvrtcCompiler:
    """NVRTC, called in this process. It takes no NCCL header.

    Args:
        nvrtc: The library.
        toolkit: The toolkit's headers, or None where there are none.
        options: The C++ standard and what to embed.
    """

    def __init__(self, nvrtc: Nvrtc, toolkit: ToolkitHeaders | None, options: JitOptions) -> None:
        self._nvrtc = nvrtc
        self._toolkit = toolkit
        self._options = options

    @property
    def identity(self) -> str:
        """Kind and full version."""
        return f"nvrtc {self._nvrtc.version}"

    def key_flags(self, job: CompileJob) -> tuple[str, ...]:
        """All that decides the machine code besides texts."""
        return (*self._flags(job), f"toolkit={'' if self._toolkit is None else self._toolkit.version}")

    def _flags(self, job: CompileJob) -> tuple[str, ...]:
        flags = [
            f"-std=c++{self._options.cpp_standard}",
            f"--gpu-architecture={job.arch}",
            # What nvcc allows with --expt-relaxed-constexpr.
            "--device-as-default-execution-space",
            "--ptxas-options=-v",
            f"--ptxas-options={_REGISTER_USAGE_LEVEL}",
        ]
        if self._options.with_lineinfo:
            flags.append("--generate-line-info")
        return tuple(flags)

    def compile(self, job: CompileJob) -> CompileOutput:
        """Compile in memory."""
        toolkit_dirs = () if self._toolkit is None else self._toolkit.include_dirs
        flags = [*self._flags(job), *(f"-I{path}" for path in (*job.include_dirs, *toolkit_dirs))]
        api, command = self._nvrtc.api, f"nvrtcCompileProgram: {shlex.join(flags)}"
        program = nvrtc_call(api, "nvrtcCreateProgram", job.source.encode(), b"kernel.cu", 0, [], [])
        try:
            status = api.nvrtcCompileProgram(program, len(flags), [flag.encode() for flag in flags])[0]
            log = self._read("ProgramLog", program).rstrip(b"\0 ").decode("utf-8", errors="replace")
            if status != api.nvrtcResult.NVRTC_SUCCESS:
                return CompileOutput(cubin=None, log=log, command=command, failure=status.name)
            ptx = self._read("PTX", program).rstrip(b"\0").decode() if job.with_ptx else None
            return CompileOutput(cubin=self._read("CUBIN", program), log=log, command=command, ptx=ptx)
        finally:
            nvrtc_call(api, "nvrtcDestroyProgram", program)

    def _read(self, what: str, program: object) -> bytes:
        buffer = bytearray(nvrtc_call(self._nvrtc.api, f"nvrtcGet{what}Size", program))
        nvrtc_call(self._nvrtc.api, f"nvrtcGet{what}", program, buffer)
        return bytes(buffer)
