"""Owns what the benchmark says: the record of a case, and the table.

A value that is not known is None, in JSON null; none is made up.
"""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass

from deep_ep_core.bench_machine import Machine
from deep_ep_ep.bench.cases import Case
from deep_ep_ep.bench.measure import Measurement

__all__ = ["Record", "make_record", "table_head", "table_row"]

_MS_PER_S = 1e3
_BYTES_PER_GB = 1e9
_BYTES_PER_MIB = 1 << 20


@dataclass(frozen=True, slots=True, kw_only=True)
class Record:
    """One measured case; its fields, in this order, are those of a JSON line.

    Attributes:
        op: `dispatch`, `combine` or `cached-dispatch`.
        backend: Name of the backend that ran.
        device: Name of the GPU or of the processor.
        driver: Version of the NVIDIA driver.
        nccl: Version of the NCCL that torch has loaded.
        torch: Version of torch.
        commit: Commit of the library's checkout.
        command: Command line that makes this record again, among others.
        num_ranks: Number of ranks.
        num_nodes: Number of physical scale-up domains, make-believe nodes included.
        num_tokens: Tokens of each rank.
        hidden: Elements of a token.
        num_topk: Experts of a token.
        num_experts: Experts of all ranks.
        dtype: Of the rows that the operation moves.
        layout: `token` or `expert`.
        num_sms: SMs that the operation was given.
        median_ms: Median over the rounds, of the slowest rank of each.
        min_ms: Least of the same.
        max_ms: Most of the same.
        bytes_moved: The least that the busiest device reads and writes.
        copy_gbs: GB/s of a copy on the device, read plus write, in the same run.
        floor_ms: Time of `bytes_moved` at `copy_gbs`; None where only the host's time was taken.
        ratio_to_floor: `median_ms` over `floor_ms`.
        baseline_ms: Median of the same work with torch's all-to-all, in the same run; None where it was not taken.
        case: What a suite calls it; None outside of one.
        mode: `stream`, `graph` or `host`.
        recv_memory: Where received rows live, as `ElasticBuffer` takes it; None on the collective backend.
        expert_alignment: Rows of each expert start at a multiple of this.
        num_bytes: Size of the buffer.
        window_bytes: Memory that the buffer takes on each rank; None where the backend takes none, or does not tell.
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
    case: str | None
    mode: str
    recv_memory: str | None
    expert_alignment: int
    num_bytes: int
    window_bytes: int | None

    def to_json(self) -> str:
        """The record as one line of JSON."""
        return json.dumps(dataclasses.asdict(self), allow_nan=False)


def make_record(
    case: Case, measurement: Measurement, machine: Machine, *, command: str, num_nodes: int, copy_gbs: float
) -> Record:
    """Put together what is known about a case."""
    # The host moves no rows, so its time has no floor.
    floor_ms = None if case.mode == "host" else measurement.bytes_moved / _BYTES_PER_GB / copy_gbs * _MS_PER_S
    return Record(
        op=case.op,
        backend=measurement.backend,
        device=machine.device,
        driver=machine.driver,
        nccl=machine.nccl,
        torch=machine.torch,
        commit=machine.commit,
        command=command,
        num_ranks=case.num_ranks,
        num_nodes=num_nodes,
        num_tokens=case.num_tokens,
        hidden=case.hidden,
        num_topk=case.num_topk,
        num_experts=case.num_experts,
        dtype=case.dtype,
        layout=case.layout,
        num_sms=measurement.num_sms,
        median_ms=measurement.library.median_ms,
        min_ms=measurement.library.min_ms,
        max_ms=measurement.library.max_ms,
        bytes_moved=measurement.bytes_moved,
        copy_gbs=copy_gbs,
        floor_ms=floor_ms,
        ratio_to_floor=None if floor_ms is None else measurement.library.median_ms / floor_ms,
        baseline_ms=None if measurement.baseline is None else measurement.baseline.median_ms,
        case=case.name or None,
        mode=case.mode,
        recv_memory=None if measurement.backend == "collective" else case.recv_memory,
        expert_alignment=case.expert_alignment,
        num_bytes=measurement.num_bytes,
        window_bytes=measurement.window_bytes,
    )


# The table: headings and widths. Widths and the blanks between them make 117 columns.
_COLUMNS = (
    ("op", 15),
    ("layout", 6),
    ("dtype", 5),
    ("mode", 6),
    ("memory", 6),
    ("shape", 15),
    ("SMs", 3),
    ("median", 7),
    ("max", 7),
    ("floor", 7),
    ("x floor", 7),
    ("GB/s", 7),
    ("base", 6),
    ("MiB", 6),
)
_NUM_TEXT_COLUMNS = 5


def table_head(record: Record, *, group_backend: str) -> str:
    """What is the same in all rows of the run of a record, and the headings.

    Args:
        record: Of any case of the run.
        group_backend: What carries the rows of the baseline, and of the collective backend.
    """
    copy = f"{_shown(record.copy_gbs)} GB/s copy (read + write)"
    versions = f"torch {record.torch}" + (f", NCCL {record.nccl}" if record.nccl else "")
    return "\n".join(
        [
            f"{record.device or 'unknown device'}, ranks: {record.num_ranks}, nodes: {record.num_nodes}, "
            f"backend: {record.backend}, group: {group_backend}",
            f"{copy}, {versions}",
            "times in ms, of the slowest rank of each round; shape: tokens x hidden/top-k/experts",
            "GB/s: least bytes over median; base: torch's all-to-all; MiB: the buffer's memory on each rank",
            "",
            _row([name for name, _ in _COLUMNS]),
        ]
    )


def table_row(record: Record) -> str:
    """One case in a line."""
    return _row(
        [
            record.op,
            record.layout,
            record.dtype,
            record.mode,
            record.recv_memory or "-",
            f"{record.num_tokens}x{record.hidden}/{record.num_topk}/{record.num_experts}",
            "-" if record.num_sms is None else str(record.num_sms),
            _shown(record.median_ms),
            _shown(record.max_ms),
            _shown(record.floor_ms),
            _shown(record.ratio_to_floor),
            _shown(
                None if record.floor_ms is None else record.bytes_moved / record.median_ms * _MS_PER_S / _BYTES_PER_GB
            ),
            _shown(record.baseline_ms),
            _shown(None if record.window_bytes is None else record.window_bytes / _BYTES_PER_MIB),
        ]
    )


def _row(texts: list[str]) -> str:
    cells = [
        f"{text:<{width}}" if column < _NUM_TEXT_COLUMNS else f"{text:>{width}}"
        for column, (text, (_, width)) in enumerate(zip(texts, _COLUMNS, strict=True))
    ]
    return " ".join(cells)


def _shown(value: float | None) -> str:
    """Three digits, or all before the point where there are more."""
    if value is None:
        return "-"
    return f"{value:.3g}" if value < 1000 else f"{value:.0f}"
