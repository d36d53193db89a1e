"""Where the checks run: the device of their tensors, and how their buffers are made."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch


@dataclass
class Setting:
    """Attributes: the device of tensors, and what `ContextBuffer` is passed beside the usual."""

    device: str = "cpu"
    options: dict[str, object] = field(default_factory=dict)


SETTING = Setting()


@contextlib.contextmanager
def on_gpu(backend: str, **options: object) -> Iterator[None]:
    """Let checks run on this rank's GPU, on one of the backends."""
    torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")) % torch.cuda.device_count())
    before = SETTING.device, SETTING.options
    SETTING.device, SETTING.options = "cuda", {"backend": backend, **options}
    try:
        yield
    finally:
        SETTING.device, SETTING.options = before


def run_on_gpu(check: Callable[..., Any], backend: str, *args: object, **options: object) -> Any:
    """A check on this rank's GPU; options are those of its buffers."""
    with on_gpu(backend, **options):
        result = check(*args)
        # What a check left under way must end well too.
        torch.cuda.synchronize()
        return result


# Tensors on the device of the setting.


def ones(*size: Any, **options: Any) -> torch.Tensor:
    return torch.ones(*size, device=SETTING.device, **options)


def full(*args: Any, **options: Any) -> torch.Tensor:
    return torch.full(*args, device=SETTING.device, **options)


def arange(*args: Any, **options: Any) -> torch.Tensor:
    return torch.arange(*args, device=SETTING.device, **options)


def tensor(*args: Any, **options: Any) -> torch.Tensor:
    return torch.tensor(*args, device=SETTING.device, **options)
