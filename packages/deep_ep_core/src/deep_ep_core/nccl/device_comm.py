"""Owns the device communicator: what kernels that use NCCL's device functions are passed, by value.

GIN, the network from inside kernels, is asked for only where some rank cannot be reached by load and store. What its
signals and contexts are used for belongs to the features.
"""

from __future__ import annotations

import ctypes
import logging
import struct
from collections.abc import Iterator
from dataclasses import dataclass, fields
from enum import Enum
from types import TracebackType

from deep_ep_core.env import get_env
from deep_ep_core.errors import ConfigError, TransportError
from deep_ep_core.nccl.communicator import CREATE_DEVICE_COMM, Communicator, wait_for_device
from deep_ep_core.nccl.properties import GinType
from deep_ep_core.nccl.structs import UNDEFINED_INT, dev_comm_fields, new_struct
from deep_ep_core.transport import AgreedField

__all__ = ["DeviceComm", "DeviceCommConfig", "GinConfig", "GinConnection"]

logger = logging.getLogger(__name__)


class GinConnection(Enum):
    """Which ranks GIN connects. NCCL's numbers."""

    FULL = 1
    RAIL = 2


@dataclass(frozen=True, slots=True, kw_only=True)
class GinConfig:
    """What kernels need of GIN.

    Attributes:
        connection: Connect every pair of ranks, or only the ranks of a rail.
        num_contexts: Contexts wanted, each a queue pair a connected peer. A hint: NCCL may give another number.
        num_signals: Signals, numbered from 0.
        num_counters: Counters, numbered from 0.
        num_rail_barriers: Barriers of the rail team.
        num_world_barriers: Barriers of all ranks; not with `GinConnection.RAIL`.
        has_exclusive_contexts: No context is shared with another device communicator.
        queue_depth: Requests that a context's queue holds; 0 leaves it to NCCL.
        traffic_class: Network service level; None leaves it to NCCL. `EP_OVERRIDE_RDMA_SL` wins over it.
        has_strong_signals: Kernels use strong signals, which cover every earlier put to the same peer.
        has_va_signals: Kernels use signals that live at a place in a window.

    Raises:
        ConfigError: A number is negative, there is no context, or barriers of all ranks are asked for on rails.
    """

    connection: GinConnection
    num_contexts: int
    num_signals: int = 0
    num_counters: int = 0
    num_rail_barriers: int = 0
    num_world_barriers: int = 0
    has_exclusive_contexts: bool = False
    queue_depth: int = 0
    traffic_class: int | None = None
    has_strong_signals: bool = True
    has_va_signals: bool = True

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            least = 1 if field.name == "num_contexts" else 0
            if isinstance(value, int) and value < least:
                raise ConfigError(f"{field.name} of a GinConfig must be at least {least} (got {value})")
        if self.connection is GinConnection.RAIL and self.num_world_barriers:
            raise ConfigError(
                f"num_world_barriers must be 0 where GIN connects rails only (got {self.num_world_barriers}); connect "
                "all ranks, or use rail barriers"
            )


@dataclass(frozen=True, slots=True, kw_only=True)
class DeviceCommConfig:
    """What kernels need of a device communicator.

    Attributes:
        num_lsa_barriers: Barriers of the LSA team; a kernel uses one a block.
        gin: What they need of GIN where some rank is not reached by load and store; None for nothing.

    Raises:
        ConfigError: A number is negative.
    """

    num_lsa_barriers: int = 0
    gin: GinConfig | None = None

    def __post_init__(self) -> None:
        if self.num_lsa_barriers < 0:
            raise ConfigError(f"num_lsa_barriers must be at least 0 (got {self.num_lsa_barriers})")


