"""Owns the demo's command line: `python -m deep_ep_pp.demo` trains a model in stages, and whole, and compares.

It starts the ranks, or joins those that a launcher has started. It needs no GPU and takes seconds.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor, nn

from deep_ep_core.errors import ConfigError
from deep_ep_core.launch import launch
from deep_ep_core.local import LaunchConfig
from deep_ep_pp import PipelineBuffer
from deep_ep_pp.demo.schedule import run_1f1b

__all__ = ["main"]

_HIDDEN = 32
_MICROBATCH_SIZE = 4
_LEARNING_RATE = 0.1
# float64 has 2e-16; the stages do the sums of the whole model, so what is left is how a library orders a product's.
_MAX_RELATIVE_DIFFERENCE = 1e-12


class Block(nn.Module):
    """One stage: a residual two-layer network on `[num_rows, hidden]`."""

    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Linear(_HIDDEN, 2 * _HIDDEN, dtype=torch.float64)
        self.down = nn.Linear(2 * _HIDDEN, _HIDDEN, dtype=torch.float64)

    def forward(self, x: Tensor) -> Tensor:
        """`[num_rows, hidden]` to the same."""
        y: Tensor = x + self.down(torch.tanh(self.up(x)))
        return y


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; returns the exit code: 0 if the gradients agree, 1 if not, 2 for what cannot be run."""
    parser = argparse.ArgumentParser(
        prog="python -m deep_ep_pp.demo",
        description="Train a small model cut into stages, one a rank, by the 1F1B schedule. Show that its gradients "
        "are those of the whole model.",
    )
    parser.add_argument("--ranks", type=int, default=4, metavar="N", help="stages to start (default: %(default)s)")
    parser.add_argument("--microbatches", type=int, default=8, metavar="N", help="of a step (default: %(default)s)")
    parser.add_argument("--steps", type=int, default=5, metavar="N", help="(default: %(default)s)")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="(default: %(default)s)")
    options = parser.parse_args(arguments)
    try:
        if options.microbatches < 1 or options.steps < 1:
            raise ConfigError(
                f"--microbatches and --steps must be at least 1 (got {options.microbatches} and {options.steps})"
            )
        if "RANK" in os.environ:
            return _train(options.microbatches, options.steps, _device_of_rank(options.device))
        command = ["-m", "deep_ep_pp.demo"]
        for name in ("microbatches", "steps", "device"):
            command += [f"--{name}", str(getattr(options, name))]
        return launch(LaunchConfig(num_ranks=options.ranks, device=options.device), command, has_prefix=False)
    except ConfigError as error:
        print(f"deep_ep_pp.demo: {error}", file=sys.stderr, flush=True)
        return 2


def _device_of_rank(kind: str) -> torch.device:
    """The device of this rank.

    Raises:
        ConfigError: It shall be a GPU, and torch can use none.
    """
    if kind == "cpu":
        return torch.device("cpu")
    if not torch.cuda.is_available():
        raise ConfigError("--device cuda needs a GPU that torch can use (got none); use --device cpu")
    # Right where ranks share a GPU too.
    device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")) % torch.cuda.device_count())
    torch.cuda.set_device(device)
    return device


def _train(num_microbatches: int, num_steps: int, device: torch.device) -> int:
    """Be one rank."""
    dist.init_process_group("gloo")
    rank, num_ranks = dist.get_rank(), dist.get_world_size()
    # The same on every rank: each has the whole model beside its stage, to compare with.
    torch.manual_seed(0)
    whole = nn.Sequential(*(Block() for _ in range(num_ranks))).to(device)
    stage = Block().to(device)
    stage.load_state_dict(whole[rank].state_dict())
    data = torch.randn(2, num_microbatches, _MICROBATCH_SIZE, _HIDDEN, dtype=torch.float64).to(device)
    inputs, targets = data[0].unbind(), data[1].unbind()

    def loss_of(y: Tensor, idx: int) -> Tensor:
        return nn.functional.mse_loss(y, targets[idx]) / num_microbatches

    optimizers = [torch.optim.SGD(model.parameters(), lr=_LEARNING_RATE) for model in (whole, stage)]
    differences = []
    # A demo on CPUs shall not use a GPU that happens to be there.
    with PipelineBuffer(None, backend="collective" if device.type == "cpu" else "auto") as buffer:
        if rank == 0:
            assert buffer.runtime is not None
            print(f"messages by the {buffer.runtime.name} backend", flush=True)
        # A micro-batch and its index, each from a multiple of 32 bytes.
        buffer.pp_set_config(inputs[0].nbytes + 32, num_max_inflight_tensors=2)
        for step in range(num_steps):
            for optimizer in optimizers:
                optimizer.zero_grad()
            losses = run_1f1b(buffer, stage, inputs, loss_of)
            for idx, x in enumerate(inputs):
                loss_of(whole(x), idx).backward()
            difference = _gather_worst(buffer, _relative_difference(stage, whole[rank]))
            differences.append(difference)
            if rank == num_ranks - 1:
                print(f"step {step}: loss {sum(losses):.6f}, gradients differ by {difference:.1e}", flush=True)
            for optimizer in optimizers:
                optimizer.step()
    dist.destroy_process_group()
    # Not a number is no agreement.
    agrees = all(difference <= _MAX_RELATIVE_DIFFERENCE for difference in differences)
    if rank == num_ranks - 1:
        verdict = "AGREE" if agrees else "DISAGREE"
        print(f"the gradients of {num_ranks} stages and of the whole model {verdict}", flush=True)
    return 0 if agrees else 1


def _relative_difference(stage: nn.Module, reference: nn.Module) -> float:
    """Largest difference of a gradient, in units of the largest gradient of the same parameter."""
    differences = []
    for parameter, expected in zip(stage.parameters(), reference.parameters(), strict=True):
        assert parameter.grad is not None
        assert expected.grad is not None
        differences.append((parameter.grad - expected.grad).abs().max() / expected.grad.abs().max())
    return float(torch.stack(differences).max())


def _gather_worst(buffer: PipelineBuffer, value: float) -> float:
    """The largest value of all ranks, on every rank, by messages to ranks that are no neighbours too."""
    others = [peer for peer in range(buffer.num_ranks) if peer != buffer.rank_idx]
    mine = torch.tensor([value], dtype=torch.float64)
    theirs = torch.empty(len(others), dtype=torch.float64)
    for peer in others:
        buffer.pp_send(mine, peer)
    for idx, peer in enumerate(others):
        buffer.pp_recv(theirs[idx : idx + 1], peer)
    return float(torch.cat([mine, theirs]).max())


if __name__ == "__main__":
    sys.exit(main())
