"""Which bytes the device backend copies where, and how ranks meet, in one process without a GPU."""

from __future__ import annotations

import contextlib

import pytest
import torch

from deep_ep_core.errors import CommTimeoutError, RankMismatchError, TransportError
from deep_ep_cp import ContextBuffer
from deep_ep_cp.backend import SessionCall
from deep_ep_cp.region import Region
from deep_ep_cp.session import Session, SessionConfig


def make_call(tensors, num_ranks, *, shapes=None, offset=32, is_in_place=None, session_idx=1):
    regions = []
    for tensor, shape in zip(tensors, shapes or [tensor.shape for tensor in tensors], strict=True):
        regions.append(Region(offset=offset, num_ranks=num_ranks, shape=tuple(shape), dtype=tensor.dtype))
        offset = regions[-1].aligned_end
    return SessionCall(
        session_idx=session_idx,
        call_idx=0,
        tensors=tensors,
        regions=regions,
        is_in_place=is_in_place or [False] * len(tensors),
    )


@pytest.mark.parametrize("num_ranks", [1, 2, 3, 5])
def test_gathered_tensors_lie_in_the_slots_of_their_ranks(make_ranks, num_ranks):
    backends = make_ranks(num_ranks)
    tensors = [[torch.arange(5) + 100 * rank, torch.empty(0), torch.tensor(rank).half()] for rank in range(num_ranks)]
    calls = [make_call(own, num_ranks) for own in tensors]
    for backend, call in zip(backends, calls, strict=True):
        backend.all_gather(call)
    for backend in backends:
        for idx, region in enumerate(calls[0].regions):
            expected = torch.stack([own[idx] for own in tensors])
            assert torch.equal(region.view(backend.memory), expected)
        assert bool((backend.memory[:32] == 0).all()), "bytes in front of the regions were touched"
        assert bool((backend.memory[calls[0].regions[-1].aligned_end :] == 0).all())


def test_an_in_place_tensor_is_not_copied_on_its_own_rank(make_ranks):
    backends = make_ranks(3)
    region = make_call([torch.zeros(4)], 3).regions[0]
    for rank, backend in enumerate(backends):
        slot = region.view(backend.memory)[rank]
        slot.fill_(rank + 1)
        backend.all_gather(make_call([slot], 3, is_in_place=[True]))
    for backend in backends:
        assert region.view(backend.memory)[:, 0].tolist() == [1, 2, 3]


@pytest.mark.parametrize("num_ranks", [1, 2, 3, 5])
def test_addends_go_to_their_ranks_and_are_summed_in_rank_order(make_ranks, num_ranks):
    backends = make_ranks(num_ranks)
    addends = [torch.randn(num_ranks, 3, 2, dtype=torch.float32) for _ in range(num_ranks)]
    sums = {}
    # Every rank's addends must be there before one sums, which on a GPU the stream waits for.
    for _ in range(2):
        for rank, backend in enumerate(backends):
            (sums[rank],) = backend.reduce_scatter(make_call([addends[rank]], num_ranks, shapes=[(3, 2)]))
    for rank in range(num_ranks):
        expected = torch.zeros(3, 2)
        for source in range(num_ranks):
            expected = expected + addends[source][rank]
        assert torch.equal(sums[rank], expected)


def test_a_rank_waits_for_all_others_and_none_for_longer_than_it_must(make_ranks):
    backends = make_ranks(3)
    x = torch.zeros(2)
    for round_idx in range(1, 6):
        for count, backend in enumerate(backends):
            backend.all_gather(make_call([x], 3, session_idx=round_idx))
            signals = backend._signals
            assert {word.peer for word in signals.awaited} == {0, 1, 2} - {count}
            assert {word.least for word in signals.awaited} == {round_idx}
            assert signals.phase == f"all_gather in session {round_idx}"
            assert signals.has_come() == (count == 2)
        assert all(backend._signals.has_come() for backend in backends)


def test_ranks_that_agree_are_not_asked(make_ranks):
    first, last = make_ranks(2)
    for session_idx in range(1, 8):
        # The last one finds the first one's digest; the first one would find none yet, so only the last one looks.
        for backend in (first, last):
            backend.all_gather(make_call([torch.zeros(3)], 2, session_idx=session_idx))
        last.check()
    assert last._transport.opened == []


