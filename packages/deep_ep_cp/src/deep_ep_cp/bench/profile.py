"""Owns the proof that a call takes no SM: what the profiler saw the GPU do while it ran."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable

import torch

__all__ = ["device_activities", "kernels_among"]

_NOT_KERNELS = ("Memcpy", "Memset")


def device_activities(call: Callable[[], object], device: torch.device) -> Counter[str]:
    """What ran on the GPU for this process during a call, by name. Collective: as the call."""
    activity = torch.profiler.ProfilerActivity
    torch.cuda.synchronize(device)
    with torch.profiler.profile(activities=[activity.CPU, activity.CUDA], acc_events=True) as profiler:
        call()
        torch.cuda.synchronize(device)
    events = profiler.events() or []
    return Counter(event.name for event in events if event.device_type.name == "CUDA")


def kernels_among(activities: Counter[str]) -> list[str]:
    """The names of those that took SMs: all but the copies and fills of the copy engines."""
    return [name for name in activities if not name.startswith(_NOT_KERNELS)]
