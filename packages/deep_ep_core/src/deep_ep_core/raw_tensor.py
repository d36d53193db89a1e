"""Owns making torch tensors over memory that torch did not allocate, with a call when the last view of it dies.

It goes through DLPack, which is the same for host and device memory and gives the storage a deleter of its own. Who
owns the memory, and what happens to it afterwards, is the caller's affair.
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
_Deleter = ctypes.CFUNCTYPE(None, ctypes.c_void_p)

# A block is DLPack's `DLManagedTensor`, its `DLTensor` inlined, and behind it the shape that it points to. In order:
# data; kind and index of the device; number of dimensions; type as code, bits and lanes in one number; address of the
# shape; that of the strides, 0 for a contiguous tensor; byte offset; context; deleter.
_HEAD = "=QiiiIQQQQQ"
_TYPE_OFFSET, _DELETER_OFFSET = 20, 56
_MAX_DIMS = 8
_LAYOUTS = [struct.Struct(f"{_HEAD}{num_dims}q") for num_dims in range(_MAX_DIMS + 1)]
_SHAPE_OFFSET = _LAYOUTS[0].size

_Block = tuple[int, Any]  # its address, and the same bytes as something to write to

# What lives as long as a storage, and what to call when it dies, by the address of its block.
_live: dict[int, tuple[_Block, object, Callable[[], None] | None]] = {}
# Blocks that no storage has at present. They are kept for ever: there are never more than storages lived at once.
_spare_blocks: list[_Block] = []


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
    try:
        block = _spare_blocks.pop()
    except IndexError:
        block = calls.new_block()
    block_address, content = block
    _LAYOUTS[len(shape)].pack_into(
        content,
        0,
        address,
        *_place_of(device),
        len(shape),
        type_code,
        block_address + _SHAPE_OFFSET,
        0,
        0,
        0,
        calls.deleter_address,
        *shape,
    )
    _live[block_address] = block, owner, on_release
    tensor: torch.Tensor = calls.tensor_of_capsule(calls.new_capsule(block_address, _CAPSULE_NAME, None))
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
        capsule = torch.empty(1, dtype=dtype).__dlpack__()
        address = calls.pointer_of(capsule, _CAPSULE_NAME)
        code = ctypes.c_uint32.from_address(address + _TYPE_OFFSET).value
        return code if from_dlpack(capsule).dtype == dtype else None
    except (BufferError, RuntimeError, ValueError):
        return None


class _Calls:
    """The C functions that are needed, and the deleter that torch calls."""

    def __init__(self) -> None:
        api = ctypes.pythonapi
        # The raw allocator: a storage may outlive the interpreter, and what its other allocators gave.
        self._malloc: Any = api.PyMem_RawMalloc
        self._malloc.argtypes, self._malloc.restype = (ctypes.c_size_t,), ctypes.c_void_p
        self.new_capsule: Any = api.PyCapsule_New
        self.new_capsule.argtypes = (ctypes.c_void_p, ctypes.c_char_p, ctypes.c_void_p)
        self.new_capsule.restype = ctypes.py_object
        self.pointer_of: Any = api.PyCapsule_GetPointer
        self.pointer_of.argtypes = (ctypes.py_object, ctypes.c_char_p)
        self.pointer_of.restype = ctypes.c_void_p
        # What `from_dlpack` calls after it has found out that it was passed a capsule.
        self.tensor_of_capsule: Any = getattr(torch._C, "_from_dlpack", None) or from_dlpack
        self.deleter = _Deleter(_delete)
        self.deleter_address: int = ctypes.cast(self.deleter, ctypes.c_void_p).value or 0

    def new_block(self) -> _Block:
        num_bytes = _LAYOUTS[_MAX_DIMS].size
        address: int = self._malloc(num_bytes)
        return address, (ctypes.c_char * num_bytes).from_address(address)


def _delete(block_address: int) -> None:
    block, owner, on_release = _live.pop(block_address)
    # Torch reads nothing of it after this call.
    _spare_blocks.append(block)
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
        ctypes.c_void_p.from_address(block_address + _DELETER_OFFSET).value = None
