"""Where the checks of the device backend run: every rank on a GPU, buffers that must use the backend."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator

import torch
import torch.distributed as dist
from ep_cases import SETTING

from deep_ep_ep import ElasticBuffer
from deep_ep_ep.device import backend as device_backend
from deep_ep_ep.device.context import DeviceContext

RECV_MEMORIES = ("auto", "torch", "window")

NETWORK_OPTIONS: dict[str, object] = {}
"""Options of every buffer, of `ep_nodes`: how ranks on several nodes use the network."""


@contextlib.contextmanager
def on_device(recv_memory: str, **options: object) -> Iterator[None]:
    """Let cases run on this rank's GPU and buffers use the device backend.

    Args:
        recv_memory: Where received rows live.
        **options: Of every buffer. `num_bytes` is for one node; by way of rails a buffer must hold rows of each node.
    """
    torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")) % torch.cuda.device_count())
    before = SETTING.device, SETTING.options
    if SETTING.ranks_per_node and isinstance(num_bytes := options.get("num_bytes"), int):
        options["num_bytes"] = num_bytes * (dist.get_world_size() // SETTING.ranks_per_node)
    SETTING.device = "cuda"
    SETTING.options = {
        "backend": "device",
        "recv_memory": recv_memory,
        "num_gpu_timeout_secs": 20,
        **NETWORK_OPTIONS,
        **options,
    }
    try:
        yield
    finally:
        SETTING.device, SETTING.options = before


@contextlib.contextmanager
def as_on_several_gpus() -> Iterator[None]:
    """Let buffers that are made in the block work as between GPUs, also where all ranks share one.

    Then a row that several experts of a rank want is stored once by its sender, and spread by its receiver.
    """
    original: Callable[..., DeviceContext] = device_backend.open_context

    def open_context(*args: object, **kwargs: object) -> DeviceContext:
        context = original(*args, **kwargs)
        context.shares_gpu = False
        return context

    device_backend.open_context = open_context
    try:
        yield
    finally:
        device_backend.open_context = original


def context_of(buffer: ElasticBuffer) -> DeviceContext:
    """The memory of a buffer, to look at."""
    assert buffer.runtime is not None
    assert buffer.runtime.name == "device", buffer
    return buffer.runtime._context  # type: ignore[attr-defined]


def is_in_window(buffer: ElasticBuffer, tensor: torch.Tensor) -> bool:
    """Whether a tensor lies where peers can read it."""
    return context_of(buffer).memory.offset_of(tensor) is not None
