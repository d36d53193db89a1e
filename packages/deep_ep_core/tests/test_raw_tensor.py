from __future__ import annotations

import ctypes
import gc
import subprocess
import sys
import threading
import weakref

import pytest
import torch

from deep_ep_core import raw_tensor
from deep_ep_core.raw_tensor import tensor_over

CPU = torch.device("cpu")


class Memory:
    """Some host memory, known to the garbage collector."""

    def __init__(self, num_bytes: int = 64) -> None:
        self.buffer = (ctypes.c_ubyte * num_bytes)()
        self.address = ctypes.addressof(self.buffer)


def test_the_tensor_is_the_memory_itself():
    memory = Memory()
    tensor = tensor_over(memory.address, 64, CPU, memory)
    tensor.view(torch.int32)[3] = 0x01020304
    assert bytes(memory.buffer[12:16]) == bytes([4, 3, 2, 1])
    assert (tensor.shape, tensor.dtype, tensor.data_ptr()) == ((64,), torch.uint8, memory.address)


@pytest.mark.parametrize("dtype", [torch.bool, torch.bfloat16, torch.float8_e4m3fn, torch.float8_e8m0fnu, torch.uint16])
@pytest.mark.parametrize("shape", [(), (3,), (2, 3), (1, 2, 1, 3, 1, 1, 1, 1), (1,) * 9, (2, 0, 3), (0,)])
def test_a_shape_and_a_dtype_can_be_given(shape, dtype):
    memory, calls = Memory(), []
    tensor = tensor_over(memory.address, 64, CPU, memory, lambda: calls.append(1), shape=shape, dtype=dtype)
    assert (tensor.shape, tensor.dtype, tensor.is_contiguous()) == (shape, dtype, True)
    assert tensor.untyped_storage().data_ptr() == memory.address
    tensor.reshape(-1).view(torch.uint8).fill_(1)
    assert bytes(memory.buffer) == bytes([1] * tensor.nbytes + [0] * (64 - tensor.nbytes))
    del tensor
    assert calls == [1]


def test_without_a_shape_a_dtype_fills_the_memory():
    memory = Memory()
    assert tensor_over(memory.address, 64, CPU, memory, dtype=torch.int64).shape == (8,)


def test_what_one_tensor_was_is_not_seen_in_the_next():
    """What torch reads of a tensor is written anew, wherever it was kept for the last one."""
    memory = Memory()
    for offset, shape, dtype in ((0, (2, 4), torch.int32), (32, (), torch.uint8), (8, (3,), torch.int64)):
        tensor = tensor_over(memory.address + offset, 32, CPU, memory, shape=shape, dtype=dtype)
        assert (tensor.data_ptr() - memory.address, tensor.shape, tensor.dtype) == (offset, shape, dtype)
        del tensor


def views_of(tensor: torch.Tensor) -> dict[str, object]:
    weight = torch.ones(16, requires_grad=True)
    return {
        "slice": tensor[3:5],
        "dtype": tensor.view(torch.bfloat16),
        "transposed": tensor.view(8, 8).t(),
        "detached": tensor.detach(),
        "storage": tensor.untyped_storage(),
        "kept for backward": (weight * tensor.view(torch.float32)).sum(),
        "numpy": tensor.numpy(),
    }


@pytest.mark.parametrize("name", views_of(torch.zeros(64, dtype=torch.uint8)))
def test_the_memory_lives_as_long_as_any_view(name):
    memory, calls = Memory(), []
    owner = weakref.ref(memory)
    tensor = tensor_over(memory.address, 64, CPU, memory, on_release=lambda: calls.append("released"))
    tensor.zero_()
    view = views_of(tensor)[name]
    del memory, tensor
    gc.collect()
    assert calls == []
    assert owner() is not None
    del view
    gc.collect()
    assert calls == ["released"]
    assert owner() is None


def test_the_owner_is_there_while_the_release_is_told():
    memory = Memory()
    owner, seen = weakref.ref(memory), []
    tensor = tensor_over(memory.address, 64, CPU, memory, on_release=lambda: seen.append(owner() is not None))
    del memory, tensor
    assert seen == [True]


def test_two_tensors_over_one_memory_are_released_one_by_one():
    memory, calls = Memory(), []
    first = tensor_over(memory.address, 64, CPU, memory, on_release=lambda: calls.append(1))
    second = tensor_over(memory.address, 64, CPU, memory, on_release=lambda: calls.append(2))
    del first
    assert calls == [1]
    del second
    assert calls == [1, 2]


def test_a_tensor_may_die_in_any_thread():
    memory, names = Memory(), []
    tensors = [tensor_over(memory.address, 64, CPU, memory, on_release=lambda: names.append(threading.get_ident()))]
    thread = threading.Thread(target=tensors.clear)
    thread.start()
    thread.join()
    assert names == [thread.ident]


def test_another_default_device_changes_nothing():
    """Even where the first tensor of a dtype is made under it."""
    memory = Memory()
    raw_tensor._type_code.cache_clear()
    with torch.device("meta"):
        tensor = tensor_over(memory.address, 64, CPU, memory, shape=(4,), dtype=torch.int16)
    assert (tensor.device, tensor.data_ptr(), tensor.dtype) == (CPU, memory.address, torch.int16)


def test_a_tensor_may_die_while_an_exception_is_under_way():
    """As an operand of a failing operation does: what went wrong is told, and the memory is released."""
    memory, calls = Memory(), []
    with pytest.raises(RuntimeError, match="cannot be multiplied"):
        torch.mm(
            tensor_over(memory.address, 64, CPU, memory, lambda: calls.append(1), shape=(4, 4), dtype=torch.float32),
            torch.ones(3, 3),
        )
    assert calls == [1]


def test_a_release_that_fails_is_told_and_harms_nothing(recwarn):
    memory, seen = Memory(), []

    def fail():
        raise ValueError("no release")

    hook, sys.unraisablehook = sys.unraisablehook, lambda unraisable: seen.append(str(unraisable.exc_value))
    try:
        tensor_over(memory.address, 64, CPU, memory, fail)
    finally:
        sys.unraisablehook = hook
    assert seen == ["no release"]


def test_a_storage_that_outlives_the_interpreters_work_calls_nothing():
    """Exit handlers run in the reverse order: the one registered first sees a tensor die after all is disarmed."""
    program = (
        "import atexit, ctypes, torch\n"
        "from deep_ep_core.raw_tensor import tensor_over\n"
        "kept = []\n"
        "atexit.register(kept.clear)\n"
        "buffer = ctypes.create_string_buffer(64)\n"
        "def make(name):\n"
        "    release = lambda: print(name, flush=True)\n"
        "    return tensor_over(ctypes.addressof(buffer), 64, torch.device('cpu'), buffer, release)\n"
        "early = make('early')\n"
        "kept.append(make('late'))\n"
        "del early\n"
    )
    command = [sys.executable, "-c", program]
    answer = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert (answer.returncode, answer.stdout, answer.stderr) == (0, "early\n", "")
