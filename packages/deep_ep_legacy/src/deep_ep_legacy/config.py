"""Owns `Config`, the tuning values of V1 with its size hints, and the table of defaults by number of ranks.

No backend has queues, so none uses a chunk size; `num_sms` sets the number of channels that a handle tells, and how
many SMs kernels take at most. The values are checked and kept for callers that size their buffers by them.
"""

from __future__ import annotations

from dataclasses import dataclass

from deep_ep_core.align import align_up
from deep_ep_core.errors import ConfigError

__all__ = ["DEFAULT_NUM_SMS", "MAX_NVLINK_PEERS", "SIZE_ALIGNMENT_BYTES", "Config", "default_config"]

DEFAULT_NUM_SMS = 20
SIZE_ALIGNMENT_BYTES = 128
MAX_NVLINK_PEERS = 8
"""Ranks of a node that V1 sizes for."""

# The hints provide for 128 entries of a token's routing and as many scales, whatever comes.
_SIDE_BYTES = 8 + 128 * 8 + 128 * 4 + 128 * 4
# By number of ranks: (nvl_send, nvl_recv, rdma_send, rdma_recv) of dispatch, and of combine.
_Chunks = tuple[int, int, int, int]
_MANY_NODES: tuple[_Chunks, _Chunks] = (32, 288, 8, 128), (1, 288, 8, 128)
_DEFAULTS: dict[int, tuple[_Chunks, _Chunks]] = {
    2: ((24, 256, 6, 128), (10, 256, 6, 128)),
    4: ((6, 256, 6, 128), (9, 256, 6, 128)),
    8: ((6, 256, 6, 128), (4, 256, 6, 128)),
    16: ((36, 288, 20, 128), (4, 288, 12, 128)),
    24: _MANY_NODES,
    32: _MANY_NODES,
    48: _MANY_NODES,
    64: _MANY_NODES,
    96: ((20, 480, 12, 128), (1, 480, 8, 128)),
    128: ((20, 560, 12, 128), (1, 560, 8, 128)),
    144: ((32, 720, 12, 128), (2, 720, 8, 128)),
    160: ((28, 720, 12, 128), (2, 720, 8, 128)),
}


