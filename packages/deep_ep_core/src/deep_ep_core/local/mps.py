"""Owns CUDA's Multi-Process Service (MPS) of a local launch: whether it runs, its daemon, and the daemon's end.

With MPS, kernels of several processes run on one GPU at the same time; without, the GPU serves one process at a time.
This module does not start ranks. Its daemon is private to one launch, in a folder of its own, and serves no second one:
a rank that is killed while its kernel runs leaves a server that refuses all later processes.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from deep_ep_core.errors import ConfigError, DeepEPError

__all__ = ["MPS_VARIABLES", "MpsDaemon", "MpsError", "MpsMode", "open_mps"]

MpsMode = Literal["auto", "on", "off"]

_PIPE, _LOG = "CUDA_MPS_PIPE_DIRECTORY", "CUDA_MPS_LOG_DIRECTORY"
MPS_VARIABLES = (_PIPE, _LOG)

_PROGRAM = "nvidia-cuda-mps-control"
_PID_FILE = "nvidia-cuda-mps-control.pid"
_ASK_S = 5.0
_START_S = 10.0
_QUIT_S = 5.0
_EXIT_S = 5.0
_KILL_S = 3.0
_POLL_S = 0.02
# A socket's path has at most 107 bytes; the daemon's take up to 40 below this folder.
_MAX_BASE_BYTES = 60


class MpsError(DeepEPError):
    """The daemon could not be started, or did not answer; the message is the reason alone."""


def open_mps(mode: MpsMode, *, num_ranks: int, gpus: Sequence[str], environment: Mapping[str, str]) -> MpsDaemon | None:
    """Start a daemon for a launch if it is to have one.

    In mode `auto` a launch has one where ranks share a GPU. If it cannot be started, a line on standard error says
    what that costs, and ranks share the GPU in turns. A daemon that `CUDA_MPS_PIPE_DIRECTORY` leads to is the user's:
    ranks find it by themselves, and it is left alone.

    Args:
        mode: Whether to use MPS.
        num_ranks: Number of ranks of the launch.
        gpus: UUIDs of the GPUs of the launch.
        environment: The user's environment.

    Returns:
        The daemon, which the caller stops, or None if there is none to stop.

    Raises:
        ConfigError: The mode is `on`, and the daemon cannot be started.
    """
    is_shared = num_ranks > len(gpus)
    if mode == "off" or (mode == "auto" and not is_shared) or _users_daemon_answers(environment):
        return None
    try:
        return MpsDaemon(gpus, environment)
    except MpsError as error:
        if mode == "on":
            raise ConfigError(
                f'mps="on" needs an MPS daemon, which does not start (got: {error}); mps="auto" does without it'
            ) from error
        gpu_count = "1 GPU" if len(gpus) == 1 else f"{len(gpus)} GPUs"
        print(
            f"deep_ep_core.local: {num_ranks} ranks share {gpu_count} without MPS ({error}), so each wait for "
            "another rank takes about 2 ms",
            file=sys.stderr,
            flush=True,
        )
        return None


class MpsDaemon:
    """An MPS control daemon with one server, in a fresh folder that nobody else uses.

    Attributes:
        variables: What the environment of a process must hold to use the daemon.
    """

    variables: Mapping[str, str]

    def __init__(self, gpus: Sequence[str], environment: Mapping[str, str]) -> None:
        """Start it and wait until its server runs.

        Args:
            gpus: UUIDs of the GPUs that it serves.
            environment: The user's environment.

        Raises:
            MpsError: It did not start. Nothing is left of it.
        """
        program = shutil.which(_PROGRAM, path=environment.get("PATH"))
        if program is None:
            raise MpsError(f"{_PROGRAM} is not on PATH")
        self._program = program
        self._members: set[_Process] = set()
        self._is_stopped = False
        self._folder = Path(tempfile.mkdtemp(prefix="mps-", dir=_short_temporary_folder()))
        self.variables = {_PIPE: str(self._folder / "pipe"), _LOG: str(self._folder / "log")}
        self._environment = {**environment, **self.variables, "CUDA_VISIBLE_DEVICES": ",".join(gpus)}
        try:
            self._start()
        except BaseException:
            self.stop()
            raise

    def __repr__(self) -> str:
        return f"MpsDaemon({str(self._folder)!r}, {'stopped' if self._is_stopped else 'running'})"

    def stop(self) -> None:
        """Quit the daemon, kill what is left of it, and remove its folder. May be called again.

        All its clients must have ended. Takes some seconds at most, whatever the daemon does.
        """
        if self._is_stopped:
            return
        self._is_stopped = True
        # In `finally`: a second Ctrl-C hurries the end and prevents nothing.
        try:
            self._note_members()
            with contextlib.suppress(MpsError):
                self._ask("quit", timeout_s=_QUIT_S)
                _wait_for_exits(self._members, _EXIT_S)
        finally:
            try:
                self._kill()
            finally:
                shutil.rmtree(self._folder, ignore_errors=True)

    def _start(self) -> None:
        for folder in self.variables.values():
            os.mkdir(folder)
        deadline = time.monotonic() + _START_S
        try:
            _call([self._program, "-d"], "", self._environment, _START_S)
            # The server would start with the first client, but then that client pays, and its failure is the rank's.
            while True:
                try:
                    self._ask(f"start_server -uid {os.getuid()}", timeout_s=_START_S)
                    break
                except MpsError:
                    # The daemon may not listen yet.
                    if time.monotonic() > deadline:
                        raise
                    time.sleep(5 * _POLL_S)
            while not (servers := self._servers()):
                if time.monotonic() > deadline:
                    raise MpsError(f"no MPS server within {_START_S:g} s")
                time.sleep(_POLL_S)
        except MpsError as error:
            said = [_last_line(Path(self.variables[_LOG]) / name) for name in ("control.log", "server.log")]
            raise MpsError("; ".join([str(error), *filter(None, said)])) from None
        self._members.update(servers)
        self._note_members()

    def _ask(self, command: str, timeout_s: float = _ASK_S) -> str:
        return _call([self._program], command, self._environment, timeout_s)

    def _servers(self) -> list[_Process]:
        words = self._ask("get_server_list").split()
        return [process for word in words if word.isdecimal() and (process := _find_process(int(word))) is not None]

    def _note_members(self) -> None:
        """Remember the daemon and its children by process id: it starts a new server when one is gone."""
        with contextlib.suppress(OSError, ValueError):
            daemon = _find_process(int((Path(self.variables[_PIPE]) / _PID_FILE).read_text(encoding="ascii")))
            if daemon is not None:
                self._members |= {daemon, *_children_of(daemon.pid)}

    def _kill(self) -> None:
        self._note_members()
        for process in self._members:
            if process.is_alive():
                with contextlib.suppress(ProcessLookupError, PermissionError):
                    os.kill(process.pid, signal.SIGKILL)
        _wait_for_exits(self._members, _KILL_S)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Process:
    """A process; its start tells it from a later one with the same id."""

    pid: int
    start_ticks: int

    def is_alive(self) -> bool:
        return _find_process(self.pid) == self


def _users_daemon_answers(environment: Mapping[str, str]) -> bool:
    program = shutil.which(_PROGRAM, path=environment.get("PATH"))
    if program is None or not environment.get(_PIPE):
        return False
    try:
        _call([program], "get_server_list", environment, _ASK_S)
    except MpsError:
        return False
    return True


def _call(command: Sequence[str], text: str, environment: Mapping[str, str], timeout_s: float) -> str:
    """Run the control program with one line of input; its output."""
    # A file, not a pipe: the daemon inherits it, and a pipe would have no end before the daemon's.
    with tempfile.TemporaryFile() as output:
        process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=output,
            stderr=subprocess.STDOUT,
            env=environment,
            # Ctrl-C at a terminal is for the launcher.
            start_new_session=True,
        )
        try:
            assert process.stdin is not None
            with contextlib.suppress(BrokenPipeError), process.stdin:
                process.stdin.write(f"{text}\n".encode() if text else b"")
            return_code = process.wait(timeout_s)
        except subprocess.TimeoutExpired:
            raise MpsError(f"`{text or _PROGRAM + ' -d'}` got no answer within {timeout_s:g} s") from None
        finally:
            if process.poll() is None:
                process.kill()
                with contextlib.suppress(subprocess.TimeoutExpired):
                    process.wait(1)
        output.seek(0)
        said = output.read().decode(errors="backslashreplace").strip()
    if return_code != 0 or said.startswith("Cannot find MPS"):
        raise MpsError(f"`{text or _PROGRAM + ' -d'}` failed: {said or f'exit code {return_code}'}")
    return said


def _short_temporary_folder() -> str:
    folder = tempfile.gettempdir()
    return folder if len(os.fsencode(folder)) <= _MAX_BASE_BYTES else "/tmp"


def _last_line(path: Path) -> str:
    try:
        lines = path.read_text(encoding="utf-8", errors="backslashreplace").splitlines()
    except OSError:
        return ""
    return lines[-1] if lines else ""


def _find_process(pid: int) -> _Process | None:
    """The process with that id, unless it has ended; a zombie has."""
    fields = _read_stat(Path(f"/proc/{pid}/stat"))
    return _Process(pid=pid, start_ticks=int(fields[19])) if fields and fields[0] not in "ZX" else None


def _children_of(parent_pid: int) -> list[_Process]:
    found = []
    for path in Path("/proc").glob("[0-9]*/stat"):
        fields = _read_stat(path)
        if fields and int(fields[1]) == parent_pid and (child := _find_process(int(path.parent.name))) is not None:
            found.append(child)
    return found


def _read_stat(path: Path) -> list[str]:
    """State, parent and all that follows the name, which may hold blanks itself; empty if the process is gone."""
    try:
        return path.read_text(encoding="utf-8", errors="replace").rpartition(")")[2].split()
    except OSError:
        return []


def _wait_for_exits(processes: Iterable[_Process], timeout_s: float) -> None:
    deadline = time.monotonic() + timeout_s
    while any(process.is_alive() for process in processes) and time.monotonic() < deadline:
        time.sleep(_POLL_S)
