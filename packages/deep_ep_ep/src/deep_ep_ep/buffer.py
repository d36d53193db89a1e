"""Owns `ElasticBuffer`: the public dispatch and combine, their defaults, and the choice of a backend.

It moves nothing itself: arguments are checked in `checks`, rows are moved by a `Backend`.
"""

from __future__ import annotations

import itertools
import logging
import weakref
from types import TracebackType
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist

from deep_ep_core.align import align_up
from deep_ep_core.backend_choice import DeviceOpener
from deep_ep_core.domains import detect_topology
from deep_ep_core.env import get_env
from deep_ep_core.errors import ConfigError, RankMismatchError, TopologyError
from deep_ep_core.links import nvlink_gbs as detect_nvlink_gbs
from deep_ep_core.links import rdma_gbs as detect_rdma_gbs
from deep_ep_core.refusals import rejected
from deep_ep_core.stream import CommScope, EventHandle, EventOverlap, comm_stream
from deep_ep_core.topology import Topology
from deep_ep_core.transport import AgreedField, CollectiveTransport
from deep_ep_ep.backend import Backend, CombineResult, DispatchResult
from deep_ep_ep.checks import (
    BufferFacts,
    CallKind,
    CombineArgs,
    DispatchArgs,
    check_combine,
    check_dispatch,
    check_streams,
)
from deep_ep_ep.choice import BackendName, RecvMemory, agreed_by_choice, check_choice
from deep_ep_ep.collective import OPERATIONS, CollectiveBackend
from deep_ep_ep.handle import EPHandle
from deep_ep_ep.kinds import Kinds, combine_key, dispatch_key
from deep_ep_ep.sizing import (
    BUFFER_ALIGNMENT_BYTES,
    RECORD_ALIGNMENT_BYTES,
    BufferShape,
    buffer_size_hint,
    combine_buffer_bytes,
    dispatch_buffer_bytes,
)
from deep_ep_ep.sm_model import (
    ASSUMED_NVLINK_GBS,
    ASSUMED_RDMA_GBS,
    DeviceSms,
    LinkDomains,
    LinkRates,
    theoretical_num_qps,
    theoretical_num_sms,
)

if TYPE_CHECKING:
    from deep_ep_core.nccl import Communicator

__all__ = ["ElasticBuffer", "get_logical_domain_size", "get_physical_domain_size", "live_buffer", "topk_idx_t"]

topk_idx_t = torch.int64
"""The usual dtype of top-k indices. int32 is accepted as well, call by call."""

_DEFAULT_NUM_QPS_DIRECT = 17
_DEFAULT_NUM_QPS_HYBRID = 129

_logger = logging.getLogger("deep_ep_ep")
_buffer_ids = itertools.count(1)
# Operators name a buffer by its number; the buffer lives as long as its owner keeps it.
_live_buffers: weakref.WeakValueDictionary[int, ElasticBuffer] = weakref.WeakValueDictionary()


def live_buffer(buffer_id: int) -> ElasticBuffer:
    """The buffer of that number.

    Raises:
        ConfigError: It was dropped.
    """
    buffer = _live_buffers.get(buffer_id)
    if buffer is None:
        raise ConfigError(
            f"the ElasticBuffer of a call must be alive until its backward pass (got number {buffer_id}, which was "
            "dropped); keep a reference to it"
        )
    return buffer


def get_physical_domain_size(group: dist.ProcessGroup | None) -> tuple[int, int]:
    """Number of scale-up domains of the machines, and number of ranks in each: (R, V), with R * V ranks in all.

    Collective: yes, the first time for a group.
    """
    topology = detect_topology(group)
    return topology.num_scaleout_ranks, topology.num_scaleup_ranks


def get_logical_domain_size(group: dist.ProcessGroup | None, allow_hybrid_mode: bool = True) -> tuple[int, int]:
    """The domains that operations use: the physical ones in hybrid mode, else one domain of all ranks, (1, N).

    Collective: yes, the first time for a group.
    """
    topology = _logical(detect_topology(group), allow_hybrid_mode)
    return topology.num_scaleout_ranks, topology.num_scaleup_ranks


def _logical(physical: Topology, allow_hybrid_mode: bool) -> Topology:
    return physical if allow_hybrid_mode else physical.flattened()


def _open_device(
    transport: CollectiveTransport,
    communicator: Communicator,
    collective: CollectiveBackend,
    facts: BufferFacts,
    *,
    num_bytes: int,
    recv_memory: RecvMemory,
    gpu_timeout_s: float,
    allow_hybrid_mode: bool,
    traffic_class: int,
    is_asked_for: bool,
) -> Backend:
    # Imported only where there is a GPU to use it on.
    from deep_ep_ep.device.backend import new_backend, open_context

    if communicator.lsa.num_ranks == communicator.num_ranks:
        context = open_context(
            transport, communicator, num_bytes=num_bytes, recv_memory=recv_memory, gpu_timeout_s=gpu_timeout_s
        )
        return new_backend(context, collective, facts)
    if not is_asked_for:
        raise TopologyError(
            'backend="auto" takes the device backend inside one LSA team only (got teams of '
            f"{communicator.lsa.num_ranks} of {communicator.num_ranks} ranks, on rank {facts.rank}): across nodes it "
            'has passed its tests with 4 ranks alone; pass backend="device" to use it all the same'
        )
    from deep_ep_ep.device.network.backend import NetworkBackend, open_network_context
    from deep_ep_ep.device.network.context import NetworkOptions

    network_context = open_network_context(
        transport,
        communicator,
        num_bytes=num_bytes,
        recv_memory=recv_memory,
        gpu_timeout_s=gpu_timeout_s,
        options=NetworkOptions(
            is_hybrid=allow_hybrid_mode, num_contexts=facts.num_allocated_qps, traffic_class=traffic_class
        ),
    )
    return NetworkBackend(network_context, collective, facts)


