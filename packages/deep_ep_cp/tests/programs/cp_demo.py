"""The demo's comparison on ranks of a pool, with and without a fault."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.distributed as dist
from cp_calls import make_buffer

import deep_ep_cp
from deep_ep_cp.demo.attention import AttentionConfig, GatherTokens, compare


def _without_gradients(gather: GatherTokens) -> GatherTokens:
    """Each rank keeps the gradients of its own slot only, as without a reduce-scatter."""

    def gather_detached(tensors: list[torch.Tensor]) -> tuple[torch.Tensor, ...]:
        rank = dist.get_rank()
        results = [gathered.detach().clone() for gathered in gather(tensors)]
        for result, tensor in zip(results, tensors, strict=True):
            result[rank] = tensor
        return tuple(results)

    return gather_detached


FAULTS: dict[str, Callable[[GatherTokens], GatherTokens]] = {
    "ranks in another order": lambda gather: lambda tensors: tuple(each.flip(0) for each in gather(tensors)),
    "keys and values exchanged": lambda gather: lambda tensors: gather(tensors)[::-1],
    "no gradients from other ranks": _without_gradients,
}


def differences(fault: str | None = None) -> dict[str, float]:
    buffer = make_buffer()
    spoil = FAULTS[fault] if fault is not None else lambda gather: gather
    return compare(
        AttentionConfig(num_tokens=32, num_heads=2, head_dim=8),
        spoil(lambda tensors: deep_ep_cp.all_gather(buffer, tensors)),
    )
