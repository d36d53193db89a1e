"""Owns `ContextBuffer`: the public calls of sessions.

It moves nothing itself: sessions are counted in `session`, arguments checked in `checks`, bytes moved by a `Backend`,
which `choice` picks.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from types import TracebackType
from typing import Any, overload

import torch
import torch.distributed as dist

from deep_ep_core.align import align_up
from deep_ep_core.backend_choice import BackendName, agreed_by_backend, check_backend
from deep_ep_core.errors import ConfigError, RankMismatchError, TransportError
from deep_ep_core.refusals import rejected
from deep_ep_core.stream import CommScope, EventOverlap, StreamOptions, comm_stream
from deep_ep_core.transport import AgreedField, CollectiveTransport
from deep_ep_cp.agreed import OPERATIONS
from deep_ep_cp.backend import Backend, SessionCall
from deep_ep_cp.checks import check_shapes, check_sum_inputs, check_tensors
from deep_ep_cp.choice import make_backend
from deep_ep_cp.handle import SessionHandle
from deep_ep_cp.region import Region, session_bytes
from deep_ep_cp.session import Session, SessionConfig

__all__ = ["ContextBuffer"]

_BUFFER_ALIGNMENT_BYTES = 2 << 20


class ContextBuffer:
    """All-gather and reduce-scatter over the ranks of a process group, in sessions.

    A session is a stretch of calls whose results lie side by side in the buffer's memory. Every rank opens and closes
    the same sessions, and makes the same calls in them with the same shapes. What was gathered is valid until its
    session is destroyed; then the memory serves the next one.

    Args:
        group: Any `torch.distributed` group; None for the default group.
        num_bytes: Size of the buffer's memory, a multiple of 2 MiB; see `get_agrs_buffer_size_hint`.
        num_cpu_timeout_secs: How long a call, or on the device backend its stream, may wait for another rank before
            that rank is named.
        device: Device of the buffer and of all tensors; None takes the current CUDA device where torch has one, else
            the CPU.
        backend: "collective" runs on any group. "device" moves bytes by copy engines over NVLink: CUDA devices that all
            reach each other by load and store, and NCCL 2.30.4 or newer. "auto" takes "device" where the group has a
            CUDA backend and all ranks can open it, else "collective", and logs why. Must be alike on all ranks.

    Attributes:
        group, rank_idx, num_ranks: The group and this rank's place in it.
        num_bytes: Size of the buffer's memory.
        device: Device of the buffer.

    Raises:
        ConfigError: An argument cannot be taken.
        RankMismatchError: Ranks passed different arguments.
        CommTimeoutError: A rank did not take part.
        TopologyError: The device backend was asked for, and not all ranks reach each other.
        TransportError: It was asked for, and cannot be opened.

    Collective: yes. `close` and dropping the buffer are not.
    """

    def __init__(
        self,
        group: dist.ProcessGroup | None,
        num_bytes: int,
        *,
        num_cpu_timeout_secs: float = 300,
        device: torch.device | str | None = None,
        backend: BackendName = "auto",
    ) -> None:
        _check_constructor(num_bytes, num_cpu_timeout_secs, backend)
        self.device = _resolve_device(device)
        transport = CollectiveTransport(
            group, timeout_s=float(num_cpu_timeout_secs), name="ContextBuffer", operations=OPERATIONS
        )
        transport.begin(
            "open",
            [
                AgreedField(name="num_bytes", value=num_bytes),
                AgreedField(
                    name="kind of device",
                    value=int(self.device.type == "cuda"),
                    show=lambda is_cuda: "cuda" if is_cuda else "cpu",
                ),
                *agreed_by_backend(backend),
            ],
        )
        self.group: dist.ProcessGroup = transport.group
        self.rank_idx = transport.rank
        self.num_ranks = transport.num_ranks
        self.num_bytes = num_bytes
        self._session = Session(rank=self.rank_idx, num_ranks=self.num_ranks)
        self._backend: Backend | None = make_backend(
            transport, self.device, num_bytes=num_bytes, backend=backend, timeout_s=float(num_cpu_timeout_secs)
        )

    # Sizes

    @staticmethod
    def get_agrs_num_max_session_bytes(
        group: dist.ProcessGroup | None, shapes: Sequence[Sequence[int]], dtype: torch.dtype
    ) -> int:
        """Bytes of a session that gathers one tensor of each shape, or makes one sum of each.

        Args:
            group: The buffer's group.
            shapes: What a rank passes to all-gather, or gets from reduce-scatter; a sequence of shapes.
            dtype: Their dtype.

        Raises:
            ConfigError: There is no process group, or these are no shapes.

        Collective: no.
        """
        if not dist.is_initialized():
            raise ConfigError(
                "get_agrs_num_max_session_bytes needs an initialised process group (got none); "
                "call torch.distributed.init_process_group first"
            )
        checked, _ = check_shapes(shapes, dtype, rank=dist.get_rank(group))
        return session_bytes(checked, dtype, num_ranks=dist.get_world_size(group))

    @staticmethod
    def get_agrs_buffer_size_hint(group: dist.ProcessGroup | None, num_max_session_bytes: int) -> int:
        """`num_bytes` of a buffer for sessions of `num_max_session_bytes`: a multiple of 2 MiB.

        Args:
            group: The buffer's group; the size does not depend on it.
            num_max_session_bytes: What `agrs_set_config` will be called with.

        Raises:
            ConfigError: It is negative.

        Collective: no.
        """
        return align_up(num_max_session_bytes, _BUFFER_ALIGNMENT_BYTES)

    @property
    def backend_name(self) -> str:
        """Which backend runs: "collective" or "device"; "closed" once the buffer is."""
        return "closed" if self._backend is None else self._backend.name

    # Sessions

    @property
    def is_in_session(self) -> bool:
        """Whether a session is open."""
        return self._session.is_open

    def agrs_set_config(self, num_max_session_bytes: int, num_max_all_gathers_per_session: int) -> None:
        """Set how large sessions may become. Needed before the first one, and possible between any two.

        Args:
            num_max_session_bytes: Bytes of all that is gathered in a session, at most `num_bytes`; rounded up to 32.
            num_max_all_gathers_per_session: Calls in a session, 1 to 32. A batch is one call; so is a reduce-scatter.

        Raises:
            ConfigError: A number is out of range, or a session is open.
            RankMismatchError: Ranks passed different numbers.
            CommTimeoutError: A rank did not take part.

        Collective: yes.
        """
        backend = self._open_backend()
        with self._rejections_reported("agrs_set_config"):
            self._session.check_configurable()
            config = SessionConfig.checked(
                num_max_session_bytes, num_max_all_gathers_per_session, num_bytes=self.num_bytes, rank=self.rank_idx
            )
            backend.set_config(config)
        self._session.config = config

    def create_agrs_session(self) -> None:
        """Open a session, whose regions begin again at the front of the memory.

        Raises:
            ConfigError: Nothing is configured, or a session is open.

        Collective: yes; nothing is sent.
        """
        self._open_backend()
        self._session.create()

    def destroy_agrs_session(self) -> None:
        """Close the session: what was gathered in it must not be used any more, and its handles cannot be called.

        Raises:
            ConfigError: No session is open.

        Collective: yes. Stream: later communication waits for what the current stream has done, and the current stream
        for what the session's calls brought; the host does not.
        """
        backend = self._open_backend()
        self._session.destroy()
        try:
            backend.end_session(self._session.idx)
        except RankMismatchError:
            raise
        except ConfigError:
            # Refused before the ranks met, for example in a capture: it can still be ended, and must be.
            self._session.is_open = True
            raise

    @contextlib.contextmanager
    def agrs_new_session(self, enabled: bool = True) -> Iterator[None]:
        """A `with` block in a session of its own, which is destroyed at the end in every case.

        Args:
            enabled: With False the block runs as it is.

        Raises:
            ConfigError: As `create_agrs_session`.

        Collective: yes.
        """
        if not enabled:
            yield
            return
        self.create_agrs_session()
        try:
            yield
        except BaseException:
            # What went wrong in the block is told, and not that its session cannot be ended either.
            with contextlib.suppress(TransportError, RankMismatchError):
                self._end_session()
            raise
        self._end_session()

    def _end_session(self) -> None:
        # A closed buffer has no session any more.
        if self._backend is not None:
            self.destroy_agrs_session()

    # Data

    @overload
    def agrs_get_inplace_tensor(self, shapes: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor: ...

    @overload
    def agrs_get_inplace_tensor(
        self, shapes: Sequence[tuple[int, ...]], dtype: torch.dtype
    ) -> tuple[torch.Tensor, ...]: ...

    def agrs_get_inplace_tensor(
        self, shapes: tuple[int, ...] | Sequence[tuple[int, ...]], dtype: torch.dtype
    ) -> torch.Tensor | tuple[torch.Tensor, ...]:
        """This rank's slots in the regions that come next, to be written and then gathered without a copy.

        Nothing is reserved: gather exactly these, in this order, before anything else; as one batch or one by one.

        Args:
            shapes: One shape, or a sequence of shapes.
            dtype: Their dtype.

        Returns:
            A view of the buffer's memory, not initialised; for a sequence a tuple of views.

        Raises:
            ConfigError: These are no shapes, no session is open, or there is no room.

        Collective: no.
        """
        memory = self._open_backend().memory
        checked, is_batch = check_shapes(shapes, dtype, rank=self.rank_idx)
        regions = self._session.place("agrs_get_inplace_tensor", checked, [dtype] * len(checked))
        tensors = tuple(region.view(memory)[self.rank_idx] for region in regions)
        return tensors if is_batch else tensors[0]

    @overload
    def all_gather(self, t: torch.Tensor) -> tuple[torch.Tensor, SessionHandle]: ...

    @overload
    def all_gather(self, t: Sequence[torch.Tensor]) -> tuple[Any, ...]: ...

    @torch.no_grad()
    def all_gather(self, t: torch.Tensor | Sequence[torch.Tensor]) -> tuple[Any, ...]:
        """Give every rank the tensors of all ranks.

        Args:
            t: A contiguous tensor of any dtype and shape, the same on every rank, or a sequence of them, which is sent
                at once. A tensor from `agrs_get_inplace_tensor` is not copied on this rank.

        Returns:
            `(gathered, handle)`: `[num_ranks, *shape]` by rank, a view of the buffer's memory that is valid until the
            session is destroyed. Call the handle before you use it, and before you overwrite `t`. For a sequence
            `(*gathered, handle)`, with one handle for all.

        Raises:
            ConfigError: A tensor cannot be taken, no session is open, or there is no room; raised before anything is
                sent, and nothing of the session is used up.
            RankMismatchError: Ranks passed different dtypes, shapes or numbers of tensors, or are in different
                sessions; likewise.
            CommTimeoutError: A rank died or is late. On the device backend these two come later: from the first call on
                the buffer behind it, a handle's included, that finds the news.

        Collective: yes. Stream: runs on the communication stream after the current one. No gradients: see
        `deep_ep_cp.all_gather`.
        """
        backend = self._open_backend()
        with self._rejections_reported("all_gather"):
            tensors = check_tensors("all_gather", t, device=self.device, rank=self.rank_idx)
            regions = self._session.place(
                "all_gather", [tuple(tensor.shape) for tensor in tensors], [tensor.dtype for tensor in tensors]
            )
            is_in_place = [
                self._is_in_place(backend.memory, idx, tensor, region)
                for idx, (tensor, region) in enumerate(zip(tensors, regions, strict=True))
            ]
            gathered = [region.view(backend.memory) for region in regions]
            backend.check()
            with self._comm_scope() as scope:
                backend.all_gather(self._call(tensors, regions, is_in_place))
                event = scope.finish(inputs=tensors, outputs=gathered)
        self._session.use(regions)
        return *gathered, self._handle(event)

    @overload
    def reduce_scatter(self, t: torch.Tensor) -> tuple[torch.Tensor, SessionHandle]: ...

    @overload
    def reduce_scatter(self, t: Sequence[torch.Tensor]) -> tuple[Any, ...]: ...

    @torch.no_grad()
    def reduce_scatter(self, t: torch.Tensor | Sequence[torch.Tensor]) -> tuple[Any, ...]:
        """Give every rank the sum of what all ranks pass for it.

        The sum starts at zero and takes rank 0, 1, 2, ... in turn, in float32 for bfloat16, float16 and float32, else
        in the dtype of `t`, and is rounded once. So it has the same bits on every run. Integers wrap around.

        Args:
            t: `[num_ranks, *shape]`, contiguous: index r is for rank r. Of bfloat16, float16, float32, float64,
                complex64, complex128, int8, uint8, int16, int32 or int64; dtype and shape the same on every rank. Or a
                sequence of them, which is sent at once.

        Returns:
            `(reduced, handle)`: `[*shape]`, in memory of its own, which outlives the session. Call the handle before
            you use it, and before you overwrite `t`. For a sequence `(*reduced, handle)`, with one handle for all. It
            takes as much of a session as an all-gather of `[*shape]`.

        Raises:
            ConfigError: As `all_gather`; also for an in-place tensor, since addends arrive there.
            RankMismatchError: As `all_gather`.
            CommTimeoutError: A rank died or is late.

        Collective: yes. Stream: as `all_gather`. No gradients: see `deep_ep_cp.reduce_scatter`.
        """
        backend = self._open_backend()
        with self._rejections_reported("reduce_scatter"):
            tensors = check_tensors("reduce_scatter", t, device=self.device, rank=self.rank_idx)
            check_sum_inputs(tensors, num_ranks=self.num_ranks, rank=self.rank_idx)
            regions = self._session.place(
                "reduce_scatter", [tuple(tensor.shape[1:]) for tensor in tensors], [tensor.dtype for tensor in tensors]
            )
            for idx, tensor in enumerate(tensors):
                self._check_gathered(backend.memory, idx, tensor)
            backend.check()
            with self._comm_scope() as scope:
                reduced = backend.reduce_scatter(self._call(tensors, regions, [False] * len(tensors)))
                event = scope.finish(inputs=tensors, outputs=reduced)
        self._session.use(regions)
        return *reduced, self._handle(event)

    # Streams and lifetime

    def get_comm_stream(self) -> torch.cuda.Stream | torch.cpu.Stream:
        """The stream on which calls run: one per process and device. Collective: no."""
        return comm_stream(self.device)

    def close(self) -> None:
        """Release the buffer; a second call does nothing. Tensors that live stay valid.

        The host waits until this rank's streams are through their waits for peers. Leaving a `with` block by an error
        waits for no peer instead; what was under way is undefined then.

        Collective: no, safe in any order and at exit.
        """
        if self._backend is not None:
            self._session.is_open = False
            self._backend.close()
            self._backend = None

    def __enter__(self) -> ContextBuffer:
        return self

    def __exit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if exc_type is not None and self._backend is not None:
            # The peers may never come now, and what went wrong should be seen at once.
            self._backend.abandon()
        self.close()

    def __repr__(self) -> str:
        place = f"rank {self.rank_idx} of {self.num_ranks}"
        return (
            f"ContextBuffer({place}, {self.num_bytes} bytes on {self.device}, {self.backend_name}, {self._session!r})"
        )

    def _open_backend(self) -> Backend:
        if self._backend is None:
            raise rejected(self.rank_idx, "the buffer must be open", "a closed buffer", "make a new one")
        return self._backend

    def _handle(self, event: EventOverlap) -> SessionHandle:
        backend = self._open_backend()
        return SessionHandle(event, self._session, self.device, rank=self.rank_idx, check=backend.check)

    def _comm_scope(self) -> CommScope:
        return CommScope(self.device, StreamOptions(async_with_compute_stream=True))

    def _call(
        self, tensors: Sequence[torch.Tensor], regions: Sequence[Region], is_in_place: Sequence[bool]
    ) -> SessionCall:
        return SessionCall(
            session_idx=self._session.idx,
            call_idx=self._session.num_calls,
            tensors=tensors,
            regions=regions,
            is_in_place=is_in_place,
        )

    def _is_in_place(self, memory: torch.Tensor, idx: int, tensor: torch.Tensor, region: Region) -> bool:
        """Whether a tensor is this rank's slot; it must not be elsewhere in the buffer, which is a mistake in order."""
        offset = _offset_in(memory, tensor)
        if offset is None or not region.slot_bytes:
            return False
        expected = region.offset + self.rank_idx * region.slot_bytes
        if offset != expected:
            raise rejected(
                self.rank_idx,
                f"tensor {idx} of all_gather, which lies in the buffer, must be the in-place tensor at byte {expected}",
                f"byte {offset}",
                "gather in-place tensors in the order and sizes in which agrs_get_inplace_tensor gave them, "
                "or pass a clone",
            )
        return True

    def _check_gathered(self, memory: torch.Tensor, idx: int, tensor: torch.Tensor) -> None:
        """Refuse addends from the part of the buffer that is not in use, where those of the other ranks arrive."""
        offset = _offset_in(memory, tensor)
        if offset is None:
            return
        end = offset + tensor.numel() * tensor.element_size()
        if end > self._session.offset:
            raise rejected(
                self.rank_idx,
                f"tensor {idx} of reduce_scatter, which lies in the buffer, must have been gathered in this session, "
                f"which uses {self._session.offset} bytes so far",
                f"bytes {offset} to {end}",
                "pass a clone, or a tensor of your own",
            )

    @contextlib.contextmanager
    def _rejections_reported(self, call: str) -> Iterator[None]:
        """Let the peers know why this rank does not come, when it refuses its own arguments."""
        try:
            yield
        except RankMismatchError:
            raise
        except ConfigError as error:
            if self._backend is not None:
                self._backend.report_rejection(call, str(error))
            raise


