"""A mixture of experts whose every result is exact, so that any way to compute it gives the same bits."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator

import torch
import torch.distributed as dist

from deep_ep_legacy import Buffer

NUM_EXPERTS = 8
NUM_TOPK = 2
HIDDEN = 512
MAX_TOKENS = 16
GROUP = 128

_devices = [torch.device("cpu")]


@contextlib.contextmanager
def on_device_backend() -> Iterator[None]:
    """In the block, batches are on this rank's GPU, and buffers of V1 have the device backend where none is named."""
    device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")) % torch.cuda.device_count())
    torch.cuda.set_device(device)
    defaults = Buffer.__init__.__kwdefaults__
    _devices.append(device)
    before, defaults["backend"] = defaults["backend"], "device"
    try:
        yield
        torch.cuda.synchronize()
        dist.barrier()
    finally:
        _devices.pop()
        defaults["backend"] = before


class Problem:
    """The batch of this rank. Expert e multiplies a row by e + 1.

    Values are small integers, weights a half or a quarter: all sums fit into bfloat16. Each group of 128 channels has 7
    as its largest magnitude, which makes the FP8 scale 1/64, so a cast to FP8 loses nothing either.
    """

    def __init__(self, seed: int = 0) -> None:
        self.rank, self.num_ranks = dist.get_rank(), dist.get_world_size()
        generator = torch.Generator().manual_seed(1000 * seed + self.rank)
        num_tokens = 5 + 3 * self.rank
        self.num_local_experts = NUM_EXPERTS // self.num_ranks
        self.first_expert = self.rank * self.num_local_experts
        self.topk_idx = torch.rand(num_tokens, NUM_EXPERTS, generator=generator).argsort(1)[:, :NUM_TOPK].contiguous()
        self.topk_idx[0, 1] = -1
        self.topk_weights = torch.randint(1, 3, (num_tokens, NUM_TOPK), generator=generator) / 4
        self.x = torch.randint(-7, 8, (num_tokens, HIDDEN), generator=generator).to(torch.bfloat16)
        self.x[:, ::GROUP] = 7
        device = _devices[-1]
        self.x, self.topk_idx = self.x.to(device), self.topk_idx.to(device)
        self.topk_weights = self.topk_weights.to(device)

    @property
    def is_selected(self) -> torch.Tensor:
        return self.topk_idx >= 0

    @property
    def factors(self) -> torch.Tensor:
        """What each token is multiplied by in all, `[num_tokens, 1]`."""
        return (self.topk_weights * (self.topk_idx + 1) * self.is_selected).sum(1, keepdim=True)

    def check(self, combined: torch.Tensor) -> None:
        assert combined.dtype == torch.bfloat16
        assert torch.equal(combined.float(), self.x.float() * self.factors)

    @property
    def masked_weights(self) -> torch.Tensor:
        return self.topk_weights * self.is_selected

    def quantized(self) -> tuple[torch.Tensor, torch.Tensor]:
        return (self.x.float() * 64).to(torch.float8_e4m3fn), torch.full(
            (len(self.x), HIDDEN // GROUP), 1 / 64, device=self.x.device
        )

    def run_by_token(self, rows: torch.Tensor, local_idx: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        """The local experts on rows that come once a token, weighted and summed over these experts."""
        factors = (weights * (self.first_expert + local_idx + 1) * (local_idx >= 0)).sum(1, keepdim=True)
        return (rows.float() * factors).to(torch.bfloat16)

    def run_by_expert(self, rows: torch.Tensor, counts: list[int]) -> torch.Tensor:
        """The local experts on `[num_local_experts, num_rows, hidden]`, not weighted; NaN where there is no row."""
        out = torch.full(rows.shape, torch.nan, dtype=torch.bfloat16, device=rows.device)
        for local, count in enumerate(counts):
            out[local, :count] = (rows[local, :count].float() * (self.first_expert + local + 1)).to(torch.bfloat16)
        return out

    def run_by_sorted_rows(self, rows: torch.Tensor, ends: list[int], starts: list[int]) -> torch.Tensor:
        """The local experts on rows that lie expert by expert; other rows stay as they are."""
        out = rows.clone()
        for local, (start, end) in enumerate(zip(starts, ends, strict=True)):
            out[start:end] = (rows[start:end].float() * (self.first_expert + local + 1)).to(torch.bfloat16)
        return out


def dequantized(recv: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
    """Rows from FP8 and scales: float32, or four exponents to an int32."""
    payload, scales = recv
    if scales.dtype == torch.int32:
        exponents = torch.stack([(scales >> (8 * byte)) & 0xFF for byte in range(4)], dim=-1).flatten(-2)
        scales = torch.ldexp(torch.ones(exponents.shape, device=scales.device), exponents - 127)
    return (payload.float().unflatten(-1, (-1, GROUP)) * scales.unsqueeze(-1)).flatten(-2).to(torch.bfloat16)


def all_topk_idx() -> torch.Tensor:
    """The selections of all ranks, as one list of experts."""
    gathered: list[object] = [None] * dist.get_world_size()
    dist.all_gather_object(gathered, Problem().topk_idx.cpu())
    return torch.cat([each.reshape(-1) for each in gathered])


def num_rows_of_local_experts(p: Problem) -> list[int]:
    experts = all_topk_idx()
    return [int((experts == p.first_expert + local).sum()) for local in range(p.num_local_experts)]
