"""The small methods of a buffer, arguments of forks, and buffers made from MPI communicators."""

from __future__ import annotations

import pickle
import sys
import time
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from legacy_cases import HIDDEN, World, same

from deep_ep_core.errors import ConfigError
from deep_ep_legacy import Buffer, Config, EventOverlap


def check_small_methods() -> None:
    buffer = Buffer(dist.group.WORLD, 1024, 256, explicitly_destroy=True)
    assert (buffer.rank, buffer.group_size) == (dist.get_rank(), dist.get_world_size())
    assert (buffer.num_nvl_bytes, buffer.num_rdma_bytes, buffer.low_latency_mode) == (1024, 256, False)
    assert buffer.group is dist.group.WORLD
    assert isinstance(Buffer.capture(), EventOverlap)
    Buffer.capture().current_stream_wait()
    assert isinstance(buffer.get_comm_stream(), torch.cpu.Stream)
    view = buffer.get_local_buffer_tensor(torch.int32)
    assert (view.shape, int(view.count_nonzero())) == ((256,), 0)
    view[2:8] = torch.arange(6)
    assert buffer.get_local_buffer_tensor(torch.int32, [2, 3], offset=8).tolist() == [[0, 1, 2], [3, 4, 5]]
    assert buffer.get_local_buffer_tensor(torch.int8, use_rdma_buffer=True).shape == (256,)
    assert "rank" in repr(buffer)
    buffer.destroy()
    assert "destroyed" in repr(buffer)


def check_buffer_of_inference_mode() -> None:
    """Its memory may be written outside of that mode."""
    with torch.inference_mode():
        buffer = Buffer(dist.group.WORLD, 128)
        view = buffer.get_local_buffer_tensor(torch.int32)
    view[0] = 5
    assert buffer.get_local_buffer_tensor(torch.int32, [2]).tolist() == [5, 0]


def check_extra_arguments() -> list[str]:
    """The warnings of calls with arguments of forks, made twice."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(2):
            buffer = Buffer(dist.group.WORLD, use_fabric=True, num_nvl_peers=4, overlap=False)
            world = World(num_tokens=[4] * dist.get_world_size())
            layout = world.layout(buffer)
            x = world.xs[world.rank]
            recv_x, *_, handle, _ = buffer.dispatch(x, **layout, **world.routed(), x_global_scale=None)
            buffer.combine(recv_x, handle, packed_recv_count=None)
    return [str(warning.message) for warning in caught]


def check_low_latency_buffer() -> None:
    """One buffer serves both kinds of calls, as SGLang makes it."""
    num_ranks = dist.get_world_size()
    size = Buffer.get_low_latency_rdma_size_hint(8, 2048, num_ranks, 2 * num_ranks)
    buffer = Buffer(
        dist.group.WORLD,
        0,
        size,
        low_latency_mode=True,
        num_qps_per_rank=2,
        enable_shrink=True,
        explicitly_destroy=True,
    )
    world = World(num_tokens=[4] * num_ranks)
    recv_x = buffer.dispatch(world.xs[world.rank], **world.layout(buffer), **world.routed())[0]
    same(recv_x, world.expected_rows(world.xs, HIDDEN))
    buffer.clean_low_latency_buffer(8, 2048, 2 * num_ranks)
    x = torch.full((4, 2048), world.rank + 1.0, dtype=torch.bfloat16)
    topk_idx = torch.tensor([[0, 2 * num_ranks - 1], [1, -1], [-1, -1], [2 * num_ranks - 2, 0]])
    weights = torch.full((4, 2), 0.5)
    received, count, handle, _, hook = buffer.low_latency_dispatch(
        x, topk_idx, 8, 2 * num_ranks, use_fp8=False, return_recv_hook=True, overlap=False
    )
    hook()
    assert count.sum().item() == num_ranks * int((topk_idx // 2 == world.rank).logical_and(topk_idx >= 0).sum())
    overlap = {
        "overlap": False,
        "comp_signal": torch.ones(2, dtype=torch.int32),
        "block_m": 64,
        "threshold": 8,
        "num_sms": 3,
    }
    combined, _, hook = buffer.low_latency_combine(
        received, topk_idx, weights, list(handle), return_recv_hook=True, **overlap
    )
    hook()
    factors = torch.tensor([1.0, 0.5, 0.0, 1.0]).unsqueeze(1)
    same(combined, (x * factors).to(torch.bfloat16))
    mask = torch.ones(num_ranks, dtype=torch.int32)
    buffer.low_latency_query_mask_buffer(mask)
    assert mask.tolist() == [0] * num_ranks
    buffer.destroy()
    with pytest.raises(ConfigError, match=r"low-latency calls need an open buffer .* a destroyed one"):
        buffer.clean_low_latency_buffer(8, 2048, 2 * num_ranks)


class DistComm:
    """An MPI communicator's methods over a process group."""

    def __init__(self, group: dist.ProcessGroup | None) -> None:
        self.group = group

    def Get_rank(self) -> int:  # noqa: N802
        return dist.get_rank(self.group)

    def Get_size(self) -> int:  # noqa: N802
        return dist.get_world_size(self.group)

    def allgather(self, sendobj: Any) -> list[Any]:
        heard = [None] * self.Get_size()
        dist.all_gather_object(heard, sendobj, group=self.group)
        return heard