def _offset_in(memory: torch.Tensor, tensor: torch.Tensor) -> int | None:
    """Where a tensor begins in the memory, in bytes; None for a tensor that lies elsewhere."""
    if tensor.untyped_storage().data_ptr() != memory.untyped_storage().data_ptr():
        return None
    return int(tensor.storage_offset()) * tensor.element_size() - int(memory.storage_offset())


def _check_constructor(num_bytes: Any, num_cpu_timeout_secs: float, backend: Any) -> None:
    if not isinstance(num_bytes, int) or num_bytes <= 0 or num_bytes % _BUFFER_ALIGNMENT_BYTES:
        raise ConfigError(
            f"num_bytes must be a positive multiple of {_BUFFER_ALIGNMENT_BYTES} (got {num_bytes}); "
            "ContextBuffer.get_agrs_buffer_size_hint(...) gives one"
        )
    if not num_cpu_timeout_secs > 0:
        raise ConfigError(f"num_cpu_timeout_secs must be positive (got {num_cpu_timeout_secs})")
    check_backend(backend)


def _resolve_device(device: torch.device | str | None) -> torch.device:
    if device is None:
        device = "cuda" if torch.cuda.is_available() else "cpu"
    if torch.device(device).type not in ("cpu", "cuda"):
        raise ConfigError(f"device must be a CPU or a CUDA device (got {device}); streams of others are not known")
    # With its index, as tensors name it.
    return torch.empty(0, device=device).device
