"""Owns the one libnccl of this process: finding it, checking that it will do, calling it, and decoding its errors.

Nothing is looked for at import. What the calls mean belongs to the modules beside this one, and what is passed to them
to `structs`.
"""

from __future__ import annotations

import ctypes
import functools
import os
import re
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

from deep_ep_core.env import get_env
from deep_ep_core.errors import ConfigError, TransportError
from deep_ep_core.jit.toolchain import site_folders
from deep_ep_core.nccl.structs import TeamStruct, UniqueId

__all__ = ["MIN_NCCL_VERSION", "NcclLibrary", "find_nccl", "load_nccl", "mapped_libraries", "version_text"]

MIN_NCCL_VERSION = 23004
"""The oldest NCCL that will do, as NCCL writes versions: major * 10000 + minor * 100 + patch."""

_SONAME = "libnccl.so.2"
_LIBRARY_NAME = re.compile(r"libnccl\.so(\.\d+)*")
_MAPS_PATH = Path("/proc/self/maps")
_DELETED = " (deleted)"
_RESULT_NAMES = (
    "ncclSuccess",
    "ncclUnhandledCudaError",
    "ncclSystemError",
    "ncclInternalError",
    "ncclInvalidArgument",
    "ncclInvalidUsage",
    "ncclRemoteError",
    "ncclInProgress",
    "ncclTimeout",
)
_SUCCESS, _IN_PROGRESS = 0, 7

_Pointer, _Int, _Size, _Text = ctypes.c_void_p, ctypes.c_int, ctypes.c_size_t, ctypes.c_char_p
# Handles (communicators, windows) and addresses are all pointers here.
_ARGUMENTS: dict[str, tuple[Any, ...]] = {
    "ncclGetVersion": (_Pointer,),
    "ncclGetErrorString": (_Int,),
    "ncclGetLastError": (_Pointer,),
    "ncclGetUniqueId": (_Pointer,),
    "ncclCommInitRankConfig": (_Pointer, _Int, UniqueId, _Int, _Pointer),
    "ncclCommFinalize": (_Pointer,),
    "ncclCommDestroy": (_Pointer,),
    "ncclCommAbort": (_Pointer,),
    "ncclCommGetAsyncError": (_Pointer, _Pointer),
    "ncclCommCount": (_Pointer, _Pointer),
    "ncclCommUserRank": (_Pointer, _Pointer),
    "ncclCommQueryProperties": (_Pointer, _Pointer),
    "ncclTeamWorld": (_Pointer,),
    "ncclTeamLsa": (_Pointer,),
    "ncclTeamRail": (_Pointer,),
    "ncclMemAlloc": (_Pointer, _Size),
    "ncclMemFree": (_Pointer,),
    "ncclCommWindowRegister": (_Pointer, _Pointer, _Size, _Pointer, _Int),
    "ncclCommWindowDeregister": (_Pointer, _Pointer),
    "ncclGetLsaDevicePointer": (_Pointer, _Size, _Int, _Pointer),
    "ncclGetPeerDevicePointer": (_Pointer, _Size, _Int, _Pointer),
    "ncclDevCommCreate": (_Pointer, _Pointer, _Pointer),
    "ncclDevCommDestroy": (_Pointer, _Pointer),
}
# The others return a result code.
_RETURNS: dict[str, Any] = {
    "ncclGetErrorString": _Text,
    "ncclGetLastError": _Text,
    "ncclTeamWorld": TeamStruct,
    "ncclTeamLsa": TeamStruct,
    "ncclTeamRail": TeamStruct,
}


