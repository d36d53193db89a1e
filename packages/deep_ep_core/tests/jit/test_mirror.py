"""Struct mirrors are held against the CUDA header by each compiler, and each way to be wrong is found."""

from __future__ import annotations

import dataclasses
import enum
import shutil
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from deep_ep_core.jit import (
    CompileJob,
    Compiler,
    ConfigStruct,
    Float32,
    Int32,
    Int64,
    ParamsStruct,
    Pointer,
    UInt64,
    mirror_source,
)


def compile_mirror(compiler: Compiler, toy: ModuleType, struct: Any) -> str:
    """The compiler's log, empty if the mirror agrees."""
    job = CompileJob(source=mirror_source("toy/scale.cuh", [struct]), arch="sm_90a", include_dirs=(toy.INCLUDE_DIR,))
    output = compiler.compile(job)
    return output.log if output.cubin is None else ""


def scale_fields(toy: ModuleType, **changes: Any) -> tuple[tuple[str, Any], ...]:
    return tuple((name, changes.get(name, kind)) for name, kind in toy.ScaleParams._fields_)


def params_struct(fields: tuple[tuple[str, Any], ...]) -> type[ParamsStruct]:
    return type("Params", (ParamsStruct,), {"__slots__": (), "cuda_name": "toy::ScaleParams", "_fields_": fields})


def test_right_mirrors_compile(real_compiler: Compiler, toy: ModuleType) -> None:
    assert compile_mirror(real_compiler, toy, toy.ScaleParams) == ""
    assert compile_mirror(real_compiler, toy, toy.ScaleConfig) == ""


@pytest.mark.parametrize(
    ("member", "kind", "words"),
    [
        ("bias", Int32, "kKindOf<decltype(toy::ScaleParams::bias)> == 'i'"),
        ("first_idx", UInt64, "kKindOf<decltype(toy::ScaleParams::first_idx)> == 'u'"),
        ("num_arrived", Int64, "kKindOf<decltype(toy::ScaleParams::num_arrived)> == 'i'"),
        ("stamps", UInt64 * 3, "sizeof(toy::ScaleParams::stamps) == 24"),
    ],
)
def test_member_of_another_type_is_found(
    real_compiler: Compiler, toy: ModuleType, member: str, kind: Any, words: str
) -> None:
    """Most of these have the size and offset of the right type."""
    assert words in compile_mirror(real_compiler, toy, params_struct(scale_fields(toy, **{member: kind})))


def test_swapped_members_are_found(real_compiler: Compiler, toy: ModuleType) -> None:
    fields = list(scale_fields(toy))
    fields[0], fields[3] = fields[3], fields[0]
    log = compile_mirror(real_compiler, toy, params_struct(tuple(fields)))
    assert "ScaleParams, num_arrived) == 0" in log


def test_member_that_hides_in_padding_is_found(real_compiler: Compiler, toy: ModuleType, tmp_path: Path) -> None:
    """Sizes and offsets agree without it; the count of members does not."""
    copy = tmp_path / "include"
    shutil.copytree(toy.INCLUDE_DIR, copy)
    header = copy / "toy" / "scale.cuh"
    header.write_text(header.read_text().replace("bool is_reversed;", "bool is_reversed;\n    bool is_hidden;"))
    job = CompileJob(source=mirror_source("toy/scale.cuh", [toy.ScaleParams]), arch="sm_90a", include_dirs=(copy,))
    output = real_compiler.compile(job)
    assert output.cubin is None
    assert "static assertion" not in output.log


def test_wrong_nested_struct_is_found(real_compiler: Compiler, toy: ModuleType) -> None:
    class Vector(ParamsStruct):
        __slots__ = ()
        cuda_name = "toy::Vector"
        _fields_ = (("values", Pointer), ("num_values", Float32))

    log = compile_mirror(real_compiler, toy, params_struct(scale_fields(toy, y=Vector)))
    assert "kKindOf<decltype(toy::Vector::num_values)> == 'f'" in log


def config_struct(*members: tuple[str, Any]) -> Any:
    namespace = {"cuda_name": "toy::ScaleConfig"}
    return dataclasses.make_dataclass("Config", members, bases=(ConfigStruct,), namespace=namespace, frozen=True)


def test_wrong_enum_value_is_found(real_compiler: Compiler, toy: ModuleType) -> None:
    class Wait(enum.IntEnum):
        NOTHING = 0
        GRID = 2

    log = compile_mirror(real_compiler, toy, config_struct(("factor", int), ("wait", Wait), ("has_bias", bool)))
    assert "decltype(toy::ScaleConfig::wait)::kGrid) == 2" in log


def test_wrong_kind_of_a_config_member_is_found(real_compiler: Compiler, toy: ModuleType) -> None:
    log = compile_mirror(real_compiler, toy, config_struct(("factor", bool), ("wait", toy.Wait), ("has_bias", bool)))
    assert "kKindOf<decltype(toy::ScaleConfig::factor)> == 'b'" in log


@pytest.mark.parametrize("names", [("wait", "factor", "has_bias"), ("factor", "wait")])
def test_config_with_other_members_is_found(real_compiler: Compiler, toy: ModuleType, names: tuple[str, ...]) -> None:
    """Swapped, and one short: C++ would take its default for what is not named."""
    types = {"factor": int, "wait": toy.Wait, "has_bias": bool}
    assert compile_mirror(real_compiler, toy, config_struct(*((name, types[name]) for name in names))) != ""
