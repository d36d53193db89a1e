"""Owns low-latency calls on the device: what the kernels take, their parameters, and the words for what they report.

A rank stores rows straight into the windows of its peers. The calls, their streams and hooks are in
`deep_ep_legacy.low_latency`; how memory is divided is in `low_latency_memory`.
"""

from __future__ import annotations

import contextlib
import zlib
from contextlib import AbstractContextManager

import torch

from deep_ep_core.cuda_streams import current_stream
from deep_ep_core.errors import ConfigError, DeepEPError, RankMismatchError
from deep_ep_core.jit import KernelSpec, LaunchShape
from deep_ep_core.refusals import rejected
from deep_ep_core.wait import TimeoutLog, TimeoutReport
from deep_ep_legacy.device.context import DeviceContext, FamilyNeeds
from deep_ep_legacy.device.low_latency_kernels import (
    CallParams,
    CombineConfig,
    CombineParams,
    DispatchConfig,
    DispatchParams,
    combine_spec,
    dispatch_spec,
    launch_shape,
    usual_latency_specs,
)
from deep_ep_legacy.device.low_latency_memory import (
    MAX_NUM_EXPERTS,
    MAX_NUM_TOKENS,
    MAX_NUM_TOPK,
    NOTES,
    PHASES,
    SIGNALS,
    SLABS,
    STATE_BYTES,
    combine_slot_bytes,
    dispatch_slot_bytes,
    latency_regions,
    told_of,
)
from deep_ep_legacy.low_latency_combine import CombineArgs
from deep_ep_legacy.low_latency_dispatch import DispatchArgs, DispatchResults
from deep_ep_legacy.low_latency_sizing import get_low_latency_rdma_size_hint

__all__ = ["DeviceLatency", "low_latency_needs"]

_VECTOR_BYTES = 16
_NOTE_DISAGREE, _NOTE_INVALID, _NOTE_TOO_MANY = range(len(NOTES))


def low_latency_needs(num_rdma_bytes: int) -> FamilyNeeds:
    """What low-latency calls ask of a buffer's context."""
    return FamilyNeeds(regions=latency_regions(num_rdma_bytes), kernels=usual_latency_specs())


class _DeviceCall:
    """A call of which this rank has sent its part, and received too where the call was not split.

    Args:
        backend: Who launches.
        params: The kernel's parameters.
        receive: How the receiving kernel is configured; None where there is nothing left to do.
        kept: What must live until then.
    """

    def __init__(
        self,
        backend: DeviceLatency,
        params: DispatchParams | CombineParams,
        receive: DispatchConfig | CombineConfig | None,
        kept: tuple[torch.Tensor | None, ...],
    ) -> None:
        self._backend, self._params, self._receive, self._kept = backend, params, receive, kept

    def complete(self) -> None:
        """Launch the kernel that receives, on the current stream; the host does not wait."""
        if self._receive is not None:
            self._backend.launch(self._params, self._receive)
            self._receive, self._kept = None, ()


class _DeviceDispatch(_DeviceCall):
    """A dispatch; see `_DeviceCall`."""

    def __init__(
        self,
        backend: DeviceLatency,
        params: DispatchParams,
        receive: DispatchConfig | None,
        kept: tuple[torch.Tensor | None, ...],
        results: DispatchResults,
    ) -> None:
        super().__init__(backend, params, receive, kept)
        self.results = results

    @property
    def outputs(self) -> list[torch.Tensor | None]:
        """Every tensor that the caller is given."""
        return self.results.tensors


class _DeviceCombine(_DeviceCall):
    """A combine; see `_DeviceCall`."""

    def __init__(
        self,
        backend: DeviceLatency,
        params: CombineParams,
        receive: CombineConfig | None,
        kept: tuple[torch.Tensor | None, ...],
        combined_x: torch.Tensor,
    ) -> None:
        super().__init__(backend, params, receive, kept)
        self.combined_x = combined_x

    @property
    def outputs(self) -> list[torch.Tensor | None]:
        """Every tensor that the caller is given."""
        return [self.combined_x]


