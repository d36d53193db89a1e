"""What only the device backend can do or get wrong: news that comes late, streams, memory in the window."""

from __future__ import annotations

import time

import pytest
import torch
import torch.distributed as dist
from cp_calls import assert_bits_equal, expected_gather, expected_sum, make_buffer, make_tensor
from cp_errors import _call_once
from cp_setting import full, ones

from deep_ep_core.errors import CommTimeoutError, ConfigError, RankMismatchError, TopologyError
from deep_ep_cp import ContextBuffer
from deep_ep_cp.device import meetings as meetings_module
from deep_ep_cp.device.backend import DeviceBackend

SLEEP_CYCLES = 20_000_000


def backend_of(buffer: ContextBuffer) -> DeviceBackend:
    assert isinstance(buffer._backend, DeviceBackend), buffer
    return buffer._backend


def check_backends_give_the_same_bits() -> None:
    """The same calls on a buffer of each backend, on the same CUDA tensors."""
    rank, num_ranks = dist.get_rank(), dist.get_world_size()
    one, other = make_buffer(), make_buffer(backend="collective")
    assert "device" in repr(one)
    assert "collective" in repr(other)
    for dtype in (torch.bfloat16, torch.float32, torch.int8):
        own, addends = make_tensor((33, 5), dtype, rank), make_tensor((num_ranks, 33, 5), dtype, 1, rank)
        results = []
        for buffer in (one, other):
            with buffer.agrs_new_session():
                gathered, wait = buffer.all_gather(own)
                reduced, wait_sum = buffer.reduce_scatter(addends)
                wait()
                wait_sum()
                results.append((gathered.clone(), reduced))
        for got, expected in zip(*results, strict=True):
            assert_bits_equal(got, expected)


def check_gathered_tensors_lie_in_the_window() -> None:
    buffer = make_buffer()
    memory = backend_of(buffer).memory
    with buffer.agrs_new_session():
        gathered, wait = buffer.all_gather(ones(5))
        wait()
    assert gathered.data_ptr() == memory.data_ptr()
    buffer.close()
    # The window is withdrawn from the peers; the memory is there as long as a tensor views it.
    assert bool((gathered == 1).all())


def check_calls_block_no_host() -> None:
    """Calls return while the streams are still at work that comes before them, on this rank and on others."""
    rank, buffer = dist.get_rank(), make_buffer()
    with buffer.agrs_new_session():
        buffer.all_gather(ones(3))[1]()
        torch.cuda.synchronize()
        torch.cuda._sleep(50 * SLEEP_CYCLES)
        done = torch.cuda.Event()
        done.record()
        gathered, wait = buffer.all_gather(full((2,), rank))
        reduced, wait_sum = buffer.reduce_scatter(ones(buffer.num_ranks, 2))
        wait()
        wait_sum()
        assert not done.query(), "the host came here only behind the device"
        assert gathered[:, 0].tolist() == list(range(buffer.num_ranks))
        assert reduced.tolist() == [buffer.num_ranks] * 2


def check_no_rank_overwrites_what_another_one_still_reads() -> None:
    """A session's end holds the others' next session back, by the streams alone."""
    rank, num_ranks = dist.get_rank(), dist.get_world_size()
    buffer = make_buffer()
    kept = []
    for round_idx in range(20):
        with buffer.agrs_new_session():
            gathered, wait = buffer.all_gather(make_tensor((1000,), torch.int32, round_idx, rank))
            wait()
            if round_idx % num_ranks == rank:
                torch.cuda._sleep(SLEEP_CYCLES)
            kept.append(gathered.clone())
    for round_idx, copy in enumerate(kept):
        assert_bits_equal(copy, expected_gather((1000,), torch.int32, round_idx))


def check_what_a_session_left_under_way_does_not_reach_the_next_one() -> None:
    """In-place tensors of a session may be written although no handle of the one before it was called."""
    rank, buffer = dist.get_rank(), make_buffer()
    for round_idx in range(20):
        with buffer.agrs_new_session():
            if (round_idx + rank) % 2:
                torch.cuda._sleep(SLEEP_CYCLES)
            buffer.all_gather(make_tensor((4096,), torch.int64, round_idx, rank))
        with buffer.agrs_new_session():
            slot = buffer.agrs_get_inplace_tensor((100, round_idx + 1), torch.int32)
            slot.copy_(make_tensor(slot.shape, torch.int32, round_idx, rank))
            gathered, wait = buffer.all_gather(slot)
            wait()
            assert_bits_equal(gathered, expected_gather(slot.shape, torch.int32, round_idx))


def check_callers_may_use_other_streams() -> None:
    rank, buffer = dist.get_rank(), make_buffer()
    streams = [torch.cuda.Stream() for _ in range(3)]
    for round_idx in range(12):
        with torch.cuda.stream(streams[round_idx % 3]), buffer.agrs_new_session():
            gathered, wait = buffer.all_gather(make_tensor((999,), torch.float32, round_idx, rank))
            reduced, wait_sum = buffer.reduce_scatter(make_tensor((buffer.num_ranks, 9), torch.float16, rank))
            wait_sum()
            wait()
            assert_bits_equal(gathered, expected_gather((999,), torch.float32, round_idx))
            assert_bits_equal(reduced, expected_sum((9,), torch.float16))


