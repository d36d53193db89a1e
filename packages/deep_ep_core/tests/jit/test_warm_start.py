"""A process that starts where another has compiled before."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from deep_ep_core.jit import Compiler

WORKER = Path(__file__).with_name("warm_start_worker.py")
DEADLINE_S = 300.0


def run_worker(cache_dir: Path, kind: str) -> Any:
    command = [sys.executable, str(WORKER), str(cache_dir), kind, "sm_90a"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=DEADLINE_S, check=False)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.mark.timeout(3 * DEADLINE_S)
def test_second_process_compiles_nothing(real_compiler: Compiler, tmp_path: Path) -> None:
    """Whatever a key covers must come out alike in every process: an order of a set or a path of its own would not."""
    kind = real_compiler.identity.split()[0]
    first, second = (run_worker(tmp_path / "cache", kind) for _ in range(2))
    assert first["num_compiled"] == len(first["cubins"]) == 5
    assert second["num_compiled"] == 0
    assert second["cubins"] == first["cubins"]
