"""Ranks that disagree, refuse, come late or die; what the others are told.

What ends in a timeout has a group of its own, since it breaks a group's connections for good, and the pool's own group
must live on. Who is late stays away until the others gave up, so no test depends on a fast machine.
"""

from __future__ import annotations

import contextlib
import os
import signal
import time
from collections.abc import Callable

import pytest
import torch
import torch.distributed as dist
from pp_messages import make_buffer, number, payload, space
from pp_setting import is_on_device, open_buffer, settle

from deep_ep_core.errors import CommTimeoutError, ConfigError, RankMismatchError, TransportError
from deep_ep_pp import PipelineBuffer


def failing_buffer(timeout_s: float) -> PipelineBuffer:
    """A configured buffer with a window of one, on a group of its own."""
    buffer = open_buffer(dist.new_group(), timeout_s=timeout_s)
    buffer.pp_set_config(64, 1)
    return buffer


def failure_of(call: Callable[[], object]) -> dict[str, object]:
    """What a call's timeout says."""
    with pytest.raises(CommTimeoutError) as caught:
        call()
    error = caught.value
    return {"peers": list(error.peers), "phase": error.phase, "message": str(error)}


def finish(buffer: PipelineBuffer) -> None:
    """Wait for what the device was given, and hear of it, as the host does by itself where there is no device."""
    if is_on_device():
        settle()
        assert buffer.runtime is not None
        buffer.runtime.flush()


def recv_from(buffer: PipelineBuffer, src: int) -> Callable[[], object]:
    def recv() -> None:
        buffer.pp_recv(number(0), src)
        finish(buffer)

    return recv


def send_beyond_the_window(buffer: PipelineBuffer, dst: int) -> None:
    for _ in range(2):
        buffer.pp_send(number(0), dst)
    finish(buffer)


def wait_for_a_late_rank(timeout_s: float) -> dict[str, object] | None:
    """A pipeline of 4 in which rank 0 does not send, so that each rank waits for the one before."""
    rank = dist.get_rank()
    buffer = failing_buffer(timeout_s)
    failure = failure_of(recv_from(buffer, rank - 1)) if rank else None
    dist.barrier()
    return failure


def wait_for_a_late_receiver(timeout_s: float) -> dict[str, object] | None:
    """Rank 1 receives nothing, so rank 0 cannot send a second message, nor close after the first one."""
    buffer = failing_buffer(timeout_s)
    failure = None
    if dist.get_rank() == 0:
        failure = failure_of(lambda: send_beyond_the_window(buffer, 1))
        buffer.close()
    dist.barrier()
    return failure


def close_before_anybody_receives(timeout_s: float) -> dict[str, object] | None:
    buffer = failing_buffer(timeout_s)
    failure = None
    if dist.get_rank() == 0:
        buffer.pp_send(number(0), 1)
        failure = failure_of(buffer.close)
    dist.barrier()
    return failure


def leave_a_block_by_an_error(timeout_s: float) -> float:
    """What went wrong is seen at once, though nobody receives. Returns after how long."""
    buffer = failing_buffer(timeout_s)
    # Made before a stream waits: a copy from the host would wait with it, and the host for the copy.
    first, second, received = number(0), number(0), number(0)
    started = time.monotonic()
    if dist.get_rank() == 0:
        with contextlib.suppress(KeyError), buffer:
            buffer.pp_send(first, 1)
            if is_on_device():
                # These wait in the stream, where they must not be waited for.
                buffer.pp_send(second, 1)
                buffer.pp_recv(received, 1)
            raise KeyError
        assert buffer.runtime is None
    elapsed_s = time.monotonic() - started
    dist.barrier()
    return elapsed_s


def wait_for_each_other(timeout_s: float) -> dict[str, object]:
    buffer = failing_buffer(timeout_s)
    failure = failure_of(recv_from(buffer, 1 - dist.get_rank()))
    dist.barrier()
    return failure


def die(victim: int, timeout_s: float) -> dict[str, object]:
    """`victim` is killed while one neighbour sends to it, one receives, and one waits for the first of them."""
    rank = dist.get_rank()
    buffer = failing_buffer(timeout_s)
    dist.barrier()
    if rank == victim:
        os.kill(os.getpid(), signal.SIGKILL)
    if rank == (victim + 1) % 4:
        return failure_of(recv_from(buffer, victim))
    if rank == (victim - 1) % 4:
        return failure_of(lambda: send_beyond_the_window(buffer, victim))
    return failure_of(recv_from(buffer, (victim - 1) % 4))


def refuse_to_send(timeout_s: float) -> object:
    """Rank 0 passes too much, so rank 1 waits in vain, and rank 2 for rank 1."""
    rank = dist.get_rank()
    buffer = failing_buffer(timeout_s)
    told: object = None
    if rank == 0:
        with pytest.raises(ConfigError) as caught:
            buffer.pp_send(space(65), 1)
        told = str(caught.value)
    elif rank < 3:
        told = failure_of(recv_from(buffer, rank - 1))
    dist.barrier()
    return told


