"""Owns the device backend as `ElasticBuffer` sees it: which calls the kernels take, and how the backend is opened."""

from __future__ import annotations

from typing import Protocol

import torch

from deep_ep_core.backend_choice import count_gpu_ranks, open_together
from deep_ep_core.cuda_streams import RecordedEvent
from deep_ep_core.jit import get_kernels
from deep_ep_core.nccl import Communicator
from deep_ep_core.refusals import rejected
from deep_ep_core.stream import CommScope, comm_stream
from deep_ep_core.stream_order import CudaStreamOrder
from deep_ep_core.transport import CollectiveTransport
from deep_ep_ep.backend import CombineResult, DispatchResult
from deep_ep_ep.checks import BufferFacts, CombineArgs, DispatchArgs
from deep_ep_ep.collective import CollectiveBackend
from deep_ep_ep.device.combine import Combiner
from deep_ep_ep.device.combine_kernel import combine_spec
from deep_ep_ep.device.context import MAX_NUM_EXPERTS, DeviceContext, OperationContext, RecvMemory
from deep_ep_ep.device.dispatch import Dispatcher
from deep_ep_ep.device.dispatch_kernel import all_dispatch_configs, dispatch_spec
from deep_ep_ep.device.plan import DevicePlan
from deep_ep_ep.handle import EPHandle, Plan

__all__ = ["Combines", "DeviceBackend", "Dispatches", "new_backend", "open_context"]


class Dispatches(Protocol):
    """Dispatches by kernels; calls come under a `CommScope`, one at a time."""

    def dispatch(self, args: DispatchArgs, scope: CommScope) -> DispatchResult:
        """Send each token to the ranks of its experts, and lay out what arrives."""


class Combines(Protocol):
    """Combines by kernels; calls come under a `CommScope`, one at a time."""

    def combine(self, args: CombineArgs, scope: CommScope) -> CombineResult:
        """Bring rows back to the ranks of their tokens, and sum them."""


