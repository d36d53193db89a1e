"""Owns an NCCL communicator: borrowed from torch or made, asked for its properties and teams, and destroyed.

What is registered with it (windows, device communicators) lives in the modules beside this one and is closed before it.
No collective operation of NCCL runs here, other than torch's own first one where a communicator is borrowed.
"""

from __future__ import annotations

import contextlib
import ctypes
import logging
import sys
import time
import weakref
from collections.abc import Callable, Iterator, Sequence
from types import TracebackType
from typing import Any, Protocol

import torch
import torch.distributed as dist

from deep_ep_core.env import get_env
from deep_ep_core.errors import TransportError
from deep_ep_core.nccl.library import NcclLibrary, load_nccl, version_text
from deep_ep_core.nccl.properties import CommProperties, Team
from deep_ep_core.nccl.structs import TeamStruct, UniqueId, new_struct
from deep_ep_core.topology import Topology
from deep_ep_core.transport import AgreedField, CollectiveTransport, Operation

__all__ = ["CREATE_DEVICE_COMM", "REGISTER_WINDOW", "Communicator", "wait_for_device"]

logger = logging.getLogger(__name__)

_OPEN = "open a communicator"
# The other collective steps, for `Communicator.agree`.
REGISTER_WINDOW = "register a window"
CREATE_DEVICE_COMM = "create a device communicator"
_TIMEOUT_S = 300.0
_POLL_S = 0.0005
_NO_NCCL = 0


class Closeable(Protocol):
    """What a communicator closes before it goes itself."""

    def close(self) -> None:
        """Let go of what NCCL holds for it."""


