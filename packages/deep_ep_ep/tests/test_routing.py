"""Routing against an example that was worked by hand, and against loops that follow the definitions."""

from __future__ import annotations

import itertools
import math

import pytest
import torch

from deep_ep_ep.routing import last_of_each_group, layout_experts, local_expert_idx, route_tokens

# Two ranks, four experts (two a rank), top-3. The tokens of rank 0.
TOPK_IDX = torch.tensor([[0, 3, 1], [2, -1, 3], [-1, -1, -1]])


def test_worked_example_of_routes():
    routing = route_tokens(TOPK_IDX, num_ranks=2, num_local_experts=2)
    # Token 0 to rank 0; tokens 0 and 1 to rank 1.
    assert routing.num_send_rows.tolist() == [1, 2]
    assert routing.send_token_idx.tolist() == [0, 0, 1]
    assert routing.slot_idx.tolist() == [[0, 0, 0], [1, -1, 1], [-1, -1, -1]]
    assert routing.sent_row_idx.tolist() == [[0, 1, 0], [2, -1, 2], [-1, -1, -1]]
    # The last entry of each destination rank.
    assert routing.is_master.tolist() == [[False, True, True], [False, False, True], [False, False, False]]


def test_worked_example_of_local_experts():
    assert local_expert_idx(TOPK_IDX, rank=0, num_local_experts=2).tolist() == [[0, -1, 1], [-1, -1, -1], [-1, -1, -1]]
    assert local_expert_idx(TOPK_IDX, rank=1, num_local_experts=2).tolist() == [[-1, 1, -1], [0, -1, 1], [-1, -1, -1]]


def test_worked_example_of_the_expert_layout():
    """What rank 1 receives: expert 0 has one row, expert 1 two; aligned to 4, expert 1 starts at row 4."""
    layout = layout_experts(torch.tensor([[-1, 1, -1], [0, -1, 1]]), num_local_experts=2, expert_alignment=4)
    assert layout.num_rows.tolist() == [1, 2]
    assert layout.num_aligned_rows.tolist() == [4, 4]
    assert layout.start_idx.tolist() == [0, 4]
    assert layout.row_idx.tolist() == [[-1, 4, -1], [0, -1, 5]]


def test_worked_example_of_an_expert_without_rows():
    """3, 0 and 5 rows, aligned to 4: segments of 4, 0 and 8 rows, real rows ending at 3, 4 and 9."""
    local_idx = torch.tensor([[0, 2], [0, 2], [2, -1], [0, 2], [-1, 2]])
    layout = layout_experts(local_idx, num_local_experts=3, expert_alignment=4)
    assert layout.num_rows.tolist() == [3, 0, 5]
    assert layout.num_aligned_rows.tolist() == [4, 0, 8]
    assert layout.start_idx.tolist() == [0, 4, 4]
    assert (layout.start_idx + layout.num_rows).tolist() == [3, 4, 9]
    assert layout.row_idx.tolist() == [[0, 4], [1, 5], [6, -1], [2, 7], [-1, 8]]


def random_topk_idx(num_tokens: int, num_experts: int, num_topk: int, kind: str, seed: int) -> torch.Tensor:
    """Distinct experts a token, some of them masked; `kind` says which."""
    generator = torch.Generator().manual_seed(seed)
    topk_idx = torch.rand(num_tokens, num_experts, generator=generator).argsort(1)[:, :num_topk]
    share = {"some": 0.3, "all": 1.0, "no": 0.0}[kind]
    # Any negative number means "none".
    none = torch.randint(-5, 0, topk_idx.shape, generator=generator)
    return torch.where(torch.rand(topk_idx.shape, generator=generator) < share, none, topk_idx)


CASES = [
    pytest.param(num_tokens, num_ranks, num_local, num_topk, kind, dtype, id=f"{kind}-{str(dtype)[6:]}-{shape}")
    for (shape, num_tokens, num_ranks, num_local, num_topk), kind, dtype in itertools.product(
        [
            ("0 tokens", 0, 4, 4, 3),
            ("1 rank", 9, 1, 6, 4),
            ("1 expert a rank", 33, 4, 1, 2),
            ("top-1", 31, 4, 4, 1),
            ("3 ranks", 17, 3, 5, 8),
            ("all experts", 12, 2, 4, 8),
        ],
        ["some", "all", "no"],
        [torch.int64, torch.int32],
    )
]


