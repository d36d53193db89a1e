"""Owns the network between nodes for messages: the device communicator, and the kernels that ask for puts and signals.

It exists where some rank is not reached by load and store, and nowhere else. What is put where is decided in `links`.
"""

from __future__ import annotations

import functools

from deep_ep_core.errors import TransportError
from deep_ep_core.jit import KernelSpec, LaunchShape, PreparedLaunch, get_kernels, package_include_dir
from deep_ep_core.jit.structs import Int32, ParamsStruct, Pointer, UInt64, opaque
from deep_ep_core.nccl import Communicator, DeviceComm, DeviceCommConfig, GinConfig, GinConnection
from deep_ep_core.nccl.properties import GinType
from deep_ep_core.nccl.window import Window

__all__ = ["GinNetwork", "drain_spec", "put_and_signal_spec"]

_ONE_THREAD = LaunchShape(grid=(1, 1, 1), block=(1, 1, 1))
# At 1 to 2 GHz, 5 to 10 s.
_DRAIN_CYCLES = 10_000_000_000


@functools.cache
def _put_and_signal_params(dev_comm_bytes: int) -> type[ParamsStruct]:
    class PutAndSignalParams(ParamsStruct):
        """Mirror of the struct in `put_and_signal.cuh`, for an `ncclDevComm` of that size."""

        __slots__ = ()
        cuda_name = "deep_ep_pp::PutAndSignalParams"
        _fields_ = (
            ("dev_comm", opaque(dev_comm_bytes)),
            ("slots", Pointer),
            ("words", Pointer),
            ("from_offset", UInt64),
            ("to_offset", UInt64),
            ("num_bytes", UInt64),
            ("word_offset", UInt64),
            ("peer", Int32),
        )

    return PutAndSignalParams


@functools.cache
def _drain_params(dev_comm_bytes: int) -> type[ParamsStruct]:
    class DrainParams(ParamsStruct):
        """Mirror of the struct in `drain.cuh`, for an `ncclDevComm` of that size."""

        __slots__ = ()
        cuda_name = "deep_ep_pp::DrainParams"
        _fields_ = (("dev_comm", opaque(dev_comm_bytes)), ("timeout_cycles", UInt64))

    return DrainParams


def put_and_signal_spec(dev_comm_bytes: int) -> KernelSpec:
    """The kernel that asks for a put and a signal; one variant serves all sizes."""
    return _spec("put_and_signal", _put_and_signal_params(dev_comm_bytes))


def drain_spec(dev_comm_bytes: int) -> KernelSpec:
    """The kernel that waits until what was asked for has left this rank."""
    return _spec("drain", _drain_params(dev_comm_bytes))


def _spec(function: str, params_type: type[ParamsStruct]) -> KernelSpec:
    return KernelSpec(
        label=f"pp_{function}",
        header=f"deep_ep_pp/{function}.cuh",
        function=f"deep_ep_pp::{function}",
        params_type=params_type,
        include_dirs=(package_include_dir("deep_ep_core"), package_include_dir("deep_ep_pp")),
        max_threads_per_block=1,
        needs_nccl=True,
    )


class GinNetwork:
    """The ranks that only the network reaches.

    Args:
        communicator: All ranks.
        words: The window of words.

    Attributes:
        slots: The window of slots, which the owner sets with each configuration.

    Raises:
        TransportError: NCCL has no network that kernels can use, or was told not to.
        CompileError: A kernel does not compile.

    Collective: the constructor is; `close` is not.
    """

    def __init__(self, communicator: Communicator, words: Window) -> None:
        assert communicator.device.index is not None, "a communicator knows which device it is on"
        gin = GinConfig(connection=GinConnection.FULL, num_contexts=1)
        self._device_comm = DeviceComm(communicator, DeviceCommConfig(gin=gin))
        self.slots: Window | None = None
        self._words = words
        num_bytes, device_idx = self._device_comm.num_bytes, communicator.device.index
        try:
            if self._device_comm.gin_type is GinType.NONE:
                raise TransportError(
                    f"messages between nodes need GIN, NCCL's network for kernels (got EP_DISABLE_GIN=1, on "
                    f'{communicator.where}); unset it, or use backend="collective"'
                )
            self._params_type = _put_and_signal_params(num_bytes)
            put, drain = get_kernels((put_and_signal_spec(num_bytes), drain_spec(num_bytes)), device_idx)
            self._put = PreparedLaunch(put, _ONE_THREAD)
            self._drain_params = _drain_params(num_bytes)(dev_comm=self._device_comm.data, timeout_cycles=_DRAIN_CYCLES)
            self._drain = PreparedLaunch(drain, _ONE_THREAD)
        except BaseException:
            self.close()
            raise

    def put_and_signal(
        self, stream: int, peer: int, *, to_offset: int, from_offset: int, num_bytes: int, word_offset: int
    ) -> None:
        """As `deep_ep_pp.device.links.Network.put_and_signal`."""
        assert self.slots is not None, "messages come after a configuration"
        params = self._params_type(
            dev_comm=self._device_comm.data,
            slots=self.slots.handle,
            words=self._words.handle,
            from_offset=from_offset,
            to_offset=to_offset,
            num_bytes=num_bytes,
            word_offset=word_offset,
            peer=peer,
        )
        self._put(params, stream)

    def drain(self, stream: int) -> None:
        """Let a stream wait until the network has taken over what was asked for."""
        self._drain(self._drain_params, stream)

    def close(self) -> None:
        """Let NCCL free what it holds for the kernels. Never waits for a peer, may be repeated. Collective: no."""
        self._device_comm.close()