class ElasticBuffer:
    """Expert-parallel dispatch and combine over the ranks of a process group.

    A token is sent once to each rank that hosts one of its experts, and the experts' outputs are brought back and
    summed. Results have one order, (source rank, token), on every run and every backend.

    Args:
        group: Any `torch.distributed` group; None for the default group.
        num_bytes: Size of the communication buffer, a multiple of 2 MiB; None computes it from the next arguments.
            The collective backend allocates nothing, but holds calls to the size, so that what runs on a laptop also
            runs on a cluster.
        num_cpu_bytes: Must be 0: the host-memory segment belongs to Engram, which is another package.
        num_max_tokens_per_rank: Most tokens that any rank passes to one dispatch, M; the default of each dispatch.
        hidden: Elements of a token, for sizing.
        num_topk: Experts of a token, for sizing; 0 sizes for 32.
        use_fp8_dispatch: Size for one-byte elements with scales instead of two-byte elements.
        deterministic: Accepted; results are deterministic always, at no cost.
        allow_hybrid_mode: Use the hierarchy of nodes where there are several. Must be alike on all ranks.
        allow_multiple_reduction: Partial sums may be rounded where they are made. Must be alike on all ranks.
        prefer_overlap_with_compute: The SM estimate leaves SMs to other kernels.
        sl_idx: RDMA service level; `EP_OVERRIDE_RDMA_SL` wins.
        num_allocated_qps: Network contexts; 0 takes 129 in hybrid mode, else 17.
        num_cpu_timeout_secs: How long a call may wait for another rank before it names it and raises.
        num_gpu_timeout_secs: The same for kernels.
        explicitly_destroy: The caller will call `destroy()`. Without it nothing needs to be called: dropping the
            buffer is enough, in any order, on any rank.
        backend: "collective" runs on any group. "device" moves rows by CUDA kernels, inside an NVLink domain by load
            and store and between domains over NCCL's GIN, and needs NCCL 2.30.4 or newer. "auto" takes "device" where
            all ranks are of one NVLink domain, the group has a CUDA backend and it can be opened, else "collective",
            and logs why. Must be alike on all ranks.
        recv_memory: Where received rows live, on the device backend. "auto": in the window while a heap beside the
            buffer has room, which spares a copy, else in torch's memory; takes up to `num_bytes` more memory. "torch":
            always in torch's memory. "window": always in the window, within `num_bytes`, where there must be room for
            all rows that live at a time, and while a token-major dispatch runs for the most that may come to it.
            Must be alike on all ranks.

    Attributes:
        group, rank_idx, num_ranks: The group and this rank's place in it.
        num_bytes: Size of the communication buffer.
        num_scaleout_ranks, num_scaleup_ranks: The logical domains (S, U).
        scaleout_rank_idx, scaleup_rank_idx: This rank's place in them.
        num_rdma_ranks, num_nvlink_ranks: The physical domains (R, V).
        id: Number of the buffer in this process.
        runtime: The backend; None after `close`.

    Raises:
        ConfigError: An argument cannot be taken.
        RankMismatchError: Ranks passed different arguments.
        CommTimeoutError: A rank did not take part.

    Collective: yes. `close`, `destroy` and dropping the buffer are not.
    """

    def __init__(
        self,
        group: dist.ProcessGroup | None,
        num_bytes: int | None = None,
        num_cpu_bytes: int = 0,
        num_max_tokens_per_rank: int = 0,
        hidden: int = 0,
        num_topk: int = 0,
        use_fp8_dispatch: bool = False,
        deterministic: bool = False,
        allow_hybrid_mode: bool = True,
        allow_multiple_reduction: bool = True,
        prefer_overlap_with_compute: bool = True,
        sl_idx: int = 3,
        num_allocated_qps: int = 0,
        num_cpu_timeout_secs: float = 300,
        num_gpu_timeout_secs: float = 100,
        explicitly_destroy: bool = False,
        *,
        backend: BackendName = "auto",
        recv_memory: RecvMemory = "auto",
    ) -> None:
        _check_constructor(
            num_bytes, num_cpu_bytes, num_max_tokens_per_rank, hidden, num_allocated_qps, num_cpu_timeout_secs
        )
        check_choice(backend, recv_memory)
        transport = CollectiveTransport(
            group, timeout_s=float(num_cpu_timeout_secs), name="ElasticBuffer", operations=OPERATIONS
        )
        transport.begin(
            "open",
            [
                AgreedField(name="num_bytes", value=-1 if num_bytes is None else num_bytes, show=_show_num_bytes),
                AgreedField(name="num_max_tokens_per_rank", value=num_max_tokens_per_rank),
                AgreedField(name="hidden", value=hidden),
                AgreedField(name="num_topk", value=num_topk),
                AgreedField(name="use_fp8_dispatch", value=int(bool(use_fp8_dispatch))),
                AgreedField(name="allow_hybrid_mode", value=int(bool(allow_hybrid_mode))),
                AgreedField(name="allow_multiple_reduction", value=int(bool(allow_multiple_reduction))),
                AgreedField(name="num_allocated_qps", value=num_allocated_qps),
                *agreed_by_choice(backend, recv_memory),
            ],
        )
        self.group: dist.ProcessGroup = transport.group
        self.rank_idx = transport.rank
        self.num_ranks = transport.num_ranks
        self.allow_hybrid_mode = bool(allow_hybrid_mode)
        self.allow_multiple_reduction = bool(allow_multiple_reduction)
        self.prefer_overlap_with_compute = bool(prefer_overlap_with_compute)
        self.deterministic = bool(deterministic)
        self.explicitly_destroy = bool(explicitly_destroy)
        self.num_max_tokens_per_rank = int(num_max_tokens_per_rank)
        self.sl_idx = get_env().override_rdma_sl if get_env().override_rdma_sl is not None else sl_idx
        self.num_cpu_timeout_secs = num_cpu_timeout_secs
        self.num_gpu_timeout_secs = num_gpu_timeout_secs
        # Kept for callers that look at it; the collective backend has none.
        self.nccl_comm_handle: object | None = None
        default_num_qps = _DEFAULT_NUM_QPS_HYBRID if allow_hybrid_mode else _DEFAULT_NUM_QPS_DIRECT
        self.num_allocated_qps = num_allocated_qps or default_num_qps
        has_cuda = torch.cuda.is_available()
        self._device = torch.device("cuda", torch.cuda.current_device()) if has_cuda else torch.device("cpu")
        opener = DeviceOpener(
            transport, self._device, backend=backend, timeout_s=float(num_cpu_timeout_secs), logger=_logger
        )
        # Where NCCL is used, it knows best which ranks share a domain.
        opener.open_communicator()
        self._physical = detect_topology(self.group, timeout_s=float(num_cpu_timeout_secs))
        self._topology = _logical(self._physical, self.allow_hybrid_mode)
        if num_bytes is None:
            num_bytes = self.get_buffer_size_hint(
                self.group,
                num_max_tokens_per_rank,
                hidden,
                num_topk=num_topk,
                use_fp8_dispatch=use_fp8_dispatch,
                allow_hybrid_mode=self.allow_hybrid_mode,
                allow_multiple_reduction=self.allow_multiple_reduction,
            )
        self.num_bytes = num_bytes
        self._hidden = int(hidden)
        self._facts = BufferFacts(
            rank=self.rank_idx,
            num_ranks=self.num_ranks,
            buffer_id=next(_buffer_ids),
            num_max_tokens_per_rank=self.num_max_tokens_per_rank,
            num_allocated_qps=self.num_allocated_qps,
            device_num_sms=torch.cuda.get_device_properties(self._device).multi_processor_count if has_cuda else None,
            allow_multiple_reduction=self.allow_multiple_reduction,
        )
        self.id = self._facts.buffer_id
        _live_buffers[self.id] = self
        self._num_sms_of: dict[tuple[int, int], int] = {}
        # Kinds of calls that passed the checks, that of their size included.
        self._dispatch_kinds: Kinds[CallKind] = Kinds()
        self._combine_kinds: Kinds[CallKind] = Kinds()
        collective = CollectiveBackend(transport, self._topology, self._facts)
        self.runtime: Backend | None = collective
        device_backend = opener.open_backend(
            lambda communicator: _open_device(
                transport,
                communicator,
                collective,
                self._facts,
                recv_memory=recv_memory,
                num_bytes=num_bytes,
                gpu_timeout_s=float(num_gpu_timeout_secs),
                allow_hybrid_mode=self.allow_hybrid_mode,
                traffic_class=sl_idx,
                is_asked_for=backend == "device",
            )
        )
        if device_backend is not None:
            assert opener.communicator is not None, "the backend was made of it"
            self.runtime = device_backend
            self.nccl_comm_handle = opener.communicator.handle
        if get_env().buffer_debug and self.rank_idx == 0:
            print(f"{self!r}: physical domains (R, V) = {self.get_physical_domain_size()}", flush=True)

    # The domains

    @property
    def num_scaleout_ranks(self) -> int:
        """S: logical scale-out domains."""
        return self._topology.num_scaleout_ranks

    @property
    def num_scaleup_ranks(self) -> int:
        """U: ranks in a logical scale-up domain."""
        return self._topology.num_scaleup_ranks

    @property
    def scaleout_rank_idx(self) -> int:
        """Index of this rank's scale-up domain."""
        return self._topology.scaleout_rank

    @property
    def scaleup_rank_idx(self) -> int:
        """This rank's index in its scale-up domain."""
        return self._topology.scaleup_rank

    @property
    def num_rdma_ranks(self) -> int:
        """R: physical scale-up domains."""
        return self._physical.num_scaleout_ranks

    @property
    def num_nvlink_ranks(self) -> int:
        """V: ranks in a physical scale-up domain."""
        return self._physical.num_scaleup_ranks

    def get_physical_domain_size(self) -> tuple[int, int]:
        """(R, V): number of physical scale-up domains, and number of ranks in each. Collective: no."""
        return self.num_rdma_ranks, self.num_nvlink_ranks

    def get_logical_domain_size(self) -> tuple[int, int]:
        """(S, U): the domains that operations use. Collective: no."""
        return self.num_scaleout_ranks, self.num_scaleup_ranks

    # Sizes and counts

    @staticmethod
    def get_buffer_size_hint(
        group: dist.ProcessGroup | None,
        num_max_tokens_per_rank: int,
        hidden: int,
        num_topk: int = 0,
        use_fp8_dispatch: bool = False,
        allow_hybrid_mode: bool = True,
        allow_multiple_reduction: bool = True,
    ) -> int:
        """Bytes of a buffer that any dispatch and combine of this shape fits in, a multiple of 2 MiB.

        Source of the formula: `deep_ep_ep.sizing`.

        Raises:
            ConfigError: A count is out of range.

        Collective: yes, the first time for a group.
        """
        physical = detect_topology(group)
        logical = _logical(physical, allow_hybrid_mode)
        return buffer_size_hint(
            BufferShape(
                num_scaleout_ranks=logical.num_scaleout_ranks,
                num_scaleup_ranks=logical.num_scaleup_ranks,
                is_scaleup_nvlink=logical.num_scaleup_ranks == physical.num_scaleup_ranks,
                num_max_tokens_per_rank=num_max_tokens_per_rank,
                hidden=hidden,
                num_topk=num_topk,
                use_fp8_dispatch=bool(use_fp8_dispatch),
                allow_multiple_reduction=bool(allow_multiple_reduction),
            )
        )

    def get_theoretical_num_sms(
        self,
        num_experts: int,
        num_topk: int,
        num_scaleout_topk: int = 0,
        rdma_gbs: float = 0,
        nvlink_gbs: float = 0,
        sm_read_gbs: float = 200,
        sm_write_gbs: float = 50,
    ) -> int:
        """SMs that keep the slowest link busy, by the model of `deep_ep_ep.sm_model`.

        Args:
            num_experts: Experts of all ranks.
            num_topk: Experts of a token.
            num_scaleout_topk: Must be 0: group-limited gates are not modelled.
            rdma_gbs: GB/s of the network ports that serve this GPU; 0 asks the machine.
            nvlink_gbs: GB/s of this GPU's NVLinks; 0 asks the machine.
            sm_read_gbs: GB/s that one SM reads.
            sm_write_gbs: GB/s that one SM writes.

        Returns:
            An even number of at least 4, at most the device's SMs.

        Raises:
            ConfigError: A count is out of range.

        Collective: no.
        """
        if num_scaleout_topk != 0:
            raise rejected(
                self.rank_idx, "num_scaleout_topk must be 0", num_scaleout_topk, "group-limited gates are not modelled"
            )
        known_nvlink_gbs: float | None = nvlink_gbs or None
        known_rdma_gbs: float | None = rdma_gbs or None
        if self._device.type == "cuda":
            known_nvlink_gbs = known_nvlink_gbs or detect_nvlink_gbs(self._device.index or 0)
            if self.num_rdma_ranks > 1:
                known_rdma_gbs = known_rdma_gbs or detect_rdma_gbs(get_env().nic_name)
        else:
            # No GPU, so there is no link to ask; a warning about it would help nobody.
            known_nvlink_gbs = known_nvlink_gbs or ASSUMED_NVLINK_GBS
            known_rdma_gbs = known_rdma_gbs or ASSUMED_RDMA_GBS
        num_sms = theoretical_num_sms(
            LinkDomains(
                num_scaleout_ranks=self.num_scaleout_ranks,
                num_scaleup_ranks=self.num_scaleup_ranks,
                num_nvlink_ranks=self.num_nvlink_ranks,
            ),
            LinkRates(nvlink_gbs=known_nvlink_gbs, rdma_gbs=known_rdma_gbs),
            num_experts=num_experts,
            num_topk=num_topk,
            device=DeviceSms(num_sms=self._facts.device_num_sms, read_gbs=sm_read_gbs, write_gbs=sm_write_gbs),
            prefer_overlap_with_compute=self.prefer_overlap_with_compute,
        )
        if get_env().buffer_debug and self.rank_idx == 0:
            print(f"{self!r}: {num_sms} SMs for {num_experts} experts, top-{num_topk}", flush=True)
        return num_sms

    def get_theoretical_num_qps(self, num_sms: int) -> int:
        """Network contexts that a kernel of `num_sms` SMs uses well. Collective: no."""
        return theoretical_num_qps(
            num_sms, allow_hybrid_mode=self.allow_hybrid_mode, num_allocated_qps=self.num_allocated_qps
        )

    # Streams and lifetime

    @staticmethod
    def capture() -> EventHandle:
        """An event at the present tail of the current stream, to pass as `previous_event`. Collective: no."""
        return EventHandle()

    def get_comm_stream(self) -> torch.cuda.Stream | torch.cpu.Stream:
        """The stream on which dispatch and combine run: one per process and device. Collective: no."""
        return comm_stream(self._device)

    def barrier(self, use_comm_stream: bool = True, with_cpu_sync: bool = False, sequential: bool = True) -> None:
        """Let no rank go on until every rank has called it.

        On the device backend the streams wait, and the host only with `with_cpu_sync`.

        Args:
            use_comm_stream: Put the barrier on the communication stream, between what the current stream has done and
                what it does next; False puts it on the current stream. The collective backend blocks the host instead.
            with_cpu_sync: Also wait on the host for all work of the device, before and after.
            sequential: Scale-out before scale-up; has no effect where there is one domain.

        Raises:
            CommTimeoutError: A rank did not come.

        Collective: yes.
        """
        self._open_runtime().barrier(use_comm_stream=use_comm_stream, with_cpu_sync=with_cpu_sync)

    def empty_like_recv(
        self, handle: EPHandle, hidden: int | None = None, dtype: torch.dtype = torch.bfloat16
    ) -> torch.Tensor:
        """A tensor for the rows that `combine` will bring back, where it reads them without a copy.

        Write the experts' outputs into it, for example as the `out` of a matrix product, and pass it to `combine`. On
        the device backend it lies in the window while there is room; otherwise it is an ordinary tensor, and `combine`
        is right all the same.

        Args:
            handle: What the dispatch returned.
            hidden: Elements of a row; None takes those that the buffer was made for.
            dtype: Its dtype.

        Returns:
            `[num_recv_tokens, hidden]`, or `[num_expanded_tokens, hidden]` expert-major; values undefined.

        Raises:
            ConfigError: The handle is of another buffer, or `hidden` is not known.

        Collective: no. Stream: usable on the current stream.
        """
        runtime = self._open_runtime()
        if handle.buffer_id != self.id:
            raise rejected(self.rank_idx, "handle must come from a dispatch of this buffer", "another", "pass that one")
        if hidden is None:
            hidden = self._hidden
        if hidden < 1:
            raise rejected(self.rank_idx, "hidden must be positive", hidden, "pass it, or make the buffer with it")
        found = runtime.empty_like_recv(handle, hidden, dtype)
        if found is not None:
            return found
        num_rows = handle.num_expanded_tokens if handle.do_expand else handle.num_recv_tokens
        return torch.empty(num_rows, hidden, dtype=dtype, device=handle.device)

    def destroy(self) -> None:
        """Release the buffer; a second call does nothing. Collective: no.

        Raises:
            ConfigError: The buffer was made without `explicitly_destroy=True`.
        """
        if not self.explicitly_destroy:
            raise rejected(
                self.rank_idx,
                "destroy() is for buffers made with explicitly_destroy=True",
                "explicitly_destroy=False",
                "make the buffer with it, call close(), or just drop the buffer",
            )
        self.close()

    def close(self) -> None:
        """Release the buffer; a second call does nothing. Collective: no, safe in any order and at exit."""
        if self.runtime is not None:
            self.runtime.close()
            self.runtime = None
            # They hold what the backend made ready.
            self._dispatch_kinds, self._combine_kinds = Kinds(), Kinds()
            self.nccl_comm_handle = None

    def __enter__(self) -> ElasticBuffer:
        return self

    def __exit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def __repr__(self) -> str:
        state = "closed" if self.runtime is None else self.runtime.name
        return (
            f"ElasticBuffer(rank {self.rank_idx} of {self.num_ranks}, {state}, num_bytes={self.num_bytes}, "
            f"domains={self.num_scaleout_ranks}x{self.num_scaleup_ranks})"
        )

    def _open_runtime(self) -> Backend:
        if self.runtime is None:
            raise rejected(self.rank_idx, "the buffer must be open", "a closed buffer", "make a new ElasticBuffer")
        return self.runtime

    # Dispatch and combine

    def dispatch(
        self,
        x: torch.Tensor | tuple[torch.Tensor, torch.Tensor],
        topk_idx: torch.Tensor | None = None,
        topk_weights: torch.Tensor | None = None,
        cumulative_local_expert_recv_stats: torch.Tensor | None = None,
        num_experts: int | None = None,
        num_max_tokens_per_rank: int | None = None,
        expert_alignment: int | None = None,
        num_sms: int = 0,
        num_qps: int = 0,
        previous_event: EventHandle | EventOverlap | None = None,
        previous_event_before_epilogue: EventHandle | EventOverlap | None = None,
        async_with_compute_stream: bool = False,
        allocate_on_comm_stream: bool = False,
        handle: EPHandle | None = None,
        do_handle_copy: bool = True,
        do_cpu_sync: bool | None = None,
        do_expand: bool = False,
        do_zero_padding: bool = False,
        use_tma_aligned_col_major_sf: bool = False,
    ) -> tuple[
        torch.Tensor | tuple[torch.Tensor, torch.Tensor],
        torch.Tensor | None,
        torch.Tensor | None,
        EPHandle,
        EventOverlap,
    ]:
        """Send each token once to every rank that hosts one of its experts.

        N is the number of ranks, M `num_max_tokens_per_rank`, L the number of local experts. All tensors are on one
        device.

        Args:
            x: `[num_tokens, hidden]`, contiguous, of any dtype: rows are moved as bytes, a multiple of 16 each. Or a
                tuple `(x, sf)` with scales `[num_tokens, num_packs]` of 4-byte elements (float32, or int32 holding
                four UE8M0 bytes), of any strides. `num_tokens` may differ between ranks and may be 0.
            topk_idx: `[num_tokens, num_topk]` int64 or int32: global expert ids, negative for "none", no expert twice
                in a row. None with a handle.
            topk_weights: `[num_tokens, num_topk]` float32 (float64 on the collective backend, for gradient checks).
            cumulative_local_expert_recv_stats: `[L]` int32, to which the real counts of the local experts are added.
            num_experts: Experts of all ranks; required without a handle.
            num_max_tokens_per_rank: M; None takes the handle's, else the buffer's.
            expert_alignment: Rows of each expert start at a multiple of this; None takes the handle's, else 1.
            num_sms: SMs to use; 0 takes the handle's, else the model's.
            num_qps: Network contexts to use; 0 takes the model's.
            previous_event: Start after this instead of after the current stream; needs `allocate_on_comm_stream`.
            previous_event_before_epilogue: The last, local step waits for this.
            async_with_compute_stream: Return an event instead of making the current stream wait.
            allocate_on_comm_stream: Allow `previous_event`; results come from the communication stream's memory pool in
                either case.
            handle: Repeat the routing of this earlier dispatch: nothing is counted again, and `x` may have another
                hidden size or dtype.
            do_handle_copy: Keep a copy of `topk_idx` in the handle rather than the caller's tensor.
            do_cpu_sync: Size the results exactly and fill the handle's list of counts; False sizes them for the worst
                case, rows past the real ones uninitialised. None: True without a handle; with a handle, as it was made.
            do_expand: Lay rows out by expert.
            do_zero_padding: Zero the gaps between experts; needs `do_expand`.
            use_tma_aligned_col_major_sf: Return scales column by column, each column at a multiple of 16 bytes.

        Returns:
            `(recv_x, recv_topk_idx, recv_topk_weights, handle, event)`; `recv_x` is a tuple with the scales if `x`
            was one. Token-major: `recv_x [num_recv_tokens, hidden]` ordered by (source rank, token), `recv_topk_idx
            [num_recv_tokens, num_topk]` local expert or -1, `recv_topk_weights` the source's whole row. Expert-major:
            `recv_x [num_expanded_tokens, hidden]` by local expert and in that order inside, `recv_topk_idx` None,
            `recv_topk_weights [num_expanded_tokens]`. `recv_topk_weights` is None without `topk_weights`. With a
            handle, the same handle is returned.

        Raises:
            ConfigError: An argument cannot be taken; raised before anything is sent.
            RankMismatchError: Ranks passed different arguments; raised on every rank before any payload is sent.
            CommTimeoutError: A rank died or is late.

        Collective: yes. Stream: runs on the communication stream after the current one (or `previous_event`); on the
        device backend a synchronous call without `previous_event` runs on the current stream, which is the same but
        for the host's time. The collective backend waits for row counts on the host in every mode.
        """
        runtime = self._open_runtime()
        # What `torch.no_grad` does, in less of the host's time.
        records_gradients = torch.is_grad_enabled()
        if records_gradients:
            torch.set_grad_enabled(False)
        try:
            key = dispatch_key(
                self._facts,
                x,
                topk_idx,
                topk_weights,
                cumulative_local_expert_recv_stats,
                handle,
                (num_max_tokens_per_rank, num_experts, expert_alignment, num_sms, num_qps),
                (do_handle_copy, do_cpu_sync, do_expand, do_zero_padding, use_tma_aligned_col_major_sf),
            )
            kind = self._dispatch_kinds.find(key)
            if kind is None:
                args = check_dispatch(
                    self._facts,
                    x=x,
                    topk_idx=topk_idx,
                    topk_weights=topk_weights,
                    cumulative_local_expert_recv_stats=cumulative_local_expert_recv_stats,
                    num_experts=num_experts,
                    num_max_tokens_per_rank=num_max_tokens_per_rank,
                    expert_alignment=expert_alignment,
                    num_sms=num_sms,
                    num_qps=num_qps,
                    handle=handle,
                    do_handle_copy=do_handle_copy,
                    do_cpu_sync=do_cpu_sync,
                    do_expand=do_expand,
                    do_zero_padding=do_zero_padding,
                    use_tma_aligned_col_major_sf=use_tma_aligned_col_major_sf,
                    default_num_sms=self._default_num_sms,
                )
            else:
                rows, sf = x if isinstance(x, tuple) else (x, None)
                if handle is not None:
                    topk_idx = handle.topk_idx
                assert topk_idx is not None, "a call without topk_idx and without a handle is of no kind"
                args = DispatchArgs(
                    rows, sf, topk_idx, topk_weights, cumulative_local_expert_recv_stats, handle, kind, *kind.settings
                )
            streams = check_streams(
                self._facts,
                previous_event=previous_event,
                previous_event_before_epilogue=previous_event_before_epilogue,
                async_with_compute_stream=async_with_compute_stream,
                allocate_on_comm_stream=allocate_on_comm_stream,
            )
            if kind is None:
                num_sf_packs = 0 if args.sf is None else args.sf.size(1)
                self._check_size("dispatch", args.num_max_tokens_per_rank, args.x, args.num_topk, num_sf_packs)
                self._dispatch_kinds.add(key, args.kind)
            with CommScope(args.x.device, streams, may_stay=runtime.may_stay) as scope:
                result = runtime.dispatch(args, scope)
                event = _finish_dispatch(scope, args, result) if scope.is_crossed else scope.finish()
        except ConfigError as error:
            self._report_rejection("dispatch", error)
            raise
        finally:
            if records_gradients:
                torch.set_grad_enabled(True)
        recv_x = result.recv_x if result.recv_sf is None else (result.recv_x, result.recv_sf)
        return recv_x, result.recv_topk_idx, result.recv_topk_weights, result.handle, event

    def combine(
        self,
        x: torch.Tensor,
        handle: EPHandle,
        topk_weights: torch.Tensor | None = None,
        bias: torch.Tensor | tuple[torch.Tensor, torch.Tensor] | None = None,
        num_sms: int = 0,
        num_qps: int = 0,
        previous_event: EventHandle | EventOverlap | None = None,
        previous_event_before_epilogue: EventHandle | EventOverlap | None = None,
        async_with_compute_stream: bool = False,
        allocate_on_comm_stream: bool = False,
    ) -> tuple[torch.Tensor, torch.Tensor | None, EventOverlap]:
        """Bring the rows of a dispatch back to their tokens, and sum them.

        The sum of a token runs over its top-k entries in ascending position, in float32 (float64 for float64), bias
        first, rounded once; with `allow_multiple_reduction` partial sums are made, and rounded, on each rank
        (expert-major) and in each node (hybrid). The exact order is in the documentation, "Reduction order". Weights
        are moved, not multiplied in.

        Args:
            x: `[num_rows, hidden]`, contiguous: one row for each row that the dispatch returned, padding included.
                bfloat16; the collective backend also takes float16, float32 and float64.
            handle: What the dispatch returned; decides whether `x` is token-major or expert-major.
            topk_weights: `[num_rows, num_topk]`, or `[num_rows]` expert-major: float32. Not with an expert-major
                handle when `allow_multiple_reduction` is off.
            bias: None, one tensor, or a tuple of two: each `[num_tokens, hidden]` of the dtype of `x`.
            num_sms: SMs to use; 0 takes the handle's.
            num_qps: Network contexts to use; 0 takes the model's.
            previous_event: As in `dispatch`.
            previous_event_before_epilogue: As in `dispatch`.
            async_with_compute_stream: As in `dispatch`.
            allocate_on_comm_stream: As in `dispatch`.

        Returns:
            `(combined_x, combined_topk_weights, event)`: `[num_tokens, hidden]`, every row written, 0 or the bias
            where a token has no expert; and `[num_tokens, num_topk]`, entry k from the rank that hosts expert k, or
            None without `topk_weights`.

        Raises:
            ConfigError: An argument cannot be taken; raised before anything is sent.
            RankMismatchError: Ranks passed different arguments.
            CommTimeoutError: A rank died or is late.

        Collective: yes. Stream: as `dispatch`.
        """
        runtime = self._open_runtime()
        # What `torch.no_grad` does, in less of the host's time.
        records_gradients = torch.is_grad_enabled()
        if records_gradients:
            torch.set_grad_enabled(False)
        try:
            key = combine_key(x, handle, topk_weights, bias, (num_sms, num_qps))
            kind = self._combine_kinds.find(key)
            if kind is None:
                args = check_combine(
                    self._facts,
                    x=x,
                    handle=handle,
                    topk_weights=topk_weights,
                    bias=bias,
                    num_sms=num_sms,
                    num_qps=num_qps,
                )
            else:
                biases = () if bias is None else bias if isinstance(bias, tuple) else (bias,)
                args = CombineArgs(x, handle, topk_weights, biases, kind, *kind.settings)
            streams = check_streams(
                self._facts,
                previous_event=previous_event,
                previous_event_before_epilogue=previous_event_before_epilogue,
                async_with_compute_stream=async_with_compute_stream,
                allocate_on_comm_stream=allocate_on_comm_stream,
            )
            if kind is None:
                self._check_size("combine", handle.num_max_tokens_per_rank, args.x, handle.num_topk, 0)
                self._combine_kinds.add(key, args.kind)
            with CommScope(args.x.device, streams, may_stay=runtime.may_stay) as scope:
                result = runtime.combine(args, scope)
                event = _finish_combine(scope, args, result) if scope.is_crossed else scope.finish()
        except ConfigError as error:
            self._report_rejection("combine", error)
            raise
        finally:
            if records_gradients:
                torch.set_grad_enabled(True)
        return result.combined_x, result.combined_topk_weights, event

    def _report_rejection(self, operation: str, error: ConfigError) -> None:
        """Let the peers know why this rank does not come, when it refuses its own arguments."""
        if self.runtime is not None and not isinstance(error, RankMismatchError):
            self.runtime.report_rejection(operation, str(error))

    def _default_num_sms(self, num_experts: int, num_topk: int) -> int:
        key = (num_experts, num_topk)
        if key not in self._num_sms_of:
            # The collective backend uses no SMs, so it asks no link for its rate. A row may have more entries than
            # there are experts, the rest negative.
            self._num_sms_of[key] = self.get_theoretical_num_sms(
                num_experts,
                min(num_topk, num_experts),
                rdma_gbs=ASSUMED_RDMA_GBS,
                nvlink_gbs=ASSUMED_NVLINK_GBS,
            )
        return self._num_sms_of[key]

    def _shape(self, num_max_tokens_per_rank: int, row_bytes: int, num_topk: int, num_sf_packs: int) -> BufferShape:
        """The size of one call; rows count as two-byte elements, whatever their dtype."""
        padded_bytes = align_up(row_bytes, RECORD_ALIGNMENT_BYTES)
        return BufferShape(
            num_scaleout_ranks=self.num_scaleout_ranks,
            num_scaleup_ranks=self.num_scaleup_ranks,
            is_scaleup_nvlink=self.num_scaleup_ranks == self.num_nvlink_ranks,
            num_max_tokens_per_rank=num_max_tokens_per_rank,
            hidden=padded_bytes // 2,
            num_topk=num_topk,
            num_sf_packs=num_sf_packs,
            allow_multiple_reduction=self.allow_multiple_reduction,
        )

    def _check_size(
        self, operation: str, num_max_tokens_per_rank: int, x: torch.Tensor, num_topk: int, num_sf_packs: int
    ) -> None:
        row_bytes = x.size(1) * x.element_size()
        shape = self._shape(num_max_tokens_per_rank, row_bytes, num_topk, num_sf_packs)
        required_bytes = dispatch_buffer_bytes(shape) if operation == "dispatch" else combine_buffer_bytes(shape)
        if required_bytes > self.num_bytes:
            raise rejected(
                self.rank_idx,
                f"this {operation} needs a buffer of {align_up(required_bytes, BUFFER_ALIGNMENT_BYTES)} bytes",
                f"num_bytes={self.num_bytes}",
                "make the buffer with the larger num_max_tokens_per_rank and hidden, or with "
                "num_bytes=ElasticBuffer.get_buffer_size_hint(...)",
            )


