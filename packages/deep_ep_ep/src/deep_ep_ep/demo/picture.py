"""Owns the picture of a demo: the loss of both runs with their difference, and the load of each expert."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import torch

from deep_ep_ep.demo.agreement import Tolerances
from deep_ep_ep.demo.train import Run, Runs

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = ["NUM_LOAD_STEPS", "draw", "expert_shares"]

# Loads are those of the last steps: a single step is noise, and all steps would show the untrained router.
NUM_LOAD_STEPS = 20

_SHARDED = "#1f4e79"
_UNSHARDED = "#f2a65a"
_DIFFERENCE = "#7f7f7f"
# Relative differences below this, zero included, are drawn at it: a logarithmic axis has no zero.
_FLOOR = 1e-8


def expert_shares(run: Run) -> list[list[float]]:
    """For each layer, the percentage of the routed tokens that each expert got over the last steps."""
    load = torch.stack(run.loads[-NUM_LOAD_STEPS:]).sum(dim=0).double()
    shares: list[list[float]] = (100 * load / load.sum(dim=1, keepdim=True)).tolist()
    return shares


def draw(runs: Runs, tolerances: Tolerances, path: Path) -> None:
    """Write the picture as PNG."""
    # Figure instead of pyplot: no window system is looked for, no state is left behind.
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 8.5), dpi=120, layout="constrained")
    top, bottom = figure.subplots(2, 1, height_ratios=[1.2, 1])
    _draw_losses(top, runs, tolerances)
    _draw_loads(bottom, runs)
    figure.savefig(path, format="png")


def _draw_losses(axes: Axes, runs: Runs, tolerances: Tolerances) -> None:
    steps = range(1, len(runs.sharded.losses) + 1)
    ranks = "1 rank" if runs.num_ranks == 1 else f"{runs.num_ranks} ranks"
    axes.plot(steps, runs.unsharded.losses, color=_UNSHARDED, linewidth=5, label="unsharded, training")
    axes.plot(steps, runs.sharded.losses, color=_SHARDED, linewidth=1.4, label=f"sharded over {ranks}, training")
    for run, marker, size, color, label in (
        (runs.unsharded, "o", 9, _UNSHARDED, "unsharded, held-out text"),
        (runs.sharded, "x", 6, _SHARDED, f"sharded over {ranks}, held-out text"),
    ):
        looks = run.held_out_losses
        axes.plot(list(looks), list(looks.values()), marker, markersize=size, color=color, label=label)
    axes.set(title="Loss of both runs, step by step", xlabel="optimiser step", ylabel="loss (nats a byte)")
    axes.grid(alpha=0.3)
    axes.margins(x=0.02)

    # Room for the differences below the curves.
    lowest, highest = axes.get_ylim()
    axes.set_ylim(lowest - 0.7 * (highest - lowest), highest)
    axes.set_yticks([tick for tick in axes.get_yticks() if lowest <= tick <= highest])

    right = axes.twinx()
    pairs = zip(runs.sharded.losses, runs.unsharded.losses, strict=True)
    differences = [max(abs(one - other) / other, _FLOOR) for one, other in pairs]
    right.semilogy(steps, differences, ".", markersize=4, color=_DIFFERENCE, label="difference of the training losses")
    right.axhline(tolerances.loss, color=_DIFFERENCE, linewidth=1, linestyle="--", label="largest difference allowed")
    right.set_ylabel(f"relative difference (zero is drawn at {_FLOOR:.0e})", color=_DIFFERENCE, loc="bottom")
    right.tick_params(axis="y", colors=_DIFFERENCE)
    # A log axis high enough that the tolerance lies below the curves; larger differences reach into them.
    right.set_ylim(_FLOOR / 2, tolerances.loss * 1e6)
    right.set_yticks([10.0**power for power in range(-8, 1)])
    right.minorticks_off()
    handles, labels = axes.get_legend_handles_labels()
    more_handles, more_labels = right.get_legend_handles_labels()
    right.legend(handles + more_handles, labels + more_labels, loc="upper right", framealpha=0.9)


def _draw_loads(axes: Axes, runs: Runs) -> None:
    num_experts = runs.config.model.num_experts
    num_own = num_experts // runs.num_ranks
    width = 0.38
    ticks, names = [], []
    sharded, unsharded = expert_shares(runs.sharded), expert_shares(runs.unsharded)
    top = 1.25 * max(share for shares in (*sharded, *unsharded) for share in shares)
    for layer in range(runs.config.model.num_layers):
        start = layer * (num_experts + 1.5)
        positions = [start + expert for expert in range(num_experts)]
        is_first = layer == 0
        axes.bar(
            [position - width / 2 for position in positions],
            unsharded[layer],
            width,
            color=_UNSHARDED,
            zorder=2,
            label="unsharded" if is_first else None,
        )
        axes.bar(
            [position + width / 2 for position in positions],
            sharded[layer],
            width,
            color=_SHARDED,
            zorder=2,
            label="sharded" if is_first else None,
        )
        for rank in range(runs.num_ranks):
            left = start + rank * num_own - 0.5
            if rank % 2 == 0:
                axes.axvspan(left, left + num_own, color="#000000", alpha=0.06, linewidth=0, zorder=0)
            axes.text(left + num_own / 2, 0.93 * top, f"rank {rank}", ha="center", va="center", fontsize=8)
        axes.text(start + num_experts / 2 - 0.5, 1.01 * top, f"layer {layer}", ha="center", va="bottom")
        ticks += positions
        names += [str(expert) for expert in range(num_experts)]
    axes.axhline(100 / num_experts, color=_DIFFERENCE, linestyle="--", linewidth=1, zorder=3, label="equal share")
    axes.set_xticks(ticks, names, fontsize=8)
    axes.set_ylim(0, top)
    axes.margins(x=0.01)
    num_steps = min(NUM_LOAD_STEPS, len(runs.sharded.loads))
    axes.set_title(f"Load of each expert in the last {num_steps} steps", pad=20)
    axes.set_xlabel("expert")
    axes.set_ylabel("share of the routed tokens (%)")
    axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.14), ncols=3, frameon=False)
