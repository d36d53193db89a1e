"""Owns the network: a small byte-level transformer whose MLPs are mixture-of-experts layers.

It does not know about ranks. Where the experts live and how tokens reach them is an `ExpertPlacement`; the one here
has all experts in this process and uses plain torch. `sharded` has the other.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

__all__ = [
    "TIE_PROBABILITY",
    "AllExpertsHere",
    "ExpertPlacement",
    "Experts",
    "LayerOutput",
    "MoELayer",
    "ModelConfig",
    "Output",
    "Transformer",
    "choose_experts",
]

# Router probabilities closer than this are a near tie: rounding alone may decide it either way.
TIE_PROBABILITY = 1e-5

_INIT_STD = 0.02


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelConfig:
    """Sizes of the model.

    Attributes:
        vocab_size: Byte values.
        context: Bytes of a sequence.
        hidden: Elements of a token.
        num_layers: Transformer blocks, each with an MoE layer.
        num_heads: Attention heads.
        num_experts: Experts of a layer.
        num_topk: Experts of a token.
        expert_hidden: Inner elements of an expert.
    """

    vocab_size: int = 256
    context: int = 64
    hidden: int = 64
    num_layers: int = 2
    num_heads: int = 4
    num_experts: int = 16
    num_topk: int = 2
    expert_hidden: int = 128


class Experts(nn.Module):
    """Some or all experts of a layer: SwiGLU MLPs with stacked parameters."""

    def __init__(self, num_experts: int, hidden: int, expert_hidden: int) -> None:
        super().__init__()
        self.up = nn.Parameter(torch.randn(num_experts, hidden, 2 * expert_hidden) * hidden**-0.5)
        self.down = nn.Parameter(torch.randn(num_experts, expert_hidden, hidden) * expert_hidden**-0.5)

    def forward(self, rows: Tensor, num_rows: Sequence[int]) -> Tensor:
        """Apply each expert to its rows.

        Args:
            rows: `[sum(num_rows), hidden]`, expert after expert.
            num_rows: Rows of each expert.

        Returns:
            `[sum(num_rows), hidden]`.
        """
        outputs = []
        # unbind, not indexing: its backward stacks the experts' gradients once.
        for part, up, down in zip(rows.split(list(num_rows)), self.up.unbind(), self.down.unbind(), strict=True):
            gate, value = (part @ up).chunk(2, dim=-1)
            outputs.append((F.silu(gate) * value) @ down)
        return torch.cat(outputs)


class ExpertPlacement(Protocol):
    """Where experts live and how tokens reach them."""

    def run(self, experts: Experts, x: Tensor, topk_idx: Tensor, topk_weights: Tensor) -> Tensor:
        """The weighted sum of each token's experts.

        Args:
            experts: The experts of this process.
            x: `[num_tokens, hidden]`.
            topk_idx: `[num_tokens, num_topk]` int64: expert ids.
            topk_weights: `[num_tokens, num_topk]`.

        Returns:
            `[num_tokens, hidden]`.
        """
        ...

    def sum_over_batch(self, counts: Tensor) -> Tensor:
        """Counts of this process's tokens, added up over the whole batch; no gradient flows."""
        ...


class AllExpertsHere:
    """Every expert and the whole batch in this process: the plain-torch reference."""

    def run(self, experts: Experts, x: Tensor, topk_idx: Tensor, topk_weights: Tensor) -> Tensor:
        """See `ExpertPlacement.run`."""
        num_topk = topk_idx.size(1)
        order = topk_idx.flatten().argsort(stable=True)
        num_rows = topk_idx.flatten().bincount(minlength=len(experts.up)).tolist()
        token_idx = order // num_topk
        rows = experts(x[token_idx], num_rows) * topk_weights.flatten()[order].unsqueeze(1)
        return torch.zeros_like(x).index_add(0, token_idx, rows)

    def sum_over_batch(self, counts: Tensor) -> Tensor:
        """See `ExpertPlacement.sum_over_batch`."""
        return counts


def choose_experts(probabilities: Tensor, num_topk: int, tie_breaker: Tensor | None) -> tuple[Tensor, int]:
    """The most probable experts of each token; near ties go the way of another run.

    Two runs that differ by rounding only would otherwise part for good at the first token whose next best expert is
    equally probable, about once in a million choices. A choice that is worse by more than `TIE_PROBABILITY` is never
    taken over.

    Args:
        probabilities: `[num_tokens, num_experts]`.
        num_topk: Experts of a token.
        tie_breaker: `[num_tokens, num_topk]` int64: what the other run chose, or None.

    Returns:
        The choices `[num_tokens, num_topk]` int64, and the number of tokens whose own choice was given up.
    """
    own = probabilities.topk(num_topk, dim=-1).indices
    if tie_breaker is None:
        return own, 0
    lost = probabilities.gather(1, own).sum(dim=1) - probabilities.gather(1, tie_breaker).sum(dim=1)
    is_taken = lost.abs() <= TIE_PROBABILITY
    is_other = (own.sort(dim=1).values != tie_breaker.sort(dim=1).values).any(dim=1)
    return torch.where(is_taken.unsqueeze(1), tie_breaker, own), int((is_taken & is_other).sum())


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class LayerOutput:
    """What an MoE layer gives.

    Attributes:
        x: `[num_tokens, hidden]`.
        balance_loss: Scalar: this process's share of the load-balancing loss, to be averaged over the ranks; 1 where
            every expert gets the same.
        load: `[num_experts]` int64: tokens of the whole batch that went to each expert.
        topk_idx: `[num_tokens, num_topk]` int64: the experts that were chosen.
        num_settled_ties: Tokens whose near tie the tie breaker decided the other way.
    """

    x: Tensor
    balance_loss: Tensor
    load: Tensor
    topk_idx: Tensor
    num_settled_ties: int


