"""Owns making torch tensors over memory that torch did not allocate, with a call when the last view of it dies.

It goes through DLPack, which is the same for host and device memory and gives the storage a deleter of its own. Who
owns the memory, and what happens to it afterwards, is the caller's affair.
"""

from __future__ import annotations

import atexit
import ctypes
import functools
from collections.abc import Callable
from typing import Any

import torch
from torch.utils.dlpack import from_dlpack

__all__ = ["tensor_over"]

_KINDS = {"cpu": 1, "cuda": 2}
_UNSIGNED_INT = 1
_CAPSULE_NAME = b"dltensor"
_Deleter = ctypes.CFUNCTYPE(None, ctypes.c_void_p)


class _ManagedTensor(ctypes.Structure):
    """DLPack's `DLManagedTensor`, its `DLTensor` inlined, and behind it the shape that it points to."""

    _fields_ = (
        ("data", ctypes.c_void_p),
        ("device_kind", ctypes.c_int32),
        ("device_idx", ctypes.c_int32),
        ("num_dims", ctypes.c_int32),
        ("type_code", ctypes.c_uint8),
        ("type_bits", ctypes.c_uint8),
        ("type_lanes", ctypes.c_uint16),
        ("shape", ctypes.c_void_p),
        ("strides", ctypes.c_void_p),
        ("byte_offset", ctypes.c_uint64),
        ("context", ctypes.c_void_p),
        ("deleter", ctypes.c_void_p),
        ("num_bytes", ctypes.c_int64),
    )


_SIZE = ctypes.sizeof(_ManagedTensor)
_SHAPE_OFFSET = _ManagedTensor.num_bytes.offset

# What lives as long as a storage, and what to call when it dies, by the address of its _ManagedTensor.
_live: dict[int, tuple[object, Callable[[], None] | None]] = {}


def tensor_over(
    address: int,
    num_bytes: int,
    device: torch.device,
    owner: object,
    on_release: Callable[[], None] | None = None,
) -> torch.Tensor:
    """A tensor over given memory.

    Args:
        address: Where the memory begins.
        num_bytes: Its size.
        device: What it is memory of: the CPU, or a CUDA device with its index.
        owner: What the memory belongs to; lives as long as any tensor that shares the storage, views and what is kept
            for a backward pass included.
        on_release: Called once when no such tensor is left, before `owner` is let go: in whichever thread the last one
            goes, and not at all once the interpreter ends.

    Returns:
        `[num_bytes]` uint8, with a storage of its own.
    """
    calls = _calls()
    block_address: int = calls.malloc(_SIZE)
    ctypes.memmove(block_address, _template(device), _SIZE)
    managed = _ManagedTensor.from_address(block_address)
    managed.data = address
    managed.num_bytes = num_bytes
    managed.shape = block_address + _SHAPE_OFFSET
    _live[block_address] = owner, on_release
    tensor: torch.Tensor = from_dlpack(calls.new_capsule(block_address, _CAPSULE_NAME, None))
    return tensor


@functools.cache
def _template(device: torch.device) -> bytes:
    """What is the same for all tensors of a device."""
    managed = _ManagedTensor(
        device_kind=_KINDS[device.type],
        device_idx=device.index or 0,
        num_dims=1,
        type_code=_UNSIGNED_INT,
        type_bits=8,
        type_lanes=1,
        deleter=_calls().deleter_address,
    )
    return bytes(managed)


class _Calls:
    """The C functions that are needed, and the deleter that torch calls."""

    def __init__(self) -> None:
        api = ctypes.pythonapi
        # The raw allocator: a storage may outlive the interpreter, and what its other allocators gave.
        self.malloc: Any = api.PyMem_RawMalloc
        self.malloc.argtypes, self.malloc.restype = (ctypes.c_size_t,), ctypes.c_void_p
        self.free: Any = api.PyMem_RawFree
        self.free.argtypes, self.free.restype = (ctypes.c_void_p,), None
        self.new_capsule: Any = api.PyCapsule_New
        self.new_capsule.argtypes = (ctypes.c_void_p, ctypes.c_char_p, ctypes.c_void_p)
        self.new_capsule.restype = ctypes.py_object
        self.deleter = _Deleter(self._delete)
        self.deleter_address = ctypes.cast(self.deleter, ctypes.c_void_p).value

    def _delete(self, block_address: int) -> None:
        owner, on_release = _live.pop(block_address)
        self.free(block_address)
        if on_release is not None:
            on_release()
        del owner


@functools.cache
def _calls() -> _Calls:
    atexit.register(_disarm)
    return _Calls()


def _disarm() -> None:
    """Take the deleter out of all live storages: some die after the interpreter, when it can no longer be called."""
    for block_address in list(_live):
        _ManagedTensor.from_address(block_address).deleter = None
