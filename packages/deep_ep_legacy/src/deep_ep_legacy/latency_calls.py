"""Owns the low-latency calls as methods of `Buffer`: whether they are allowed, and arguments of forks.

What they do is in `low_latency`; the session is made with the buffer, since making it is collective.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist

from deep_ep_core.errors import ConfigError
from deep_ep_core.stream import EventOverlap
from deep_ep_core.transport import CollectiveTransport
from deep_ep_legacy.extra_arguments import ignore_extra_arguments
from deep_ep_legacy.low_latency import OPERATIONS, LowLatencySession, RecvHook
from deep_ep_legacy.low_latency_checks import Handle

if TYPE_CHECKING:
    from deep_ep_legacy.device.context import DeviceContext

__all__ = ["LowLatencyCalls"]


class LowLatencyCalls:
    """The low-latency half of `Buffer`.

    A buffer needs `low_latency_mode=True` for these calls, and `enable_shrink=True` for those on the mask. All of them
    raise ConfigError without it. `extra` is as in `Buffer.dispatch`.
    """

    group: dist.ProcessGroup
    rank: int
    group_size: int
    low_latency_mode: bool
    enable_shrink: bool
    _session: LowLatencySession | None
    _context: DeviceContext | None

    def _make_session(self, timeout_s: float) -> LowLatencySession | None:
        if not self.low_latency_mode:
            return None
        transport = CollectiveTransport(
            self.group, timeout_s=timeout_s, name="Buffer in low-latency mode", operations=OPERATIONS
        )
        return LowLatencySession(
            transport,
            rank=self.rank,
            num_ranks=self.group_size,
            enable_shrink=self.enable_shrink,
            context=self._context,
        )

    def _open_session(self) -> LowLatencySession:
        if self._session is None:
            state = "a destroyed one" if self.low_latency_mode else "low_latency_mode=False"
            raise ConfigError(
                f"low-latency calls need an open buffer made with low_latency_mode=True (got {state}, on rank "
                f"{self.rank}); make a new Buffer"
            )
        return self._session

    @staticmethod
    def get_low_latency_rdma_size_hint(
        num_max_dispatch_tokens_per_rank: int, hidden: int, num_ranks: int, num_experts: int
    ) -> int:
        """Bytes of the RDMA buffer that low-latency calls of this size take in V1.

        Args:
            num_max_dispatch_tokens_per_rank: Most tokens that a rank dispatches.
            hidden: Elements of a token.
            num_ranks: Ranks of the group; does not enter.
            num_experts: Experts of all ranks.

        Raises:
            ConfigError: A count is out of range.

        Collective: no.
        """
        return LowLatencySession.get_low_latency_rdma_size_hint(
            num_max_dispatch_tokens_per_rank, hidden, num_ranks, num_experts
        )

    def low_latency_dispatch(
        self,
        x: torch.Tensor,
        topk_idx: torch.Tensor,
        num_max_dispatch_tokens_per_rank: int,
        num_experts: int,
        cumulative_local_expert_recv_stats: torch.Tensor | None = None,
        dispatch_wait_recv_cost_stats: torch.Tensor | None = None,
        use_fp8: bool = True,
        round_scale: bool = False,
        use_ue8m0: bool = False,
        async_finish: bool = False,
        return_recv_hook: bool = False,
        **extra: Any,
    ) -> tuple[tuple[torch.Tensor, torch.Tensor] | torch.Tensor, torch.Tensor, Handle, EventOverlap, RecvHook | None]:
        """Send each token to the experts it selects, cast to FP8 on the way if asked.

        Arguments, results and errors are those of `deep_ep_legacy.low_latency.LowLatencySession.low_latency_dispatch`.

        Collective: yes.
        """
        ignore_extra_arguments("low_latency_dispatch", extra)
        return self._open_session().low_latency_dispatch(
            x,
            topk_idx,
            num_max_dispatch_tokens_per_rank,
            num_experts,
            cumulative_local_expert_recv_stats=cumulative_local_expert_recv_stats,
            dispatch_wait_recv_cost_stats=dispatch_wait_recv_cost_stats,
            use_fp8=use_fp8,
            round_scale=round_scale,
            use_ue8m0=use_ue8m0,
            async_finish=async_finish,
            return_recv_hook=return_recv_hook,
        )

    def low_latency_combine(
        self,
        x: torch.Tensor,
        topk_idx: torch.Tensor,
        topk_weights: torch.Tensor,
        handle: Handle,
        use_logfmt: bool = False,
        zero_copy: bool = False,
        async_finish: bool = False,
        return_recv_hook: bool = False,
        out: torch.Tensor | None = None,
        combine_wait_recv_cost_stats: torch.Tensor | None = None,
        **extra: Any,
    ) -> tuple[torch.Tensor, EventOverlap, RecvHook | None]:
        """Bring the experts' rows back and sum them for each token, each times its weight.

        Arguments, results and errors are those of `deep_ep_legacy.low_latency.LowLatencySession.low_latency_combine`.
        Arguments of forks that belong to `overlap` are ignored with one warning where it is False or absent.

        Collective: yes.
        """
        ignore_extra_arguments("low_latency_combine", extra)
        return self._open_session().low_latency_combine(
            x,
            topk_idx,
            topk_weights,
            handle,
            use_logfmt=use_logfmt,
            zero_copy=zero_copy,
            async_finish=async_finish,
            return_recv_hook=return_recv_hook,
            out=out,
            combine_wait_recv_cost_stats=combine_wait_recv_cost_stats,
        )

    def clean_low_latency_buffer(self, num_max_dispatch_tokens_per_rank: int, hidden: int, num_experts: int) -> None:
        """Make the buffer ready for low-latency calls of this size; see `LowLatencySession`. Collective: yes."""
        self._open_session().clean_low_latency_buffer(num_max_dispatch_tokens_per_rank, hidden, num_experts)

    def get_next_low_latency_combine_buffer(self, handle: Handle) -> torch.Tensor:
        """Memory that the next combine with `zero_copy=True` sends from; see `LowLatencySession`. Collective: no."""
        return self._open_session().get_next_low_latency_combine_buffer(handle)

    def low_latency_update_mask_buffer(self, rank_to_mask: int, mask: bool = False) -> None:
        """Mask a rank, or take it in again; on this rank only. Collective: no."""
        self._open_session().low_latency_update_mask_buffer(rank_to_mask, mask)

    def low_latency_query_mask_buffer(self, mask_status: torch.Tensor) -> None:
        """Write 1 for each masked rank and 0 for the others into `[num_ranks]` int32. Collective: no."""
        self._open_session().low_latency_query_mask_buffer(mask_status)

    def low_latency_clean_mask_buffer(self) -> None:
        """Take all ranks in again; on this rank only. Collective: no."""
        self._open_session().low_latency_clean_mask_buffer()
