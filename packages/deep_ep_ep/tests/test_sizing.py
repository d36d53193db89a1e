from __future__ import annotations

import itertools
from typing import Any

import pytest

from deep_ep_core.errors import ConfigError
from deep_ep_ep.sizing import (
    BUFFER_ALIGNMENT_BYTES,
    BufferShape,
    buffer_size_hint,
    combine_buffer_bytes,
    combine_record_bytes,
    dispatch_buffer_bytes,
    dispatch_record_bytes,
    max_expanded_tokens,
    max_recv_tokens,
)

MIB = 2**20


def shape(**changes: Any) -> BufferShape:
    """Eight ranks on one NVLink domain, hidden 7168, top-8: the usual large model."""
    fields: dict[str, Any] = {
        "num_scaleout_ranks": 1,
        "num_scaleup_ranks": 8,
        "is_scaleup_nvlink": True,
        "num_max_tokens_per_rank": 8192,
        "hidden": 7168,
        "num_topk": 8,
    }
    return BufferShape(**{**fields, **changes})


@pytest.mark.parametrize(
    ("payload_bytes", "num_sf_packs", "num_topk", "record_bytes"),
    [
        pytest.param(2 * 7168, 0, 8, 14464, id="bfloat16"),
        pytest.param(7168, 56, 8, 7520, id="fp8, float32 scales"),
        pytest.param(7168, 14, 8, 7360, id="fp8, packed scales"),
        pytest.param(32, 0, 1, 32 + 32, id="smallest: 16 metadata bytes"),
        pytest.param(32, 0, 2, 32 + 32, id="28 metadata bytes"),
        pytest.param(32, 0, 3, 32 + 64, id="40 metadata bytes"),
        pytest.param(32, 8, 2, 32 + 32 + 32, id="scales fill their section"),
        pytest.param(32, 9, 2, 32 + 64 + 32, id="one pack over"),
        pytest.param(2 * 7168, 0, 32, 14336 + 416, id="388 metadata bytes"),
    ],
)
def test_dispatch_record_rounds_each_section_to_32_bytes(
    payload_bytes: int, num_sf_packs: int, num_topk: int, record_bytes: int
) -> None:
    got = dispatch_record_bytes(payload_bytes=payload_bytes, num_sf_packs=num_sf_packs, num_topk=num_topk)
    assert got == record_bytes


def test_dispatch_record_holds_the_fields_of_the_worked_layout() -> None:
    """FP8 with 56 scale packs, top-8: each field where the one before it ends, and 28 bytes of padding at the end."""
    field_bytes = {"payload": 7168, "scales": 224, "ids": 32, "weights": 32, "source id": 4, "list index": 32}
    assert list(itertools.accumulate(field_bytes.values())) == [7168, 7392, 7424, 7456, 7460, 7492]
    assert dispatch_record_bytes(payload_bytes=7168, num_sf_packs=56, num_topk=8) == 7492 + 28


@pytest.mark.parametrize(
    ("hidden", "num_topk", "record_bytes"), [(7168, 8, 14400), (7168, 4, 14368), (7168, 5, 14400), (16, 1, 64)]
)
def test_combine_record_bytes(hidden: int, num_topk: int, record_bytes: int) -> None:
    assert combine_record_bytes(hidden=hidden, num_topk=num_topk) == record_bytes


@pytest.mark.parametrize(
    ("changes", "hint_mib"),
    [
        pytest.param({}, 904, id="bfloat16: dispatch decides"),
        pytest.param({"use_fp8_dispatch": True}, 900, id="fp8: combine decides"),
        pytest.param({"num_max_tokens_per_rank": 128}, 16, id="decode"),
        pytest.param({"num_max_tokens_per_rank": 128, "use_fp8_dispatch": True}, 16, id="decode, fp8"),
        pytest.param({"num_scaleout_ranks": 2, "use_fp8_dispatch": True}, 2286, id="two nodes of eight"),
    ],
)
def test_hint_matches_the_worked_sizes(changes: dict[str, Any], hint_mib: int) -> None:
    assert buffer_size_hint(shape(**changes)) == hint_mib * MIB


def test_direct_nvlink_needs_receive_regions_only() -> None:
    assert dispatch_buffer_bytes(shape()) == 14464 * 8192 * 8
    assert combine_buffer_bytes(shape()) == 14400 * 8192 * 8


