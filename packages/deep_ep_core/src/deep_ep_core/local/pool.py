"""Owns the rank pool: ranks that start once and then run many functions, for tests that need several processes.

It does not run user programs; `deep_ep_core.launch` does.
"""

from __future__ import annotations

import contextlib
import os
import pickle
import socket
import sys
import time
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from deep_ep_core.errors import ConfigError, RankFailedError
from deep_ep_core.local.config import Device, LaunchConfig
from deep_ep_core.local.mps import MpsMode
from deep_ep_core.local.processes import RankProcesses
from deep_ep_core.local.worker import (
    HEADER,
    Call,
    FunctionReference,
    Reply,
    encode_message,
    loaded_module_name,
    loads_with_aliases,
)

__all__ = ["Outcome", "RankPool"]

_START_TIMEOUT_S = 180.0
# After a rank failed in `run`, how long the others may take to end by themselves.
_AFTER_FAILURE_S = 10.0
_POLL_S = 0.02
# The ranks import what this process imports, without a PYTHONPATH that their own children would inherit.
_WORKER_PROGRAM = """\
import sys
sys.path[:] = sys.argv[1:]
from deep_ep_core.local.worker import serve
serve()
"""


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """What one call came to on one rank.

    Attributes:
        rank: The rank.
        value: What the function returned.
        error_type_name: Name of the exception's class, or None if it raised none.
        error_message: `str` of the exception.
        error_attributes: Those attributes of the exception that can be pickled.
        traceback_text: Its traceback; of a rank that died, the end of its error output.
        died: Whether the process ended instead of answering.
        exit_code: Its exit code if it died by exiting.
        exit_signal: The signal's name, such as `SIGKILL`, if it died of one.
    """

    rank: int
    value: Any = None
    error_type_name: str | None = None
    error_message: str | None = None
    error_attributes: Mapping[str, Any] = field(default_factory=dict)
    traceback_text: str = ""
    died: bool = False
    exit_code: int | None = None
    exit_signal: str | None = None

    @property
    def is_failure(self) -> bool:
        """Whether the rank raised or died."""
        return self.died or self.error_type_name is not None

    @property
    def summary(self) -> str:
        """The outcome in a few words."""
        if self.died:
            return f"killed by {self.exit_signal}" if self.exit_signal else f"exit code {self.exit_code}"
        return f"{self.error_type_name}: {self.error_message}" if self.is_failure else "returned"