class MoELayer(nn.Module):
    """A softmax router, the experts of this process, and the way to those of the others."""

    def __init__(self, config: ModelConfig, placement: ExpertPlacement) -> None:
        super().__init__()
        self.num_topk = config.num_topk
        self.router = nn.Linear(config.hidden, config.num_experts, bias=False)
        self.experts = Experts(config.num_experts, config.hidden, config.expert_hidden)
        self._placement = placement

    def forward(self, x: Tensor, tie_breaker: Tensor | None = None) -> LayerOutput:
        """Route tokens and run their experts.

        Args:
            x: `[num_tokens, hidden]`.
            tie_breaker: See `choose_experts`.
        """
        probabilities = self.router(x).softmax(dim=-1)
        topk_idx, num_settled_ties = choose_experts(probabilities.detach(), self.num_topk, tie_breaker)
        topk_probabilities = probabilities.gather(1, topk_idx)
        topk_weights = topk_probabilities / topk_probabilities.sum(dim=-1, keepdim=True)
        num_experts = probabilities.size(1)
        load = self._placement.sum_over_batch(topk_idx.flatten().bincount(minlength=num_experts))
        # Linear in the probabilities once the load is that of the whole batch, so the ranks' mean is the loss of the
        # whole batch; with each rank's own load it would not be.
        balance_loss = num_experts * (load / load.sum() * probabilities.mean(dim=0)).sum()
        return LayerOutput(
            x=self._placement.run(self.experts, x, topk_idx, topk_weights),
            balance_loss=balance_loss,
            load=load,
            topk_idx=topk_idx,
            num_settled_ties=num_settled_ties,
        )


class Block(nn.Module):
    """Causal attention, then an MoE layer, both residual and with a norm before."""

    def __init__(self, config: ModelConfig, placement: ExpertPlacement) -> None:
        super().__init__()
        self.num_heads = config.num_heads
        self.attention_norm = nn.RMSNorm(config.hidden)
        self.qkv = nn.Linear(config.hidden, 3 * config.hidden, bias=False)
        self.attention_out = nn.Linear(config.hidden, config.hidden, bias=False)
        self.moe_norm = nn.RMSNorm(config.hidden)
        self.moe = MoELayer(config, placement)

    def forward(self, x: Tensor, tie_breaker: Tensor | None = None) -> tuple[Tensor, LayerOutput]:
        """Apply the block to `[batch, context, hidden]`; returns that, and what the MoE layer gave."""
        batch, context, hidden = x.shape
        qkv = self.qkv(self.attention_norm(x)).view(batch, context, 3, self.num_heads, -1)
        query, key, value = qkv.permute(2, 0, 3, 1, 4).unbind()
        attended = F.scaled_dot_product_attention(query, key, value, is_causal=True)
        x = x + self.attention_out(attended.transpose(1, 2).reshape(batch, context, hidden))
        output: LayerOutput = self.moe(self.moe_norm(x).view(-1, hidden), tie_breaker)
        return x + output.x.view_as(x), output


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Output:
    """What the model gives for a batch.

    Attributes:
        loss: Scalar: mean cross-entropy of this process's next bytes, in nats.
        balance_loss: Scalar: mean over the layers, see `LayerOutput`.
        load: `[num_layers, num_experts]` int64: tokens of the whole batch that went to each expert.
        topk_idx: `[num_layers, num_tokens, num_topk]` int64: the experts that were chosen.
        num_settled_ties: Sum over the layers, see `LayerOutput`.
    """

    loss: Tensor
    balance_loss: Tensor
    load: Tensor
    topk_idx: Tensor
    num_settled_ties: int


class Transformer(nn.Module):
    """The language model.

    Args:
        config: Its sizes.
        placement: Where its experts live.
        seed: Initial parameters depend on this and the sizes only.
    """

    def __init__(self, config: ModelConfig, placement: ExpertPlacement, *, seed: int) -> None:
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.embedding = nn.Embedding(config.vocab_size, config.hidden)
            self.position = nn.Parameter(torch.randn(config.context, config.hidden) * _INIT_STD)
            self.blocks = nn.ModuleList(Block(config, placement) for _ in range(config.num_layers))
            self.norm = nn.RMSNorm(config.hidden)
            self.head = nn.Linear(config.hidden, config.vocab_size, bias=False)
            nn.init.normal_(self.head.weight, std=_INIT_STD)

    def forward(self, windows: Tensor, tie_breaker: Tensor | None = None) -> Output:
        """Predict each byte of a window from those before it.

        Args:
            windows: `[batch, context + 1]` int64: byte values.
            tie_breaker: `topk_idx` of another run's output for the same windows, see `choose_experts`.
        """
        x = self.embedding(windows[:, :-1]) + self.position
        layers: list[LayerOutput] = []
        for layer, block in enumerate(self.blocks):
            x, output = block(x, None if tie_breaker is None else tie_breaker[layer])
            layers.append(output)
        logits = self.head(self.norm(x))
        loss = F.cross_entropy(logits.flatten(0, 1), windows[:, 1:].flatten())
        return Output(
            loss=loss,
            balance_loss=torch.stack([layer.balance_loss for layer in layers]).mean(),
            load=torch.stack([layer.load for layer in layers]),
            topk_idx=torch.stack([layer.topk_idx for layer in layers]),
            num_settled_ties=sum(layer.num_settled_ties for layer in layers),
        )
