"""Owns copies between memory that this GPU reaches, in one batch and without a kernel.

Who may overwrite what, and when, is the caller's affair: `stream_signals` orders the streams of ranks.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from deep_ep_core.jit.driver import check_status, load_driver

__all__ = ["Copy", "copy_batch"]

# The batched call refuses the legacy default stream.
_LEGACY_DEFAULT_STREAM = 0


class Copy(NamedTuple):
    """One copy of a batch.

    Attributes:
        dst: Address of the first byte to write; of this device, of a peer's window, or of pinned memory.
        src: Address of the first byte to read, likewise.
        num_bytes: How many; 0 copies nothing.
    """

    dst: int
    src: int
    num_bytes: int


def copy_batch(stream: int, copies: Sequence[Copy]) -> None:
    """Copy by the copy engines, which leaves the SMs to others. Does not block the host.

    One call of the driver carries several copies (`cuMemcpyBatchAsync`, from driver 13.0), and may spread them over
    engines; with an older driver, and on the legacy default stream, each copy is a call of its own. So is a single one,
    which is cheaper for the host.

    Args:
        stream: Handle of the stream.
        copies: The copies, in no order among themselves: none may touch what another one writes.

    Raises:
        TransportError: A call fails.

    Collective: no. Stream: as a whole in the order of `stream`.
    """
    moving = [copy for copy in copies if copy.num_bytes]
    if not moving:
        return
    is_batch = len(moving) > 1 and stream != _LEGACY_DEFAULT_STREAM
    if is_batch and (batch := _find_batch_call()) is not None:
        batch(stream, moving)
        return
    driver = load_driver()
    for copy in moving:
        check_status(driver, "cuMemcpyAsync", driver.cuMemcpyAsync(copy.dst, copy.src, copy.num_bytes, stream)[0])


@functools.cache
def _find_batch_call() -> Callable[[int, Sequence[Copy]], None] | None:
    """The batched call; None where this driver has none."""
    driver = load_driver()
    status, version = driver.cuDriverGetVersion()
    check_status(driver, "cuDriverGetVersion", status)
    if version < 13000 or not hasattr(driver, "cuMemcpyBatchAsync"):
        return None
    attributes = driver.CUmemcpyAttributes()
    attributes.srcAccessOrder = driver.CUmemcpySrcAccessOrder.CU_MEMCPY_SRC_ACCESS_ORDER_STREAM
    # Within one GPU the driver may copy with SMs; this asks for the engines there too.
    attributes.flags = driver.CUmemcpyFlags.CU_MEMCPY_FLAG_PREFER_OVERLAP_WITH_COMPUTE.value
    all_alike: tuple[list[Any], list[int], int] = ([attributes], [0], 1)
    pointer = driver.CUdeviceptr

    def copy(stream: int, copies: Sequence[Copy]) -> None:
        status = driver.cuMemcpyBatchAsync(
            [pointer(one.dst) for one in copies],
            [pointer(one.src) for one in copies],
            [one.num_bytes for one in copies],
            len(copies),
            *all_alike,
            stream,
        )[0]
        check_status(driver, "cuMemcpyBatchAsync", status)

    return copy
