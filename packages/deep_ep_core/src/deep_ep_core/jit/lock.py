"""Owns the lock that lets one process build a cache entry while the others wait.

The kernel frees it when its holder dies, however that happens.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import logging
import os
import time
from collections.abc import Iterator
from pathlib import Path

__all__ = ["file_lock"]

_log = logging.getLogger(__name__)

_POLL_INTERVAL_S = 0.05
_UNSUPPORTED = frozenset({errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL})


@contextlib.contextmanager
def file_lock(path: Path, *, timeout_s: float) -> Iterator[bool]:
    """Hold a lock on a file, which is made if need be, while the block runs.

    It excludes processes and threads alike, and machines too where the file system carries locks between them.

    Args:
        path: The file. Whoever holds its lock may delete it.
        timeout_s: How long to wait for another holder.

    Yields:
        Whether the lock is held: False on a file system that has no locks.

    Raises:
        TimeoutError: Another holder did not let go in time.
        OSError: The file cannot be made or opened.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    deadline = time.monotonic() + timeout_s
    has_told = False
    while True:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
        try:
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                is_held = False
            except OSError as error:
                if error.errno not in _UNSUPPORTED:
                    raise
                yield False
                return
            else:
                is_held = _is_at(descriptor, path)
            if is_held:
                yield True
                return
        finally:
            # Closing alone would leave it locked for as long as a forked child has the file open.
            with contextlib.suppress(OSError):
                fcntl.flock(descriptor, fcntl.LOCK_UN)
            os.close(descriptor)
        if time.monotonic() >= deadline:
            raise TimeoutError(errno.ETIMEDOUT, f"another process held the lock for {timeout_s:.0f} s", str(path))
        if not has_told:
            _log.info("waiting for the process that holds %s", path)
            has_told = True
        time.sleep(_POLL_INTERVAL_S)


def _is_at(descriptor: int, path: Path) -> bool:
    """Whether the open file is still the one at that path, and not one that its last holder deleted."""
    opened = os.fstat(descriptor)
    try:
        present = os.stat(path)
    except FileNotFoundError:
        return False
    return (opened.st_dev, opened.st_ino) == (present.st_dev, present.st_ino)
