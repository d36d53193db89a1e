"""Owns the rank processes of one local launch: their start, their output and their end.

It does not decide what a rank runs, nor what a failure means: the launcher and the rank pool do. What a rank finds in
its environment is in `deep_ep_core.local.config`.

Ranks must not outlive the process that started them. Each one is started through a small wrapper that asks the kernel
for a SIGKILL at the death of the starter (`PR_SET_PDEATHSIG`) and then executes the rank. The other way, a thread in
each rank that watches a pipe, would need code inside the user's script, and does not run while the rank holds the
interpreter lock or is stopped. What a rank started itself is ended by `stop`, with the rank's session, but not when the
starter is killed outright. An MPS daemon of the launch starts before the first rank and ends after the last, in `stop`.
"""

from __future__ import annotations

import contextlib
import os
import resource
import selectors
import signal
import socket
import subprocess
import sys
import time
import warnings
from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

from deep_ep_core.errors import CompileError, ConfigError
from deep_ep_core.local.config import LOOPBACK_ADDRESS, LaunchConfig, rank_environment
from deep_ep_core.local.gpus import find_gpus
from deep_ep_core.local.mps import MPS_VARIABLES, MpsDaemon, open_mps
from deep_ep_core.loopback import loopback_variables

__all__ = ["RankExit", "RankProcesses", "forward_line"]

_MAX_TAIL_LINES = 200
_STACK_WAIT_S = 5.0
_REAP_WAIT_S = 10.0
_DRAIN_WAIT_S = 1.0
_POLL_S = 0.02
# What faulthandler prints first when it handles SIGABRT.
_STACK_HEADING = "Fatal Python error: Aborted"

# Runs before the rank's own program, in the same process. 1 is PR_SET_PDEATHSIG, 9 is SIGKILL. The starter may have
# died before the call took effect, which the changed parent shows.
_EXEC_WRAPPER = """\
import ctypes, os, sys
libc = ctypes.CDLL(None, use_errno=True)
if libc.prctl(1, ctypes.c_ulong(9), ctypes.c_ulong(0), ctypes.c_ulong(0), ctypes.c_ulong(0)) != 0:
    sys.exit("prctl(PR_SET_PDEATHSIG) failed: " + os.strerror(ctypes.get_errno()))
if os.getppid() != int(sys.argv[1]):
    os._exit(1)
os.execv(sys.argv[2], sys.argv[2:])
"""

LineHandler = Callable[[int, bool, str], None]


@dataclass(frozen=True, slots=True, kw_only=True)
class RankExit:
    """How a rank process ended.

    Attributes:
        rank: The rank.
        return_code: Its exit code; -n if signal n killed it, as in `subprocess`.
    """

    rank: int
    return_code: int

    @property
    def is_failure(self) -> bool:
        """Whether the rank ended otherwise than with exit code 0."""
        return self.return_code != 0

    @property
    def exit_code(self) -> int | None:
        """The exit code, or None if a signal killed the rank."""
        return self.return_code if self.return_code >= 0 else None

    @property
    def signal_name(self) -> str | None:
        """Name of the signal that killed the rank, such as `SIGKILL`, or None."""
        if self.return_code >= 0:
            return None
        try:
            return signal.Signals(-self.return_code).name
        # Real-time signals have no name.
        except ValueError:
            return f"signal {-self.return_code}"

    @property
    def how(self) -> str:
        """The end in words: `exit code 3` or `killed by SIGKILL`."""
        return f"exit code {self.return_code}" if self.return_code >= 0 else f"killed by {self.signal_name}"


def forward_line(rank: int, is_error: bool, line: str, *, has_prefix: bool = True) -> None:
    """Print one output line of a rank to the same stream of this process, and flush it."""
    stream = sys.stderr if is_error else sys.stdout
    # What this process cannot print must not end the launch.
    encoding = getattr(stream, "encoding", None) or "utf-8"
    line = line.encode(encoding, "backslashreplace").decode(encoding)
    stream.write(f"[rank {rank}] {line}\n" if has_prefix else f"{line}\n")
    stream.flush()


