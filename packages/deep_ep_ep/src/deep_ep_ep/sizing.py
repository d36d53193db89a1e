"""Owns how many bytes a buffer must have and how many rows a receiver must expect. It allocates nothing.

The byte formulas are a contract: callers size buffers with them, keep a buffer while the hint stays below its size, and
expect a call to be refused only when it needs more than the buffer has. They count, for every source rank, a worst-case
slab of token records at the receiver. All bytes exclude the workspace for flags and counters.

A token record is the payload, the scale packs and the metadata, each rounded up to 32 bytes. Metadata of a dispatch
record is, per top-k choice, an id, a weight and a list index, and one source id, 4 bytes each; of a combine record,
an id and a weight per choice.
"""

from __future__ import annotations

from dataclasses import dataclass

from deep_ep_core.align import align_up, ceil_div
from deep_ep_core.errors import ConfigError

__all__ = [
    "BUFFER_ALIGNMENT_BYTES",
    "MAX_NUM_TOPK",
    "RECORD_ALIGNMENT_BYTES",
    "BufferShape",
    "buffer_size_hint",
    "combine_buffer_bytes",
    "combine_record_bytes",
    "dispatch_buffer_bytes",
    "dispatch_record_bytes",
    "max_expanded_tokens",
    "max_recv_tokens",
]

BUFFER_ALIGNMENT_BYTES = 2 * 1024 * 1024
"""A buffer's size is a multiple of this: 2 MiB, the page granularity of GPU memory."""

MAX_NUM_TOPK = 32
"""Most top-k choices per token, and what a shape with an unknown number is sized for."""

RECORD_ALIGNMENT_BYTES = 32
"""Each section of a token's record in the buffer starts at a multiple of this."""

_WORD_BYTES = 4
_BF16_BYTES = 2
# The finest scales that a size hint provides for: one 4-byte pack for 32 channels.
_HINT_CHANNELS_PER_SF_PACK = 32
# Hybrid regions hold, per source node, max_tokens rows split over channels. Each channel's share is rounded up, so
# the sum may exceed max_tokens by at most the number of channels: 8 per SM on at most 160 SMs.
_MAX_HYBRID_CHANNELS = 8 * 160


@dataclass(frozen=True, slots=True, kw_only=True)
class BufferShape:
    """What the size of a buffer depends on.

    Attributes:
        num_scaleout_ranks: Nodes that data crosses in hybrid mode; 1 in direct mode.
        num_scaleup_ranks: Ranks within a node in hybrid mode; all ranks in direct mode.
        is_scaleup_nvlink: True when all scale-up ranks share one NVLink domain, as in hybrid mode they always do.
            False needs send regions for the network to read from.
        num_max_tokens_per_rank: Most tokens that any rank contributes, at least 1.
        hidden: Elements per token, at least 1.
        num_topk: Top-k choices per token, at most 32; 0 when not known, which is sized as 32.
        use_fp8_dispatch: Dispatch carries 1-byte elements with scales, not 2-byte elements without. Sets the
            defaults of the two fields below.
        payload_element_bytes: Bytes per element of the dispatched payload. None: 1 with `use_fp8_dispatch`, else 2.
        num_sf_packs: 4-byte scale packs per dispatched token. None: with `use_fp8_dispatch` one for 32 elements,
            else 0.
        allow_multiple_reduction: Combine may reduce on the way. False keeps one row for every top-k choice.

    Raises:
        ConfigError: A field out of range, or a payload that is not a multiple of 32 bytes.
    """

    num_scaleout_ranks: int
    num_scaleup_ranks: int
    is_scaleup_nvlink: bool
    num_max_tokens_per_rank: int
    hidden: int
    num_topk: int = 0
    use_fp8_dispatch: bool = False
    payload_element_bytes: int | None = None
    num_sf_packs: int | None = None
    allow_multiple_reduction: bool = True

    def __post_init__(self) -> None:
        for name in ("num_scaleout_ranks", "num_scaleup_ranks", "num_max_tokens_per_rank", "hidden"):
            _check_at_least(name, getattr(self, name), 1)
        if self.num_scaleout_ranks > 1 and not self.is_scaleup_nvlink:
            raise ConfigError(
                f"is_scaleup_nvlink must be True with {self.num_scaleout_ranks} scale-out ranks (got False): in hybrid "
                "mode the scale-up domain is the NVLink domain; in direct mode pass num_scaleout_ranks=1"
            )
        if not 0 <= self.num_topk <= MAX_NUM_TOPK:
            raise ConfigError(f"num_topk must be 0 to {MAX_NUM_TOPK}, 0 meaning unknown (got {self.num_topk})")
        if self.payload_element_bytes is not None:
            _check_at_least("payload_element_bytes", self.payload_element_bytes, 1)
        if self.num_sf_packs is not None:
            _check_at_least("num_sf_packs", self.num_sf_packs, 0)
        _check_payload_bytes(self.payload_bytes)

    @property
    def num_ranks(self) -> int:
        """Ranks in the group."""
        return self.num_scaleout_ranks * self.num_scaleup_ranks

    @property
    def payload_bytes(self) -> int:
        """Payload bytes of one dispatched token."""
        default_bytes = 1 if self.use_fp8_dispatch else _BF16_BYTES
        return self.hidden * (default_bytes if self.payload_element_bytes is None else self.payload_element_bytes)

    @property
    def sized_num_sf_packs(self) -> int:
        """Scale packs per token that the sizes provide for."""
        if self.num_sf_packs is not None:
            return self.num_sf_packs
        return ceil_div(self.hidden, _HINT_CHANNELS_PER_SF_PACK) if self.use_fp8_dispatch else 0

    @property
    def sized_num_topk(self) -> int:
        """Top-k choices per token that the sizes provide for."""
        return self.num_topk or MAX_NUM_TOPK


