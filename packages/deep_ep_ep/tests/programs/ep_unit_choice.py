"""Buffers on ranks without a GPU: which backend they get, and what ranks are told that want another."""

from __future__ import annotations

import logging

import pytest
import torch
import torch.distributed as dist

from deep_ep_core.errors import ConfigError
from deep_ep_ep import ElasticBuffer


class Lines(logging.Handler):
    """Keeps what is logged."""

    def __init__(self) -> None:
        super().__init__()
        self.lines: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.lines.append(record.getMessage())


def make_buffer(**options: object) -> ElasticBuffer:
    return ElasticBuffer(None, num_max_tokens_per_rank=8, hidden=64, num_cpu_timeout_secs=30, **options)  # type: ignore[arg-type]


def ask_for_the_device_backend() -> str:
    with pytest.raises(ConfigError) as caught:
        make_buffer(backend="device")
    make_buffer().barrier()
    return str(caught.value)


def logged_choice(backend: str) -> tuple[str, list[str]]:
    handler, logger = Lines(), logging.getLogger("deep_ep_ep")
    level = logger.level
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    try:
        buffer = make_buffer(backend=backend)
    finally:
        logger.removeHandler(handler)
        logger.setLevel(level)
    assert buffer.runtime is not None
    assert buffer.nccl_comm_handle is None
    return buffer.runtime.name, handler.lines


def choose(choices: list[dict[str, object]]) -> None:
    make_buffer(**choices[dist.get_rank()])


def check_empty_like_recv() -> None:
    num_ranks = dist.get_world_size()
    x, topk_idx = torch.ones(4, 64, dtype=torch.bfloat16), torch.arange(4).view(4, 1) % (2 * num_ranks)
    for recv_memory in ("auto", "window", "torch"):
        buffer, other = make_buffer(recv_memory=recv_memory), make_buffer()
        for do_expand in (False, True):
            recv_x, _, _, handle, _ = buffer.dispatch(
                x, topk_idx=topk_idx, num_experts=2 * num_ranks, do_expand=do_expand, expert_alignment=4
            )
            outputs = buffer.empty_like_recv(handle)
            assert outputs.shape == recv_x.shape
            assert outputs.dtype == torch.bfloat16
            assert buffer.empty_like_recv(handle, 32, torch.float32).shape == (len(recv_x), 32)
            combined, _, _ = buffer.combine(outputs.copy_(recv_x), handle)
            assert torch.equal(combined, x)
        with pytest.raises(ConfigError, match="handle must come from a dispatch of this buffer"):
            other.empty_like_recv(handle)
        unsized = ElasticBuffer(None, num_bytes=2 << 20, num_max_tokens_per_rank=8, num_cpu_timeout_secs=30)
        *_, handle, _ = unsized.dispatch(x, topk_idx=topk_idx, num_experts=2 * num_ranks)
        with pytest.raises(ConfigError, match="hidden must be positive"):
            unsized.empty_like_recv(handle)
