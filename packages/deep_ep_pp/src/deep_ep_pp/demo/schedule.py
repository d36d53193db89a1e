"""Owns the 1F1B schedule: the order of forward and backward passes of one stage, and what it sends and receives.

It knows neither the model nor the optimizer.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from deep_ep_pp import PipelineBuffer

__all__ = ["run_1f1b"]


def run_1f1b(
    buffer: PipelineBuffer,
    stage: nn.Module,
    microbatches: Sequence[Tensor],
    loss_of: Callable[[Tensor, int], Tensor],
) -> list[float]:
    """One training step of a pipeline whose stages are the ranks, in their order; leaves gradients in `stage`.

    The first ranks begin with as many forward passes as there are stages behind them. Then every rank does one forward
    and one backward pass in turn, so it holds the activations of few micro-batches at a time.

    Args:
        buffer: Its messages must be large enough for a micro-batch; a window of 2 lets a stage run ahead.
        stage: This rank's part of the model; its output has the shape and dtype of its input.
        microbatches: The model's input. Only the first rank uses the values; the others need shapes and dtypes.
        loss_of: Loss of the model's output for the micro-batch of that index; called on the last rank only.

    Returns:
        The losses by micro-batch on the last rank, else nothing.

    Collective: yes.
    """
    rank, last = buffer.rank_idx, buffer.num_ranks - 1
    losses: list[float] = []
    # Input and output of the forward passes whose backward pass is to come.
    pending: deque[tuple[Tensor, Tensor]] = deque()

    def forward(idx: int) -> None:
        x = microbatches[idx]
        if rank > 0:
            # The index goes along, to show a message of two tensors, and that none is mistaken for another.
            x, sent_idx = torch.empty_like(x), torch.empty(1, dtype=torch.int64, device=x.device)
            buffer.pp_recv((x, sent_idx), rank - 1)
            assert sent_idx.item() == idx, (sent_idx, idx)
            x.requires_grad_()
        y = stage(x)
        if rank == last:
            y = loss_of(y, idx)
            losses.append(y.item())
        else:
            buffer.pp_send((y, torch.tensor([idx], device=y.device)), rank + 1)
        pending.append((x, y))

    def backward() -> None:
        x, y = pending.popleft()
        if rank == last:
            y.backward()
        else:
            grad = torch.empty_like(y)
            buffer.pp_recv(grad, rank + 1)
            y.backward(grad)
        if rank > 0:
            assert x.grad is not None
            buffer.pp_send(x.grad.contiguous(), rank - 1)

    num_warmup = min(last - rank, len(microbatches))
    for idx in range(num_warmup):
        forward(idx)
    for idx in range(num_warmup, len(microbatches)):
        forward(idx)
        backward()
    for _ in range(num_warmup):
        backward()
    return losses