class DeviceBackend:
    """Moves rows by CUDA kernels; hands calls that these do not take to the collective backend.

    Args:
        context: The memory and the kernels.
        collective: The backend for other calls: tensors on the CPU, float64 weights, more experts than a plan has room
            for.
        facts: What the buffer's checks know.
        dispatcher: Dispatches by kernels.
        combiner: Combines by kernels.
    """

    name = "device"
    may_stay = True
    kernel_plan: type[Plan] = DevicePlan
    """The plan of calls that the kernels take."""
    barrier_is_operation = False
    """Whether a barrier uses what operations use, and must have its place in their order."""

    def __init__(
        self,
        context: OperationContext,
        collective: CollectiveBackend,
        facts: BufferFacts,
        *,
        dispatcher: Dispatches,
        combiner: Combines,
    ) -> None:
        self._context = context
        self._collective = collective
        self._facts = facts
        self._dispatcher = dispatcher
        self._combiner = combiner
        self._order = CudaStreamOrder(context.device)
        self._last_stream: torch.cuda.Stream | None = None

    @property
    def window_bytes(self) -> int:
        """Memory of the window on this rank."""
        return self._context.memory.num_bytes

    def plan_type(self, x: torch.Tensor, topk_weights: torch.Tensor | None, num_experts: int) -> type[Plan]:
        """The plan of this backend, or that of the collective one for a dispatch that the kernels do not take."""
        is_taken = (
            x.device == self._context.device
            and num_experts <= MAX_NUM_EXPERTS
            and (topk_weights is None or topk_weights.dtype == torch.float32)
        )
        return self.kernel_plan if is_taken else self._collective.plan_type(x, topk_weights, num_experts)

    def dispatch(self, args: DispatchArgs, scope: CommScope) -> DispatchResult:
        """Send each token to the ranks of its experts, and lay out what arrives."""
        if args.handle is None:
            plan_type = self.plan_type(args.x, args.topk_weights, args.num_experts)
        else:
            plan_type = type(args.handle.plan)
        if plan_type is not self.kernel_plan:
            return self._collective.dispatch(args, scope)
        self._follow(scope.comm_stream)
        result = self._dispatcher.dispatch(args, scope)
        self._record(result.recv_x, scope)
        return result

    def combine(self, args: CombineArgs, scope: CommScope) -> CombineResult:
        """Bring rows back to the ranks of their tokens, and sum them."""
        if not isinstance(args.handle.plan, self.kernel_plan):
            return self._collective.combine(args, scope)
        if args.topk_weights is not None and args.topk_weights.dtype != torch.float32:
            raise rejected(
                self._facts.rank,
                "topk_weights of a combine on the device backend must be float32",
                args.topk_weights.dtype,
                'cast them, or make the buffer with backend="collective"',
            )
        self._follow(scope.comm_stream)
        return self._combiner.combine(args, scope)

    def empty_like_recv(self, handle: EPHandle, hidden: int, dtype: torch.dtype) -> torch.Tensor | None:
        """A tensor in the window for the rows of a combine; None where there is no room, or another backend is used."""
        if not isinstance(handle.plan, self.kernel_plan):
            return None
        num_rows = handle.num_expanded_tokens if handle.do_expand else handle.num_recv_tokens
        return self._context.memory.heap.try_empty((num_rows, hidden), dtype)

    def barrier(self, *, use_comm_stream: bool, with_cpu_sync: bool) -> None:
        """Let no rank's stream go on until those of all ranks have come; the host does not wait without a CPU sync."""
        context = self._context
        context.check()
        device = context.device
        if with_cpu_sync:
            torch.cuda.synchronize(device)
            context.check()
        current = torch.cuda.current_stream(device)
        stream = comm_stream(device) if use_comm_stream else current
        assert isinstance(stream, torch.cuda.Stream)
        if stream != current:
            stream.wait_stream(current)
        if self.barrier_is_operation:
            self._follow(stream)
        context.barrier.enqueue(stream)
        if stream != current:
            current.wait_stream(stream)
        if with_cpu_sync:
            torch.cuda.synchronize(device)
            context.check()

    def report_rejection(self, operation: str, reason: str) -> None:
        """Tell the peers that this rank refuses an operation."""
        self._collective.report_rejection(operation, reason)

    def close(self) -> None:
        """Let go of the window; not collective, may be called more than once."""
        self._context.close()

    def _follow(self, stream: torch.cuda.Stream | None) -> None:
        """Keep operations in one order: they share the device state, and may come on several streams.

        Across the border of a capture no stream can wait for another; torch waits for the device before it begins one.
        """
        last = self._last_stream
        if stream is last and stream is not None:
            return
        assert stream is not None, "tensors are on a CUDA device"
        if last is None or stream == last:
            self._last_stream = stream
            return
        if self._order.capture_of(stream.cuda_stream) == self._order.capture_of(last.cuda_stream):
            RecordedEvent(last).wait_on(stream)
        self._last_stream = stream

    def _record(self, tensor: torch.Tensor, scope: CommScope) -> None:
        """Torch records no stream for memory of the heap."""
        stream = scope.compute_stream
        if scope.is_crossed and stream is not None and self._context.memory.offset_of(tensor) is not None:
            self._context.memory.heap.record_stream(tensor, stream)


def new_backend(context: DeviceContext, collective: CollectiveBackend, facts: BufferFacts) -> DeviceBackend:
    """The device backend of ranks of one LSA team. See `DeviceBackend`."""
    return DeviceBackend(
        context, collective, facts, dispatcher=Dispatcher(context, facts), combiner=Combiner(context, facts)
    )


def open_context(
    transport: CollectiveTransport,
    communicator: Communicator,
    *,
    num_bytes: int,
    recv_memory: RecvMemory,
    gpu_timeout_s: float,
) -> DeviceContext:
    """Make the memory, and the kernels that every buffer needs, on all ranks or on none.

    Args:
        transport: Row exchanges of the group, with an operation `OPEN_DEVICE`.
        communicator: NCCL's communicator of the ranks.
        num_bytes: Size of the buffer.
        recv_memory: Where received rows live.
        gpu_timeout_s: How long kernels wait for a rank.

    Raises:
        TransportError: There is not enough memory, or another rank has no device backend.
        CompileError: A kernel does not compile.
        ConfigError: A part that is needed is not installed.

    Collective: yes.
    """
    num_gpu_ranks = count_gpu_ranks(transport, communicator.device)

    def make() -> DeviceContext:
        context = DeviceContext(
            communicator,
            num_bytes=num_bytes,
            recv_memory=recv_memory,
            timeout_s=gpu_timeout_s,
            num_gpu_ranks=num_gpu_ranks,
        )
        _load_kernels(context)
        return context

    return open_together(transport, make)


def _load_kernels(context: DeviceContext) -> None:
    """Compile what the usual calls launch, or take it from the cache: no rank shall wait for one that compiles."""
    specs = [dispatch_spec(config) for config in all_dispatch_configs() if config.is_idx64]
    get_kernels([*specs, combine_spec(dtype=torch.bfloat16, idx_dtype=torch.int64)], context.device_idx)
