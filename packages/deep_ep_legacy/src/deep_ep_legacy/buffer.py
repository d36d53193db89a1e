"""Owns `Buffer`: V1's constructor and its normal calls.

It moves nothing itself: arguments are checked in `checks`, rows are moved by `collective`; the low-latency calls are in
`latency_calls`. What kernels need is in `device`, which is imported only where it is opened.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any, ClassVar, Literal, get_args

import torch
import torch.distributed as dist

from deep_ep_core.backend_choice import OPEN_DEVICE, BackendName, DeviceOpener, agreed_by_backend, check_backend
from deep_ep_core.domains import detect_topology
from deep_ep_core.errors import ConfigError, RankMismatchError
from deep_ep_core.refusals import rejected
from deep_ep_core.stream import CommScope, EventHandle, EventOverlap, comm_stream
from deep_ep_core.topology import Topology
from deep_ep_core.transport import AgreedField, CollectiveTransport
from deep_ep_legacy.checks import (
    BufferFacts,
    check_capture,
    check_combine,
    check_dispatch,
    check_layout,
    check_streams,
)
from deep_ep_legacy.collective import OPERATIONS, CollectiveBackend
from deep_ep_legacy.communicator import MpiCommunicator, group_of_communicator
from deep_ep_legacy.config import DEFAULT_NUM_SMS, SIZE_ALIGNMENT_BYTES, Config, default_config
from deep_ep_legacy.extra_arguments import ignore_extra_arguments
from deep_ep_legacy.handles import Handle
from deep_ep_legacy.latency_calls import LowLatencyCalls
from deep_ep_legacy.variables import warn_of_v1_variables

if TYPE_CHECKING:
    from deep_ep_core.nccl import Communicator
    from deep_ep_legacy.device.context import DeviceContext
    from deep_ep_legacy.device.normal import NormalDevice

__all__ = ["BackendName", "Buffer", "TransportName"]

TransportName = Literal["nccl", "nvshmem"]
"""What the device backend may be asked to reach peers by; this version has "nccl" only."""

_logger = logging.getLogger("deep_ep_legacy")
# What an asynchronous call accepts as the event to start after.
Event = EventHandle | EventOverlap


class Buffer(LowLatencyCalls):
    """V1's expert-parallel dispatch and combine over the ranks of a process group.

    R is the number of ranks, E that of experts, L = E / R that of experts on a rank: rank r has [r * L, (r + 1) * L).
    Ranks that share a machine form a node; `NCCL_LSA_TEAM_SIZE` makes nodes smaller.

    Args:
        group: Any `torch.distributed` group; None with `comm`.
        num_nvl_bytes: Bytes of V1's NVLink buffer, a multiple of 128. It is what `get_local_buffer_tensor` shows, and
            limits no call. The device backend has a stage of this size, or of 16 MiB if that is more, and moves in
            rounds what does not fit; the collective backend has none. Must be alike on all ranks.
        num_rdma_bytes: The same for RDMA. On the device backend rows of low-latency calls lie in memory of this size,
            so in `low_latency_mode` it must be what `get_low_latency_rdma_size_hint` says for the largest call.
        low_latency_mode: Allow the low-latency calls. Must be alike on all ranks.
        num_qps_per_rank: Network contexts, at least 1; has no effect.
        allow_nvlink_for_low_latency_mode: Has no effect.
        allow_mnnvl: Has no effect.
        explicitly_destroy: The caller will call `destroy()`. Dropping the buffer is enough in any case.
        enable_shrink: Keep a mask of ranks that low-latency calls leave out; needs `low_latency_mode`.
        comm: An MPI communicator with mpi4py's `Get_rank`, `Get_size` and `allgather`, in place of `group`. Where
            `torch.distributed` is not initialised, this initialises its default group with gloo.
        backend: "collective" runs on any group. "device" runs CUDA kernels, on ranks that reach each other's memory by
            NVLink (one LSA team). "auto" takes it where it can be had. Must be alike on all ranks.
        transport: How kernels reach peers: "nccl", by the windows of NCCL 2.30.4 or newer. "nvshmem" is not part of
            this version.
        num_cpu_timeout_secs: How long a call, or a kernel, may wait for another rank before it names it and raises.
        extra: Arguments of V1's forks; see `dispatch`.

    Attributes:
        group, rank, group_size: The group and this rank's place in it.
        num_nvl_bytes, num_rdma_bytes, low_latency_mode, explicitly_destroy, enable_shrink: As above.
        num_sms: Of the class: SMs of default configs.

    Raises:
        ConfigError: An argument cannot be taken.
        RankMismatchError: Ranks passed different arguments.
        CommTimeoutError: A rank did not take part.

    Collective: yes. `destroy` and dropping the buffer are not. Warns: once, of V1 variables that are set.
    """

    num_sms: ClassVar[int] = DEFAULT_NUM_SMS

    # State that is made in inference mode could not be changed outside of it.
    @torch.inference_mode(False)
    def __init__(
        self,
        group: dist.ProcessGroup | None = None,
        num_nvl_bytes: int = 0,
        num_rdma_bytes: int = 0,
        low_latency_mode: bool = False,
        num_qps_per_rank: int = 24,
        allow_nvlink_for_low_latency_mode: bool = True,
        allow_mnnvl: bool = False,
        explicitly_destroy: bool = False,
        enable_shrink: bool = False,
        comm: MpiCommunicator | None = None,
        *,
        backend: BackendName = "auto",
        transport: TransportName = "nccl",
        num_cpu_timeout_secs: float = 100,
        **extra: Any,
    ) -> None:
        _check_constructor(num_nvl_bytes, num_rdma_bytes, num_qps_per_rank, num_cpu_timeout_secs)
        check_backend(backend)
        _check_transport(transport)
        ignore_extra_arguments("Buffer", extra)
        warn_of_v1_variables()
        timeout_s = float(num_cpu_timeout_secs)
        exchanges = CollectiveTransport(
            _group_of(group, comm, timeout_s),
            timeout_s=timeout_s,
            name="Buffer",
            operations=(*OPERATIONS, OPEN_DEVICE),
        )
        exchanges.begin(
            "open",
            [
                AgreedField(name="num_nvl_bytes", value=num_nvl_bytes),
                AgreedField(name="num_rdma_bytes", value=num_rdma_bytes),
                AgreedField(name="low_latency_mode", value=int(bool(low_latency_mode)), show=_show_bool),
                AgreedField(name="enable_shrink", value=int(bool(enable_shrink)), show=_show_bool),
                *agreed_by_backend(backend),
            ],
        )
        self.group: dist.ProcessGroup = exchanges.group
        self.rank = exchanges.rank
        self.group_size = exchanges.num_ranks
        self.num_nvl_bytes = num_nvl_bytes
        self.num_rdma_bytes = num_rdma_bytes
        self.low_latency_mode = bool(low_latency_mode)
        self.explicitly_destroy = bool(explicitly_destroy)
        self.enable_shrink = bool(enable_shrink)
        has_cuda = torch.cuda.is_available()
        self._device = torch.device("cuda", torch.cuda.current_device()) if has_cuda else torch.device("cpu")
        opener = DeviceOpener(exchanges, self._device, backend=backend, timeout_s=timeout_s, logger=_logger)
        # Where NCCL is used, it knows best which ranks share a node.
        opener.open_communicator()
        topology = detect_topology(self.group, timeout_s=timeout_s)
        self._facts = BufferFacts(rank=self.rank, num_ranks=self.group_size, num_nodes=topology.num_scaleout_ranks)
        self._context: DeviceContext | None = opener.open_backend(
            lambda communicator: self._open_context(exchanges, communicator, timeout_s)
        )
        self._backend: CollectiveBackend | NormalDevice | None = self._make_backend(exchanges, topology)
        self._local_buffers: dict[bool, torch.Tensor] = {}
        self._session = self._make_session(timeout_s)

    # Small methods

    def destroy(self) -> None:
        """Release the buffer, after low-latency calls under way have ended; a second call does nothing. Collective: no.

        Raises:
            ConfigError: The buffer was made without `explicitly_destroy=True`.
            CommTimeoutError: A rank died before it sent the rows of a low-latency call under way.
        """
        if not self.explicitly_destroy:
            raise rejected(
                self.rank,
                "destroy() is for buffers made with explicitly_destroy=True",
                "explicitly_destroy=False",
                "make the buffer with it, or just drop the buffer",
            )
        session, self._session, self._backend = self._session, None, None
        context, self._context = self._context, None
        self._local_buffers.clear()
        try:
            if session is not None:
                session.close()
        finally:
            if context is not None:
                context.close()

    @staticmethod
    def is_sm90_compiled() -> bool:
        """Whether the calls that V1 builds for Hopper only work, FP8 among them: they always do. Collective: no."""
        return True

    @staticmethod
    def set_num_sms(new_num_sms: int) -> None:
        """Set the SMs of default configs, of all buffers: what kernels take at most, and what handles tell of channels.

        Raises:
            ConfigError: The number is odd or negative.

        Collective: no.
        """
        if new_num_sms < 0 or new_num_sms % 2 != 0:
            raise ConfigError(f"new_num_sms must be even and at least 0 (got {new_num_sms}); pass an even number")
        Buffer.num_sms = new_num_sms

    @staticmethod
    def capture() -> EventOverlap:
        """An event at the present tail of the current stream, to pass as `previous_event`. Collective: no."""
        return EventOverlap(EventHandle())

    def get_comm_stream(self) -> torch.cuda.Stream | torch.cpu.Stream:
        """The stream of dispatch and combine, where they do not run on the current one: one per process and device.

        Collective: no.
        """
        return comm_stream(self._device)

    # As the constructor.
    @torch.inference_mode(False)
    def get_local_buffer_tensor(
        self, dtype: torch.dtype, size: Sequence[int] | None = None, offset: int = 0, use_rdma_buffer: bool = False
    ) -> torch.Tensor:
        """A view of memory of this rank as large as the NVLink or RDMA buffer, zeros at first.

        No call sends from it or receives into it. It is allocated by the first call of this method.

        Args:
            dtype: Of the view.
            size: Its shape; None for all that follows `offset`, as one axis.
            offset: Bytes to leave out.
            use_rdma_buffer: Of `num_rdma_bytes` rather than `num_nvl_bytes`.

        Raises:
            ConfigError: The view would not fit, or would not be aligned.

        Collective: no.
        """
        self._open_backend()
        num_bytes = self.num_rdma_bytes if use_rdma_buffer else self.num_nvl_bytes
        itemsize = dtype.itemsize
        num_elements = max(num_bytes - offset, 0) // itemsize if size is None else torch.Size(size).numel()
        if offset < 0 or offset % itemsize != 0 or offset + num_elements * itemsize > num_bytes:
            raise rejected(
                self.rank,
                f"offset and size must name aligned elements of the {num_bytes} bytes of the buffer",
                f"offset={offset}, size={size}, {itemsize} bytes an element",
                "offset counts bytes",
            )
        key = bool(use_rdma_buffer)
        if key not in self._local_buffers:
            self._local_buffers[key] = torch.zeros(num_bytes, dtype=torch.uint8, device=self._device)
        view = self._local_buffers[key][offset : offset + num_elements * itemsize].view(dtype)
        return view if size is None else view.view(*size)

    @staticmethod
    def get_dispatch_config(num_ranks: int) -> Config:
        """V1's default config of dispatch for 2, 4, 8, 16, 24, 32, 48, 64, 96, 128, 144 or 160 ranks.

        Raises:
            ConfigError: V1 has none for this number.

        Collective: no.
        """
        return default_config(num_ranks, num_sms=Buffer.num_sms, is_combine=False)

    @staticmethod
    def get_combine_config(num_ranks: int) -> Config:
        """V1's default config of combine; as `get_dispatch_config`."""
        return default_config(num_ranks, num_sms=Buffer.num_sms, is_combine=True)

    # Normal calls

    @torch.no_grad()
    def get_dispatch_layout(
        self,
        topk_idx: torch.Tensor,
        num_experts: int,
        previous_event: Event | None = None,
        async_finish: bool = False,
        allocate_on_comm_stream: bool = False,
        **extra: Any,
    ) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor, torch.Tensor, EventOverlap]:
        """Count how many tokens go where; what `dispatch` asks for.

        Args:
            topk_idx: `[num_tokens, num_topk]` int64 or int32, contiguous; entries outside of [0, E) select nothing.
            num_experts: E, a multiple of R.
            previous_event: As in `dispatch`.
            async_finish: As in `dispatch`.
            allocate_on_comm_stream: As in `dispatch`.
            **extra: As in `dispatch`.

        Returns:
            `(num_tokens_per_rank, num_tokens_per_rdma_rank, num_tokens_per_expert, is_token_in_rank, event)`:
            `[R]` int32 tokens that have an expert on the rank; `[num_nodes]` int32 the same by node, None with one
            node; `[E]` int32 selections; `[num_tokens, R]` bool; and the event, as in `dispatch`.

        Raises:
            ConfigError: An argument cannot be taken.

        Collective: no. Stream: as `dispatch`.
        """
        backend = self._open_backend()
        ignore_extra_arguments("get_dispatch_layout", extra)
        check_layout(self._facts, topk_idx, num_experts)
        options = check_streams(self._facts, previous_event, async_finish, allocate_on_comm_stream)
        with CommScope(topk_idx.device, options, may_stay=self._may_stay) as scope:
            layout = backend.layout(topk_idx, num_experts)
            event = scope.finish([topk_idx], layout)
        return (*layout, event)

    @torch.no_grad()
    def dispatch(
        self,
        x: torch.Tensor | tuple[torch.Tensor, torch.Tensor],
        handle: Handle | Sequence[torch.Tensor] | None = None,
        num_tokens_per_rank: torch.Tensor | None = None,
        num_tokens_per_rdma_rank: torch.Tensor | None = None,
        is_token_in_rank: torch.Tensor | None = None,
        num_tokens_per_expert: torch.Tensor | None = None,
        topk_idx: torch.Tensor | None = None,
        topk_weights: torch.Tensor | None = None,
        expert_alignment: int = 1,
        num_worst_tokens: int = 0,
        config: Config | None = None,
        previous_event: Event | None = None,
        async_finish: bool = False,
        allocate_on_comm_stream: bool = False,
        **extra: Any,
    ) -> tuple[
        torch.Tensor | tuple[torch.Tensor, torch.Tensor],
        torch.Tensor | None,
        torch.Tensor | None,
        list[int] | None,
        Handle | None,
        EventOverlap,
    ]:
        """Send each token once to every rank that has one of its experts.

        All tensors are on one device and contiguous, but for the scales.

        Args:
            x: `[num_tokens, hidden]` of any dtype, rows of a multiple of 16 bytes; or `(x, scales)` with one-byte
                elements and scales `[num_tokens, num_scales]` float32 or int32 of any strides.
            handle: Repeat the routing of that dispatch; then no other argument of the routing may be given.
            num_tokens_per_rank: From `get_dispatch_layout`; required without a handle, as the next three.
            num_tokens_per_rdma_rank: The same; required with several nodes only.
            is_token_in_rank: The same.
            num_tokens_per_expert: The same.
            topk_idx: `[num_tokens, num_topk]` int64 or int32, with `topk_weights`, or neither.
            topk_weights: `[num_tokens, num_topk]` float32.
            expert_alignment: The counts of experts are rounded up to a multiple of this.
            num_worst_tokens: Rows of the results, of which the first are real; 0 for as many as arrive. Needs
                `topk_idx`, and one node.
            config: Its SMs say how many channels the handle tells, and how many SMs kernels take at most; the sizes of
                chunks have no effect.
            previous_event: Start after this instead of after the current stream. One without an event counts as None.
            async_finish: Return an event instead of making the current stream wait.
            allocate_on_comm_stream: Accepted with both of the former; results come from the communication stream's
                memory pool in either case.
            **extra: Arguments of V1's forks. With None, False, 0 or another empty value they are ignored with one
                warning, as are `use_fabric` and `num_nvl_peers`; otherwise refused.

        Returns:
            `(recv_x, recv_topk_idx, recv_topk_weights, num_recv_tokens_per_expert_list, handle, event)`. With M the
            tokens received, or `num_worst_tokens`: `recv_x [M, hidden]`, a tuple with `[M, num_scales]` if `x` was
            one, ordered by (source rank, token); `recv_topk_idx [M, num_topk]` index among the local experts, or -1;
            `recv_topk_weights [M, num_topk]`, 0 where the expert is not local; a list of L counts, empty with
            `num_worst_tokens`; an `IntranodeHandle`, or an `InternodeHandle` with several nodes; the event. Rows past
            the real ones have `recv_topk_idx` -1. With a handle the four items between are None.

        Raises:
            ConfigError: An argument cannot be taken; raised before anything is sent.
            RankMismatchError: Ranks passed different arguments; raised on every rank.
            CommTimeoutError: A rank died or is late.

        Collective: yes. Stream: runs on the communication stream after the current one (or `previous_event`); on the
        device backend, with neither `async_finish` nor `previous_event`, on the current one. The host waits for counts
        and rows; on the device backend for counts, and with `num_worst_tokens` or a handle for nothing, so that a CUDA
        graph may hold the call. What goes wrong there without the host waiting is raised by the next call.
        """
        backend = self._open_backend()
        ignore_extra_arguments("dispatch", extra)
        with self._rejections_reported("dispatch"):
            # Not in the scope: a stream that has joined a capture cannot leave it by an error.
            check_capture(self._facts, handle=handle, num_worst_tokens=num_worst_tokens)
            options = check_streams(self._facts, previous_event, async_finish, allocate_on_comm_stream)
            # What lies in tensors may still be under way on the event's stream: so in the scope.
            with CommScope(_device_of(x), options, may_stay=self._may_stay) as scope:
                args = check_dispatch(
                    self._facts,
                    x=x,
                    handle=handle,
                    num_tokens_per_rank=num_tokens_per_rank,
                    num_tokens_per_rdma_rank=num_tokens_per_rdma_rank,
                    is_token_in_rank=is_token_in_rank,
                    num_tokens_per_expert=num_tokens_per_expert,
                    topk_idx=topk_idx,
                    topk_weights=topk_weights,
                    expert_alignment=expert_alignment,
                    num_worst_tokens=num_worst_tokens,
                    config=config,
                    default_config=Config(Buffer.num_sms),
                )
                result = backend.dispatch(args)
                inputs = (
                    args.x,
                    args.sf,
                    args.topk_idx,
                    args.topk_weights,
                    num_tokens_per_rank,
                    num_tokens_per_rdma_rank,
                    args.num_tokens_per_expert,
                    *(args.handle or (args.is_token_in_rank,)),
                )
                made = () if args.handle is not None else result.handle
                outputs = (result.recv_x, result.recv_sf, result.recv_topk_idx, result.recv_topk_weights, *made)
                event = scope.finish(inputs, outputs)
        recv_x = result.recv_x if result.recv_sf is None else (result.recv_x, result.recv_sf)
        return (
            recv_x,
            result.recv_topk_idx,
            result.recv_topk_weights,
            result.num_recv_tokens_per_expert,
            None if args.handle is not None else result.handle,
            event,
        )

    @torch.no_grad()
    def combine(
        self,
        x: torch.Tensor,
        handle: Handle | Sequence[torch.Tensor],
        topk_weights: torch.Tensor | None = None,
        bias: torch.Tensor | tuple[torch.Tensor, torch.Tensor] | None = None,
        config: Config | None = None,
        previous_event: Event | None = None,
        async_finish: bool = False,
        allocate_on_comm_stream: bool = False,
        **extra: Any,
    ) -> tuple[torch.Tensor, torch.Tensor | None, EventOverlap]:
        """Bring rows back to the ranks of their tokens, and sum them, without weights.

        The sum is float32, biases first, then by increasing rank, rounded once; with several nodes too.

        Args:
            x: `[M, hidden]` bfloat16, contiguous, in the order of the dispatch.
            handle: Of the dispatch; may be used again and is not changed.
            topk_weights: `[M, num_topk]` float32, summed likewise.
            bias: One or two tensors `[num_tokens, hidden]` bfloat16.
            config: As in `dispatch`.
            previous_event: As in `dispatch`.
            async_finish: As in `dispatch`.
            allocate_on_comm_stream: As in `dispatch`.
            **extra: As in `dispatch`.

        Returns:
            `(combined_x, combined_topk_weights, event)`: `[num_tokens, hidden]` bfloat16; `[num_tokens, num_topk]`
            float32, or None without `topk_weights`; the event.

        Raises:
            ConfigError: An argument cannot be taken; raised before anything is sent.
            RankMismatchError: Ranks passed different arguments; raised on every rank.
            CommTimeoutError: A rank died or is late.

        Collective: yes. Stream: as `dispatch`.
        """
        backend = self._open_backend()
        ignore_extra_arguments("combine", extra)
        with self._rejections_reported("combine"):
            options = check_streams(self._facts, previous_event, async_finish, allocate_on_comm_stream)
            with CommScope(_device_of(x), options, may_stay=self._may_stay) as scope:
                args = check_combine(
                    self._facts,
                    x=x,
                    handle=handle,
                    topk_weights=topk_weights,
                    bias=bias,
                    config=config,
                    default_config=Config(Buffer.num_sms),
                )
                combined_x, combined_weights = backend.combine(args)
                inputs = (args.x, args.topk_weights, *args.biases, *args.handle)
                event = scope.finish(inputs, (combined_x, combined_weights))
        return combined_x, combined_weights, event

    def __repr__(self) -> str:
        state = "collective backend" if self._context is None else "device backend"
        state = "destroyed" if self._backend is None else state
        mode = ", low latency" if self.low_latency_mode else ""
        return f"Buffer(rank {self.rank} of {self.group_size}, {self._facts.num_nodes} nodes{mode}, {state})"

    def _open_context(
        self, exchanges: CollectiveTransport, communicator: Communicator, timeout_s: float
    ) -> DeviceContext:
        """The window of both families of calls. Collective: yes."""
        from deep_ep_legacy.device.context import open_context
        from deep_ep_legacy.device.low_latency import low_latency_needs
        from deep_ep_legacy.device.normal import normal_needs

        needs = [normal_needs(self.num_nvl_bytes, self.group_size)]
        if self.low_latency_mode:
            if self.num_rdma_bytes == 0:
                raise rejected(
                    self.rank,
                    "num_rdma_bytes must be positive for low-latency calls on the device backend",
                    0,
                    "pass what get_low_latency_rdma_size_hint says",
                )
            needs.append(low_latency_needs(self.num_rdma_bytes))
        return open_context(exchanges, communicator, needs=needs, timeout_s=timeout_s)

    def _make_backend(self, exchanges: CollectiveTransport, topology: Topology) -> CollectiveBackend | NormalDevice:
        """What moves the rows of the normal calls. Collective: no."""
        collective = CollectiveBackend(exchanges, topology, self._facts)
        if self._context is None:
            return collective
        from deep_ep_legacy.device.normal import NormalDevice

        return NormalDevice(self._context, collective)

    def _open_backend(self) -> CollectiveBackend | NormalDevice:
        if self._backend is None:
            raise rejected(self.rank, "the buffer must be open", "a destroyed one", "make a new Buffer")
        return self._backend

    @property
    def _may_stay(self) -> bool:
        """Whether a call that returns no event may run on the current stream.

        In a capture that lets torch use its memory again, which it does not with memory that two streams used. A kernel
        waits for the buffer's kernel before it on any stream (`DeviceContext.follow`), so that a call which stays reads
        what an asynchronous one wrote, also where nobody waited for its event. Not on another device than the current
        one, since only a stream of its own makes that one current.
        """
        return self._context is not None and torch.cuda.current_device() == self._context.device_idx

    @contextlib.contextmanager
    def _rejections_reported(self, operation: str) -> Iterator[None]:
        """Let the peers know why this rank does not come, when it refuses its own arguments."""
        try:
            yield
        except RankMismatchError:
            raise
        except ConfigError as error:
            self._open_backend().report_rejection(operation, str(error))
            raise


