"""Owns the device backend across nodes as `ElasticBuffer` sees it: what it opens, and which kernels calls take."""

from __future__ import annotations

import torch

from deep_ep_core.backend_choice import count_gpu_ranks, open_together
from deep_ep_core.jit import get_kernels
from deep_ep_core.nccl import Communicator
from deep_ep_core.transport import CollectiveTransport
from deep_ep_ep.checks import BufferFacts
from deep_ep_ep.collective import CollectiveBackend
from deep_ep_ep.device.backend import DeviceBackend
from deep_ep_ep.device.context import RecvMemory
from deep_ep_ep.device.network.combine import NetworkCombiner
from deep_ep_ep.device.network.combine_kernels import all_combine_specs
from deep_ep_ep.device.network.context import NetworkContext, NetworkOptions
from deep_ep_ep.device.network.dispatch import NetworkDispatcher
from deep_ep_ep.device.network.dispatch_kernels import all_dispatch_specs
from deep_ep_ep.device.network.plan import NetworkPlan

__all__ = ["NetworkBackend", "open_network_context"]


class NetworkBackend(DeviceBackend):
    """The device backend of ranks on several nodes. See `DeviceBackend`.

    Args:
        context: The memory and the kernels.
        collective: The backend for other calls.
        facts: What the buffer's checks know.
    """

    kernel_plan = NetworkPlan
    barrier_is_operation = True

    def __init__(self, context: NetworkContext, collective: CollectiveBackend, facts: BufferFacts) -> None:
        super().__init__(
            context,
            collective,
            facts,
            dispatcher=NetworkDispatcher(context, facts),
            combiner=NetworkCombiner(context, facts),
        )


def open_network_context(
    transport: CollectiveTransport,
    communicator: Communicator,
    *,
    num_bytes: int,
    recv_memory: RecvMemory,
    gpu_timeout_s: float,
    options: NetworkOptions,
) -> NetworkContext:
    """Make the memory, and the kernels that every buffer needs, on all ranks or on none.

    Args:
        transport: Row exchanges of the group, with an operation `OPEN_DEVICE`.
        communicator: NCCL's communicator of the ranks.
        num_bytes: Size of the buffer.
        recv_memory: Where received rows live.
        gpu_timeout_s: How long kernels wait for a rank.
        options: How to use the network.

    Raises:
        TransportError: There is no network, not enough memory, or another rank has no device backend.
        CompileError: A kernel does not compile.
        ConfigError: A part that is needed is not installed.

    Collective: yes.
    """
    num_gpu_ranks = count_gpu_ranks(transport, communicator.device)

    def make() -> NetworkContext:
        context = NetworkContext(
            communicator,
            num_bytes=num_bytes,
            recv_memory=recv_memory,
            timeout_s=gpu_timeout_s,
            num_gpu_ranks=num_gpu_ranks,
            options=options,
        )
        # No rank shall wait for one that compiles.
        num_bytes_of_comm = context.dev_comm_bytes
        specs = (
            *all_dispatch_specs(num_bytes_of_comm, is_idx64=True),
            *all_combine_specs(num_bytes_of_comm, dtype=torch.bfloat16, idx_dtype=torch.int64),
        )
        get_kernels(specs, context.device_idx)
        return context

    return open_together(transport, make)
