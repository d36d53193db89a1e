"""Owns the reading of a compiler's log: what ptxas says that a kernel uses.

Both compilers are always made to say it, see `compiler`.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

__all__ = ["ResourceUsage", "parse_usage"]

_NUMBERS = {
    "num_registers": r"Used (\d+) registers",
    "stack_bytes": r"(\d+) bytes stack frame",
    "spill_store_bytes": r"(\d+) bytes spill stores",
    "spill_load_bytes": r"(\d+) bytes spill loads",
    "static_smem_bytes": r"(\d+) bytes smem",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class ResourceUsage:
    """What a kernel uses, per thread, but for shared memory, which is per block.

    Attributes:
        num_registers: Registers.
        stack_bytes: Stack frame in local memory.
        spill_store_bytes: Bytes that registers are spilled to local memory with.
        spill_load_bytes: Bytes read back from there.
        static_smem_bytes: Shared memory known at compile time.
    """

    num_registers: int
    stack_bytes: int
    spill_store_bytes: int
    spill_load_bytes: int
    static_smem_bytes: int

    @property
    def uses_local_memory(self) -> bool:
        """Whether any of it lies in local memory, which is slow."""
        return self.stack_bytes + self.spill_store_bytes + self.spill_load_bytes > 0

    def __str__(self) -> str:
        return (
            f"{self.num_registers} registers, {self.stack_bytes} B stack, {self.spill_store_bytes} B spill stores, "
            f"{self.spill_load_bytes} B spill loads, {self.static_smem_bytes} B static shared memory"
        )


def parse_usage(log: str, entry_name: str) -> ResourceUsage | None:
    """Find what ptxas says of one kernel.

    Args:
        log: What the compiler printed, with ptxas set to verbose.
        entry_name: The kernel's symbol.

    Returns:
        The usage, or None when the log does not tell.
    """
    start = re.search(rf"Compiling entry function '{re.escape(entry_name)}'", log)
    if start is None:
        return None
    part = log[start.end() :].partition("Compiling entry function")[0]
    # Of a device function that is not inlined ptxas prints a stack frame too, and a kernel that calls it uses it.
    numbers = {name: sum(map(int, re.findall(pattern, part))) for name, pattern in _NUMBERS.items()}
    if numbers["num_registers"] == 0 or "bytes stack frame" not in part:
        return None
    return ResourceUsage(**numbers)