def test_direct_over_the_network_adds_send_regions() -> None:
    """One in dispatch, since a token is staged once; in combine one for every rank, or for each of its choices."""
    networked = shape(is_scaleup_nvlink=False)
    assert dispatch_buffer_bytes(networked) == 14464 * 8192 * (8 + 1)
    assert combine_buffer_bytes(networked) == 14400 * 8192 * (8 + 8)
    unreduced = shape(is_scaleup_nvlink=False, allow_multiple_reduction=False)
    assert combine_buffer_bytes(unreduced) == 14400 * 8192 * (8 + 8 * 8)


@pytest.mark.parametrize(
    ("num_ranks", "num_topk", "allow_multiple_reduction", "num_layers"),
    [(2, 8, True, 2), (8, 6, True, 6), (16, 8, True, 8), (2, 8, False, 8), (16, 6, False, 6), (1, 8, True, 1)],
)
def test_combine_has_a_layer_for_each_contribution(
    num_ranks: int, num_topk: int, allow_multiple_reduction: bool, num_layers: int
) -> None:
    direct = shape(num_scaleup_ranks=num_ranks, num_topk=num_topk, allow_multiple_reduction=allow_multiple_reduction)
    record_bytes = combine_record_bytes(hidden=7168, num_topk=num_topk)
    assert combine_buffer_bytes(direct) == record_bytes * 8192 * num_layers


def test_hybrid_regions_sum_up() -> None:
    """Four nodes of eight, 1000 tokens: 1280 rows a node are spare for the rounding of tokens over channels."""
    hybrid = shape(num_scaleout_ranks=4, num_max_tokens_per_rank=1000)
    assert dispatch_buffer_bytes(hybrid) == 14464 * (8 * 4 * 1000 + 1000 + 4 * 2280)
    assert combine_buffer_bytes(hybrid) == 14400 * (8 * 4 * 1000 + 4 * 1000 + 1 * 4 * 2280)


def test_hybrid_without_reduction_keeps_every_choice() -> None:
    hybrid = shape(num_scaleout_ranks=2, num_max_tokens_per_rank=1000, num_topk=6, allow_multiple_reduction=False)
    record_bytes = 14336 + 64
    assert combine_buffer_bytes(hybrid) == record_bytes * (6 * 2 * 1000 + 6 * 1000 + 6 * 2 * 2280)


@pytest.mark.parametrize("num_scaleout_ranks", [1, 2])
def test_unknown_topk_is_sized_as_32(num_scaleout_ranks: int) -> None:
    unknown = shape(num_scaleout_ranks=num_scaleout_ranks, num_topk=0)
    known = shape(num_scaleout_ranks=num_scaleout_ranks, num_topk=32)
    assert dispatch_buffer_bytes(unknown) == dispatch_buffer_bytes(known)
    assert combine_buffer_bytes(unknown) == combine_buffer_bytes(known)
    assert buffer_size_hint(unknown) == buffer_size_hint(known)


def test_fp8_shape_provides_for_the_finest_scales() -> None:
    """One pack for 32 channels: a call with fewer packs always fits what the hint gave."""
    fp8 = shape(use_fp8_dispatch=True)
    assert dispatch_buffer_bytes(fp8) == (7168 + 896 + 128) * 8192 * 8
    assert dispatch_buffer_bytes(shape(use_fp8_dispatch=True, num_sf_packs=56)) == 7520 * 8192 * 8
    assert dispatch_buffer_bytes(shape(use_fp8_dispatch=True, num_sf_packs=14)) == 7360 * 8192 * 8


def test_payload_of_any_element_size_is_counted() -> None:
    four_bytes = shape(hidden=64, payload_element_bytes=4)
    assert dispatch_buffer_bytes(four_bytes) == (256 + 128) * 8192 * 8
    assert combine_buffer_bytes(four_bytes) == (128 + 64) * 8192 * 8


@pytest.mark.parametrize("num_max_tokens_per_rank", [1, 31, 100, 4096])
@pytest.mark.parametrize("use_fp8_dispatch", [False, True])
@pytest.mark.parametrize("num_scaleout_ranks", [1, 2, 4])
def test_hint_is_the_smallest_aligned_size_that_fits_both(
    num_max_tokens_per_rank: int, use_fp8_dispatch: bool, num_scaleout_ranks: int
) -> None:
    case = shape(
        num_max_tokens_per_rank=num_max_tokens_per_rank,
        use_fp8_dispatch=use_fp8_dispatch,
        num_scaleout_ranks=num_scaleout_ranks,
    )
    needed_bytes = max(dispatch_buffer_bytes(case), combine_buffer_bytes(case))
    hint_bytes = buffer_size_hint(case)
    assert hint_bytes % BUFFER_ALIGNMENT_BYTES == 0
    assert needed_bytes <= hint_bytes < needed_bytes + BUFFER_ALIGNMENT_BYTES