class NcclLibrary:
    """A loaded libnccl.

    Args:
        handle: The library as `ctypes` loads it.
        path: Its file.
        found_via: What led to it, for messages.

    Attributes:
        version: Version code, for example 23007 for 2.30.7.
    """

    def __init__(self, handle: Any, *, path: str, found_via: str) -> None:
        self._handle = handle
        self._functions: dict[str, Any] = {}
        self.path = path
        self.found_via = found_via
        self.version = 0
        version = ctypes.c_int()
        self.call("ncclGetVersion", ctypes.byref(version))
        self.version = version.value

    def has(self, name: str) -> bool:
        """Whether this NCCL has a function of that name."""
        return hasattr(self._handle, name)

    def call(self, name: str, *args: Any, where: str = "") -> bool:
        """Call a function that returns a result code.

        Args:
            name: Name of the function.
            args: Its arguments.
            where: The rank, for the message.

        Returns:
            True if it is done, False if NCCL goes on with it in the background.

        Raises:
            TransportError: It failed, or this NCCL has no such function.
        """
        code = self.value_of(name, *args)
        if code not in (_SUCCESS, _IN_PROGRESS):
            raise self.error(name, code, where=where)
        return bool(code == _SUCCESS)

    def value_of(self, name: str, *args: Any) -> Any:
        """Call a function and return what it returns, unchecked.

        Raises:
            TransportError: This NCCL has no such function.
        """
        function = self._functions.get(name)
        if function is None:
            function = self._bind(name)
        return function(*args)

    def _bind(self, name: str) -> Any:
        try:
            function = getattr(self._handle, name)
        except AttributeError:
            raise TransportError(
                f"NCCL must have {name}, but {version_text(self.version)} in {self.path} has not; install a newer one",
                call=name,
            ) from None
        function.argtypes = _ARGUMENTS[name]
        function.restype = _RETURNS.get(name, _Int)
        self._functions[name] = function
        return function

    def is_settled(self, comm: int, *, where: str = "") -> bool:
        """Whether what a communicator does in the background is done.

        Raises:
            TransportError: It failed.
        """
        state = ctypes.c_int()
        self.call("ncclCommGetAsyncError", comm, ctypes.byref(state), where=where)
        if state.value not in (_SUCCESS, _IN_PROGRESS):
            raise self.error("ncclCommGetAsyncError", state.value, where=where)
        return state.value == _SUCCESS

    def error(self, call: str, code: int, *, where: str = "") -> TransportError:
        """The error of a call, with all that NCCL has to say of it."""
        name = _RESULT_NAMES[code] if 0 <= code < len(_RESULT_NAMES) else f"result {code}"
        text = self.value_of("ncclGetErrorString", code)
        last = self.value_of("ncclGetLastError", None)
        said = f"; NCCL's last error: {last.decode(errors='replace').strip()}" if last and last.strip() else ""
        return TransportError(
            f"{call} failed{f' on {where}' if where else ''}: {name} ({text.decode(errors='replace') if text else '?'})"
            f"{said}; run again with NCCL_DEBUG=WARN to see more",
            call=call,
            code_name=name,
        )

    @property
    def is_torchs(self) -> bool:
        """Whether torch calls this very library, so that its communicators can be used with it."""
        return self.found_via == _LOADED and _torchs_nccl_path() == self.path

    def check_headers(self, version: tuple[int, int, int], found_via: str) -> None:
        """Refuse headers that kernels would be compiled with, but that are not of this library's version.

        Args:
            version: (major, minor, patch) of the headers.
            found_via: Where they lie, for the message.

        Raises:
            ConfigError: The versions differ, and `EP_SUPPRESS_NCCL_CHECK` is not set.
        """
        code = version[0] * 10000 + version[1] * 100 + version[2]
        if code != self.version:
            problem = (
                f"NCCL's headers must be of the version of its library, {version_text(self.version)} in {self.path} "
                f"(got {version_text(code)}, found via {found_via}); set EP_NCCL_ROOT_DIR to headers of that version"
            )
            _refuse(problem, ConfigError(problem), get_env().suppress_nccl_check)

    def __repr__(self) -> str:
        return f"NcclLibrary({version_text(self.version)}, {self.path}, found via {self.found_via})"


_LOADED = "the libraries of this process"


@functools.cache
def load_nccl() -> NcclLibrary:
    """The one NCCL of this process: what is loaded already, or else `EP_NCCL_ROOT_DIR`, the wheel, the system's.

    Found at the first call and the same object from then on.

    Raises:
        TransportError: There is none, it is older than 2.30.4, or there are two. `EP_SUPPRESS_NCCL_CHECK` makes the
            last two warnings.
    """
    env = get_env()
    maps_text = _MAPS_PATH.read_text() if _MAPS_PATH.exists() else ""
    return find_nccl(maps_text, root_dir=env.nccl_root_dir, suppress_check=env.suppress_nccl_check)


