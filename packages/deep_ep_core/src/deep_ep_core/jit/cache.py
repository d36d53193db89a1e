"""Owns the folder of compiled kernels: how an entry is read, built once for all processes, installed whole, removed.

    <root>/cache/<label>.<digest>/   kernel.cu, kernel.cubin, meta.json, and dumps if they were asked for
    <root>/locks/                    one lock file an entry
    <root>/tmp/                      entries on their way in or out
    <root>/failed/                   sources that did not compile

What the digest covers is decided in `builder`. A folder that cannot be written costs a warning and the sharing, never
the result.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import logging
import os
import re
import secrets
import shutil
import stat
import tempfile
import threading
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path

from deep_ep_core.errors import ConfigError
from deep_ep_core.jit.lock import file_lock

__all__ = ["CacheEntry", "CorruptEntryError", "EntryMeta", "KernelCache"]

_log = logging.getLogger(__name__)

_NAME_PATTERN = re.compile(r"[a-z][a-z0-9_]*\.[0-9a-f]{32}")
# Longer than any compiler may run, see `compiler`.
_LOCK_TIMEOUT_S = 2000.0
_SUBFOLDERS = ("cache", "tmp", "failed", "locks")


class CorruptEntryError(Exception):
    """An entry is there but cannot be used; the message says why. The cache rebuilds such an entry."""


@dataclass(frozen=True, slots=True, kw_only=True)
class EntryMeta:
    """What is written down about an entry.

    Attributes:
        label: Label of the kernel.
        arch: Architecture that it is compiled for.
        compiler: Kind and version of the compiler.
        entry_name: The kernel's symbol.
        flags: What the key covers besides texts.
        log: What the compiler printed.
    """

    label: str
    arch: str
    compiler: str
    entry_name: str
    flags: tuple[str, ...]
    log: str


@dataclass(frozen=True, slots=True, kw_only=True)
class CacheEntry:
    """A compiled kernel as it lies in the cache.

    Attributes:
        name: `<label>.<digest>`.
        source: The translation unit.
        cubin: The machine code.
        meta: What is written down about it.
        dumps: Further files by name, for example `kernel.ptx`.
    """

    name: str
    source: str
    cubin: bytes
    meta: EntryMeta
    dumps: Mapping[str, str] = field(default_factory=dict)


class KernelCache:
    """The compiled kernels below one root folder, shared by all processes that use it.

    Safe to use from several threads and processes. Making one touches no file.

    Args:
        root: The root folder.
    """

    def __init__(self, root: Path) -> None:
        self.root = root
        self._warning_lock = threading.Lock()
        self._has_warned = False

    def get_or_build(
        self, name: str, source: str, build: Callable[[], CacheEntry], *, wanted_dumps: frozenset[str] = frozenset()
    ) -> CacheEntry:
        """Return an entry, and build it if it is not there, is corrupt, or lacks a wanted dump.

        Of all processes that ask at once one builds, and the others wait for it.

        Args:
            name: Name of the entry.
            source: The translation unit.
            build: Makes the entry; what it raises passes through, and nothing is installed then.
            wanted_dumps: Names of dumps that the entry must hold.

        Warns:
            RuntimeWarning: Once an instance, when the folder cannot be used; the entry is then in memory only.
        """
        with contextlib.suppress(CorruptEntryError):
            found = self.read(name)
            if found is not None and wanted_dumps <= found.dumps.keys():
                return found
        with contextlib.ExitStack() as stack:
            try:
                is_locked = stack.enter_context(file_lock(self._lock_path(name), timeout_s=_LOCK_TIMEOUT_S))
                found = self._read_or_report(name)
                if found is not None and wanted_dumps <= found.dumps.keys():
                    return found
                if is_locked:
                    self._sweep(name)
                folder = stack.enter_context(self._new_folder(name))
                # Before the build, so that a full disk is noticed while the others need not wait for nothing.
                _write_synced(folder / "kernel.cu", source.encode())
            except OSError as error:
                stack.close()
                self._warn(error)
                return build()
            entry = build()
            try:
                self._install(entry, folder)
            except OSError as error:
                self._warn(error)
            return entry

    def read(self, name: str) -> CacheEntry | None:
        """Return an entry, or None if there is none.

        Raises:
            CorruptEntryError: There is one that cannot be used.
        """
        folder = self._entry_path(name)
        try:
            if not folder.is_dir():
                return None
            meta = json.loads((folder / "meta.json").read_text(encoding="utf-8"))
            cubin = (folder / "kernel.cubin").read_bytes()
            if meta["name"] != name or meta["cubin_sha256"] != hashlib.sha256(cubin).hexdigest():
                raise CorruptEntryError(f"{folder}: the checksum of kernel.cubin does not match meta.json")
            return CacheEntry(
                name=name,
                source=(folder / "kernel.cu").read_text(encoding="utf-8"),
                cubin=cubin,
                meta=EntryMeta(**{**meta["kernel"], "flags": tuple(meta["kernel"]["flags"])}),
                dumps={
                    path.name: path.read_text(encoding="utf-8")
                    for path in (folder / "kernel.ptx", folder / "kernel.sass")
                    if path.is_file()
                },
            )
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise CorruptEntryError(f"{folder}: {type(error).__name__}: {error}") from error

    def names(self) -> list[str]:
        """The names of all entries, sorted; whether they can be read is not looked at."""
        try:
            return sorted(name for name in os.listdir(self.root / "cache") if _NAME_PATTERN.fullmatch(name))
        except FileNotFoundError:
            return []

    def num_bytes(self, name: str) -> int:
        """Size of all files of an entry."""
        return sum(path.lstat().st_size for path in self._entry_path(name).iterdir())

    def keep_failed_source(self, name: str, source: str) -> Path:
        """Write a source that did not compile where it stays, and return its path."""
        path = self.root / "failed" / name / "kernel.cu"
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(source, encoding="utf-8")
        except OSError:
            path = Path(tempfile.mkdtemp(prefix="deep_ep_jit_failed_")) / "kernel.cu"
            path.write_text(source, encoding="utf-8")
        return path

    def clear(self) -> tuple[list[str], list[str]]:
        """Remove every entry that no process is building, and what dead processes left.

        Only names that the cache itself gives are removed, and links are removed, not followed.

        Returns:
            The names of the entries removed, and of those left because a process is building them.

        Raises:
            ConfigError: One of the cache's folders is a link, or no folder.
            OSError: A file cannot be removed.
        """
        names = set()
        for subfolder in _SUBFOLDERS:
            names |= {match[0] for match in map(_NAME_PATTERN.match, self._list_own(subfolder)) if match}
        removed, busy = [], []
        for name in sorted(names):
            has_entry = os.path.lexists(self._entry_path(name))
            try:
                with file_lock(self._lock_path(name), timeout_s=0.0):
                    for path in (self._entry_path(name), self.root / "failed" / name):
                        _remove(path)
                    self._sweep(name)
                    self._lock_path(name).unlink()
            except TimeoutError:
                busy.append(name)
                continue
            if has_entry:
                removed.append(name)
        return removed, busy

    def _list_own(self, subfolder: str) -> list[str]:
        path = self.root / subfolder
        try:
            mode = path.lstat().st_mode
        except FileNotFoundError:
            return []
        if not stat.S_ISDIR(mode):
            raise ConfigError(f"{path} must be a folder of its own (got a link or a file); remove it by hand")
        return os.listdir(path)

    def _entry_path(self, name: str) -> Path:
        return self.root / "cache" / name

    def _lock_path(self, name: str) -> Path:
        return self.root / "locks" / f"{name}.lock"

    def _read_or_report(self, name: str) -> CacheEntry | None:
        try:
            return self.read(name)
        except CorruptEntryError as error:
            _log.warning("a cached kernel is corrupt and is built anew: %s", error)
            return None

    def _sweep(self, name: str) -> None:
        """Remove what builders of this entry that died have left. The caller holds the entry's lock."""
        for path in (self.root / "tmp").glob(f"{name}.*"):
            _remove(path)

    @contextlib.contextmanager
    def _new_folder(self, name: str) -> Iterator[Path]:
        folder = self.root / "tmp" / f"{name}.{os.getpid()}.{secrets.token_hex(4)}"
        folder.mkdir(parents=True)
        try:
            yield folder
        finally:
            shutil.rmtree(folder, ignore_errors=True)

    def _install(self, entry: CacheEntry, folder: Path) -> None:
        meta = {
            "name": entry.name,
            "cubin_sha256": hashlib.sha256(entry.cubin).hexdigest(),
            "kernel": asdict(entry.meta),
        }
        for file_name, text in entry.dumps.items():
            _write_synced(folder / file_name, text.encode())
        _write_synced(folder / "kernel.cubin", entry.cubin)
        _write_synced(folder / "meta.json", json.dumps(meta, indent=1).encode())
        _sync_folder(folder)
        final = self._entry_path(entry.name)
        final.parent.mkdir(parents=True, exist_ok=True)
        if os.path.lexists(final):
            discarded = folder.with_name(f"{folder.name}.old")
            os.rename(final, discarded)
            _remove(discarded)
        try:
            os.rename(folder, final)
        except OSError as error:
            # Without locks another process may have installed the same entry in between; its bytes are as good.
            if error.errno not in (errno.EEXIST, errno.ENOTEMPTY):
                raise
        _sync_folder(final.parent)

    def _warn(self, error: OSError) -> None:
        with self._warning_lock:
            if self._has_warned:
                return
            self._has_warned = True
        warnings.warn(
            f"compiled kernels cannot be kept in {self.root} ({error}); each process compiles its own until "
            "EP_JIT_CACHE_DIR names a folder that can be written",
            RuntimeWarning,
            stacklevel=3,
        )


def _write_synced(path: Path, content: bytes) -> None:
    with open(path, "wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())


def _sync_folder(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _remove(path: Path) -> None:
    """Remove a file, a link or a whole folder, if it is there. Links are not followed."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
