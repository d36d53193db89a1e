"""Owns the records of the benchmark, and the facts about the machine in them.

A value that is not known is None, in JSON null; none is made up.
"""

from __future__ import annotations

import dataclasses
import json
import platform
import subprocess
from dataclasses import dataclass
from pathlib import Path

import torch

from deep_ep_core.errors import TransportError
from deep_ep_core.nccl import load_nccl
from deep_ep_pp.bench.measure import STEPS_PER_ROUND, Spread
from deep_ep_pp.bench.tasks import Case

__all__ = ["Machine", "Record", "make_record", "read_machine"]

_MS_PER_S = 1e3
_BYTES_PER_GB = 1e9
_DRIVER_VERSION_FILE = Path("/sys/module/nvidia/version")


@dataclass(frozen=True, slots=True, kw_only=True)
class Machine:
    """What a run stands on.

    Attributes:
        device: Name of the GPU or of the processor.
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


def read_machine(device: torch.device) -> Machine:
    """Look up the facts about this rank's machine. Collective: no."""
    is_cuda = device.type == "cuda"
    return Machine(
        device=torch.cuda.get_device_name(device) if is_cuda else platform.processor() or platform.machine() or None,
        driver=_driver_version() if is_cuda else None,
        nccl=_nccl_version() if is_cuda else None,
        torch=str(torch.__version__),
        commit=_commit_of(Path(__file__)),
    )


def _nccl_version() -> str:
    try:
        code = load_nccl().version
    except TransportError:
        # Too old for windows, as that of torch may be.
        return ".".join(map(str, torch.cuda.nccl.version()))
    return f"{code // 10000}.{code // 100 % 100}.{code % 100}"


def _driver_version() -> str | None:
    try:
        return _DRIVER_VERSION_FILE.read_text(encoding="ascii").strip()
    # Another maker's GPU, or a container that does not see the file.
    except OSError:
        return None


def _commit_of(file: Path) -> str | None:
    """The commit of the checkout that a file is tracked in; None for a file that is not."""
    try:
        for command in (["ls-files", "--error-unmatch", file.name], ["describe", "--always", "--abbrev=40", "--dirty"]):
            # A tag that happens to be there would stand in for the hash.
            options = ["--exclude=*"] if command[0] == "describe" else []
            done = subprocess.run(
                ["git", "-C", str(file.parent), *command, *options], capture_output=True, text=True, check=True
            )
    # No git, no checkout, or one that git does not trust.
    except (OSError, subprocess.CalledProcessError):
        return None
    return done.stdout.strip()
