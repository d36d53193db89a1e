"""What only the device backend does: streams, what the host is told later, and that no SM is used."""

from __future__ import annotations

import contextlib
import os

import pytest
import torch
import torch.distributed as dist
from pp_failures import finish
from pp_messages import make_buffer, payload, space
from pp_setting import SETTING, settle

from deep_ep_core.errors import ConfigError
from deep_ep_pp import PipelineBuffer


def check_the_choice() -> None:
    """On GPUs of one node the device backend is taken where nothing else is said; over a network it is asked for."""
    num_node_ranks = int(os.environ.get("NCCL_LSA_TEAM_SIZE", dist.get_world_size()))
    name = "device" if num_node_ranks == dist.get_world_size() else "collective"
    with PipelineBuffer(None) as buffer:
        assert buffer.runtime is not None
        assert buffer.runtime.name == name
        assert name in repr(buffer)


def check_the_host_runs_ahead() -> None:
    """Both ranks enqueue ten windows of messages both ways before any of them can be there."""
    rank = dist.get_rank()
    store = dist.PrefixStore(f"run-ahead/{os.environ.get('NCCL_LSA_TEAM_SIZE')}", dist.group.WORLD.get_group_store())
    if rank > 1:
        make_buffer(window=2).close()
        return
    peer, num_messages, size = 1 - rank, 20, 100_000
    sent = [payload(rank, peer, idx, size) for idx in range(num_messages)]
    got = [space(size) for _ in range(num_messages)]
    with make_buffer(window=2) as buffer:
        stream = torch.cuda.current_stream()
        if rank == 0:
            # All of rank 0 is enqueued while rank 1 has done nothing.
            for idx in range(num_messages):
                buffer.pp_send(sent[idx], peer)
                buffer.pp_recv(got[idx], peer)
            assert not stream.query(), "nothing can have come"
            store.set("enqueued", "")
        else:
            store.wait(["enqueued"])
            for idx in range(num_messages):
                buffer.pp_send(sent[idx], peer)
                buffer.pp_recv(got[idx], peer)
        for idx, tensor in enumerate(got):
            assert torch.equal(tensor, payload(peer, rank, idx, size)), idx


def check_streams() -> None:
    """Messages on changing streams keep their order, and what a stream wrote before is what is sent."""
    rank, num_ranks = dist.get_rank(), dist.get_world_size()
    dst, src = (rank + 1) % num_ranks, (rank - 1) % num_ranks
    streams = [torch.cuda.Stream() for _ in range(3)]
    num_messages, size = 24, 50_000
    with make_buffer(window=2) as buffer:
        sent = torch.zeros(num_messages, size, dtype=torch.int64, device=SETTING.device)
        got = torch.zeros_like(sent)
        settle()
        for idx in range(num_messages):
            with torch.cuda.stream(streams[idx % 3]):
                # Late, and on this stream only.
                torch.cuda._sleep(200_000)
                sent[idx] = rank * 1000 + idx
                buffer.pp_send(sent[idx], dst)
            with torch.cuda.stream(streams[(idx + 1) % 3]):
                buffer.pp_recv(got[idx], src)
                got[idx] += 1
        settle()
        expected = torch.arange(num_messages, device=SETTING.device) + src * 1000 + 1
        assert torch.equal(got, expected[:, None].expand_as(got))


def check_other_sizes() -> list[str]:
    """Wrong sizes are told by a later call, with both; the message is lost, and those behind it are right."""
    rank = dist.get_rank()
    told: list[str] = []
    with make_buffer() as buffer:
        if rank == 0:
            buffer.pp_send([payload(0, 1, 0, 9), payload(0, 1, 1, 0)], 1)
            buffer.pp_send(payload(0, 1, 2, 5), 1)
            buffer.pp_send(payload(0, 1, 3, 33), 1)
        elif rank == 1:
            first, second = space(9), space(5)
            buffer.pp_recv(first, 0)
            settle()
            with pytest.raises(ConfigError) as caught:
                buffer.pp_recv(second, 0)
            told.append(str(caught.value))
            buffer.pp_recv(second, 0)
            assert torch.equal(second, payload(0, 1, 2, 5))
            buffer.pp_recv([space(33), space(1)], 0)
            with pytest.raises(ConfigError) as caught:
                finish(buffer)
            told.append(str(caught.value))
            finish(buffer)
    return told


