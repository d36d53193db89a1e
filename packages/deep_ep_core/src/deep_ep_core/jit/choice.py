"""Owns the choice of the compiler of a kernel, from what the options ask for and the machine offers."""

from __future__ import annotations

import os
import threading

from deep_ep_core.errors import CompileError
from deep_ep_core.jit.compiler import Compiler, NvccCompiler, NvrtcCompiler
from deep_ep_core.jit.options import JitOptions
from deep_ep_core.jit.toolchain import find_nccl_headers, find_nvcc, find_nvrtc, find_toolkit_headers

__all__ = ["CompilerChoice"]


class CompilerChoice:
    """Finds the compilers at the first need and keeps them. Safe to use from several threads.

    Args:
        options: Settings.
    """

    def __init__(self, options: JitOptions) -> None:
        self._options = options
        self._lock = threading.Lock()
        self._chosen: dict[bool, Compiler] = {}

    def choose(self, *, needs_nccl: bool) -> Compiler:
        """The compiler of kernels with or without NCCL's headers.

        NVRTC is taken where it can be: it is fast and comes with torch. nvcc is taken for NCCL's headers, which NVRTC
        does not take, where NVRTC is missing, and where `nvcc_compiler` names one.

        Raises:
            CompileError: There is none, or NCCL's headers are missing.
        """
        with self._lock:
            if needs_nccl not in self._chosen:
                self._chosen[needs_nccl] = self._find(needs_nccl)
            return self._chosen[needs_nccl]

    def _find(self, needs_nccl: bool) -> Compiler:
        options = self._options
        why_not_nvrtc = "it does not take NCCL's headers"
        if not needs_nccl and options.nvcc_compiler is None:
            nvrtc = find_nvrtc()
            if not isinstance(nvrtc, str):
                return NvrtcCompiler(nvrtc, find_toolkit_headers(options), options)
            why_not_nvrtc = nvrtc
        nvcc = find_nvcc(options)
        if nvcc is None:
            raise CompileError(
                "a kernel must be compiled, but there is no compiler: nvcc is not in CUDA_HOME, on PATH, in the wheel "
                f"nvidia-cuda-nvcc or in /usr/local/cuda; NVRTC is not used because {why_not_nvrtc}. Install "
                "deep-ep-core[cu13] or a CUDA toolkit, or set EP_JIT_NVCC_COMPILER",
                command="nvcc",
                log="",
            )
        nccl = find_nccl_headers(options) if needs_nccl else None
        if needs_nccl and nccl is None:
            raise CompileError(
                "a kernel needs NCCL's device headers, but nccl_device.h is neither in the wheel nvidia-nccl-cu13 nor "
                "in /usr/local/include or /usr/include; install NCCL 2.30.4 or newer, or set EP_NCCL_ROOT_DIR",
                command=str(nvcc.path),
                log="",
            )
        return NvccCompiler(nvcc, options, nccl, os.environ)
