"""The sums of combine, to the bit: their order, where they are rounded, and the sign of a zero."""

from __future__ import annotations

import math

import pytest
import torch

from deep_ep_ep.reduction import COMBINE_DTYPES, reduce_at_source, sum_rows_in_order

# 2^24 and 1 add up to 2^24 in float32: what is added later is lost.
LARGE = 2.0**24


def column(*values: float, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """Rows of one element."""
    return torch.tensor(values, dtype=dtype).unsqueeze(1)


def assert_same_bits(actual: torch.Tensor, expected: torch.Tensor) -> None:
    """Equal to the bit, the sign of a zero included; no NaN may come."""
    assert actual.dtype == expected.dtype
    assert actual.shape == expected.shape
    assert not actual.isnan().any()
    assert torch.equal(actual, expected)
    assert torch.equal(actual.signbit(), expected.signbit())


def sum_by_loop(rows: torch.Tensor, row_idx: torch.Tensor, biases: list[torch.Tensor]) -> torch.Tensor:
    """The same sums, one token and one term at a time."""
    acc_dtype = torch.float64 if rows.dtype == torch.float64 else torch.float32

    def add_up(terms: list[torch.Tensor]) -> torch.Tensor:
        total = torch.zeros(rows.size(1), dtype=acc_dtype)
        for term in terms:
            total = total + term.to(acc_dtype)
        return total.to(rows.dtype)

    result = torch.empty(len(row_idx), rows.size(1), dtype=rows.dtype)
    for token, row_list in enumerate(row_idx.tolist()):
        terms = [rows[row] for row in row_list if row >= 0]
        result[token] = add_up([*(bias[token] for bias in biases), *terms])
    return result


@pytest.mark.parametrize("num_biases", [0, 1, 2])
@pytest.mark.parametrize("dtype", COMBINE_DTYPES, ids=lambda dtype: str(dtype)[6:])
@pytest.mark.parametrize(
    ("num_tokens", "num_rows", "num_topk"), [(33, 64, 4), (20, 5, 1), (7, 50, 32), (0, 3, 4), (3, 0, 4)]
)
def test_sums_follow_the_loop_to_the_bit(num_tokens, num_rows, num_topk, dtype, num_biases):
    generator = torch.Generator().manual_seed(num_tokens + num_topk)
    # Large values that cancel, so that another order gives other bits.
    sign = torch.randint(-1, 2, (num_rows, 8), generator=generator)
    rows = (torch.randn(num_rows, 8, generator=generator) + sign * 2.0**14).to(dtype)
    row_idx = (
        torch.randint(-1, num_rows, (num_tokens, num_topk), generator=generator)
        if num_rows
        else torch.full((num_tokens, num_topk), -1)
    )
    row_idx[torch.rand(row_idx.shape, generator=generator) < 0.3] = -1
    biases = [torch.randn(num_tokens, 8, generator=generator).to(dtype) for _ in range(num_biases)]
    assert_same_bits(sum_rows_in_order(rows, row_idx, biases), sum_by_loop(rows, row_idx, biases))


def test_rows_are_added_in_ascending_topk_position():
    rows = column(1.0, LARGE, -LARGE)
    row_idx = torch.tensor([[0, 1, 2], [0, 2, 1], [1, 2, 0], [-1, 0, -1]])
    # (1 + L) - L, (1 - L) + L, (L - L) + 1, 1
    assert sum_rows_in_order(rows, row_idx).flatten().tolist() == [0.0, 1.0, 1.0, 1.0]


def test_bias_comes_first():
    rows, row_idx = column(LARGE, -LARGE), torch.tensor([[0, 1]])
    # (1 + L) - L; last it would be 1.
    assert sum_rows_in_order(rows, row_idx, [column(1.0)]).item() == 0.0


def test_biases_are_added_in_their_order():
    row_idx = torch.tensor([[0]])
    assert sum_rows_in_order(column(-LARGE), row_idx, [column(1.0), column(LARGE)]).item() == 0.0
    # ((1 - L) + L) + 1
    assert sum_rows_in_order(column(1.0), row_idx, [column(1.0), column(-LARGE)]).item() == -LARGE + 2


def test_a_sum_is_rounded_once():
    """In bfloat16 256 + 1 is a tie that falls back to 256, so a sum rounded at every step would stay there."""
    rows = column(256.0, 1.0, 1.0, dtype=torch.bfloat16)
    assert sum_rows_in_order(rows, torch.tensor([[0, 1, 2]])).item() == 258.0


def test_float16_sums_may_pass_its_range_on_the_way():
    rows = column(60000.0, 60000.0, -60000.0, dtype=torch.float16)
    assert sum_rows_in_order(rows, torch.tensor([[0, 1, 2]])).item() == rows[0].item()


def test_float64_is_accumulated_in_float64():
    row_idx = torch.tensor([[0, 1, 2]])
    assert sum_rows_in_order(column(1.0, LARGE, -LARGE, dtype=torch.float64), row_idx).item() == 1.0
    large = 2.0**53
    assert sum_rows_in_order(column(1.0, large, -large, dtype=torch.float64), row_idx).item() == 0.0


@pytest.mark.parametrize("dtype", COMBINE_DTYPES, ids=lambda dtype: str(dtype)[6:])
def test_a_sum_starts_at_plus_zero(dtype):
    """An empty sum is +0, and so is a lone -0, or two of them."""
    rows = column(-0.0, -0.0, dtype=dtype)
    row_idx = torch.tensor([[-1, -1], [-1, 0], [0, 1]])
    assert_same_bits(sum_rows_in_order(rows, row_idx), torch.zeros(3, 1, dtype=dtype))
    biases = [torch.full((3, 1), -0.0, dtype=dtype)]
    assert_same_bits(sum_rows_in_order(rows, row_idx, biases), torch.zeros(3, 1, dtype=dtype))
    assert_same_bits(reduce_at_source(rows, row_idx, row_idx, [], ranks_per_node=1), torch.zeros(3, 1, dtype=dtype))


def test_inputs_are_left_alone():
    rows, bias = column(1.0, 2.0), column(4.0)
    assert sum_rows_in_order(rows, torch.tensor([[0, 1]]), [bias]).item() == 7.0
    assert rows.flatten().tolist() == [1.0, 2.0]
    assert bias.item() == 4.0


# At the source: rows that came back from ranks, perhaps reduced by node first


def test_without_nodes_there_is_one_sum():
    rows, row_idx = column(256.0, 1.0, 1.0, dtype=torch.bfloat16), torch.tensor([[0, 1, 2]])
    dst_rank = torch.tensor([[0, 1, 2]])
    assert reduce_at_source(rows, row_idx, dst_rank, [], ranks_per_node=None).item() == 258.0


def test_each_node_is_rounded_before_the_nodes_are_added():
    """Node 0: 256 + 1 = 256 in bfloat16. With node 1's 1 that is 257, again a tie: 256."""
    rows, row_idx = column(256.0, 1.0, 1.0, dtype=torch.bfloat16), torch.tensor([[0, 1, 2]])
    dst_rank = torch.tensor([[0, 1, 2]])
    assert reduce_at_source(rows, row_idx, dst_rank, [], ranks_per_node=2).item() == 256.0


def test_nodes_count_at_the_last_of_their_positions():
    rows = column(0.0, LARGE, -LARGE)
    # Node 0 stands at k = 0 and 2, node 1 at k = 1; the bias is lost in whichever comes first.
    dst_rank = torch.tensor([[0, 2, 1]])
    bias = [column(1.0)]
    # Node 1 first: (1 + L) - L.
    assert reduce_at_source(rows, torch.tensor([[0, 1, 2]]), dst_rank, bias, ranks_per_node=2).item() == 0.0
    # (1 - L) + L
    assert reduce_at_source(rows, torch.tensor([[0, 2, 1]]), dst_rank, bias, ranks_per_node=2).item() == 1.0


def test_the_bias_is_added_at_the_source_and_not_in_the_nodes():
    """256 of node 0 and 1 of bias: in float32 at the source with node 1's 1 that makes 258."""
    rows, dst_rank = column(256.0, 1.0, dtype=torch.bfloat16), torch.tensor([[0, 2]])
    bias = [column(1.0, dtype=torch.bfloat16)]
    assert reduce_at_source(rows, torch.tensor([[0, 1]]), dst_rank, bias, ranks_per_node=2).item() == 258.0


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=lambda dtype: str(dtype)[6:])
@pytest.mark.parametrize("ranks_per_node", [1, 2, 4, 8])
def test_sums_over_nodes_follow_the_loop_to_the_bit(ranks_per_node, dtype):
    """Random routes over 8 ranks; a row stands at the last position of its rank, as it does when ranks reduce first."""
    generator = torch.Generator().manual_seed(ranks_per_node)
    num_tokens, num_topk, num_ranks = 40, 6, 8
    dst_rank = torch.randint(-1, num_ranks, (num_tokens, num_topk), generator=generator)
    dst_rank[:3] = -1
    sign = torch.randint(-1, 2, (num_tokens * num_topk, 8), generator=generator)
    rows = (torch.randn(num_tokens * num_topk, 8, generator=generator) + sign * 2.0**18).to(dtype)
    bias = torch.randn(num_tokens, 8, generator=generator).to(dtype)
    row_idx = torch.full(dst_rank.shape, -1)
    expected_terms = []
    for token, ranks in enumerate(dst_rank.tolist()):
        nodes: dict[int, list[int]] = {}
        for k, rank in enumerate(ranks):
            if rank >= 0 and rank not in ranks[k + 1 :]:
                row_idx[token, k] = token * num_topk + k
                # Put last: a node counts where its last rank stands.
                node = rank // ranks_per_node
                nodes[node] = [*nodes.pop(node, []), token * num_topk + k]
        expected_terms.append(list(nodes.values()))

    got = reduce_at_source(rows, row_idx, dst_rank, [bias], ranks_per_node=ranks_per_node)
    no_bias: list[torch.Tensor] = []
    for token, node_rows in enumerate(expected_terms):
        partial = [sum_by_loop(rows, torch.tensor([each]), no_bias)[0] for each in node_rows]
        stacked = torch.stack(partial) if partial else rows[:0]
        expected = sum_by_loop(stacked, torch.arange(len(stacked)).unsqueeze(0), [bias[token : token + 1]])
        assert_same_bits(got[token : token + 1], expected)


