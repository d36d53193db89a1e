"""Owns symmetric memory: one window a buffer, divided into a control area and a heap.

The control area holds flags and counters that ranks write to each other; it is zeroed once, before any peer can write.
What they are called and mean belongs to the features: each declares its regions by name. How NCCL registers a window is
in `deep_ep_core.nccl`, how a heap works in `heap`.
"""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Protocol

import torch

from deep_ep_core.align import align_up
from deep_ep_core.errors import ConfigError, RankMismatchError, TransportError
from deep_ep_core.heap import Heap
from deep_ep_core.nccl.communicator import REGISTER_WINDOW, Communicator
from deep_ep_core.nccl.window import WINDOW_ALIGNMENT, NcclMemory, Window, WindowFlags
from deep_ep_core.raw_tensor import tensor_over
from deep_ep_core.stream_order import StreamOrder
from deep_ep_core.transport import AgreedField

__all__ = ["ControlLayout", "ControlRegion", "SymmetricMemory"]


@dataclass(frozen=True, slots=True, kw_only=True)
class ControlRegion:
    """A part of the control area, declared by its user.

    Attributes:
        name: Unique in its window, by convention `feature.what`.
        num_bytes: Its size; the same on every rank.
        alignment: Its offset is a multiple of this many bytes; 128 keeps it in cache lines of its own.

    Raises:
        ConfigError: A size is below 1, or the alignment no power of two of at most 4096.
    """

    name: str
    num_bytes: int
    alignment: int = 128

    def __post_init__(self) -> None:
        if self.num_bytes < 1:
            raise ConfigError(f"num_bytes of control region {self.name} must be at least 1 (got {self.num_bytes})")
        if self.alignment < 1 or self.alignment & (self.alignment - 1) or self.alignment > WINDOW_ALIGNMENT:
            raise ConfigError(
                f"alignment of control region {self.name} must be a power of two, at most {WINDOW_ALIGNMENT} "
                f"(got {self.alignment})"
            )


class ControlLayout:
    """Where the regions of a control area lie: one behind the other, in the order given.

    Args:
        regions: The regions.

    Attributes:
        num_bytes: Size of the control area, up to where the heap may begin.

    Raises:
        ConfigError: Two regions have one name.
    """

    def __init__(self, regions: Sequence[ControlRegion]) -> None:
        self._regions: dict[str, tuple[int, ControlRegion]] = {}
        end = 0
        for region in regions:
            if region.name in self._regions:
                raise ConfigError(f"a control region's name must be unique (got {region.name} twice)")
            offset = align_up(end, region.alignment)
            self._regions[region.name] = offset, region
            end = offset + region.num_bytes
        self.num_bytes = align_up(end, WINDOW_ALIGNMENT)

    def offset_of(self, name: str) -> int:
        """Offset of a region in the window, in bytes.

        Raises:
            ConfigError: There is no region of that name.
        """
        return self._find(name)[0]

    def num_bytes_of(self, name: str) -> int:
        """Size of a region.

        Raises:
            ConfigError: There is no region of that name.
        """
        return self._find(name)[1].num_bytes

    @property
    def digest(self) -> int:
        """A number of 63 bits that two layouts share if they are the same."""
        text = repr([(offset, region) for offset, region in self._regions.values()])
        return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "little") >> 1

    def _find(self, name: str) -> tuple[int, ControlRegion]:
        if name not in self._regions:
            raise ConfigError(f"a control region must be declared (got {name}; there are {', '.join(self._regions)})")
        return self._regions[name]


class Memory(Protocol):
    """Memory that lives as long as this object is referred to."""

    address: int


