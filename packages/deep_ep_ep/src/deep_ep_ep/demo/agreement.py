"""Owns the judgement whether the sharded and the unsharded run agree, and its words.

It trains nothing. The tolerances are for float32 sums in different orders; the guide "The demo" says what was measured.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

from deep_ep_ep.demo.train import Run

__all__ = ["Agreement", "Comparison", "Tolerances", "compare"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Tolerances:
    """The largest relative differences that count as agreement.

    Attributes:
        loss: Of the training loss of each step, and of each held-out loss.
        gradient_norm: Of the norms of each step's gradients.
        parameters: Norm of the difference over the norm, for each parameter tensor.
    """

    loss: float = 1e-5
    gradient_norm: float = 1e-3
    parameters: float = 1e-4


@dataclass(frozen=True, slots=True, kw_only=True)
class Comparison:
    """One quantity of both runs, where it differs most.

    Attributes:
        name: What was compared.
        worst: The largest relative difference; infinite when a value is not finite.
        where: Where that is, and the values.
        allowed: The tolerance.
    """

    name: str
    worst: float
    where: str
    allowed: float

    @property
    def is_within(self) -> bool:
        """Whether the difference is allowed."""
        return self.worst <= self.allowed

    def __str__(self) -> str:
        return f"{self.name}: differs by {self.worst:.1e} at {self.where}; at most {self.allowed:.0e} is allowed"


@dataclass(frozen=True, slots=True, kw_only=True)
class Agreement:
    """All comparisons of two runs.

    Attributes:
        comparisons: One for each quantity.
        num_moved: Routing choices that differ at least: the difference of the experts' loads, over all steps.
        num_settled_ties: Near ties that the unsharded run settled as the sharded one had.
        num_choices: Routing choices of each run.
    """

    comparisons: tuple[Comparison, ...]
    num_moved: int
    num_settled_ties: int
    num_choices: int

    @property
    def disagreements(self) -> list[Comparison]:
        """The comparisons that are not within their tolerance."""
        return [comparison for comparison in self.comparisons if not comparison.is_within]


def compare(sharded: Run, unsharded: Run, tolerances: Tolerances | None = None) -> Agreement:
    """Compare two runs over the same steps.

    Differences of the routing are counted but not judged: losses and gradients show what they come to.

    Args:
        sharded: The run over the ranks.
        unsharded: The run in one process.
        tolerances: None takes the defaults.
    """
    allowed = tolerances or Tolerances()
    steps = [f"step {step}" for step in range(1, len(unsharded.losses) + 1)]
    looks = [f"step {step}" for step in unsharded.held_out_losses]
    held_out = [[run.held_out_losses[step] for step in unsharded.held_out_losses] for run in (sharded, unsharded)]
    comparisons = [
        _compare_values("training loss", steps, sharded.losses, unsharded.losses, allowed.loss),
        _compare_values("held-out loss", looks, held_out[0], held_out[1], allowed.loss),
        _compare_values(
            "gradient norm, dense",
            steps,
            sharded.dense_gradient_norms,
            unsharded.dense_gradient_norms,
            allowed.gradient_norm,
        ),
        _compare_values(
            "gradient norm, experts",
            steps,
            sharded.expert_gradient_norms,
            unsharded.expert_gradient_norms,
            allowed.gradient_norm,
        ),
        _compare_parameters("parameters, dense", sharded, unsharded, False, allowed.parameters),
        _compare_parameters("parameters, experts", sharded, unsharded, True, allowed.parameters),
    ]
    pairs = list(zip(sharded.loads, unsharded.loads, strict=True))
    return Agreement(
        comparisons=tuple(comparisons),
        num_moved=sum(int((one - other).abs().sum()) // 2 for one, other in pairs),
        num_settled_ties=unsharded.num_settled_ties,
        num_choices=sum(int(other.sum()) for _, other in pairs),
    )


def _compare_values(
    name: str, places: Iterable[str], sharded: Iterable[float], unsharded: Iterable[float], allowed: float
) -> Comparison:
    differences = [
        (_relative(abs(one - other), abs(other)), f"{place} (sharded {one:.6g}, unsharded {other:.6g})")
        for place, one, other in zip(places, sharded, unsharded, strict=True)
    ]
    worst, where = max(differences, key=lambda difference: difference[0])
    return Comparison(name=name, worst=worst, where=where, allowed=allowed)


def _compare_parameters(name: str, sharded: Run, unsharded: Run, is_expert: bool, allowed: float) -> Comparison:
    assert sharded.parameters.keys() == unsharded.parameters.keys()
    differences = []
    for key, other in unsharded.parameters.items():
        if (key in unsharded.expert_names) == is_expert:
            difference = (sharded.parameters[key] - other).norm().item()
            differences.append((_relative(difference, other.norm().item()), key))
    worst, where = max(differences)
    return Comparison(name=name, worst=worst, where=where, allowed=allowed)


def _relative(difference: float, size: float) -> float:
    """The relative difference, infinite instead of NaN so that it can be ranked and is never within a tolerance."""
    if difference == 0:
        return 0.0
    relative = difference / size if size > 0 else math.inf
    return relative if math.isfinite(relative) else math.inf
