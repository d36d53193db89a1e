"""Where messages are checked: which device their tensors lie on, and which backend moves them."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator
from typing import Any

import torch

from deep_ep_pp import PipelineBuffer


class Setting:
    """What checks make their buffers and tensors with."""

    device = torch.device("cpu")
    backend = "auto"


SETTING = Setting()


@contextlib.contextmanager
def on_gpu(backend: str, device: str) -> Iterator[None]:
    """Let checks use this rank's GPU.

    Args:
        backend: What buffers must use.
        device: Where tensors lie: "cuda", or "cpu" for those that a device backend must bring to the GPU itself.
    """
    torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")) % torch.cuda.device_count())
    before = SETTING.device, SETTING.backend
    SETTING.device = torch.device(device, torch.cuda.current_device()) if device == "cuda" else torch.device(device)
    SETTING.backend = backend
    try:
        yield
    finally:
        SETTING.device, SETTING.backend = before


def open_buffer(group: Any = None, num_bytes: int | None = None, timeout_s: float = 60) -> PipelineBuffer:
    """A buffer of the setting."""
    buffer = PipelineBuffer(group, num_bytes, timeout_s, backend=SETTING.backend)
    assert buffer.runtime is not None
    assert SETTING.backend in ("auto", buffer.runtime.name)
    return buffer


def is_on_device() -> bool:
    """Whether messages wait for each other in streams, and not on the host."""
    return SETTING.backend == "device"


def settle() -> None:
    """Wait until the device has done what it was given, as the host waits by itself where there is no device."""
    if SETTING.backend != "auto":
        torch.cuda.synchronize()


def run_check(program: Callable[..., Any], backend: str, device: str, *args: Any) -> Any:
    """Run a check on this rank's GPU."""
    with on_gpu(backend, device):
        return program(*args)
