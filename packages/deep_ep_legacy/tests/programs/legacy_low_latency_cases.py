"""Low-latency batches whose rows tell their rank and token, and what must come of them, in plain torch."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.distributed as dist

from deep_ep_core.transport import CollectiveTransport
from deep_ep_legacy.low_latency import OPERATIONS, LowLatencySession

HIDDEN = 1024
GROUP = 128


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    num_tokens: tuple[int, ...]
    num_experts: int = 8
    num_topk: int = 3
    num_max_tokens: int = 40
    hidden: int = HIDDEN
    routing: str = "random"
    index_dtype: torch.dtype = torch.int64

    @property
    def num_ranks(self) -> int:
        return len(self.num_tokens)

    @property
    def num_local_experts(self) -> int:
        return self.num_experts // self.num_ranks


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Batch:
    x: torch.Tensor
    topk_idx: torch.Tensor
    topk_weights: torch.Tensor


def make_session(timeout_s: float = 30, enable_shrink: bool = False) -> LowLatencySession:
    transport = CollectiveTransport(None, timeout_s=timeout_s, name="Buffer", operations=OPERATIONS)
    return LowLatencySession(
        transport, rank=dist.get_rank(), num_ranks=dist.get_world_size(), enable_shrink=enable_shrink
    )


def make_batches(case: Case) -> list[Batch]:
    """The batches of all ranks, the same in every process."""
    batches = []
    for rank, num_tokens in enumerate(case.num_tokens):
        generator = torch.Generator().manual_seed(100 + rank)
        scores = torch.rand(num_tokens, case.num_experts, generator=generator)
        topk_idx = scores.argsort(1)[:, : case.num_topk].contiguous()
        if case.routing == "random":
            topk_idx[torch.rand(topk_idx.shape, generator=generator) < 0.2] = -1
        elif case.routing == "one":
            topk_idx[:, 0], topk_idx[:, 1:] = 1, -1
        else:
            topk_idx[:] = -1
        x = torch.randn(num_tokens, case.hidden, generator=generator).to(torch.bfloat16)
        x[:, -1] = torch.arange(num_tokens)
        x[:, -2] = rank + 1
        weights = torch.rand(topk_idx.shape, generator=generator)
        batches.append(Batch(x=x, topk_idx=topk_idx.to(case.index_dtype), topk_weights=weights))
    return batches


def apply_expert(rows: torch.Tensor, expert: int) -> torch.Tensor:
    """What an expert makes of rows: another factor for each."""
    return (rows.float() * (1 + expert / 8)).to(torch.bfloat16)


def expected_fp8(x: torch.Tensor, *, round_scale: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """Payload as float32, and scales, by another way than the library's."""
    groups = x.double().unflatten(1, (-1, GROUP))
    amax = groups.abs().amax(-1).clamp_min(1e-4).float()
    scales = amax / torch.tensor(448.0)
    multiplier = torch.tensor(448.0) / amax
    if round_scale:
        mantissa, exponent = torch.frexp(scales)
        exponent = torch.where(mantissa == 0.5, exponent - 1, exponent)
        scales = torch.ldexp(torch.ones_like(scales), exponent)
        multiplier = 1 / scales
    payload = (groups.float() * multiplier[..., None]).to(torch.float8_e4m3fn).float()
    return payload.flatten(1), scales


def dequantized(payload: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
    values = payload.float().unflatten(-1, (-1, GROUP)) * scales.unsqueeze(-1)
    return values.flatten(-2).to(torch.bfloat16)


def unpacked(scales: torch.Tensor) -> torch.Tensor:
    """Float32 scales from packed exponents."""
    exponents = torch.stack([(scales >> (8 * byte)) & 0xFF for byte in range(4)], dim=-1).flatten(-2)
    return torch.ldexp(torch.ones(exponents.shape), exponents - 127)


def expected_tokens(case: Case, batches: list[Batch], expert: int) -> list[list[int]]:
    """By source rank, the tokens that select an expert."""
    return [(batch.topk_idx == expert).any(1).nonzero()[:, 0].tolist() for batch in batches]


def expected_combined(case: Case, batch: Batch, x: torch.Tensor, masked: tuple[int, ...] = ()) -> torch.Tensor:
    """Sum in float32, in ascending top-k position, of what experts make of `x`; rounded once."""
    result = torch.zeros(x.shape)
    for token, experts in enumerate(batch.topk_idx.tolist()):
        for k, expert in enumerate(experts):
            if expert >= 0 and expert // case.num_local_experts not in masked:
                result[token] += apply_expert(x[token], expert).float() * batch.topk_weights[token, k]
    return result.to(torch.bfloat16)


def expert_outputs(case: Case, recv_x: torch.Tensor, recv_count: torch.Tensor) -> torch.Tensor:
    """What the experts of this rank make of what they received; NaN where there is nothing."""
    out = torch.full_like(recv_x, torch.nan, dtype=torch.bfloat16)
    for local, count in enumerate(recv_count.tolist()):
        expert = dist.get_rank() * case.num_local_experts + local
        out[local, :count] = apply_expert(recv_x[local, :count], expert)
    return out


def check_layout(case: Case, batches: list[Batch], recv_count: torch.Tensor, handle: tuple) -> None:
    """Counts, blocks and sources of the packed layout."""
    src_info, layout_range, num_max_tokens, hidden, num_experts = handle
    assert (num_max_tokens, hidden, num_experts) == (case.num_max_tokens, case.hidden, case.num_experts)
    assert (recv_count.dtype, src_info.dtype, layout_range.dtype) == (torch.int32, torch.int32, torch.int64)
    assert src_info.shape == (case.num_local_experts, case.num_ranks * case.num_max_tokens)
    for local in range(case.num_local_experts):
        tokens = expected_tokens(case, batches, dist.get_rank() * case.num_local_experts + local)
        begin = 0
        for rank, of_rank in enumerate(tokens):
            packed = int(layout_range[local, rank])
            assert (packed >> 32, packed & 0xFFFFFFFF) == (begin, len(of_rank))
            assert src_info[local, begin : begin + len(of_rank)].tolist() == of_rank
            begin += len(of_rank)
        assert int(recv_count[local]) == begin


def check_rows(case: Case, rows_of_rank: list[torch.Tensor], batches: list[Batch], received: torch.Tensor) -> None:
    """Rows of each expert by source rank and token, to the bit."""
    for local in range(case.num_local_experts):
        tokens = expected_tokens(case, batches, dist.get_rank() * case.num_local_experts + local)
        expected = torch.cat([rows[idx] for rows, idx in zip(rows_of_rank, tokens, strict=True)])
        assert torch.equal(received[local, : len(expected)], expected)
