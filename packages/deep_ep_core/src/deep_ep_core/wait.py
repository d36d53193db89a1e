"""Owns what the host knows of device waits: their timeouts, and the record that the first one to expire leaves behind.

The waits themselves are in the device headers `comm/deadline.cuh` and those that include it. Looking for a record costs
no CUDA call, so it may be done before every operation and inside every loop that waits on the host.
"""

from __future__ import annotations

import ctypes
import math
import threading
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from deep_ep_core.errors import CommTimeoutError, ConfigError
from deep_ep_core.jit.structs import Int32, ParamsStruct, Pointer, UInt32, UInt64

__all__ = ["TimeoutLog", "TimeoutRecord", "TimeoutReport", "WaitParams", "timeout_to_ns"]

_RECORD_WHOLE = 1
_NS_PER_S = 1_000_000_000
# Device code compares durations as signed integers of 64 bits.
_MAX_TIMEOUT_NS = 2**63 - 1


class TimeoutRecord(ParamsStruct):
    """What a wait writes when it expires; mirror of the struct in `comm/timeout_record.cuh`."""

    __slots__ = ()
    cuda_name = "deep_ep_core::comm::TimeoutRecord"
    _fields_ = (
        ("state", UInt32),
        ("phase", UInt32),
        ("rank", Int32),
        ("peer", Int32),
        ("expected", UInt64),
        ("seen", UInt64),
        ("waited_ns", UInt64),
    )


