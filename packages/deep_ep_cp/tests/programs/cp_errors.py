"""Calls that must be refused, ranks that disagree, come late or refuse; what each rank is told."""

from __future__ import annotations

import time
from collections.abc import Callable

import pytest
import torch
import torch.distributed as dist
from cp_calls import make_buffer
from cp_setting import SETTING, arange, ones, tensor

from deep_ep_core.errors import CommTimeoutError, ConfigError, TransportError
from deep_ep_cp import ContextBuffer, all_gather, reduce_scatter

MAX_CALLS = 3
SESSION_BYTES = 1 << 12


class Setup:
    """A buffer in a session with one gathered tensor, and one outside of any."""

    def __init__(self) -> None:
        self.buffer = make_buffer(max_calls=MAX_CALLS)
        self.buffer.agrs_set_config(SESSION_BYTES, MAX_CALLS)
        self.idle = make_buffer()
        self.bare = ContextBuffer(None, 2 << 20, device=SETTING.device, **SETTING.options)
        self.closed = make_buffer()
        with self.idle.agrs_new_session():
            self.old_handle = self.idle.all_gather(ones(1))[1]
        self.closed.close()
        self.closed.close()
        self.buffer.create_agrs_session()
        self.first, self.wait = self.buffer.all_gather(arange(8))
        self.num_ranks = self.buffer.num_ranks


def full(s: Setup) -> None:
    """Use all calls of a session up, and make one more."""
    with s.idle.agrs_new_session():
        for _ in range(32):
            s.idle.all_gather(ones(1))
        s.idle.reduce_scatter(ones(s.num_ranks))


def stale(s: Setup) -> None:
    with s.idle.agrs_new_session():
        s.old_handle()


def misplaced(s: Setup) -> None:
    one, two = s.buffer.agrs_get_inplace_tensor([(3,), (4,)], torch.float32)
    s.buffer.all_gather([two, one])


def overlapping(s: Setup) -> None:
    own = s.buffer.agrs_get_inplace_tensor((s.num_ranks, 4), torch.float32)
    s.buffer.reduce_scatter(own)


def wide(num_elements: int) -> torch.Tensor:
    return ones(num_elements, dtype=torch.uint8)