def check_the_host_may_be_far_ahead() -> None:
    """More calls under way than there is room for news of."""
    buffer = make_buffer()
    meetings = backend_of(buffer)._meetings
    meetings._heard = meetings._heard[:5]
    torch.cuda._sleep(10 * SLEEP_CYCLES)
    for _ in range(10):
        with buffer.agrs_new_session():
            gathered, wait = buffer.all_gather(full((3,), dist.get_rank()))
            wait()
            last = gathered.clone()
    assert last[:, 2].tolist() == list(range(buffer.num_ranks))
    assert meetings_module.MAX_AHEAD > 5


def check_capture_is_refused() -> None:
    buffer = make_buffer()
    x = ones(3)
    with buffer.agrs_new_session():
        buffer.all_gather(x)[1]()
        torch.cuda.synchronize()
        with torch.cuda.graph(torch.cuda.CUDAGraph()):
            y = x + 1
            with pytest.raises(ConfigError, match="must not be captured in a CUDA graph"):
                buffer.all_gather(x)
            y += 1
        # And nothing was used up or sent.
        gathered, wait = buffer.all_gather(x)
        wait()
        assert gathered.shape == (buffer.num_ranks, 3)


def disagree(odd_rank: int, name: str) -> None:
    """One call in which `odd_rank` does something else; the error comes with one of the calls behind it."""
    buffer = make_buffer(num_cpu_timeout_secs=20)
    _call_once(buffer, name, dist.get_rank() == odd_rank)
    _call_until_it_raises(buffer)


def _call_until_it_raises(buffer: ContextBuffer) -> None:
    for _ in range(400):
        _gather_in_a_session(buffer)
        time.sleep(0.02)


def _gather_in_a_session(buffer: ContextBuffer) -> None:
    with buffer.agrs_new_session():
        buffer.all_gather(ones(1))


def check_disagreement_is_told_again_and_again() -> None:
    rank, buffer = dist.get_rank(), make_buffer(num_cpu_timeout_secs=20)
    with pytest.raises(RankMismatchError, match="after the bytes were sent"):
        _disagree_in_shape(buffer, rank)
    for _ in range(2):
        with pytest.raises(RankMismatchError, match="a new buffer on all of them"):
            _gather_in_a_session(buffer)
    with make_buffer() as fresh, fresh.agrs_new_session():
        gathered, wait = fresh.all_gather(full((1,), rank))
        wait()
        assert gathered.flatten().tolist() == list(range(buffer.num_ranks))


def _disagree_in_shape(buffer: ContextBuffer, rank: int) -> None:
    with buffer.agrs_new_session():
        buffer.all_gather(ones(2 + rank))
    _call_until_it_raises(buffer)


def come_late(late_rank: int, timeout_s: float, delay_s: float) -> str:
    """`late_rank` comes too late; returns what each rank is told, and shows that its GPU works on.

    It asks the others, who do not answer, and so breaks the connections of the group, which is one of its own.
    """
    rank, group = dist.get_rank(), dist.new_group()
    # NCCL's communicator, of which a group has one, takes its time.
    make_buffer(group).close()
    buffer = make_buffer(group, num_cpu_timeout_secs=timeout_s)
    # Kernels are loaded here: a load behind a stream that waits would wait with it.
    with buffer.agrs_new_session():
        buffer.all_gather(ones(1))[1]()
        buffer.reduce_scatter(ones(buffer.num_ranks, 2))[1]()
    torch.cuda.synchronize()
    dist.barrier()
    if rank == late_rank:
        time.sleep(delay_s)
    told = "in time"
    try:
        with buffer.agrs_new_session():
            buffer.all_gather(ones(4))[1]()
            buffer.reduce_scatter(ones(buffer.num_ranks, 2))[1]()
        torch.cuda.synchronize()
        with buffer.agrs_new_session():
            buffer.all_gather(ones(4))
        torch.cuda.synchronize()
        with buffer.agrs_new_session():
            buffer.all_gather(ones(4))
    except CommTimeoutError as error:
        told = f"{error.peers} {error.phase}"
        with pytest.raises(CommTimeoutError), buffer.agrs_new_session():
            buffer.all_gather(ones(4))
    assert int(torch.arange(1000, device="cuda").sum()) == 499500
    buffer.close()
    dist.barrier()
    with make_buffer(num_cpu_timeout_secs=60) as fresh, fresh.agrs_new_session():
        gathered, wait = fresh.all_gather(full((1,), rank))
        wait()
        assert gathered.flatten().tolist() == list(range(fresh.num_ranks))
    return told


def choose(backend: str) -> tuple[str, str]:
    """The backend that a buffer takes, on a group with a CUDA backend; or the error that it raises."""
    group = dist.new_group(backend="cpu:gloo,cuda:nccl")
    try:
        with make_buffer(group, backend=backend) as buffer, buffer.agrs_new_session():
            gathered, wait = buffer.all_gather(full((3,), dist.get_rank()))
            wait()
            assert gathered[:, 0].tolist() == list(range(buffer.num_ranks))
            return repr(buffer), ""
    except TopologyError as error:
        return "", str(error)


CHECKS = (
    check_backends_give_the_same_bits,
    check_gathered_tensors_lie_in_the_window,
    check_calls_block_no_host,
    check_no_rank_overwrites_what_another_one_still_reads,
    check_what_a_session_left_under_way_does_not_reach_the_next_one,
    check_callers_may_use_other_streams,
    check_the_host_may_be_far_ahead,
    check_capture_is_refused,
)
