"""The judge itself, held to examples that were worked by hand, and to sums whose result depends on their order."""

from __future__ import annotations

import pytest
import torch

from deep_ep_ep.reference import Received, Sent, combine, combine_weights, dispatch

# 2^24 and 1 add up to 2^24 in float32: what is added later is lost.
LARGE = 2.0**24

# Two ranks, four experts (two a rank), top-3, M = 4. Rank 0 has three tokens, rank 1 has none.
NUM_EXPERTS = 4
TOPK_IDX = torch.tensor([[0, 3, 1], [2, -1, 3], [-1, -1, -1]])


def sent_by_both(hidden: int = 1) -> list[Sent]:
    return [
        Sent(x=torch.zeros(3, hidden), topk_idx=TOPK_IDX),
        Sent(x=torch.zeros(0, hidden), topk_idx=torch.zeros(0, 3, dtype=torch.int64)),
    ]


def received_by_both(expert_alignment: int = 4) -> list[Received]:
    return dispatch(sent_by_both(), num_experts=NUM_EXPERTS, expert_alignment=expert_alignment)


def column(*values: float, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """Rows of one element."""
    return torch.tensor(values, dtype=dtype).unsqueeze(1)


def test_a_token_arrives_once_on_each_rank_that_hosts_one_of_its_experts():
    received = received_by_both()
    assert received[0].source == [(0, 0)]
    assert received[1].source == [(0, 0), (0, 1)]


def test_each_row_knows_its_local_experts_by_topk_position():
    received = received_by_both()
    assert received[0].local_experts == [{0: 0, 2: 1}]
    assert received[1].local_experts == [{1: 1}, {0: 0, 2: 1}]


def test_expert_rows_are_ordered_by_token_and_start_at_the_alignment():
    received = received_by_both()
    assert received[0].expert_rows == [[(0, 0)], [(0, 2)]]
    assert received[1].expert_rows == [[(1, 0)], [(0, 1), (1, 2)]]
    for rank in range(2):
        assert received[rank].num_aligned == [4, 4]
        assert received[rank].expert_starts == [0, 4]


def test_each_entry_has_its_expert_major_row():
    received = received_by_both()
    assert [received[0].expanded_row(0, k) for k in (0, 2)] == [0, 4]
    assert [received[1].expanded_row(*entry) for entry in [(0, 1), (1, 0), (1, 2)]] == [4, 0, 5]


def test_an_alignment_of_one_leaves_no_gaps():
    received = received_by_both(expert_alignment=1)
    assert [each.num_aligned for each in received] == [[1, 1], [1, 2]]
    assert [each.expert_starts for each in received] == [[0, 1], [0, 1]]
    assert [received[1].expanded_row(*entry) for entry in [(0, 1), (1, 0), (1, 2)]] == [1, 0, 2]


def test_rows_of_several_sources_are_ordered_by_source_then_token():
    topk_idx = [torch.tensor([[3], [1], [3]]), torch.tensor([[0], [2]])]
    sent = [Sent(x=torch.zeros(len(idx), 1), topk_idx=idx) for idx in topk_idx]
    received = dispatch(sent, num_experts=4)
    assert received[0].source == [(0, 1), (1, 0)]
    assert received[1].source == [(0, 0), (0, 2), (1, 1)]
    assert received[1].expert_rows == [[(2, 0)], [(0, 0), (1, 0)]]


def test_an_expert_without_tokens_has_no_rows_at_all():
    """Three experts of one rank with 3, 0 and 5 tokens, aligned to 4: segments of 4, 0 and 8 rows."""
    topk_idx = torch.tensor([[0, 2], [0, 2], [2, -1], [0, 2], [-1, 2]])
    (received,) = dispatch([Sent(x=torch.zeros(5, 1), topk_idx=topk_idx)], num_experts=3, expert_alignment=4)
    assert [len(rows) for rows in received.expert_rows] == [3, 0, 5]
    assert received.num_aligned == [4, 0, 8]
    assert received.expert_starts == [0, 4, 4]
    ends = [start + len(rows) for start, rows in zip(received.expert_starts, received.expert_rows, strict=True)]
    assert ends == [3, 4, 9]
    assert [received.expanded_row(row, 0) for row in (0, 1, 3)] == [0, 1, 2]
    assert [received.expanded_row(row, k) for row, k in enumerate([1, 1, 0, 1, 1])] == [4, 5, 6, 7, 8]


def test_token_major_weights_come_from_the_rank_of_each_expert():
    weights = [torch.tensor([[1.0, 2.0, 3.0]]), torch.tensor([[10.0, 20.0, 30.0], [40.0, 50.0, 60.0]])]
    got = combine_weights(0, TOPK_IDX, weights, received_by_both(), num_experts=NUM_EXPERTS, is_expanded=False)
    assert got.tolist() == [[1, 20, 3], [40, 0, 60], [0, 0, 0]]


def test_expert_major_weights_come_from_the_row_of_each_entry():
    weights = [torch.arange(8.0) + 100, torch.arange(8.0) + 200]
    got = combine_weights(0, TOPK_IDX, weights, received_by_both(), num_experts=NUM_EXPERTS, is_expanded=True)
    assert got.tolist() == [[100, 204, 104], [200, 0, 205], [0, 0, 0]]


def combined_token_0(
    outputs: list[torch.Tensor], *, is_expanded: bool, multi: bool = True, bias: float | None = None
) -> float:
    """The combined value of rank 0's token 0, which stands on rank 0 (k = 0, 2) and on rank 1 (k = 1)."""
    biases = [] if bias is None else [torch.full((3, 1), bias, dtype=outputs[0].dtype)]
    combined = combine(
        0,
        TOPK_IDX,
        outputs,
        received_by_both(),
        num_experts=NUM_EXPERTS,
        is_expanded=is_expanded,
        allow_multiple_reduction=multi,
        biases=biases,
    )
    return combined[0, 0].item()


def expert_major(k0: float, k1: float, k2: float, dtype: torch.dtype = torch.float32) -> list[torch.Tensor]:
    """The outputs of both ranks, token 0's three expert rows among rows of NaN."""
    outputs = [torch.full((8, 1), float("nan"), dtype=dtype) for _ in range(2)]
    outputs[0][0], outputs[1][4], outputs[0][4] = k0, k1, k2
    # Token 1, not looked at, on rank 1.
    outputs[1][0] = outputs[1][5] = 1.0
    return outputs


def test_token_major_adds_rank_1_then_rank_0():
    """Ranks count at the last of their top-k positions: rank 1 at k = 1, rank 0 at k = 2."""
    # (1 + 2^24) - 2^24 = 0; the other way round it would be 1.
    assert combined_token_0([column(-LARGE), column(LARGE, 5)], is_expanded=False, bias=1.0) == 0.0
    assert combined_token_0([column(LARGE), column(-LARGE, 5)], is_expanded=False, bias=1.0) == 1.0


def test_expert_major_with_one_rounding_adds_in_ascending_topk_position():
    # (1 + 2^24) - 2^24
    assert combined_token_0(expert_major(1.0, LARGE, -LARGE), is_expanded=True, multi=False) == 0.0
    # (2^24 - 2^24) + 1
    assert combined_token_0(expert_major(LARGE, -LARGE, 1.0), is_expanded=True, multi=False) == 1.0


def test_expert_major_with_partial_sums_adds_each_rank_first():
    # Rank 1: 2^24. Rank 0: 1 - 2^24, exact. Their sum is 1, where one sum in order would give 0.
    assert combined_token_0(expert_major(1.0, LARGE, -LARGE), is_expanded=True) == 1.0


def test_partial_sums_are_rounded_where_they_are_made():
    """256 + 1 is a tie in bfloat16 and becomes 256 on rank 0; with one rounding the 1 survives."""
    outputs = expert_major(256.0, -256.0, 1.0, dtype=torch.bfloat16)
    assert combined_token_0(outputs, is_expanded=True) == 0.0
    assert combined_token_0(outputs, is_expanded=True, multi=False) == 1.0


def test_nodes_are_reduced_first_and_count_at_their_last_position():
    """Four ranks of one expert, two nodes of two; one token on ranks 0, 2, 1, 3, in that order of top-k positions."""
    topk_idx = torch.tensor([[0, 2, 1, 3]])
    nobody = torch.zeros(0, 4, dtype=torch.int64)
    received = dispatch(
        [Sent(x=torch.zeros(len(idx), 1), topk_idx=idx) for idx in (topk_idx, nobody, nobody, nobody)], num_experts=4
    )
    outputs = [column(1.0), column(LARGE), column(-LARGE), column(0.0)]
    common = {"num_experts": 4, "is_expanded": False}
    # One sum: (1 - 2^24) + 2^24 + 0.
    assert combine(0, topk_idx, outputs, received, **common).item() == 1.0
    # Node 0: 1 + 2^24 = 2^24. Node 1: -2^24 + 0.
    assert combine(0, topk_idx, outputs, received, ranks_per_node=2, **common).item() == 0.0
    # Without partial sums the nodes make no difference.
    single = combine(0, topk_idx, outputs, received, ranks_per_node=2, allow_multiple_reduction=False, **common)
    assert single.item() == 1.0


def test_the_order_of_nodes_is_that_of_their_last_positions():
    # Ranks 1 and 0 of node 0 stand at k = 0 and 3, rank 2 of node 1 at k = 1: node 1 comes first.
    topk_idx = torch.tensor([[1, 2, -1, 0]])
    nobody = torch.zeros(0, 4, dtype=torch.int64)
    received = dispatch(
        [Sent(x=torch.zeros(len(idx), 1), topk_idx=idx) for idx in (topk_idx, nobody, nobody, nobody)], num_experts=4
    )
    arguments = {"num_experts": 4, "is_expanded": False, "ranks_per_node": 2, "biases": [column(1.0)]}
    node_1_is_large = [column(-LARGE), column(0.0), column(LARGE), column()]
    # (1 + 2^24) - 2^24
    assert combine(0, topk_idx, node_1_is_large, received, **arguments).item() == 0.0
    node_0_is_large = [column(LARGE), column(0.0), column(-LARGE), column()]
    assert combine(0, topk_idx, node_0_is_large, received, **arguments).item() == 1.0


@pytest.mark.parametrize("is_expanded", [False, True])
def test_a_token_without_experts_gets_the_biases_or_zero(is_expanded):
    rows = 8 if is_expanded else 2
    outputs = [torch.ones(rows, 1), torch.ones(rows, 1)]
    arguments = {"num_experts": NUM_EXPERTS, "is_expanded": is_expanded}
    combined = combine(0, TOPK_IDX, outputs, received_by_both(), **arguments)
    assert combined[2].item() == 0.0
    biases = [column(1, 2, 3), column(10, 20, 30)]
    assert combine(0, TOPK_IDX, outputs, received_by_both(), biases=biases, **arguments)[2].item() == 33.0


def test_two_biases_are_added_first_and_in_their_order():
    outputs = [column(-LARGE), column(0.0, 5)]
    arguments = {"num_experts": NUM_EXPERTS, "is_expanded": False}
    # (1 + 2^24) - 2^24
    combined = combine(
        0, TOPK_IDX, outputs, received_by_both(), biases=[column(1, 0, 0), column(LARGE, 0, 0)], **arguments
    )
    assert combined[0].item() == 0.0


def test_float64_sums_are_made_in_float64():
    outputs = [column(-LARGE, dtype=torch.float64), column(LARGE, 5, dtype=torch.float64)]
    assert combined_token_0(outputs, is_expanded=False, bias=1.0) == 1.0
