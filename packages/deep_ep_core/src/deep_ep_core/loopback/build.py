"""Owns the compilation of the plugin by the host's C compiler, and where the library is kept.

    <EP_JIT_CACHE_DIR>/loopback/<digest>/libnccl-rma-deep-ep-loopback.so

The digest covers the texts of the sources, the compiler and its version, the flags, and the version of NCCL's headers.
"""

from __future__ import annotations

import atexit
import hashlib
import os
import platform
import shutil
import subprocess
import tempfile
import warnings
from pathlib import Path

from deep_ep_core.env import get_env
from deep_ep_core.errors import CompileError, ConfigError
from deep_ep_core.jit.lock import file_lock
from deep_ep_core.jit.options import JitOptions
from deep_ep_core.jit.toolchain import find_nccl_headers

__all__ = ["COMPILER_FLAGS", "SOURCE_DIR", "build_plugin", "find_compiler"]

SOURCE_DIR = Path(__file__).resolve().parent / "plugin"
"""Folder of the plugin's sources."""

# Warnings are errors in the tests only: a compiler that warns of something new must not stop a user.
COMPILER_FLAGS = ("-std=gnu11", "-O2", "-shared", "-fPIC", "-fvisibility=hidden", "-pthread")
"""Flags for every build of the plugin."""

_LIBRARIES = ("-ldl",)
_COMPILERS = ("cc", "gcc", "clang")
_FILE_NAME = "libnccl-rma-deep-ep-loopback.so"
_COMPILE_TIMEOUT_S = 300.0


def build_plugin(cache_dir: Path | None = None) -> Path:
    """The plugin's library, compiled if it is not in the cache. Of all processes that ask at once, one compiles.

    Args:
        cache_dir: Root folder of the cache; None takes `EP_JIT_CACHE_DIR`.

    Returns:
        Absolute path of the library. Where the folder cannot be written, it lies in a temporary one that is removed
        when this process ends.

    Raises:
        ConfigError: There is no C compiler.
        CompileError: The plugin does not compile.

    Warns:
        RuntimeWarning: The cache folder cannot be written.
    """
    env = get_env()
    root = (env.jit_cache_dir if cache_dir is None else cache_dir).absolute()
    compiler = find_compiler()
    headers = find_nccl_headers(JitOptions.from_env(env))
    digest = _digest(compiler, headers.version if headers is not None else None)
    library = root / "loopback" / digest / _FILE_NAME
    try:
        if library.is_file():
            return library
        with file_lock(root / "locks" / f"loopback.{digest}.lock", timeout_s=2 * _COMPILE_TIMEOUT_S):
            if not library.is_file():
                library.parent.mkdir(parents=True, exist_ok=True)
                _compile(compiler, library)
            return library
    except OSError as error:
        folder = Path(tempfile.mkdtemp(prefix="deep_ep_loopback_"))
        atexit.register(shutil.rmtree, folder, ignore_errors=True)
        warnings.warn(
            f"the loopback network cannot be kept in {root} ({error}); it is compiled for this process alone until "
            "EP_JIT_CACHE_DIR names a folder that can be written",
            RuntimeWarning,
            stacklevel=2,
        )
        _compile(compiler, folder / _FILE_NAME)
        return folder / _FILE_NAME


def find_compiler() -> str:
    """The first C compiler on PATH.

    Raises:
        ConfigError: There is none.
    """
    for name in _COMPILERS:
        path = shutil.which(name)
        if path is not None:
            return path
    raise ConfigError(
        f"the loopback network needs a C compiler (none of {', '.join(_COMPILERS)} is on PATH); install one, or set "
        "NCCL_RMA_PLUGIN to a network of your own"
    )


def _digest(compiler: str, nccl_version: tuple[int, int, int] | None) -> str:
    version = subprocess.run(
        [compiler, "--version"],
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=_COMPILE_TIMEOUT_S,
        check=False,
    )
    digest = hashlib.sha256()
    parts = [version.stdout, *COMPILER_FLAGS, *_LIBRARIES, platform.machine(), repr(nccl_version)]
    for path in sorted(SOURCE_DIR.glob("*.[ch]")):
        parts += [path.name, path.read_text(encoding="utf-8")]
    for part in parts:
        digest.update(part.encode() + b"\0")
    return digest.hexdigest()[:32]


def _compile(compiler: str, library: Path) -> None:
    """Compile to a file beside the library, and put it in its place whole."""
    unfinished = library.with_name(f"{library.name}.{os.getpid()}")
    sources = [str(path) for path in sorted(SOURCE_DIR.glob("*.c"))]
    command = [compiler, *COMPILER_FLAGS, *sources, "-o", str(unfinished), *_LIBRARIES]
    try:
        done = subprocess.run(
            command, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=_COMPILE_TIMEOUT_S, check=False
        )
        if done.returncode != 0:
            raise CompileError(
                f"the loopback network must compile (exit code {done.returncode}):\n{done.stderr}",
                command=" ".join(command),
                log=done.stderr,
                source_path=str(SOURCE_DIR),
            )
        with open(unfinished, "rb") as file:
            os.fsync(file.fileno())
        os.replace(unfinished, library)
    finally:
        unfinished.unlink(missing_ok=True)
