"""What is fetched is what a plain lookup in the whole table gives, to the bit, and no more is sent than must be."""

import engram_cases
import pytest
import torch


# Of the module, so that the tests of one number of ranks follow each other and share their ranks.
@pytest.fixture(scope="module", params=[1, 2, 4], ids=lambda num: f"{num}_ranks")
def num_ranks(request):
    return request.param


def test_any_size_equals_a_plain_lookup(rank_pool, num_ranks):
    rank_pool(num_ranks).run(engram_cases.check_sizes)


def test_200_random_rounds_equal_a_plain_lookup(rank_pool, num_ranks):
    assert rank_pool(num_ranks).run(engram_cases.check_random_rounds, 200) == [200] * num_ranks


@pytest.mark.parametrize(("sf_dtype", "num_packs"), [(torch.float32, 1), (torch.float32, 3), (torch.int32, 2)])
def test_scales_come_in_both_layouts(rank_pool, num_ranks, sf_dtype, num_packs):
    rank_pool(num_ranks).run(engram_cases.check_scale_layouts, sf_dtype, num_packs)


def test_ranks_may_hold_different_numbers_of_entries(rank_pool, num_ranks):
    rank_pool(num_ranks).run(engram_cases.check_uneven_tables)


def test_a_table_may_be_empty(rank_pool, num_ranks):
    rank_pool(num_ranks).run(engram_cases.check_empty_table)


def test_ranks_may_fetch_different_shapes_and_nothing(rank_pool, num_ranks):
    rank_pool(num_ranks).run(engram_cases.check_unlike_fetches)


def test_each_distinct_remote_entry_crosses_once(rank_pool, num_ranks):
    """Three indices of 8 bytes to each peer, and three entries of 256 bytes, however often they are wanted."""
    for sizes in rank_pool(num_ranks).run(engram_cases.bytes_sent_for_duplicates):
        assert sorted(sizes) == sorted([3 * 8, 3 * 256] * (num_ranks - 1))


def test_own_entries_are_not_sent_anywhere(rank_pool, num_ranks):
    assert rank_pool(num_ranks).run(engram_cases.bytes_sent_for_own_entries) == [[]] * num_ranks


def test_hooks_may_be_called_in_any_order_on_each_rank(rank_pool, num_ranks):
    rank_pool(num_ranks).run(engram_cases.check_hooks_in_any_order)


def test_a_hook_waits_for_no_hook_of_another_rank(rank_pool, num_ranks):
    rank_pool(num_ranks).run(engram_cases.check_hook_waits_for_no_other_hook)


def test_a_fetch_gives_the_entries_of_its_time(rank_pool, num_ranks):
    rank_pool(num_ranks).run(engram_cases.check_rewrite_between_fetches)


def test_closing_completes_the_fetches_under_way(rank_pool, num_ranks):
    rank_pool(num_ranks).run(engram_cases.check_close_completes_fetches)


def test_two_tables_of_a_group_do_not_mix(rank_pool, num_ranks):
    rank_pool(num_ranks).run(engram_cases.check_two_tables)


def test_the_functions_do_what_the_methods_do(rank_pool, num_ranks):
    rank_pool(num_ranks).run(engram_cases.check_functions)
