"""Owns the records of the benchmark.

A value that is not known is None, in JSON null; none is made up.
"""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass

from deep_ep_core.bench_machine import Machine
from deep_ep_pp.bench.measure import STEPS_PER_ROUND, Spread
from deep_ep_pp.bench.tasks import Case

__all__ = ["Record", "make_record"]

_MS_PER_S = 1e3
_BYTES_PER_GB = 1e9


@dataclass(frozen=True, slots=True, kw_only=True)
class Record:
    """One measured case; its fields, in this order, are those of a JSON line.

    Attributes:
        op: `ring` or `both`.
        backend: Name of the backend that ran.
        device: Name of the GPU or of the processor.
        driver: Version of the NVIDIA driver.
        nccl: Version of the NCCL that is used.
        torch: Version of torch.
        commit: Commit of the library's checkout.
        command: Command line that makes this record again, among others.
        num_ranks: Number of ranks.
        num_nodes: Number of load/store domains, make-believe nodes included.
        num_devices: Devices that the ranks run on.
        message_bytes: Size of a message.
        window: Messages that may be on their way between two ranks.
        mode: `stream`, or `host` for the host's time.
        steps_per_round: Steps of a timed round; the times below are of one step.
        num_sms: SMs that messages were given: none on the device backend; None on another one.
        median_ms: Median over the rounds, of the slowest rank of each.
        min_ms: Least of the same.
        max_ms: Most of the same.
        bytes_moved: What the busiest device reads and writes: four times the bytes of the messages of its ranks, one
            copy into a slot and one out of it.
        copy_gbs: Rate of torch's copy on one device in this run, bytes read plus bytes written.
        engine_gbs: The same of the copy engines; None on a CPU.
        floor_ms: `bytes_moved` at `copy_gbs`; None for the host's time.
        ratio_to_floor: `median_ms` over it.
        baseline_ms: Median of the same step by `torch.distributed.batch_isend_irecv`; None where it was not taken.
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
    num_devices: int
    message_bytes: int
    window: int
    mode: str
    steps_per_round: int
    num_sms: int | None
    median_ms: float
    min_ms: float
    max_ms: float
    bytes_moved: int
    copy_gbs: float
    engine_gbs: float | None
    floor_ms: float | None
    ratio_to_floor: float | None
    baseline_ms: float | None

    def to_json(self) -> str:
        """The record as one line of JSON."""
        return json.dumps(dataclasses.asdict(self), allow_nan=False)


def make_record(
    case: Case,
    machine: Machine,
    library: Spread,
    baseline: Spread | None,
    *,
    backend: str,
    command: str,
    num_nodes: int,
    device_of_rank: list[str],
    bytes_moved: int,
    copy_gbs: float,
    engine_gbs: float | None,
) -> Record:
    """Put together what is known about a case."""
    # The host moves no bytes, so its time has no floor.
    floor_ms = None if case.mode == "host" else bytes_moved / _BYTES_PER_GB / copy_gbs * _MS_PER_S
    return Record(
        op=case.op,
        backend=backend,
        device=machine.device,
        driver=machine.driver,
        nccl=machine.nccl,
        torch=machine.torch,
        commit=machine.commit,
        command=command,
        num_ranks=len(device_of_rank),
        num_nodes=num_nodes,
        num_devices=len(set(device_of_rank)),
        message_bytes=case.message_bytes,
        window=case.window,
        mode=case.mode,
        steps_per_round=STEPS_PER_ROUND,
        num_sms=0 if backend == "device" else None,
        median_ms=library.median_ms,
        min_ms=library.min_ms,
        max_ms=library.max_ms,
        bytes_moved=bytes_moved,
        copy_gbs=copy_gbs,
        engine_gbs=engine_gbs,
        floor_ms=floor_ms,
        ratio_to_floor=None if floor_ms is None else library.median_ms / floor_ms,
        baseline_ms=None if baseline is None else baseline.median_ms,
    )
