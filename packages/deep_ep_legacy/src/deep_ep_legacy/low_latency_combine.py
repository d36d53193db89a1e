"""Owns low-latency combine on the collective backend, from arguments that have been checked.

Rows go back in the order in which they came. So the source, which knows what it sent, needs no more than the rows.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from deep_ep_core.refusals import rejected
from deep_ep_legacy.logfmt import decode_rows, encode_rows
from deep_ep_legacy.low_latency_checks import Handle, agreed_sizes
from deep_ep_legacy.low_latency_exchange import RowExchange, add_wait_ns
from deep_ep_legacy.low_latency_layout import rows_to_return, select, sum_in_topk_order
from deep_ep_legacy.low_latency_peers import Peers

__all__ = ["CombineArgs", "CombineUnderWay"]


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class CombineArgs:
    """The arguments of a combine after the checks, by the names of the public call."""

    x: torch.Tensor
    topk_idx: torch.Tensor
    topk_weights: torch.Tensor
    handle: Handle
    use_logfmt: bool
    out: torch.Tensor | None
    wait_stats: torch.Tensor | None

    @property
    def inputs(self) -> list[torch.Tensor | None]:
        """Every tensor of the caller, `out` included."""
        return [self.x, self.topk_idx, self.topk_weights, *self.handle[:2], self.out, self.wait_stats]


class CombineUnderWay:
    """A combine whose rows are under way once this is made.

    Attributes:
        combined_x: `[num_tokens, hidden]` bfloat16, filled by `complete`; `out` where one was given.
    """

    def __init__(self, peers: Peers, args: CombineArgs) -> None:
        self._peers, self._args = peers, args
        src_info, layout_range, num_max_tokens, self._hidden, num_experts = args.handle
        self._num_local_experts = num_experts // peers.transport.num_ranks
        row_idx, num_back = rows_to_return(layout_range, src_info.size(1))
        rows = args.x.view(-1, self._hidden)[row_idx]
        num_sent = num_back
        if args.use_logfmt:
            messages = [encode_rows(chunk) for chunk in rows.split(num_back)]
            rows, num_sent = torch.cat(messages), [len(message) for message in messages]
        fields = agreed_sizes(num_max_tokens, self._hidden, num_experts, use_logfmt=args.use_logfmt)
        values = list(zip(num_back, num_sent, strict=True))
        call = peers.open("low_latency_combine", fields, values)
        # Rows from each rank, and what it sends them as: rows too, or bytes.
        self._num_rows = [0 if values is None else values[0] for values in call.values]
        self._num_recv = [0 if values is None else values[1] for values in call.values]
        self._exchange = RowExchange(peers, call, [rows], num_send=num_sent, num_recv=self._num_recv)
        shape = (len(args.topk_idx), self._hidden)
        self.combined_x: torch.Tensor = args.x.new_empty(shape) if args.out is None else args.out

    @property
    def outputs(self) -> list[torch.Tensor | None]:
        """Every tensor that the caller is given."""
        return [self.combined_x]

    def complete(self) -> None:
        """Wait for the rows, and sum them."""
        args = self._args
        (received,), wait_ns = self._exchange.complete()
        active = self._peers.active()
        chosen = select(args.topk_idx, num_local_experts=self._num_local_experts, is_active=active)
        # A peer that had masked this rank returns nothing.
        has_rows = [
            is_active and (num_rows > 0 or self._peers.mask is None)
            for is_active, num_rows in zip(active, self._num_rows, strict=True)
        ]
        chunks = []
        for rank, chunk in enumerate(received.split(self._num_recv)):
            if has_rows[rank]:
                self._check_num_rows(rank, chosen.num_of_rank[rank])
                decoded = decode_rows(chunk, self._num_rows[rank], self._hidden) if args.use_logfmt else chunk
                chunks.append(decoded)
        rows = torch.cat(chunks) if chunks else received.new_empty(0, self._hidden, dtype=torch.bfloat16)
        is_here = torch.tensor(has_rows, device=rows.device)[chosen.rank_idx]
        row_of_entry = torch.full((args.topk_idx.numel(),), -1, device=rows.device)
        row_of_entry[chosen.entry_idx[is_here]] = torch.arange(len(rows), device=rows.device)
        sum_in_topk_order(rows, row_of_entry.view(args.topk_idx.shape), args.topk_weights, self.combined_x)
        add_wait_ns(args.wait_stats, wait_ns)

    def _check_num_rows(self, rank: int, num_selections: int) -> None:
        if self._num_rows[rank] != num_selections:
            raise rejected(
                self._peers.transport.rank,
                f"topk_idx must be that of the dispatch which gave rank {rank} its handle, with "
                f"{self._num_rows[rank]} selections of its experts",
                num_selections,
                "pass the topk_idx of the dispatch, and on all ranks handles of the same one",
            )
