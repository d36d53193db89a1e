"""The demo's schedule against the whole model, on ranks that are there already."""

from __future__ import annotations

import torch
import torch.distributed as dist
from pp_setting import SETTING, open_buffer
from torch import nn

from deep_ep_pp.demo.schedule import run_1f1b


def gradient_differences(num_microbatches: int, faulty_rank: int | None = None) -> float:
    """Largest difference of this stage's gradients from the whole model's; `faulty_rank` sends a wrong activation."""
    rank, num_ranks = dist.get_rank(), dist.get_world_size()
    torch.manual_seed(1)
    whole = nn.Sequential(*(nn.Sequential(nn.Linear(8, 8), nn.Tanh()).double() for _ in range(num_ranks)))
    stage = nn.Sequential(nn.Linear(8, 8), nn.Tanh()).double()
    stage.load_state_dict(whole[rank].state_dict())
    inputs = [torch.randn(2 + idx, 8, dtype=torch.float64).to(SETTING.device) for idx in range(num_microbatches)]
    if rank == faulty_rank:
        stage[1] = nn.Sigmoid()
    whole, stage = whole.to(SETTING.device), stage.to(SETTING.device)
    with open_buffer() as buffer:
        buffer.pp_set_config(max(x.nbytes for x in inputs) + 32, 1)
        losses = run_1f1b(buffer, stage, inputs, lambda y, idx: (y * (idx + 1)).sum())
    for idx, x in enumerate(inputs):
        (whole(x) * (idx + 1)).sum().backward()
    assert len(losses) == (num_microbatches if rank == num_ranks - 1 else 0)
    pairs = zip(stage.parameters(), whole[rank].parameters(), strict=True)
    return max(float((mine.grad - expected.grad).abs().max() / expected.grad.abs().max()) for mine, expected in pairs)
