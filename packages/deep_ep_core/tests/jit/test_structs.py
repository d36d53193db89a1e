from __future__ import annotations

import ctypes
from dataclasses import dataclass
from types import ModuleType
from typing import ClassVar

import pytest

from deep_ep_core.errors import ConfigError
from deep_ep_core.jit import ConfigStruct, Int32, ParamsStruct, Pointer, opaque


@dataclass(frozen=True, slots=True, kw_only=True)
class Inner(ConfigStruct):
    cuda_name: ClassVar[str] = "toy::Inner"
    size: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Outer(ConfigStruct):
    cuda_name: ClassVar[str] = "toy::Outer"
    is_on: bool
    inner: Inner
    count: object


class Pair(ParamsStruct):
    __slots__ = ()
    cuda_name = "toy::Pair"
    _fields_ = (("x", Pointer), ("num_tokens", Int32))


def test_config_is_rendered_in_the_order_of_its_fields() -> None:
    text = Outer(is_on=True, inner=Inner(size=-4), count=7).render()
    assert text == "toy::Outer{.is_on = true, .inner = toy::Inner{.size = -4}, .count = 7}"


def test_enum_is_rendered_by_the_type_of_its_member(toy: ModuleType) -> None:
    """So that the C++ name of the enum need not be known here."""
    assert ".wait = static_cast<decltype(toy::ScaleConfig::wait)>(2)" in toy.ScaleConfig(wait=toy.Wait.CLUSTER).render()


@pytest.mark.parametrize(
    ("value", "text"),
    [(2**31, "2147483648"), (2**63 - 1, "9223372036854775807"), (2**64 - 1, "18446744073709551615u")],
)
def test_wide_integers_are_rendered_as_literals_that_hold_them(value: int, text: str) -> None:
    assert f".count = {text}}}" in Outer(is_on=False, inner=Inner(size=0), count=value).render()


@pytest.mark.parametrize("value", [1.5, "7", None, 2**64, -(2**63)])
def test_value_without_a_literal_is_refused(value: object) -> None:
    with pytest.raises(ConfigError, match=r"Outer\.count must be a bool, an int of 64 bits"):
        Outer(is_on=False, inner=Inner(size=0), count=value).render()


def test_params_hold_what_they_are_given() -> None:
    pair = Pair(x=4096, num_tokens=-3)
    assert (pair.x, pair.num_tokens) == (4096, -3)
    assert bytes(pair)[:12] == (4096).to_bytes(8, "little") + (-3).to_bytes(4, "little", signed=True)


def test_missing_field_is_refused() -> None:
    """ctypes would pass zero to the kernel."""
    with pytest.raises(ConfigError, match=r"missing: \['num_tokens'\], unknown: none"):
        Pair(x=4096)


def test_misspelt_field_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"missing: \['num_tokens'\], unknown: \['num_token'\]"):
        Pair(x=4096, num_token=1)


def test_misspelt_assignment_is_refused() -> None:
    """It would make a new attribute, and the kernel would see the old value."""
    pair = Pair(x=4096, num_tokens=1)
    with pytest.raises(AttributeError, match="num_token"):
        pair.num_token = 2


def test_params_struct_without_slots_is_refused() -> None:
    with pytest.raises(TypeError, match="__slots__"):

        class _NoSlots(ParamsStruct):
            cuda_name = "toy::NoSlots"
            _fields_ = (("x", Pointer),)


def test_opaque_field_has_the_size_and_alignment_asked_for() -> None:
    field = opaque(248)
    assert (ctypes.sizeof(field), ctypes.alignment(field)) == (248, 8)


@pytest.mark.parametrize("num_bytes", [0, -8, 12])
def test_opaque_field_of_a_broken_size_is_refused(num_bytes: int) -> None:
    with pytest.raises(ConfigError, match="multiple of 8 bytes"):
        opaque(num_bytes)
