"""A rank that uses the GPU which the launcher gives it.

Usage: gpu_rank.py report FOLDER | kill FOLDER. `report` computes on the GPU and prints what it found as a JSON line;
`kill` lets rank 1 die while its kernel runs and the others wait. FOLDER is empty, and all ranks share it.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from pathlib import Path

import torch

# Some seconds, at 1 to 2 GHz.
KERNEL_CYCLES = 8_000_000_000


def take_gpu() -> torch.device:
    device = torch.device("cuda", int(os.environ["LOCAL_RANK"]) % torch.cuda.device_count())
    torch.cuda.set_device(device)
    return device


def report() -> dict[str, object]:
    """A sum that the GPU computed, the GPU, and the environment."""
    device = take_gpu()
    total = int(torch.arange(1000, device=device).sum())
    return {
        "sum": total,
        "gpu": f"GPU-{torch.cuda.get_device_properties(device).uuid}",
        "environment": dict(os.environ),
    }


def die_while_kernel_runs() -> None:
    take_gpu()
    torch.zeros(1, device="cuda")
    torch.cuda.synchronize()
    done = torch.cuda.Event()
    torch.cuda._sleep(KERNEL_CYCLES)
    done.record()
    time.sleep(0.5)
    assert not done.query(), "the kernel must still run"
    os.kill(os.getpid(), signal.SIGKILL)


def wait_with_gpu() -> None:
    """Be a client of the GPU until the launcher ends this rank."""
    take_gpu()
    torch.zeros(1, device="cuda")
    torch.cuda.synchronize()


def main() -> None:
    action, folder = sys.argv[1], Path(sys.argv[2])
    rank, num_ranks = os.environ["RANK"], int(os.environ["WORLD_SIZE"])
    if action == "report":
        print(json.dumps(report()), flush=True)
        return
    wait_with_gpu()
    (folder / rank).touch()
    while len(list(folder.iterdir())) < num_ranks:
        time.sleep(0.01)
    if rank == "1":
        die_while_kernel_runs()
    time.sleep(3600)


if __name__ == "__main__":
    main()