# Name: (call, words that its message must hold).
REJECTIONS: dict[str, tuple[Callable[[Setup], object], tuple[str, ...]]] = {
    # Sessions.
    "create before the configuration": (
        lambda s: s.bare.create_agrs_session(),
        ("agrs_set_config must be called before the first session", "no configuration"),
    ),
    "create twice": (
        lambda s: s.buffer.create_agrs_session(),
        ("a session must be destroyed before the next one is created", "session 1, which is open"),
    ),
    "destroy without a session": (
        lambda s: s.idle.destroy_agrs_session(),
        ("destroy_agrs_session must be called in a session", "create_agrs_session"),
    ),
    "gather without a session": (
        lambda s: s.idle.all_gather(ones(1)),
        ("all_gather must be called in a session", "none that is open"),
    ),
    "sum without a session": (
        lambda s: s.idle.reduce_scatter(ones(s.num_ranks)),
        ("reduce_scatter must be called in a session",),
    ),
    "in-place tensor without a session": (
        lambda s: s.idle.agrs_get_inplace_tensor((1,), torch.int8),
        ("agrs_get_inplace_tensor must be called in a session",),
    ),
    "configure in a session": (
        lambda s: s.buffer.agrs_set_config(32, 1),
        ("agrs_set_config must be called outside of a session", "session 1", "destroy the session first"),
    ),
    "no session bytes": (
        lambda s: s.idle.agrs_set_config(0, 1),
        ("num_max_session_bytes must be an integer in [1, num_bytes = 2097152]", "got 0"),
    ),
    "more session bytes than the buffer has": (
        lambda s: s.idle.agrs_set_config((2 << 20) + 1, 1),
        ("num_max_session_bytes must be", "2097153", "get_agrs_buffer_size_hint"),
    ),
    "session bytes that are no integer": (
        lambda s: s.idle.agrs_set_config(64.0, 1),
        ("num_max_session_bytes must be an integer", "64.0"),
    ),
    "no calls": (
        lambda s: s.idle.agrs_set_config(64, 0),
        ("num_max_all_gathers_per_session must be an integer in [1, 32]", "got 0"),
    ),
    "more calls than there are signals": (
        lambda s: s.idle.agrs_set_config(64, 33),
        ("num_max_all_gathers_per_session must be", "got 33", "batch"),
    ),
    "a call too many": (full, ("at most num_max_all_gathers_per_session = 32 calls", "one more, reduce_scatter")),
    "a byte too many": (
        lambda s: s.buffer.all_gather(wide(SESSION_BYTES // s.num_ranks - 32)),
        ("at most num_max_session_bytes = 4096 bytes", "bytes in use", "more for all_gather"),
    ),
    "an in-place tensor too large": (
        lambda s: s.buffer.agrs_get_inplace_tensor((SESSION_BYTES,), torch.uint8),
        ("at most num_max_session_bytes", "for agrs_get_inplace_tensor"),
    ),
    "an old handle": (stale, ("the handle of session 1 must be called while that session is open", "got session ")),
    "a handle without a session": (lambda s: s.old_handle(), ("the handle of session 1 must", "none open")),
    # Tensors.
    "no tensor": (lambda s: s.buffer.all_gather(3), ("all_gather must be given a tensor, or a sequence", "got int")),
    "an empty batch": (lambda s: s.buffer.all_gather([]), ("a sequence of at least one", "got none")),
    "a batch with a number": (
        lambda s: s.buffer.reduce_scatter([ones(2), 1]),
        ("reduce_scatter must be given a tensor", "got Tensor, int"),
    ),
    "not contiguous": (
        lambda s: s.buffer.all_gather([ones(2), ones(3, 4).t()]),
        ("tensor 1 of all_gather must be dense and contiguous, on cpu", "[4, 3] float32 with strides [1, 4]"),
    ),
    "sparse": (
        lambda s: s.buffer.all_gather(torch.eye(2).to_sparse()),
        ("must be dense and contiguous", "layout sparse_coo"),
    ),
    "a lazy conjugate": (
        lambda s: s.buffer.all_gather(ones(2, dtype=torch.complex64).conj()),
        ("must be dense", "as a lazy conjugate", ".resolve_conj()"),
    ),
    "another device": (
        lambda s: s.buffer.all_gather(torch.ones(2, device="meta")),
        ("must be dense and contiguous, on cpu", "on meta"),
    ),
    "in-place tensors in another order": (
        misplaced,
        ("tensor 0 of all_gather, which lies in the buffer, must be the in-place tensor at byte", "in the order"),
    ),
    "a gathered tensor again": (lambda s: s.buffer.all_gather(s.first), ("must be the in-place tensor", "clone")),
    "a sum of a scalar": (
        lambda s: s.buffer.reduce_scatter(tensor(1.0)),
        ("tensor 0 of reduce_scatter must be [num_ranks, ...] with num_ranks = ", "[] float32"),
    ),
    "a sum for other ranks": (
        lambda s: s.buffer.reduce_scatter([ones(s.num_ranks), ones(s.num_ranks + 1)]),
        ("tensor 1 of reduce_scatter must be [num_ranks, ...]", "one addend for each rank"),
    ),
    "a sum of truth values": (
        lambda s: s.buffer.reduce_scatter(ones(s.num_ranks, dtype=torch.bool)),
        ("must be of a dtype of bfloat16, float16", "bool", "cast it first"),
    ),
    "a sum of float8": (
        lambda s: s.buffer.reduce_scatter(ones(s.num_ranks, 2).to(torch.float8_e4m3fn)),
        ("must be of a dtype of", "float8_e4m3fn"),
    ),
    "a sum of what lies where it arrives": (
        overlapping,
        ("lies in the buffer, must have been gathered in this session", "clone"),
    ),
    # Shapes.
    "no shapes": (
        lambda s: s.buffer.agrs_get_inplace_tensor([], torch.int8),
        ("shapes must be one shape, or a sequence of at least one", "got []"),
    ),
    "a negative size": (
        lambda s: s.buffer.agrs_get_inplace_tensor((2, -1), torch.int8),
        ("shapes must be one shape", "(2, -1)", "at least 0"),
    ),
    "a shape of floats": (
        lambda s: s.buffer.agrs_get_inplace_tensor([(2,), (3.0,)], torch.int8),
        ("shapes must be one shape", "(3.0,)"),
    ),
    "a dtype that is none": (
        lambda s: s.buffer.agrs_get_inplace_tensor((2,), "float32"),
        ("dtype must be a torch.dtype", "'float32'"),
    ),
    "a size of no shapes": (
        lambda s: ContextBuffer.get_agrs_num_max_session_bytes(None, 7, torch.int8),
        ("shapes must be one shape", "got 7"),
    ),
    # Life.
    "gather in a closed buffer": (
        lambda s: s.closed.all_gather(ones(1)),
        ("the buffer must be open", "a closed buffer", "make a new one"),
    ),
    "session of a closed buffer": (lambda s: s.closed.create_agrs_session(), ("the buffer must be open",)),
    "configure a closed buffer": (lambda s: s.closed.agrs_set_config(32, 1), ("the buffer must be open",)),
    # The functions, in whose words the buffer's come out.
    "function without a tensor": (lambda s: all_gather(s.idle, 3), ("must be given a tensor", "got int")),
    "function with an empty batch": (lambda s: reduce_scatter(s.idle, []), ("must be given a tensor", "got none")),
    "function without a configuration": (
        lambda s: all_gather(s.bare, ones(1)),
        ("agrs_set_config must be called before the first session",),
    ),
}

CONSTRUCTOR_REJECTIONS: dict[str, tuple[dict[str, object], tuple[str, ...]]] = {
    "odd size": ({"num_bytes": 1000}, ("num_bytes must be a positive multiple of 2097152", "1000", "size_hint")),
    "no size": ({"num_bytes": 0}, ("num_bytes must be a positive multiple",)),
    "size that is no integer": ({"num_bytes": 2.0**21}, ("num_bytes must be a positive multiple", "2097152.0")),
    "no time": ({"num_cpu_timeout_secs": 0}, ("num_cpu_timeout_secs must be positive", "0")),
    "unknown backend": ({"backend": "gpu"}, ('backend must be "auto", "collective" or "device"', "'gpu'")),
    "device backend on a CPU": (
        {"backend": "device"},
        ('backend="device" must have a buffer on a CUDA device', "got cpu", 'device="cuda"'),
    ),
    "unknown device": ({"device": "meta"}, ("device must be a CPU or a CUDA device", "meta")),
}


def collect_rejections() -> dict[str, tuple[str, str]]:
    """Type and message of what each bad call raises; a call that is accepted is missing."""
    setup = Setup()
    before = repr(setup.buffer)
    told: dict[str, tuple[str, str]] = {}
    for name, (call, _) in REJECTIONS.items():
        try:
            call(setup)
        except ConfigError as error:
            told[name] = (type(error).__name__, str(error))
    for name, (arguments, _) in CONSTRUCTOR_REJECTIONS.items():
        try:
            ContextBuffer(None, **{"num_bytes": 2 << 20, "device": "cpu", **arguments})
        except ConfigError as error:
            told[name] = (type(error).__name__, str(error))
    # None of it used anything up, and what was gathered before is as it was.
    assert repr(setup.buffer) == before
    setup.wait()
    assert setup.first.tolist() == [list(range(8))] * setup.num_ranks
    gathered, wait = setup.buffer.all_gather(ones(3))
    wait()
    assert bool((gathered == 1).all())
    return told


def _call_once(buffer: ContextBuffer, name: str, is_odd: bool) -> None:
    num_ranks = buffer.num_ranks
    x = ones(4, 3)
    if name == "configuration":
        buffer.agrs_set_config(1 << (10 + is_odd), 4)
        return
    if name == "calls":
        buffer.agrs_set_config(1 << 10, 4 + is_odd)
        return
    if name == "session" and is_odd:
        buffer.create_agrs_session()
        buffer.destroy_agrs_session()
    with buffer.agrs_new_session():
        if name == "operation" and is_odd:
            buffer.reduce_scatter(ones(num_ranks, 4, 3))
        elif name == "sum":
            buffer.reduce_scatter(ones(num_ranks, 4 + is_odd))
        elif name == "seventh tensor":
            buffer.all_gather([x] * 6 + [ones(4 + is_odd)])
        elif name == "length of the batch":
            buffer.all_gather([x] * (2 + is_odd))
        else:
            buffer.all_gather(
                {
                    "elements": ones(5, 3),
                    "dtype": x.int(),
                    "shape": ones(3, 4),
                }.get(name, x)
                if is_odd
                else x
            )


def disagree(odd_rank: int, name: str) -> None:
    """One call in which `odd_rank` does something else; it raises on every rank."""
    _call_once(make_buffer(num_cpu_timeout_secs=20), name, dist.get_rank() == odd_rank)


def disagree_in_constructor(odd_rank: int) -> None:
    ContextBuffer(None, (4 if dist.get_rank() == odd_rank else 2) << 20, device="cpu", num_cpu_timeout_secs=20)


def check_a_buffer_works_on_after_a_disagreement() -> None:
    rank, buffer = dist.get_rank(), make_buffer(num_cpu_timeout_secs=20)
    with buffer.agrs_new_session():
        before = repr(buffer)
        with pytest.raises(ValueError, match="number of elements of tensor 0"):
            buffer.all_gather(ones(2 + rank))
        assert repr(buffer) == before
        gathered, wait = buffer.all_gather(tensor([rank]))
        wait()
        assert gathered.flatten().tolist() == list(range(buffer.num_ranks))


def come_late(late_rank: int, timeout_s: float, delay_s: float) -> str:
    """`late_rank` comes too late; returns what each rank is told. The failure breaks the group, so it has its own."""
    rank, buffer = dist.get_rank(), make_buffer(dist.new_group(), num_cpu_timeout_secs=timeout_s)
    if rank == late_rank:
        time.sleep(delay_s)
    try:
        # The end of the session does not hide the error.
        with buffer.agrs_new_session():
            buffer.reduce_scatter(ones(buffer.num_ranks, 2))
    except CommTimeoutError as error:
        assert not buffer.is_in_session
        with pytest.raises(TransportError, match="ContextBuffer cannot be used"), buffer.agrs_new_session():
            buffer.all_gather(ones(2))
        return f"{error.peers} {error}"
    return "in time"


def refuse(odd_rank: int, timeout_s: float) -> None:
    """`odd_rank` passes what cannot be taken; the others are told why it does not come."""
    buffer = make_buffer(dist.new_group(), num_cpu_timeout_secs=timeout_s)
    with buffer.agrs_new_session():
        x = ones(3, 4)
        buffer.all_gather(x.t() if dist.get_rank() == odd_rank else x)


def check_buffers_may_be_dropped_in_any_order() -> None:
    buffers = [make_buffer() for _ in range(3)]
    if dist.get_rank() % 2:
        buffers.reverse()
        buffers.pop().close()
    buffers.clear()
    with make_buffer() as buffer, buffer.agrs_new_session():
        # A closed buffer has no session that could be destroyed twice.
        buffer.close()
        assert not buffer.is_in_session
    dist.barrier()
