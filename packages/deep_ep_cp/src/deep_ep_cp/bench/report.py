"""Owns what the benchmark says: the record of a case, and the facts about the machine in it.

A value that is not known is None, in JSON null; none is made up.
"""

from __future__ import annotations

import dataclasses
import json
import re
import subprocess
from dataclasses import dataclass
from pathlib import Path

import torch

from deep_ep_core.errors import TransportError
from deep_ep_core.nccl import load_nccl
from deep_ep_cp.bench.cases import DTYPE, Case
from deep_ep_cp.bench.measure import Spread

__all__ = ["Machine", "Record", "make_record", "read_machine"]

_MS_PER_S = 1e3
_BYTES_PER_GB = 1e9
_DRIVER_VERSION = re.compile(r"\b\d{3}\.\d+(\.\d+)?\b")


@dataclass(frozen=True, slots=True, kw_only=True)
class Machine:
    """What a run stands on.

    Attributes:
        device: Name of the GPU; None on a CPU.
        driver: Version of the NVIDIA driver.
        nccl: Version of the NCCL that is used.
        torch: Version of torch.
        commit: Commit of the library's checkout, with `-dirty` if files in it differ.
    """

    device: str | None
    driver: str | None
    nccl: str | None
    torch: str
    commit: str | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Record:
    """One measured case; its fields, in this order, are those of a JSON line.

    Attributes:
        op: `all_gather`, `all_gather_in_place` or `reduce_scatter`.
        backend: Name of the backend that ran.
        device, driver, nccl, torch, commit: See `Machine`.
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


def read_machine(device: torch.device) -> Machine:
    """Look up the facts about this rank's machine. Collective: no."""
    is_cuda = device.type == "cuda"
    return Machine(
        device=torch.cuda.get_device_name(device) if is_cuda else None,
        driver=_driver_version() if is_cuda else None,
        nccl=_nccl_version() if is_cuda else None,
        torch=str(torch.__version__),
        commit=_commit(),
    )


def _nccl_version() -> str | None:
    try:
        code = load_nccl().version
    except TransportError:
        # None, or one too old for windows.
        return None
    return f"{code // 10000}.{code // 100 % 100}.{code % 100}"


def _driver_version() -> str | None:
    try:
        match = _DRIVER_VERSION.search(Path("/proc/driver/nvidia/version").read_text(encoding="utf-8"))
    except OSError:
        # Another maker's GPU, or a container that does not show it.
        return None
    return match[0] if match else None


def _commit() -> str | None:
    """The commit of the checkout that this file is tracked in; None for an installed library."""
    file = Path(__file__)
    try:
        for command in (["ls-files", "--error-unmatch", file.name], ["rev-parse", "HEAD"], ["diff", "--quiet", "HEAD"]):
            done = subprocess.run(
                ["git", "-C", str(file.parent), *command],
                capture_output=True,
                text=True,
                check=command[0] != "diff",
            )
            if command[0] == "rev-parse":
                commit = done.stdout.strip()
    # No git, no checkout, or one that git does not trust.
    except (OSError, subprocess.CalledProcessError):
        return None
    return commit + ("-dirty" if done.returncode else "")
