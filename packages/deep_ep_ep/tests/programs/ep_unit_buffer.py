"""What a buffer says of itself, its sizes and its lifetime."""

from __future__ import annotations

import contextlib
import io
import os
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.distributed as dist

from deep_ep_core.env import reset_env
from deep_ep_core.errors import ConfigError
from deep_ep_ep import (
    ElasticBuffer,
    get_logical_domain_size,
    get_physical_domain_size,
)
from deep_ep_ep.sizing import BufferShape, buffer_size_hint, dispatch_buffer_bytes

MIB = 1 << 20

ATTRIBUTES = (
    "rank_idx",
    "num_ranks",
    "allow_hybrid_mode",
    "allow_multiple_reduction",
    "prefer_overlap_with_compute",
    "deterministic",
    "nccl_comm_handle",
    "num_bytes",
    "num_max_tokens_per_rank",
    "num_allocated_qps",
    "explicitly_destroy",
    "num_scaleout_ranks",
    "num_scaleup_ranks",
    "scaleout_rank_idx",
    "scaleup_rank_idx",
    "num_rdma_ranks",
    "num_nvlink_ranks",
    "sl_idx",
)


def open_buffer(group: dist.ProcessGroup | None = None, **options: Any) -> ElasticBuffer:
    return ElasticBuffer(group, **{"num_bytes": 64 * MIB, "num_cpu_timeout_secs": 60, **options})


def route(num_tokens: int, num_experts: int, num_topk: int, *, seed: int = 0) -> torch.Tensor:
    """Distinct experts for each token of this rank, one entry in six masked."""
    generator = torch.Generator().manual_seed(100 * seed + dist.get_rank())
    topk_idx = torch.rand(num_tokens, num_experts, generator=generator).argsort(1)[:, :num_topk].contiguous()
    topk_idx[torch.rand(topk_idx.shape, generator=generator) < 1 / 6] = -1
    return topk_idx


