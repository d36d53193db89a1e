"""Owns causal attention twice: over a whole sequence, and over a sequence of which each rank holds a part.

Each rank computes the outputs of its own tokens, and asks the others for their keys and values. What is compared, and
how, is here too; the command line is in `__main__`.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

import deep_ep_cp
from deep_ep_cp import ContextBuffer

__all__ = ["AttentionConfig", "attend", "compare", "split_attention", "unsplit_attention"]

GatherTokens = Callable[[list[Tensor]], tuple[Tensor, ...]]


@dataclass(frozen=True, slots=True, kw_only=True)
class AttentionConfig:
    """Sizes of the demo.

    Attributes:
        num_tokens: Length of the whole sequence.
        num_heads: Attention heads.
        head_dim: Elements of a head.
        seed: Seed of weights and inputs.
    """

    num_tokens: int = 512
    num_heads: int = 4
    head_dim: int = 32
    seed: int = 0

    @property
    def hidden(self) -> int:
        """Elements of a token."""
        return self.num_heads * self.head_dim


def attend(query: Tensor, key: Tensor, value: Tensor, *, first_token: int) -> Tensor:
    """Causal attention of some tokens of a sequence over all of it.

    Args:
        query: `[num_queries, num_heads, head_dim]`: consecutive tokens.
        key: `[num_tokens, num_heads, head_dim]`.
        value: As `key`.
        first_token: Position of the first query in the sequence.

    Returns:
        `[num_queries, num_heads, head_dim]`.
    """
    scores = torch.einsum("qhd,khd->hqk", query, key) / math.sqrt(query.size(-1))
    position = torch.arange(first_token, first_token + len(query)).unsqueeze(1)
    is_later = torch.arange(len(key)) > position
    return torch.einsum("hqk,khd->qhd", scores.masked_fill(is_later, -math.inf).softmax(-1), value)


def unsplit_attention(x: Tensor, weights: Tensor, *, num_heads: int) -> Tensor:
    """Attention with its projections, in one process.

    Args:
        x: `[num_tokens, hidden]`.
        weights: `[3, hidden, hidden]`: for queries, keys and values.
        num_heads: Attention heads.

    Returns:
        `[num_tokens, hidden]`.
    """
    query, key, value = (x @ weights).unflatten(-1, (num_heads, -1))
    return attend(query, key, value, first_token=0).flatten(1)


def split_attention(gather: GatherTokens, x: Tensor, weights: Tensor, *, num_heads: int, rank: int) -> Tensor:
    """The same for this rank's tokens. All ranks have equally many, in rank order.

    Args:
        gather: Gives every rank the tensors of all ranks, `[num_ranks, *shape]`.
        x: `[num_tokens / num_ranks, hidden]`.
        weights: As in `unsplit_attention`; the same on every rank.
        num_heads: Attention heads.
        rank: This rank.

    Returns:
        `[num_tokens / num_ranks, hidden]`.
    """
    query, key, value = (x @ weights).unflatten(-1, (num_heads, -1))
    all_keys, all_values = gather([key, value])
    return attend(query, all_keys.flatten(0, 1), all_values.flatten(0, 1), first_token=rank * len(x)).flatten(1)


def compare(config: AttentionConfig, gather: GatherTokens | None = None) -> dict[str, float]:
    """Run both, forward and backward, in float64; every rank runs the unsplit one whole.

    Args:
        config: The sizes; the ranks of the default group must divide `num_tokens`.
        gather: How keys and values are gathered; None takes `deep_ep_cp.all_gather`.

    Returns:
        The largest difference of any rank, relative to the largest value of what is compared: of outputs, of gradients
        of the inputs and of the weights.

    Collective: yes.
    """
    rank, num_ranks = dist.get_rank(), dist.get_world_size()
    num_local, hidden = config.num_tokens // num_ranks, config.hidden
    generator = torch.Generator().manual_seed(config.seed)
    x = torch.randn(config.num_tokens, hidden, generator=generator, dtype=torch.float64)
    weights = torch.randn(3, hidden, hidden, generator=generator, dtype=torch.float64) / math.sqrt(hidden)
    target = torch.randn(config.num_tokens, hidden, generator=generator, dtype=torch.float64)
    mine = slice(rank * num_local, (rank + 1) * num_local)

    whole_x, whole_weights = x.clone().requires_grad_(), weights.clone().requires_grad_()
    whole_y = unsplit_attention(whole_x, whole_weights, num_heads=config.num_heads)
    ((whole_y - target) ** 2).sum().backward()

    part_x, part_weights = x[mine].clone().requires_grad_(), weights.clone().requires_grad_()
    slot = (num_local, config.num_heads, config.head_dim)
    session_bytes = ContextBuffer.get_agrs_num_max_session_bytes(None, [slot, slot], torch.float64)
    with ContextBuffer(None, ContextBuffer.get_agrs_buffer_size_hint(None, session_bytes), device="cpu") as buffer:
        buffer.agrs_set_config(session_bytes, 1)
        part_y = split_attention(
            gather if gather is not None else lambda tensors: deep_ep_cp.all_gather(buffer, tensors),
            part_x,
            part_weights,
            num_heads=config.num_heads,
            rank=rank,
        )
        # Each rank has the loss of its own tokens. The backward pass brings the gradients of keys and values home.
        ((part_y - target[mine]) ** 2).sum().backward()
    assert part_x.grad is not None
    assert part_weights.grad is not None
    assert whole_x.grad is not None
    assert whole_weights.grad is not None
    # Weights that every rank has: their gradients are summed, as in data parallelism.
    dist.all_reduce(part_weights.grad)

    pairs = {
        "output": (part_y, whole_y[mine]),
        "gradient of the input": (part_x.grad, whole_x.grad[mine]),
        "gradient of the weights": (part_weights.grad, whole_weights.grad),
    }
    differences = torch.stack(
        [((one - other).abs().max() / other.abs().max()).detach() for one, other in pairs.values()]
    )
    dist.all_reduce(differences, op=dist.ReduceOp.MAX)
    return dict(zip(pairs, differences.tolist(), strict=True))
