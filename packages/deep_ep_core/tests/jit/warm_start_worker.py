"""One process of the warm start tests: builds core's barrier and the toy kernels, and says what that took.

usage: warm_start_worker.py CACHE_DIR nvcc|nvrtc [ARCH]

With an architecture nothing is loaded, and no GPU is needed; without one every kernel is loaded on the current device.
Prints one JSON line: `compiler`, `num_compiled`, `choice_ms` (finding the compiler), `kernels_ms` (a list, from each
spec to its machine code or its loaded kernel), `jit_ms` (all of it) and `cubins` (digests by name).
"""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
import json
import sys
import time
from pathlib import Path

import torch
import toy_kernels

from deep_ep_core.barrier import lsa_barrier_spec
from deep_ep_core.jit import Builder, CompiledKernel, CompileJob, CompileOutput, Compiler, JitOptions, get_kernel
from deep_ep_core.jit.choice import CompilerChoice
from deep_ep_core.jit.toolchain import find_nvcc


class CountingCompiler:
    """Another compiler, and how often it is asked."""

    def __init__(self, compiler: Compiler) -> None:
        self.identity = compiler.identity
        self.num_calls = 0
        self._compiler = compiler

    def key_flags(self, job: CompileJob) -> tuple[str, ...]:
        return self._compiler.key_flags(job)

    def compile(self, job: CompileJob) -> CompileOutput:
        self.num_calls += 1
        return self._compiler.compile(job)


def main() -> None:
    cache_dir, kind, arch = Path(sys.argv[1]), sys.argv[2], (sys.argv[3:] or [None])[0]
    options = JitOptions(cache_dir=cache_dir)
    if kind == "nvcc":
        # As where EP_JIT_NVCC_COMPILER names it; NVRTC would be preferred otherwise.
        nvcc = find_nvcc(options)
        assert nvcc is not None
        options = dataclasses.replace(options, nvcc_compiler=nvcc.path)
    if arch is None:
        # The context is torch's, in any process, and no part of the time taken.
        torch.zeros(1, device="cuda")

    start = time.perf_counter()
    compiler = CountingCompiler(CompilerChoice(options).choose(needs_nccl=False))
    builder = Builder(options, compiler=compiler)
    stamps = [time.perf_counter()]
    kernels: list[CompiledKernel] = []
    for spec in (lsa_barrier_spec(), *toy_kernels.all_specs()):
        if arch is None:
            kernels.append(get_kernel(spec, torch.cuda.current_device(), builder=builder).compiled)
        else:
            kernels.append(builder.build(spec, arch))
        stamps.append(time.perf_counter())

    assert compiler.identity.startswith(kind), f"{kind} must be chosen (got {compiler.identity})"
    answer = {
        "compiler": compiler.identity,
        "num_compiled": compiler.num_calls,
        "choice_ms": (stamps[0] - start) * 1e3,
        "kernels_ms": [(end - begin) * 1e3 for begin, end in itertools.pairwise(stamps)],
        "jit_ms": (stamps[-1] - start) * 1e3,
        "cubins": {kernel.name: hashlib.sha256(kernel.cubin).hexdigest() for kernel in kernels},
    }
    print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    main()
