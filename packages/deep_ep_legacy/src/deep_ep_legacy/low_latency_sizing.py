"""Owns how many bytes the low-latency buffer of DeepEP V1 takes. The collective backend reserves none of them."""

from __future__ import annotations

from deep_ep_core.align import align_up
from deep_ep_core.errors import ConfigError
from deep_ep_legacy.low_latency_fp8 import CHANNELS_PER_SCALE

__all__ = ["get_low_latency_rdma_size_hint"]

_ALIGNMENT_BYTES = 128
_MESSAGE_HEAD_BYTES = 16
_SIGNAL_BYTES = 4
_SCALE_BYTES = 4
_BF16_BYTES = 2
# Two operations may be under way, each in a half of its own.
_NUM_HALVES = 2


def get_low_latency_rdma_size_hint(
    num_max_dispatch_tokens_per_rank: int, hidden: int, num_ranks: int, num_experts: int
) -> int:
    """Bytes that a buffer needs for low-latency calls of these sizes, as DeepEP V1 computes them.

    Args:
        num_max_dispatch_tokens_per_rank: Most tokens that a rank dispatches.
        hidden: Channels of a token.
        num_ranks: Ranks of the group; does not enter the result.
        num_experts: Experts of all ranks.

    Raises:
        ConfigError: An argument is below 1.

    Collective: no.
    """
    for name, value in (
        ("num_max_dispatch_tokens_per_rank", num_max_dispatch_tokens_per_rank),
        ("hidden", hidden),
        ("num_ranks", num_ranks),
        ("num_experts", num_experts),
    ):
        if value < 1:
            raise ConfigError(f"{name} must be at least 1 (got {value}); pass what the low-latency calls will be given")
    scales_bytes = hidden // CHANNELS_PER_SCALE * _SCALE_BYTES
    dispatch_bytes = _MESSAGE_HEAD_BYTES + max(_BF16_BYTES * hidden, hidden + scales_bytes)
    combine_bytes = scales_bytes + _BF16_BYTES * hidden
    num_slots = num_experts * num_max_dispatch_tokens_per_rank
    send_bytes = max(num_max_dispatch_tokens_per_rank * dispatch_bytes, num_slots * combine_bytes)
    recv_bytes = num_slots * max(dispatch_bytes, combine_bytes)
    signal_bytes = align_up(num_experts * _SIGNAL_BYTES, _ALIGNMENT_BYTES)
    total_bytes = _NUM_HALVES * (send_bytes + recv_bytes + signal_bytes)
    # One unit more also where the total is a multiple, as callers know it.
    return (total_bytes // _ALIGNMENT_BYTES + 1) * _ALIGNMENT_BYTES