class RankPool:
    """Rank processes on this machine that share a gloo default group and run functions again and again.

    Use it in a `with` block, or call `close`. The ranks never outlive this process, nor the thread that made the
    pool. Their environment is that of the moment when they started. State that a function leaves behind (random
    generators, default dtypes, open groups) stays for the next one; it must not destroy the default group.
    """

    def __init__(
        self,
        num_ranks: int,
        *,
        num_nodes: int = 1,
        timeout_s: float = 120.0,
        num_threads: int = 1,
        device: Device = "cpu",
        mps: MpsMode = "auto",
    ) -> None:
        """Start the ranks and wait until their default group stands.

        Args:
            num_ranks: Number of processes.
            num_nodes: Number of make-believe nodes, see `LaunchConfig`.
            timeout_s: Seconds that a run may take unless it says otherwise.
            num_threads: OMP_NUM_THREADS of a rank, unless the user's environment sets it.
            device: Whether ranks get GPUs, see `LaunchConfig`. The default group is gloo in any case.
            mps: How ranks share a GPU, see `LaunchConfig`. A daemon serves until a rank dies or the pool is closed;
                a restart starts a new one.

        Raises:
            ConfigError: An argument is out of its range, or there is no GPU or MPS as asked.
            RankFailedError: A rank did not come up.
        """
        self._config = LaunchConfig(
            num_ranks=num_ranks, num_nodes=num_nodes, num_threads=num_threads, device=device, mps=mps
        )
        self._timeout_s = timeout_s
        self._processes: RankProcesses | None = None
        self._channels: list[_Channel] = []
        # Which rank broke the pool, and the sentence that says how.
        self._damage: tuple[int, str] | None = None
        self._start()

    def __enter__(self) -> RankPool:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __repr__(self) -> str:
        state = "closed" if self._processes is None else "broken" if self.is_broken else "ready"
        return f"RankPool(num_ranks={self.num_ranks}, num_nodes={self.num_nodes}, {state})"

    @property
    def num_ranks(self) -> int:
        """Number of ranks."""
        return self._config.num_ranks

    @property
    def num_nodes(self) -> int:
        """Number of make-believe nodes."""
        return self._config.num_nodes

    @property
    def pids(self) -> list[int]:
        """Process ids by rank; empty once closed."""
        return [] if self._processes is None else self._processes.pids

    @property
    def is_broken(self) -> bool:
        """Whether a rank died or ran too long, so that only `restart` and `close` are left."""
        self._notice_idle_deaths()
        return self._damage is not None

    def run(self, fn: Callable[..., Any], *args: Any, timeout_s: float | None = None, **kwargs: Any) -> list[Any]:
        """Call `fn(*args, **kwargs)` on every rank and collect what it returns.

        Once a rank raises or dies, the others get a few seconds to end by themselves before they are stopped, which
        breaks the pool.

        Args:
            fn: A function at the top level of a module that has a file, or of an importable module.
            *args: Pickled, the same for every rank.
            timeout_s: Seconds that all ranks together may take; the pool's own number if None. Not passed to `fn`.
            **kwargs: As `args`.

        Returns:
            The results by rank.

        Raises:
            ConfigError: `fn` or the arguments cannot travel to the ranks, or the pool is closed.
            RankFailedError: A rank raised, died or ran too long, or the pool was broken before.
        """
        outcomes = self._run_all(fn, args, kwargs, timeout_s, is_failure_expected=False)
        failed = [outcome for outcome in outcomes.values() if outcome.is_failure]
        if failed:
            raise _failure_error(failed, self.num_ranks)
        return [outcomes[rank].value for rank in range(self.num_ranks)]

    def run_catching(
        self, fn: Callable[..., Any], *args: Any, timeout_s: float | None = None, **kwargs: Any
    ) -> list[Outcome]:
        """As `run`, for calls in which ranks are expected to raise or to die: report every rank, raise for none.

        The ranks that are left may take until the timeout. A rank that died breaks the pool.

        Returns:
            The outcomes by rank.

        Raises:
            ConfigError: As `run`.
            RankFailedError: A rank ran too long, or the pool was broken before.
        """
        outcomes = self._run_all(fn, args, kwargs, timeout_s, is_failure_expected=True)
        return [outcomes[rank] for rank in range(self.num_ranks)]

    def restart(self) -> None:
        """End all ranks and start new ones; a closed pool opens again.

        Raises:
            ConfigError: There is no GPU or MPS any more.
            RankFailedError: A rank did not come up.
        """
        self.close()
        self._start()

    def close(self) -> None:
        """End all ranks. May be called again."""
        processes, self._processes = self._processes, None
        channels, self._channels = self._channels, []
        if processes is not None:
            processes.stop(grace_s=0)
        for channel in channels:
            channel.socket.close()

    def _start(self) -> None:
        pairs = [socket.socketpair() for _ in range(self.num_ranks)]
        try:
            self._channels = [_Channel(ours) for ours, _ in pairs]
            self._processes = RankProcesses(
                self._config, ["-c", _WORKER_PROGRAM, *sys.path], stdins=[theirs for _, theirs in pairs]
            )
            for channel in self._channels:
                self._processes.watch(channel.socket, channel.read_available)
            for _, theirs in pairs:
                # From here on the socket closes when the rank ends.
                theirs.close()
            self._damage = None
            outcomes = self._collect(time.monotonic() + _START_TIMEOUT_S, {}, is_failure_expected=False)
            failed = [outcome for outcome in outcomes.values() if outcome.is_failure]
            if failed:
                raise _failure_error(failed, self.num_ranks)
        except BaseException:
            self.close()
            raise
        finally:
            for _, theirs in pairs:
                theirs.close()

    def _notice_idle_deaths(self) -> None:
        if self._processes is not None and self._damage is None:
            for end in self._processes.poll():
                self._break(end.rank, f"rank {end.rank} ended between runs: {end.how}")

    def _run_all(
        self,
        fn: Callable[..., Any],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        timeout_s: float | None,
        *,
        is_failure_expected: bool,
    ) -> dict[int, Outcome]:
        self._notice_idle_deaths()
        if self._processes is None:
            raise ConfigError("a rank pool must be open to run a function (got a closed one); call restart()")
        if self._damage is not None:
            rank, how = self._damage
            raise RankFailedError(
                f"the pool of {self.num_ranks} ranks is broken, since {how}; call restart()", rank=rank
            )
        reference = _reference(fn)
        message = _encode_call(reference, args, kwargs)
        # Classes of a module that the ranks load from its file come back under that name.
        aliases = {} if reference.path is None else {loaded_module_name(reference.path): reference.module_name}
        deadline = time.monotonic() + (self._timeout_s if timeout_s is None else timeout_s)
        try:
            for channel in self._channels:
                channel.send(message, deadline)
            return self._collect(deadline, aliases, is_failure_expected=is_failure_expected)
        except BaseException as error:
            # Answers to this run may still arrive, so there cannot be another.
            self._break(0, f"{type(error).__name__} interrupted a run")
            raise

    def _collect(self, deadline: float, aliases: Mapping[str, str], *, is_failure_expected: bool) -> dict[int, Outcome]:
        """Wait for one reply of each rank; the outcomes in the order of their arrival."""
        assert self._processes is not None
        processes = self._processes
        started = time.monotonic()
        outcomes: dict[int, Outcome] = {}
        while len(outcomes) < self.num_ranks:
            processes.pump(_POLL_S)
            processes.poll()
            for rank in range(self.num_ranks):
                if rank not in outcomes and (outcome := self._take_outcome(rank, aliases)) is not None:
                    outcomes[rank] = outcome
                    if outcome.is_failure and not is_failure_expected:
                        deadline = min(deadline, time.monotonic() + _AFTER_FAILURE_S)
            if len(outcomes) < self.num_ranks and time.monotonic() > deadline:
                self._give_up(outcomes, time.monotonic() - started, is_failure_expected=is_failure_expected)
        # What the ranks printed before they answered is already in their pipes.
        processes.pump_until_quiet()
        for rank, outcome in outcomes.items():
            if outcome.died:
                self._break(rank, f"rank {rank} died: {outcome.summary}")
        return outcomes

    def _take_outcome(self, rank: int, aliases: Mapping[str, str]) -> Outcome | None:
        assert self._processes is not None
        channel = self._channels[rank]
        end = self._processes.exits.get(rank)
        if end is not None:
            # It may have answered first and died then.
            channel.read_available()
        if (reply := channel.take_reply()) is not None:
            return _outcome_of_reply(rank, reply, aliases)
        if end is None:
            return None
        return Outcome(
            rank=rank,
            died=True,
            exit_code=end.exit_code,
            exit_signal=end.signal_name,
            traceback_text=self._processes.error_tail(rank),
        )

    def _give_up(self, outcomes: Mapping[int, Outcome], elapsed_s: float, *, is_failure_expected: bool) -> None:
        """Stop the ranks that still run, and raise an error that names them."""
        assert self._processes is not None
        late = [rank for rank in range(self.num_ranks) if rank not in outcomes]
        stacks = self._processes.abort_with_stacks(late)
        names = f"{'rank' if len(late) == 1 else 'ranks'} {', '.join(map(str, late))}"
        self._break(late[0], f"{names} ran past the time given")
        still_running = f"{names} still ran after {elapsed_s:.1f} s"
        stack_text = "\n".join(f"stack of rank {rank}:\n{stack}" for rank, stack in stacks.items())
        failed = [outcome for outcome in outcomes.values() if outcome.is_failure]
        if failed and not is_failure_expected:
            raise _failure_error(failed, self.num_ranks, f"{still_running}; all were stopped\n{stack_text}")
        raise RankFailedError(
            f"{still_running}, of {self.num_ranks} ranks; all were stopped. If the work takes that long, give it a "
            f"longer timeout_s.\n{stack_text}",
            rank=late[0],
            traceback_text=stacks[late[0]],
        )

    def _break(self, rank: int, how: str) -> None:
        if self._damage is None and self._processes is not None:
            self._damage = (rank, how)
            self._processes.stop(grace_s=0)