# The two-operand add


def round_to_bfloat16(exact: torch.Tensor) -> torch.Tensor:
    """float64 rounded to nearest even at bfloat16's 8 bits, without a stop at float32; also float64."""
    _, exponent = torch.frexp(exact)
    # 8 significant bits; the smallest step is that of the subnormals, 2^-133.
    step = torch.ldexp(torch.ones_like(exact), (exponent - 8).clamp(min=-133))
    return (exact / step).round() * step


def random_bfloat16_pairs(num_pairs: int, max_exponent_gap: int | None) -> tuple[torch.Tensor, torch.Tensor]:
    """Finite pairs from all bit patterns, or with exponents no further apart than the gap."""
    generator = torch.Generator().manual_seed(max_exponent_gap or 0)

    def bits(low: int, high: int) -> torch.Tensor:
        return torch.randint(low, high, (num_pairs,), generator=generator)

    exponents = [bits(0, 255), bits(0, 255)]
    if max_exponent_gap is not None:
        exponents[1] = (exponents[0] + bits(-max_exponent_gap, max_exponent_gap + 1)).clamp(0, 254)
    patterns = [(bits(0, 2) << 15) | (exponent << 7) | bits(0, 128) for exponent in exponents]
    first, second = (pattern.to(torch.uint16).view(torch.bfloat16) for pattern in patterns)
    return first, second


