"""Owns a heap over memory that torch did not allocate, and whose regions are torch tensors until their last view dies.

Reuse follows the streams, as with torch's own allocator: at once by a stream that used the region, by another one
behind an event, and never outside the graph where a region was handed out during a capture. What the memory is, and
whether peers reach it, is not known here.
"""

from __future__ import annotations

import functools
import itertools
import math
import threading
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from deep_ep_core.errors import ConfigError
from deep_ep_core.free_ranges import Fence, FreeRange, FreeRanges
from deep_ep_core.raw_tensor import tensor_over
from deep_ep_core.stream_order import CudaStreamOrder, HostOrder, StreamOrder

__all__ = ["Heap", "HeapFullError", "HeapStats", "Reservation"]

# Capture of a region that can never be handed out again: no capture of CUDA's has this number.
_LOST = -1


class HeapFullError(ConfigError):
    """A heap has no region that is large enough."""


@dataclass(frozen=True, slots=True, kw_only=True)
class HeapStats:
    """What a heap is used for.

    Attributes:
        num_bytes: Size of the heap.
        used_bytes: Bytes of regions that are handed out, alignment included.
        peak_used_bytes: The most that ever were.
        free_bytes: Bytes that any stream may have.
        largest_free_bytes: Size of the largest such region.
        graph_bytes: Bytes that are not handed out, but that graphs use when they are replayed.
        num_regions: Regions that are handed out.
    """

    num_bytes: int
    used_bytes: int
    peak_used_bytes: int
    free_bytes: int
    largest_free_bytes: int
    graph_bytes: int
    num_regions: int


@dataclass(slots=True, kw_only=True, eq=False)
class _Region:
    """A region that is handed out, or on its way back: the range that it was and will be, and who used it since."""

    place: FreeRange
    streams: set[int]
    # By stream, once known; None until then.
    fences: dict[int, Fence] | None = None


class Reservation:
    """A region of a heap whose final size is not known yet; made by `Heap.try_reserve`.

    Kernels may be given its place at once. It goes back when this object is dropped before `take`.

    Args:
        heap: The heap.
        region: The region.

    Attributes:
        offset: Where it begins, in bytes from the heap's address.
        address: Where it begins in memory.
    """

    __slots__ = ("_heap", "_region", "address", "offset")

    def __init__(self, heap: Heap, region: _Region) -> None:
        self._heap = heap
        self._region: _Region | None = region
        self.offset = region.place.offset
        self.address = heap._address + self.offset

    def take(self, shape: Sequence[int], dtype: torch.dtype) -> torch.Tensor:
        """The tensor that begins where the region does. Once only.

        What lies behind it goes back to the heap, at the latest when something else has no room otherwise.

        Args:
            shape: Its shape; it must fit in the region.
            dtype: Its dtype.

        Raises:
            ConfigError: It does not fit, or was taken already.

        Stream: what lies behind it is free behind the work that the region's streams have when it goes back.
        """
        region, self._region = self._region, None
        if region is None:
            raise ConfigError("a reservation can be taken once, but it was taken before; reserve again")
        try:
            return self._heap._take_reserved(region, shape, dtype)
        except BaseException:
            self._region = region
            raise

    def __del__(self) -> None:
        if self._region is not None:
            self._heap._release(self._region)


