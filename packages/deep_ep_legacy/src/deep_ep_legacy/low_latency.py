"""Owns `LowLatencySession`: the low-latency calls of DeepEP V1 for a group, their streams, events and hooks.

Arguments are checked in `low_latency_checks`, rows are moved by a backend: `low_latency_backends` has the collective
one. It does not own normal-mode calls, nor the transport that it is given.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, TypeVar

import torch

from deep_ep_core.errors import ConfigError
from deep_ep_core.refusals import rejected
from deep_ep_core.stream import CommScope, EventHandle, EventOverlap, StreamOptions
from deep_ep_core.transport import CollectiveTransport
from deep_ep_legacy.low_latency_backends import CollectiveLatency, CombineCall, DispatchCall, LatencyBackend
from deep_ep_legacy.low_latency_checks import (
    Handle,
    check_combine,
    check_device,
    check_dispatch,
    check_handle,
    check_mask_status,
    check_sizes,
    check_streams,
)
from deep_ep_legacy.low_latency_combine import CombineArgs
from deep_ep_legacy.low_latency_dispatch import DispatchArgs
from deep_ep_legacy.low_latency_peers import OPERATIONS
from deep_ep_legacy.low_latency_pending import PendingCalls, RecvHook
from deep_ep_legacy.low_latency_sizing import get_low_latency_rdma_size_hint

if TYPE_CHECKING:
    from deep_ep_legacy.device.context import DeviceContext

__all__ = ["OPERATIONS", "LowLatencySession", "RecvHook"]

_Call = TypeVar("_Call", DispatchCall, CombineCall)

# Two operations may be under way, each in a half of the buffer of its own.
_NUM_HALVES = 2


class LowLatencySession:
    """Low-latency dispatch and combine between the ranks of a group.

    Rows of an expert are ordered by source rank and token, so results are the same in every run.

    On the device backend the host waits for nothing, a CUDA graph can capture all calls, and what went wrong is raised
    by a later call. Two calls may have sent and not received: a third one receives for the first, as its hook would.

    Args:
        transport: The group's transport; its operations include `OPERATIONS`.
        rank: This rank in the group.
        num_ranks: Ranks of the group.
        enable_shrink: Keep a mask of ranks that take no part. A rank that is late is then masked, with a warning,
            instead of raised. A late rank costs the timeout once.
        context: Window and kernels of the device backend; None for the collective one.

    Collective: no; all calls are, unless they say otherwise, and all ranks make the same ones in the same order.
    """

    def __init__(
        self,
        transport: CollectiveTransport,
        *,
        rank: int,
        num_ranks: int,
        enable_shrink: bool = False,
        context: DeviceContext | None = None,
    ) -> None:
        assert (rank, num_ranks) == (transport.rank, transport.num_ranks), (rank, num_ranks)
        self._rank, self._num_ranks = rank, num_ranks
        self._backend = _make_backend(transport, context, enable_shrink=enable_shrink)
        self._pending = PendingCalls(self._backend.max_under_way)
        self._half = 0
        self._combine_buffers: list[torch.Tensor | None] = [None] * _NUM_HALVES

    @staticmethod
    def get_low_latency_rdma_size_hint(
        num_max_dispatch_tokens_per_rank: int, hidden: int, num_ranks: int, num_experts: int
    ) -> int:
        """Bytes that a buffer needs for low-latency calls; see `get_low_latency_rdma_size_hint` of the sizing module.

        Collective: no.
        """
        return get_low_latency_rdma_size_hint(num_max_dispatch_tokens_per_rank, hidden, num_ranks, num_experts)

    @torch.no_grad()
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
    ) -> tuple[tuple[torch.Tensor, torch.Tensor] | torch.Tensor, torch.Tensor, Handle, EventOverlap, RecvHook | None]:
        """Send each token to the experts it selects, cast to FP8 on the way if asked.

        Args:
            x: `[num_tokens, hidden]` bfloat16, contiguous; the hidden size a multiple of 128.
            topk_idx: `[num_tokens, num_topk]` int32 or int64: experts, -1 for none.
            num_max_dispatch_tokens_per_rank: Most tokens of any rank. Alike on all ranks.
            num_experts: Experts of all ranks, a multiple of them. Alike on all ranks.
            cumulative_local_expert_recv_stats: int32 `[num_local_experts]`: the rows of each expert are added to it.
            dispatch_wait_recv_cost_stats: int64 `[num_ranks]`: the nanoseconds that the host, or the kernel, waited for
                the rows of each rank are added to it. (DeepEP counts cycles of an SM.)
            use_fp8: Cast to float8_e4m3fn with one scale for 128 channels. Alike on all ranks.
            round_scale: Round scales up to powers of two. Alike on all ranks.
            use_ue8m0: Return scales as packed exponents; needs `use_fp8`, `round_scale` and a hidden size that is a
                multiple of 512. Alike on all ranks.
            async_finish: Return an event instead of making the current stream wait.
            return_recv_hook: Return as soon as the rows are under way; the hook waits for them.

        Returns:
            `(recv_x, recv_count, handle, event, hook)`. With `num_rows = num_ranks * num_max_dispatch_tokens_per_rank`,
            `recv_x` is `[num_local_experts, num_rows, hidden]` bfloat16, or float8_e4m3fn in a pair with the scales:
            float32 `[num_local_experts, num_rows, hidden / 128]`, or int32 `[.., hidden / 512]` with byte b of pack p
            the exponent of group 4p + b; row by row neighbours in memory. `recv_count` is int32 `[num_local_experts]`:
            how many rows of each expert are there; the others are not initialised. `handle` is `(src_info,
            layout_range, num_max_dispatch_tokens_per_rank, hidden, num_experts)`: the token of each row, int32
            `[num_local_experts, num_rows]`, and for each expert and source rank the number of rows in the low 32 bits
            and the first row in the high ones, int64 `[num_local_experts, num_ranks]`. `hook` is None unless asked for.

        Raises:
            ConfigError: An argument cannot be taken.
            RankMismatchError: Ranks passed different sizes or flags, or called different operations.
            CommTimeoutError: A rank died or is late, and there is no mask.

        Collective: yes. Stream: runs on the current one; with `async_finish` on the communication stream, which waits
        for the current one, unless a CUDA graph is being captured. With `return_recv_hook` the call and the hook run on
        the stream that is current in the call. On the collective backend the host waits in the call until the ranks
        agree, so a CUDA graph cannot capture it.
        """
        with self._backend.rejections_reported("low_latency_dispatch"):
            check_streams(self._rank, async_finish, return_recv_hook)
            check_dispatch(
                self._rank,
                self._num_ranks,
                x=x,
                topk_idx=topk_idx,
                num_max_tokens=num_max_dispatch_tokens_per_rank,
                num_experts=num_experts,
                recv_stats=cumulative_local_expert_recv_stats,
                wait_stats=dispatch_wait_recv_cost_stats,
                use_fp8=use_fp8,
                round_scale=round_scale,
                use_ue8m0=use_ue8m0,
                reads_values=self._backend.reads_indices,
            )
            check_device(self._rank, "x", x, self._backend.device)
        args = DispatchArgs(
            x=x,
            topk_idx=topk_idx,
            num_max_tokens=num_max_dispatch_tokens_per_rank,
            num_experts=num_experts,
            recv_stats=cumulative_local_expert_recv_stats,
            wait_stats=dispatch_wait_recv_cost_stats,
            use_fp8=use_fp8,
            round_scale=round_scale,
            use_ue8m0=use_ue8m0,
        )
        call, event, hook = self._run(
            lambda: self._backend.dispatch(args, is_split=return_recv_hook),
            args,
            x.device,
            async_finish,
            return_recv_hook,
        )
        results = call.results
        recv_x: tuple[torch.Tensor, torch.Tensor] | torch.Tensor = results.recv_x
        if results.recv_scales is not None:
            recv_x = (results.recv_x, results.recv_scales)
        return recv_x, results.recv_count, results.handle, event, hook

    @torch.no_grad()
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
    ) -> tuple[torch.Tensor, EventOverlap, RecvHook | None]:
        """Bring the rows of experts back to the ranks of their tokens, and sum them with weights.

        Args:
            x: `[num_local_experts, num_ranks * num_max_dispatch_tokens_per_rank, hidden]` bfloat16, contiguous: rows
                where the dispatch put them.
            topk_idx: As in the dispatch.
            topk_weights: float32 `[num_tokens, num_topk]`.
            handle: What the dispatch returned.
            use_logfmt: Send ten bits a value, see `logfmt`; the hidden size a multiple of 512. Alike on all ranks.
            zero_copy: The rows are in what `get_next_low_latency_combine_buffer` gave; those of `x` are not looked at.
            async_finish: Return an event instead of making the current stream wait.
            return_recv_hook: Return as soon as the rows are under way; the hook waits for them.
            out: `[num_tokens, hidden]` bfloat16, contiguous, to write to.
            combine_wait_recv_cost_stats: int64 `[num_ranks]`, as in the dispatch.

        Returns:
            `(combined_x, event, hook)`: `[num_tokens, hidden]` bfloat16, summed in float32 in ascending top-k position
            and rounded once; 0 for a token that selects no expert. Experts of masked ranks are left out.

        Raises:
            ConfigError: An argument cannot be taken. That `topk_idx` is not that of the dispatch shows only when the
                rows are there, so the hook may raise it; the device backend does not see it.
            RankMismatchError: Ranks passed different sizes or flags, or called different operations.
            CommTimeoutError: A rank died or is late, and there is no mask.

        Collective: yes. Stream: as the dispatch.
        """
        with self._backend.rejections_reported("low_latency_combine"):
            check_streams(self._rank, async_finish, return_recv_hook)
            handle = check_handle(self._rank, self._num_ranks, handle)
            check_combine(
                self._rank,
                self._num_ranks,
                x=x,
                topk_idx=topk_idx,
                topk_weights=topk_weights,
                handle=handle,
                use_logfmt=use_logfmt,
                zero_copy=zero_copy,
                out=out,
                wait_stats=combine_wait_recv_cost_stats,
                reads_values=self._backend.reads_indices,
            )
            check_device(self._rank, "x", x, self._backend.device)
            if zero_copy:
                x = self._filled_combine_buffer(x)
        args = CombineArgs(
            x=x,
            topk_idx=topk_idx,
            topk_weights=topk_weights,
            handle=handle,
            use_logfmt=use_logfmt,
            out=out,
            wait_stats=combine_wait_recv_cost_stats,
        )
        call, event, hook = self._run(
            lambda: self._backend.combine(args, is_split=return_recv_hook),
            args,
            x.device,
            async_finish,
            return_recv_hook,
        )
        return call.combined_x, event, hook

    def get_next_low_latency_combine_buffer(self, handle: Handle) -> torch.Tensor:
        """Where the next combine with `zero_copy=True` takes its rows from; fill it after this call and before that.

        Any low-latency call in between takes up the buffer's turn: ask again after it.

        Args:
            handle: What the dispatch returned.

        Returns:
            `[num_local_experts, num_ranks * num_max_dispatch_tokens_per_rank, hidden]` bfloat16, contiguous. It is not
            initialised, and is used again two calls later.

        Raises:
            ConfigError: The handle is not one of a low-latency dispatch.

        Collective: no.
        """
        src_info, *_, hidden, _ = check_handle(self._rank, self._num_ranks, handle)
        shape = (*src_info.shape, hidden)
        buffer = self._combine_buffers[self._half]
        if buffer is None or buffer.shape != shape or buffer.device != src_info.device:
            # It outlives this call, so callers must be able to fill it in inference mode and outside of it.
            with torch.inference_mode(False):
                buffer = src_info.new_empty(shape, dtype=torch.bfloat16)
            self._combine_buffers[self._half] = buffer
        return buffer

    def clean_low_latency_buffer(self, num_max_dispatch_tokens_per_rank: int, hidden: int, num_experts: int) -> None:
        """Meet all ranks: the host waits for them, or the current stream on the device backend. Nothing needs zeros.

        Args:
            num_max_dispatch_tokens_per_rank: As in the calls that follow; alike on all ranks, as the others.
            hidden: Channels of a token.
            num_experts: Experts of all ranks.

        Raises:
            ConfigError: A size cannot be taken.
            RankMismatchError: Ranks passed different sizes, or called different operations.
            CommTimeoutError: A rank died or is late, and there is no mask.

        Collective: yes.
        """
        with self._backend.rejections_reported("clean_low_latency_buffer"):
            check_sizes(self._rank, self._num_ranks, num_max_dispatch_tokens_per_rank, hidden, num_experts)
        self._pending.make_room()
        self._backend.meet(num_max_dispatch_tokens_per_rank, hidden, num_experts)
        self._pending.count()

    def low_latency_update_mask_buffer(self, rank_to_mask: int, mask: bool = False) -> None:
        """Mask a rank, or take it back, in the calls of this rank that follow.

        Other ranks do the same for themselves. A rank that is taken back must have made as many calls as the others.

        Args:
            rank_to_mask: The other rank.
            mask: Whether it is masked.

        Raises:
            ConfigError: There is no mask, or no such other rank.

        Collective: no. Stream: on the device backend, in the order of the current one.
        """
        self._need_mask()
        if not isinstance(rank_to_mask, int) or not 0 <= rank_to_mask < self._num_ranks or rank_to_mask == self._rank:
            raise rejected(
                self._rank,
                f"rank_to_mask must be another rank in [0, {self._num_ranks})",
                repr(rank_to_mask),
                "pass a rank of the group",
            )
        self._backend.set_masked(rank_to_mask, bool(mask))

    def low_latency_query_mask_buffer(self, mask_status: torch.Tensor) -> None:
        """Write the mask to `mask_status`, int32 `[num_ranks]`: 1 for a masked rank, else 0.

        Raises:
            ConfigError: There is no mask, or the tensor is another.

        Collective: no.
        """
        self._need_mask()
        check_mask_status(self._rank, self._num_ranks, mask_status)
        self._backend.copy_mask(mask_status)

    def low_latency_clean_mask_buffer(self) -> None:
        """Take all ranks back, as `low_latency_update_mask_buffer` does with one.

        Raises:
            ConfigError: There is no mask.

        Collective: no.
        """
        self._need_mask()
        self._backend.clean_mask()

    def close(self) -> None:
        """Receive the rows that are under way, whose hooks were not called. May be called again.

        Raises:
            CommTimeoutError: A rank died before it sent them, and there is no mask.

        Collective: no.
        """
        self._combine_buffers = [None] * _NUM_HALVES
        # After a failure the messages may never arrive, and their hooks say so.
        self._pending.complete_all(lambda: self._backend.has_failed)

    def _need_mask(self) -> None:
        if not self._backend.has_mask:
            raise ConfigError(
                f"ranks can be masked only with enable_shrink=True (got False, on rank {self._rank}); make the buffer "
                "with it"
            )

    def _filled_combine_buffer(self, x: torch.Tensor) -> torch.Tensor:
        """What a combine without a copy sends."""
        buffer = self._combine_buffers[self._half]
        if buffer is None or buffer.shape != x.shape or buffer.device != x.device:
            raise rejected(
                self._rank,
                "zero_copy must come after get_next_low_latency_combine_buffer(handle), with no other low-latency call "
                "in between",
                "no such buffer" if buffer is None else f"a buffer {list(buffer.shape)} on {buffer.device}",
                "call it, fill what it returns, and combine",
            )
        return buffer

    def _count_call(self) -> None:
        self._pending.count()
        self._half = (self._half + 1) % _NUM_HALVES

    def _run(
        self,
        start: Callable[[], _Call],
        args: DispatchArgs | CombineArgs,
        device: torch.device,
        async_finish: bool,
        return_recv_hook: bool,
    ) -> tuple[_Call, EventOverlap, RecvHook | None]:
        """Run an operation to its end, or until its rows are under way."""
        self._pending.make_room()
        if return_recv_hook:
            call = start()
            self._count_call()
            return call, EventOverlap(None), self._pending.add(call, device)
        # Memory that two streams used in a capture is not given out again before the capture has ended, so there a call
        # stays on the current stream, and its event stands for a point in that one.
        stays = async_finish and device.type == "cuda" and torch.cuda.is_current_stream_capturing()
        options = StreamOptions(async_with_compute_stream=async_finish and not stays)
        with CommScope(device, options, may_stay=True) as scope:
            call = start()
            self._count_call()
            call.complete()
            event = scope.finish(args.inputs, call.outputs)
        return call, EventOverlap(EventHandle(device)) if stays else event, None


def _make_backend(
    transport: CollectiveTransport, context: DeviceContext | None, *, enable_shrink: bool
) -> LatencyBackend:
    if context is None:
        return CollectiveLatency(transport, enable_shrink=enable_shrink)
    from deep_ep_legacy.device.low_latency import DeviceLatency

    return DeviceLatency(context, enable_shrink=enable_shrink)
