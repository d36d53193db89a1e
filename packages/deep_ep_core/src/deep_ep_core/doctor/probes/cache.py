"""Owns the look at the folder of compiled kernels. It writes nothing there."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from deep_ep_core.doctor.findings import Finding, Status
from deep_ep_core.doctor.machine import Machine

__all__ = ["look_at_cache"]

_MIB_BYTES = 2**20


def look_at_cache(machine: Machine) -> list[Finding]:
    """Where it is, whether it can be written, and what it holds."""
    from deep_ep_core.jit.cache import KernelCache

    cache = KernelCache(machine.settings.env.jit_cache_dir)
    is_writable = _is_writable(cache.root)
    facts: dict[str, Any] = {"path": str(cache.root), "is_writable": is_writable, "num_entries": None}
    try:
        names = cache.names()
        num_bytes = sum(cache.num_bytes(name) for name in names)
    except OSError as error:
        # It is no folder, may not be read, or another process is clearing it.
        text = f"{cache.root}, entries not counted ({error})"
    else:
        facts.update(num_entries=len(names), num_bytes=num_bytes)
        text = f"{cache.root}, {len(names)} entries, {num_bytes / _MIB_BYTES:.1f} MiB"
    if is_writable:
        return [Finding(name="cache folder", status=Status.OK, text=text, facts=facts)]
    return [
        Finding(
            name="cache folder",
            status=Status.WARNING,
            text=f"{text}; it cannot be written",
            why="each process compiles every kernel anew",
            fix="set EP_JIT_CACHE_DIR to a folder that can be written",
            facts=facts,
        )
    ]


def _is_writable(folder: Path) -> bool:
    """Whether a file can be made there, in a folder that would have to be made first too."""
    closest = next((path for path in (folder, *folder.absolute().parents) if os.path.lexists(path)), None)
    return closest is not None and closest.is_dir() and os.access(closest, os.W_OK | os.X_OK)
