"""Owns what dispatches of one kind share: sizes, and the kernel's parameters with all that stays the same filled in."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch

from deep_ep_core.jit import KernelSpec, LaunchShape
from deep_ep_core.jit.structs import ParamsStruct
from deep_ep_ep.agreed import HANDLE_NAME, agreed_by_dispatch
from deep_ep_ep.checks import DispatchArgs
from deep_ep_ep.device.context import DeviceContext
from deep_ep_ep.device.dispatch_kernel import (
    DispatchConfig,
    DispatchParams,
    dispatch_launch_shape,
    dispatch_spec,
    row_stages,
    side_bytes,
)
from deep_ep_ep.device.opening import AgreedValues
from deep_ep_ep.sizing import max_expanded_tokens, max_recv_tokens

__all__ = ["ALL_PARTS", "PLACE", "PLAN", "PLAN_AND_PLACE", "RECEIVE", "DispatchCall", "KernelParts", "PartsLaunch"]


# What a result may hold beyond its end at most, to spare the host a second kernel.
_MAX_SPARE_SIDE_BYTES = 1 << 20


class KernelParts(NamedTuple):
    """Which parts of a dispatch one kernel does, see `DispatchConfig`."""

    has_plan: bool
    has_place: bool
    has_receive: bool


PLAN = KernelParts(True, False, False)
PLAN_AND_PLACE = KernelParts(True, True, False)
ALL_PARTS = KernelParts(True, True, True)
PLACE = KernelParts(False, True, True)
RECEIVE = KernelParts(False, False, True)


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class PartsLaunch:
    """A kernel that is ready to be launched, and what its stages need in the parameters; see `RowStages`."""

    run: Callable[[ParamsStruct, int], None]
    num_stages: int
    piece_bytes: int
    offset: int


class DispatchCall:
    """What dispatches of one kind share. They come one at a time, and write the rest of the parameters.

    Args:
        context: The memory and the kernels.
        args: The first of them.

    Attributes:
        params: The kernel's parameters.
        told: `params.opening.told`.
        agreed: `params.opening.agreed`, and its fields.
        do_expand, num_topk, idx_dtype, dtype, hidden, row_bytes, num_sf_packs, device: Of the arguments.
        num_local_experts: Experts of this rank.
        num_columns: Ranks and experts, which the plan counts.
        num_slots: The most rows that may come to any rank.
        max_expanded: The most rows by expert.
        side_bytes: Bytes of a token's side record.
        stages_all: Whether no results live in the window.
        are_sides_small: Whether what lies beside the rows of a token-major result may take the room of the most rows
            that may come, although fewer come.
        new_x: Makes a tensor like `x` of the shape that it is passed, values undefined, on the device; the next three
            make one like `topk_idx`, like `topk_weights`, and one of int32.
        new_idx, new_weights, new_ints: See `new_x`.
    """

    def __init__(self, context: DeviceContext, args: DispatchArgs) -> None:
        num_ranks, device = context.num_ranks, context.device
        self._context = context
        self._num_sms = min(args.num_sms, context.max_num_sms)
        self._launches: dict[KernelParts, PartsLaunch] = {}
        self.do_expand = args.do_expand
        self.num_topk = args.num_topk
        self.idx_dtype, self.dtype = args.topk_idx.dtype, args.x.dtype
        self.device = device
        self.hidden = args.x.size(1)
        self.row_bytes = args.x.size(1) * args.x.element_size()
        self.num_sf_packs = 0 if args.sf is None else args.sf.size(1)
        self.num_local_experts = args.num_experts // num_ranks
        self.num_columns = num_ranks + args.num_experts
        self.num_slots = max_recv_tokens(num_ranks, args.num_max_tokens_per_rank)
        self.max_expanded = max_expanded_tokens(
            num_ranks, args.num_max_tokens_per_rank, args.num_topk, self.num_local_experts, args.expert_alignment
        )
        self.side_bytes = side_bytes(
            num_topk=args.num_topk,
            num_sf_packs=self.num_sf_packs,
            has_weights=args.topk_weights is not None,
            do_expand=args.do_expand,
        )
        self.stages_all = context.recv_memory == "torch"
        # By columns, scales lie as far apart as there are rows.
        self.are_sides_small = (
            not args.use_tma_aligned_col_major_sf and self.num_slots * self.side_bytes <= _MAX_SPARE_SIDE_BYTES
        )
        # A tensor's own `new_empty` takes the host less time than `torch.empty`.
        self.new_x = _maker(args.x.dtype, device)
        self.new_idx = _maker(args.topk_idx.dtype, device)
        self.new_weights = _maker(torch.float32, device)
        self.new_ints = _maker(torch.int32, device)
        self.params = params = DispatchParams.__new__(DispatchParams)
        params.team, params.wait = context.team, context.wait
        params.state = context.state_address
        params.opening_offset = context.opening_offset
        params.counts_offset = context.counts_offset
        params.arrivals_offset = context.arrivals_offset
        params.counts_capacity = context.counts_capacity
        params.fans_out_at_sender = context.shares_gpu
        params.num_ranks = num_ranks
        params.num_topk, params.num_experts = args.num_topk, args.num_experts
        params.num_max_tokens, params.expert_alignment = args.num_max_tokens_per_rank, args.expert_alignment
        params.row_bytes, params.side_bytes = self.row_bytes, self.side_bytes
        params.num_sf_packs = self.num_sf_packs
        params.do_expand, params.do_zero_padding = args.do_expand, args.do_zero_padding
        self.told = params.opening.told
        self.agreed = AgreedValues(params.opening, agreed_by_dispatch(args), handle_name=HANDLE_NAME)

    def launch_of(self, parts: KernelParts) -> PartsLaunch:
        """The kernel that does these parts; compiled the first time."""
        found = self._launches.get(parts)
        return found if found is not None else self._make_launch(parts)

    def _make_launch(self, parts: KernelParts) -> PartsLaunch:
        is_idx64, num_sms = self.idx_dtype == torch.int64, self._num_sms
        stages = row_stages(self.row_bytes, plan_columns=self.num_columns if parts.has_plan else 0)

        def make() -> tuple[KernelSpec, LaunchShape]:
            config = DispatchConfig(
                has_plan=parts.has_plan, has_place=parts.has_place, has_receive=parts.has_receive, is_idx64=is_idx64
            )
            return dispatch_spec(config), dispatch_launch_shape(num_sms=num_sms, stages=stages)

        launch = self._launches[parts] = PartsLaunch(
            run=self._context.launch((*parts, is_idx64, num_sms, stages), make),
            num_stages=stages.num_stages,
            piece_bytes=stages.piece_bytes,
            offset=stages.offset,
        )
        return launch


def _maker(dtype: torch.dtype, device: torch.device) -> Callable[..., torch.Tensor]:
    new_empty: Callable[..., torch.Tensor] = torch.empty(0, dtype=dtype, device=device).new_empty
    return new_empty
