"""Owns the normal calls on the device backend: memory for results, parameters of the kernels, and the wait for counts.

Ranks stage their rows in the window, and pull from there what is theirs, so results are ordinary tensors of the right
size. The window's stage has a fixed size; what does not fit goes in several rounds, inside the kernel.
"""

from __future__ import annotations

import ctypes
import functools
import threading
import time
from collections.abc import Callable, Sequence

import torch

from deep_ep_core.errors import TransportError
from deep_ep_core.jit import KernelSpec, LaunchShape
from deep_ep_core.jit.structs import ParamsStruct
from deep_ep_core.refusals import rejected
from deep_ep_core.transport import AgreedField
from deep_ep_core.window import ControlRegion
from deep_ep_legacy.checks import CombineArgs, DispatchArgs
from deep_ep_legacy.collective import CollectiveBackend, DispatchResult, agreed_by_combine, agreed_by_dispatch
from deep_ep_legacy.device.context import DeviceContext, FamilyNeeds
from deep_ep_legacy.device.normal_failures import PHASES, explain
from deep_ep_legacy.device.normal_kernels import (
    FLAGS_BYTES,
    MAX_LOCAL_EXPERTS,
    NUM_AGREED,
    OPENING_SLOTS_BYTES,
    RANK_STATE_BYTES,
    CombineParams,
    DispatchParams,
    LayoutParams,
    Opening,
    Places,
    all_specs,
    combine_slots,
    combine_spec,
    counts_bytes,
    dispatch_slots,
    launch_shape,
    layout_spec,
    plan_spec,
    pull_spec,
    side_bytes,
)
from deep_ep_legacy.handles import IntranodeHandle
from deep_ep_legacy.layout import DispatchLayout

__all__ = ["MIN_STAGE_BYTES", "NormalDevice", "normal_needs"]

MIN_STAGE_BYTES = 16 * 2**20
"""Bytes of the stage of a buffer that was made with fewer `num_nvl_bytes`."""

_OPENING = "normal.opening"
_COUNTS = "normal.counts"
_FLAGS = "normal.flags"
_STAGE = "normal.stage"
_ROW_UNIT_BYTES = 16
# Stamps of counts go from 1 to this, and round.
_MAX_STAMP = 2**31 - 2
_POLLS_PER_QUERY = 4096
# What an opening opens.
_DISPATCH, _REPEATED_DISPATCH, _COMBINE = 1, 2, 3


def normal_needs(num_nvl_bytes: int, num_ranks: int) -> FamilyNeeds:
    """What the normal calls ask of the context.

    Args:
        num_nvl_bytes: Size of the buffer, as callers give it: that of the stage.
        num_ranks: Ranks of the group.
    """
    return FamilyNeeds(
        regions=(
            ControlRegion(name=_OPENING, num_bytes=OPENING_SLOTS_BYTES),
            ControlRegion(name=_COUNTS, num_bytes=counts_bytes(num_ranks)),
            ControlRegion(name=_FLAGS, num_bytes=FLAGS_BYTES),
            ControlRegion(name=_STAGE, num_bytes=max(num_nvl_bytes, MIN_STAGE_BYTES)),
        ),
        kernels=all_specs((torch.int64,)),
    )