class DeviceLatency:
    """Low-latency calls by kernels over the window; a `LatencyBackend`.

    Args:
        context: The window and the kernels; made with `low_latency_needs`.
        enable_shrink: Keep a mask of ranks that take no part, in device memory.

    Collective: no. Stream: memory is zeroed on the current one.
    """

    reads_indices = False
    # One in each half of the slabs.
    max_under_way: int | None = 2

    def __init__(self, context: DeviceContext, *, enable_shrink: bool) -> None:
        self._context = context
        self.device: torch.device | None = context.device
        self._mask = torch.zeros(context.num_ranks, dtype=torch.int32, device=context.device) if enable_shrink else None
        self.has_mask = enable_shrink
        # The state, then the number of a call that is not split.
        self._state = torch.zeros(STATE_BYTES + 8, dtype=torch.uint8, device=context.device)
        self._wait = context.wait_params(PHASES)
        # What is wrong without a wait must not end the waits of others, so it has a log of its own.
        self._notes_log = TimeoutLog(rank=context.rank, device=context.device)
        self._notes = self._notes_log.params(first_phase=self._notes_log.add_phases(NOTES), timeout_s=context.timeout_s)
        self._slab_bytes = context.memory.layout.num_bytes_of(SLABS) // 2
        self._num_experts = 0
        self._last_call = "none"
        torch.cuda.current_stream(context.device).synchronize()

    def dispatch(self, args: DispatchArgs, *, is_split: bool) -> _DeviceDispatch:
        """Launch the kernel that sends, and receives where the call is not split."""
        x, num_topk = args.x, args.topk_idx.size(1)
        hidden = x.size(1)
        if num_topk > MAX_NUM_TOPK:
            raise rejected(
                self._context.rank,
                f"topk_idx must have at most {MAX_NUM_TOPK} columns on the device backend",
                num_topk,
                "select fewer experts for a token",
            )
        self._check_sizes(
            args.num_max_tokens, hidden, args.num_experts, dispatch_slot_bytes(hidden, use_fp8=args.use_fp8)
        )
        self._check_alignment("x", x)
        self._begin(
            f"low_latency_dispatch(num_max_dispatch_tokens_per_rank={args.num_max_tokens}, hidden={hidden}, "
            f"num_experts={args.num_experts}, use_fp8={bool(args.use_fp8)}, round_scale={bool(args.round_scale)}, "
            f"use_ue8m0={bool(args.use_ue8m0)})",
            args.num_experts,
        )
        results = DispatchResults.empty(args, num_ranks=self._context.num_ranks)
        epoch = self._new_epoch(is_split)
        src_info, layout_range, *_ = results.handle
        params = DispatchParams(
            call=self._call_params(args.num_max_tokens, hidden, args.num_experts, args.wait_stats, epoch),
            x=x.data_ptr(),
            topk_idx=args.topk_idx.data_ptr(),
            recv_x=results.recv_x.data_ptr(),
            recv_scales=_address(results.recv_scales),
            recv_count=results.recv_count.data_ptr(),
            src_info=src_info.data_ptr(),
            layout_range=layout_range.data_ptr(),
            recv_stats=_address(args.recv_stats),
            num_tokens=len(x),
            num_topk=num_topk,
            is_rounded=bool(args.round_scale),
            is_ue8m0=bool(args.use_ue8m0),
        )
        is_idx64 = args.topk_idx.dtype == torch.int64
        is_fp8 = bool(args.use_fp8)
        send = DispatchConfig(has_send=True, has_receive=not is_split, is_fp8=is_fp8, is_idx64=is_idx64)
        # A kernel that only receives knows no indices.
        receive = DispatchConfig(has_send=False, has_receive=True, is_fp8=is_fp8, is_idx64=True) if is_split else None
        self.launch(params, send)
        kept = (epoch, args.wait_stats, args.recv_stats, *results.tensors) if is_split else ()
        return _DeviceDispatch(self, params, receive, kept, results)

    def combine(self, args: CombineArgs, *, is_split: bool) -> _DeviceCombine:
        """Launch the kernel that sends, and receives where the call is not split."""
        src_info, layout_range, num_max_tokens, hidden, num_experts = args.handle
        self._check_sizes(num_max_tokens, hidden, num_experts, combine_slot_bytes(hidden, use_logfmt=args.use_logfmt))
        self._check_alignment("x", args.x)
        if args.out is not None:
            self._check_alignment("out", args.out)
        self._begin(
            f"low_latency_combine(num_max_dispatch_tokens_per_rank={num_max_tokens}, hidden={hidden}, "
            f"num_experts={num_experts}, use_logfmt={bool(args.use_logfmt)})",
            num_experts,
        )
        combined_x = args.x.new_empty(len(args.topk_idx), hidden) if args.out is None else args.out
        epoch = self._new_epoch(is_split)
        params = CombineParams(
            call=self._call_params(num_max_tokens, hidden, num_experts, args.wait_stats, epoch),
            x=args.x.data_ptr(),
            src_info=src_info.data_ptr(),
            layout_range=layout_range.data_ptr(),
            topk_idx=args.topk_idx.data_ptr(),
            topk_weights=args.topk_weights.data_ptr(),
            out=combined_x.data_ptr(),
            num_tokens=len(args.topk_idx),
            num_topk=args.topk_idx.size(1),
        )
        is_logfmt, is_idx64 = bool(args.use_logfmt), args.topk_idx.dtype == torch.int64
        # A kernel that only sends knows no indices.
        send = CombineConfig(
            has_send=True, has_receive=not is_split, is_logfmt=is_logfmt, is_idx64=is_split or is_idx64
        )
        receive = None
        if is_split:
            receive = CombineConfig(has_send=False, has_receive=True, is_logfmt=is_logfmt, is_idx64=is_idx64)
        self.launch(params, send)
        kept = (epoch, args.wait_stats, args.topk_idx, args.topk_weights, combined_x) if is_split else ()
        return _DeviceCombine(self, params, receive, kept, combined_x)

    def meet(self, num_max_tokens: int, hidden: int, num_experts: int) -> None:
        """Let the current stream wait for all ranks: a combine without rows."""
        self._begin(f"clean_low_latency_buffer({num_max_tokens}, {hidden}, {num_experts})", num_experts)
        params = CombineParams(
            call=self._call_params(num_max_tokens, hidden, 0, None, None),
            x=None,
            src_info=None,
            layout_range=None,
            topk_idx=None,
            topk_weights=None,
            out=None,
            num_tokens=0,
            num_topk=1,
        )
        self.launch(params, CombineConfig(has_send=True, has_receive=True, is_logfmt=False, is_idx64=True))

    def launch(self, params: DispatchParams | CombineParams, config: DispatchConfig | CombineConfig) -> None:
        """Launch on the current stream, behind whatever kernel of the buffer was launched last."""
        context = self._context
        stream = current_stream(context.device_idx)
        context.follow(stream)
        num_experts = params.call.num_experts

        def make() -> tuple[KernelSpec, LaunchShape]:
            spec = dispatch_spec(config) if isinstance(config, DispatchConfig) else combine_spec(config)
            return spec, launch_shape(num_sms=context.max_num_sms, num_experts=num_experts)

        launch = context.launch((config, num_experts), make)
        launch(params, stream.cuda_stream)
        context.launched(stream)

    def rejections_reported(self, name: str) -> AbstractContextManager[None]:
        """Nothing: peers wait on the device, and then name this rank."""
        return contextlib.nullcontext()

    def set_masked(self, rank: int, is_masked: bool) -> None:
        """Mask another rank, or take it back, in the order of the current stream."""
        if not is_masked:
            self._forget(self._mask_tensor()[rank : rank + 1], slice(rank, rank + 1))
        self._mask_tensor()[rank] = int(is_masked)

    def copy_mask(self, mask_status: torch.Tensor) -> None:
        """Write 1 for each masked rank, else 0."""
        mask_status.copy_(self._mask_tensor())

    def clean_mask(self) -> None:
        """Take all ranks back, in the order of the current stream."""
        self._forget(self._mask_tensor(), slice(self._context.num_ranks))
        self._mask_tensor().zero_()

    @property
    def has_failed(self) -> bool:
        """Whether a wait has expired, so that rows may be missing for good."""
        return self._context.log.has_record

    def _forget(self, mask: torch.Tensor, ranks: slice) -> None:
        """Those that were masked told nobody what they received meanwhile, so nothing is to be waited for."""
        told_of(self._state[:STATE_BYTES])[:, ranks].masked_fill_(mask.bool(), 0)

    def _mask_tensor(self) -> torch.Tensor:
        assert self._mask is not None, "the session has looked at has_mask"
        return self._mask

    def _check_sizes(self, num_max_tokens: int, hidden: int, num_experts: int, slot_bytes: int) -> None:
        rank = self._context.rank
        for name, value, most in (
            ("num_max_dispatch_tokens_per_rank", num_max_tokens, MAX_NUM_TOKENS),
            ("num_experts", num_experts, MAX_NUM_EXPERTS),
        ):
            if value > most:
                raise rejected(
                    rank,
                    f"{name} must be at most {most} on the device backend",
                    value,
                    'make the buffer with backend="collective"',
                )
        if num_experts * num_max_tokens * slot_bytes > self._slab_bytes:
            hint = get_low_latency_rdma_size_hint(num_max_tokens, hidden, self._context.num_ranks, num_experts)
            raise rejected(
                rank,
                f"num_rdma_bytes must be {hint} for a call of num_max_dispatch_tokens_per_rank={num_max_tokens}, "
                f"hidden={hidden}, num_experts={num_experts}",
                "less",
                "make the buffer as large as get_low_latency_rdma_size_hint says",
            )

    def _check_alignment(self, name: str, tensor: torch.Tensor) -> None:
        if tensor.data_ptr() % _VECTOR_BYTES:
            raise rejected(
                self._context.rank,
                f"{name} must begin at a multiple of {_VECTOR_BYTES} bytes on the device backend",
                f"address {tensor.data_ptr():#x}",
                "copy it",
            )

    def _begin(self, call: str, num_experts: int) -> None:
        """A call begins. Raises what an earlier one has reported."""
        report = self._notes_log.read()
        if report is not None:
            error = self._error_of(report)
            self._notes_log.reset()
            raise error
        self._context.check()
        self._last_call, self._num_experts = call, num_experts

    def _error_of(self, report: TimeoutReport) -> DeepEPError:
        if report.phase_idx == _NOTE_DISAGREE:
            values = ["not compared"] * self._context.num_ranks
            values[report.rank], values[report.peer] = self._last_call, "another call"
            return RankMismatchError(
                "every rank of the group must make the same low-latency calls with the same sizes and flags (got "
                f"another call on rank {report.peer} than on rank {report.rank}, whose last one was "
                f"{self._last_call}); nothing of rank {report.peer} was taken, make the ranks agree",
                field="low-latency call",
                values=values,
            )
        if report.phase_idx == _NOTE_INVALID:
            return ConfigError(
                f"topk_idx must hold experts in [0, {self._num_experts}), or -1 for none (got another entry for token "
                f"{report.seen} of an earlier low_latency_dispatch, on rank {report.rank}); it was sent nowhere, look "
                "at the router's output"
            )
        return ConfigError(
            "topk_idx must not name an expert so often that more than num_max_dispatch_tokens_per_rank rows are for it "
            f"(got that for expert {report.seen} in an earlier low_latency_dispatch, on rank {report.rank}); the rows "
            "above that were sent nowhere, look at the router's output"
        )

    def _new_epoch(self, is_split: bool) -> torch.Tensor | None:
        """Memory for the number of a call that is split; the kernel that sends leaves it to that which receives."""
        return self._state.new_empty(8) if is_split else None

    def _call_params(
        self,
        num_max_tokens: int,
        hidden: int,
        num_experts: int,
        wait_stats: torch.Tensor | None,
        epoch: torch.Tensor | None,
    ) -> CallParams:
        context = self._context
        return CallParams(
            team=context.team,
            wait=self._wait,
            notes=self._notes,
            state=self._state.data_ptr(),
            mask=_address(self._mask),
            epoch=self._state.data_ptr() + STATE_BYTES if epoch is None else epoch.data_ptr(),
            wait_stats=_address(wait_stats),
            signals_offset=context.offset_of(SIGNALS),
            slab_offset=context.offset_of(SLABS),
            slab_bytes=self._slab_bytes,
            digest=zlib.crc32(self._last_call.encode()) & 0xFFFF,
            num_experts=num_experts,
            num_max_tokens=num_max_tokens,
            hidden=hidden,
        )


def _address(tensor: torch.Tensor | None) -> int | None:
    return None if tensor is None else tensor.data_ptr()
