"""Owns what runs inside a rank: the loop that serves a rank pool, its messages, and `run_as_script`.

It does not start or stop processes.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import importlib.util
import io
import os
import pickle
import socket
import struct
import sys
import traceback
import zlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

from deep_ep_core.errors import ConfigError

__all__ = [
    "HEADER",
    "Call",
    "ErrorReport",
    "FunctionReference",
    "Reply",
    "encode_message",
    "loaded_module_name",
    "loads_with_aliases",
    "run_as_script",
    "serve",
]

# Length of the pickle that follows, in bytes.
HEADER = struct.Struct("<Q")


@dataclass(frozen=True, slots=True, kw_only=True)
class FunctionReference:
    """Where a rank finds a module-level function.

    Attributes:
        module_name: Name of its module in the process that asks.
        path: File of that module, or None for a module without one, which must be importable by name.
        qualified_name: Its `__qualname__`.
    """

    module_name: str
    path: str | None
    qualified_name: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Call:
    """One request to a rank; `arguments` is the pickle of `(args, kwargs)`."""

    function: FunctionReference
    arguments: bytes


@dataclass(frozen=True, slots=True, kw_only=True)
class ErrorReport:
    """An exception as text; `attributes` holds the pickle of each of its attributes that has one."""

    type_name: str
    message: str
    attributes: Mapping[str, bytes]
    traceback_text: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Reply:
    """The answer to a call, or the sign that the rank is ready: the pickled value, or the error."""

    value: bytes = b""
    error: ErrorReport | None = None


def encode_message(message: Call | Reply) -> bytes:
    """The bytes of one message: its length, then its pickle."""
    body = pickle.dumps(message, protocol=pickle.HIGHEST_PROTOCOL)
    return HEADER.pack(len(body)) + body


def loaded_module_name(path: str) -> str:
    """The name under which a rank registers a module that it loads from a file: the same in every process."""
    return f"_rank_pool_{zlib.crc32(path.encode()):08x}_{Path(path).stem}"


def loads_with_aliases(data: bytes, aliases: Mapping[str, str]) -> Any:
    """Unpickle, with modules renamed: a test module has another name in a rank than in the test process."""
    return _AliasUnpickler(data, aliases).load()


class _AliasUnpickler(pickle.Unpickler):
    def __init__(self, data: bytes, aliases: Mapping[str, str]) -> None:
        super().__init__(io.BytesIO(data))
        self._aliases = aliases

    def find_class(self, module_name: str, global_name: str) -> Any:
        return super().find_class(self._aliases.get(module_name, module_name), global_name)


def serve() -> None:
    """Serve calls that arrive on standard input, a socket, until it closes. The main function of a pool's rank."""
    import torch.distributed as dist

    # The functions, and the processes that they start, must not see the socket.
    channel = socket.socket(fileno=os.dup(0))
    with open(os.devnull) as devnull:
        os.dup2(devnull.fileno(), 0)
    _initialise_default_group()
    channel.sendall(encode_message(Reply()))
    while (call := _receive_call(channel)) is not None:
        channel.sendall(encode_message(_answer(call)))
    dist.destroy_process_group()


