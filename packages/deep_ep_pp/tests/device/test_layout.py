"""Places in the window: no two overlap, both ends know the same, and a header comes back as it was."""

from __future__ import annotations

import pytest

from deep_ep_pp.checks import MAX_TENSORS
from deep_ep_pp.device.layout import (
    HEADER_BYTES,
    HEADER_WORDS,
    WORD_BYTES,
    Header,
    SlotLayout,
    decode_header,
    encode_header,
    part_offsets,
    stamp_of,
)
from deep_ep_pp.sizing import PipelineConfig, link_bytes, message_bytes, peers_with_slots


def layouts(num_ranks: int, num_links: int, *, has_stage: bool, max_bytes: int = 1000) -> list[SlotLayout]:
    return [
        SlotLayout.of(
            PipelineConfig(
                num_max_tensor_bytes=max_bytes,
                num_max_inflight_tensors=3,
                peers=peers_with_slots(rank, num_ranks, num_links),
            ),
            rank=rank,
            num_ranks=num_ranks,
            has_stage=has_stage,
        )
        for rank in range(num_ranks)
    ]


@pytest.mark.parametrize("num_ranks", [2, 3, 5, 8])
def test_all_ranks_come_to_one_layout_without_telling_each_other(num_ranks):
    for num_links in range(2, num_ranks + 1):
        of_rank = layouts(num_ranks, num_links, has_stage=False)
        assert of_rank.count(of_rank[0]) == num_ranks


@pytest.mark.parametrize("has_stage", [False, True])
def test_slots_do_not_overlap_and_fill_the_window(has_stage):
    layout = layouts(5, 4, has_stage=has_stage)[0]
    firsts = [layout.recv_offset(distance) for distance in layout.distances]
    if has_stage:
        firsts += [layout.stage_offset(distance) for distance in layout.distances]
    slots = sorted(first + layout.slot_offset(number) for first in firsts for number in (1, 2, 3))
    assert slots == [idx * layout.stride_bytes for idx in range(len(slots))]
    assert layout.num_bytes == len(slots) * layout.stride_bytes
    assert layout.slot_offset(4) == layout.slot_offset(1)


def test_slots_with_a_stage_take_what_the_size_of_a_buffer_counts_and_headers():
    layout = layouts(4, 3, has_stage=True, max_bytes=1 << 20)[0]
    assert layout.num_bytes == 3 * (link_bytes(1 << 20, 3) + 2 * 3 * HEADER_BYTES)


@pytest.mark.parametrize("sizes", [[0], [5], [1, 0, 32, 33], [7] * MAX_TENSORS], ids=len)
def test_a_message_fits_its_slot_and_its_tensors_do_not_overlap(sizes):
    offsets = part_offsets(sizes)
    assert offsets[0] == HEADER_BYTES
    for offset, size, after in zip(offsets, sizes, [*offsets[1:], HEADER_BYTES + message_bytes(sizes)], strict=True):
        assert offset % 32 == 0
        assert offset + size <= after


@pytest.mark.parametrize("sizes", [[0], [1 << 40, 3], list(range(MAX_TENSORS))], ids=len)
@pytest.mark.parametrize("number", [1, 1 << 16, 1 << 50])
def test_a_header_comes_back_whatever_lies_behind_it(sizes, number):
    words = encode_header(number, sizes)
    assert len(words) == len(sizes) <= HEADER_WORDS
    assert max(words) < 1 << 63
    assert decode_header([*words, 99, 98]) == Header(stamp=stamp_of(number), sizes=sizes)
    assert HEADER_WORDS * WORD_BYTES <= HEADER_BYTES


def test_a_header_is_there_only_when_all_its_words_are():
    """Words come one by one, in any order, into a row of zeros."""
    words = encode_header(7, [0, 0, 5])
    for missing in range(3):
        assert decode_header([0 if idx == missing else word for idx, word in enumerate(words)] + [0]) is None
    assert decode_header([*words, 0]) == Header(stamp=7, sizes=[0, 0, 5])


def test_stamps_of_all_messages_that_a_slot_may_hold_differ():
    """The next one in the same slot is a window further on."""
    assert all(stamp_of(1 << 20) != stamp_of((1 << 20) + window) for window in range(1, 1 << 16))
