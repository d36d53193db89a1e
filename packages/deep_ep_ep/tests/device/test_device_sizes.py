"""How the device backend divides its memory: what passes the checks of `ElasticBuffer` must fit."""

from __future__ import annotations

import random

import pytest

from deep_ep_core.align import align_up, ceil_div
from deep_ep_core.lsa_team import MAX_LSA_RANKS
from deep_ep_ep.device.combine_kernel import combine_slab_bytes
from deep_ep_ep.device.context import MAX_NUM_EXPERTS, window_sizes
from deep_ep_ep.device.dispatch_kernel import dispatch_launch_shape, row_stages, side_bytes
from deep_ep_ep.sizing import (
    BufferShape,
    combine_buffer_bytes,
    dispatch_buffer_bytes,
    max_recv_tokens,
)

MIB = 2**20
# Dynamic shared memory of a block on sm_90 and sm_100, less what the kernels have of their own.
MAX_SMEM_BYTES = (227 - 6) * 1024
# Masks of 16 warps, prefix sums of two bytes for each, and four words; see `plan_memory` in `plan_rows.cuh`.
PLAN_BYTES_PER_COLUMN = 16 * 4 + 16 * 2 + 4 * 4


def random_call(seed: int) -> dict[str, int]:
    """Sizes of a call, all that the checks let pass: rows of whole 16 bytes, at most a scale for 32 channels."""
    choose = random.Random(seed)
    element_bytes = choose.choice((1, 2, 4, 8))
    row_bytes = 16 * choose.choice((1, 2, 3, choose.randint(1, 100), choose.randint(1, 4000)))
    max_packs = ceil_div(row_bytes // element_bytes, 32)
    return {
        "num_ranks": choose.choice((1, 2, 3, 4, 8, 16, 72)),
        "num_max_tokens": choose.choice((1, 2, 31, 128, choose.randint(1, 9000))),
        "num_topk": choose.randint(1, 32),
        "row_bytes": row_bytes,
        "num_sf_packs": choose.choice((0, 1, max_packs)),
    }


def shape_of(call: dict[str, int], *, allow_multiple_reduction: bool, num_sf_packs: int) -> BufferShape:
    """As `ElasticBuffer` computes it for its check of a call's size."""
    return BufferShape(
        num_scaleout_ranks=1,
        num_scaleup_ranks=call["num_ranks"],
        is_scaleup_nvlink=True,
        num_max_tokens_per_rank=call["num_max_tokens"],
        hidden=align_up(call["row_bytes"], 32) // 2,
        num_topk=call["num_topk"],
        num_sf_packs=num_sf_packs,
        allow_multiple_reduction=allow_multiple_reduction,
    )


@pytest.mark.parametrize("recv_memory", ["auto", "torch"])
def test_dispatch_that_passes_the_size_check_fits_the_stage(recv_memory: str) -> None:
    """Side records of all tokens that may come, and behind them their rows: what `Dispatcher` puts into the stage."""
    for seed in range(2000):
        call = random_call(seed)
        # The least buffer that the call passes with.
        num_bytes = dispatch_buffer_bytes(
            shape_of(call, allow_multiple_reduction=True, num_sf_packs=call["num_sf_packs"])
        )
        num_slots = max_recv_tokens(call["num_ranks"], call["num_max_tokens"])
        record_bytes = side_bytes(
            num_topk=call["num_topk"], num_sf_packs=call["num_sf_packs"], has_weights=True, do_expand=True
        )
        needed_bytes = align_up(num_slots * record_bytes, 256) + num_slots * call["row_bytes"]
        stage_bytes = window_sizes(num_bytes, num_ranks=call["num_ranks"], recv_memory=recv_memory).stage_bytes  # type: ignore[arg-type]
        assert needed_bytes <= stage_bytes, call


@pytest.mark.parametrize("is_single_rounding", [False, True])
def test_combine_that_passes_the_size_check_fits_the_stage(is_single_rounding: bool) -> None:
    for seed in range(2000):
        call = random_call(seed)
        num_bytes = combine_buffer_bytes(
            shape_of(call, allow_multiple_reduction=not is_single_rounding, num_sf_packs=0)
        )
        slab_bytes = combine_slab_bytes(
            num_ranks=call["num_ranks"],
            num_topk=call["num_topk"],
            num_max_tokens=call["num_max_tokens"],
            row_bytes=call["row_bytes"],
            is_single_rounding=is_single_rounding,
            has_weights=True,
        )
        sizes = window_sizes(num_bytes, num_ranks=call["num_ranks"], recv_memory="torch")
        assert slab_bytes <= sizes.stage_bytes, call


def test_slab_has_a_layer_of_rows_and_weights_for_each_partial_sum() -> None:
    sizes = {"num_max_tokens": 10, "row_bytes": 64}
    one = combine_slab_bytes(**sizes, num_ranks=2, num_topk=8, is_single_rounding=False, has_weights=False)
    assert one == 2 * 10 * 64
    few = combine_slab_bytes(**sizes, num_ranks=8, num_topk=2, is_single_rounding=False, has_weights=True)
    assert few == 2 * 10 * (64 + 2 * 4)
    single = combine_slab_bytes(**sizes, num_ranks=2, num_topk=8, is_single_rounding=True, has_weights=False)
    assert single == 8 * 10 * 64


@pytest.mark.parametrize(
    ("recv_memory", "num_ranks", "stage_bytes", "heap_bytes"),
    [
        pytest.param("torch", 8, 8 * MIB, 0, id="torch: no heap"),
        pytest.param("window", 8, 0, 8 * MIB, id="window: no stage"),
        pytest.param("auto", 1, 8 * MIB, 8 * MIB, id="auto"),
        pytest.param("auto", 8, 8 * MIB, 8 * MIB, id="auto, 8 ranks"),
        pytest.param("auto", 64, 8 * MIB, MIB, id="auto, more ranks"),
    ],
)
def test_memory_is_divided_by_where_rows_live(
    recv_memory: str, num_ranks: int, stage_bytes: int, heap_bytes: int
) -> None:
    sizes = window_sizes(8 * MIB, num_ranks=num_ranks, recv_memory=recv_memory)  # type: ignore[arg-type]
    assert sizes.heap_bytes == heap_bytes
    # A little more than asked for, so that parts of the stage may be aligned.
    assert stage_bytes <= sizes.stage_bytes <= stage_bytes + 4096


@pytest.mark.parametrize("has_weights", [False, True])
@pytest.mark.parametrize("do_expand", [False, True])
def test_side_record_has_room_for_all_of_its_parts(has_weights: bool, do_expand: bool) -> None:
    """The parts one behind the other, as `side_layout` in `dispatch_params.cuh` puts them."""
    for num_topk in range(1, 33):
        for num_packs in (0, 1, 2, 3, 56, 224):
            weights = num_packs
            ids = weights + (num_topk if has_weights else 0)
            rows = ids + num_topk
            token = rows + (num_topk if do_expand else 0)
            num_bytes = side_bytes(
                num_topk=num_topk, num_sf_packs=num_packs, has_weights=has_weights, do_expand=do_expand
            )
            assert 4 * (token + 1) <= num_bytes < 4 * (token + 1) + 16
            # Bulk copies move whole units of 16 bytes.
            assert num_bytes % 16 == 0


@pytest.mark.parametrize("plan_columns", [0, 2, 264, 264 + 72, 512, 640, MAX_LSA_RANKS + MAX_NUM_EXPERTS])
def test_pieces_cover_their_row_and_fit_shared_memory(plan_columns: int) -> None:
    """Also beside a plan, or in its place where it is too large for both."""
    for seed in range(500):
        row_bytes = random_call(seed)["row_bytes"]
        stages = row_stages(row_bytes, plan_columns=plan_columns)
        num_pieces = ceil_div(row_bytes, stages.piece_bytes)
        lengths = [min(stages.piece_bytes, row_bytes - piece * stages.piece_bytes) for piece in range(num_pieces)]
        assert sum(lengths) == row_bytes
        assert all(length > 0 and length % 16 == 0 for length in lengths), (row_bytes, stages)
        # Bulk copies begin at whole stages, as `row_stage` in `row_stages.cuh` lays them out.
        assert stages.offset % 128 == 0
        assert 1 <= stages.num_stages <= 14
        end = stages.offset + stages.num_stages * align_up(stages.piece_bytes, 128)
        assert end <= stages.smem_bytes <= MAX_SMEM_BYTES, (row_bytes, stages)
        assert stages.offset == 0 or stages.offset >= plan_columns * PLAN_BYTES_PER_COLUMN
        assert stages.smem_bytes >= plan_columns * PLAN_BYTES_PER_COLUMN


def test_stages_stand_beside_a_small_plan_and_take_the_place_of_a_large_one() -> None:
    alone, beside = row_stages(14336, plan_columns=0), row_stages(14336, plan_columns=264)
    assert alone.offset == 0
    assert beside.offset == align_up(264 * PLAN_BYTES_PER_COLUMN, 128)
    assert 8 <= beside.num_stages <= alone.num_stages
    assert row_stages(14336, plan_columns=1000).offset == 0


def test_launch_has_a_block_for_each_sm() -> None:
    stages = row_stages(14336, plan_columns=264)
    shape = dispatch_launch_shape(num_sms=24, stages=stages)
    assert shape.grid == (24, 1, 1)
    assert shape.block == (512, 1, 1)
    assert shape.smem_bytes == stages.smem_bytes
