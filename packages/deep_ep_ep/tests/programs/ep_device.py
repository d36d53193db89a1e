"""The checks of `ep_modes` on the device backend: every rank on a GPU, several may share one.

usage: python -m deep_ep_core.launch --device cuda --ranks 4 ep_device.py [check ...]
"""

from __future__ import annotations

import contextlib
import os
import sys
import time
from collections.abc import Callable, Iterator

import ep_modes
import torch
import torch.distributed as dist
from ep_cases import SETTING

from deep_ep_core.local import run_as_script

RECV_MEMORIES = ("auto", "torch", "window")


@contextlib.contextmanager
def on_device(recv_memory: str, **options: object) -> Iterator[None]:
    """Let cases run on this rank's GPU and buffers use the device backend."""
    torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")) % torch.cuda.device_count())
    SETTING.device = "cuda"
    SETTING.options = {"backend": "device", "recv_memory": recv_memory, "num_gpu_timeout_secs": 20, **options}
    try:
        yield
    finally:
        SETTING.device, SETTING.options = "cpu", {}


def run_check(name: str, recv_memory: str, *arguments: object) -> object:
    """One check of `ep_modes`, by its name."""
    with on_device(recv_memory, num_bytes=64 << 20):
        return getattr(ep_modes, name)(*arguments)


CHECKS: tuple[tuple[str, tuple[object, ...]], ...] = (
    ("check_sizes", ()),
    ("check_payloads", ()),
    ("check_topk", ()),
    ("check_interleaved", ()),
    ("check_permuted_rows", ()),
    ("check_repeated", ()),
    ("check_all_modes", (0, 5)),
)


def timed(name: str, recv_memory: str, arguments: tuple[object, ...]) -> Callable[[], None]:
    def run() -> None:
        begin = time.monotonic()
        run_check(name, recv_memory, *arguments)
        if dist.get_rank() == 0:
            print(f"right: {name} {recv_memory}, {time.monotonic() - begin:.1f} s", flush=True)

    return run


if __name__ == "__main__":
    names = sys.argv[1:]
    run_as_script(
        *[
            timed(name, recv_memory, arguments)
            for recv_memory in RECV_MEMORIES
            for name, arguments in CHECKS
            if not names or name in names
        ]
    )