@pytest.mark.parametrize("num_max_tokens_per_rank", [0, 1, 4096])
def test_every_token_of_every_rank_may_arrive_once(num_max_tokens_per_rank: int) -> None:
    assert max_recv_tokens(8, num_max_tokens_per_rank) == 8 * num_max_tokens_per_rank


def test_expanded_rows_match_the_worked_case() -> None:
    assert max_recv_tokens(8, 4096) == 32768
    assert max_expanded_tokens(8, 4096, 6, 32, 128) == 200704
    assert max_expanded_tokens(8, 4096, 6, 32, 128) * 7168 * 2 / 2**30 == pytest.approx(2.68, abs=0.005)


@pytest.mark.parametrize(
    ("num_topk", "num_local_experts", "rows_per_token"), [(1, 4, 1), (3, 4, 3), (4, 4, 4), (8, 4, 4), (8, 1, 1)]
)
def test_token_takes_no_more_rows_than_choices_or_local_experts(
    num_topk: int, num_local_experts: int, rows_per_token: int
) -> None:
    assert max_expanded_tokens(2, 10, num_topk, num_local_experts, 1) == 20 * rows_per_token


def worst_aligned_rows(num_rows: int, num_segments: int, alignment: int, segment_max: int) -> int:
    """Most rows that `num_rows` rows take in padded segments of at most `segment_max`, found by trying every split."""
    splits = (s for s in itertools.product(range(segment_max + 1), repeat=num_segments) if sum(s) == num_rows)
    return max(sum(-(-rows // alignment) * alignment for rows in split) for split in splits)


@pytest.mark.parametrize("alignment", [1, 2, 3, 4])
@pytest.mark.parametrize("num_tokens", [1, 2, 4])
def test_no_routing_needs_more_expanded_rows(num_tokens: int, alignment: int) -> None:
    """Three local experts, top-2, every split of the rows over the experts."""
    bound = max_expanded_tokens(1, num_tokens, 2, 3, alignment)
    assert bound % alignment == 0
    assert worst_aligned_rows(2 * num_tokens, 3, alignment, num_tokens) <= bound


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"num_scaleout_ranks": 0}, r"num_scaleout_ranks must be at least 1 \(got 0\)"),
        ({"num_scaleup_ranks": 0}, "num_scaleup_ranks"),
        ({"num_max_tokens_per_rank": 0}, "num_max_tokens_per_rank"),
        ({"hidden": 0}, "hidden"),
        ({"num_scaleout_ranks": 2, "is_scaleup_nvlink": False}, "in hybrid mode"),
        ({"num_topk": -1}, "num_topk must be 0 to 32"),
        ({"num_topk": 33}, "got 33"),
        ({"hidden": 7176}, "multiple of 32 bytes"),
        ({"hidden": 7184, "use_fp8_dispatch": True}, "multiple of 32 bytes"),
        ({"payload_element_bytes": 0}, "payload_element_bytes"),
        ({"num_sf_packs": -1}, "num_sf_packs"),
    ],
)
def test_impossible_shape_is_refused(changes: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        shape(**changes)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ((0, 1, 1, 1, 1), "num_ranks"),
        ((1, -1, 1, 1, 1), "num_max_tokens_per_rank"),
        ((1, 1, 0, 1, 1), "num_topk"),
        ((1, 1, 1, 0, 1), "num_local_experts"),
        ((1, 1, 1, 1, 0), "expert_alignment"),
    ],
)
def test_impossible_row_count_is_refused(arguments: tuple[int, int, int, int, int], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        max_expanded_tokens(*arguments)


def test_record_of_no_payload_or_no_choice_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"multiple of 32 bytes \(got 0\)"):
        dispatch_record_bytes(payload_bytes=0, num_sf_packs=0, num_topk=8)
    with pytest.raises(ConfigError, match="num_topk"):
        dispatch_record_bytes(payload_bytes=32, num_sf_packs=0, num_topk=0)
    with pytest.raises(ConfigError, match="num_sf_packs"):
        dispatch_record_bytes(payload_bytes=32, num_sf_packs=-1, num_topk=1)
    with pytest.raises(ConfigError, match=r"\(got 16\)"):
        combine_record_bytes(hidden=8, num_topk=8)
    with pytest.raises(ConfigError, match="num_topk"):
        combine_record_bytes(hidden=16, num_topk=0)