class Communicator:
    """A communicator of NCCL over a `torch.distributed` group.

    Made by `open`. Closing is no collective call and may be repeated; the order of closing this and what was
    registered with it does not matter.

    Args:
        library: The NCCL that it belongs to.
        handle: `ncclComm_t`.
        transport: Row exchanges of the same group, for what ranks must agree on.
        device: Device of this rank.
        is_owned: Whether `close` destroys it.
        is_handle_valid: Whether the handle still stands; torch may destroy what it lent.

    Attributes:
        library: The NCCL that it belongs to.
        device: Device of this rank.
        is_owned: Whether it was made here; False where it is torch's.
        rank: This rank, the same in the group and the communicator.
        num_ranks: Number of ranks.
        properties: What NCCL says of it.
        world: Team of all ranks.
        lsa: Team of the ranks that reach each other's windows by load and store, this one among them.
        rail: Team of the ranks with this rank's place in every LSA team.
    """

    def __init__(
        self,
        library: NcclLibrary,
        handle: int,
        *,
        transport: CollectiveTransport,
        device: torch.device,
        is_owned: bool,
        is_handle_valid: Callable[[], bool] = lambda: True,
    ) -> None:
        self._is_closed = True
        self.library = library
        self.device = device
        self.is_owned = is_owned
        self.rank, self.num_ranks = transport.rank, transport.num_ranks
        self._handle = handle
        self._transport = transport
        self._is_handle_valid = is_handle_valid
        self._dependents: weakref.WeakSet[Closeable] = weakref.WeakSet()
        # What NCCL may still write to in the background after a call ran out of time.
        self._pinned: list[Any] = []
        self._is_closed = False
        try:
            self.properties = self._query_properties()
            self._check_properties()
            self.world, self.lsa, self.rail = map(self._team, ("ncclTeamWorld", "ncclTeamLsa", "ncclTeamRail"))
        except BaseException:
            self.close()
            raise

    @classmethod
    def open(
        cls,
        group: dist.ProcessGroup | None,
        device: torch.device,
        *,
        reuse: bool | None = None,
        timeout_s: float = _TIMEOUT_S,
        load_library: Callable[[], NcclLibrary] = load_nccl,
    ) -> Communicator:
        """Borrow torch's communicator of a group, or make one where torch has none to lend.

        Args:
            group: Any `torch.distributed` group, or None for the default group.
            device: CUDA device of this rank; without an index the current one.
            reuse: Whether to borrow torch's; None follows `EP_REUSE_NCCL_COMM`.
            timeout_s: How long this and later collective steps wait for the other ranks.
            load_library: Gives the library, for tests.

        Raises:
            TransportError: There is no NCCL that will do, a call of NCCL failed, or NCCL can register no windows here.
            RankMismatchError: Ranks have different NCCL versions or settings.
            CommTimeoutError: A rank did not take part.

        Collective: yes. Stream: the host waits for one small all-reduce where the communicator is torch's.
        """
        if device.type == "cuda":
            device = torch.device("cuda", device.index if device.index is not None else torch.cuda.current_device())
        transport = CollectiveTransport(
            group,
            timeout_s=timeout_s,
            name="the NCCL runtime",
            operations=[_OPEN, REGISTER_WINDOW, CREATE_DEVICE_COMM],
        )
        refusal: TransportError | None = None
        library: NcclLibrary | None = None
        try:
            library = load_library()
        except TransportError as error:
            # Told to the others first: they must not wait for a rank that cannot come.
            refusal = error
        wants_reuse = get_env().reuse_nccl_comm if reuse is None else reuse
        can_reuse = library is not None and wants_reuse and _torch_backend(transport.group, device, library) is not None
        operation = transport.begin(
            _OPEN,
            [
                AgreedField(name="NCCL version", value=library.version if library else _NO_NCCL, show=_show_version),
                AgreedField(name="communicator", value=int(can_reuse), show=lambda flag: "torch's" if flag else "own"),
            ],
        )
        if library is None:
            assert refusal is not None
            raise refusal
        with _on_device(device):
            if can_reuse:
                handle, is_valid = _borrow(transport.group, device, library)
                return cls(
                    library,
                    handle,
                    transport=transport,
                    device=device,
                    is_owned=False,
                    is_handle_valid=is_valid,
                )
            unique_id = _share_unique_id(library, transport, operation)
            handle = _make(library, unique_id, transport, timeout_s)
        return cls(library, handle, transport=transport, device=device, is_owned=True)

    @property
    def handle(self) -> int:
        """`ncclComm_t`.

        Raises:
            TransportError: The communicator is closed, or torch has destroyed what it lent.
        """
        if not self.is_alive:
            why = "is closed" if self._is_closed else "was torch's, and torch has destroyed it"
            raise TransportError(f"the communicator of {self.where} {why}; open a new one")
        return self._handle

    @property
    def is_alive(self) -> bool:
        """Whether NCCL still has this communicator, and may be called: not once the interpreter ends."""
        return not self._is_closed and not sys.is_finalizing() and self._is_handle_valid()

    @property
    def where(self) -> str:
        """The rank, for messages."""
        return f"rank {self.rank} of {self.num_ranks}"

    @property
    def topology(self) -> Topology:
        """Where this rank stands, its LSA team being the scale-up domain."""
        return Topology(rank=self.rank, num_ranks=self.num_ranks, num_scaleup_ranks=self.lsa.num_ranks)

    @property
    def needs_gin(self) -> bool:
        """Whether some rank cannot be reached by load and store."""
        return self.lsa.num_ranks < self.num_ranks

    def lsa_rank_of(self, rank: int) -> int | None:
        """Place of a rank in this rank's LSA team; None where it is not in it."""
        place = rank - (self.rank - self.lsa.rank)
        return place if 0 <= place < self.lsa.num_ranks else None

    def agree(self, operation: str, fields: Sequence[AgreedField]) -> None:
        """Compare what ranks are about to ask NCCL for, and learn that all of them are there to do so.

        Args:
            operation: `REGISTER_WINDOW` or `CREATE_DEVICE_COMM`.
            fields: What every rank must ask for alike.

        Raises:
            RankMismatchError: Ranks disagree; raised on every rank.
            CommTimeoutError: A rank did not take part.

        Collective: yes.
        """
        self._transport.begin(operation, fields)

    def call(self, name: str, *args: Any, keep: object = None) -> None:
        """Call a function of NCCL with this communicator as its first argument, and wait until it is done.

        Args:
            name: Name of the function.
            args: Its other arguments.
            keep: What NCCL writes to. Kept alive if the call runs out of time.

        Raises:
            TransportError: It failed, or was not done in time.
        """
        with _on_device(self.device):
            self.library.call(name, self.handle, *args, where=self.where)
            try:
                _settle(self.library, self._handle, name, self._transport.timeout_s, self.where)
            except TransportError:
                self._pinned.append(keep)
                raise

    def adopt(self, dependent: Closeable) -> None:
        """Close `dependent` before this communicator; it is not kept alive."""
        self._dependents.add(dependent)

    def close(self) -> None:
        """Close what was registered, and destroy the communicator if it was made here.

        Never waits for a peer, never raises, may be repeated. Collective: no.
        """
        if self._is_closed or sys.is_finalizing():
            # What is open when the process ends goes with it.
            return
        for dependent in list(self._dependents):
            dependent.close()
        self._is_closed = True
        if self.is_owned:
            try:
                # Not ncclCommDestroy: that waits until the other ranks of the node have come to it too.
                with _on_device(self.device):
                    self.library.call("ncclCommAbort", self._handle, where=self.where)
            except Exception as error:
                # What is left goes with the process, and whoever closes has nothing to do about it.
                logger.warning("the communicator of %s was left behind: %s", self.where, error)

    def _query_properties(self) -> CommProperties:
        found = new_struct("ncclCommProperties", self.library.version)
        self.call("ncclCommQueryProperties", ctypes.byref(found))
        return CommProperties.read(found, self.library.version)

    def _check_properties(self) -> None:
        found, wanted = (self.properties.rank, self.properties.num_ranks), (self.rank, self.num_ranks)
        if found != wanted:
            raise TransportError(
                f"the communicator must have the ranks of its group (got rank {found[0]} of {found[1]}, on "
                f"{self.where}); set EP_REUSE_NCCL_COMM=0 to make one",
                call="ncclCommQueryProperties",
            )
        if not self.properties.has_device_api:
            raise TransportError(
                f"NCCL must be able to register windows, but says on {self.where} that it cannot; the GPUs of a node "
                "must reach each other (peer access), several nodes need a network that GIN can use, and "
                "NCCL_CUMEM_ENABLE and NCCL_WIN_ENABLE must not be 0",
                call="ncclCommQueryProperties",
            )

    def _team(self, name: str) -> Team:
        with _on_device(self.device):
            found: TeamStruct = self.library.value_of(name, self.handle)
        # The calls have no result code: they return an empty team instead.
        if found.nRanks < 1:
            raise TransportError(f"{name} failed on {self.where}; run again with NCCL_DEBUG=WARN to see why", call=name)
        return Team(num_ranks=found.nRanks, rank=found.rank, stride=found.stride)

    def __del__(self) -> None:
        self.close()

    def __enter__(self) -> Communicator:
        return self

    def __exit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def __repr__(self) -> str:
        state = "closed" if self._is_closed else "own" if self.is_owned else "torch's"
        version = version_text(self.library.version)
        return f"Communicator({self.where}, {state}, NCCL {version}, LSA team of {self.lsa.num_ranks})"