def _device_of(x: Any) -> torch.device:
    rows = x[0] if isinstance(x, tuple) and x else x
    return rows.device if isinstance(rows, torch.Tensor) else torch.device("cpu")


def _show_bool(value: int) -> str:
    return str(bool(value))


def _group_of(group: dist.ProcessGroup | None, comm: MpiCommunicator | None, timeout_s: float) -> dist.ProcessGroup:
    if group is not None:
        return group
    if comm is None:
        raise ConfigError("Buffer needs a group or a comm (got neither); pass a torch.distributed group")
    if not isinstance(comm, MpiCommunicator):
        raise ConfigError(
            "comm must have the methods Get_rank, Get_size and allgather of an mpi4py communicator "
            f"(got {type(comm).__name__}); pass a torch.distributed group as group"
        )
    return group_of_communicator(comm, timeout_s=timeout_s)


def _check_constructor(
    num_nvl_bytes: int, num_rdma_bytes: int, num_qps_per_rank: int, num_cpu_timeout_secs: float
) -> None:
    for name, value in (("num_nvl_bytes", num_nvl_bytes), ("num_rdma_bytes", num_rdma_bytes)):
        if value < 0 or value % SIZE_ALIGNMENT_BYTES != 0:
            raise ConfigError(
                f"{name} must be a multiple of {SIZE_ALIGNMENT_BYTES}, at least 0 (got {value}); take what the size "
                "hints return"
            )
    if num_qps_per_rank < 1:
        raise ConfigError(f"num_qps_per_rank must be positive (got {num_qps_per_rank}); leave it out")
    if not num_cpu_timeout_secs > 0:
        raise ConfigError(f"num_cpu_timeout_secs must be positive (got {num_cpu_timeout_secs}); pass seconds")


def _check_transport(transport: object) -> None:
    if transport not in get_args(TransportName):
        raise ConfigError(f'transport must be "nccl" or "nvshmem" (got {transport!r})')
    if transport == "nvshmem":
        raise ConfigError(
            'transport="nvshmem" is not part of this version of deep-ep-legacy; leave it out: "nccl" reaches the ranks '
            'of an NVLink domain by load and store, and backend="collective" all others'
        )
