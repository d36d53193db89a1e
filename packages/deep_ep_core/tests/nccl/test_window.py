from __future__ import annotations

import ctypes
import dataclasses
import logging
from datetime import timedelta

import pytest
import torch.distributed as dist
from nccl_fake import COMM, CPU, PEER_STRIDE, FakeNccl, open_fake

from deep_ep_core.env import reset_env
from deep_ep_core.errors import ConfigError, TransportError
from deep_ep_core.nccl import (
    Communicator,
    DeviceComm,
    DeviceCommConfig,
    GinConfig,
    GinConnection,
    GinType,
    Window,
    WindowFlags,
)
from deep_ep_core.nccl.structs import UNDEFINED_INT

ADDRESS = 0x7000_0000_0000


@pytest.fixture(scope="module", autouse=True)
def group():
    """A default group of this process alone."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1, timeout=timedelta(seconds=30))
    yield
    dist.destroy_process_group()


class Ranks:
    """The place of a rank, in the stead of a transport; keeps what ranks would have agreed on."""

    timeout_s = 30.0

    def __init__(self, rank: int, num_ranks: int) -> None:
        self.rank, self.num_ranks = rank, num_ranks
        self.agreed: list[dict[str, int]] = []

    def begin(self, operation, fields):
        self.agreed.append({field.name: field.value for field in fields})


def open_as(fake: FakeNccl) -> Communicator:
    ranks = Ranks(fake.rank, fake.num_ranks)
    return Communicator(fake.library(), COMM, transport=ranks, device=CPU, is_owned=True)


def rail_config(**changes) -> DeviceCommConfig:
    gin = GinConfig(connection=GinConnection.RAIL, num_contexts=8, num_signals=5)
    return DeviceCommConfig(num_lsa_barriers=4, gin=dataclasses.replace(gin, **changes))


def test_a_window_is_registered_with_strict_ordering_and_deregistered_once():
    fake = FakeNccl()
    with open_fake(fake) as opened, Window(opened, ADDRESS, 8192) as window:
        assert fake.windows == {window.handle: ADDRESS}
        window.close()
        window.close()
        assert fake.windows == {}
        with pytest.raises(TransportError, match="window of rank 0 of 1 is closed"):
            _ = window.handle
    assert fake.count("ncclCommWindowDeregister") == 1


def test_ranks_agree_on_size_and_flags_before_registering():
    fake = FakeNccl(num_ranks=2)
    opened = open_as(fake)
    Window(opened, ADDRESS, 8192, WindowFlags.DEFAULT)
    assert opened._transport.agreed == [{"window size": 8192, "window flags": 0}]


def test_success_without_a_window_is_an_error():
    """That is how NCCL answers where memory cannot be shared."""
    fake = FakeNccl()
    fake.can_register = False
    with open_fake(fake) as opened, pytest.raises(TransportError, match="must register memory of 8192 bytes"):
        Window(opened, ADDRESS, 8192)


def test_addresses_of_peers_are_those_of_nccl():
    fake = FakeNccl(num_ranks=4, rank=2, lsa_size=2)
    with open_as(fake) as opened, Window(opened, ADDRESS, 8192) as window:
        assert [window.lsa_address(place, 16) for place in range(2)] == [PEER_STRIDE + 16, 2 * PEER_STRIDE + 16]
        assert [window.peer_address(rank) for rank in range(4)] == [None, None, PEER_STRIDE, 2 * PEER_STRIDE]
        with pytest.raises(TransportError, match="ncclGetLsaDevicePointer failed on rank 2 of 4: ncclInvalidArgument"):
            window.lsa_address(2)


def test_a_communicator_closes_its_windows_and_device_communicators_first():
    fake = FakeNccl()
    opened = open_fake(fake)
    window, device_comm = Window(opened, ADDRESS, 8192), DeviceComm(opened, DeviceCommConfig())
    opened.close()
    assert fake.log.index("ncclCommWindowDeregister") < fake.log.index("ncclCommAbort")
    assert fake.log.index("ncclDevCommDestroy") < fake.log.index("ncclCommAbort")
    assert fake.log[-1] == "ncclCommAbort"
    window.close()
    device_comm.close()
    assert fake.log[-1] == "ncclCommAbort"


def test_a_dropped_window_is_deregistered():
    fake = FakeNccl()
    with open_fake(fake) as opened:
        Window(opened, ADDRESS, 8192)
        assert fake.windows == {}


def test_closing_a_window_does_not_raise_when_nccl_fails(caplog):
    fake = FakeNccl()
    with open_fake(fake) as opened:
        window = Window(opened, ADDRESS, 8192)
        fake.failures["ncclCommWindowDeregister"] = 3
        with caplog.at_level(logging.WARNING):
            window.close()
        assert "a window of rank 0 of 1 was left behind" in caplog.text


def test_a_registration_that_is_not_done_in_time_keeps_what_nccl_may_write_to():
    fake = FakeNccl()
    with open_as(fake) as opened:
        opened._transport.timeout_s = 0.1
        fake.num_polls_in_progress = 10**9
        with pytest.raises(TransportError, match="ncclCommWindowRegister must be done within"):
            Window(opened, ADDRESS, 8192)
        assert [type(kept) for kept in opened._pinned] == [ctypes.c_void_p]
        fake.num_polls_in_progress = 0


@pytest.mark.parametrize(("version", "num_bytes"), [(23007, 240), (23203, 248)])
def test_a_device_communicator_is_as_large_as_its_version_has_it(version, num_bytes):
    fake = FakeNccl(version)
    with open_fake(fake) as opened, DeviceComm(opened, DeviceCommConfig(num_lsa_barriers=4)) as device_comm:
        assert device_comm.num_bytes == len(bytes(device_comm.data)) == num_bytes
        assert fake.requirements.lsaBarrierCount == 4
        assert fake.requirements.ginConnectionType == 0
        assert getattr(fake.requirements, "useRuntimeVersion", None) == (None if version == 23007 else True)


def test_gin_is_not_asked_for_where_every_rank_is_reached_by_load_and_store():
    fake = FakeNccl(num_ranks=4)
    fake.gin_type = fake.railed_gin_type = 3
    with open_as(fake) as opened, DeviceComm(opened, rail_config()) as device_comm:
        assert device_comm.gin_type is GinType.NONE
        assert device_comm.num_gin_contexts == 0
        assert fake.requirements.ginConnectionType == 0
        assert fake.requirements.ginSignalCount == 0


@pytest.mark.parametrize("version", [23007, 23203])
def test_gin_is_asked_for_where_some_rank_is_not(version):
    fake = FakeNccl(version, num_ranks=4, lsa_size=2)
    fake.railed_gin_type = 2
    config = rail_config(has_va_signals=False, has_exclusive_contexts=True, queue_depth=1024)
    with open_as(fake) as opened, DeviceComm(opened, config) as device_comm:
        assert device_comm.gin_type is GinType.PROXY
        asked = fake.requirements
        assert (asked.ginConnectionType, asked.ginContextCount, asked.ginSignalCount) == (2, 8, 5)
        assert (asked.ginStrongSignalsRequired, asked.ginVaSignalsRequired) == (True, False)
        assert (asked.ginExclusiveContexts, asked.ginQueueDepth) == (True, 1024)
        assert asked.ginTrafficClass == UNDEFINED_INT
        assert device_comm.num_gin_contexts == 16


def test_contexts_are_for_kernels_to_count_where_nccl_is_newer_than_this_code():
    fake = FakeNccl(23900, num_ranks=4, lsa_size=2)
    fake.railed_gin_type = 2
    with open_as(fake) as opened, DeviceComm(opened, rail_config()) as device_comm:
        assert fake.requirements.version == 23203
        assert device_comm.num_gin_contexts is None


def test_gin_can_be_switched_off(monkeypatch, fresh_env):
    monkeypatch.setenv("EP_DISABLE_GIN", "1")
    fake = FakeNccl(num_ranks=4, lsa_size=2)
    fake.railed_gin_type = 2
    with open_as(fake) as opened, DeviceComm(opened, rail_config()) as device_comm:
        assert device_comm.gin_type is GinType.NONE
        assert fake.requirements.ginConnectionType == 0


def test_missing_gin_is_named_with_what_to_do():
    message = "reaches only 2 ranks by load and store, but offers none; GIN needs"
    with open_as(FakeNccl(num_ranks=4, lsa_size=2)) as opened, pytest.raises(TransportError, match=message):
        DeviceComm(opened, rail_config())


def test_gin_for_rails_only_is_named_where_all_ranks_are_to_be_connected():
    fake = FakeNccl(num_ranks=4, lsa_size=2)
    fake.railed_gin_type = 2
    with open_as(fake) as opened, pytest.raises(TransportError, match="offers none but for rails"):
        DeviceComm(opened, rail_config(connection=GinConnection.FULL))


def test_the_service_level_of_the_environment_wins(monkeypatch, fresh_env):
    fake = FakeNccl(num_ranks=4, lsa_size=2)
    fake.railed_gin_type = 2
    with open_as(fake) as opened:
        DeviceComm(opened, rail_config(traffic_class=3))
        assert fake.requirements.ginTrafficClass == 3
        monkeypatch.setenv("EP_OVERRIDE_RDMA_SL", "5")
        reset_env()
        DeviceComm(opened, rail_config(traffic_class=3))
        assert fake.requirements.ginTrafficClass == 5


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_contexts": 0}, "num_contexts of a GinConfig must be at least 1"),
        ({"num_signals": -1}, "num_signals of a GinConfig must be at least 0"),
        ({"traffic_class": -1}, "traffic_class of a GinConfig must be at least 0"),
        ({"num_world_barriers": 1}, "num_world_barriers must be 0 where GIN connects rails only"),
    ],
)
def test_a_configuration_that_cannot_be_is_refused(changes, message):
    with pytest.raises(ConfigError, match=message):
        rail_config(**changes)


def test_a_negative_number_of_barriers_is_refused():
    with pytest.raises(ConfigError, match="num_lsa_barriers"):
        DeviceCommConfig(num_lsa_barriers=-1)
