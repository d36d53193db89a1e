"""Calls like one that passed the checks are known again; calls that differ in anything that was checked are not."""

from __future__ import annotations

from typing import Any

import ep_unit_kinds
import pytest
import torch

from deep_ep_ep.checks import BufferFacts
from deep_ep_ep.kinds import Kinds, dispatch_key

FACTS = BufferFacts(
    rank=0,
    num_ranks=2,
    buffer_id=1,
    num_max_tokens_per_rank=16,
    num_allocated_qps=9,
    device_num_sms=None,
    allow_multiple_reduction=True,
)


def key_of(num_tokens: int = 4, **changes: Any) -> Any:
    arguments: dict[str, Any] = {
        "x": torch.ones(num_tokens, 256, dtype=torch.bfloat16),
        "topk_idx": torch.zeros(num_tokens, 2, dtype=torch.int64),
        "topk_weights": torch.ones(num_tokens, 2),
        "recv_stats": None,
        "handle": None,
        "counts": (None, 8, None, 4, 0),
        "flags": (True, None, False, False, False),
        **changes,
    }
    return dispatch_key(FACTS, *arguments.values())


@pytest.mark.parametrize(
    "changes",
    [
        {"x": torch.ones(4, 264, dtype=torch.bfloat16)},
        {"x": torch.ones(4, 256, dtype=torch.float16)},
        {"x": torch.ones(256, 4, dtype=torch.bfloat16).t()},
        {"x": torch.ones(4 * 256 + 1, dtype=torch.bfloat16)[1:].view(4, 256)},
        {"x": torch.ones(4, 256, dtype=torch.bfloat16, device="meta")},
        {"x": (torch.ones(4, 256, dtype=torch.bfloat16), torch.ones(4, 8))},
        {"topk_idx": torch.zeros(4, 2, dtype=torch.int32)},
        {"topk_idx": torch.zeros(4, 3, dtype=torch.int64)},
        {"topk_idx": torch.zeros(3, 2, dtype=torch.int64)},
        {"topk_weights": None},
        {"topk_weights": torch.ones(4, 2, dtype=torch.float64)},
        {"topk_weights": torch.ones(2, 4).t()},
        {"recv_stats": torch.zeros(4, dtype=torch.int32)},
        {"counts": (None, 8, None, 4, 1)},
        {"counts": (None, 8, True, 4, 0)},
        {"counts": (None, 8, None, 4, False)},
        {"flags": (True, None, False, False, True)},
        {"flags": (True, False, False, False, False)},
    ],
    ids=lambda changes: next(iter(changes)),
)
def test_a_call_that_differs_in_what_is_checked_is_of_another_kind(changes):
    assert key_of() is not None
    assert key_of(**changes) != key_of()


def test_how_many_tokens_a_call_has_is_not_part_of_its_kind_but_the_most_is():
    """Else a program whose batches have all sizes would know none of its calls again."""
    assert key_of(0) == key_of(1) == key_of(16)
    assert key_of(17) != key_of(16)


@pytest.mark.parametrize(
    "changes",
    [
        # Equal to 4 and of the same hash, but no integer.
        {"counts": (None, 8, None, 4.0, 0)},
        {"counts": (None, 8, None, torch.tensor(4), 0)},
        {"flags": (torch.tensor(True), None, False, False, False)},
        {"x": [torch.ones(4, 256)]},
        {"x": (torch.ones(4, 256),)},
        {"x": torch.ones(256)},
        {"topk_idx": None},
        {"topk_idx": torch.zeros(8, dtype=torch.int64)},
        {"handle": "handle"},
        {"topk_weights": 1.0},
    ],
    ids=str,
)
def test_arguments_of_other_types_have_no_key(changes):
    assert key_of(**changes) is None


def test_a_call_without_a_key_is_never_known():
    kinds: Kinds[str] = Kinds()
    kinds.add(None, "kind")
    assert kinds.find(None) is None
    assert len(kinds) == 0


def test_the_oldest_of_too_many_kinds_is_forgotten():
    kinds: Kinds[int] = Kinds()
    for number in range(100):
        kinds.add((number,), number)
    assert len(kinds) == 64
    assert kinds.find((35,)) is None
    assert kinds.find((36,)) == 36
    assert kinds.find((99,)) == 99


def test_errors_are_the_same_where_valid_calls_much_like_the_bad_one_are_known(rank_pool):
    for told in rank_pool(2).run(ep_unit_kinds.errors_cold_and_warm):
        for name, (cold, warm) in told.items():
            assert cold != "accepted", name
            assert warm == cold, name


def test_a_buffer_knows_calls_of_one_kind_again_and_few_kinds_of_many(rank_pool):
    for numbers in rank_pool(2).run(ep_unit_kinds.numbers_of_known_kinds):
        assert numbers == (0, 1, 64)


def test_a_changed_argument_is_noticed(rank_pool):
    rank_pool(2).run(ep_unit_kinds.check_changed_arguments_are_noticed)
