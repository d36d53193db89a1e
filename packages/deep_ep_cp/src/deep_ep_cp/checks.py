"""Owns what a tensor or a shape must look like to be taken; checked before anything is sent. It reads no values."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from deep_ep_core.refusals import rejected
from deep_ep_cp.reduction import SUM_DTYPES

__all__ = ["check_shapes", "check_sum_inputs", "check_tensors"]


def check_tensors(call: str, tensors: Any, *, device: torch.device, rank: int) -> list[torch.Tensor]:
    """What a call was given, as a list.

    Args:
        call: Name of the call.
        tensors: A tensor, or a sequence of at least one.
        device: Device that they must be on.
        rank: This rank.

    Raises:
        ConfigError: They cannot be taken.
    """
    given = list(tensors) if isinstance(tensors, Sequence) else [tensors]
    if not given or not all(isinstance(tensor, torch.Tensor) for tensor in given):
        kinds = ", ".join(type(tensor).__name__ for tensor in given) or "none"
        raise rejected(rank, f"{call} must be given a tensor, or a sequence of at least one", kinds, "pass tensors")
    for idx, tensor in enumerate(given):
        must = f"tensor {idx} of {call} must be dense and contiguous, on {device}"
        is_plain = tensor.layout == torch.strided and not tensor.is_conj() and not tensor.is_neg()
        if not is_plain or not tensor.is_contiguous() or tensor.device != device:
            raise rejected(rank, must, _shown(tensor), "move it, or call .contiguous() or .resolve_conj() first")
    return given


def check_sum_inputs(tensors: Sequence[torch.Tensor], *, num_ranks: int, rank: int) -> None:
    """What only a reduce-scatter asks of its tensors.

    Raises:
        ConfigError: A tensor has no dimension for the ranks, or a dtype that cannot be added.
    """
    for idx, tensor in enumerate(tensors):
        if tensor.dim() == 0 or tensor.size(0) != num_ranks:
            raise rejected(
                rank,
                f"tensor {idx} of reduce_scatter must be [num_ranks, ...] with num_ranks = {num_ranks}",
                _shown(tensor),
                "pass one addend for each rank, for example x.view(num_ranks, -1)",
            )
        if tensor.dtype not in SUM_DTYPES:
            names = ", ".join(_name_of(dtype) for dtype in SUM_DTYPES)
            raise rejected(
                rank, f"tensor {idx} of reduce_scatter must be of a dtype of {names}", _shown(tensor), "cast it first"
            )


def check_shapes(shapes: Any, dtype: Any, *, rank: int) -> tuple[list[tuple[int, ...]], bool]:
    """Shapes as a list.

    Args:
        shapes: One shape (sizes, or a `torch.Size`), or a sequence of at least one.
        dtype: The dtype.
        rank: This rank.

    Returns:
        The shapes, and whether they came as a sequence.

    Raises:
        ConfigError: They are no shapes, or the dtype is none.
    """
    if not isinstance(dtype, torch.dtype):
        raise rejected(rank, "dtype must be a torch.dtype", repr(dtype), "pass, for example, torch.bfloat16")
    is_sequence = isinstance(shapes, Sequence) and not isinstance(shapes, str)
    # `()` is the shape of a scalar, and so is the `torch.Size` of one; `[]` is no shape at all.
    is_batch = is_sequence and not _is_shape(shapes)
    given = list(shapes) if is_batch else [shapes]
    if not given or not all(_is_shape(shape) for shape in given):
        raise rejected(
            rank,
            "shapes must be one shape, or a sequence of at least one",
            repr(shapes),
            "a shape is a tuple of sizes of at least 0",
        )
    return [tuple(shape) for shape in given], is_batch


def _is_shape(value: Any) -> bool:
    if not isinstance(value, (tuple, list)) or (isinstance(value, list) and not value):
        return False
    return all(isinstance(size, int) and not isinstance(size, bool) and size >= 0 for size in value)


def _name_of(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _shown(tensor: torch.Tensor) -> str:
    """Shape, dtype, layout and device of a tensor, for a message."""
    layout = ""
    if tensor.layout != torch.strided:
        layout = f" of layout {str(tensor.layout).removeprefix('torch.')}"
    elif not tensor.is_contiguous():
        layout = f" with strides {list(tensor.stride())}"
    elif tensor.is_conj() or tensor.is_neg():
        layout = " as a lazy conjugate"
    return f"{list(tensor.shape)} {_name_of(tensor.dtype)}{layout} on {tensor.device}"