class NormalDevice:
    """Moves rows by CUDA kernels; hands calls with tensors of another device to the collective backend.

    Calls are made under a `CommScope`. A thread waits where another one is in a call: between the kernels of a dispatch
    there must be none of another.

    Args:
        context: The window, with the regions of `normal_needs`.
        collective: The backend of the other calls.
    """

    def __init__(self, context: DeviceContext, collective: CollectiveBackend) -> None:
        self._context = context
        self._collective = collective
        self._stage_bytes = context.memory.layout.num_bytes_of(_STAGE)
        # What the operation that runs must agree on. The context refers to the list, not to this object, so that a
        # buffer that is dropped is free at once.
        self._fields: list[AgreedField] = []
        self._state = torch.zeros(RANK_STATE_BYTES, dtype=torch.uint8, device=context.device)
        self._places = Places(
            team=context.team,
            wait=context.wait_params(PHASES, functools.partial(explain, self._fields, context.num_ranks)),
            state=self._state.data_ptr(),
            opening_offset=context.offset_of(_OPENING),
            counts_offset=context.offset_of(_COUNTS),
            flags_offset=context.offset_of(_FLAGS),
            stage_offset=context.offset_of(_STAGE),
        )
        # A stamp, the rows, and the selections of each expert.
        self._host_counts = torch.zeros(2 + MAX_LOCAL_EXPERTS, dtype=torch.int32, device="cpu", pin_memory=True)
        self._host_words = (ctypes.c_int32 * self._host_counts.numel()).from_address(self._host_counts.data_ptr())
        self._host_stamp = 0
        self._lock = threading.Lock()
        # What this stream has zeroed is zero for the kernels of the communication stream.
        torch.cuda.current_stream(context.device).synchronize()

    def report_rejection(self, operation: str, reason: str) -> None:
        """Tell the peers that this rank refuses an operation. Kernels that wait for it end by their timeout."""
        self._collective.report_rejection(operation, reason)

    def layout(self, topk_idx: torch.Tensor, num_experts: int) -> DispatchLayout:
        """Count how many tokens go where."""
        context, num_ranks, num_tokens = self._context, self._context.num_ranks, len(topk_idx)
        if topk_idx.device != context.device:
            return self._collective.layout(topk_idx, num_experts)
        counts = torch.zeros(num_ranks + num_experts, dtype=torch.int32, device=context.device)
        per_rank, per_expert = counts[:num_ranks], counts[num_ranks:]
        is_in_rank = torch.empty(num_tokens, num_ranks, dtype=torch.bool, device=context.device)
        params = LayoutParams(
            topk_idx=topk_idx.data_ptr(),
            num_tokens_per_rank=per_rank.data_ptr(),
            num_tokens_per_expert=per_expert.data_ptr(),
            is_token_in_rank=is_in_rank.data_ptr(),
            num_tokens=num_tokens,
            num_topk=topk_idx.size(1),
            num_experts=num_experts,
            num_ranks=num_ranks,
        )
        dtype = topk_idx.dtype
        # It waits for no rank, so it need not leave SMs to others.
        self._launch("layout", lambda: layout_spec(dtype), dtype, context.max_num_sms, params)
        return DispatchLayout(
            num_tokens_per_rank=per_rank,
            num_tokens_per_rdma_rank=None,
            num_tokens_per_expert=per_expert,
            is_token_in_rank=is_in_rank,
        )

    # Dispatch

    def dispatch(self, args: DispatchArgs) -> DispatchResult:
        """Send each token to its ranks, and take theirs, ordered by (source rank, token)."""
        if args.x.device != self._context.device:
            return self._collective.dispatch(args)
        with self._lock:
            return self._dispatch(args)

    def _dispatch(self, args: DispatchArgs) -> DispatchResult:
        num_sms = self._num_sms(args.config.num_sms)
        x = _aligned(args.x)
        params = self._dispatch_params(args, x)
        idx_dtype = torch.int64 if args.topk_idx is None else args.topk_idx.dtype
        if args.handle is not None:
            assert isinstance(args.handle, IntranodeHandle), "the ranks are of one node"
            self._check_handle(args.handle)
            self._set_handle(params, args.handle)
            result = self._new_results(args, params, args.handle, None)
            self._begin(agreed_by_dispatch(args), _REPEATED_DISPATCH, params.opening)
            self._launch("pull", lambda: pull_spec(idx_dtype), idx_dtype, num_sms, params)
            return result
        waits = args.num_worst_tokens == 0
        handle = self._new_handle(args, params)
        self._begin(agreed_by_dispatch(args), _DISPATCH, params.opening)
        if waits:
            self._host_stamp = params.host_stamp = self._host_stamp % _MAX_STAMP + 1
            params.host_counts = self._host_counts.data_ptr()
        self._launch("plan", lambda: plan_spec(idx_dtype), idx_dtype, num_sms, params)
        num_recv, counts = args.num_worst_tokens, []
        if waits:
            num_recv, *counts = self._wait_for_counts(1 + params.num_experts // self._context.num_ranks)
        recv_src_idx = torch.empty(num_recv, dtype=torch.int32, device=x.device)
        handle = handle._replace(recv_src_idx=recv_src_idx)
        params.recv_src_idx = recv_src_idx.data_ptr()
        result = self._new_results(args, params, handle, counts)
        self._launch("pull", lambda: pull_spec(idx_dtype), idx_dtype, num_sms, params)
        return result

    def _dispatch_params(self, args: DispatchArgs, x: torch.Tensor) -> DispatchParams:
        """The parameters that follow from the arguments alone; all others are 0."""
        num_ranks, sf, idx = self._context.num_ranks, args.sf, args.topk_idx
        # ctypes leaves at 0 what is not set.
        params = DispatchParams.__new__(DispatchParams)
        params.places = self._places
        params.opening.num_tokens, params.opening.num_worst_tokens = len(x), args.num_worst_tokens
        params.x, params.is_token_in_rank = x.data_ptr(), args.is_token_in_rank.data_ptr()
        params.num_tokens, params.row_bytes = len(x), x.size(1) * x.element_size()
        params.expert_alignment = args.expert_alignment
        params.repeats = args.handle is not None
        if sf is not None:
            params.sf, params.num_sf_packs = sf.data_ptr(), sf.size(1)
            params.sf_token_stride, params.sf_pack_stride = sf.stride()
        if idx is not None and args.topk_weights is not None:
            params.topk_idx, params.topk_weights = idx.data_ptr(), args.topk_weights.data_ptr()
            params.num_topk = idx.size(1)
        if args.num_tokens_per_rank is not None and args.num_tokens_per_expert is not None:
            params.num_tokens_per_rank = args.num_tokens_per_rank.data_ptr()
            params.num_tokens_per_expert = args.num_tokens_per_expert.data_ptr()
            params.num_experts = len(args.num_tokens_per_expert)
            if params.num_experts > num_ranks * MAX_LOCAL_EXPERTS:
                raise rejected(
                    self._context.rank,
                    f"num_experts must be at most {MAX_LOCAL_EXPERTS} for each of the {num_ranks} ranks with kernels",
                    params.num_experts,
                    'make the buffer with backend="collective"',
                )
        params.side_bytes = side_bytes(num_sf_packs=params.num_sf_packs, num_topk=params.num_topk)
        params.num_slots = self._slots(
            dispatch_slots(
                self._stage_bytes, num_ranks=num_ranks, row_bytes=params.row_bytes, side_bytes=params.side_bytes
            )
        )
        return params

    def _new_handle(self, args: DispatchArgs, params: DispatchParams) -> IntranodeHandle:
        """Memory for a new handle, which the kernels are told of; its rows are not known yet."""
        num_ranks, num_channels = self._context.num_ranks, args.config.num_channels
        new_ints = _maker(torch.int32, args.x.device)
        handle = IntranodeHandle(
            rank_prefix_matrix=new_ints(num_ranks, num_ranks),
            channel_prefix_matrix=new_ints(num_ranks, num_channels),
            recv_channel_prefix_matrix=new_ints(num_ranks, num_channels),
            recv_src_idx=new_ints(0),
            is_token_in_rank=args.is_token_in_rank,
            send_head=new_ints(len(args.x), num_ranks),
        )
        self._set_handle(params, handle)
        return handle

    @staticmethod
    def _set_handle(params: DispatchParams, handle: IntranodeHandle) -> None:
        params.rank_prefix_matrix = handle.rank_prefix_matrix.data_ptr()
        params.channel_prefix_matrix = handle.channel_prefix_matrix.data_ptr()
        params.recv_channel_prefix_matrix = handle.recv_channel_prefix_matrix.data_ptr()
        params.recv_src_idx = handle.recv_src_idx.data_ptr()
        params.send_head = handle.send_head.data_ptr()
        params.num_channels = handle.channel_prefix_matrix.size(1)

    def _new_results(
        self, args: DispatchArgs, params: DispatchParams, handle: IntranodeHandle, counts: list[int] | None
    ) -> DispatchResult:
        """Memory for the results, which the kernel is told of."""
        device, num_recv = args.x.device, len(handle.recv_src_idx)
        params.num_recv = num_recv
        recv_x = torch.empty(num_recv, args.x.size(1), dtype=args.x.dtype, device=device)
        params.recv_x = recv_x.data_ptr()
        recv_sf = recv_topk_idx = recv_topk_weights = None
        if args.sf is not None:
            recv_sf = torch.empty(num_recv, args.sf.size(1), dtype=args.sf.dtype, device=device)
            params.recv_sf = recv_sf.data_ptr()
        if args.topk_idx is not None:
            recv_topk_idx = torch.empty(num_recv, params.num_topk, dtype=args.topk_idx.dtype, device=device)
            recv_topk_weights = torch.empty(num_recv, params.num_topk, dtype=torch.float32, device=device)
            params.recv_topk_idx, params.recv_topk_weights = recv_topk_idx.data_ptr(), recv_topk_weights.data_ptr()
        return DispatchResult(
            recv_x=recv_x,
            recv_sf=recv_sf,
            recv_topk_idx=recv_topk_idx,
            recv_topk_weights=recv_topk_weights,
            num_recv_tokens_per_expert=counts,
            handle=handle,
        )

    # Combine

    def combine(self, args: CombineArgs) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Bring rows back to the ranks of their tokens, and sum them by increasing rank, biases first."""
        if args.x.device != self._context.device:
            return self._collective.combine(args)
        with self._lock:
            return self._combine(args)

    def _combine(self, args: CombineArgs) -> tuple[torch.Tensor, torch.Tensor | None]:
        handle, weights = args.handle, args.topk_weights
        assert isinstance(handle, IntranodeHandle), "the ranks are of one node"
        self._check_handle(handle)
        x, biases = _aligned(args.x), [_aligned(bias) for bias in args.biases]
        num_tokens, hidden = len(handle.is_token_in_rank), x.size(1)
        params = CombineParams.__new__(CombineParams)
        params.places = self._places
        params.opening.num_tokens = params.num_tokens = num_tokens
        params.x, params.num_recv, params.row_bytes = x.data_ptr(), len(x), hidden * x.element_size()
        for bias_idx, bias in enumerate(biases):
            params.biases[bias_idx] = bias.data_ptr()
        params.is_token_in_rank = handle.is_token_in_rank.data_ptr()
        params.rank_prefix_matrix = handle.rank_prefix_matrix.data_ptr()
        params.recv_src_idx = handle.recv_src_idx.data_ptr()
        out = torch.empty(num_tokens, hidden, dtype=x.dtype, device=x.device)
        params.out, out_weights = out.data_ptr(), None
        if weights is not None:
            out_weights = torch.empty(num_tokens, weights.size(1), dtype=torch.float32, device=x.device)
            params.topk_weights, params.out_weights = weights.data_ptr(), out_weights.data_ptr()
            params.num_topk = weights.size(1)
        params.num_slots = self._slots(
            combine_slots(
                self._stage_bytes,
                num_ranks=self._context.num_ranks,
                row_bytes=params.row_bytes,
                num_topk=params.num_topk,
            )
        )
        self._begin(agreed_by_combine(args), _COMBINE, params.opening)
        self._launch("combine", combine_spec, None, self._num_sms(args.config.num_sms), params)
        return out, out_weights

    # What they share

    def _begin(self, fields: Sequence[AgreedField], kind: int, opening: Opening) -> None:
        """An operation begins, with what its ranks must agree on. Raises what an earlier one has reported."""
        self._context.check()
        self._fields[:] = [AgreedField(name="operation", value=kind, show=_show_kind), *fields]
        assert len(self._fields) < NUM_AGREED, "the last value is the device's"
        for idx, field in enumerate(self._fields):
            opening.agreed[idx] = field.value & 0xFFFFFFFF

    def _launch(
        self,
        name: str,
        make_spec: Callable[[], KernelSpec],
        idx_dtype: torch.dtype | None,
        num_sms: int,
        params: ParamsStruct,
    ) -> None:
        stream = torch.cuda.current_stream(self._context.device)
        self._context.follow(stream)
        key = ("normal", name, idx_dtype, num_sms)

        def make() -> tuple[KernelSpec, LaunchShape]:
            return make_spec(), launch_shape(num_sms)

        self._context.launch(key, make)(params, stream.cuda_stream)
        self._context.launched(stream)

    def _num_sms(self, num_sms: int) -> int:
        return min(max(num_sms, 1), self._context.max_num_sms)

    def _slots(self, num_slots: int) -> int:
        if num_slots < 1:
            raise rejected(
                self._context.rank,
                "num_nvl_bytes must have room for a token of each rank, at the least",
                self._stage_bytes,
                "make the buffer with more",
            )
        return num_slots

    def _check_handle(self, handle: IntranodeHandle) -> None:
        """What a kernel reads by its address must be of the right size and kind; no wait."""
        num_tokens, num_ranks = handle.is_token_in_rank.shape
        num_channels = handle.channel_prefix_matrix.size(-1)
        wanted = {
            "rank_prefix_matrix": (num_ranks, num_ranks),
            "channel_prefix_matrix": (num_ranks, num_channels),
            "recv_src_idx": (len(handle.recv_src_idx),),
            "send_head": (num_tokens, num_ranks),
        }
        for name, shape in wanted.items():
            tensor: torch.Tensor = getattr(handle, name)
            is_right = tensor.shape == shape and tensor.dtype == torch.int32 and tensor.is_contiguous()
            if not is_right or tensor.device != self._context.device or not handle.is_token_in_rank.is_contiguous():
                raise rejected(
                    self._context.rank,
                    f"{name} of the handle must be {list(shape)} int32, contiguous, on {self._context.device}",
                    f"{list(tensor.shape)} {tensor.dtype} on {tensor.device}",
                    "pass the handle as dispatch returned it",
                )

    def _wait_for_counts(self, num_counts: int) -> list[int]:
        """Wait on the host until the kernel that was launched last has told the counts. Other threads may run."""
        context, words, num_polls = self._context, self._host_words, 0
        stream = torch.cuda.current_stream(context.device)
        while words[0] != self._host_stamp:
            context.check()
            num_polls += 1
            # A CUDA call now and then tells of a kernel that died.
            if num_polls % _POLLS_PER_QUERY == 0 and stream.query():
                context.check()
                if words[0] != self._host_stamp:
                    raise TransportError(
                        f"the kernel that counts rows must tell the counts (got none, on rank {context.rank}); an "
                        "earlier CUDA error in this process is the usual cause"
                    )
            # Lets other threads have the interpreter.
            time.sleep(0)
        return self._host_words[1 : 1 + num_counts]


def _show_kind(value: int) -> str:
    names = {_DISPATCH: "dispatch", _REPEATED_DISPATCH: "dispatch with a handle", _COMBINE: "combine"}
    return names.get(value, f"operation {value}")


def _aligned(rows: torch.Tensor) -> torch.Tensor:
    """The rows, copied if they do not begin where a kernel can read them."""
    return rows.clone() if rows.data_ptr() % _ROW_UNIT_BYTES else rows


def _maker(dtype: torch.dtype, device: torch.device) -> Callable[..., torch.Tensor]:
    new_empty: Callable[..., torch.Tensor] = torch.empty(0, dtype=dtype, device=device).new_empty
    return new_empty
