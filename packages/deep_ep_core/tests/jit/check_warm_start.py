"""Measures on a GPU how long a process that finds all its kernels in the cache is busy with them.

usage: python check_warm_start.py

Not a pytest module; it needs what `gpu_check.py` needs, which runs it as a part. For each compiler that is there, two
processes start one after the other with a new cache. The second must compile nothing, load the same machine code, and
be busy with the JIT for less than a second; the import of torch and the CUDA context do not count.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from deep_ep_core.jit import JitOptions
from deep_ep_core.jit.toolchain import find_nvcc, find_nvrtc

WORKER = Path(__file__).with_name("warm_start_worker.py")
MAX_WARM_MS = 1000.0
DEADLINE_S = 600.0


def main() -> int:
    options = JitOptions(cache_dir=Path("unused"))
    is_found = {"nvcc": find_nvcc(options) is not None, "nvrtc": not isinstance(find_nvrtc(), str)}
    kinds = [kind for kind, is_there in is_found.items() if is_there]
    return 0 if check_warm_start(kinds) else 1


def check_warm_start(kinds: Sequence[str]) -> bool:
    """Print a line for each process, and return whether all is as it must be.

    Args:
        kinds: The compilers, "nvcc" or "nvrtc"; at least one.
    """
    print(f"\n{'process start':<28}{'compiled':>9}{'JIT ms':>9}{'choice ms':>11}{'ms a kernel':>13}  result")
    results = [_check_compiler(kind) for kind in kinds]
    return all(results) and len(results) > 0


def _check_compiler(kind: str) -> bool:
    with tempfile.TemporaryDirectory() as cache_dir:
        first, second = (_run_worker(Path(cache_dir), kind) for _ in range(2))
    num_kernels = len(first["cubins"])
    is_cold = first["num_compiled"] == num_kernels
    is_warm = second["num_compiled"] == 0 and second["cubins"] == first["cubins"] and second["jit_ms"] < MAX_WARM_MS
    for name, answer, is_right in (("new cache", first, is_cold), ("warm cache", second, is_warm)):
        mean_ms = sum(answer["kernels_ms"]) / num_kernels
        print(
            f"{answer['compiler'] + ', ' + name:<28}{answer['num_compiled']:>9}{answer['jit_ms']:>9.1f}"
            f"{answer['choice_ms']:>11.1f}{mean_ms:>13.1f}  {'right' if is_right else 'WRONG'}"
        )
    return is_cold and is_warm


def _run_worker(cache_dir: Path, kind: str) -> Any:
    done = subprocess.run(
        [sys.executable, str(WORKER), str(cache_dir), kind],
        stdout=subprocess.PIPE,
        text=True,
        timeout=DEADLINE_S,
        check=True,
    )
    return json.loads(done.stdout)


if __name__ == "__main__":
    sys.exit(main())
