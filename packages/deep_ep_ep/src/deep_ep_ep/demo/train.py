"""Owns the training loop: the sharded run and the unsharded one, step by step on the same data.

It judges and prints nothing: `agreement` compares the runs, `progress` and `picture` show them.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial

import torch
import torch.distributed as dist
from torch import Tensor

from deep_ep_core.errors import ConfigError
from deep_ep_ep import ElasticBuffer
from deep_ep_ep.demo.model import AllExpertsHere, ModelConfig, Output, Transformer
from deep_ep_ep.demo.sharded import ExpertsAcrossRanks, GradientSum, gather_parameters, gather_tokens, keep_own_experts
from deep_ep_ep.demo.text import Corpus

__all__ = ["Run", "Runs", "StepReport", "TrainConfig", "train"]


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainConfig:
    """How to train.

    Attributes:
        model: Sizes of the model.
        num_steps: Optimiser steps.
        num_sequences: Sequences of a batch, over all ranks.
        learning_rate: Its peak; it rises over `num_warmup_steps`, then falls linearly to a tenth.
        num_warmup_steps: See `learning_rate`.
        balance_weight: Weight of the load-balancing loss.
        num_held_out_looks: How often the held-out text is looked at after the start.
        seed: Decides the initial parameters and the order of the data.
    """

    model: ModelConfig = field(default_factory=ModelConfig)
    num_steps: int = 150
    num_sequences: int = 32
    learning_rate: float = 6e-3
    num_warmup_steps: int = 10
    balance_weight: float = 0.02
    num_held_out_looks: int = 6
    seed: int = 0

    def __post_init__(self) -> None:
        if self.num_steps < 1:
            raise ConfigError(f"num_steps must be at least 1 (got {self.num_steps})")

    def check_ranks(self, num_ranks: int) -> None:
        """Raise `ConfigError` unless experts and batch can be shared out evenly."""
        for name, count in (("experts", self.model.num_experts), ("sequences of a batch", self.num_sequences)):
            if num_ranks < 1 or count % num_ranks:
                raise ConfigError(
                    f"the number of ranks must divide the {count} {name} (got {num_ranks} ranks); take 1, 2, 4, 8 or 16"
                )

    def learning_rate_at(self, step: int) -> float:
        """The learning rate of a step, counted from 0."""
        rise = (step + 1) / self.num_warmup_steps
        return self.learning_rate * min(rise, 1.0 - 0.9 * step / self.num_steps)

    def is_look_due(self, num_done: int) -> bool:
        """Whether the held-out text is looked at after so many steps."""
        every = max(1, self.num_steps // self.num_held_out_looks)
        return num_done % every == 0 or num_done == self.num_steps


@dataclass(slots=True, kw_only=True, eq=False)
class Run:
    """What one of the two runs did.

    Attributes:
        losses: Training loss of each step, over the whole batch, in nats a byte.
        dense_gradient_norms: Norm of the gradient of all parameters but the experts', for each step.
        expert_gradient_norms: Norm of the gradient of all experts of all ranks, for each step.
        held_out_losses: Loss on the held-out text, by number of steps done.
        loads: For each step `[num_layers, num_experts]` int64: tokens that went to each expert.
        num_settled_ties: Tokens, over all steps, whose near tie was settled as in the other run.
        train_s: Seconds spent in training steps.
        parameters: The final parameters by name, experts of all ranks side by side, on the CPU.
        expert_names: The names among them that are experts.
    """

    losses: list[float] = field(default_factory=list)
    dense_gradient_norms: list[float] = field(default_factory=list)
    expert_gradient_norms: list[float] = field(default_factory=list)
    held_out_losses: dict[int, float] = field(default_factory=dict)
    loads: list[Tensor] = field(default_factory=list)
    num_settled_ties: int = 0
    train_s: float = 0.0
    parameters: dict[str, Tensor] = field(default_factory=dict)
    expert_names: frozenset[str] = frozenset()


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Runs:
    """Both runs, as rank 0 has them.

    Attributes:
        config: How both were trained.
        num_ranks: Ranks of the sharded run.
        backend: Backend of its buffer.
        sharded: The sharded run.
        unsharded: The other.
    """

    config: TrainConfig
    num_ranks: int
    backend: str
    sharded: Run
    unsharded: Run

    def tokens_per_s(self, run: Run) -> float:
        """Tokens of the whole batch that a run trained on in a second."""
        return len(run.losses) * self.config.num_sequences * self.config.model.context / run.train_s


@dataclass(frozen=True, slots=True, kw_only=True)
class StepReport:
    """Where the training stands after a step.

    Attributes:
        step: Steps done.
        num_steps: Steps in all.
        loss: Loss of the sharded run.
        unsharded_loss: Loss of the unsharded run.
        tokens_per_s: Of the sharded run, over all ranks, so far.
        unsharded_tokens_per_s: Of the unsharded run.
        max_load: Load of the busiest expert of a layer in units of an equal share.
    """

    step: int
    num_steps: int
    loss: float
    unsharded_loss: float
    tokens_per_s: float
    unsharded_tokens_per_s: float
    max_load: float


class _Trainer:
    """One run: a model, its optimiser and what they did so far.

    Args:
        model: The whole model, or this rank's part of it.
        config: How to train.
        group: The ranks that share the model and the batch, or None.
    """

    def __init__(self, model: Transformer, config: TrainConfig, group: dist.ProcessGroup | None) -> None:
        self.run = Run()
        self._model = model
        self._config = config
        self._group = group
        self._num_shares = 1 if group is None else dist.get_world_size(group)
        self._optimizer = torch.optim.AdamW(model.parameters(), lr=config.learning_rate, betas=(0.9, 0.95))

    def step(self, windows: Tensor, tie_breaker: Tensor | None = None) -> Tensor:
        """Train on this process's part of a batch.

        Args:
            windows: `[batch, context + 1]` int64.
            tie_breaker: What the other run's step on the same batch returned, or None.

        Returns:
            The chosen experts of the whole batch, `[num_layers, num_tokens, num_topk]`.

        Collective: yes, with a group.
        """
        start_s = time.perf_counter()
        for settings in self._optimizer.param_groups:
            settings["lr"] = self._config.learning_rate_at(len(self.run.losses))
        self._optimizer.zero_grad()
        output: Output = self._model(windows, tie_breaker)
        # A rank's loss is its share of the whole batch's mean. Gradients then add up to those of that mean: the
        # experts' in the backward pass of dispatch and combine, the others by an all-reduce.
        loss = output.loss / self._num_shares
        balance_loss = output.balance_loss / self._num_shares
        torch.autograd.backward(loss + self._config.balance_weight * balance_loss)
        total = GradientSum.of(self._model, loss.detach(), self._group)
        self._optimizer.step()
        self.run.losses.append(total.loss)
        # `total` is on the host, so the device has done its work up to the optimiser.
        self.run.train_s += time.perf_counter() - start_s
        self.run.dense_gradient_norms.append(total.dense_norm)
        self.run.expert_gradient_norms.append(total.expert_norm)
        self.run.loads.append(output.load.cpu())
        self.run.num_settled_ties += output.num_settled_ties
        return gather_tokens(output.topk_idx, self._group)

    @torch.no_grad()
    def look_at_held_out(self, windows: Tensor, tie_breaker: Tensor | None = None) -> Tensor:
        """Measure the loss on this process's part of the held-out text; otherwise as `step`."""
        output: Output = self._model(windows, tie_breaker)
        loss = output.loss / self._num_shares
        if self._group is not None:
            dist.all_reduce(loss, group=self._group)
        self.run.held_out_losses[len(self.run.losses)] = loss.item()
        return gather_tokens(output.topk_idx, self._group)

    def finish(self) -> Run:
        """The run with its final parameters. Collective: yes, with a group."""
        parameters, self.run.expert_names = gather_parameters(self._model, self._group)
        self.run.parameters = {name: parameter.cpu() for name, parameter in parameters.items()}
        return self.run