def dispatch_record_bytes(*, payload_bytes: int, num_sf_packs: int, num_topk: int) -> int:
    """Bytes of one token record on its way to an expert.

    Args:
        payload_bytes: Payload of a token, a multiple of 32.
        num_sf_packs: 4-byte scale packs per token; 0 without scales.
        num_topk: Top-k choices per token, at least 1.

    Returns:
        Bytes, a multiple of 32.

    Raises:
        ConfigError: A value out of range.
    """
    _check_payload_bytes(payload_bytes)
    _check_at_least("num_sf_packs", num_sf_packs, 0)
    _check_at_least("num_topk", num_topk, 1)
    metadata_words = 3 * num_topk + 1
    return payload_bytes + _record_section_bytes(num_sf_packs) + _record_section_bytes(metadata_words)


def combine_record_bytes(*, hidden: int, num_topk: int) -> int:
    """Bytes of one bfloat16 token record on its way back.

    Args:
        hidden: Elements per token, a multiple of 16.
        num_topk: Top-k choices per token, at least 1.

    Returns:
        Bytes, a multiple of 32.

    Raises:
        ConfigError: A value out of range.
    """
    payload_bytes = _BF16_BYTES * hidden
    _check_payload_bytes(payload_bytes)
    _check_at_least("num_topk", num_topk, 1)
    return payload_bytes + _record_section_bytes(2 * num_topk)


def dispatch_buffer_bytes(shape: BufferShape) -> int:
    """Bytes that one dispatch needs in the buffer, not rounded.

    Direct: a receive region of `num_max_tokens_per_rank` records for every rank, and one such send region unless all
    is NVLink. Hybrid: a receive region per scale-up peer that holds the tokens of all nodes, one send region towards
    the network, and a region per node to receive from it.
    """
    num_records = shape.num_ranks * shape.num_max_tokens_per_rank
    if shape.num_scaleout_ranks > 1:
        num_records += shape.num_max_tokens_per_rank
        num_records += shape.num_scaleout_ranks * _hybrid_tokens_per_node(shape)
    elif not shape.is_scaleup_nvlink:
        num_records += shape.num_max_tokens_per_rank
    record_bytes = dispatch_record_bytes(
        payload_bytes=shape.payload_bytes, num_sf_packs=shape.sized_num_sf_packs, num_topk=shape.sized_num_topk
    )
    return num_records * record_bytes