class WaitParams(ParamsStruct):
    """The part of a kernel's parameters that its waits need; mirror of the struct in `comm/timeout_record.cuh`."""

    __slots__ = ()
    cuda_name = "deep_ep_core::comm::WaitParams"
    _fields_ = (
        ("record", Pointer),
        ("has_expired", Pointer),
        ("timeout_ns", UInt64),
        ("first_phase", UInt32),
        ("rank", Int32),
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class TimeoutReport:
    """A record as the host reads it; kernels also use records for what is wrong without any wait.

    Attributes:
        phase_idx: Number of the phase, from `TimeoutLog.add_phases`.
        phase: Its name.
        rank: The rank that waited.
        peer: The rank that it waited for.
        expected: What was waited for.
        seen: What was there.
        waited_ns: How long the wait was.
    """

    phase_idx: int
    phase: str
    rank: int
    peer: int
    expected: int
    seen: int
    waited_ns: int


def timeout_to_ns(timeout_s: float) -> int:
    """A timeout as device code takes it.

    Args:
        timeout_s: Seconds, above 0.

    Raises:
        ConfigError: It is not, or it is more than 292 years.
    """
    # Written so that NaN fails too; a timeout that rounds to 0 ns would expire at once.
    if not 0 < timeout_s * _NS_PER_S <= _MAX_TIMEOUT_NS or math.ceil(timeout_s * _NS_PER_S) > _MAX_TIMEOUT_NS:
        raise ConfigError(
            f"a timeout must be above 0 and at most {_MAX_TIMEOUT_NS // _NS_PER_S} seconds (got {timeout_s})"
        )
    return math.ceil(timeout_s * _NS_PER_S)


class TimeoutLog:
    """Where the kernels of one rank report the first wait that expired.

    One log serves all kernels of a buffer. Once a wait has expired, all other waits of the log's kernels end within
    about 0.1 ms, in kernels launched later too, until `reset`; what these kernels produce is not to be used. The CUDA
    context stays as it was.

    Keep the log as long as kernels that were given its `params` may run. Safe to use from several threads.

    Args:
        rank: This rank, in the group.
        device: Device that the kernels run on. On the CPU the log is ordinary memory, for tests.

    Attributes:
        rank: This rank.
        device: Device that the kernels run on.

    Collective: no.
    """

    def __init__(self, *, rank: int, device: torch.device) -> None:
        self.rank = rank
        self.device = device
        is_cuda = device.type == "cuda"
        # Pinned memory has the same address on the device: all GPUs of a process share its address space.
        # Tensors that are made in inference mode could not be reset outside of it.
        with torch.inference_mode(False):
            self._record_bytes = torch.zeros(ctypes.sizeof(TimeoutRecord), dtype=torch.uint8, pin_memory=is_cuda)
            self._has_expired = torch.zeros(1, dtype=torch.int32, device=device)
        self._record = TimeoutRecord.from_address(self._record_bytes.data_ptr())
        if is_cuda:
            # Kernels of any stream may look at it.
            torch.cuda.current_stream(device).synchronize()
        self._phases: list[str] = []
        self._first_phases: dict[tuple[str, ...], int] = {}
        self._lock = threading.Lock()

    def add_phases(self, names: Sequence[str]) -> int:
        """Make the phases of a kernel known; the same names again give the same number.

        Args:
            names: What the kernel does while it waits, in the order in which its code counts its phases.

        Returns:
            The number of the first one, for `params`.
        """
        key = tuple(names)
        with self._lock:
            if key not in self._first_phases:
                self._first_phases[key] = len(self._phases)
                self._phases += names
            return self._first_phases[key]

    def params(self, *, first_phase: int, timeout_s: float) -> WaitParams:
        """The part of a kernel's parameters that its waits need.

        Args:
            first_phase: Number of the kernel's first phase, from `add_phases`.
            timeout_s: How long each single wait may take, in seconds.

        Raises:
            ConfigError: The timeout is not above 0.
        """
        return WaitParams(
            record=self._record_bytes.data_ptr(),
            has_expired=self._has_expired.data_ptr(),
            timeout_ns=timeout_to_ns(timeout_s),
            first_phase=first_phase,
            rank=self.rank,
        )

    @property
    def has_record(self) -> bool:
        """Whether a wait has expired. Reads one word of host memory; no CUDA call."""
        return bool(self._record.state == _RECORD_WHOLE)

    def check(self) -> None:
        """Raise if a wait has expired, again at every call until `reset`. No CUDA call.

        A kernel that still runs may expire later: behind a synchronisation, `check` tells of all that ran before.

        Raises:
            CommTimeoutError: It names the phase, this rank, the rank that did not come, and what was expected and seen.
        """
        report = self.read()
        if report is None:
            return
        raise CommTimeoutError(
            f"{report.phase}: rank {report.rank} waited {report.waited_ns / _NS_PER_S:.3g} s for rank {report.peer}, "
            f"which must come to {report.expected} and was at {report.seen}; see what stopped rank {report.peer}, or "
            "raise the timeout if it was only slow. What was under way is lost: make the buffer anew on all ranks, or "
            "stop",
            phase=report.phase,
            rank=report.rank,
            peers=[report.peer],
            expected=report.expected,
            seen=report.seen,
        )

    def read(self) -> TimeoutReport | None:
        """What the first wait that expired left behind, or None. No CUDA call."""
        # The device wrote the state last, with a release. The members are read thousands of instructions after it.
        record = self._record
        if record.state != _RECORD_WHOLE:
            return None
        return TimeoutReport(
            phase_idx=record.phase,
            phase=self._phases[record.phase] if record.phase < len(self._phases) else f"phase {record.phase}",
            rank=record.rank,
            peer=record.peer,
            expected=record.expected,
            seen=record.seen,
            waited_ns=record.waited_ns,
        )

    def reset(self) -> None:
        """Forget the wait that expired, so that kernels wait again. What flags hold, here and at peers, stays as it is.

        Stream: the host waits for the whole device. Collective: no.
        """
        self._synchronize()
        ctypes.memset(ctypes.addressof(self._record), 0, ctypes.sizeof(TimeoutRecord))
        self._has_expired.zero_()
        self._synchronize()

    def _synchronize(self) -> None:
        # Every wait has a deadline, so this ends.
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def __repr__(self) -> str:
        state = "a wait has expired" if self.has_record else "no wait has expired"
        return f"TimeoutLog(rank {self.rank}, {self.device}, {state})"