def find_nccl(
    maps_text: str,
    *,
    root_dir: Path | None,
    suppress_check: bool,
    open_library: Callable[[str, int], Any] = ctypes.CDLL,
) -> NcclLibrary:
    """`load_nccl` with what it looks at given.

    Args:
        maps_text: The text of `/proc/self/maps`.
        root_dir: NCCL installation to take where none is loaded yet, or None.
        suppress_check: Whether a version too old and a second library are only warned of.
        open_library: Loads a library of a path and a mode.

    Raises:
        TransportError: As `load_nccl`.
    """
    loaded = [_open_mapped(path, open_library) for path in mapped_libraries(maps_text)]
    if loaded:
        library = next((found for found in loaded if found.path == _torchs_nccl_path()), loaded[0])
    else:
        library = _open_first(root_dir, open_library)
    if len(loaded) > 1:
        listed = " and ".join(f"{version_text(found.version)} in {found.path}" for found in loaded)
        problem = (
            f"a process must load one NCCL, but this one has {listed}; take away what loads the second one "
            "(LD_PRELOAD, LD_LIBRARY_PATH, an import), or set EP_SUPPRESS_NCCL_CHECK=1 to use that of torch"
        )
        _refuse(problem, TransportError(problem, call="dlopen"), suppress_check)
    if library.version < MIN_NCCL_VERSION:
        problem = (
            f"NCCL must be {version_text(MIN_NCCL_VERSION)} or newer (got {version_text(library.version)}, "
            f"{library.path}, found via {library.found_via}); install a newer nvidia-nccl wheel over it, or set "
            "EP_SUPPRESS_NCCL_CHECK=1 to try nevertheless"
        )
        _refuse(problem, TransportError(problem, call="ncclGetVersion"), suppress_check)
    return library


def mapped_libraries(maps_text: str) -> tuple[str, ...]:
    """The files of all NCCL libraries in the text of `/proc/self/maps`, each once, in its order."""
    paths: dict[str, None] = {}
    for line in maps_text.splitlines():
        # Address range, permissions, offset, device, inode; the rest is the path, spaces included.
        columns = line.split(maxsplit=5)
        if len(columns) == 6 and _LIBRARY_NAME.fullmatch(os.path.basename(columns[5].removesuffix(_DELETED))):
            paths[columns[5]] = None
    return tuple(paths)


def _open_mapped(path: str, open_library: Callable[[str, int], Any]) -> NcclLibrary:
    # The loader compares files, so a file that was replaced since needs the name that the library calls itself.
    name = _SONAME if path.endswith(_DELETED) else path
    return NcclLibrary(open_library(name, os.RTLD_NOLOAD | os.RTLD_NOW), path=path, found_via=_LOADED)


def _open_first(root_dir: Path | None, open_library: Callable[[str, int], Any]) -> NcclLibrary:
    failures = []
    for path, found_via in _candidates(root_dir):
        try:
            return NcclLibrary(open_library(path, os.RTLD_NOW), path=path, found_via=found_via)
        except OSError as error:
            failures.append(f"{found_via}: {error}")
    raise TransportError(
        f"NCCL {version_text(MIN_NCCL_VERSION)} or newer must be installed, but none loads ({'; '.join(failures)}); "
        "install a torch with CUDA or the nvidia-nccl wheel, or set EP_NCCL_ROOT_DIR",
        call="dlopen",
    )


def _candidates(root_dir: Path | None) -> Iterator[tuple[str, str]]:
    if root_dir is not None:
        yield str(root_dir / "lib" / _SONAME), "EP_NCCL_ROOT_DIR"
        return
    for folder in site_folders("nvidia", ("nccl",)):
        yield str(folder / "lib" / _SONAME), "the nvidia-nccl wheel"
    yield _SONAME, "the system"


def version_text(version: int) -> str:
    """A version code as text, for example `2.30.7`."""
    return f"{version // 10000}.{version // 100 % 100}.{version % 100}"


@functools.cache
class _SymbolInfo(ctypes.Structure):
    """`Dl_info` of dladdr(3)."""

    _fields_ = [
        ("file_name", ctypes.c_char_p),
        ("file_base", ctypes.c_void_p),
        ("symbol_name", ctypes.c_char_p),
        ("symbol_address", ctypes.c_void_p),
    ]


def _torchs_nccl_path() -> str | None:
    """The file of the NCCL that torch is linked with; None where it has none, or a copy inside itself.

    The version that torch reports is no help: it is that of the headers it was built with.
    """
    torch_cuda = Path(torch.__file__).parent / "lib" / "libtorch_cuda.so"
    try:
        # Looks a name up as torch's own calls do: in this library first, then in those that it needs.
        address = ctypes.cast(
            ctypes.CDLL(str(torch_cuda), mode=os.RTLD_NOLOAD | os.RTLD_LAZY).ncclGetVersion, ctypes.c_void_p
        )
    except (OSError, AttributeError):
        return None
    info = _SymbolInfo()
    if not ctypes.CDLL(None).dladdr(address, ctypes.byref(info)) or not info.file_name:
        return None
    path = os.path.realpath(os.fsdecode(info.file_name))
    return None if path == os.path.realpath(torch_cuda) else path


def _refuse(problem: str, error: Exception, suppress_check: bool) -> None:
    if not suppress_check:
        raise error
    warnings.warn(problem, RuntimeWarning, stacklevel=4)
