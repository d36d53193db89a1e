"""All-gather and reduce-scatter against plain torch, to the bit."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence

import pytest
import torch
import torch.distributed as dist
from cp_setting import SETTING, full, ones, tensor

from deep_ep_cp import ContextBuffer, SessionHandle, all_gather, reduce_scatter
from deep_ep_cp.reduction import SUM_DTYPES

# Zero, one, odd and even sizes, around 32 bytes, without and with several dimensions.
SHAPES: tuple[tuple[int, ...], ...] = ((), (0,), (1,), (3, 0, 2), (5,), (31,), (32,), (33,), (2, 3, 5), (1000,))
MOVED_DTYPES = (*SUM_DTYPES, torch.bool, torch.float8_e4m3fn)


def make_buffer(
    group: dist.ProcessGroup | None = None, *, num_bytes: int = 2 << 20, max_calls: int = 32, **options: object
) -> ContextBuffer:
    given = {"num_cpu_timeout_secs": 60, "device": SETTING.device, **SETTING.options, **options}
    buffer = ContextBuffer(group, num_bytes, **given)
    buffer.agrs_set_config(num_bytes, max_calls)
    return buffer


def make_tensor(shape: Sequence[int], dtype: torch.dtype, *key: int) -> torch.Tensor:
    """Values that no other key has, on the device of the setting."""
    return _make_on_host(shape, dtype, *key).to(SETTING.device)


def _make_on_host(shape: Sequence[int], dtype: torch.dtype, *key: int) -> torch.Tensor:
    """Floats are of many magnitudes, so that another order of a sum gives other bits."""
    generator = torch.Generator().manual_seed(_seed(shape, dtype, *key))
    if dtype.is_complex:
        real = dtype.to_real()
        return torch.complex(_make_on_host(shape, real, *key, 1), _make_on_host(shape, real, *key, 2))
    if not dtype.is_floating_point:
        whole = torch.randint(-(2**62), 2**62, shape, generator=generator)
        return whole > 0 if dtype == torch.bool else whole.to(dtype)
    values = torch.randn(shape, generator=generator, dtype=torch.float64)
    return (values * torch.randint(-8, 9, shape, generator=generator).double().exp2()).to(dtype)


def _seed(shape: Sequence[int], dtype: torch.dtype, *key: int) -> int:
    # Not `hash`, which differs between processes.
    return random.Random(repr((tuple(shape), str(dtype), key))).getrandbits(62)


def expected_gather(shape: Sequence[int], dtype: torch.dtype, *key: int) -> torch.Tensor:
    return torch.stack([_make_on_host(shape, dtype, *key, rank) for rank in range(dist.get_world_size())])


def expected_sum(shape: Sequence[int], dtype: torch.dtype, *key: int) -> torch.Tensor:
    """Rank by rank from zero, element by element, in float32 for what is narrower, rounded at the end."""
    rank, num_ranks = dist.get_rank(), dist.get_world_size()
    wide = torch.float32 if dtype in (torch.bfloat16, torch.float16) else dtype
    total = torch.zeros(tuple(shape), dtype=wide)
    for source in range(num_ranks):
        total = total + _make_on_host((num_ranks, *shape), dtype, *key, source)[rank].to(wide)
    return total.to(dtype)


def assert_bits_equal(got: torch.Tensor, expected: torch.Tensor) -> None:
    assert (got.shape, got.dtype) == (expected.shape, expected.dtype), (got.shape, got.dtype, expected.shape)
    got, expected = got.cpu(), expected.cpu()
    if got.numel():
        same = torch.equal(got.reshape(-1).view(torch.uint8), expected.reshape(-1).view(torch.uint8))
        assert same, (got, expected)


def gather_own(buffer: ContextBuffer, shape: tuple[int, ...], dtype: torch.dtype, *key: int) -> None:
    """One all-gather out of place, one in place."""
    rank = dist.get_rank()
    own = make_tensor(shape, dtype, *key, rank)
    gathered, wait = buffer.all_gather(own)
    slot = buffer.agrs_get_inplace_tensor(shape, dtype)
    slot.copy_(own)
    gathered_in_place, wait_in_place = buffer.all_gather(slot)
    wait_in_place()
    wait()
    for result in (gathered, gathered_in_place):
        assert_bits_equal(result, expected_gather(shape, dtype, *key))
    assert gathered_in_place[rank].data_ptr() == slot.data_ptr()


def check_gathers_of_any_size() -> None:
    buffer = make_buffer()
    for shape in SHAPES:
        with buffer.agrs_new_session():
            gather_own(buffer, shape, torch.float32)


def check_gathers_of_any_dtype() -> None:
    buffer = make_buffer()
    for dtype in MOVED_DTYPES:
        with buffer.agrs_new_session():
            gather_own(buffer, (3, 5), dtype)


def check_nan_bits_arrive() -> None:
    buffer = make_buffer()
    bits = tensor([0x7FC00001 + dist.get_rank(), -1, -0x80000000], dtype=torch.int32)
    with buffer.agrs_new_session():
        gathered, wait = buffer.all_gather(bits.view(torch.float32))
        wait()
        expected = torch.stack([tensor([0x7FC00001 + r, -1, -0x80000000]) for r in range(buffer.num_ranks)])
        assert_bits_equal(gathered.view(torch.int32), expected.int())


def check_sums_of_any_size() -> None:
    buffer = make_buffer()
    for shape in SHAPES:
        with buffer.agrs_new_session():
            reduced, wait = buffer.reduce_scatter(
                make_tensor((buffer.num_ranks, *shape), torch.bfloat16, dist.get_rank())
            )
            wait()
        assert_bits_equal(reduced, expected_sum(shape, torch.bfloat16))


def check_sums_of_any_dtype() -> None:
    buffer = make_buffer()
    for dtype in SUM_DTYPES:
        with buffer.agrs_new_session():
            reduced, wait = buffer.reduce_scatter(make_tensor((buffer.num_ranks, 7, 11), dtype, dist.get_rank()))
            wait()
        # Its memory is its own: it outlives the session.
        assert_bits_equal(reduced, expected_sum((7, 11), dtype))


def check_sums_have_rank_order_and_one_rounding() -> None:
    """Four addends whose sum shows in which order they were added, and where it was rounded."""
    assert dist.get_world_size() == 4
    rank, buffer = dist.get_rank(), make_buffer()
    cases = [
        # 2^24 + 1 is 2^24 in float32, so only this order gives 1.
        (torch.float32, [2.0**24, -(2.0**24), 1, 0], 1),
        (torch.float32, [1, 2.0**24, -(2.0**24), 0], 0),
        (torch.float64, [1, 2.0**24, -(2.0**24), 0], 1),
        # A bfloat16 holds even numbers only from 256 on: rounding after each step would give 256.
        (torch.bfloat16, [256, 1, 1, 0], 258),
        # And float16 ends at 65504: the sum in between may be larger.
        (torch.float16, [60000, 60000, -60000, 0], 60000),
        (torch.int8, [100, 100, 0, 1], -55),
        # Sums start at zero, so a negative zero does not come out.
        (torch.float32, [-0.0, -0.0, -0.0, -0.0], 0),
    ]
    with buffer.agrs_new_session():
        for dtype, addends, expected in cases:
            mine = full((4, 3), addends[rank], dtype=dtype)
            reduced, wait = buffer.reduce_scatter(mine)
            wait()
            assert_bits_equal(reduced, full((3,), expected, dtype=dtype))


def check_batches() -> None:
    """Different shapes and dtypes at once, some in place on some ranks; empty ones among them."""
    buffer, rank = make_buffer(), dist.get_rank()
    kinds = [((3, 5), torch.bfloat16), ((0, 4), torch.int64), ((33,), torch.float64), ((), torch.uint8)]
    with buffer.agrs_new_session():
        *gathered, wait = buffer.all_gather([make_tensor(shape, dtype, rank) for shape, dtype in kinds])
        *reduced, wait_sums = buffer.reduce_scatter(
            tuple(make_tensor((buffer.num_ranks, *shape), dtype, rank) for shape, dtype in kinds)
        )
        wait_sums()
        wait()
        wait()
        for (shape, dtype), result, total in zip(kinds, gathered, reduced, strict=True):
            assert_bits_equal(result, expected_gather(shape, dtype))
            assert_bits_equal(total, expected_sum(shape, dtype))
        # A batch of in-place tensors is one call, and the ranks need not agree on who gathers in place.
        shapes = [(7,), (2, 2)]
        own = [make_tensor(shape, torch.int16, 1, rank) for shape in shapes]
        if rank % 2 == 0:
            slots = buffer.agrs_get_inplace_tensor(shapes, torch.int16)
            assert isinstance(slots, tuple)
            for slot, tensor in zip(slots, own, strict=True):
                slot.copy_(tensor)
            own = list(slots)
        *gathered, wait = buffer.all_gather(own)
        wait()
        for shape, result in zip(shapes, gathered, strict=True):
            assert_bits_equal(result, expected_gather(shape, torch.int16, 1))


def check_in_place_tensors_of_a_batch_may_be_gathered_one_by_one() -> None:
    buffer, rank = make_buffer(), dist.get_rank()
    shapes = [torch.Size([3]), torch.Size([5]), torch.Size([0]), torch.Size([2])]
    with buffer.agrs_new_session():
        for shape, slot in zip(shapes, buffer.agrs_get_inplace_tensor(shapes, torch.int32), strict=True):
            slot.copy_(make_tensor(shape, torch.int32, rank))
            gathered, wait = buffer.all_gather(slot)
            wait()
            assert_bits_equal(gathered, expected_gather(shape, torch.int32))


def check_results_are_views_of_one_memory() -> None:
    buffer, rank = make_buffer(), dist.get_rank()
    with buffer.agrs_new_session():
        slot = buffer.agrs_get_inplace_tensor((3, 5), torch.float32)
        again = buffer.agrs_get_inplace_tensor(torch.Size([3, 5]), torch.float32)
        assert slot.data_ptr() == again.data_ptr()
        first, wait = buffer.all_gather(slot)
        wait()
        second, wait = buffer.all_gather(ones(4))
        wait()
        storages = {tensor.untyped_storage().data_ptr() for tensor in (slot, first, second)}
        assert len(storages) == 1
        assert slot.data_ptr() - first.data_ptr() == rank * 60
        # Regions begin at multiples of 32 bytes.
        assert second.data_ptr() - first.data_ptr() == -(-60 * buffer.num_ranks // 32) * 32
        slot.fill_(7)
        assert (first[rank] == 7).all()
        before = first.data_ptr()
    with buffer.agrs_new_session():
        assert buffer.all_gather(ones(1))[0].data_ptr() == before
    buffer.close()
    # Memory is not taken from under a tensor.
    assert (slot == slot).all()


def check_gathered_tensors_may_be_summed() -> None:
    """What lies in the buffer already is an input like any other."""
    buffer, rank = make_buffer(), dist.get_rank()
    with buffer.agrs_new_session():
        gathered, wait = buffer.all_gather(make_tensor((9,), torch.float32, rank))
        wait()
        reduced, wait = buffer.reduce_scatter(gathered)
        wait()
        assert_bits_equal(reduced, sum_of_copies(make_tensor((9,), torch.float32, rank), buffer.num_ranks))


def sum_of_copies(tensor: torch.Tensor, num_copies: int) -> torch.Tensor:
    total = torch.zeros_like(tensor)
    for _ in range(num_copies):
        total = total + tensor
    return total


def check_an_exact_size_fits() -> None:
    """The size hints are enough for what they were computed from, and not for a byte more."""
    shapes = [(3, 5), (1,), (0,), (33,)]
    num_session_bytes = ContextBuffer.get_agrs_num_max_session_bytes(None, shapes, torch.bfloat16)
    num_ranks = dist.get_world_size()
    assert num_session_bytes == sum(-(-num_ranks * n * 2 // 32) * 32 for n in (15, 1, 0, 33))
    num_bytes = ContextBuffer.get_agrs_buffer_size_hint(None, num_session_bytes)
    assert num_bytes == 2 << 20
    buffer = ContextBuffer(None, num_bytes, device=SETTING.device, num_cpu_timeout_secs=60, **SETTING.options)
    buffer.agrs_set_config(num_session_bytes, 3)
    with buffer.agrs_new_session():
        for tensors in [ones(3, 5).bfloat16()], [ones(1).bfloat16(), ones(0).bfloat16()]:
            buffer.all_gather(tensors)
        buffer.reduce_scatter(ones(num_ranks, 33).bfloat16())
        with pytest.raises(ValueError, match="3 calls"):
            buffer.all_gather(ones(1).bfloat16())


def check_several_buffers_and_sessions() -> None:
    """Two buffers with a session each, open at the same time, over many sessions."""
    one, other, rank = make_buffer(), make_buffer(num_bytes=4 << 20), dist.get_rank()
    for round_idx in range(5):
        with one.agrs_new_session(), other.agrs_new_session(enabled=round_idx % 2 == 0):
            a, wait_a = one.all_gather(make_tensor((17,), torch.float32, round_idx, rank))
            if other.is_in_session:
                b, wait_b = other.all_gather(make_tensor((17,), torch.int32, round_idx, rank))
                wait_b()
                assert_bits_equal(b, expected_gather((17,), torch.int32, round_idx))
            wait_a()
            assert_bits_equal(a, expected_gather((17,), torch.float32, round_idx))
        one.agrs_set_config((1 + round_idx) << 10, 1 + round_idx)


def check_random_rounds(num_rounds: int = 200, seed: int = 0) -> None:
    """Calls of all kinds in one random order; results are looked at late, and in another order."""
    rank, num_ranks = dist.get_rank(), dist.get_world_size()
    # The same choices on every rank, but for who gathers in place.
    choice, own_choice = random.Random(seed), random.Random(repr((seed, rank)))
    buffer = make_buffer(num_bytes=2 << 20, max_calls=6)
    buffer.create_agrs_session()
    num_left, waiting = 6, []
    for round_idx in range(num_rounds):
        if num_left == 0 or choice.random() < 0.1:
            choice.shuffle(waiting)
            for check in waiting:
                check()
            waiting.clear()
            buffer.destroy_agrs_session()
            buffer.create_agrs_session()
            num_left = 6
        num_left -= 1
        dtype = choice.choice(SUM_DTYPES)
        shapes = [
            tuple(choice.choice((0, 1, 2, 3, 7, 32, 33)) for _ in range(choice.randint(0, 2)))
            for _ in range(choice.randint(1, 4))
        ]
        keys = [(round_idx, idx) for idx in range(len(shapes))]
        if choice.random() < 0.5:
            inputs = [make_tensor(shape, dtype, *key, rank) for shape, key in zip(shapes, keys, strict=True)]
            if own_choice.random() < 0.5:
                slots = buffer.agrs_get_inplace_tensor(shapes, dtype)
                for slot, tensor in zip(slots, inputs, strict=True):
                    slot.copy_(tensor)
                inputs = list(slots)
            *results, wait = buffer.all_gather(inputs[0] if len(inputs) == 1 else inputs)
            expected = expected_gather
        else:
            inputs = [
                make_tensor((num_ranks, *shape), dtype, *key, rank) for shape, key in zip(shapes, keys, strict=True)
            ]
            *results, wait = buffer.reduce_scatter(inputs[0] if len(inputs) == 1 else inputs)
            expected = expected_sum
        waiting.append(_check_later(results, wait, expected, list(zip(shapes, keys, strict=True)), dtype))
    for check in waiting:
        check()
    buffer.destroy_agrs_session()


def _check_later(
    results: Sequence[torch.Tensor],
    wait: SessionHandle,
    expected: Callable[..., torch.Tensor],
    kinds: Sequence[tuple[tuple[int, ...], tuple[int, ...]]],
    dtype: torch.dtype,
) -> Callable[[], None]:
    def check() -> None:
        wait()
        for result, (shape, key) in zip(results, kinds, strict=True):
            assert_bits_equal(result, expected(shape, dtype, *key))

    return check


def check_functions() -> None:
    """In a session and outside of one; their results outlive it."""
    buffer, rank = make_buffer(), dist.get_rank()
    num_ranks = buffer.num_ranks
    for is_in_session in (False, True):
        with buffer.agrs_new_session(enabled=is_in_session):
            one = all_gather(buffer, make_tensor((3, 5), torch.bfloat16, rank))
            # Not contiguous.
            two, three = all_gather(buffer, [make_tensor((5, 3), torch.float32, rank).t(), full((2,), rank)])
            total = reduce_scatter(buffer, make_tensor((num_ranks, 7), torch.bfloat16, rank))
            (twice,) = reduce_scatter(buffer, [make_tensor((num_ranks, 7), torch.bfloat16, rank)])
        assert_bits_equal(one, expected_gather((3, 5), torch.bfloat16))
        assert_bits_equal(two, expected_gather((5, 3), torch.float32).transpose(1, 2).contiguous())
        assert three[:, 0].tolist() == list(range(num_ranks))
        assert_bits_equal(total, expected_sum((7,), torch.bfloat16))
        assert_bits_equal(twice, total)
        assert not buffer.is_in_session


CHECKS = (
    check_gathers_of_any_size,
    check_gathers_of_any_dtype,
    check_nan_bits_arrive,
    check_sums_of_any_size,
    check_sums_of_any_dtype,
    check_batches,
    check_in_place_tensors_of_a_batch_may_be_gathered_one_by_one,
    check_results_are_views_of_one_memory,
    check_gathered_tensors_may_be_summed,
    check_an_exact_size_fits,
    check_several_buffers_and_sessions,
    check_random_rounds,
    check_functions,
)
