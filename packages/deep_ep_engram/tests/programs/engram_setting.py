"""Where the checks of CUDA tensors run: every rank on a GPU, tables that must use a backend."""

from __future__ import annotations

import contextlib
import functools
import os
from collections.abc import Iterator

import engram_cases
import torch
from engram_cases import MIB, SETTING, Setting

MEMORIES = {"device": 0, "host": 2 * MIB}
"""Bytes of host memory of a table, by the name of where its entries lie."""


@contextlib.contextmanager
def on_device(memory: str, backend: str = "device") -> Iterator[None]:
    """Let cases run on this rank's GPU, with entries in that memory and tables of that backend."""
    torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")) % torch.cuda.device_count())
    before = Setting(device=SETTING.device, backend=SETTING.backend, num_cpu_bytes=SETTING.num_cpu_bytes)
    SETTING.device, SETTING.backend = "cuda", backend
    try:
        _load_torchs_kernels()
        SETTING.num_cpu_bytes = MEMORIES[memory]
        yield
    finally:
        SETTING.device, SETTING.backend, SETTING.num_cpu_bytes = before.device, before.backend, before.num_cpu_bytes


@functools.cache
def _load_torchs_kernels() -> None:
    """Run what compares results once, on a table that needs no network.

    CUDA loads a kernel when it is first used, and may wait for all that runs: also for a kernel that waits for copies
    of the loopback network, which are made with CUDA in the same process.
    """
    SETTING.num_cpu_bytes = MEMORIES["host"]
    for sf_dtype in (torch.float32, torch.int32):
        engram_cases.check_scale_layouts(sf_dtype, 2)
    torch.cuda.synchronize()


def run_case(name: str, memory: str, *arguments: object, backend: str = "device") -> object:
    """One check of `engram_cases`, by its name."""
    with on_device(memory, backend):
        return getattr(engram_cases, name)(*arguments)