class _Channel:
    """This process's end of the socket to one rank."""

    def __init__(self, ours: socket.socket) -> None:
        self.socket = ours
        self._buffer = bytearray()
        self._replies: deque[Reply] = deque()

    def send(self, message: bytes, deadline: float) -> None:
        """Send, until the deadline at most. A rank that is gone or stuck is found while its reply is awaited."""
        self.socket.settimeout(max(0.1, deadline - time.monotonic()))
        with contextlib.suppress(ConnectionError, TimeoutError):
            self.socket.sendall(message)

    def read_available(self) -> bool:
        """Take what has arrived, without waiting; whether the rank may still send more."""
        self.socket.setblocking(False)
        is_open = True
        with contextlib.suppress(BlockingIOError):
            try:
                while data := self.socket.recv(1 << 20):
                    self._buffer += data
                is_open = False
            except ConnectionError:
                is_open = False
        self._split_replies()
        return is_open

    def _split_replies(self) -> None:
        while len(self._buffer) >= HEADER.size:
            end = HEADER.size + HEADER.unpack_from(self._buffer)[0]
            if len(self._buffer) < end:
                return
            reply = pickle.loads(memoryview(self._buffer)[HEADER.size : end].tobytes())
            assert isinstance(reply, Reply), f"a rank must send replies (got {type(reply).__name__})"
            self._replies.append(reply)
            del self._buffer[:end]

    def take_reply(self) -> Reply | None:
        """The oldest reply that has not been taken."""
        return self._replies.popleft() if self._replies else None