def train(
    config: TrainConfig, corpus: Corpus, *, device: torch.device, on_step: Callable[[StepReport], None]
) -> Runs | None:
    """Train the model twice at once, with its experts on the ranks of the default group, and whole on rank 0.

    Args:
        config: How to train.
        corpus: The text, the same on every rank.
        device: Where to train.
        on_step: Called on rank 0 after each step.

    Returns:
        Both runs on rank 0, None on the others.

    Raises:
        ConfigError: Experts or batch cannot be shared out evenly.

    Collective: yes.
    """
    group = dist.group.WORLD
    assert group is not None
    rank, num_ranks = dist.get_rank(), dist.get_world_size()
    config.check_ranks(num_ranks)
    num_own = config.num_sequences // num_ranks
    own = slice(rank * num_own, (rank + 1) * num_own)
    # The buffer's sizes count elements of two bytes, and the model's rows are float32.
    buffer = ElasticBuffer(
        group,
        num_max_tokens_per_rank=num_own * config.model.context,
        hidden=2 * config.model.hidden,
        num_topk=config.model.num_topk,
    )
    assert buffer.runtime is not None
    both = partial(Runs, config=config, num_ranks=num_ranks, backend=buffer.runtime.name)
    with buffer:
        placement = ExpertsAcrossRanks(buffer, num_experts=config.model.num_experts)
        model = Transformer(config.model, placement, seed=config.seed)
        keep_own_experts(model, rank=rank, num_ranks=num_ranks)
        sharded = _Trainer(model.to(device), config, group)
        unsharded = None
        if rank == 0:
            unsharded = _Trainer(Transformer(config.model, AllExpertsHere(), seed=config.seed).to(device), config, None)
        held_out = _spread_windows(corpus.held_out, config).to(device)
        batches = _draw_batches(corpus.train, config)
        for num_done in range(config.num_steps + 1):
            if config.is_look_due(num_done):
                choices = sharded.look_at_held_out(held_out[own])
                if unsharded is not None:
                    unsharded.look_at_held_out(held_out, choices)
            if num_done == config.num_steps:
                break
            batch = next(batches).to(device)
            # Rank 0 comes late, from the unsharded step; the clock must not run while the others wait.
            dist.barrier()
            choices = sharded.step(batch[own])
            if unsharded is not None:
                unsharded.step(batch, choices)
                on_step(_report(both(sharded=sharded.run, unsharded=unsharded.run)))
        sharded_run = sharded.finish()
    if unsharded is None:
        return None
    return both(sharded=sharded_run, unsharded=unsharded.finish())


