"""Owns the form in which a handle passes through operators, which take and return tensors only: a list of them.

It knows no backend but by its kind of plan, which says itself what it consists of. Numbers travel in one tensor on the
CPU, so that nothing of a device is read to make a handle again.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from deep_ep_ep.device.network.plan import NetworkPlan
from deep_ep_ep.device.plan import DevicePlan
from deep_ep_ep.handle import EPHandle, Plan, PlanParts, RoutingPlan

__all__ = ["handle_from_tensors", "named_tensor", "new_handle_tensors", "tensors_of_handle"]

# The first tensors of the list; those of the plan follow.
_FIELDS = (
    "topk_idx",
    "numbers",
    "psum_num_recv_tokens_per_scaleup_rank",
    "psum_num_recv_tokens_per_expert",
    "num_unaligned_recv_tokens_per_expert",
    "recv_src_metadata",
    "dst_buffer_slot_idx",
)
# A plan's place here is the number that it travels with.
_PLAN_TYPES: tuple[type[Plan], ...] = (RoutingPlan, DevicePlan, NetworkPlan)
# Numbers at the head of "numbers"; the aligned counts of the local experts follow, then the numbers of the plan.
_NUM_HEAD_NUMBERS = 6


def tensors_of_handle(handle: EPHandle) -> list[Tensor]:
    """The list of a handle, but for its first tensor: `topk_idx`, which operators do not return."""
    fields = {name: _with_own_memory(getattr(handle, name)) for name in _FIELDS[2:]}
    parts = handle.plan.parts(fields["recv_src_metadata"])
    num_local_experts = handle.num_unaligned_recv_tokens_per_expert.numel()
    numbers = torch.tensor(
        [
            handle.num_recv_tokens,
            handle.num_expanded_tokens,
            handle.num_sms,
            handle.dispatch_idx,
            int(handle.was_cpu_synced),
            _PLAN_TYPES.index(type(handle.plan)),
            *(handle.num_recv_tokens_per_expert_list or [0] * num_local_experts),
            *parts.numbers,
        ]
    )
    return [numbers, *fields.values(), *(_with_own_memory(tensor) for tensor in parts.tensors)]


def _with_own_memory(tensor: Tensor) -> Tensor:
    """The tensor, or a copy of one that shares memory with others: what an operator returns must not."""
    has_own = tensor.untyped_storage().nbytes() == tensor.numel() * tensor.element_size()
    return tensor if has_own else tensor.clone()


def handle_from_tensors(
    tensors: Sequence[Tensor],
    *,
    buffer_id: int,
    num_experts: int,
    num_max_tokens_per_rank: int,
    expert_alignment: int,
    do_expand: bool,
) -> EPHandle:
    """The handle that a list is of: `topk_idx`, then what `tensors_of_handle` gave.

    Args:
        tensors: The list.
        buffer_id: Number of the buffer that made it.
        num_experts: As in `EPHandle`, like what follows.
        num_max_tokens_per_rank: M of the dispatch.
        expert_alignment: Each expert's rows start at a multiple of this.
        do_expand: Rows are laid out by expert.
    """
    named = dict(zip(_FIELDS, tensors[: len(_FIELDS)], strict=True))
    numbers: list[int] = named["numbers"].tolist()
    num_recv, num_expanded, num_sms, dispatch_idx, was_synced, plan_type_idx = numbers[:_NUM_HEAD_NUMBERS]
    plan_start = _NUM_HEAD_NUMBERS + named["num_unaligned_recv_tokens_per_expert"].numel()
    parts = PlanParts(tensors=list(tensors[len(_FIELDS) :]), numbers=numbers[plan_start:])
    return EPHandle(
        do_expand=do_expand,
        num_experts=num_experts,
        expert_alignment=expert_alignment,
        num_max_tokens_per_rank=num_max_tokens_per_rank,
        num_sms=num_sms,
        topk_idx=named["topk_idx"],
        num_recv_tokens=num_recv,
        num_expanded_tokens=num_expanded,
        num_recv_tokens_per_expert_list=numbers[_NUM_HEAD_NUMBERS:plan_start] if was_synced else [],
        psum_num_recv_tokens_per_scaleup_rank=named["psum_num_recv_tokens_per_scaleup_rank"],
        psum_num_recv_tokens_per_expert=named["psum_num_recv_tokens_per_expert"],
        num_unaligned_recv_tokens_per_expert=named["num_unaligned_recv_tokens_per_expert"],
        recv_src_metadata=named["recv_src_metadata"],
        dst_buffer_slot_idx=named["dst_buffer_slot_idx"],
        plan=_PLAN_TYPES[plan_type_idx].of_parts(parts, named["recv_src_metadata"]),
        buffer_id=buffer_id,
        dispatch_idx=dispatch_idx,
    )


def new_handle_tensors(
    plan_type: type[Plan],
    topk_idx: Tensor,
    *,
    num_ranks: int,
    num_scaleup_ranks: int,
    num_local_experts: int,
    num_recv: int,
    do_expand: bool,
    new_size: Callable[[], int],
) -> list[Tensor]:
    """Tensors like those of `tensors_of_handle`, their values undefined, for the tracing of operators.

    Args:
        plan_type: The plan that the dispatch would make.
        topk_idx: `[num_tokens, num_topk]`.
        num_ranks: Ranks of the buffer.
        num_scaleup_ranks: Of its logical scale-up domain.
        num_local_experts: Experts of this rank.
        num_recv: Rows of the metadata.
        do_expand: Rows are laid out by expert.
        new_size: Gives a size that only data decide.
    """
    num_topk = topk_idx.size(1)
    parts = plan_type.new_parts(topk_idx, num_ranks=num_ranks, do_expand=do_expand, new_size=new_size)

    def ints(*shape: int) -> Tensor:
        return topk_idx.new_empty(shape, dtype=torch.int32)

    return [
        torch.empty(_NUM_HEAD_NUMBERS + num_local_experts + len(parts.numbers), dtype=torch.int64),
        ints(num_scaleup_ranks),
        ints(num_local_experts),
        ints(num_local_experts),
        ints(num_recv, num_topk + 2),
        ints(topk_idx.size(0), num_topk),
        *parts.tensors,
    ]


def named_tensor(tensors: Sequence[Tensor], name: str) -> Tensor:
    """The tensor of a handle's field in the list that begins with `topk_idx`."""
    return tensors[_FIELDS.index(name)]
