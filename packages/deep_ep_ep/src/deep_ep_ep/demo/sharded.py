"""Owns what makes the model parallel: experts on their ranks, tokens sent to them, gradients brought together.

It does not train. This is the file to read for using `deep_ep_ep` in a model of your own.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor, nn

from deep_ep_ep import ElasticBuffer, autograd
from deep_ep_ep.demo.model import Experts

__all__ = ["ExpertsAcrossRanks", "GradientSum", "gather_parameters", "gather_tokens", "keep_own_experts"]


class ExpertsAcrossRanks:
    """Each rank has an equal, consecutive share of the experts, and a slice of the batch.

    Args:
        buffer: A buffer large enough for a rank's tokens.
        num_experts: Experts of all ranks.
    """

    def __init__(self, buffer: ElasticBuffer, *, num_experts: int) -> None:
        self._buffer = buffer
        self._num_experts = num_experts

    def run(self, experts: Experts, x: Tensor, topk_idx: Tensor, topk_weights: Tensor) -> Tensor:
        """See `ExpertPlacement.run`. Collective: yes, and so is its backward pass."""
        dispatched = autograd.dispatch(
            self._buffer, x, topk_idx, topk_weights, num_experts=self._num_experts, do_expand=True
        )
        assert dispatched.recv_topk_weights is not None
        rows = experts(dispatched.recv_x, dispatched.handle.num_recv_tokens_per_expert_list)
        weighted = rows * dispatched.recv_topk_weights.unsqueeze(1)
        return autograd.combine(self._buffer, weighted, dispatched.handle).x

    def sum_over_batch(self, counts: Tensor) -> Tensor:
        """See `ExpertPlacement.sum_over_batch`. Collective: yes."""
        total = counts.clone()
        dist.all_reduce(total, group=self._buffer.group)
        return total


def keep_own_experts(model: nn.Module, *, rank: int, num_ranks: int) -> None:
    """Drop the parameters of all experts but this rank's. Collective: no."""
    for module in model.modules():
        if isinstance(module, Experts):
            for name, parameter in list(module.named_parameters()):
                num_own = len(parameter) // num_ranks
                own = parameter.detach()[rank * num_own : (rank + 1) * num_own].clone()
                setattr(module, name, nn.Parameter(own))


def gather_parameters(model: nn.Module, group: dist.ProcessGroup | None) -> tuple[dict[str, Tensor], frozenset[str]]:
    """All parameters by name, with the experts of every rank side by side, as in the unsharded model.

    Args:
        model: The whole model, or this rank's part of it.
        group: The ranks that share it, or None.

    Returns:
        The parameters, and the names among them that are experts.

    Collective: yes, with a group.
    """
    expert_names = _expert_names(model)
    gathered = {}
    for name, parameter in model.named_parameters():
        tensor = parameter.detach()
        if group is not None and name in expert_names:
            parts = [torch.empty_like(tensor) for _ in range(dist.get_world_size(group))]
            dist.all_gather(parts, tensor, group=group)
            tensor = torch.cat(parts)
        gathered[name] = tensor
    return gathered, expert_names


def gather_tokens(values: Tensor, group: dist.ProcessGroup | None) -> Tensor:
    """Values of every rank's tokens, in batch order.

    Args:
        values: `[num_layers, num_tokens, n]`: those of this rank.
        group: The ranks that share the batch, or None.

    Returns:
        `[num_layers, num_ranks * num_tokens, n]`.

    Collective: yes, with a group.
    """
    if group is None:
        return values
    parts = [torch.empty_like(values) for _ in range(dist.get_world_size(group))]
    dist.all_gather(parts, values, group=group)
    return torch.cat(parts, dim=1)


@dataclass(frozen=True, slots=True, kw_only=True)
class GradientSum:
    """What the ranks' gradients came to.

    Attributes:
        loss: Sum of the ranks' losses.
        dense_norm: Norm of the gradient of all parameters but the experts'.
        expert_norm: Norm of the gradient of all experts of all ranks.
    """

    loss: float
    dense_norm: float
    expert_norm: float

    @classmethod
    def of(cls, model: nn.Module, loss: Tensor, group: dist.ProcessGroup | None) -> GradientSum:
        """Add up the dense gradients over the ranks, in place.

        An expert's gradient needs no sum: the backward pass of the dispatch brought every rank's part to it.

        Args:
            model: The whole model, or this rank's part of it, after its backward pass.
            loss: This rank's share of the loss, a scalar.
            group: The ranks that share it, or None.

        Collective: yes, one all-reduce, with a group.
        """
        expert_names = _expert_names(model)
        dense: list[Tensor] = []
        experts: list[Tensor] = []
        for name, parameter in model.named_parameters():
            assert parameter.grad is not None, name
            (experts if name in expert_names else dense).append(parameter.grad)
        expert_square = torch.cat([gradient.flatten() for gradient in experts]).square().sum()
        sizes = [gradient.numel() for gradient in dense]
        flat = torch.cat([*(gradient.flatten() for gradient in dense), torch.stack([loss, expert_square])])
        if group is not None:
            dist.all_reduce(flat, group=group)
            for gradient, summed in zip(dense, flat[:-2].split(sizes), strict=True):
                gradient.copy_(summed.view_as(gradient))
        dense_norm = flat[:-2].norm().item()
        return cls(loss=flat[-2].item(), dense_norm=dense_norm, expert_norm=flat[-1].sqrt().item())


def _expert_names(model: nn.Module) -> frozenset[str]:
    return frozenset(
        f"{prefix}.{name}"
        for prefix, module in model.named_modules()
        if isinstance(module, Experts)
        for name, _ in module.named_parameters()
    )