class BackwardsComm(DistComm):
    """The same ranks in the other order."""

    def Get_rank(self) -> int:  # noqa: N802
        return self.Get_size() - 1 - super().Get_rank()

    def allgather(self, sendobj: Any) -> list[Any]:
        return super().allgather(sendobj)[::-1]


def check_communicators() -> None:
    """The default group serves a communicator of all ranks; one of some ranks gets a group of them."""
    whole = Buffer(None, comm=DistComm(dist.group.WORLD))
    assert whole.group is dist.group.WORLD
    rank = dist.get_rank()
    halves = [dist.new_group([0, 2]), dist.new_group([1, 3])]
    half = Buffer(None, comm=DistComm(halves[rank % 2]))
    assert dist.get_process_group_ranks(half.group) == [rank % 2, rank % 2 + 2]
    idx = torch.tensor([[1]])
    per_rank, _, per_expert, is_in_rank, _ = half.get_dispatch_layout(idx, 2)
    x = torch.full((1, 8), rank, dtype=torch.bfloat16)
    recv_x = half.dispatch(
        x, num_tokens_per_rank=per_rank, is_token_in_rank=is_in_rank, num_tokens_per_expert=per_expert
    )[0]
    assert recv_x[:, 0].tolist() == ([1, 3] if rank % 2 else [0, 2])[: len(recv_x)]
    assert len(recv_x) == (2 if half.rank == 1 else 0)
    with pytest.raises(ConfigError, match="which it orders as comm does"):
        Buffer(None, comm=BackwardsComm(dist.group.WORLD))


class FileComm:
    """An MPI communicator's methods over files, for processes that have no process group."""

    def __init__(self, folder: Path, rank: int, num_ranks: int) -> None:
        self._folder, self._rank, self._num_ranks = folder, rank, num_ranks
        self._num_calls = 0

    def Get_rank(self) -> int:  # noqa: N802
        return self._rank

    def Get_size(self) -> int:  # noqa: N802
        return self._num_ranks

    def allgather(self, sendobj: Any) -> list[Any]:
        self._num_calls += 1
        names = [f"{self._num_calls}_{rank}" for rank in range(self._num_ranks)]
        written = self._folder / f"{names[self._rank]}.part"
        written.write_bytes(pickle.dumps(sendobj))
        written.rename(self._folder / names[self._rank])
        while not all((self._folder / name).exists() for name in names):
            time.sleep(0.01)
        return [pickle.loads((self._folder / name).read_bytes()) for name in names]


def use_without_process_group(folder: Path, rank: int, num_ranks: int) -> None:
    """A program of MPI alone: two buffers one after the other, as TensorRT-LLM makes them."""
    comm = FileComm(folder, rank, num_ranks)
    for num_bytes in (128, 256):
        buffer = Buffer(None, num_bytes, 0, num_nvl_peers=num_ranks, comm=comm)
        world = World(num_tokens=[4] * num_ranks)
        recv_x = buffer.dispatch(world.xs[rank], **world.layout(buffer), **world.routed(), config=Config(2))[0]
        same(recv_x, world.expected_rows(world.xs, HIDDEN))
        del buffer
    print("right")


if __name__ == "__main__":
    use_without_process_group(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]))