def _draw_batches(text: Tensor, config: TrainConfig) -> Iterator[Tensor]:
    """Random windows `[num_sequences, context + 1]`, the same on every rank."""
    generator = torch.Generator().manual_seed(config.seed)
    while True:
        starts = torch.randint(len(text) - config.model.context, (config.num_sequences,), generator=generator)
        yield _windows(text, starts, config)


def _spread_windows(text: Tensor, config: TrainConfig) -> Tensor:
    """Windows at even distances, as many as a batch has."""
    starts = torch.arange(config.num_sequences) * ((len(text) - config.model.context) // config.num_sequences)
    return _windows(text, starts, config)


def _windows(text: Tensor, starts: Tensor, config: TrainConfig) -> Tensor:
    return text[starts.unsqueeze(1) + torch.arange(config.model.context + 1)].long()


def _report(runs: Runs) -> StepReport:
    load = runs.sharded.loads[-1].double()
    return StepReport(
        step=len(runs.sharded.losses),
        num_steps=runs.config.num_steps,
        loss=runs.sharded.losses[-1],
        unsharded_loss=runs.unsharded.losses[-1],
        tokens_per_s=runs.tokens_per_s(runs.sharded),
        unsharded_tokens_per_s=runs.tokens_per_s(runs.unsharded),
        max_load=(load / load.mean(dim=1, keepdim=True)).max().item(),
    )