class DeviceComm:
    """A device communicator, `ncclDevComm`.

    Args:
        communicator: The ranks.
        config: What kernels need; the same on every rank.

    Attributes:
        data: The struct as kernels take it: a copy of these bytes, by value.
        gin_type: How GIN reaches the network; NONE where it was not asked for, because every rank is reached by load
            and store, `config` has no use for it, or `EP_DISABLE_GIN` is set.

    Raises:
        TransportError: NCCL could not make it, or has no GIN and some rank is not reached by load and store.
        RankMismatchError: Ranks passed different configurations.
        CommTimeoutError: A rank did not take part.

    Collective: the constructor is; `close` is not, may be repeated, and may come after the communicator's.
    """

    def __init__(self, communicator: Communicator, config: DeviceCommConfig) -> None:
        self._is_closed = True
        self._communicator = communicator
        self._version = communicator.library.version
        gin = config.gin if communicator.needs_gin and not get_env().disable_gin else None
        communicator.agree(CREATE_DEVICE_COMM, list(_agreed_fields(config.num_lsa_barriers, gin)))
        self.gin_type = GinType.NONE if gin is None else _available_gin(communicator, gin.connection)
        requirements = new_struct(
            "ncclDevCommRequirements",
            self._version,
            lsaBarrierCount=config.num_lsa_barriers,
            # Kernels are compiled with headers of the library's version, whichever version this code knows.
            useRuntimeVersion=True,
            **({} if gin is None else _gin_members(gin)),
        )
        # NCCL stores pointers in it; an array of bytes might lie anywhere.
        num_words = -(-communicator.properties.dev_comm_bytes // 8)
        self.data = (ctypes.c_uint64 * num_words)()
        communicator.call("ncclDevCommCreate", ctypes.byref(requirements), ctypes.byref(self.data), keep=self.data)
        self._is_closed = False
        communicator.adopt(self)

    @property
    def num_bytes(self) -> int:
        """`sizeof(ncclDevComm)`, a multiple of 8."""
        return ctypes.sizeof(self.data)

    @property
    def num_gin_contexts(self) -> int | None:
        """GIN contexts that NCCL gave; None where only kernels can tell, with an NCCL that is newer than this code."""
        return self._read("ginContextCount") if self.gin_type is not GinType.NONE else 0

    def _read(self, name: str) -> int | None:
        offset = dev_comm_fields(self._version).get(name)
        return None if offset is None else int(struct.unpack_from("=I", self.data, offset)[0])

    def close(self) -> None:
        """Let NCCL free what it holds for kernels, once this rank's device has done what it was given.

        Never waits for a peer, never raises, may be repeated. Collective: no.
        """
        if self._is_closed:
            return
        self._is_closed = True
        if not self._communicator.is_alive:
            return
        wait_for_device(self._communicator.device)
        try:
            self._communicator.call("ncclDevCommDestroy", ctypes.byref(self.data), keep=self.data)
        except Exception as error:
            logger.warning("a device communicator of %s was left behind: %s", self._communicator.where, error)

    def __del__(self) -> None:
        self.close()

    def __enter__(self) -> DeviceComm:
        return self

    def __exit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def __repr__(self) -> str:
        state = "closed" if self._is_closed else f"GIN {self.gin_type.name}"
        return f"DeviceComm({self.num_bytes} bytes, {state})"


def _available_gin(communicator: Communicator, connection: GinConnection) -> GinType:
    properties = communicator.properties
    found = properties.railed_gin_type if connection is GinConnection.RAIL else properties.gin_type
    if found is GinType.NONE:
        rails_only = connection is GinConnection.FULL and properties.railed_gin_type is not GinType.NONE
        raise TransportError(
            f"NCCL must offer GIN, since {communicator.where} reaches only {communicator.lsa.num_ranks} ranks by load "
            f"and store, but offers none{' but for rails' if rails_only else ''}; GIN needs RDMA network cards that "
            "NCCL supports, or a plugin (NCCL_RMA_PLUGIN); EP_DISABLE_GIN=1 does without",
            call="ncclCommQueryProperties",
        )
    return found


def _gin_members(gin: GinConfig) -> dict[str, int | bool]:
    override = get_env().override_rdma_sl
    traffic_class = gin.traffic_class if override is None else override
    return {
        "ginConnectionType": gin.connection.value,
        "ginContextCount": gin.num_contexts,
        "ginSignalCount": gin.num_signals,
        "ginCounterCount": gin.num_counters,
        "railGinBarrierCount": gin.num_rail_barriers,
        "worldGinBarrierCount": gin.num_world_barriers,
        "ginExclusiveContexts": gin.has_exclusive_contexts,
        "ginQueueDepth": gin.queue_depth,
        "ginTrafficClass": UNDEFINED_INT if traffic_class is None else traffic_class,
        "ginStrongSignalsRequired": gin.has_strong_signals,
        "ginVaSignalsRequired": gin.has_va_signals,
    }


def _agreed_fields(num_lsa_barriers: int, gin: GinConfig | None) -> Iterator[AgreedField]:
    yield AgreedField(name="num_lsa_barriers", value=num_lsa_barriers)
    yield AgreedField(name="use of GIN", value=int(gin is not None), show=lambda flag: "yes" if flag else "no")
    for name, value in ({} if gin is None else _gin_members(gin)).items():
        yield AgreedField(name=name, value=int(value))