def combine_buffer_bytes(shape: BufferShape) -> int:
    """Bytes that one combine needs in the buffer, not rounded.

    A receive region has one layer of records per contribution that a token may get: one per top-k choice, or with
    `allow_multiple_reduction` no more than one per rank that sends. Direct: layers of `num_max_tokens_per_rank`
    records, and send regions for every rank unless all is NVLink. Hybrid: the same at the forwarder (over scale-up
    ranks, for the tokens of all nodes) and at the source (over nodes), and send regions for every node.
    """
    num_topk = shape.sized_num_topk
    max_tokens = shape.num_max_tokens_per_rank
    num_scaleup_layers, num_scaleout_layers, num_send_copies = num_topk, num_topk, num_topk
    if shape.allow_multiple_reduction:
        num_scaleup_layers = min(shape.num_scaleup_ranks, num_topk)
        num_scaleout_layers = min(shape.num_scaleout_ranks, num_topk)
        num_send_copies = 1
    num_records = num_scaleup_layers * shape.num_scaleout_ranks * max_tokens
    if shape.num_scaleout_ranks > 1:
        num_records += num_scaleout_layers * max_tokens
        num_records += num_send_copies * shape.num_scaleout_ranks * _hybrid_tokens_per_node(shape)
    elif not shape.is_scaleup_nvlink:
        num_records += shape.num_ranks * num_send_copies * max_tokens
    return num_records * combine_record_bytes(hidden=shape.hidden, num_topk=num_topk)


def buffer_size_hint(shape: BufferShape) -> int:
    """Bytes that a buffer must have for any dispatch and combine of this shape, rounded up to 2 MiB.

    Dispatch and combine use the same bytes, one after the other, so the larger of the two counts.
    """
    return align_up(max(dispatch_buffer_bytes(shape), combine_buffer_bytes(shape)), BUFFER_ALIGNMENT_BYTES)


def max_recv_tokens(num_ranks: int, num_max_tokens_per_rank: int) -> int:
    """Most tokens that one rank can receive: every token of every rank, each once.

    Args:
        num_ranks: Ranks in the group, at least 1.
        num_max_tokens_per_rank: Most tokens that any rank contributes, at least 0.

    Returns:
        Rows of the token-major receive tensors when their counts are not known to the host.

    Raises:
        ConfigError: A value out of range.
    """
    _check_at_least("num_ranks", num_ranks, 1)
    _check_at_least("num_max_tokens_per_rank", num_max_tokens_per_rank, 0)
    return num_ranks * num_max_tokens_per_rank


def max_expanded_tokens(
    num_ranks: int, num_max_tokens_per_rank: int, num_topk: int, num_local_experts: int, expert_alignment: int
) -> int:
    """Most rows that one rank can receive in the expert-major layout, padding included.

    A token takes at most one row for each of its choices and for each local expert, and every expert's segment is
    padded by less than `expert_alignment` rows.

    Args:
        num_ranks: Ranks in the group, at least 1.
        num_max_tokens_per_rank: Most tokens that any rank contributes, at least 0.
        num_topk: Top-k choices per token, at least 1.
        num_local_experts: Experts on one rank, at least 1.
        expert_alignment: Each expert's segment starts at a multiple of this many rows; at least 1.

    Returns:
        Rows of the expert-major receive tensors when their counts are not known to the host, a multiple
        of `expert_alignment`.

    Raises:
        ConfigError: A value out of range.
    """
    _check_at_least("num_topk", num_topk, 1)
    _check_at_least("num_local_experts", num_local_experts, 1)
    _check_at_least("expert_alignment", expert_alignment, 1)
    num_rows = max_recv_tokens(num_ranks, num_max_tokens_per_rank) * min(num_topk, num_local_experts)
    return align_up(num_rows + (expert_alignment - 1) * num_local_experts, expert_alignment)


def _hybrid_tokens_per_node(shape: BufferShape) -> int:
    return shape.num_max_tokens_per_rank + _MAX_HYBRID_CHANNELS


def _record_section_bytes(num_words: int) -> int:
    return align_up(_WORD_BYTES * num_words, RECORD_ALIGNMENT_BYTES)


def _check_at_least(name: str, value: int, minimum: int) -> None:
    if value < minimum:
        raise ConfigError(f"{name} must be at least {minimum} (got {value})")


def _check_payload_bytes(payload_bytes: int) -> None:
    if payload_bytes < RECORD_ALIGNMENT_BYTES or payload_bytes % RECORD_ALIGNMENT_BYTES:
        raise ConfigError(
            f"the payload of a token must be a positive multiple of {RECORD_ALIGNMENT_BYTES} bytes "
            f"(got {payload_bytes}); pad hidden, to a multiple of 16 for bfloat16 or of 32 for FP8"
        )
