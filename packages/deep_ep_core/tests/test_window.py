from __future__ import annotations

import gc
import weakref
from datetime import timedelta

import nccl_fake
import pytest
import torch
import torch.distributed as dist
from nccl_fake import FakeNccl, HostMemory, open_fake

from deep_ep_core.errors import ConfigError, TransportError
from deep_ep_core.window import ControlLayout, ControlRegion, SymmetricMemory

FLAGS = ControlRegion(name="test.flags", num_bytes=100)
COUNTERS = ControlRegion(name="test.counters", num_bytes=64, alignment=256)


@pytest.fixture(scope="module", autouse=True)
def group():
    """A default group of this process alone."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1, timeout=timedelta(seconds=30))
    yield
    dist.destroy_process_group()


@pytest.fixture
def fake():
    return FakeNccl()


@pytest.fixture
def communicator(fake):
    with open_fake(fake) as opened:
        yield opened


def make(communicator, regions=(FLAGS, COUNTERS), heap_bytes=8192, **options) -> SymmetricMemory:
    return SymmetricMemory(communicator, regions=regions, heap_bytes=heap_bytes, **{"allocate": HostMemory} | options)


def test_regions_follow_each_other_each_aligned():
    layout = ControlLayout([FLAGS, COUNTERS, ControlRegion(name="test.one", num_bytes=1, alignment=1)])
    assert [layout.offset_of(name) for name in ("test.flags", "test.counters", "test.one")] == [0, 256, 320]
    assert layout.num_bytes_of("test.counters") == 64
    assert layout.num_bytes == 4096


def test_layouts_are_told_apart_by_order_size_and_name():
    digests = {
        ControlLayout(regions).digest
        for regions in (
            [FLAGS, COUNTERS],
            [COUNTERS, FLAGS],
            [FLAGS],
            [],
            [ControlRegion(name="test.flags", num_bytes=101), COUNTERS],
            [ControlRegion(name="test.flag", num_bytes=100), COUNTERS],
        )
    }
    assert len(digests) == 6
    assert ControlLayout([FLAGS, COUNTERS]).digest in digests
    assert all(0 <= digest < 2**63 for digest in digests)


def test_a_name_that_was_not_declared_or_twice_is_refused():
    with pytest.raises(ConfigError, match=r"must be declared \(got test.other; there are test.flags\)"):
        ControlLayout([FLAGS]).offset_of("test.other")
    with pytest.raises(ConfigError, match=r"must be unique \(got test.flags twice\)"):
        ControlLayout([FLAGS, FLAGS])


@pytest.mark.parametrize(("changes", "message"), [({"num_bytes": 0}, "at least 1"), ({"alignment": 3}, "power of two")])
def test_a_region_that_cannot_be_is_refused(changes, message):
    with pytest.raises(ConfigError, match=message):
        ControlRegion(**{"name": "test.flags", "num_bytes": 8} | changes)


def test_the_control_area_is_zero_and_the_heap_lies_behind_it(communicator):
    with make(communicator) as memory:
        assert memory.control("test.flags").shape == (100,)
        assert memory.control("test.counters", torch.int64).tolist() == [0] * 8
        assert memory.num_bytes == 4096 + 8192
        tensor = memory.heap.empty((4,), torch.float32)
        assert tensor.data_ptr() == memory.address + 4096
        assert memory.offset_of(tensor[1:]) == 4096 + 4
        assert memory.offset_of(torch.empty(1)) is None


def test_a_control_region_is_read_and_written_in_place(communicator):
    with make(communicator) as memory:
        memory.control("test.counters", torch.int64)[3] = 5
        assert memory.control("test.counters", torch.int64).tolist() == [0, 0, 0, 5, 0, 0, 0, 0]
        assert memory.control("test.flags").sum() == 0
        with pytest.raises(ConfigError, match="must hold whole elements"):
            memory.control("test.flags", torch.int64)


def test_the_whole_memory_is_registered_and_withdrawn_once(fake, communicator):
    memory = make(communicator)
    assert fake.windows == {memory.window.handle: memory.address}
    memory.close()
    memory.close()
    assert fake.count("ncclCommWindowDeregister") == 1
    assert "closed" in repr(memory)


def test_a_window_needs_neither_control_regions_nor_a_heap(communicator):
    with make(communicator, regions=(), heap_bytes=0) as memory:
        assert memory.num_bytes == 4096
        assert memory.heap.stats().num_bytes == 4096


def test_a_negative_heap_is_refused(communicator):
    with pytest.raises(ConfigError, match="heap_bytes must be at least 0"):
        make(communicator, heap_bytes=-1)


def test_memory_lives_until_the_last_tensor_after_closing(communicator):
    owners = []

    def allocate(num_bytes: int) -> HostMemory:
        memory = HostMemory(num_bytes)
        owners.append(weakref.ref(memory))
        return memory

    memory = make(communicator, allocate=allocate)
    tensor, flags = memory.heap.empty((4,), torch.float32).fill_(2), memory.control("test.flags")
    memory.close()
    with pytest.raises(ConfigError, match="it is closed"):
        memory.control("test.flags")
    del memory
    gc.collect()
    assert tensor.sum() == 8
    del tensor
    assert owners[0]() is not None
    assert flags.sum() == 0
    del flags
    gc.collect()
    assert owners[0]() is None


@pytest.mark.parametrize("first", ["communicator", "window", "memory"])
def test_things_may_be_closed_in_any_order(fake, first):
    communicator = open_fake(fake)
    memory = make(communicator)
    things = {"communicator": communicator, "window": memory.window, "memory": memory}
    things.pop(first).close()
    for thing in things.values():
        thing.close()
    assert fake.count("ncclCommWindowDeregister") == 1
    assert fake.count("ncclCommAbort") == 1
    assert fake.log.index("ncclCommWindowDeregister") < fake.log.index("ncclCommAbort")


def test_a_dropped_window_is_withdrawn(fake, communicator):
    memory = make(communicator)
    del memory
    gc.collect()
    assert fake.windows == {}


def test_a_failed_registration_leaves_no_memory_behind(fake, communicator):
    owners = []

    def allocate(num_bytes: int) -> HostMemory:
        memory = HostMemory(num_bytes)
        owners.append(weakref.ref(memory))
        return memory

    fake.can_register = False
    with pytest.raises(TransportError, match="must register memory"):
        make(communicator, allocate=allocate)
    gc.collect()
    assert owners[0]() is None


def test_peers_are_seen_where_nccl_maps_them_and_oneself_at_home(rank_pool):
    stride = nccl_fake.PEER_STRIDE
    seen = rank_pool(4).run(nccl_fake.open_window_on_ranks, [64] * 4, [True] * 4)
    assert seen[0][1:] == [2 * stride + 64, None, None]
    assert seen[3][:3] == [None, None, stride + 64]
    assert seen[3][3] % 4096 == 64


def test_ranks_that_declare_different_regions_are_all_told(rank_pool):
    errors = rank_pool(2).run(nccl_fake.open_window_on_ranks, [64, 65], [True] * 2)
    assert all("the same layout of the control area" in error for error in errors)


def test_a_rank_without_memory_is_named_on_the_others_at_once(rank_pool):
    errors = rank_pool(2).run(nccl_fake.open_window_on_ranks, [64] * 2, [True, False])
    assert "the same memory (got rank 0: found, rank 1: none" in errors[0]
    assert errors[1] == "rank 1 has no memory"


def test_where_no_rank_has_memory_each_says_so(rank_pool):
    errors = rank_pool(2).run(nccl_fake.open_window_on_ranks, [64] * 2, [False] * 2)
    assert errors == ["rank 0 has no memory", "rank 1 has no memory"]