def _finish_dispatch(scope: CommScope, args: DispatchArgs, result: DispatchResult) -> EventOverlap:
    return scope.finish(
        inputs=[
            args.x,
            args.sf,
            args.topk_idx,
            args.topk_weights,
            args.recv_stats,
            *(() if args.handle is None else args.handle.tensors()),
        ],
        outputs=[
            result.recv_x,
            result.recv_sf,
            result.recv_topk_idx,
            result.recv_topk_weights,
            *result.handle.tensors(),
        ],
    )


def _finish_combine(scope: CommScope, args: CombineArgs, result: CombineResult) -> EventOverlap:
    return scope.finish(
        inputs=[args.x, args.topk_weights, *args.biases, *args.handle.tensors()],
        outputs=[result.combined_x, result.combined_topk_weights],
    )


def _check_constructor(
    num_bytes: int | None,
    num_cpu_bytes: int,
    num_max_tokens_per_rank: int,
    hidden: int,
    num_allocated_qps: int,
    num_cpu_timeout_secs: float,
) -> None:
    if num_cpu_bytes:
        raise ConfigError(
            f"num_cpu_bytes must be 0 (got {num_cpu_bytes}): the host-memory segment belongs to Engram, which is a "
            "package of its own, deep-ep-engram"
        )
    if num_bytes is None:
        if num_max_tokens_per_rank <= 0 or hidden <= 0:
            raise ConfigError(
                "num_max_tokens_per_rank and hidden must be positive when num_bytes is None (got "
                f"{num_max_tokens_per_rank} and {hidden}); pass them, or num_bytes"
            )
    elif num_bytes <= 0 or num_bytes % BUFFER_ALIGNMENT_BYTES:
        raise ConfigError(
            f"num_bytes must be a positive multiple of {BUFFER_ALIGNMENT_BYTES} (got {num_bytes}); "
            "ElasticBuffer.get_buffer_size_hint(...) gives one"
        )
    if num_max_tokens_per_rank < 0 or hidden < 0 or num_allocated_qps < 0:
        raise ConfigError(
            "num_max_tokens_per_rank, hidden and num_allocated_qps must not be negative (got "
            f"{num_max_tokens_per_rank}, {hidden}, {num_allocated_qps})"
        )
    if not num_cpu_timeout_secs > 0:
        raise ConfigError(f"num_cpu_timeout_secs must be positive (got {num_cpu_timeout_secs})")


def _show_num_bytes(value: int) -> str:
    return "None" if value < 0 else str(value)
