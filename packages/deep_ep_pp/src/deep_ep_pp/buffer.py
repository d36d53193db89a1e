"""Owns `PipelineBuffer`: the public calls, and the choice of a backend.

It moves nothing itself: arguments are checked in `checks`, messages are moved by a `Backend`.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator, Sequence
from types import TracebackType
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist

from deep_ep_core.backend_choice import OPEN_DEVICE, BackendName, DeviceOpener, agreed_by_backend
from deep_ep_core.errors import ConfigError, RankMismatchError
from deep_ep_core.refusals import rejected
from deep_ep_core.transport import AgreedField, CollectiveTransport
from deep_ep_pp import sizing
from deep_ep_pp.backend import Backend
from deep_ep_pp.checks import check_config, check_constructor, check_message, check_peer
from deep_ep_pp.collective import PROTOCOL_VERSION, CollectiveBackend
from deep_ep_pp.ledger import PP_SET_CONFIG, Ledger
from deep_ep_pp.sizing import PipelineConfig

if TYPE_CHECKING:
    from deep_ep_core.nccl import Communicator

__all__ = ["BackendName", "PipelineBuffer"]

# What all ranks do together.
_OPEN = "open"
_OPERATIONS = (_OPEN, OPEN_DEVICE, PP_SET_CONFIG)

_logger = logging.getLogger("deep_ep_pp")


class PipelineBuffer:
    """Send and receive between any two ranks of a group, with a window of messages on their way.

    Messages from one rank to another are received in the order in which they were sent. A send goes on at once while
    fewer than `num_max_inflight_tensors` of them are on their way; then it waits until the receiver asks for the
    oldest. Both directions of two ranks, and all pairs, are independent of each other.

    On the device backend calls are enqueued in the current stream, and it is the stream that waits: for a place in the
    window, and for messages. On the collective backend the host waits.

    Args:
        group: Any `torch.distributed` group that has a store; None for the default group.
        num_bytes: Size of the buffer, a multiple of 2 MiB, as `get_pp_buffer_size_hint` gives it; None takes what
            `pp_set_config` needs for messages between any two ranks. With less, messages go to the nearest ranks in
            the ring, as many as there is room for. Memory is taken by `pp_set_config`, on the device backend only: not
            more than this, and 512 bytes a message. Must be alike on all ranks.
        num_cpu_timeout_secs: How long a call, or a wait in a stream, may wait for another rank before it is named.
        backend: "device" moves messages by copy engines in the current stream, and over GIN between nodes; it needs
            GPUs and NCCL. "collective" runs on any group, through host memory. "auto" takes "device" where all ranks
            are of one NVLink domain, the group has a CUDA backend and it can be opened, else "collective", and logs
            why. Must be alike on all ranks.

    Attributes:
        group, rank_idx, num_ranks: The group and this rank's place in it.
        num_bytes: As passed.
        config: What `pp_set_config` set, or None before.
        runtime: The backend; None after `close`.

    Raises:
        ConfigError: An argument cannot be taken, or the device backend was asked for and cannot be had.
        RankMismatchError: Ranks passed different arguments.
        CommTimeoutError: A rank did not take part.
        TransportError, CompileError: The device backend was asked for, and does not open.

    Collective: yes. `close` and dropping the buffer are not.

    As a context manager it closes the buffer when the block ends; after an error in the block without waiting.
    """

    def __init__(
        self,
        group: dist.ProcessGroup | None,
        num_bytes: int | None = None,
        num_cpu_timeout_secs: float = 300,
        *,
        backend: BackendName = "auto",
    ) -> None:
        check_constructor(num_bytes, num_cpu_timeout_secs, backend)
        timeout_s = float(num_cpu_timeout_secs)
        transport = CollectiveTransport(group, timeout_s=timeout_s, name="PipelineBuffer", operations=_OPERATIONS)
        transport.begin(
            _OPEN,
            [
                AgreedField(name="version of messages", value=PROTOCOL_VERSION),
                AgreedField(name="num_bytes", value=-1 if num_bytes is None else num_bytes, show=_show_num_bytes),
                *agreed_by_backend(backend),
            ],
        )
        ledger = Ledger(transport)
        device = torch.device("cpu")
        if backend != "collective" and torch.cuda.is_available():
            # Makes a CUDA context where there is none yet.
            device = torch.device("cuda", torch.cuda.current_device())
        opener = DeviceOpener(transport, device, backend=backend, timeout_s=timeout_s, logger=_logger)
        opener.open_communicator()
        device_backend = opener.open_backend(
            lambda communicator: _open_device(ledger, communicator, may_use_network=backend == "device")
        )
        self.group: dist.ProcessGroup = transport.group
        self.rank_idx = transport.rank
        self.num_ranks = transport.num_ranks
        self.num_bytes = num_bytes
        self.config: PipelineConfig | None = None
        self.runtime: Backend | None = CollectiveBackend(ledger) if device_backend is None else device_backend

    @staticmethod
    def get_pp_buffer_size_hint(num_max_tensor_bytes: int, num_max_inflight_tensors: int, num_peers: int = 2) -> int:
        """Bytes of a buffer for `pp_set_config` with the same arguments: `deep_ep_pp.get_pp_buffer_size_hint`.

        Raises:
            ConfigError: A number is below 1.

        Collective: no.
        """
        return sizing.get_pp_buffer_size_hint(num_max_tensor_bytes, num_max_inflight_tensors, num_peers)

    def pp_set_config(self, num_max_tensor_bytes: int, num_max_inflight_tensors: int) -> None:
        """Set the size of messages and the window; needed before the first message, and possible again later.

        Between messages only: where one was sent and not received, or where ranks pass different numbers, every rank
        is told so and the old configuration stays.

        Args:
            num_max_tensor_bytes: Most bytes of a message, at least 1. Tensors of a message begin at multiples of 32
                bytes, so for several tensors round each size up to 32 bytes and add.
            num_max_inflight_tensors: W, most messages on their way from one rank to another, at least 1.

        Raises:
            ConfigError: An argument cannot be taken, the buffer is too small, or a message was not received. On the
                device backend also: a message that this rank received before had other sizes.
            RankMismatchError: Ranks passed different arguments.
            CommTimeoutError: A rank did not take part.
            TransportError: An earlier call failed, there is not enough memory for the slots, or another rank was told
                of a message of other sizes.

        Collective: yes. Stream: the host waits until all messages have been taken, in whatever streams they are.
        """
        runtime = self._open_runtime()
        with self._telling_refusals(runtime, PP_SET_CONFIG):
            config = check_config(
                self.rank_idx, self.num_ranks, self.num_bytes, num_max_tensor_bytes, num_max_inflight_tensors
            )
            runtime.configure(config)
        self.config = config

    @torch.no_grad()
    def pp_send(self, t: torch.Tensor | Sequence[torch.Tensor], dst_rank_idx: int, num_sms: int = 0) -> None:
        """Send a message to another rank, which receives it with `pp_recv`.

        Args:
            t: The message: a tensor, or a list or tuple of 1 to 32 tensors on one device. Any shape and dtype, also
                without elements, contiguous. It may be overwritten when the call is over; on the device backend, by
                what follows in the stream.
            dst_rank_idx: Rank in the group.
            num_sms: Accepted for callers of upstream; has no effect: no SM is used.

        Raises:
            ConfigError: An argument cannot be taken, or a CUDA graph captures the stream; nothing was sent. On the
                device backend also: a message that was received before had other sizes.
            CommTimeoutError: The window stayed full: the receiver is late, dead, or refused. On the device backend:
                that of an earlier call.
            TransportError: An earlier call failed.

        Collective: no, between two ranks. Stream: reads `t` on the current stream, which waits while the window is
        full; on the collective backend the host does.
        """
        runtime = self._open_runtime()
        with self._telling_refusals(runtime, "pp_send"):
            config = self._set_config()
            dst = check_peer(config, self.rank_idx, self.num_ranks, "dst_rank_idx", dst_rank_idx)
            runtime.send(check_message(config, self.rank_idx, t), dst)

    @torch.no_grad()
    def pp_recv(self, t: torch.Tensor | Sequence[torch.Tensor], src_rank_idx: int, num_sms: int = 0) -> None:
        """Receive the next message of another rank.

        Args:
            t: Where to: as many tensors as were sent, each of as many bytes as the one that was sent; shapes and
                dtypes are this rank's choice. A list or tuple of one tensor is the same as the tensor. Contiguous.
            src_rank_idx: Rank in the group.
            num_sms: Accepted for callers of upstream; has no effect: no SM is used.

        Raises:
            ConfigError: An argument cannot be taken, or the message has other sizes; nothing was received, and the
                message can still be. On the device backend a later call tells of other sizes, `close` at the latest:
                the message is lost then, and `t` undefined.
            CommTimeoutError: The message did not come: the sender is late, dead, or refused. On the device backend:
                that of an earlier call.
            TransportError: An earlier call failed.

        Collective: no, between two ranks. Stream: writes `t` on the current stream, which waits for the message. The
        host waits for it on the collective backend, and where `t` is not on the GPU of the buffer.
        """
        runtime = self._open_runtime()
        with self._telling_refusals(runtime, "pp_recv"):
            config = self._set_config()
            src = check_peer(config, self.rank_idx, self.num_ranks, "src_rank_idx", src_rank_idx)
            runtime.recv(check_message(config, self.rank_idx, t), src)

    def close(self) -> None:
        """Wait until the messages of this rank have been taken, and release the buffer; a second call does nothing.

        Dropping the buffer instead loses messages that nobody has asked for yet. It waits for no receiver; on the
        device backend only for what streams still wait for, whose deadlines stand.

        Raises:
            CommTimeoutError: A receiver is late or dead; on the device backend also a sender of a message that a
                stream waits for.
            ConfigError: A message that was received had other sizes, on the device backend.

        Collective: no; other ranks may close later, earlier, or never.
        """
        runtime, self.runtime = self.runtime, None
        if runtime is not None:
            try:
                runtime.flush()
            finally:
                runtime.close()

    def __enter__(self) -> PipelineBuffer:
        return self

    def __exit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if exc_type is None:
            self.close()
        elif self.runtime is not None:
            # The receivers may never come now, and what went wrong should be seen at once.
            self.runtime.close()
            self.runtime = None

    def __repr__(self) -> str:
        state = "closed" if self.runtime is None else self.runtime.name
        return f"PipelineBuffer(rank {self.rank_idx} of {self.num_ranks}, {state}, {self.config})"

    def _open_runtime(self) -> Backend:
        if self.runtime is None:
            raise rejected(self.rank_idx, "the buffer must be open", "a closed buffer", "make a new PipelineBuffer")
        return self.runtime

    def _set_config(self) -> PipelineConfig:
        if self.config is None:
            raise rejected(
                self.rank_idx,
                "pp_set_config must come before the first message",
                "none",
                "call it on all ranks, with the size of messages and the window",
            )
        return self.config

    @contextlib.contextmanager
    def _telling_refusals(self, runtime: Backend, operation: str) -> Iterator[None]:
        """Leave word for peers that would wait for this rank in vain."""
        try:
            yield
        except RankMismatchError:
            # Every rank knows.
            raise
        except ConfigError as error:
            runtime.report_rejection(operation, str(error))
            raise


def _open_device(ledger: Ledger, communicator: Communicator, *, may_use_network: bool) -> Backend:
    from deep_ep_pp.device.backend import open_device_backend  # only where there is a GPU to use it on

    return open_device_backend(ledger, communicator, may_use_network=may_use_network)


def _show_num_bytes(value: int) -> str:
    return "None" if value < 0 else str(value)
