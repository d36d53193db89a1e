"""Owns what the benchmark says: the record of a case, and the table.

A value that is not known is None, in JSON null; none is made up.
"""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass

__all__ = ["Record", "table_head", "table_row"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Record:
    """One measured case; its fields, in this order, are those of a JSON line.

    Attributes:
        op: `dispatch`, `combine`, or a half of one: `dispatch-send`, `dispatch-receive` and so on.
        backend: Name of the backend that ran.
        device, driver, nccl, torch, commit: See `deep_ep_core.bench_machine.Machine`.
        command: Command line that makes this record again, among others.
        num_ranks: Number of ranks.
        num_nodes: Number of nodes.
        num_tokens: Tokens of each rank.
        hidden: Channels of a token.
        num_topk: Experts of a token.
        num_experts: Experts of all ranks.
        dtype: What travels: `fp8`, `bf16` or `logfmt`.
        layout: Always `expert`.
        num_sms: SMs that a kernel may take; None on the collective backend.
        median_ms, min_ms, max_ms: Over the rounds, of the slowest rank of each.
        bytes_moved: The least that the device reads and writes, for all ranks on it: rows are read once, and written
            once where they are wanted, or summed.
        copy_gbs: GB/s of a copy on the device, read plus write, in the same run.
        floor_ms: Time of `bytes_moved` at `copy_gbs`; None of a half and of the host, which moves no rows.
        ratio_to_floor: `median_ms` over `floor_ms`.
        baseline_ms: None: torch has no operation that does the same.
        mode: `graph` (calls inside a CUDA graph), `stream` (calls one by one), or `host` (what the host takes).
        has_hook: Whether sending and receiving were kernels of their own.
        v1_gbs: GB/s of a rank as DeepEP counts it: bytes of the rows that it sends, or gets back, over the median.
    """

    op: str
    backend: str
    device: str | None
    driver: str | None
    nccl: str | None
    torch: str
    commit: str | None
    command: str
    num_ranks: int
    num_nodes: int
    num_tokens: int
    hidden: int
    num_topk: int
    num_experts: int
    dtype: str
    layout: str
    num_sms: int | None
    median_ms: float
    min_ms: float
    max_ms: float
    bytes_moved: int
    copy_gbs: float
    floor_ms: float | None
    ratio_to_floor: float | None
    baseline_ms: float | None
    mode: str
    has_hook: bool
    v1_gbs: float | None

    def to_json(self) -> str:
        """The record as one line of JSON."""
        return json.dumps(dataclasses.asdict(self), allow_nan=False)


def table_head(record: Record) -> str:
    """What is the same in all rows, and the headings."""
    return "\n".join(
        [
            f"{record.device}, {record.num_ranks} ranks, {record.backend} backend, torch {record.torch}, "
            f"NCCL {record.nccl}, copy {record.copy_gbs:.0f} GB/s (read + write)",
            f"{record.num_tokens} tokens a rank, hidden {record.hidden}, top-{record.num_topk} of {record.num_experts}",
            "times in us, of the slowest rank of each round; GB/s: of a rank, as DeepEP counts",
            "",
            f"{'op':<17}{'dtype':<7}{'mode':<8}{'hook':<6}{'median':>8}{'min':>8}{'max':>8}{'floor':>8}"
            f"{'x floor':>9}{'GB/s':>8}",
        ]
    )


def table_row(record: Record) -> str:
    """One case in a line."""
    floor = "-" if record.floor_ms is None else f"{record.floor_ms * 1e3:.1f}"
    ratio = "-" if record.ratio_to_floor is None else f"{record.ratio_to_floor:.2f}"
    rate = "-" if record.v1_gbs is None else f"{record.v1_gbs:.1f}"
    times = "".join(f"{time_ms * 1e3:>8.1f}" for time_ms in (record.median_ms, record.min_ms, record.max_ms))
    hook = "yes" if record.has_hook else "no"
    return f"{record.op:<17}{record.dtype:<7}{record.mode:<8}{hook:<6}{times}{floor:>8}{ratio:>9}{rate:>8}"