class Heap:
    """Hands out regions of some memory as tensors.

    A region is free when no tensor shares its storage any more. Safe to use from several threads.

    Args:
        address: Begin of the memory, a multiple of `alignment`.
        num_bytes: Its size.
        device: Device that it is memory of.
        memory: An object that owns the memory. It is referred to until this heap is closed and the last region is back.
        alignment: Regions begin at multiples of this many bytes from the first, a power of two.
        order: The device's streams; None takes them from the device.

    Raises:
        ConfigError: The address or the alignment is off.
    """

    def __init__(
        self,
        address: int,
        num_bytes: int,
        device: torch.device,
        memory: object,
        *,
        alignment: int = 256,
        order: StreamOrder | None = None,
    ) -> None:
        if alignment < 1 or alignment & (alignment - 1) or address % alignment:
            raise ConfigError(
                f"a heap's alignment must be a power of two that divides its address (got {alignment}, {address:#x})"
            )
        self.device = device
        self._address = address
        self._num_bytes = num_bytes // alignment * alignment
        self._alignment = alignment
        self._memory: object | None = memory
        if order is None:
            order = CudaStreamOrder(device) if device.type == "cuda" else HostOrder()
        self._order: StreamOrder = order
        self._lock = threading.Lock()
        self._free = FreeRanges(self._num_bytes)
        # Free ranges by size, as they came back: the next request is most often one for the same size. They join the
        # others when nothing fits.
        self._parked: dict[int, list[FreeRange]] = {}
        # Fences that need no event any more, as the number up to which that is so, by stream: the work is done, or the
        # first stream of a pair has waited for the second one. And from which number on the work was not yet done when
        # this allocation looked.
        self._done: dict[int, int] = {}
        self._waited: dict[tuple[int, int], int] = {}
        self._under_way: dict[int, int] = {}
        self._regions: dict[int, _Region] = {}
        # Regions of which a tensor took a part, by offset, and the size of that part. The rest goes back when there is
        # no room without it; otherwise with the tensor, so that a region that is reserved again and again is one piece.
        self._part_bytes: dict[int, tuple[_Region, int]] = {}
        self._used_bytes = self._peak_used_bytes = 0
        # Regions whose last view died, and of those the ones without fences. A storage may die anywhere, also inside
        # this class, so its death only adds to a queue.
        self._returned: deque[_Region] = deque()
        self._unfenced: list[_Region] = []
        self._fence_lock = threading.Lock()
        self._fence_numbers = itertools.count(1)

    def empty(self, shape: Sequence[int], dtype: torch.dtype) -> torch.Tensor:
        """A new tensor in the heap, its values undefined.

        Raises:
            HeapFullError: No free region is large enough.
            ConfigError: The heap is closed.

        Stream: usable on the current stream, which may have to wait for others first. Collective: no.
        """
        tensor = self.try_empty(shape, dtype)
        if tensor is None:
            raise self._full_error(shape, dtype)
        return tensor

    def try_empty(self, shape: Sequence[int], dtype: torch.dtype) -> torch.Tensor | None:
        """`empty`, but None where no free region is large enough."""
        num_bytes = math.prod(shape) * dtype.itemsize
        # A tensor without elements gets a place too, so that every tensor has an offset.
        region = self._allocate(self._whole(num_bytes))
        return None if region is None else self._tensor(region, shape, dtype)

    def try_reserve(self, num_bytes: int) -> Reservation | None:
        """A region of at least so many bytes, of which a tensor is made later; None where no free one is large enough.

        Raises:
            ConfigError: The heap is closed.

        Stream: as `empty`. Collective: no.
        """
        region = self._allocate(self._whole(num_bytes))
        return None if region is None else Reservation(self, region)

    def reserve(self, num_bytes: int) -> Reservation:
        """`try_reserve`, but an error where no free region is large enough.

        Raises:
            HeapFullError: No free region is large enough.
            ConfigError: The heap is closed.

        Stream: as `empty`. Collective: no.
        """
        reservation = self.try_reserve(num_bytes)
        if reservation is None:
            raise self._full_error((num_bytes,), torch.uint8)
        return reservation

    def _full_error(self, shape: Sequence[int], dtype: torch.dtype) -> HeapFullError:
        stats = self.stats()
        return HeapFullError(
            f"the heap must have a free region of {math.prod(shape) * dtype.itemsize} bytes for {list(shape)} "
            f"{dtype}, but of {stats.num_bytes} bytes {stats.used_bytes} are used by {stats.num_regions} tensors "
            f"and {stats.graph_bytes} by graphs, and the largest free region has {stats.largest_free_bytes}; make "
            "it larger, or drop tensors that are no longer needed"
        )

    def _whole(self, num_bytes: int) -> int:
        return -(-(num_bytes or 1) // self._alignment) * self._alignment

    def _take_reserved(self, region: _Region, shape: Sequence[int], dtype: torch.dtype) -> torch.Tensor:
        if self._memory is None:
            raise ConfigError("the heap must be open to hand out tensors, but it is closed; make a new one")
        place, num_bytes = region.place, self._whole(math.prod(shape) * dtype.itemsize)
        if num_bytes > place.num_bytes:
            raise ConfigError(
                f"a tensor must fit in its reservation of {place.num_bytes} bytes (got {num_bytes} for {list(shape)} "
                f"{dtype}); reserve more"
            )
        with self._lock:
            if num_bytes < place.num_bytes:
                self._part_bytes[place.offset] = region, num_bytes
        return self._tensor(region, shape, dtype)

    def _cut_parts(self) -> None:
        """Give back what lies behind the tensors that took a part of their regions."""
        while self._part_bytes:
            offset, (region, num_bytes) = self._part_bytes.popitem()
            place = region.place
            rest = FreeRange(offset=offset + num_bytes, num_bytes=place.num_bytes - num_bytes, capture=place.capture)
            place.num_bytes = num_bytes
            behind = self._regions[rest.offset] = _Region(place=rest, streams=set(region.streams))
            self._release(behind)

    def _tensor(self, region: _Region, shape: Sequence[int], dtype: torch.dtype) -> torch.Tensor:
        num_bytes = math.prod(shape) * dtype.itemsize
        # The memory is its owner: it must outlive this region even if the heap is closed before.
        return tensor_over(
            self._address + region.place.offset,
            num_bytes or 1,
            self.device,
            self._memory,
            functools.partial(self._release, region),
            shape=shape,
            dtype=dtype,
        )

    def offset_of(self, tensor: torch.Tensor) -> int | None:
        """Offset of a tensor's first element from the heap's address, in bytes; None where it lies elsewhere."""
        # Of the storage: a tensor without elements has no address.
        storage_offset = tensor.untyped_storage().data_ptr() - self._address
        if not 0 <= storage_offset < self._num_bytes:
            return None
        return storage_offset + int(tensor.storage_offset()) * tensor.element_size()

    def record_stream(self, tensor: torch.Tensor, stream: torch.cuda.Stream) -> None:
        """Tell the heap that a stream uses a tensor of it, so that its region waits for that stream once it is free.

        The stream that a tensor was made on, and the one that is current where its last view dies, count anyway.
        `Tensor.record_stream` is no substitute: it does nothing for memory that is not torch's.

        Raises:
            ConfigError: The tensor does not live in this heap.
        """
        region = self._regions.get(tensor.untyped_storage().data_ptr() - self._address)
        if region is None:
            raise ConfigError(f"record_stream needs a tensor of this heap (got {list(tensor.shape)} {tensor.dtype})")
        region.streams.add(stream.cuda_stream)

    def stats(self) -> HeapStats:
        """What the heap is used for now."""
        with self._lock:
            self._take_back()
            self._cut_parts()
            self._take_back()
            self._join_parked()
            free_bytes = [free.num_bytes for free in self._free if free.capture is None]
            return HeapStats(
                num_bytes=self._num_bytes,
                used_bytes=self._used_bytes,
                peak_used_bytes=self._peak_used_bytes,
                free_bytes=sum(free_bytes),
                largest_free_bytes=max(free_bytes, default=0),
                graph_bytes=sum(free.num_bytes for free in self._free if free.capture is not None),
                num_regions=len(self._regions),
            )

    def close(self) -> None:
        """Hand out no more regions. Tensors that live stay valid; the memory goes with the last of them."""
        with self._lock:
            self._memory = None

    @property
    def is_closed(self) -> bool:
        """Whether `close` was called."""
        return self._memory is None

    def _allocate(self, num_bytes: int) -> _Region | None:
        with self._lock:
            if self._memory is None:
                raise ConfigError("the heap must be open to hand out tensors, but it is closed; make a new one")
            if self._returned or self._unfenced:
                self._take_back()
            self._under_way.clear()
            stream = self._order.current()
            capture = self._order.capture_of(stream)
            place = self._take(num_bytes, stream, capture)
            if place is None and self._part_bytes:
                self._cut_parts()
                self._take_back()
                place = self._take(num_bytes, stream, capture)
            if place is None:
                return None
            region = _Region(place=place, streams={stream})
            self._regions[place.offset] = region
            self._used_bytes += num_bytes
            if self._used_bytes > self._peak_used_bytes:
                self._peak_used_bytes = self._used_bytes
            return region

    def _take(self, num_bytes: int, stream: int, capture: int | None) -> FreeRange | None:
        """The best free range of some size, behind whose fences the stream is brought; None if there is none."""
        parked = self._parked.get(num_bytes, [])
        for idx in range(len(parked) - 1, -1, -1):
            if self._fences_ahead(parked[idx], stream, capture) == []:
                found = parked.pop(idx)
                found.capture = capture
                return found
        return self._take_behind_fences(num_bytes, parked, stream, capture)

    def _take_behind_fences(
        self, num_bytes: int, parked: list[FreeRange], stream: int, capture: int | None
    ) -> FreeRange | None:
        """`_take` where none of the parked ranges of that size can be had at once."""

        def cost_of(free: FreeRange) -> int | None:
            ahead = self._fences_ahead(free, stream, capture)
            return None if ahead is None else int(bool(ahead))

        found = self._free.take(num_bytes, lambda free: 0 if cost_of(free) == 0 else None)
        if found is None and parked and cost_of(parked[-1]) is not None:
            found = parked.pop()
        if found is None:
            self._join_parked()
            found = self._free.take(num_bytes, cost_of)
        if found is None:
            return None
        for other, fence in self._fences_ahead(found, stream, capture) or ():
            self._order.wait(stream, fence.event)
            if capture is None:
                self._waited[stream, other] = fence.number
        found.capture = capture
        return found

    def _join_parked(self) -> None:
        for parked in self._parked.values():
            for free in parked:
                self._free.put(free)
        self._parked.clear()

    def _fences_ahead(self, free: FreeRange, stream: int, capture: int | None) -> list[tuple[int, Fence]] | None:
        """What a stream must wait for before it may have a range; None if that is out of reach."""
        if capture is None and free.capture is None and len(free.fences) == 1 and stream in free.fences:
            # By far the most frequent case, and the quickest to tell.
            return []
        if free.capture is not None:
            if free.capture != capture:
                return None
            return [(other, fence) for other, fence in free.fences.items() if other != stream]
        if capture is not None:
            # A graph is replayed on any stream and cannot wait for what came before it, so nothing may be under way.
            return [] if all(self._is_done(other, fence) for other, fence in free.fences.items()) else None
        return [
            (other, fence)
            for other, fence in free.fences.items()
            if other != stream
            and fence.number > self._waited.get((stream, other), 0)
            and not self._is_done(other, fence)
        ]

    def _is_done(self, stream: int, fence: Fence) -> bool:
        """Whether the work of a stream in front of a fence is done. A stream's fences are passed in their order."""
        if fence.number <= self._done.get(stream, 0):
            return True
        if fence.number >= self._under_way.get(stream, math.inf):
            return False
        is_done = self._order.is_done(fence.event)
        (self._done if is_done else self._under_way)[stream] = fence.number
        return is_done

    def _release(self, region: _Region) -> None:
        """The last view of a region died. Runs in any thread, between any two steps of it."""
        if self._memory is None:
            return
        # The stream that is current here has probably used the tensor; not all users tell.
        region.streams.add(self._order.current())
        # Fences are numbered in the order of their events. Whoever cannot have the lock leaves that to `_take_back`.
        if self._fence_lock.acquire(blocking=False):
            try:
                self._fence(region)
            finally:
                self._fence_lock.release()
        self._returned.append(region)

    def _fence(self, region: _Region) -> None:
        """Record where the streams of a region stand, if that is possible now."""
        capture = region.place.capture
        for stream in region.streams:
            if self._order.capture_of(stream) != capture:
                if capture is not None:
                    # Its capture is over, or another stream joined in: no stream can be told to wait for it.
                    region.place.capture = _LOST
                    region.fences = {}
                # Else the stream is captured at present, and an event of it would become part of the graph.
                return
        fences = {}
        for stream in region.streams:
            event = self._order.record(stream)
            fences[stream] = Fence(next(self._fence_numbers), event)
        region.fences = fences

    def _take_back(self) -> None:
        """Make the regions whose views died free again, where it is known behind which fences."""
        while self._returned:
            region = self._returned.popleft()
            if region.fences is None:
                self._unfenced.append(region)
            else:
                self._park(region, region.fences)
        num_kept = 0
        while num_kept < len(self._unfenced):
            region = self._unfenced[num_kept]
            if region.fences is None:
                with self._fence_lock:
                    self._fence(region)
            if region.fences is None:
                num_kept += 1
                continue
            del self._unfenced[num_kept]
            self._park(region, region.fences)

    def _park(self, region: _Region, fences: dict[int, Fence]) -> None:
        place = region.place
        place.fences = fences
        del self._regions[place.offset]
        self._part_bytes.pop(place.offset, None)
        self._used_bytes -= place.num_bytes
        self._parked.setdefault(place.num_bytes, []).append(place)

    def __repr__(self) -> str:
        state = "closed" if self.is_closed else f"{self._used_bytes} used"
        return f"Heap({self._num_bytes} bytes, {state}, {self.device})"
