"""Owns sizes: of slots, messages and buffers, and which ranks a buffer of a given size has slots for.

It allocates nothing, and checks only what a size cannot be made of.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from deep_ep_core.align import align_up
from deep_ep_core.errors import ConfigError

__all__ = [
    "BUFFER_ALIGNMENT_BYTES",
    "PipelineConfig",
    "get_pp_buffer_size_hint",
    "link_bytes",
    "message_bytes",
    "peers_with_slots",
]

BUFFER_ALIGNMENT_BYTES = 2 << 20
"""Buffers are multiples of this: 2 MiB, as upstream's."""

_TENSOR_ALIGNMENT_BYTES = 32


@dataclass(frozen=True, slots=True, kw_only=True)
class PipelineConfig:
    """What `pp_set_config` set.

    Attributes:
        num_max_tensor_bytes: Most bytes of a message.
        num_max_inflight_tensors: Most messages on their way from one rank to another.
        peers: The ranks that this rank may exchange messages with, ascending.
    """

    num_max_tensor_bytes: int
    num_max_inflight_tensors: int
    peers: tuple[int, ...]

    @property
    def slot_bytes(self) -> int:
        """Bytes of a slot, which holds one message."""
        return align_up(self.num_max_tensor_bytes, _TENSOR_ALIGNMENT_BYTES)


def message_bytes(sizes_bytes: Iterable[int]) -> int:
    """Bytes of a slot that a message of tensors of these sizes takes: each begins at a multiple of 32 bytes."""
    return sum(align_up(size_bytes, _TENSOR_ALIGNMENT_BYTES) for size_bytes in sizes_bytes)


def link_bytes(num_max_tensor_bytes: int, num_max_inflight_tensors: int) -> int:
    """Bytes of the slots for one peer: a window of messages to send, and one of messages to receive."""
    return 2 * num_max_inflight_tensors * align_up(num_max_tensor_bytes, _TENSOR_ALIGNMENT_BYTES)


def get_pp_buffer_size_hint(num_max_tensor_bytes: int, num_max_inflight_tensors: int, num_peers: int = 2) -> int:
    """Bytes of a buffer for `pp_set_config` with the same arguments, a multiple of 2 MiB.

    Args:
        num_max_tensor_bytes: Most bytes of a message, at least 1.
        num_max_inflight_tensors: Most messages on their way from one rank to another, at least 1.
        num_peers: Ranks that a rank exchanges messages with, at least 1. 2 is for the neighbours in the ring, and
            upstream's number; the number of ranks less 1 is for any rank.

    Returns:
        Upstream's number of bytes for two peers, and as much for each further pair of them.

    Raises:
        ConfigError: A number is below 1.

    Collective: no.
    """
    if num_max_tensor_bytes < 1 or num_max_inflight_tensors < 1 or num_peers < 1:
        raise ConfigError(
            "num_max_tensor_bytes, num_max_inflight_tensors and num_peers must be at least 1 (got "
            f"{num_max_tensor_bytes}, {num_max_inflight_tensors}, {num_peers}); pass what pp_set_config will get"
        )
    return align_up(num_peers * link_bytes(num_max_tensor_bytes, num_max_inflight_tensors), BUFFER_ALIGNMENT_BYTES)


def peers_with_slots(rank: int, num_ranks: int, num_links: int) -> tuple[int, ...]:
    """The ranks that a buffer with room for `num_links` peers exchanges messages with.

    All of them if there is room, else the nearest in the ring, as far to both sides: the only choice of which both ends
    of a link know that the other has made it.

    Args:
        rank: This rank.
        num_ranks: Number of ranks in the group.
        num_links: Peers that there is room for.

    Returns:
        The ranks, ascending, without this one.
    """
    distance = num_ranks - 1 if num_links >= num_ranks - 1 else num_links // 2
    near = {(rank + sign * step) % num_ranks for step in range(1, distance + 1) for sign in (1, -1)}
    return tuple(sorted(near - {rank}))