class RankProcesses:
    """The processes of one launch, each in a session of its own, watched from the thread that made them.

    There is no background thread: output moves only inside `pump` and the calls that pump. The kernel kills the ranks
    when the thread that constructed the object ends, so construct it in one that lasts, such as the main thread.
    """

    def __init__(
        self,
        config: LaunchConfig,
        command: Sequence[str],
        *,
        on_line: LineHandler = forward_line,
        stdins: Sequence[socket.socket] | None = None,
    ) -> None:
        """Start every rank with `command`, then host the rendezvous store.

        Args:
            config: The launch.
            command: Arguments for this interpreter, the same for every rank.
            on_line: Called as `on_line(rank, is_error, line)` for each output line, without its newline.
            stdins: Standard input of each rank, by rank; an empty input if None.

        Raises:
            ConfigError: The launch needs a GPU or MPS, and there is none.
        """
        self._selector = selectors.DefaultSelector()
        self._processes: list[subprocess.Popen[bytes]] = []
        self._exits: dict[int, RankExit] = {}
        self._open_pipes = [0] * config.num_ranks
        self._tails: list[deque[str]] = [deque(maxlen=_MAX_TAIL_LINES) for _ in range(config.num_ranks)]
        self._stacks: dict[int, list[str]] = {}
        self._on_line = on_line
        self._store: object = None
        self._mps: MpsDaemon | None = None
        self._is_stopped = False
        # The port is known as soon as the socket listens, so the ranks can start while this process imports torch;
        # a rank that connects early waits in the backlog.
        listener = socket.create_server((LOOPBACK_ADDRESS, 0), backlog=max(128, 2 * config.num_ranks))
        try:
            with listener:
                port = listener.getsockname()[1]
                gpus, base = self._prepare_gpus(config)
                for rank in range(config.num_ranks):
                    environment = rank_environment(config, rank, master_port=port, base=base, gpus=gpus)
                    self._start(rank, command, environment, subprocess.DEVNULL if stdins is None else stdins[rank])
                self._store = _host_store(listener, port)
        except BaseException:
            self.stop(grace_s=0)
            raise

    def __enter__(self) -> RankProcesses:
        return self

    def __exit__(self, *_: object) -> None:
        self.stop(grace_s=0)

    @property
    def pids(self) -> list[int]:
        """Process ids by rank."""
        return [process.pid for process in self._processes]

    @property
    def running(self) -> list[int]:
        """The ranks that had not ended at the last `poll`."""
        return [rank for rank in range(len(self._processes)) if rank not in self._exits]

    @property
    def exits(self) -> Mapping[int, RankExit]:
        """How each rank that was seen to end did end, by rank, in the order in which they were seen."""
        return self._exits

    def watch(self, source: socket.socket, on_readable: Callable[[], bool]) -> None:
        """Let `pump` wait on one more source, until `on_readable` returns False: the source is at its end."""
        self._selector.register(source, selectors.EVENT_READ, on_readable)

    def pump(self, timeout_s: float) -> bool:
        """Handle the output that has arrived; wait up to `timeout_s` seconds for the first of it.

        Returns:
            Whether there was any.
        """
        ready = self._selector.select(timeout_s)
        for key, _ in ready:
            if not key.data():
                self._selector.unregister(key.fileobj)
        return bool(ready)

    def pump_until_quiet(self) -> None:
        """Handle all output that has arrived, for one second at most if it keeps coming."""
        deadline = time.monotonic() + _DRAIN_WAIT_S
        while self.pump(0) and time.monotonic() < deadline:
            pass

    def poll(self) -> list[RankExit]:
        """The ranks that ended since the last call; of several, those that a signal killed come first."""
        ended = [end for rank in self.running if (end := self._peek_exit(rank)) is not None]
        ended.sort(key=lambda end: end.return_code >= 0)
        self._exits.update((end.rank, end) for end in ended)
        return ended

    def error_tail(self, rank: int) -> str:
        """The last lines of the rank's error output; complete once the rank has ended."""
        deadline = time.monotonic() + _DRAIN_WAIT_S
        while rank in self._exits and self._open_pipes[rank] and time.monotonic() < deadline:
            self.pump(_POLL_S)
        return "\n".join(self._tails[rank])

    def abort_with_stacks(self, ranks: Iterable[int]) -> dict[int, str]:
        """Let ranks print their Python stacks and die of SIGABRT.

        Returns:
            The stacks of all threads, by rank, or a sentence that says why there is none. They are not passed to
            `on_line`.
        """
        self._stacks = {rank: [] for rank in ranks}
        for rank in self._stacks:
            pid = self._processes[rank].pid
            with contextlib.suppress(OSError):
                # This death is wanted, so it leaves no core file.
                resource.prlimit(pid, resource.RLIMIT_CORE, (0, 0))
            self._signal(pid, signal.SIGABRT, os.kill)
        self._wait_for_exits(self._stacks, _STACK_WAIT_S)
        for rank in self._stacks:
            self.error_tail(rank)
        return {
            rank: "\n".join(lines[1:]).strip() or "(it printed no stack: it was stopped, or had not started Python yet)"
            for rank, lines in self._stacks.items()
        }

    def stop(self, *, grace_s: float = 3.0) -> None:
        """End every rank and all processes of its session, and reap them, then an MPS daemon. May be called again.

        Args:
            grace_s: Seconds between SIGTERM and SIGKILL; 0 sends only SIGKILL.
        """
        try:
            if grace_s > 0 and not self._is_stopped:
                self.poll()
                for rank in self.running:
                    self._signal(self._processes[rank].pid, signal.SIGTERM, os.killpg)
                self._wait_for_exits(self.running, grace_s)
        finally:
            try:
                self._kill_and_reap()
            finally:
                # After the ranks, which are its clients.
                if self._mps is not None:
                    self._mps.stop()

    def _prepare_gpus(self, config: LaunchConfig) -> tuple[Sequence[str], Mapping[str, str]]:
        """The GPUs of the launch and the environment to start ranks from, once an MPS daemon runs if there is one."""
        base = dict(os.environ)
        if config.device != "cuda":
            return (), base
        gpus = find_gpus(base)
        self._mps = open_mps(config.mps, num_ranks=config.num_ranks, gpus=gpus, environment=base)
        if config.mps == "off":
            for name in MPS_VARIABLES:
                base.pop(name, None)
        elif self._mps is not None:
            base.update(self._mps.variables)
        if config.num_nodes > 1:
            base.update(_network_variables(base))
        return gpus, base

    def _start(
        self, rank: int, command: Sequence[str], environment: Mapping[str, str], stdin: int | socket.socket
    ) -> None:
        # -I and -S: the wrapper needs nothing but the standard library, and must not run the user's site hooks.
        wrapper = [sys.executable, "-I", "-S", "-c", _EXEC_WRAPPER, str(os.getpid()), sys.executable]
        process = subprocess.Popen(
            [*wrapper, *command],
            env=environment,
            stdin=stdin if isinstance(stdin, int) else stdin.fileno(),
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            bufsize=0,
            start_new_session=True,
        )
        self._processes.append(process)
        assert process.stdout is not None
        assert process.stderr is not None
        for pipe, is_error in ((process.stdout, False), (process.stderr, True)):
            rest = bytearray()
            self._selector.register(
                pipe, selectors.EVENT_READ, partial(self._read_lines, rank, pipe.fileno(), is_error, rest)
            )
            self._open_pipes[rank] += 1

    def _read_lines(self, rank: int, fd: int, is_error: bool, rest: bytearray) -> bool:
        data = os.read(fd, 1 << 16)
        is_open = bool(data)
        if not is_open:
            self._open_pipes[rank] -= 1
            # Ends a last line that has no newline.
            data = b"\n" if rest else b""
        rest += data
        *lines, last = bytes(rest).split(b"\n")
        rest[:] = last
        for line in lines:
            self._take_line(rank, is_error, line.decode(errors="backslashreplace"))
        return is_open

    def _take_line(self, rank: int, is_error: bool, line: str) -> None:
        stack = self._stacks.get(rank)
        if is_error and stack is not None and (stack or line.startswith(_STACK_HEADING)):
            # faulthandler ends with a long list of extension modules, which tells nothing about a hang.
            if not line.startswith("Extension modules:"):
                stack.append(line)
            return
        if is_error:
            self._tails[rank].append(line)
        self._on_line(rank, is_error, line)

    def _peek_exit(self, rank: int) -> RankExit | None:
        # WNOWAIT leaves a zombie until `stop`, so that the process group's id cannot be reused before it is killed.
        pid = self._processes[rank].pid
        info = os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT)
        if info is None:
            return None
        return RankExit(rank=rank, return_code=info.si_status if info.si_code == os.CLD_EXITED else -info.si_status)

    def _wait_for_exits(self, ranks: Iterable[int], timeout_s: float) -> None:
        pending = set(ranks)
        deadline = time.monotonic() + timeout_s
        while pending - self._exits.keys() and time.monotonic() < deadline:
            self.pump(_POLL_S)
            self.poll()

    def _kill_and_reap(self) -> None:
        if self._is_stopped:
            return
        self._is_stopped = True
        for process in self._processes:
            self._signal(process.pid, signal.SIGKILL, os.killpg)
        # Only a rank that hangs inside a driver call can outlast SIGKILL; nothing more can be done about it here.
        deadline = time.monotonic() + _REAP_WAIT_S
        while self.running and time.monotonic() < deadline:
            self.poll()
            time.sleep(_POLL_S / 4)
        for rank in self._exits:
            self._processes[rank].wait()
        try:
            for rank in range(len(self._processes)):
                self.error_tail(rank)
        finally:
            self._open_pipes = [0] * len(self._open_pipes)
            self._selector.close()
            for process in self._processes:
                for pipe in (process.stdout, process.stderr):
                    if pipe is not None:
                        pipe.close()
            self._store = None

    @staticmethod
    def _signal(pid: int, number: signal.Signals, send: Callable[[int, int], None]) -> None:
        with contextlib.suppress(ProcessLookupError):
            send(pid, number)


def _network_variables(environment: Mapping[str, str]) -> dict[str, str]:
    """What lets make-believe nodes reach each other; without it, work that needs no network still runs."""
    try:
        return loopback_variables(environment)
    except (CompileError, ConfigError) as error:
        warnings.warn(f"there is no network between the make-believe nodes: {error}", RuntimeWarning, stacklevel=2)
        return {}


def _host_store(listener: socket.socket, port: int) -> object:
    """The rendezvous store, which serves for as long as the object lives."""
    import torch.distributed as dist

    return dist.TCPStore(  # type: ignore[attr-defined]  # torch exports it, but not by name
        LOOPBACK_ADDRESS, port, is_master=True, wait_for_workers=False, master_listen_fd=listener.detach()
    )