def check_other_sizes_on_the_host() -> str | None:
    """Where the host waits, it is told at once, and the tensors stay as they were."""
    told = None
    with make_buffer() as buffer:
        if dist.get_rank() == 0:
            buffer.pp_send(payload(0, 1, 0, 9), 1)
        elif dist.get_rank() == 1:
            got = space(8)
            with pytest.raises(ConfigError) as caught:
                buffer.pp_recv(got, 0)
            told = str(caught.value)
            assert torch.equal(got, space(8))
    return told


def check_tensors_of_host_and_device_are_one_to_messages() -> None:
    rank = dist.get_rank()
    with make_buffer() as buffer:
        if rank == 0:
            buffer.pp_send(payload(0, 1, 0, 1000).cpu(), 1)
            buffer.pp_send(payload(0, 1, 1, 1000), 1)
        elif rank == 1:
            got = space(1000)
            buffer.pp_recv(got, 0)
            assert torch.equal(got, payload(0, 1, 0, 1000))
            on_host = got.cpu().zero_()
            buffer.pp_recv(on_host, 0)
            assert torch.equal(on_host, payload(0, 1, 1, 1000).cpu())


def check_autograd_knows() -> None:
    """A tensor that was received into has changed, so a graph that saved it must not use it."""
    with make_buffer() as buffer:
        if dist.get_rank() == 0:
            buffer.pp_send(torch.ones(3, device=SETTING.device), 1)
        elif dist.get_rank() == 1:
            x = torch.zeros(3, device=SETTING.device)
            y = (torch.ones(3, device=SETTING.device, requires_grad=True) * x).sum()
            buffer.pp_recv(x, 0)
            with pytest.raises(RuntimeError, match="modified by an inplace operation"):
                y.backward()


def check_capture_is_refused() -> None:
    with make_buffer() as buffer:
        x = space(100)
        graph = torch.cuda.CUDAGraph()
        other = (dist.get_rank() + 1) % dist.get_world_size()
        told = []
        with torch.cuda.graph(graph):
            for call in (buffer.pp_send, buffer.pp_recv):
                with pytest.raises(ConfigError) as caught:
                    call(x, other)
                told.append(str(caught.value))
        assert all("must not be captured in a CUDA graph" in message for message in told), told
        assert buffer.runtime is not None
        buffer.runtime.flush()


def names_of_kernels(size: int, on_default_stream: bool) -> list[str]:
    """What runs on SMs during ten messages both ways, by name."""
    rank, num_ranks = dist.get_rank(), dist.get_world_size()
    dst, src = (rank + 1) % num_ranks, (rank - 1) % num_ranks
    with make_buffer(window=2, max_bytes=size) as buffer:
        sent, got = payload(rank, dst, 0, size), space(size)
        stream = contextlib.nullcontext() if on_default_stream else torch.cuda.stream(torch.cuda.Stream())
        settle()
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile, stream:
            for _ in range(10):
                buffer.pp_send(sent, dst)
                buffer.pp_recv(got, src)
            settle()
        assert torch.equal(got, payload(src, rank, 0, size))
    on_device = [event.name for event in profile.events() if event.device_type == torch.autograd.DeviceType.CUDA]
    assert any(name.startswith("Memcpy") for name in on_device), on_device
    return sorted({name for name in on_device if not name.startswith(("Memcpy", "Memset"))})


def slot_bytes_by_configuration() -> list[int]:
    """Memory of the slots after each configuration: it grows where it must, and stays where it is large enough."""
    sizes = []
    with make_buffer(window=1, max_bytes=1 << 20) as buffer:
        for window, max_bytes in ((1, 1 << 20), (2, 1 << 20), (1, 1000), (2, 1 << 20)):
            buffer.pp_set_config(max_bytes, window)
            slots = buffer.runtime._slots  # type: ignore[union-attr]
            sizes.append(slots.num_bytes)
    return sizes
