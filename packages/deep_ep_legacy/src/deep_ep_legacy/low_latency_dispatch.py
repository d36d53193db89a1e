"""Owns low-latency dispatch on the collective backend, from arguments that have been checked.

One row travels for each selection, with its expert and token; the receiver lays rows out in the packed layout.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from deep_ep_legacy.low_latency_checks import Handle, agreed_sizes
from deep_ep_legacy.low_latency_exchange import RowExchange, add_wait_ns
from deep_ep_legacy.low_latency_fp8 import CHANNELS_PER_PACK, CHANNELS_PER_SCALE, cast_rows_to_fp8, pack_ue8m0
from deep_ep_legacy.low_latency_layout import PackedPlaces, select
from deep_ep_legacy.low_latency_peers import Peers

__all__ = ["DispatchArgs", "DispatchResults", "DispatchUnderWay"]


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class DispatchArgs:
    """The arguments of a dispatch after the checks, by the names of the public call."""

    x: torch.Tensor
    topk_idx: torch.Tensor
    num_max_tokens: int
    num_experts: int
    recv_stats: torch.Tensor | None
    wait_stats: torch.Tensor | None
    use_fp8: bool
    round_scale: bool
    use_ue8m0: bool

    @property
    def inputs(self) -> list[torch.Tensor | None]:
        """Every tensor of the caller."""
        return [self.x, self.topk_idx, self.recv_stats, self.wait_stats]


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class DispatchResults:
    """What a dispatch fills, on every backend.

    Attributes:
        recv_x: `[num_local_experts, num_ranks * num_max_tokens, hidden]`.
        recv_scales: Scales of the rows, row by row neighbours in memory; None with bfloat16.
        recv_count: int32 `[num_local_experts]`.
        handle: What the combine is given.
    """

    recv_x: torch.Tensor
    recv_scales: torch.Tensor | None
    recv_count: torch.Tensor
    handle: Handle

    @classmethod
    def empty(cls, args: DispatchArgs, *, num_ranks: int) -> DispatchResults:
        """Memory for the results, on the current stream."""
        x, num_local_experts = args.x, args.num_experts // num_ranks
        hidden, rows_per_expert = x.size(1), num_ranks * args.num_max_tokens
        shape = (num_local_experts, rows_per_expert)
        recv_scales = None
        if args.use_fp8:
            channels, dtype = CHANNELS_PER_SCALE, torch.float32
            if args.use_ue8m0:
                channels, dtype = CHANNELS_PER_PACK, torch.int32
            # Column by column in memory, as GEMMs read them.
            columns = x.new_empty(num_local_experts, hidden // channels, rows_per_expert, dtype=dtype)
            recv_scales = columns.transpose(1, 2)
        src_info = x.new_empty(shape, dtype=torch.int32)
        layout_range = x.new_empty(num_local_experts, num_ranks, dtype=torch.int64)
        return cls(
            recv_x=x.new_empty(*shape, hidden, dtype=torch.float8_e4m3fn if args.use_fp8 else torch.bfloat16),
            recv_scales=recv_scales,
            recv_count=x.new_empty(num_local_experts, dtype=torch.int32),
            handle=(src_info, layout_range, args.num_max_tokens, hidden, args.num_experts),
        )

    @property
    def tensors(self) -> list[torch.Tensor | None]:
        """All of them."""
        return [self.recv_x, self.recv_scales, self.recv_count, *self.handle[:2]]


class DispatchUnderWay:
    """A dispatch whose rows are under way once this is made.

    Attributes:
        results: Filled by `complete`.
    """

    def __init__(self, peers: Peers, args: DispatchArgs) -> None:
        self._peers, self._args = peers, args
        transport, x = peers.transport, args.x
        num_ranks = transport.num_ranks
        self._num_local_experts = args.num_experts // num_ranks
        hidden = x.size(1)
        chosen = select(args.topk_idx, num_local_experts=self._num_local_experts, is_active=peers.active())
        fields = agreed_sizes(
            args.num_max_tokens,
            hidden,
            args.num_experts,
            use_fp8=args.use_fp8,
            round_scale=args.round_scale,
            use_ue8m0=args.use_ue8m0,
        )
        call = peers.open("low_latency_dispatch", fields, [[num] for num in chosen.num_of_rank])
        # A rank may have been masked only now: it is sent nothing, but its rows are still among those to split.
        self._num_recv = [0 if values is None else values[0] for values in call.values]
        heads = torch.stack([chosen.expert_idx % self._num_local_experts, chosen.token_idx], dim=1).to(torch.int32)
        if args.use_fp8:
            payload, scales = cast_rows_to_fp8(x, round_scale=args.round_scale)
            # torch cannot index every FP8 type on every device.
            parts = [heads, payload.view(torch.uint8)[chosen.token_idx], scales[chosen.token_idx]]
        else:
            parts = [heads, x[chosen.token_idx]]
        self._exchange = RowExchange(peers, call, parts, num_send=chosen.num_of_rank, num_recv=self._num_recv)
        self.results = DispatchResults.empty(args, num_ranks=num_ranks)

    @property
    def outputs(self) -> list[torch.Tensor | None]:
        """Every tensor that the caller is given."""
        return self.results.tensors

    def complete(self) -> None:
        """Wait for the rows, and lay them out."""
        args, num_ranks, results = self._args, self._peers.transport.num_ranks, self.results
        parts, wait_ns = self._exchange.complete()
        device = args.x.device
        src_rank = torch.arange(num_ranks, device=device).repeat_interleave(torch.tensor(self._num_recv, device=device))
        active = self._peers.active()
        if not all(active):
            has_arrived = torch.tensor(active, device=device)[src_rank]
            parts, src_rank = [part[has_arrived] for part in parts], src_rank[has_arrived]
        heads, rows = parts[:2]
        places = PackedPlaces.of(heads[:, 0], src_rank, num_ranks=num_ranks, num_local_experts=self._num_local_experts)
        src_info, layout_range, *_ = results.handle
        where = (places.local_expert_idx, places.row_idx)
        results.recv_x.view(rows.dtype)[where] = rows
        src_info[where] = heads[:, 1]
        if results.recv_scales is not None:
            results.recv_scales[where] = pack_ue8m0(parts[2]) if args.use_ue8m0 else parts[2]
        layout_range.copy_(places.layout_range)
        results.recv_count.copy_(places.num_rows)
        if args.recv_stats is not None:
            args.recv_stats.add_(places.num_rows)
        add_wait_ns(args.wait_stats, wait_ns)
