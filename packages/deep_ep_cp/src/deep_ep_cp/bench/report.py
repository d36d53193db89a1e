"""Owns what the benchmark says: the record of a case.

A value that is not known is None, in JSON null; none is made up.
"""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass

from deep_ep_core.bench_machine import Machine
from deep_ep_cp.bench.cases import DTYPE, Case
from deep_ep_cp.bench.measure import Spread

__all__ = ["Record", "make_record"]

_MS_PER_S = 1e3
_BYTES_PER_GB = 1e9


@dataclass(frozen=True, slots=True, kw_only=True)
class Record:
    """One measured case; its fields, in this order, are those of a JSON line.

    Attributes:
        op: `all_gather`, `all_gather_in_place` or `reduce_scatter`.
        backend: Name of the backend that ran.
        device, driver, nccl, torch, commit: See `deep_ep_core.bench_machine.Machine`; no device on a CPU.
        command: Command line that makes this record again, among others.
        num_ranks: Number of ranks.
        num_ranks_of_device: Ranks that share a device.
        slot_bytes: What each rank passes to an all-gather, or gets from a reduce-scatter.
        dtype: Of the tensors.
        median_ms, min_ms, max_ms: Over the rounds, of the slowest rank of each.
        bytes_moved: The least that a device reads and writes for all its ranks.
        copy_gbs: GB/s of a copy on the device, read plus write, in the same run.
        floor_ms: Time of `bytes_moved` at `copy_gbs`. Between devices the links are slower than that.
        ratio_to_floor: `median_ms` over `floor_ms`.
        baseline_ms: Median of the same with torch's collective; None where it was not taken.
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
    num_ranks_of_device: int
    slot_bytes: int
    dtype: str
    median_ms: float
    min_ms: float
    max_ms: float
    bytes_moved: int
    copy_gbs: float
    floor_ms: float
    ratio_to_floor: float
    baseline_ms: float | None

    def to_json(self) -> str:
        """The record as one line of JSON."""
        return json.dumps(dataclasses.asdict(self), allow_nan=False)


def make_record(
    case: Case,
    times: Spread,
    baseline: Spread | None,
    machine: Machine,
    *,
    backend: str,
    command: str,
    num_ranks_of_device: int,
    copy_gbs: float,
) -> Record:
    """Put together what is known about a case."""
    bytes_moved = num_ranks_of_device * case.bytes_of_rank
    floor_ms = bytes_moved / _BYTES_PER_GB / copy_gbs * _MS_PER_S
    return Record(
        op=case.op,
        backend=backend,
        **dataclasses.asdict(machine),
        command=command,
        num_ranks=case.num_ranks,
        num_ranks_of_device=num_ranks_of_device,
        slot_bytes=case.slot_bytes,
        dtype=str(DTYPE).removeprefix("torch."),
        **dataclasses.asdict(times),
        bytes_moved=bytes_moved,
        copy_gbs=copy_gbs,
        floor_ms=floor_ms,
        ratio_to_floor=times.median_ms / floor_ms,
        baseline_ms=None if baseline is None else baseline.median_ms,
    )
