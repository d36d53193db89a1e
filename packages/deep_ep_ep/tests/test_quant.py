from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from deep_ep_core.errors import ConfigError
from deep_ep_ep.quant import (
    ScaleFormat,
    cast_from_fp8,
    cast_to_fp8,
    pack_ue8m0,
    to_tma_aligned_col_major,
    unpack_ue8m0,
)

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]
FORMATS: list[ScaleFormat] = ["float32", "ue8m0"]


@pytest.fixture(params=DEVICES)
def device(request: pytest.FixtureRequest) -> torch.device:
    if request.param == "cuda" and not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    return torch.device(request.param)


def make_tokens(num_tokens: int, hidden: int, *, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    """Values whose size changes from row to row and group to group, so that the scale of a wrong place cannot pass."""
    generator = torch.Generator().manual_seed(seed)
    values = torch.randn(num_tokens, hidden, generator=generator)
    rows = torch.arange(num_tokens).unsqueeze(1)
    columns = torch.arange(hidden).unsqueeze(0)
    return (values * torch.exp2((rows * 3 + columns // 16 * 5) % 23 - 8.0)).to(dtype)


def reference_scale(amax: float) -> float:
    """amax / 448 in float32, by way of a double: the double quotient of two float32 rounds to the right float32."""
    return torch.tensor(max(amax, float(torch.tensor(1e-4))) / 448, dtype=torch.float64).float().item()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize(("hidden", "group_size"), [(128, 128), (512, 128), (200, 128), (31, 32), (33, 32), (96, 32)])
def test_scale_is_amax_of_its_group_over_448(
    device: torch.device, hidden: int, group_size: int, dtype: torch.dtype
) -> None:
    """Also where the last group is short: only its own channels count."""
    x = make_tokens(5, hidden, dtype=dtype) / 64
    payload, scales = cast_to_fp8(x.to(device), group_size=group_size)

    assert payload.dtype == torch.float8_e4m3fn
    assert payload.shape == (5, hidden)
    assert payload.is_contiguous()
    assert scales.dtype == torch.float32
    assert scales.shape == (5, -(-hidden // group_size))
    expected = [[reference_scale(group.abs().max().item()) for group in row.split(group_size)] for row in x.float()]
    assert scales.cpu().tolist() == expected


@pytest.mark.parametrize("scale_format", FORMATS)
@pytest.mark.parametrize(("hidden", "group_size"), [(512, 128), (200, 128), (33, 32), (7168, 128), (3, 1)])
def test_round_trip_error_is_within_half_a_step_of_e4m3(
    device: torch.device, hidden: int, group_size: int, scale_format: ScaleFormat
) -> None:
    """Three mantissa bits round a normal value by at most 2^-4 of itself, and a subnormal by half a step of 2^-9.

    Two float32 roundings on the way (multiplier, product) and one back add at most 2^-21 of the value together.
    """
    x = make_tokens(9, hidden, seed=1)
    payload, scales = cast_to_fp8(x.to(device), group_size=group_size, scale_format=scale_format)
    back = cast_from_fp8(payload, scales, group_size=group_size, dtype=torch.float32).cpu()

    num_groups = -(-hidden // group_size)
    factors = scales.cpu() if scale_format == "float32" else unpack_ue8m0(scales.cpu(), num_groups)
    factors = factors.repeat_interleave(group_size, dim=1)[:, :hidden].double()
    bound = torch.maximum(x.abs().double() * (2**-4 + 2**-21), factors * 2**-10 * (1 + 2**-21))
    assert ((back.double() - x.double()).abs() <= bound).all()


def test_float32_scales_map_the_largest_value_to_448(device: torch.device) -> None:
    """Random amax values, so that some products round to just over 448: they must be 448, not NaN."""
    amax = torch.rand(20000, 1, generator=torch.Generator().manual_seed(2)) * 1000 + 1
    payload, _ = cast_to_fp8(torch.cat([amax, -amax / 2], dim=1).to(device))
    assert (payload.float()[:, 0] == 448).all()
    assert (payload.float()[:, 1] == -224).all()


@pytest.mark.parametrize("scale_format", FORMATS)
def test_group_of_zeros_comes_back_as_zeros(device: torch.device, scale_format: ScaleFormat) -> None:
    x = torch.zeros(3, 256, device=device)
    x[1, 5] = 7.0
    payload, scales = cast_to_fp8(x, scale_format=scale_format)
    assert torch.equal(cast_from_fp8(payload, scales, dtype=torch.float32).cpu(), x.cpu())


def test_amax_is_never_taken_below_1e_minus_4(device: torch.device) -> None:
    _, scales = cast_to_fp8(torch.full((1, 128), 1e-6, device=device))
    assert scales.item() == reference_scale(1e-4)


@pytest.mark.parametrize("exponent", [-10, -3, 0, 1, 7, 100])
def test_rounded_scale_is_the_next_power_of_two(device: torch.device, exponent: int) -> None:
    """At a power of two it stays; one float32 step above, it doubles. A logarithm in floats gets one of them wrong."""
    at_power = torch.tensor(448.0 * 2.0**exponent)
    above = torch.nextafter(at_power, torch.tensor(math.inf))
    below = torch.nextafter(at_power, torch.tensor(0.0))
    x = torch.stack([below, at_power, above, above * 1.9]).unsqueeze(1).to(device)
    _, scales = cast_to_fp8(x, round_scales=True)
    # 448 is 1.75 * 2^8, so one step up of the dividend is more than half a step of the quotient: it shows.
    power = 2.0**exponent
    assert scales.flatten().tolist() == [power, power, 2 * power, 2 * power]


def test_rounded_scales_leave_the_payload_exact_for_small_integers(device: torch.device) -> None:
    """Division by a power of two rounds nothing, so values with 3 mantissa bits survive the round trip bit for bit."""
    x = torch.tensor([[448.0, 1.0, -0.5, 15.0, 13.0, -208.0, 0.0]], device=device).repeat(3, 1)
    x *= torch.tensor([[1.0], [2.0**20], [2.0**-5]], device=device)
    payload, scales = cast_to_fp8(x, round_scales=True)
    assert scales.flatten().tolist() == [1.0, 2.0**20, 2.0**-5]
    assert torch.equal(cast_from_fp8(payload, scales, dtype=torch.float32), x)


@pytest.mark.parametrize("num_groups", [1, 3, 4, 5, 8])
def test_packed_scales_are_the_rounded_scales_packed(device: torch.device, num_groups: int) -> None:
    x = make_tokens(6, num_groups * 32).to(device)
    payload, packed = cast_to_fp8(x, group_size=32, scale_format="ue8m0")
    payload_rounded, scales_rounded = cast_to_fp8(x, group_size=32, round_scales=True)
    assert packed.dtype == torch.int32
    assert packed.shape == (6, -(-num_groups // 4))
    assert packed.is_contiguous()
    assert torch.equal(packed, pack_ue8m0(scales_rounded))
    assert torch.equal(unpack_ue8m0(packed, num_groups), scales_rounded)
    assert torch.equal(payload.view(torch.uint8), payload_rounded.view(torch.uint8))


@pytest.mark.parametrize("scale_format", FORMATS)
def test_zero_tokens_work(device: torch.device, scale_format: ScaleFormat) -> None:
    payload, scales = cast_to_fp8(torch.empty(0, 640, device=device), scale_format=scale_format)
    assert payload.shape == (0, 640)
    assert scales.shape == ((0, 5) if scale_format == "float32" else (0, 2))
    assert cast_from_fp8(payload, scales).shape == (0, 640)
    assert to_tma_aligned_col_major(scales).shape == scales.shape


@pytest.mark.parametrize("scale_format", FORMATS)
@pytest.mark.parametrize("bad", [math.inf, -math.inf, math.nan])
def test_non_finite_group_comes_back_as_nan_and_leaves_its_neighbours_alone(
    device: torch.device, bad: float, scale_format: ScaleFormat
) -> None:
    """A corrupt activation must stay visible, not turn into a plausible number."""
    x = make_tokens(2, 96).to(device)
    x[0, 40] = bad
    payload, scales = cast_to_fp8(x, group_size=32, scale_format=scale_format)
    back = cast_from_fp8(payload, scales, group_size=32, dtype=torch.float32)
    is_nan = back.isnan()
    assert is_nan[0, 32:64].all()
    is_nan[0, 32:64] = False
    assert not is_nan.any()


def test_strided_input_gives_the_same_as_contiguous(device: torch.device) -> None:
    wide = make_tokens(7, 400).to(device)
    view = wide[:, 50:306].t().contiguous().t()
    for got, expected in zip(cast_to_fp8(view), cast_to_fp8(view.contiguous()), strict=True):
        assert torch.equal(got.view(torch.uint8), expected.view(torch.uint8))


@pytest.mark.parametrize("scale_format", FORMATS)
def test_results_carry_no_graph(device: torch.device, scale_format: ScaleFormat) -> None:
    x = make_tokens(2, 128).to(device).requires_grad_()
    payload, scales = cast_to_fp8(x, scale_format=scale_format)
    assert not payload.requires_grad
    assert not scales.requires_grad
    assert not cast_from_fp8(payload, scales).requires_grad


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("scale_format", FORMATS)
def test_cuda_gives_the_bits_of_cpu(scale_format: ScaleFormat) -> None:
    """Torch divides a CUDA tensor by a number through a reciprocal; one bit off here would change a rounded scale."""
    x = make_tokens(257, 7168, dtype=torch.bfloat16)
    for got, expected in zip(
        cast_to_fp8(x.cuda(), scale_format=scale_format), cast_to_fp8(x, scale_format=scale_format), strict=True
    ):
        assert torch.equal(got.cpu().view(torch.uint8), expected.view(torch.uint8))


@pytest.mark.parametrize("scale_format", FORMATS)
@pytest.mark.parametrize("num_tokens", [1, 3, 4, 5])
def test_scales_of_any_strides_are_read(device: torch.device, num_tokens: int, scale_format: ScaleFormat) -> None:
    x = make_tokens(num_tokens, 32 * 9).to(device)
    payload, scales = cast_to_fp8(x, group_size=32, scale_format=scale_format)
    expected = cast_from_fp8(payload, scales, group_size=32)
    every_second = torch.zeros(num_tokens, 2 * scales.shape[1], dtype=scales.dtype, device=device)[:, ::2]
    every_second.copy_(scales)
    for strided in (to_tma_aligned_col_major(scales), every_second, scales.t().contiguous().t()):
        assert torch.equal(cast_from_fp8(payload, strided, group_size=32), expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_dequantised_value_is_payload_times_scale_rounded_once(device: torch.device, dtype: torch.dtype) -> None:
    payload, scales = cast_to_fp8(make_tokens(4, 200).to(device) / 1024, group_size=64)
    factors = scales.repeat_interleave(64, dim=1)[:, :200]
    back = cast_from_fp8(payload, scales, group_size=64, dtype=dtype)
    assert back.dtype == dtype
    assert back.is_contiguous()
    assert torch.equal(back, (payload.float() * factors).to(dtype))


def test_group_sits_in_the_byte_of_its_number(device: torch.device) -> None:
    """Group 4 i + j is byte j of pack i, least significant first, and bytes without a group are 0."""
    scales = torch.tensor([[2.0**0, 2.0**1, 2.0**-2, 2.0**127, 2.0**-126]], device=device)
    packed = pack_ue8m0(scales)
    words = [word & 0xFFFFFFFF for word in packed[0].tolist()]
    assert words == [127 | 128 << 8 | 125 << 16 | 254 << 24, 1]


def test_every_power_of_two_survives_packing(device: torch.device) -> None:
    exponents = range(-127, 128)
    scales = torch.tensor([2.0**e for e in exponents], device=device)
    packed = pack_ue8m0(scales)
    assert packed.shape == (64,)
    assert packed.contiguous().view(torch.uint8)[:255].tolist() == [e + 127 for e in exponents]
    assert unpack_ue8m0(packed, 255).tolist() == [2.0**e for e in exponents]


def test_byte_255_is_nan(device: torch.device) -> None:
    packed = torch.tensor([[0xFF << 8]], dtype=torch.int32, device=device)
    assert unpack_ue8m0(packed, 2).isnan().tolist() == [[False, True]]


@pytest.mark.parametrize("shape", [(5,), (3, 5), (2, 3, 5), (0, 5)])
def test_leading_axes_are_kept(device: torch.device, shape: tuple[int, ...]) -> None:
    """Low-latency outputs have one more axis, and column-major ones are not contiguous."""
    exponents = torch.arange(math.prod(shape)).reshape(shape) % 100 - 50
    scales = torch.exp2(exponents.float()).to(device)
    packed = pack_ue8m0(scales)
    assert packed.shape == (*shape[:-1], 2)
    assert torch.equal(unpack_ue8m0(packed, 5), scales)
    if len(shape) > 1:
        column_major = scales.transpose(-1, -2).contiguous().transpose(-1, -2)
        assert torch.equal(pack_ue8m0(column_major), packed)
        packed_column_major = packed.transpose(-1, -2).contiguous().transpose(-1, -2)
        assert torch.equal(unpack_ue8m0(packed_column_major, 5), scales)


@pytest.mark.parametrize(
    "bad", [0.0, -0.0, -1.0, -(2.0**-127), 3.0, 1.0000001, 2.0**-128, 2.0**-127 * 1.5, 2.0**-149, math.inf, math.nan]
)
def test_scale_that_is_no_power_of_two_is_refused(device: torch.device, bad: float) -> None:
    scales = torch.ones(3, 5, device=device)
    scales[1, 4] = bad
    with pytest.raises(ConfigError, match=r"at \[1, 4\], 1 such in all"):
        pack_ue8m0(scales)


@pytest.mark.parametrize("dtype", [torch.float32, torch.int32])
@pytest.mark.parametrize("num_packs", [1, 14])
@pytest.mark.parametrize("num_tokens", [0, 1, 3, 4, 5, 31, 32, 33])
def test_column_major_scales_start_every_column_at_16_bytes(
    device: torch.device, num_tokens: int, num_packs: int, dtype: torch.dtype
) -> None:
    scales = torch.arange(1, num_tokens * num_packs + 1, device=device).reshape(num_tokens, num_packs).to(dtype)
    column_major = to_tma_aligned_col_major(scales)
    column_packs = (num_tokens + 3) // 4 * 4
    assert column_major.shape == (num_tokens, num_packs)
    assert column_major.stride() == (1, column_packs)
    assert column_major.dtype == dtype
    assert torch.equal(column_major, scales)
    # TMA reads whole columns: the padding of the last one must exist too.
    assert column_major.untyped_storage().nbytes() == 4 * num_packs * column_packs
    whole = column_major.as_strided((num_packs, column_packs), (column_packs, 1))
    assert not whole[:, num_tokens:].any()


def test_column_major_copy_does_not_alias(device: torch.device) -> None:
    scales = torch.ones(4, 2, device=device)
    first = to_tma_aligned_col_major(scales)
    second = to_tma_aligned_col_major(first)
    second.zero_()
    assert first.eq(1).all()
    assert scales.eq(1).all()


X = torch.ones(2, 256)
PAYLOAD, SCALES = cast_to_fp8(X)


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: cast_to_fp8(torch.ones(256)), r"\[num_tokens, hidden\].*got \[256\]"),
        (lambda: cast_to_fp8(torch.ones(2, 0)), "hidden at least 1"),
        (lambda: cast_to_fp8(X.double()), "got torch.float64"),
        (lambda: cast_to_fp8(X, group_size=0), "group_size must be at least 1"),
        (lambda: cast_to_fp8(X, scale_format="e8m0"), "got 'e8m0'"),  # type: ignore[arg-type]
        (lambda: cast_to_fp8(X, scale_format="ue8m0", round_scales=False), "powers of two"),
        (lambda: cast_from_fp8(X, SCALES), "float8_e4m3fn"),
        (lambda: cast_from_fp8(PAYLOAD, SCALES.double()), "got torch.float64"),
        (lambda: cast_from_fp8(PAYLOAD, SCALES, group_size=64), r"must be \[2, 4\].*got \[2, 2\]"),
        (lambda: cast_from_fp8(PAYLOAD, SCALES.view(torch.int32)), r"must be \[2, 1\].*got \[2, 2\]"),
        (lambda: cast_from_fp8(PAYLOAD, SCALES[:1]), r"must be \[2, 2\].*got \[1, 2\]"),
        (lambda: cast_from_fp8(PAYLOAD, SCALES.to("meta")), "got meta"),
        (lambda: cast_from_fp8(PAYLOAD, SCALES, dtype=torch.int32), "floating-point"),
        (lambda: pack_ue8m0(torch.ones(2, 4, dtype=torch.float16)), "got .* torch.float16"),
        (lambda: pack_ue8m0(torch.tensor(1.0)), "num_groups"),
        (lambda: pack_ue8m0(torch.ones(2, 0)), "num_groups at least 1"),
        (lambda: unpack_ue8m0(torch.ones(2, 1), 4), "int32"),
        (lambda: unpack_ue8m0(torch.ones(2, 2, dtype=torch.int32), 4), "got 4"),
        (lambda: unpack_ue8m0(torch.ones(2, 2, dtype=torch.int32), 9), "got 9"),
        (lambda: unpack_ue8m0(torch.ones(2, 0, dtype=torch.int32), 0), "got 0"),
        (lambda: to_tma_aligned_col_major(torch.ones(4)), r"got \[4\]"),
        (lambda: to_tma_aligned_col_major(torch.ones(4, 2, dtype=torch.bfloat16)), "got .* torch.bfloat16"),
    ],
)
def test_wrong_argument_is_named(call: object, words: str) -> None:
    assert callable(call)
    with pytest.raises(ConfigError, match=words):
        call()
