"""What the device backend needs is opened on all ranks or on none, and every rank learns which."""

from __future__ import annotations

import contextlib
from types import SimpleNamespace

import pytest

from deep_ep_core.backend_choice import OPEN_DEVICE, open_together
from deep_ep_core.errors import ConfigError, TransportError


class Group:
    """A transport of rank 0 that hears what it is made with from the other ranks."""

    rank, num_ranks = 0, 3

    def __init__(self, *others_ready):
        self.others_ready = [[int(is_ready)] for is_ready in others_ready]
        self.told = []

    def begin(self, name, fields, peer_values):
        assert (name, fields) == (OPEN_DEVICE, [])
        self.told.append(peer_values)
        return SimpleNamespace(peer_values=[peer_values[0], *self.others_ready])


def test_what_all_ranks_could_make_is_returned_open():
    group, closed = Group(True, True), []
    made = contextlib.ExitStack()
    made.callback(closed.append, "closed")
    assert open_together(group, lambda: made) is made
    assert group.told == [[[1]] * 3]
    assert closed == []


@pytest.mark.parametrize("words", [{}, {"must": "have taken their messages"}], ids=["as it is", "in other words"])
def test_what_another_rank_could_not_make_is_closed_and_that_rank_is_named(words):
    group, closed = Group(True, False), []
    made = contextlib.ExitStack()
    made.callback(closed.append, "closed")
    with pytest.raises(TransportError) as caught:
        open_together(group, lambda: made, **words)
    must = words.get("must", "open the device backend")
    assert f"all ranks must {must} (got a failure on rank 2, seen on rank 0)" in str(caught.value)
    assert closed == ["closed"]


def test_a_failure_is_told_to_the_others_before_it_is_raised():
    group, error = Group(True, True), ConfigError("x must be 1")

    def fail():
        raise error

    with pytest.raises(ConfigError) as caught:
        open_together(group, fail)
    assert caught.value is error
    assert group.told == [[[0]] * 3]


def test_any_failure_is_told():
    """Also one of torch, as of memory that is not there."""
    group = Group(True, True)
    with pytest.raises(MemoryError):
        open_together(group, lambda: bytearray(1 << 60))
    assert group.told == [[[0]] * 3]


@pytest.mark.parametrize("can_make", [True, False])
def test_where_the_others_are_not_heard_the_own_failure_comes_first(can_make):
    group, closed = Group(True, True), []
    group.begin = lambda *arguments: (_ for _ in ()).throw(TransportError("nobody is there"))
    made = contextlib.ExitStack()
    made.callback(closed.append, "closed")

    def make():
        if not can_make:
            raise ConfigError("x must be 1")
        return made

    with pytest.raises(TransportError if can_make else ConfigError):
        open_together(group, make)
    assert closed == ["closed"] * can_make