def _show_version(version: int) -> str:
    return "none that will do" if version == _NO_NCCL else version_text(version)


def _torch_backend(group: dist.ProcessGroup, device: torch.device, library: NcclLibrary) -> Any | None:
    """Torch's NCCL backend of a group; None where it has none, or where it calls another libnccl than this one."""
    if not library.is_torchs:
        return None
    try:
        backend = group._get_backend(device)
    except RuntimeError:
        # The group has no backend for this kind of device.
        return None
    return backend if hasattr(backend, "_comm_ptr") else None


def _borrow(group: dist.ProcessGroup, device: torch.device, library: NcclLibrary) -> tuple[int, Callable[[], bool]]:
    backend = _torch_backend(group, device, library)
    assert backend is not None
    # Torch makes its communicator in the first collective. Always run one: only then is it the same on all ranks.
    dist.all_reduce(torch.zeros(1, device=device), group=group)
    torch.cuda.current_stream(device).synchronize()
    handle = backend._comm_ptr()
    if not handle:
        raise TransportError(
            "torch's NCCL backend must have a communicator after an all-reduce, but it has none; set "
            "EP_REUSE_NCCL_COMM=0 to make one"
        )

    def is_valid() -> bool:
        # Torch's is gone after destroy_process_group or an abort: then the call raises, or gives another.
        with _on_device(device), contextlib.suppress(RuntimeError):
            return bool(backend._comm_ptr() == handle)
        return False

    return handle, is_valid