def run_as_script(*functions: Callable[[], object]) -> None:
    """Run functions as a worker script: what its `__main__` block calls, in every rank.

    Initialises the default group from the environment (gloo, on the CPU), runs the functions in order with a barrier
    after each, and destroys the group. Rank 0 prints `ok: <name>` once every rank has passed the function's barrier.
    The script then runs under `torchrun --nproc-per-node 4 file.py` and `python -m deep_ep_core.launch --ranks 4
    file.py` alike. An exception passes through, so that the rank ends with its traceback and exit code 1.

    Collective: yes.

    Args:
        functions: Called without arguments; what they return is dropped.

    Raises:
        ConfigError: The variables that a launcher sets are missing.
    """
    import torch.distributed as dist

    missing = [name for name in ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT") if name not in os.environ]
    if missing:
        raise ConfigError(
            f"a worker script needs the variables that a launcher sets (missing {', '.join(missing)}); start it with "
            "`python -m deep_ep_core.launch --ranks N file.py` or `torchrun --nproc-per-node N file.py`"
        )
    _initialise_default_group()
    for function in functions:
        function()
        dist.barrier()
        if dist.get_rank() == 0:
            print(f"ok: {function.__name__}", flush=True)
    # Only after success: a rank that failed keeps its connections until its traceback is out, so that its peers do
    # not fail before it does.
    dist.destroy_process_group()


def _initialise_default_group() -> None:
    import torch.distributed as dist

    if os.environ.get("LOCAL_WORLD_SIZE") == os.environ["WORLD_SIZE"]:
        # One machine: loopback does, and the machine's own name need not resolve.
        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    dist.init_process_group("gloo")


def _receive_call(channel: socket.socket) -> Call | None:
    header = _receive_exactly(channel, HEADER.size)
    if header is None:
        return None
    body = _receive_exactly(channel, HEADER.unpack(header)[0])
    if body is None:
        return None
    call = pickle.loads(body)
    assert isinstance(call, Call), f"a rank serves calls (got {type(call).__name__})"
    return call


def _receive_exactly(channel: socket.socket, num_bytes: int) -> bytearray | None:
    data = bytearray(num_bytes)
    view = memoryview(data)
    while view:
        num_received = channel.recv_into(view)
        if num_received == 0:
            return None
        view = view[num_received:]
    return data


def _answer(call: Call) -> Reply:
    try:
        function, aliases = _resolve(call.function)
        args, kwargs = loads_with_aliases(call.arguments, aliases)
        return Reply(value=pickle.dumps(function(*args, **kwargs), protocol=pickle.HIGHEST_PROTOCOL))
    # SystemExit and the like too: the rank lives on, and the caller must hear of it.
    except BaseException as error:
        return Reply(error=_report(error))
    finally:
        sys.stdout.flush()
        sys.stderr.flush()


def _report(error: BaseException) -> ErrorReport:
    attributes = {}
    for name, value in vars(error).items():
        # Whatever cannot be pickled is left out: pickling runs the value's own code, which may raise anything.
        with contextlib.suppress(Exception):
            attributes[name] = pickle.dumps(value, protocol=pickle.HIGHEST_PROTOCOL)
    # The first frame is this module's own.
    frames = error.__traceback__ and (error.__traceback__.tb_next or error.__traceback__)
    return ErrorReport(
        type_name=type(error).__name__,
        message=str(error),
        attributes=attributes,
        traceback_text="".join(traceback.format_exception(type(error), error, frames)),
    )


def _resolve(reference: FunctionReference) -> tuple[Callable[..., Any], dict[str, str]]:
    module = _load_module(reference.module_name, reference.path)
    function = functools.reduce(getattr, reference.qualified_name.split("."), module)
    assert callable(function), f"{reference} is not callable"
    return function, {reference.module_name: module.__name__}


@functools.cache
def _load_module(name: str, path: str | None) -> ModuleType:
    """The module of that name if this rank can import it from that file, else the file, loaded under a unique name."""
    if path is None or _is_importable_from(name, path):
        return importlib.import_module(name)
    unique_name = loaded_module_name(path)
    spec = importlib.util.spec_from_file_location(unique_name, path)
    assert spec is not None, f"{path} is not a Python file"
    assert spec.loader is not None, f"{path} is not a Python file"
    module = importlib.util.module_from_spec(spec)
    # Before it runs, as the import system does: dataclasses and pickle look their module up by name.
    sys.modules[unique_name] = module
    try:
        spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[unique_name]
        raise
    return module


def _is_importable_from(name: str, path: str) -> bool:
    try:
        spec = importlib.util.find_spec(name)
    # ValueError: a module such as __main__ that has no spec.
    except (ImportError, ValueError):
        return False
    return spec is not None and spec.origin is not None and Path(spec.origin).resolve() == Path(path).resolve()
