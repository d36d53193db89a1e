"""The state machine of sessions, the layout of regions, and handles, in one process without a group."""

from __future__ import annotations

import pytest
import torch

from deep_ep_core.errors import ConfigError
from deep_ep_core.stream import EventHandle, EventOverlap
from deep_ep_cp import handle as handle_module
from deep_ep_cp import reduction as reduction_module
from deep_ep_cp.handle import SessionHandle
from deep_ep_cp.reduction import SUM_DTYPES, sum_in_rank_order
from deep_ep_cp.region import Region, bytes_of, session_bytes
from deep_ep_cp.session import MAX_CALLS_PER_SESSION, Session, SessionConfig

CPU = torch.device("cpu")


def make_session(*, max_session_bytes: int = 1024, max_calls: int = 4, num_ranks: int = 3) -> Session:
    session = Session(rank=1, num_ranks=num_ranks)
    session.config = SessionConfig(max_session_bytes=max_session_bytes, max_calls=max_calls)
    return session


def test_a_configuration_is_rounded_up():
    config = SessionConfig.checked(33, MAX_CALLS_PER_SESSION, num_bytes=64, rank=0)
    assert config == SessionConfig(max_session_bytes=64, max_calls=32)


@pytest.mark.parametrize("bad", [(0, 1), (65, 1), (True, 1), (32, 0), (32, 33), (32, "1"), (32, False)], ids=str)
def test_a_number_out_of_range_is_no_configuration(bad):
    with pytest.raises(ConfigError, match="must be an integer in"):
        SessionConfig.checked(*bad, num_bytes=64, rank=0)


def test_sessions_go_through_their_states():
    session = Session(rank=1, num_ranks=3)
    assert repr(session) == "not configured"
    with pytest.raises(ConfigError, match="before the first session"):
        session.create()
    session.config = SessionConfig(max_session_bytes=1024, max_calls=4)
    with pytest.raises(ConfigError, match="must be called in a session"):
        session.destroy()
    session.create()
    with pytest.raises(ConfigError, match="must be destroyed before"):
        session.create()
    with pytest.raises(ConfigError, match="outside of a session"):
        session.check_configurable()
    session.use(session.place("all_gather", [(5,)], [torch.float32]))
    assert repr(session) == "session 1: 1 of 4 calls, 64 of 1024 bytes"
    session.destroy()
    assert repr(session) == "1 sessions so far, none open"
    session.check_configurable()
    session.create()
    assert (session.idx, session.offset, session.num_calls) == (2, 0, 0)


def test_regions_stand_side_by_side_and_a_refusal_uses_nothing():
    session = make_session(max_session_bytes=160)
    session.create()
    # 3 ranks: 3 * 5 * 4 = 60 bytes, rounded up to 64; nothing; 3 bytes, rounded up to 32.
    regions = session.place("all_gather", [(5,), (0, 2), ()], [torch.float32, torch.int64, torch.uint8])
    assert [region.offset for region in regions] == [0, 64, 64]
    assert session.offset == session.num_calls == 0
    session.use(regions)
    assert (session.offset, session.num_calls) == (96, 1)
    # 64 bytes are left: 21 bytes from each of 3 ranks fit, 22 do not.
    with pytest.raises(ConfigError, match="96 bytes in use and 96 more"):
        session.place("all_gather", [(22,)], [torch.uint8])
    assert (session.offset, session.num_calls) == (96, 1)
    (last,) = session.place("all_gather", [(21,)], [torch.uint8])
    assert (last.offset, last.aligned_end) == (96, 160)


def test_calls_run_out_even_where_they_need_no_bytes():
    session = make_session(max_calls=2)
    session.create()
    for _ in range(2):
        session.use(session.place("all_gather", [(0,)], [torch.int8]))
    with pytest.raises(ConfigError, match="at most num_max_all_gathers_per_session = 2 calls"):
        session.place("reduce_scatter", [(0,)], [torch.int8])


def test_a_region_views_its_bytes_of_the_memory():
    memory = torch.arange(128, dtype=torch.uint8)
    region = Region(offset=32, num_ranks=3, shape=(2, 3), dtype=torch.int16)
    view, slots = region.view(memory), region.slots(memory)
    assert view.shape == (3, 2, 3)
    assert slots.shape == (3, 12)
    assert slots[2].tolist() == list(range(56, 68))
    view[2, 1, 2] = -1
    assert memory[66:68].tolist() == [255, 255]
    assert torch.equal(bytes_of(view, 3), slots)


def test_session_bytes_are_those_of_its_regions():
    assert session_bytes([(5,), (0,), ()], torch.float32, num_ranks=3) == 64 + 0 + 32
    assert session_bytes([], torch.float32, num_ranks=3) == 0


@pytest.mark.parametrize("dtype", SUM_DTYPES, ids=str)
def test_a_sum_has_the_dtype_of_its_addends_and_memory_of_its_own(dtype):
    addends = torch.arange(6).view(3, 2).to(dtype)
    total = sum_in_rank_order(addends)
    assert total.dtype == dtype
    assert torch.equal(total, torch.tensor([6, 9]).to(dtype))
    one = sum_in_rank_order(addends[:1])
    assert torch.equal(one, addends[0])
    assert one.data_ptr() != addends.data_ptr()


def test_a_sum_in_parts_is_the_same_sum(monkeypatch):
    addends = torch.randn(3, 5, 7, generator=torch.Generator().manual_seed(0)).bfloat16()
    whole = sum_in_rank_order(addends)
    for num_elements in (1, 4, 34, 35, 36):
        monkeypatch.setattr(reduction_module, "_PART_ELEMENTS", num_elements)
        assert torch.equal(sum_in_rank_order(addends), whole)
    assert torch.equal(whole, ((addends[0].float() + addends[1]) + addends[2]).bfloat16())


@pytest.mark.parametrize("shape", [(3,), (3, 0), (3, 2, 0), (1, 4)], ids=str)
def test_a_sum_of_any_shape_has_that_of_an_addend(shape):
    assert sum_in_rank_order(torch.ones(shape)).shape == shape[1:]


def test_a_handle_waits_while_its_session_is_open(monkeypatch):
    session = make_session()
    session.create()
    waits = []
    event = EventOverlap(EventHandle(CPU))
    monkeypatch.setattr(event, "current_stream_wait", lambda: waits.append(session.idx))
    handle = SessionHandle(event, session, CPU, rank=1, check=lambda: None)
    handle()
    handle()
    assert waits == [1, 1]
    session.destroy()
    with pytest.raises(ConfigError, match="handle of session 1 must be called while that session is open"):
        handle()
    session.create()
    with pytest.raises(ConfigError, match="handle of session 1 must"):
        handle()
    assert waits == [1, 1]


def test_a_handle_is_refused_on_another_stream(monkeypatch):
    session = make_session()
    session.create()
    monkeypatch.setattr(handle_module, "_current_stream", lambda device: "stream 1")
    handle = SessionHandle(EventOverlap(EventHandle(CPU)), session, CPU, rank=1, check=lambda: None)
    handle()
    monkeypatch.setattr(handle_module, "_current_stream", lambda device: "stream 2")
    with pytest.raises(ConfigError, match=r"on the stream of its call, stream 1 \(got stream 2, on rank 1\)"):
        handle()
