"""Owns what the operations of one device backend share where ranks are on several nodes: window, network, device state.

It moves nothing: `dispatch` and `combine` do.
"""

from __future__ import annotations

import contextlib
import ctypes
import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch

from deep_ep_core.align import align_up
from deep_ep_core.errors import CommTimeoutError, ConfigError, RankMismatchError
from deep_ep_core.jit import get_kernels
from deep_ep_core.jit.structs import ParamsStruct
from deep_ep_core.lsa_team import LsaTeam, make_lsa_team
from deep_ep_core.nccl import Communicator, DeviceComm, DeviceCommConfig, GinConfig, GinConnection
from deep_ep_core.transport import AgreedField
from deep_ep_core.wait import WaitParams
from deep_ep_core.window import ControlRegion, SymmetricMemory
from deep_ep_ep.checks import CombineArgs, DispatchArgs
from deep_ep_ep.device.context import MAX_NUM_EXPERTS, OperationContext, RecvMemory, window_sizes
from deep_ep_ep.device.network.params import (
    OPENING_BYTES,
    DrainParams,
    ExchangeParams,
    Network,
    NetworkWord,
    drain_launch_shape,
    drain_spec,
    exchange_launch_shape,
    exchange_spec,
    gin_call_type,
)
from deep_ep_ep.device.opening import OperationKind, agreed_fields, set_agreed
from deep_ep_ep.device.state import PHASES
from deep_ep_ep.sm_model import theoretical_num_qps

__all__ = ["NetworkContext", "NetworkOptions"]

logger = logging.getLogger(__name__)

_SLOTS = "ep.network.slots"
_WORDS = "ep.network.words"
_STAGE = "ep.network.stage"
_SLABS = "ep.network.slabs"
_WORD_BYTES = 8
_COUNT_BYTES = 4
_ALIGNMENT = 256
# Room for the alignment of the parts of the stage.
_STAGE_SLACK_BYTES = 4096
_CLOSE_TIMEOUT_S = 2.0


@dataclass(frozen=True, slots=True, kw_only=True)
class NetworkOptions:
    """How a buffer uses the network between nodes.

    Attributes:
        is_hybrid: Rows go to the rank of the same rail, which hands them on in its node; otherwise straight to the
            ranks that want them.
        num_contexts: GIN contexts wanted, each a queue pair a connected peer.
        traffic_class: Network service level; `EP_OVERRIDE_RDMA_SL` wins over it.
    """

    is_hybrid: bool
    num_contexts: int
    traffic_class: int