@pytest.mark.parametrize("max_exponent_gap", [None, 20], ids=["all patterns", "near exponents"])
def test_a_packed_bfloat16_add_equals_the_float32_sum(max_exponent_gap):
    """A kernel may add two rows by one bfloat16 add, correctly rounded: going through float32 gives the same bits."""
    first, second = random_bfloat16_pairs(1_000_000, max_exponent_gap)
    # Exact: operands whose float64 sum is not are so far apart that the smaller cannot move the larger's last bit.
    packed = round_to_bfloat16(first.double() + second.double())
    rows = torch.cat([first, second]).unsqueeze(1)
    row_idx = torch.arange(len(rows)).view(2, -1).t()
    got = sum_rows_in_order(rows, row_idx)[:, 0]
    # As numbers: past the largest finite number, 2^128 of `packed` is bfloat16's infinity.
    overflow = packed.abs() >= 2.0**128
    expected = torch.where(overflow, packed.sign() * math.inf, packed)
    assert torch.equal(got.double(), expected)


def test_the_oracle_of_the_packed_add_rounds_ties_to_even():
    values = torch.tensor([257.0, 259.0, 258.9, -257.0, 2.0**-133 * 1.5, 2.0**-134, 0.0], dtype=torch.float64)
    assert round_to_bfloat16(values).tolist() == [256.0, 260.0, 258.0, -256.0, 2.0**-132, 0.0, 0.0]
