"""Sizes are upstream's, and both ends of a link know of it."""

import pytest

from deep_ep_core.errors import ConfigError
from deep_ep_pp import PipelineBuffer, get_pp_buffer_size_hint
from deep_ep_pp.sizing import PipelineConfig, link_bytes, message_bytes, peers_with_slots


def test_hint_is_upstreams_for_two_peers():
    """4 regions of 4 slots of a 4096 x 7168 bfloat16 tensor: what DeepEP 2.1.0's test of it allocates."""
    assert get_pp_buffer_size_hint(4096 * 7168 * 2, 4) == 939_524_096
    assert PipelineBuffer.get_pp_buffer_size_hint(4096 * 7168 * 2, 4) == 939_524_096


@pytest.mark.parametrize(("num_bytes", "slot_bytes"), [(1, 32), (31, 32), (32, 32), (33, 64)])
def test_slots_are_multiples_of_32_bytes(num_bytes, slot_bytes):
    config = PipelineConfig(num_max_tensor_bytes=num_bytes, num_max_inflight_tensors=1, peers=())
    assert config.slot_bytes == message_bytes([num_bytes]) == link_bytes(num_bytes, 3) // 6 == slot_bytes


def test_an_empty_tensor_takes_no_bytes():
    assert message_bytes([0, 33, 0, 1]) == 96


@pytest.mark.parametrize("num_peers", [1, 2, 7])
def test_a_buffer_of_the_hint_has_room_for_that_many_peers(num_peers):
    assert get_pp_buffer_size_hint(1 << 20, 2, num_peers) // link_bytes(1 << 20, 2) == num_peers


@pytest.mark.parametrize("arguments", [(0, 1), (1, 0), (1, 1, 0)])
def test_a_hint_for_nothing_is_refused(arguments):
    with pytest.raises(ConfigError, match="must be at least 1"):
        get_pp_buffer_size_hint(*arguments)


@pytest.mark.parametrize("num_ranks", [1, 2, 3, 4, 5, 8])
def test_peers_are_the_nearest_and_both_ends_agree(num_ranks):
    for num_links in range(2 * num_ranks):
        peers = [peers_with_slots(rank, num_ranks, num_links) for rank in range(num_ranks)]
        for rank in range(num_ranks):
            assert rank not in peers[rank]
            assert len(peers[rank]) <= num_links
            assert all(rank in peers[peer] for peer in peers[rank])
            if num_links >= min(2, num_ranks - 1):
                assert {(rank + 1) % num_ranks, (rank - 1) % num_ranks} - {rank} <= set(peers[rank])
            if num_links >= num_ranks - 1:
                assert len(peers[rank]) == num_ranks - 1
