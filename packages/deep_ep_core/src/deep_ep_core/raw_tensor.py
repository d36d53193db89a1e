"""Owns making torch tensors over memory that torch did not allocate, with a call when the last view of it dies.

It goes through DLPack, which is the same for host and device memory. Who owns the memory, and what happens to it
afterwards, is the caller's affair.

The death of a storage is told by a finalizer of Python: a small tensor over a ticket of ours is exported, and what
torch reads of the export is written over, so that the new storage keeps the ticket. A deleter of our own would be
simpler, but ctypes cannot call Python while an exception is under way: the exception would be lost, and the call too.
"""

from __future__ import annotations

import atexit
import ctypes
import functools
import math
import struct
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch.utils.dlpack import from_dlpack

__all__ = ["tensor_over"]

_KINDS = {"cpu": 1, "cuda": 2}
_CAPSULE_NAME = b"dltensor"

# DLPack's `DLManagedTensor`, its `DLTensor` inlined. In order: data; kind and index of the device; number of
# dimensions; type as code, bits and lanes in one number; address of the shape; that of the strides, 0 for a contiguous
# tensor; byte offset. Behind it are torch's own context and deleter.
_EXPORT = struct.Struct("=QiiiIQQQ")
_TYPE_OFFSET, _DELETER_OFFSET = 20, 56
_MAX_DIMS = 8
_ExportBytes = ctypes.c_char * _EXPORT.size

# Addresses of the exports whose storages live.
_live: set[int] = set()


class _Ticket(ctypes.c_int64 * _MAX_DIMS):  # type: ignore[misc]
    """Lives as long as a storage. Its bytes are the shape of the storage's first tensor."""

    __slots__ = ("export_address", "on_release", "owner")

    owner: object
    on_release: Callable[[], None] | None
    export_address: int

    def __del__(self) -> None:
        _live.discard(self.export_address)
        if self.on_release is not None:
            self.on_release()


def tensor_over(
    address: int,
    num_bytes: int,
    device: torch.device,
    owner: object,
    on_release: Callable[[], None] | None = None,
    *,
    shape: Sequence[int] | None = None,
    dtype: torch.dtype = torch.uint8,
) -> torch.Tensor:
    """A tensor over given memory.

    Args:
        address: Where the memory begins.
        num_bytes: Its size, at least 1.
        device: What it is memory of: the CPU, or a CUDA device with its index.
        owner: What the memory belongs to; lives as long as any tensor that shares the storage, views and what is kept
            for a backward pass included.
        on_release: Called once when no such tensor is left, before `owner` is let go: in whichever thread the last one
            goes, and not at all once the interpreter ends.
        shape: The tensor's shape, of no more than `num_bytes` bytes; None for all of them in one dimension.
        dtype: Its dtype.

    Returns:
        `[*shape]` of `dtype`, contiguous, with a storage of its own.
    """
    if shape is None:
        shape = (num_bytes // dtype.itemsize,)
    type_code = _type_code(dtype)
    # Without elements, the storage would lose the address.
    is_direct = type_code is not None and 0 not in shape and len(shape) <= _MAX_DIMS
    if not is_direct:
        flat = tensor_over(address, num_bytes, device, owner, on_release)
        return flat[: math.prod(shape) * dtype.itemsize].view(dtype).view(tuple(shape))
    calls = _calls()
    ticket = _Ticket(*shape)
    ticket.owner, ticket.on_release, ticket.export_address = owner, None, 0
    carrier = torch.frombuffer(ticket, dtype=torch.int64)
    capsule = calls.capsule_of(carrier)
    ticket.export_address = export_address = calls.pointer_of(capsule, _CAPSULE_NAME)
    _EXPORT.pack_into(
        _ExportBytes.from_address(export_address),
        0,
        address,
        *_place_of(device),
        len(shape),
        type_code,
        carrier.data_ptr(),
        0,
        0,
    )
    _live.add(export_address)
    tensor: torch.Tensor = calls.tensor_of_capsule(capsule)
    ticket.on_release = on_release
    return tensor


@functools.cache
def _place_of(device: torch.device) -> tuple[int, int]:
    """Kind and index of a device, as DLPack names them."""
    return _KINDS[device.type], device.index or 0


@functools.cache
def _type_code(dtype: torch.dtype) -> int | None:
    """How DLPack names a dtype, as torch says it; None where torch takes it from no DLPack tensor."""
    calls = _calls()
    try:
        # On the CPU, whatever device is the default one.
        capsule = torch.empty(1, dtype=dtype, device="cpu").__dlpack__()
        address = calls.pointer_of(capsule, _CAPSULE_NAME)
        code = ctypes.c_uint32.from_address(address + _TYPE_OFFSET).value
        return code if from_dlpack(capsule).dtype == dtype else None
    except (BufferError, RuntimeError, ValueError):
        return None


class _Calls:
    """The functions that are needed."""

    def __init__(self) -> None:
        self.pointer_of: Any = ctypes.pythonapi.PyCapsule_GetPointer
        self.pointer_of.argtypes = (ctypes.py_object, ctypes.c_char_p)
        self.pointer_of.restype = ctypes.c_void_p
        # What `Tensor.__dlpack__` calls, and what `from_dlpack` does when it has seen that it was passed a capsule.
        self.capsule_of: Any = getattr(torch._C, "_to_dlpack", None) or torch.Tensor.__dlpack__
        self.tensor_of_capsule: Any = getattr(torch._C, "_from_dlpack", None) or from_dlpack


@functools.cache
def _calls() -> _Calls:
    atexit.register(_disarm)
    return _Calls()


def _disarm() -> None:
    """Take the deleter out of all live storages: some die after the interpreter, when no finalizer can run."""
    for export_address in list(_live):
        ctypes.c_void_p.from_address(export_address + _DELETER_OFFSET).value = None