class NetworkContext(OperationContext):
    """The memory and the kernels of one buffer on one rank, where there are several nodes.

    The window holds, beside control memory and the heap, a stage of `num_bytes` for what ranks of a node exchange, and
    slabs of twice `num_bytes` for rows on their way between nodes. They are apart because a network card may still read
    what an operation sends when the next one begins to stage.

    Args:
        communicator: The ranks.
        num_bytes: Size of the buffer.
        recv_memory: Where received rows live; the same on every rank.
        timeout_s: How long a kernel waits for a peer.
        num_gpu_ranks: Ranks that run on this rank's GPU.
        options: How to use the network; the same on every rank.

    Attributes:
        options: See above.
        num_nodes, num_relays: Numbers of nodes, and of relays (`network.cuh`).
        num_contexts: GIN contexts that there are.
        dev_comm_bytes: Size of the device communicator, for the types of parameters.
        stage_offset, stage_bytes: The stage in the window.
        slabs_offset, slabs_bytes: The slabs.

    Raises:
        TransportError: There is no network, not enough memory, or NCCL could not register it.

    Collective: the constructor is; `close` is not.
    """

    def __init__(
        self,
        communicator: Communicator,
        *,
        num_bytes: int,
        recv_memory: RecvMemory,
        timeout_s: float,
        num_gpu_ranks: int,
        options: NetworkOptions,
    ) -> None:
        super().__init__(communicator, recv_memory=recv_memory, num_gpu_ranks=num_gpu_ranks)
        num_ranks = self.num_ranks
        self.options = options
        self.num_nodes = num_ranks // communicator.lsa.num_ranks
        self.num_relays = self.num_nodes if options.is_hybrid else num_ranks
        connection = GinConnection.RAIL if options.is_hybrid else GinConnection.FULL
        gin = GinConfig(
            connection=connection,
            num_contexts=options.num_contexts,
            num_counters=1,
            traffic_class=options.traffic_class,
        )
        self._device_comm = DeviceComm(communicator, DeviceCommConfig(gin=gin))
        self.num_contexts = self._device_comm.num_gin_contexts or options.num_contexts
        self.dev_comm_bytes = self._device_comm.num_bytes
        slot_bytes = align_up(
            OPENING_BYTES + _COUNT_BYTES * (num_ranks + MAX_NUM_EXPERTS + self.num_relays), _ALIGNMENT
        )
        self.stage_bytes = num_bytes + _STAGE_SLACK_BYTES
        self.slabs_bytes = 2 * num_bytes + _STAGE_SLACK_BYTES
        sizes = window_sizes(num_bytes, num_ranks=num_ranks, recv_memory=recv_memory)
        try:
            self.memory = SymmetricMemory(
                communicator,
                regions=[
                    ControlRegion(name=_SLOTS, num_bytes=2 * num_ranks * slot_bytes),
                    ControlRegion(name=_WORDS, num_bytes=len(NetworkWord) * num_ranks * _WORD_BYTES),
                    ControlRegion(name=_STAGE, num_bytes=self.stage_bytes, alignment=_ALIGNMENT),
                    ControlRegion(name=_SLABS, num_bytes=self.slabs_bytes, alignment=_ALIGNMENT),
                ],
                heap_bytes=sizes.heap_bytes,
            )
        except BaseException:
            self._device_comm.close()
            raise
        layout = self.memory.layout
        self.stage_offset, self.slabs_offset = layout.offset_of(_STAGE), layout.offset_of(_SLABS)
        self._timeout_s = timeout_s
        self._totals = torch.zeros(len(NetworkWord) * num_ranks, dtype=torch.int64, device=self.device)
        self._num_puts = torch.zeros(self.num_contexts, dtype=torch.int64, device=self.device)
        team: LsaTeam = make_lsa_team(self.memory, rank=self.rank)
        self._network = Network(
            team=team,
            wait=self.wait_params(PHASES),
            state=self.state_address,
            totals=self._totals.data_ptr(),
            num_puts=self._num_puts.data_ptr(),
            slots_offset=layout.offset_of(_SLOTS),
            slot_bytes=slot_bytes,
            words_offset=layout.offset_of(_WORDS),
            num_ranks=num_ranks,
            num_contexts=self.num_contexts,
            is_hybrid=options.is_hybrid,
        )
        # At once, since a compiler takes seconds for what reaches NCCL's headers.
        get_kernels((exchange_spec(self.dev_comm_bytes), drain_spec(self.dev_comm_bytes)), self.device_idx)
        self._exchange = self.launch("exchange", lambda: (exchange_spec(self.dev_comm_bytes), exchange_launch_shape()))
        self._drain = self.launch("drain", lambda: (drain_spec(self.dev_comm_bytes), drain_launch_shape()))
        self.barrier = _NetworkBarrier(self)
        self._is_closed = False
        # What other streams used last is done: kernels of the communication stream may begin.
        torch.cuda.current_stream(self.device).synchronize()

    def wait_params(self, phases: Sequence[str]) -> WaitParams:
        """Deadlines of kernels whose phases have these names."""
        return self.log.params(first_phase=self.log.add_phases(phases), timeout_s=self._timeout_s)

    def network(self, *, num_qps: int) -> Network:
        """The part of parameters that all kernels have.

        Args:
            num_qps: GIN contexts to use; at most as many as there are.
        """
        network = Network.from_buffer_copy(self._network)
        network.num_contexts = min(num_qps, self.num_contexts)
        return network

    def num_qps_of(self, args: DispatchArgs | CombineArgs) -> int:
        """GIN contexts of a call: as many as it says, or as the model does."""
        return args.num_qps or theoretical_num_qps(
            args.num_sms, allow_hybrid_mode=self.options.is_hybrid, num_allocated_qps=self.num_contexts
        )

    def new_gin_call(self, call_type: type[ParamsStruct], cuda_name: str) -> ParamsStruct:
        """Parameters of a kernel that uses GIN, with all but its member `call` set. See `gin_call_type`."""
        params_type = gin_call_type(call_type, cuda_name, self.dev_comm_bytes)
        params = params_type.__new__(params_type)
        ctypes.memmove(
            ctypes.addressof(params.gin.dev_comm), ctypes.addressof(self._device_comm.data), self.dev_comm_bytes
        )
        params.gin.window = self.memory.window.handle
        return params

    def new_exchange(self, *, num_qps: int) -> ParamsStruct:
        """Parameters of `exchange`; its opening is `call.opening`."""
        params = self.new_gin_call(ExchangeParams, "deep_ep_ep::ExchangeCall")
        params.call.net = self.network(num_qps=num_qps)
        return params

    def exchange(self, params: ParamsStruct, stream: int) -> None:
        """Open an operation: tell all ranks what `params` say, and wait for theirs. Stream: launches on it."""
        self._exchange(params, stream)

    @contextlib.contextmanager
    def refusing(self, stream: int) -> Iterator[None]:
        """Let what fails in the block, on this rank alone, end the operation on all ranks.

        For a block between the beginning of an operation and its opening, for which the others would wait. Instead of
        it this rank opens a refusal, which they are told of as of any disagreement; the buffer works on. Not where a
        graph is captured.

        Args:
            stream: Handle of the stream of the operation. The host waits for it where the block fails.
        """
        try:
            yield
        except Exception:
            if not torch.cuda.is_current_stream_capturing():
                self._refuse(stream)
            raise

    def _refuse(self, stream: int) -> None:
        params = self.new_exchange(num_qps=1)
        set_agreed(params.call.opening, agreed_fields(OperationKind.REFUSAL, []))
        self.exchange(params, stream)
        torch.cuda.synchronize(self.device)
        # That the others came with something else is no news.
        with contextlib.suppress(RankMismatchError, CommTimeoutError):
            self.check()

    def divide_slabs(self, what: str, sizes: Sequence[int]) -> list[int]:
        """Where parts of the slabs begin in the window.

        Args:
            what: What they are for, for the error.
            sizes: Bytes of each.

        Raises:
            ConfigError: They do not fit.
        """
        return self._divide(what, sizes, self.slabs_offset, self.slabs_bytes, "between nodes, twice num_bytes")

    def divide_stage(self, what: str, sizes: Sequence[int]) -> list[int]:
        """Where parts of the stage begin in the window; as `divide_slabs`."""
        return self._divide(what, sizes, self.stage_offset, self.stage_bytes, "of a node's ranks, num_bytes")

    def _divide(self, what: str, sizes: Sequence[int], offset: int, num_bytes: int, memory: str) -> list[int]:
        offsets, end = [], offset
        for size in sizes:
            offsets.append(end)
            end += align_up(size, _ALIGNMENT)
        if end - offset > num_bytes:
            raise ConfigError(
                f"{what} must fit the memory for rows {memory} (got {end - offset} bytes needed, {num_bytes} there, on "
                f"rank {self.rank}); make the buffer with a larger num_bytes, or pass fewer tokens at a time"
            )
        return offsets

    def close(self) -> None:
        """Let go of the window and of the network; a second call does nothing. Collective: no.

        The host waits until the network has read what this rank has sent: for at most 2 s, and not at all where an
        operation has failed or a graph is being captured.
        """
        if self._is_closed:
            return
        self._is_closed = True
        if not self.log.has_record and not torch.cuda.is_current_stream_capturing():
            self._wait_for_network()
        super().close()
        self._device_comm.close()

    def _wait_for_network(self) -> None:
        params = self.new_gin_call(DrainParams, "deep_ep_ep::DrainCall")
        params.call.net, params.call.num_contexts = self.network(num_qps=1), self.num_contexts
        params.call.net.wait = self.log.params(
            first_phase=self.log.add_phases(["the closing of the buffer"]), timeout_s=_CLOSE_TIMEOUT_S
        )
        try:
            with torch.cuda.device(self.device):
                # What other streams have under way may put more.
                torch.cuda.synchronize(self.device)
                self._drain(params, torch.cuda.current_stream(self.device).cuda_stream)
                torch.cuda.synchronize(self.device)
        except Exception as error:
            # A context that is lost sends nothing any more, and the rest must be closed nevertheless.
            logger.warning("%r is closed before the network is done: %s", self, error)
        if self.log.has_record:
            logger.warning("%r is closed before the network is done: a rank that it sent to may be gone", self)

    def _opened_values(self, value_idx: int) -> list[int | None]:
        num_ranks, net = self.num_ranks, self._network
        epoch = int(self._state[:8].view(torch.int64).item())
        opened = self.memory.control(_WORDS, torch.int64).view(-1, num_ranks)[NetworkWord.OPENED].tolist()
        slots = self.memory.control(_SLOTS, torch.int32).view(2, num_ranks, net.slot_bytes // _COUNT_BYTES)
        values = slots[epoch % 2, :, value_idx].tolist()
        return [
            value & 0xFFFFFFFF if last_epoch >= epoch else None
            for value, last_epoch in zip(values, opened, strict=True)
        ]

    def __repr__(self) -> str:
        mode = "hybrid" if self.options.is_hybrid else "direct"
        return (
            f"NetworkContext(rank {self.rank} of {self.num_ranks} on {self.num_nodes} nodes, {mode}, "
            f"{self.num_contexts} GIN contexts, {self.recv_memory}, {self.memory!r})"
        )


class _NetworkBarrier:
    """A barrier between the streams of all ranks: an opening of nothing."""

    def __init__(self, context: NetworkContext) -> None:
        self._context = context
        self._fields: tuple[AgreedField, ...] = agreed_fields(OperationKind.BARRIER, [])
        self._params = context.new_exchange(num_qps=1)
        self._params.call.net.wait = context.wait_params(("barrier", *PHASES[1:]))
        set_agreed(self._params.call.opening, self._fields)

    def enqueue(self, stream: torch.cuda.Stream | None = None) -> None:
        """Put the barrier into a stream; None takes the current one. Collective: yes."""
        self._context.begin(self._fields)
        found = stream or torch.cuda.current_stream(self._context.device)
        self._context.exchange(self._params, found.cuda_stream)
