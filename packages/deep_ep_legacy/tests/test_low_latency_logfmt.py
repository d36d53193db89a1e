"""LogFMT-10: what is encoded, how exact it is, and where its bits lie."""

import math

import pytest
import torch

from deep_ep_legacy.logfmt import MAX_LOG2_SPAN, MAX_RELATIVE_ERROR, decode_rows, encode_rows


def small_rows(num_rows, num_channels, exponent_span):
    """Values of both signs below 1 that span the given powers of two in every group."""
    generator = torch.Generator().manual_seed(num_rows)
    exponents = torch.rand(num_rows, num_channels, generator=generator) * -exponent_span - 1
    signs = torch.randint(0, 2, exponents.shape, generator=generator) * 2 - 1
    return (signs * torch.exp2(exponents)).to(torch.bfloat16)


def round_trip(rows):
    message = encode_rows(rows)
    assert message.dtype == torch.uint8
    return decode_rows(message, *rows.shape), len(message)


@pytest.mark.parametrize("num_channels", [512, 1024, 1536, 7168])
@pytest.mark.parametrize("num_rows", [0, 1, 5])
@pytest.mark.parametrize("exponent_span", [0.5, 4, 31])
def test_encoded_values_come_back_within_the_bound(num_rows, num_channels, exponent_span):
    rows = small_rows(num_rows, num_channels, exponent_span)
    decoded, num_bytes = round_trip(rows)
    torch.testing.assert_close(decoded, rows.float(), rtol=MAX_RELATIVE_ERROR, atol=0)
    assert num_bytes == num_rows * (num_channels * 10 // 8 + num_channels // 128 * 4)


def test_narrow_groups_are_more_exact():
    """The step is a 510th of the span of the group."""
    rows = small_rows(4, 1024, 2)
    step = 2.0 / 510
    decoded, _ = round_trip(rows)
    torch.testing.assert_close(decoded, rows.float(), rtol=(2**step - 1) / (2**step + 1) + 2e-5, atol=0)


def test_two_neighbouring_magnitudes_near_the_smallest_exponent_stay_apart_from_zero():
    """The narrowest scale at the largest logarithms: an error in the last bit of log2 is most of a step."""
    rows = torch.full((1, 512), 2.0**-120, dtype=torch.bfloat16)
    rows[:, ::2] = 2.0**-120 * (1 + 2**-7)
    decoded, num_bytes = round_trip(rows)
    assert num_bytes == 512 * 10 // 8 + 4 * 4
    torch.testing.assert_close(decoded, rows.float(), rtol=2e-4, atol=0)


def test_zeros_come_back_as_zeros():
    rows = small_rows(3, 512, 6)
    rows[:, ::3] = 0
    decoded, _ = round_trip(rows)
    assert bool((decoded[:, ::3] == 0).all())
    torch.testing.assert_close(decoded, rows.float(), rtol=MAX_RELATIVE_ERROR, atol=0)


def test_values_far_below_the_largest_lose_no_more_than_its_span():
    rows = torch.full((1, 512), 0.5, dtype=torch.bfloat16)
    rows[:, 1::2] = 2.0**-60
    decoded, _ = round_trip(rows)
    torch.testing.assert_close(decoded, rows.float(), rtol=MAX_RELATIVE_ERROR, atol=0.5 * 2.0**-MAX_LOG2_SPAN)


@pytest.mark.parametrize("spoil", ["a one", "an infinity", "a NaN", "equal magnitudes", "zeros only"])
def test_chunk_with_an_unfit_group_stays_as_it_is(spoil):
    """And the other chunks are encoded all the same."""
    rows = small_rows(2, 1536, 4)
    group = rows[1, 512 + 128 : 512 + 256]
    if spoil == "equal magnitudes":
        group[:] = -0.25
    elif spoil == "zeros only":
        group[:] = 0
    else:
        group[7] = {"a one": 1.0, "an infinity": math.inf, "a NaN": math.nan}[spoil]
    decoded, num_bytes = round_trip(rows)
    assert num_bytes == 2 * 12 * 4 + 5 * 640 + 1024
    torch.testing.assert_close(decoded[1, 512:1024], rows[1, 512:1024].float(), rtol=0, atol=0, equal_nan=True)
    torch.testing.assert_close(decoded[0], rows[0].float(), rtol=MAX_RELATIVE_ERROR, atol=0)


def test_sixteen_values_fill_five_words():
    """Nine bits of code a value from the lowest bit up, then sixteen of signs in the upper half of the last word."""
    rows = small_rows(1, 512, 4)
    message = encode_rows(rows)
    # The pairs of four groups come first.
    first_pack = int.from_bytes(bytes(message[16:36].tolist()), "little")
    codes = [(first_pack >> (9 * value)) & 511 for value in range(16)]
    signs = [(first_pack >> (144 + value)) & 1 for value in range(16)]
    assert signs == [int(value < 0) for value in rows[0, :16].tolist()]
    magnitudes = rows[0, :128].float().abs().tolist()
    low, high = math.log2(min(magnitudes)), math.log2(max(magnitudes))
    step = (high - low) / 510
    for code, magnitude in zip(codes, magnitudes, strict=False):
        assert abs(2 ** (low + (code - 1) * step) - magnitude) <= magnitude * (2**step - 1)
    assert max(codes) > min(codes) >= 1