def _reference(fn: Callable[..., Any]) -> FunctionReference:
    module_name, qualified_name = getattr(fn, "__module__", None), getattr(fn, "__qualname__", None)
    if module_name is None or qualified_name is None or "<" in qualified_name:
        raise ConfigError(
            f"a rank pool runs functions at the top level of a module (got {fn!r}); move it there and pass what it "
            "closes over as arguments"
        )
    path = getattr(sys.modules.get(module_name), "__file__", None)
    if path is None and module_name == "__main__":
        raise ConfigError(f"a rank pool runs functions of modules that have a file (got {fn!r}, typed in or from -c)")
    return FunctionReference(
        module_name=module_name,
        path=None if path is None else os.path.abspath(path),
        qualified_name=qualified_name,
    )


def _encode_call(reference: FunctionReference, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bytes:
    try:
        arguments = pickle.dumps((args, kwargs), protocol=pickle.HIGHEST_PROTOCOL)
    except Exception as error:
        raise ConfigError(
            f"the arguments of {reference.qualified_name} must be picklable to reach the ranks (got "
            f"{type(error).__name__}: {error}); build them inside the function"
        ) from error
    return encode_message(Call(function=reference, arguments=arguments))


def _outcome_of_reply(rank: int, reply: Reply, aliases: Mapping[str, str]) -> Outcome:
    error = reply.error
    if error is None:
        try:
            return Outcome(rank=rank, value=loads_with_aliases(reply.value, aliases) if reply.value else None)
        except Exception as unpickling_error:
            return Outcome(
                rank=rank,
                error_type_name=type(unpickling_error).__name__,
                error_message=f"the result of rank {rank} could not be unpickled here: {unpickling_error}",
            )
    attributes = {}
    for name, data in error.attributes.items():
        # A class that only the ranks know is left out.
        with contextlib.suppress(Exception):
            attributes[name] = loads_with_aliases(data, aliases)
    return Outcome(
        rank=rank,
        error_type_name=error.type_name,
        error_message=error.message,
        error_attributes=attributes,
        traceback_text=error.traceback_text,
    )


def _failure_error(failed: list[Outcome], num_ranks: int, note: str = "") -> RankFailedError:
    """The error for the rank that failed first; a death goes before what its peers made of it."""
    first = min(failed, key=lambda outcome: not outcome.died)
    others = "".join(f"\nrank {outcome.rank} too: {outcome.summary}" for outcome in failed if outcome is not first)
    text = first.traceback_text.rstrip() or "(it printed nothing)"
    return RankFailedError(
        f"rank {first.rank} of {num_ranks} failed: {first.summary}\n{text}{others}" + (f"\n{note}" if note else ""),
        rank=first.rank,
        traceback_text=first.traceback_text,
    )