class SymmetricMemory:
    """One window of a rank, of the same size on every rank: a control area, and a heap behind it.

    Ranks find each other's control regions at the same offset. What is in the heap lies where each rank put it: its
    offset must be told to the others.

    Args:
        communicator: The ranks.
        regions: The regions of the control area; the same on every rank. All bytes are zero at first.
        heap_bytes: Size of the heap; the same on every rank.
        alignment: Heap tensors begin at multiples of this many bytes.
        flags: How to register the window.
        allocate: Allocates the memory, for tests; None takes it from NCCL.
        order: The device's streams, for tests; None takes them from the device.

    Attributes:
        device: Device of the memory.
        layout: Where the control regions lie.
        heap: The heap.
        window: The registered window.
        address: Where this rank sees its own memory.
        num_bytes: Size of the window.

    Raises:
        TransportError: There is not enough memory, or NCCL could not register it.
        RankMismatchError: Ranks passed different regions or sizes.
        CommTimeoutError: A rank did not take part.

    Collective: the constructor is; `close` is not. Stream: the host waits until the control area is zeroed.
    """

    def __init__(
        self,
        communicator: Communicator,
        *,
        regions: Sequence[ControlRegion],
        heap_bytes: int,
        alignment: int = 256,
        flags: WindowFlags = WindowFlags.STRICT_ORDERING,
        allocate: Callable[[int], Memory] | None = None,
        order: StreamOrder | None = None,
    ) -> None:
        if heap_bytes < 0:
            raise ConfigError(f"heap_bytes must be at least 0 (got {heap_bytes})")
        self.device = communicator.device
        self.layout = ControlLayout(regions)
        # A window must have a byte, and a size that is a whole number of pages keeps all ranks' layouts alike.
        self.num_bytes = max(align_up(self.layout.num_bytes + heap_bytes, WINDOW_ALIGNMENT), WINDOW_ALIGNMENT)
        self._communicator = communicator
        memory = self._allocate(allocate or functools.partial(NcclMemory, communicator.library, self.device))
        self._memory: Memory | None = memory
        self.address = memory.address
        self.heap = Heap(
            self.address + self.layout.num_bytes,
            self.num_bytes - self.layout.num_bytes,
            self.device,
            memory,
            alignment=alignment,
            order=order,
        )
        # The ranks have met since the zeroing: no peer can write before it.
        self.window = Window(communicator, self.address, self.num_bytes, flags)
        self._peer_addresses = [self._find_peer(rank) for rank in range(communicator.num_ranks)]
        self._is_closed = False

    def control(self, name: str, dtype: torch.dtype = torch.uint8) -> torch.Tensor:
        """A control region of this rank as a flat tensor, which keeps the memory alive.

        Raises:
            ConfigError: There is no region of that name, or its size is no whole number of elements.
        """
        offset, num_bytes = self.layout.offset_of(name), self.layout.num_bytes_of(name)
        if num_bytes % dtype.itemsize:
            raise ConfigError(f"control region {name} of {num_bytes} bytes must hold whole elements (got {dtype})")
        return self._tensor(offset, num_bytes).view(dtype)

    def offset_of(self, tensor: torch.Tensor) -> int | None:
        """Offset of a heap tensor's first element in the window, in bytes; None for other tensors."""
        offset = self.heap.offset_of(tensor)
        return None if offset is None else self.layout.num_bytes + offset

    def peer_address(self, rank: int, offset: int = 0) -> int | None:
        """Where this rank sees a byte of a rank's window; None where load and store do not reach it.

        For this rank it is `address`, and not the second place where NCCL maps the window: one kernel must not reach a
        byte by two addresses without a fence between them.
        """
        base = self._peer_addresses[rank]
        return None if base is None else base + offset

    def lsa_addresses(self, offset: int = 0) -> tuple[int, ...]:
        """Where this rank sees a byte of the window of each rank of its LSA team, in their order there."""
        first = self._communicator.rank - self._communicator.lsa.rank
        team = range(first, first + self._communicator.lsa.num_ranks)
        return tuple(base + offset for base in (self._peer_addresses[rank] for rank in team) if base is not None)

    def close(self) -> None:
        """Withdraw the window from the peers and hand out no more tensors.

        Tensors that live stay valid; the memory is freed with the last of them. The device is waited for first, so that
        no kernel of this rank is cut off. Never waits for a peer, never raises, may be repeated, in any order with the
        communicator's. Collective: no; ranks that must not lose a peer's window meet before.
        """
        if self._is_closed:
            return
        self._is_closed = True
        self.window.close()
        self.heap.close()
        self._memory = None

    def _allocate(self, allocate: Callable[[int], Memory]) -> Memory:
        """Memory for the window, its control area zeroed; on return every rank has done the same."""
        memory: Memory | None = None
        failure: TransportError | None = None
        try:
            memory = allocate(self.num_bytes)
            if self.layout.num_bytes:
                tensor_over(memory.address, self.layout.num_bytes, self.device, memory).zero_()
            if self.device.type == "cuda":
                torch.cuda.current_stream(self.device).synchronize()
        except TransportError as error:
            # Told to the others before it is raised: they must not wait for a rank that cannot come.
            failure = error
        layout = AgreedField(name="layout of the control area", value=self.layout.digest)
        outcome = AgreedField(name="memory", value=int(failure is None), show=lambda flag: "found" if flag else "none")
        try:
            self._communicator.agree(REGISTER_WINDOW, [layout, outcome])
        except RankMismatchError:
            if failure is None:
                raise
        if failure is not None:
            raise failure
        assert memory is not None
        return memory

    def _find_peer(self, rank: int) -> int | None:
        return self.address if rank == self._communicator.rank else self.window.peer_address(rank)

    def _tensor(self, offset: int, num_bytes: int) -> torch.Tensor:
        memory = self._memory
        if memory is None:
            raise ConfigError("the window must be open, but it is closed; make a new buffer")
        return tensor_over(memory.address + offset, num_bytes, self.device, memory)

    def __enter__(self) -> SymmetricMemory:
        return self

    def __exit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def __repr__(self) -> str:
        state = "closed" if self._is_closed else f"{self.heap!r}"
        return f"SymmetricMemory({self._communicator.where}, {self.layout.num_bytes} bytes of control, {state})"
