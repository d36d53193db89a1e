"""Owns `all_gather` and `reduce_scatter` as functions: one call each, results in memory of their own, with gradients.

Each is the other's backward pass. Sessions and their memory are `ContextBuffer`'s.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, overload

import torch
from torch import Tensor

from deep_ep_cp.buffer import ContextBuffer

__all__ = ["all_gather", "reduce_scatter"]


@overload
def all_gather(buffer: ContextBuffer, tensors: Tensor) -> Tensor: ...


@overload
def all_gather(buffer: ContextBuffer, tensors: Sequence[Tensor]) -> tuple[Tensor, ...]: ...


def all_gather(buffer: ContextBuffer, tensors: Tensor | Sequence[Tensor]) -> Tensor | tuple[Tensor, ...]:
    """Give every rank the tensors of all ranks, differentiably.

    A session that is open is used, else one is made for the call. The gradient of what rank r passed is the sum of the
    gradients that all ranks have for it, in the order and rounding of `reduce_scatter`.

    Args:
        buffer: The buffer to use; configured.
        tensors: A tensor of any shape, the same on every rank, or a sequence of them, which is sent at once. Need not
            be contiguous.

    Returns:
        `[num_ranks, *shape]` by rank, in memory of its own; a tuple for a sequence.

    Raises:
        ConfigError, RankMismatchError, CommTimeoutError: As `ContextBuffer.all_gather`.

    Collective: yes, and so is its backward pass, which every rank must run. Stream: results are ready for the current
    stream.
    """
    return (
        _apply(_AllGather, buffer, tensors)
        if isinstance(tensors, Sequence)
        else _apply(_AllGather, buffer, [tensors])[0]
    )


@overload
def reduce_scatter(buffer: ContextBuffer, tensors: Tensor) -> Tensor: ...


@overload
def reduce_scatter(buffer: ContextBuffer, tensors: Sequence[Tensor]) -> tuple[Tensor, ...]: ...


def reduce_scatter(buffer: ContextBuffer, tensors: Tensor | Sequence[Tensor]) -> Tensor | tuple[Tensor, ...]:
    """Give every rank the sum of what all ranks pass for it, differentiably.

    A session that is open is used, else one is made for the call. The gradient is an all-gather.

    Args:
        buffer: The buffer to use; configured.
        tensors: `[num_ranks, *shape]`, the same on every rank, or a sequence of them, which is sent at once. Need not
            be contiguous.

    Returns:
        `[*shape]`: the sum over the ranks p of what p passed at this rank's index, as `ContextBuffer.reduce_scatter`
        makes it; a tuple for a sequence.

    Raises:
        ConfigError, RankMismatchError, CommTimeoutError: As `ContextBuffer.reduce_scatter`.

    Collective: yes, and so is its backward pass, which every rank must run. Stream: results are ready for the current
    stream.
    """
    return (
        _apply(_ReduceScatter, buffer, tensors)
        if isinstance(tensors, Sequence)
        else _apply(_ReduceScatter, buffer, [tensors])[0]
    )


class _AllGather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, buffer: ContextBuffer, *tensors: Tensor) -> tuple[Tensor, ...]:
        with buffer.agrs_new_session(enabled=not buffer.is_in_session):
            *gathered, wait = buffer.all_gather([_plain(tensor) for tensor in tensors])
            wait()
            # What lies in the session is overwritten later.
            results = tuple(tensor.clone() for tensor in gathered)
        ctx.buffer, ctx.has_gradient = buffer, _have_gradients(results)
        return results

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        return _send_back(_ReduceScatter, ctx, gradients)


class _ReduceScatter(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, buffer: ContextBuffer, *tensors: Tensor) -> tuple[Tensor, ...]:
        with buffer.agrs_new_session(enabled=not buffer.is_in_session):
            *results, wait = buffer.reduce_scatter([_plain(tensor) for tensor in tensors])
            wait()
        ctx.buffer, ctx.has_gradient = buffer, _have_gradients(results)
        return tuple(results)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        return _send_back(_AllGather, ctx, gradients)


def _have_gradients(tensors: Sequence[Tensor]) -> list[bool]:
    # By dtype, on which ranks agree, and not by who wants a gradient, on which they need not.
    return [tensor.is_floating_point() or tensor.is_complex() for tensor in tensors]


def _plain(value: Any) -> Any:
    # What is no tensor is refused by the buffer, which tells the other ranks.
    return value.resolve_conj().resolve_neg().contiguous() if isinstance(value, Tensor) else value


def _apply(
    function: type[torch.autograd.Function], buffer: ContextBuffer, tensors: Sequence[Tensor]
) -> tuple[Tensor, ...]:
    return function.apply(buffer, *tensors)  # type: ignore[no-any-return]


def _send_back(
    function: type[torch.autograd.Function], ctx: Any, gradients: Sequence[Tensor]
) -> tuple[Tensor | None, ...]:
    sent = [gradient for gradient, has_gradient in zip(gradients, ctx.has_gradient, strict=True) if has_gradient]
    arrived = iter(_apply(function, ctx.buffer, sent))
    return None, *(next(arrived) if has_gradient else None for has_gradient in ctx.has_gradient)
