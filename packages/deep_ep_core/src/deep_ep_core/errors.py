"""Owns the error tree of every deep-ep package. It does not decide when to raise: checks live next to the public call.

    DeepEPError
    ├── ConfigError(ValueError)             an argument, a setting or a file is not what it must be
    │   └── RankMismatchError               ranks that must agree passed different arguments
    ├── TopologyError                       the ranks cannot be laid out as asked
    ├── CompileError                        a kernel did not compile
    ├── TransportError                      a communication call failed
    │   └── CommTimeoutError(TimeoutError)  a peer did not arrive in time, or died
    └── RankFailedError                     a rank that the local launcher started ended badly

Every message says what must hold, what came, on which rank, and what to do.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

__all__ = [
    "CommTimeoutError",
    "CompileError",
    "ConfigError",
    "DeepEPError",
    "RankFailedError",
    "RankMismatchError",
    "TopologyError",
    "TransportError",
]


class DeepEPError(Exception):
    """Base of every error that the deep-ep packages raise on purpose.

    All of them survive pickling and copying with their message and attributes, so they may cross processes.
    """

    def __reduce__(self) -> tuple[Any, ...]:
        # The way of BaseException calls the class with the message alone, which lacks what a subclass asks for.
        return _rebuild, (type(self), self.args), self.__dict__


def _rebuild(error_type: type[DeepEPError], args: tuple[object, ...]) -> DeepEPError:
    error = error_type.__new__(error_type)
    error.args = args
    return error


class ConfigError(DeepEPError, ValueError):
    """An argument, an environment variable or a configuration file is not what it must be."""


class RankMismatchError(ConfigError):
    """Ranks that must pass the same value passed different ones.

    Raised on every rank of the group, before any payload moves.

    Attributes:
        field: Name of the argument that differs.
        values: The value that each rank passed, by rank.
    """

    def __init__(self, message: str, *, field: str, values: Sequence[object]) -> None:
        super().__init__(message)
        self.field = field
        self.values = tuple(values)


class TopologyError(DeepEPError):
    """The ranks of the group cannot be laid out as asked, for example nodes of unequal size."""


class CompileError(DeepEPError):
    """A kernel did not compile.

    Attributes:
        command: The compiler command, or the option list of NVRTC.
        log: What the compiler printed.
        source_path: Where the source that failed was kept, or None.
    """

    def __init__(self, message: str, *, command: str, log: str, source_path: str | None = None) -> None:
        super().__init__(message)
        self.command = command
        self.log = log
        self.source_path = source_path


class TransportError(DeepEPError):
    """A communication call failed for a reason other than a late peer.

    Attributes:
        call: Name of the call, for example `ncclCommWindowRegister`.
        code_name: Symbolic name of its error code, or an empty string.
    """

    def __init__(self, message: str, *, call: str = "", code_name: str = "") -> None:
        super().__init__(message)
        self.call = call
        self.code_name = code_name


class CommTimeoutError(TransportError, TimeoutError):
    """A peer did not arrive in time, or died.

    Attributes:
        phase: What this rank was doing, for example `dispatch #12: payload`.
        rank: This rank.
        peers: The ranks that are late, dead, or gave up for a reason of their own; never empty.
        expected: What this rank waited for, or None.
        seen: What it saw instead, or None.
        reports: What each rank that could still be asked said of itself, by rank.
    """

    def __init__(
        self,
        message: str,
        *,
        phase: str,
        rank: int,
        peers: Sequence[int],
        expected: int | None = None,
        seen: int | None = None,
        reports: Mapping[int, str] | None = None,
    ) -> None:
        super().__init__(message, call=phase)
        self.phase = phase
        self.rank = rank
        self.peers = tuple(peers)
        self.expected = expected
        self.seen = seen
        self.reports = dict(reports or {})


class RankFailedError(DeepEPError):
    """A rank that the local launcher started raised, died, or ran past the deadline.

    Attributes:
        rank: The rank that failed first.
        traceback_text: Its traceback or the end of its error output.
    """

    def __init__(self, message: str, *, rank: int, traceback_text: str = "") -> None:
        super().__init__(message)
        self.rank = rank
        self.traceback_text = traceback_text