def _share_unique_id(library: NcclLibrary, transport: CollectiveTransport, operation: Operation) -> UniqueId:
    is_root, num_ranks = transport.rank == 0, transport.num_ranks
    unique_id = UniqueId()
    if is_root:
        library.call("ncclGetUniqueId", ctypes.byref(unique_id), where=f"rank 0 of {num_ranks}")
    row = torch.tensor([list(unique_id.internal)], dtype=torch.uint8)
    rows = row.repeat(num_ranks if is_root else 0, 1)
    num_recv_rows = [1] + [0] * (num_ranks - 1)
    received = operation.exchange_rows(rows, [int(is_root)] * num_ranks, num_recv_rows, "unique id")
    unique_id.internal[:] = received[0].tolist()
    return unique_id


def _make(library: NcclLibrary, unique_id: UniqueId, transport: CollectiveTransport, timeout_s: float) -> int:
    where = f"rank {transport.rank} of {transport.num_ranks}"
    # Not blocking, so that a rank that dies meanwhile costs no more than the timeout.
    config = new_struct("ncclConfig_t", library.version, blocking=0)
    handle = ctypes.c_void_p()
    args = (ctypes.byref(handle), transport.num_ranks, unique_id, transport.rank, ctypes.byref(config))
    try:
        library.call("ncclCommInitRankConfig", *args, where=where)
        made = handle.value or 0
        _settle(library, made, "ncclCommInitRankConfig", timeout_s, where)
    except TransportError:
        if handle.value:
            library.value_of("ncclCommAbort", handle.value)
        raise
    return made


def _settle(library: NcclLibrary, handle: int, call: str, timeout_s: float, where: str) -> None:
    """Wait until a communicator has nothing under way in the background; at once where calls of it block."""
    deadline = time.monotonic() + timeout_s
    while not library.is_settled(handle, where=where):
        if time.monotonic() > deadline:
            raise TransportError(
                f"{call} must be done within {timeout_s:g} s, but was not on {where}; look for a rank that died or "
                "hangs, or run again with NCCL_DEBUG=INFO",
                call=call,
                code_name="ncclInProgress",
            )
        time.sleep(_POLL_S)


@contextlib.contextmanager
def _on_device(device: torch.device) -> Iterator[None]:
    """Make a CUDA device current for NCCL's calls; does nothing on other devices."""
    if device.type != "cuda":
        yield
        return
    with torch.cuda.device(device):
        yield


def wait_for_device(device: torch.device) -> None:
    """Wait until a device has done all it was given, so that what its kernels use may go. Never raises."""
    # Waiting would break a capture, which in turn cannot use what goes.
    if device.type != "cuda" or torch.cuda.is_current_stream_capturing():
        return
    try:
        torch.cuda.synchronize(device)
    except Exception as error:
        # A context that is lost runs nothing any more, and the rest must be closed nevertheless.
        logger.warning("%s fails while something on it is closed: %s", device, error)
