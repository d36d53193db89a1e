"""Owns the values that the benchmark moves, and the check that they came where they belong.

A value follows from its token and channel alone, so every rank knows what each row must hold, and none is sent for the
check. Values are small integers: their sums are exact in bfloat16, in any order.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TypeAlias

import torch

from deep_ep_ep.bench.baseline import BaselinePlan
from deep_ep_ep.bench.cases import FP8_GROUP_SIZE, Case
from deep_ep_ep.quant import cast_to_fp8

__all__ = ["ExpectedRows", "Rows", "expected_rows", "source_rows"]

Rows: TypeAlias = torch.Tensor | tuple[torch.Tensor, torch.Tensor]

# Sums of 64 of them, twice the longest top-k row, stay within the integers that bfloat16 holds.
_MAX_VALUE = 4
# Odd numbers with bits all over; the last is below 2^31, so that 32 bits times it fit into an int64.
_TOKEN_FACTOR = 0x9E3779B1
_CHANNEL_FACTOR = 0x85EBCA6B
_MIX_FACTOR = 0x2C1B3C6D
_MASK_32 = 0xFFFFFFFF
# Rows that are compared at a time, so that the check takes little memory beside what it checks.
_ROWS_AT_A_TIME = 1024


def source_rows(source: torch.Tensor, case: Case) -> Rows:
    """What the tokens of a case hold.

    Args:
        source: `[num_rows]` int64: rank * num_tokens + token.
        case: The case, for hidden and dtype.

    Returns:
        `[num_rows, hidden]` bfloat16, or FP8 with scales.
    """
    values = _values(source, case.hidden).to(torch.bfloat16)
    return values if case.dtype == "bf16" else cast_to_fp8(values, group_size=FP8_GROUP_SIZE)


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class ExpectedRows:
    """What an operation must return on one rank.

    Attributes:
        case: The case.
        num_rows: Rows of the result, padding included; more are allowed where there is no CPU sync.
        source: `[num_real]` int64: rank * num_tokens + token of each real row.
        position: `[num_real]` int64: where in the result it is; None for "in this order, from the first on".
        num_summands: `[num_real]` int64: how many times the token's row is in the sum; None where nothing is summed.
    """

    case: Case
    num_rows: int
    source: torch.Tensor
    position: torch.Tensor | None
    num_summands: torch.Tensor | None

    def is_met_by(self, actual: Rows) -> bool:
        """Whether all real rows of a result are right, bit for bit but for the sign of zero."""
        tensors = [actual] if isinstance(actual, torch.Tensor) else list(actual)
        num_rows = tensors[0].size(0)
        if num_rows < self.num_rows or (self.case.has_cpu_sync and num_rows > self.num_rows):
            return False
        num_real = len(self.source)
        num_wrong = torch.zeros((), dtype=torch.int64, device=self.source.device)
        for begin in range(0, num_real, _ROWS_AT_A_TIME):
            part = slice(begin, min(begin + _ROWS_AT_A_TIME, num_real))
            for tensor, expected in zip(tensors, self._part(part), strict=True):
                rows = tensor[part] if self.position is None else _as_numbers(tensor)[self.position[part]]
                num_wrong += (_as_numbers(rows) != _as_numbers(expected)).sum()
        return int(num_wrong) == 0

    def _part(self, part: slice) -> list[torch.Tensor]:
        if self.num_summands is not None:
            values = _values(self.source[part], self.case.hidden)
            return [(values * self.num_summands[part, None]).to(torch.bfloat16)]
        rows = source_rows(self.source[part], self.case)
        return [rows] if isinstance(rows, torch.Tensor) else list(rows)


def expected_rows(case: Case, plan: BaselinePlan, *, rank: int) -> ExpectedRows:
    """What the operation of a case must return on a rank whose routing is `plan`."""
    if case.op == "combine":
        first = rank * case.num_tokens
        return ExpectedRows(
            case=case,
            num_rows=case.num_tokens,
            source=torch.arange(first, first + case.num_tokens, device=plan.recv_source.device),
            position=None,
            num_summands=plan.num_summands,
        )
    by_expert = plan.expert_rows
    return ExpectedRows(
        case=case,
        num_rows=plan.num_rows,
        source=plan.recv_source if by_expert is None else plan.recv_source[by_expert.recv_row],
        position=None if by_expert is None else by_expert.expert_row,
        num_summands=None,
    )


def _values(source: torch.Tensor, hidden: int) -> torch.Tensor:
    """A hash of token and channel, small enough. Products alone would give many tokens the same row."""
    channel = torch.arange(hidden, device=source.device) * _CHANNEL_FACTOR
    mixed = (source[:, None] * _TOKEN_FACTOR + channel) & _MASK_32
    mixed ^= mixed >> 15
    mixed = (mixed * _MIX_FACTOR) & _MASK_32
    mixed ^= mixed >> 13
    return mixed % (2 * _MAX_VALUE + 1) - _MAX_VALUE


def _as_numbers(tensor: torch.Tensor) -> torch.Tensor:
    """A dtype that torch can compare and index everywhere."""
    return tensor.view(torch.uint8) if tensor.dtype == torch.float8_e4m3fn else tensor