@dataclass(frozen=True, slots=True)
class Config:
    """SMs and queue lengths of V1's kernels, in tokens. Positional, as V1's callers pass it.

    Attributes:
        num_sms: SMs, at least 0; half as many channels.
        num_max_nvl_chunked_send_tokens: Tokens that are sent at a time over NVLink.
        num_max_nvl_chunked_recv_tokens: Tokens that a queue over NVLink holds.
        num_max_rdma_chunked_send_tokens: The same over RDMA.
        num_max_rdma_chunked_recv_tokens: The same over RDMA; rounded up to a multiple of what is sent at a time.

    Raises:
        ConfigError: A count is out of range, or a queue is too short for what is sent at a time.
    """

    num_sms: int = DEFAULT_NUM_SMS
    num_max_nvl_chunked_send_tokens: int = 6
    num_max_nvl_chunked_recv_tokens: int = 256
    num_max_rdma_chunked_send_tokens: int = 6
    num_max_rdma_chunked_recv_tokens: int = 256

    def __post_init__(self) -> None:
        if self.num_sms < 0:
            raise ConfigError(f"num_sms must be at least 0 (got {self.num_sms}); pass an even number of SMs")
        nvl_send, nvl_recv = self.num_max_nvl_chunked_send_tokens, self.num_max_nvl_chunked_recv_tokens
        rdma_send, rdma_recv = self.num_max_rdma_chunked_send_tokens, self.num_max_rdma_chunked_recv_tokens
        if min(nvl_send, nvl_recv, rdma_send, rdma_recv) < 1:
            raise ConfigError(
                "the chunk sizes of a Config must be positive "
                f"(got {nvl_send}, {nvl_recv}, {rdma_send}, {rdma_recv}); pass counts of tokens"
            )
        if nvl_send >= nvl_recv:
            raise ConfigError(
                "num_max_nvl_chunked_send_tokens must be less than num_max_nvl_chunked_recv_tokens "
                f"(got {nvl_send} and {nvl_recv}); send fewer tokens at a time"
            )
        if rdma_send >= rdma_recv or rdma_send > rdma_recv // 2:
            raise ConfigError(
                "num_max_rdma_chunked_send_tokens must be at most half of num_max_rdma_chunked_recv_tokens "
                f"(got {rdma_send} and {rdma_recv}); send fewer tokens at a time"
            )
        object.__setattr__(self, "num_max_rdma_chunked_recv_tokens", align_up(rdma_recv, rdma_send))

    @property
    def num_channels(self) -> int:
        """Channels that the tokens are cut into; at least 1."""
        return max(self.num_sms // 2, 1)

    def get_nvl_buffer_size_hint(self, hidden_bytes: int, num_ranks: int) -> int:
        """Bytes of V1's NVLink buffer, a multiple of 128.

        Args:
            hidden_bytes: Bytes of a token; by convention `hidden * max(element_size, 2)`.
            num_ranks: Ranks of the group: fewer than 8, or a multiple of 8.

        Raises:
            ConfigError: A value is out of range.
        """
        num_nodes = self._num_nodes(hidden_bytes, num_ranks)
        num_channels, num_peers = self.num_sms // 2, min(num_ranks, MAX_NVLINK_PEERS)
        token_bytes = hidden_bytes + _SIDE_BYTES
        words = num_channels * num_peers * (2 * num_nodes + 3)
        num_slots = num_channels * num_peers * self.num_max_nvl_chunked_recv_tokens
        return align_up(words * 4 + num_slots * token_bytes, SIZE_ALIGNMENT_BYTES)

    def get_rdma_buffer_size_hint(self, hidden_bytes: int, num_ranks: int) -> int:
        """Bytes of V1's RDMA buffer, a multiple of 128; 0 for at most 8 ranks.

        The arguments and errors are those of `get_nvl_buffer_size_hint`.
        """
        num_nodes = self._num_nodes(hidden_bytes, num_ranks)
        if num_ranks <= MAX_NVLINK_PEERS:
            return 0
        num_queues = self.num_sms // 2 * num_nodes * 2
        token_bytes = hidden_bytes + _SIDE_BYTES + 16
        # Of each queue, 18 words of counts besides the slots.
        queue_bytes = 18 * 4 + self.num_max_rdma_chunked_recv_tokens * token_bytes
        return align_up(num_queues * queue_bytes, SIZE_ALIGNMENT_BYTES)

    def _num_nodes(self, hidden_bytes: int, num_ranks: int) -> int:
        if hidden_bytes < 0:
            raise ConfigError(f"hidden_bytes must be at least 0 (got {hidden_bytes}); pass the bytes of a token")
        if num_ranks < 1 or (num_ranks >= MAX_NVLINK_PEERS and num_ranks % MAX_NVLINK_PEERS != 0):
            raise ConfigError(f"num_ranks must be 1 to 7 or a multiple of 8 (got {num_ranks}); V1 knows no other nodes")
        if num_ranks > MAX_NVLINK_PEERS and self.num_sms % 2 != 0:
            raise ConfigError(f"num_sms must be even for more than 8 ranks (got {self.num_sms}); pass an even number")
        return max(num_ranks // MAX_NVLINK_PEERS, 1)


def default_config(num_ranks: int, *, num_sms: int, is_combine: bool) -> Config:
    """V1's defaults for a number of ranks.

    Raises:
        ConfigError: V1 has none for this number.
    """
    if num_ranks not in _DEFAULTS:
        raise ConfigError(
            f"num_ranks must be one of {', '.join(map(str, _DEFAULTS))} for a default config (got {num_ranks}); "
            "leave config out, or make a Config"
        )
    return Config(num_sms, *_DEFAULTS[num_ranks][int(is_combine)])
