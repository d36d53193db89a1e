"""Owns memory that NCCL allocates, and the windows in which ranks reach each other's.

How a window is divided is not known here: `deep_ep_core.window` gives it a control area and a heap.
"""

from __future__ import annotations

import ctypes
import logging
import weakref
from enum import IntFlag
from types import TracebackType

import torch

from deep_ep_core.errors import TransportError
from deep_ep_core.nccl.communicator import REGISTER_WINDOW, Communicator, wait_for_device
from deep_ep_core.nccl.library import NcclLibrary
from deep_ep_core.transport import AgreedField

__all__ = ["WINDOW_ALIGNMENT", "NcclMemory", "Window", "WindowFlags"]

logger = logging.getLogger(__name__)

WINDOW_ALIGNMENT = 4096
"""What NCCL wants the address of a window to be a multiple of, in bytes."""


class WindowFlags(IntFlag):
    """How a window is registered. NCCL's numbers."""

    DEFAULT = 0
    COLL_SYMMETRIC = 1
    STRICT_ORDERING = 2


class NcclMemory:
    """Device memory that NCCL allocated and can share with other ranks.

    Freed when the last reference to this object goes, so whoever may touch the memory holds one. Where memory is short,
    what torch has cached is given back first.

    Args:
        library: The NCCL to allocate from.
        device: Device to allocate on.
        num_bytes: Size; NCCL rounds up to what the driver hands out.

    Attributes:
        address: Where it begins.
        num_bytes: Size as asked for.
        device: Device that it is on.

    Raises:
        TransportError: There is not enough memory.
    """

    def __init__(self, library: NcclLibrary, device: torch.device, num_bytes: int) -> None:
        found = ctypes.c_void_p()
        with torch.cuda.device(device):
            try:
                library.call("ncclMemAlloc", ctypes.byref(found), num_bytes)
            except TransportError:
                torch.cuda.empty_cache()
                library.call("ncclMemAlloc", ctypes.byref(found), num_bytes)
        if found.value is None:
            raise TransportError(f"ncclMemAlloc of {num_bytes} bytes gave no memory", call="ncclMemAlloc")
        self.address = found.value
        self.num_bytes = num_bytes
        self.device = device
        # At exit the driver frees everything, and what is still running must not lose its memory before.
        weakref.finalize(self, _free, library, device, found.value).atexit = False

    def __repr__(self) -> str:
        return f"NcclMemory({self.num_bytes} bytes at {self.address:#x} on {self.device})"


def _free(library: NcclLibrary, device: torch.device, address: int) -> None:
    try:
        with torch.cuda.device(device):
            # Kernels that touch it were launched before its last reference went.
            wait_for_device(device)
            library.call("ncclMemFree", address)
    except Exception as error:
        # This runs wherever the last reference goes, where nobody could handle it.
        logger.warning("memory at %#x on %s was left behind: %s", address, device, error)


class Window:
    """Memory of this rank, registered so that the other ranks reach it.

    Args:
        communicator: The ranks.
        address: Begin of the memory, a multiple of 4096. Allocated by NCCL, or by `cuMemCreate` with a shareable
            handle.
        num_bytes: Its size; the same on every rank.
        flags: How to register it.

    Attributes:
        num_bytes: Its size.

    Raises:
        TransportError: NCCL could not register it.
        RankMismatchError: Ranks passed different sizes or flags.
        CommTimeoutError: A rank did not take part.

    Collective: the constructor is; `close` is not, may be repeated, and may come after the communicator's.
    """

    def __init__(
        self,
        communicator: Communicator,
        address: int,
        num_bytes: int,
        flags: WindowFlags = WindowFlags.STRICT_ORDERING,
    ) -> None:
        self._handle: int | None = None
        self.num_bytes = num_bytes
        self._communicator = communicator
        communicator.agree(
            REGISTER_WINDOW,
            [AgreedField(name="window size", value=num_bytes), AgreedField(name="window flags", value=int(flags))],
        )
        found = ctypes.c_void_p()
        communicator.call("ncclCommWindowRegister", address, num_bytes, ctypes.byref(found), int(flags), keep=found)
        # NCCL reports success and no window where the ranks' memory cannot be shared.
        if found.value is None:
            raise TransportError(
                f"NCCL must register memory of {num_bytes} bytes as a window, but did not on {communicator.where}; the "
                "GPUs of a node must reach each other, and NCCL_CUMEM_ENABLE and NCCL_WIN_ENABLE must not be 0",
                call="ncclCommWindowRegister",
            )
        self._handle = found.value
        communicator.adopt(self)

    @property
    def handle(self) -> int:
        """`ncclWindow_t`, which kernels take.

        Raises:
            TransportError: The window is closed.
        """
        if self._handle is None:
            raise TransportError(f"the window of {self._communicator.where} is closed; register it again")
        return self._handle

    def lsa_address(self, lsa_rank: int, offset: int = 0) -> int:
        """Where this rank sees a byte of the window of a rank of its LSA team, this rank included.

        Args:
            lsa_rank: Place of that rank in the team.
            offset: Byte in the window.

        Raises:
            TransportError: There is no such rank or byte.
        """
        found = ctypes.c_void_p()
        where = self._communicator.where
        self._communicator.library.call(
            "ncclGetLsaDevicePointer", self.handle, offset, lsa_rank, ctypes.byref(found), where=where
        )
        return found.value or 0

    def peer_address(self, rank: int, offset: int = 0) -> int | None:
        """Where this rank sees a byte of the window of any rank; None where load and store do not reach it.

        Raises:
            TransportError: There is no such rank or byte.
        """
        found = ctypes.c_void_p()
        where = self._communicator.where
        self._communicator.library.call(
            "ncclGetPeerDevicePointer", self.handle, offset, rank, ctypes.byref(found), where=where
        )
        return found.value

    def close(self) -> None:
        """Deregister the memory, which stays its owner's, once this rank's device has done what it was given.

        Never waits for a peer, never raises, may be repeated.

        Collective: no; a peer that still uses its view of the memory may go on.
        """
        handle, self._handle = self._handle, None
        # A communicator that is gone took its windows along.
        if handle is None or not self._communicator.is_alive:
            return
        wait_for_device(self._communicator.device)
        try:
            self._communicator.call("ncclCommWindowDeregister", handle)
        except Exception as error:
            logger.warning("a window of %s was left behind: %s", self._communicator.where, error)

    def __del__(self) -> None:
        self.close()

    def __enter__(self) -> Window:
        return self

    def __exit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def __repr__(self) -> str:
        state = "closed" if self._handle is None else f"{self._handle:#x}"
        return f"Window({self.num_bytes} bytes, {state})"