def num_copies(topk_idx: torch.Tensor, num_local_experts: int) -> torch.Tensor:
    """`[num_tokens, 1]`: to how many ranks each token goes."""
    ranks = [{e // num_local_experts for e in experts if e >= 0} for experts in topk_idx.tolist()]
    return torch.tensor([[len(each)] for each in ranks]).view(-1, 1)


# What it says of itself


def describe(options: dict[str, Any]) -> dict[str, Any]:
    """The attributes of a new buffer, and what its methods and the module's functions say of the domains."""
    group = dist.group.WORLD
    buffer = open_buffer(group, **options)
    assert buffer.group is group
    assert buffer.runtime is not None
    told = {name: getattr(buffer, name) for name in ATTRIBUTES}
    told["physical"] = buffer.get_physical_domain_size()
    told["logical"] = buffer.get_logical_domain_size()
    told["physical of the group"] = get_physical_domain_size(group)
    told["logical of the group"] = get_logical_domain_size(group)
    told["logical of the group, direct"] = get_logical_domain_size(group, allow_hybrid_mode=False)
    buffer.close()
    return told


def estimates(options: dict[str, Any], calls: list[dict[str, Any]], num_sms: list[int]) -> tuple[list[int], list[int]]:
    """Answers of `get_theoretical_num_sms` to calls, and of `get_theoretical_num_qps` to SM counts."""
    buffer = open_buffer(**options)
    return (
        [buffer.get_theoretical_num_sms(**call) for call in calls],
        [buffer.get_theoretical_num_qps(count) for count in num_sms],
    )


def states_in_repr() -> list[str]:
    """The text of a buffer that is open, closed by its block, closed again, and destroyed twice."""
    with open_buffer(num_bytes=2 * MIB) as buffer:
        texts = [repr(buffer)]
        assert buffer.runtime is not None
    texts.append(repr(buffer))
    assert buffer.runtime is None
    buffer.close()
    texts.append(repr(buffer))
    destroyed = open_buffer(num_bytes=2 * MIB, explicitly_destroy=True)
    destroyed.destroy()
    destroyed.destroy()
    assert destroyed.runtime is None
    assert destroyed.nccl_comm_handle is None
    texts.append(repr(destroyed))
    for call in (buffer.barrier, destroyed.barrier):
        with pytest.raises(ConfigError, match="must be open"):
            call()
    return texts


def close_when_the_block_raises() -> None:
    with pytest.raises(KeyError, match="mine"), open_buffer() as buffer:
        raise KeyError("mine")
    assert buffer.runtime is None


@contextlib.contextmanager
def environment(**variables: str) -> Iterator[None]:
    """Settings of this process for the length of the block."""
    before = dict(os.environ)
    os.environ.update(variables)
    reset_env()
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(before)
        reset_env()


def service_levels() -> tuple[int, int, int, int]:
    """The default, one asked for, and the environment's word against both."""
    default, asked = open_buffer().sl_idx, open_buffer(sl_idx=5).sl_idx
    with environment(EP_OVERRIDE_RDMA_SL="0"):
        return default, asked, open_buffer().sl_idx, open_buffer(sl_idx=5).sl_idx


def debug_output() -> tuple[list[str], list[str]]:
    """Lines that this rank prints when a buffer is made, and in three dispatches with two shapes of routing."""
    x = torch.ones(4, 16)
    made, used = io.StringIO(), io.StringIO()
    with environment(EP_BUFFER_DEBUG="1"):
        with contextlib.redirect_stdout(made):
            buffer = open_buffer(num_max_tokens_per_rank=4)
        with contextlib.redirect_stdout(used):
            for num_topk in (1, 1, 2):
                buffer.dispatch(x, topk_idx=route(4, 8, num_topk), num_experts=8)
    with contextlib.redirect_stdout(made):
        open_buffer()
    return made.getvalue().splitlines(), used.getvalue().splitlines()


# Sizes


def check_size_hint(is_two_nodes: bool) -> None:
    """The hint is `sizing`'s number for the group's domains, is taken as `num_bytes`, and is what None takes."""
    group = dist.group.WORLD
    num_ranks = dist.get_world_size()
    for arguments in (
        {"num_max_tokens_per_rank": 128, "hidden": 256},
        {"num_max_tokens_per_rank": 300, "hidden": 512, "num_topk": 6},
        {"num_max_tokens_per_rank": 300, "hidden": 512, "num_topk": 6, "use_fp8_dispatch": True},
        {"num_max_tokens_per_rank": 128, "hidden": 256, "num_topk": 8, "allow_hybrid_mode": False},
        {"num_max_tokens_per_rank": 128, "hidden": 256, "num_topk": 8, "allow_multiple_reduction": False},
    ):
        is_hybrid = is_two_nodes and arguments.get("allow_hybrid_mode", True)
        shape = BufferShape(
            num_scaleout_ranks=2 if is_hybrid else 1,
            num_scaleup_ranks=num_ranks // 2 if is_hybrid else num_ranks,
            is_scaleup_nvlink=is_hybrid or not is_two_nodes,
            **{name: value for name, value in arguments.items() if name != "allow_hybrid_mode"},
        )
        hint = ElasticBuffer.get_buffer_size_hint(group, **arguments)
        assert hint == buffer_size_hint(shape), arguments
        assert hint % (2 * MIB) == 0
        assert ElasticBuffer.get_buffer_size_hint(None, **arguments) == hint
        with ElasticBuffer(group, num_cpu_timeout_secs=60, **arguments) as buffer:
            assert buffer.num_bytes == hint, arguments
        with ElasticBuffer(group, num_bytes=hint, num_cpu_timeout_secs=60) as buffer:
            assert buffer.num_bytes == hint


def check_hinted_buffer_is_large_enough() -> None:
    """A buffer of the hinted size takes the largest calls that it was sized for, FP8 scales included."""
    for use_fp8 in (False, True):
        for options in ({}, {"allow_hybrid_mode": False}, {"allow_multiple_reduction": False}):
            hint = ElasticBuffer.get_buffer_size_hint(None, 64, 512, 4, use_fp8, **options)
            with ElasticBuffer(None, num_bytes=hint, num_cpu_timeout_secs=60, **options) as buffer:
                rows = torch.ones(64, 512, dtype=torch.uint8 if use_fp8 else torch.bfloat16)
                x = (rows, torch.ones(64, 16)) if use_fp8 else rows
                *_, handle, _ = buffer.dispatch(x, topk_idx=route(64, 8, 4), num_experts=8, num_max_tokens_per_rank=64)
                buffer.combine(torch.ones(handle.num_recv_tokens, 512, dtype=torch.bfloat16), handle)


def fit_exactly() -> dict[str, str]:
    """A dispatch that needs every byte of 2 MiB runs; each that needs a little more is refused, in these words.

    On 4 ranks of one domain: 4 * 512 records of 992 bytes of payload and 32 of metadata (top-2: 28, rounded up).
    """
    shape = BufferShape(
        num_scaleout_ranks=1,
        num_scaleup_ranks=4,
        is_scaleup_nvlink=True,
        num_max_tokens_per_rank=512,
        hidden=496,
        num_topk=2,
    )
    assert dispatch_buffer_bytes(shape) == 2 * MIB
    buffer = open_buffer(num_bytes=2 * MIB)
    topk_idx = route(3, 8, 2)

    def dispatch(hidden: int = 496, num_max_tokens_per_rank: int = 512, topk_idx: torch.Tensor = topk_idx) -> None:
        x = torch.ones(3, hidden, dtype=torch.bfloat16)
        recv_x, _, _, handle, _ = buffer.dispatch(
            x, topk_idx=topk_idx, num_experts=8, num_max_tokens_per_rank=num_max_tokens_per_rank
        )
        buffer.combine(recv_x, handle)

    dispatch()
    # A payload counts in steps of 32 bytes, so 16 bytes less is the same size.
    dispatch(hidden=488)
    refused = {}
    for name, change in {
        "16 bytes more a row": {"hidden": 504},
        "one token more": {"num_max_tokens_per_rank": 513},
        "one entry more": {"topk_idx": route(3, 8, 3)},
    }.items():
        with pytest.raises(ConfigError) as caught:
            dispatch(**change)
        refused[name] = str(caught.value)
    # Nothing was sent, so the buffer goes on working.
    dispatch()
    return refused
