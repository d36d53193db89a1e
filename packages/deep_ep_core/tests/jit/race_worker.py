"""One process of the race tests: builds the toy kernel with a compiler that is slow and writes down each call.

usage: race_worker.py CACHE_DIR CALLS_FILE COMPILE_S
"""

from __future__ import annotations

import hashlib
import os
import sys
import time
from pathlib import Path

import toy_kernels

from deep_ep_core.jit import Builder, CompileJob, CompileOutput, JitOptions


class SlowCompiler:
    identity = "slow 1.0"

    def __init__(self, calls_path: Path, compile_s: float) -> None:
        self._calls_path = calls_path
        self._compile_s = compile_s

    def key_flags(self, job: CompileJob) -> tuple[str, ...]:
        return ()

    def compile(self, job: CompileJob) -> CompileOutput:
        with self._calls_path.open("a") as file:
            file.write(f"{os.getpid()}\n")
        time.sleep(self._compile_s)
        # Another compilation would give other bytes, so that equal cubins prove that one was shared.
        return CompileOutput(cubin=os.urandom(64), log="", command="slow")


def main() -> None:
    cache_dir, calls_path, compile_s = Path(sys.argv[1]), Path(sys.argv[2]), float(sys.argv[3])
    print("ready", flush=True)
    sys.stdin.readline()
    builder = Builder(JitOptions(cache_dir=cache_dir), compiler=SlowCompiler(calls_path, compile_s))
    kernel = builder.build(toy_kernels.scale_spec(), "sm_90a")
    print(kernel.name, hashlib.sha256(kernel.cubin).hexdigest(), flush=True)


if __name__ == "__main__":
    main()