@pytest.mark.parametrize(
    "other",
    [
        {"session_idx": 2},
        {"tensors": [torch.zeros(3).int()]},
        {"tensors": [torch.zeros(3), torch.zeros(3)]},
        # As where a call has failed on one rank behind the meeting.
        {"offset": 64},
    ],
)
def test_ranks_that_came_with_other_calls_are_asked_and_told_the_field(make_ranks, other):
    first, last = make_ranks(2)
    last._transport.error = RankMismatchError("the transport's words", field="session", values=["one", "two"])
    first.all_gather(make_call([torch.zeros(3)], 2))
    last.all_gather(make_call(**{"tensors": [torch.zeros(3)], "num_ranks": 2, **other}))
    for _ in range(2):
        with pytest.raises(
            RankMismatchError, match=r"the same session \(got rank 0: one, rank 1: two; seen in all_"
        ) as e:
            last.check()
        assert (e.value.field, e.value.values) == ("session", ("one", "two"))
    assert last._signals.is_abandoned, "a stream must not wait for meetings that may never be complete"
    # Once, and with the fields of the collective backend.
    ((operation, fields),) = last._transport.opened
    assert operation == "all_gather"
    assert fields[:2] == ["session", "number of tensors"]


def test_another_operation_is_another_call(make_ranks):
    first, last = make_ranks(2)
    last._transport.error = RankMismatchError("words", field="operation", values=["a", "b"])
    first.reduce_scatter(make_call([torch.zeros(2, 3)], 2, shapes=[(3,)]))
    last.all_gather(make_call([torch.zeros(3)], 2))
    with pytest.raises(RankMismatchError, match="the same operation"):
        last.check()


def test_a_digest_that_has_not_come_is_no_disagreement(make_ranks):
    """After a wait that expired the stream went on; what lies there is of an older meeting, or of none."""
    first, _ = make_ranks(2)
    first.all_gather(make_call([torch.zeros(3)], 2))
    first._signals.error = CommTimeoutError("late", phase="all_gather", rank=0, peers=[1])
    with pytest.raises(CommTimeoutError, match="late"):
        first.check()
    assert first._transport.opened == []


def test_a_rank_that_was_given_up_is_told_so(make_ranks):
    """Its peer is at a later meeting, which takes this rank's absence, and does not answer."""
    first, last = make_ranks(2)
    last._transport.error = CommTimeoutError("nobody answers", phase="all_gather", rank=1, peers=[0])
    for _ in range(3):
        first.all_gather(make_call([torch.zeros(3)], 2))
    last.all_gather(make_call([torch.zeros(3)], 2))
    for _ in range(2):
        with pytest.raises(
            CommTimeoutError, match="rank 1 must come within the timeout of its peers, but rank 0 gave"
        ) as e:
            last.check()
        assert (e.value.phase, list(e.value.peers)) == ("all_gather in session 1", [0])
    assert len(last._transport.opened) == 1


def test_what_stops_the_question_is_told_from_then_on(make_ranks):
    first, last = make_ranks(2)
    last._transport.error = TransportError("the group is gone")
    first.all_gather(make_call([torch.zeros(3)], 2))
    last.all_gather(make_call([torch.zeros(4)], 2))
    for _ in range(2):
        with pytest.raises(TransportError, match="the group is gone"):
            last.check()
    assert len(last._transport.opened) == 1


def test_a_configuration_is_compared_on_the_host(make_ranks):
    (backend,) = make_ranks(1)
    backend.set_config(SessionConfig(max_session_bytes=64, max_calls=2))
    assert backend._transport.opened == [
        ("agrs_set_config", ["num_max_session_bytes", "num_max_all_gathers_per_session"])
    ]


def test_leaving_by_an_error_waits_for_no_peer(make_ranks):
    """`ContextBuffer` abandons in front of closing; otherwise it only closes."""
    for error, is_abandoned in ((None, False), (KeyError("what went wrong"), True)):
        (backend,) = make_ranks(1)
        buffer = object.__new__(ContextBuffer)
        buffer._backend, buffer._session = backend, Session(rank=0, num_ranks=1)
        with contextlib.suppress(KeyError), buffer:
            if error is not None:
                raise error
        assert backend._signals.is_abandoned == is_abandoned