def refuse_configuration(timeout_s: float) -> object:
    rank = dist.get_rank()
    buffer = open_buffer(dist.new_group(), timeout_s=timeout_s)
    told: object = None
    if rank == 2:
        with pytest.raises(ConfigError) as caught:
            buffer.pp_set_config(64, 0)
        told = str(caught.value)
    else:
        told = failure_of(lambda: buffer.pp_set_config(64, 2))
    dist.barrier()
    return told


def use_after_failure(timeout_s: float) -> list[str]:
    """What each further call says; closing says nothing."""
    buffer = failing_buffer(timeout_s)
    told = []
    if dist.get_rank() == 0:
        failure_of(recv_from(buffer, 1))
        calls = (
            lambda: buffer.pp_send(number(0), 1),
            recv_from(buffer, 1),
            lambda: buffer.pp_set_config(64, 1),
        )
        for call in calls:
            with pytest.raises(TransportError) as caught:
                call()
            told.append(f"{type(caught.value).__name__}: {caught.value}")
        buffer.close()
    dist.barrier()
    return told


def go_on_after_a_refusal() -> None:
    """A refused call sends and receives nothing, so the right one can follow."""
    rank = dist.get_rank()
    with make_buffer(max_bytes=64) as buffer:
        if rank == 0:
            with pytest.raises(ConfigError, match="must fit"):
                buffer.pp_send(space(65), 1)
            buffer.pp_send(payload(0, 1, 0, 9), 1)
        elif rank == 1:
            with pytest.raises(ConfigError, match="must fit"):
                buffer.pp_recv(space(65), 0)
            got = space(9)
            buffer.pp_recv(got, 0)
            assert torch.equal(got, payload(0, 1, 0, 9))


def receive_other_sizes() -> list[str]:
    """Wrong sizes and numbers of tensors are refused, and the message stays; so do those behind it."""
    rank = dist.get_rank()
    told = []
    with make_buffer() as buffer:
        if rank == 0:
            buffer.pp_send([payload(0, 1, 0, 9), payload(0, 1, 1, 0)], 1)
            buffer.pp_send(payload(0, 1, 2, 5), 1)
        elif rank == 1:
            got = torch.zeros(9, dtype=torch.uint8)
            none = got[:0]
            for wrong in (got, got[:5], [none, got], [got, none, none], [got[:8], none]):
                with pytest.raises(ConfigError) as caught:
                    buffer.pp_recv(wrong, 0)
                told.append(str(caught.value))
                assert not got.any()
            buffer.pp_recv([got, none], 0)
            assert torch.equal(got, payload(0, 1, 0, 9))
            buffer.pp_recv(got[:5], 0)
            assert torch.equal(got[:5], payload(0, 1, 2, 5))
    return told


def send_one_around(buffer: PipelineBuffer) -> None:
    rank, num_ranks = dist.get_rank(), dist.get_world_size()
    got = number(0)
    buffer.pp_send(number(rank), (rank + 1) % num_ranks)
    buffer.pp_recv(got, (rank - 1) % num_ranks)
    assert got.item() == (rank - 1) % num_ranks


def disagree_in_configuration(odd_rank: int, odd: tuple[int, int]) -> dict[str, object]:
    """All are told, keep the old configuration and go on with it, and may agree on another one later."""
    rank = dist.get_rank()
    with make_buffer(window=1, max_bytes=64) as buffer:
        before = buffer.config
        with pytest.raises(RankMismatchError) as caught:
            buffer.pp_set_config(*(odd if rank == odd_rank else (128, 3)))
        assert buffer.config == before
        send_one_around(buffer)
        buffer.pp_set_config(128, 3)
        assert (buffer.config.num_max_tensor_bytes, buffer.config.num_max_inflight_tensors) == (128, 3)
        send_one_around(buffer)
    return {"field": caught.value.field, "values": caught.value.values, "message": str(caught.value)}


def reconfigure_with_a_message_on_its_way() -> str:
    """Every rank is told, also those that neither sent nor shall receive; nothing changes until it was received."""
    rank = dist.get_rank()
    with make_buffer(window=2, max_bytes=64) as buffer:
        for _ in range(2):
            send_one_around(buffer)
        if rank == 3:
            buffer.pp_send(number(5), 1)
        before = buffer.config
        with pytest.raises(ConfigError) as caught:
            buffer.pp_set_config(128, 1)
        assert buffer.config == before
        if rank == 1:
            got = number(0)
            buffer.pp_recv(got, 3)
            assert got.item() == 5
        buffer.pp_set_config(128, 1)
        send_one_around(buffer)
    return str(caught.value)


def disagree_in_constructor(odd_rank: int, odd: dict[str, object]) -> None:
    PipelineBuffer(None, num_cpu_timeout_secs=20, **(odd if dist.get_rank() == odd_rank else {}))
