from __future__ import annotations

import pytest

from deep_ep_core.align import align_up, ceil_div
from deep_ep_core.errors import ConfigError


@pytest.mark.parametrize(
    ("value", "divisor", "quotient"),
    [(0, 1, 0), (0, 32, 0), (1, 32, 1), (31, 32, 1), (32, 32, 1), (33, 32, 2), (7, 3, 3), (9, 3, 3)],
)
def test_quotient_is_rounded_up(value: int, divisor: int, quotient: int) -> None:
    assert ceil_div(value, divisor) == quotient


def test_quotient_is_exact_beyond_float_precision() -> None:
    """A float on the way would lose the last bit: 2^60 + 1 has no double."""
    assert ceil_div(2**60 + 1, 2) == 2**59 + 1
    assert align_up(2**60 + 1, 2**21) == 2**60 + 2**21


@pytest.mark.parametrize("alignment", [1, 2, 3, 4, 32, 100, 128])
@pytest.mark.parametrize("value", [0, 1, 31, 32, 33, 127, 128, 129, 1000])
def test_aligned_value_is_the_next_multiple(value: int, alignment: int) -> None:
    aligned = align_up(value, alignment)
    assert aligned % alignment == 0
    assert value <= aligned < value + alignment


@pytest.mark.parametrize("step", [0, -1])
def test_step_below_one_is_refused(step: int) -> None:
    with pytest.raises(ConfigError, match=rf"divisor must be at least 1 \(got {step}\)"):
        ceil_div(8, step)
    with pytest.raises(ConfigError, match="at least 1"):
        align_up(8, step)


def test_negative_value_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"value must be at least 0 \(got -1\)"):
        align_up(-1, 8)