@pytest.mark.parametrize(("num_tokens", "num_ranks", "num_local", "num_topk", "kind", "dtype"), CASES)
def test_routes_follow_their_definition(num_tokens, num_ranks, num_local, num_topk, kind, dtype):
    topk_idx = random_topk_idx(num_tokens, num_ranks * num_local, num_topk, kind, seed=num_tokens)
    routing = route_tokens(topk_idx.to(dtype), num_ranks=num_ranks, num_local_experts=num_local)

    tokens_of = [
        [
            token
            for token, experts in enumerate(topk_idx.tolist())
            if any(e >= 0 and e // num_local == rank for e in experts)
        ]
        for rank in range(num_ranks)
    ]
    assert routing.send_token_idx.tolist() == [token for tokens in tokens_of for token in tokens]
    assert routing.num_send_rows.tolist() == [len(tokens) for tokens in tokens_of]
    for token, experts in enumerate(topk_idx.tolist()):
        for k, expert in enumerate(experts):
            got = (routing.slot_idx[token, k], routing.sent_row_idx[token, k], routing.is_master[token, k])
            if expert < 0:
                assert got == (-1, -1, False)
                continue
            rank = expert // num_local
            slot = tokens_of[rank].index(token)
            rows_before = sum(len(tokens) for tokens in tokens_of[:rank])
            is_last = all(later < 0 or later // num_local != rank for later in experts[k + 1 :])
            assert got == (slot, rows_before + slot, is_last)


@pytest.mark.parametrize(("num_tokens", "num_ranks", "num_local", "num_topk", "kind", "dtype"), CASES)
def test_local_experts_follow_their_definition(num_tokens, num_ranks, num_local, num_topk, kind, dtype):
    topk_idx = random_topk_idx(num_tokens, num_ranks * num_local, num_topk, kind, seed=num_tokens + 1)
    for rank in range(num_ranks):
        got = local_expert_idx(topk_idx.to(dtype), rank=rank, num_local_experts=num_local)
        assert got.dtype == dtype
        is_local = [[e >= 0 and e // num_local == rank for e in experts] for experts in topk_idx.tolist()]
        expected = [
            [expert % num_local if here else -1 for expert, here in zip(experts, mask, strict=True)]
            for experts, mask in zip(topk_idx.tolist(), is_local, strict=True)
        ]
        assert got.tolist() == expected


@pytest.mark.parametrize("expert_alignment", [1, 4, 7])
@pytest.mark.parametrize(("num_tokens", "num_ranks", "num_local", "num_topk", "kind", "dtype"), CASES)
def test_the_expert_layout_follows_its_definition(
    num_tokens, num_ranks, num_local, num_topk, kind, dtype, expert_alignment
):
    """Rows by expert, each expert's from a multiple of the alignment, and inside it in the received order."""
    topk_idx = random_topk_idx(num_tokens, num_ranks * num_local, num_topk, kind, seed=num_tokens + 2)
    local_idx = torch.where(topk_idx < num_local, topk_idx.clamp(min=-1), -1).to(dtype)
    layout = layout_experts(local_idx, num_local_experts=num_local, expert_alignment=expert_alignment)

    next_start = 0
    expected = torch.full(local_idx.shape, -1)
    for expert in range(num_local):
        entries = [
            (row, k) for row, k in itertools.product(range(num_tokens), range(num_topk)) if local_idx[row, k] == expert
        ]
        assert layout.num_rows[expert] == len(entries)
        assert layout.start_idx[expert] == next_start
        for place, entry in enumerate(entries):
            expected[entry] = next_start + place
        num_aligned = math.ceil(len(entries) / expert_alignment) * expert_alignment
        assert layout.num_aligned_rows[expert] == num_aligned
        next_start += num_aligned
    assert torch.equal(layout.row_idx, expected)


@pytest.mark.parametrize("num_topk", [1, 2, 5, 32])
def test_last_of_each_group_follows_its_definition(num_topk):
    group_idx = torch.randint(-2, 4, (50, num_topk), generator=torch.Generator().manual_seed(num_topk))
    expected = [[value >= 0 and value not in row[k + 1 :] for k, value in enumerate(row)] for row in group_idx.tolist()]
    before = group_idx.clone()
    assert last_of_each_group(group_idx).tolist() == expected
    assert torch.equal(group_idx, before)


def test_no_result_is_a_view_of_another():
    """Operators return these tensors: each must begin at the start of a memory of its own."""
    routing = route_tokens(TOPK_IDX, num_ranks=2, num_local_experts=2)
    tensors = [routing.send_token_idx, routing.num_send_rows, routing.slot_idx, routing.sent_row_idx, routing.is_master]
    for tensor in tensors:
        assert tensor.is_contiguous()
        assert tensor.untyped_storage().nbytes() == tensor.numel() * tensor.element_size()
    assert len({tensor.untyped_storage().data_ptr() for tensor in tensors}) == len(tensors)
