"""The toy kernels of these tests: mirrors of include/toy/scale.cuh and their specs."""

from __future__ import annotations

import enum
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from deep_ep_core.jit import (
    Bool,
    ConfigStruct,
    Float32,
    Int32,
    Int64,
    KernelSpec,
    ParamsStruct,
    Pointer,
    UInt64,
)

INCLUDE_DIR = Path(__file__).parent / "include"
MAX_THREADS = 256


class Wait(enum.IntEnum):
    NOTHING = 0
    GRID = 1
    CLUSTER = 2
    PREVIOUS_KERNEL = 3


@dataclass(frozen=True, slots=True, kw_only=True)
class ScaleConfig(ConfigStruct):
    cuda_name: ClassVar[str] = "toy::ScaleConfig"
    factor: int = 3
    wait: Wait = Wait.NOTHING
    has_bias: bool = True


class Vector(ParamsStruct):
    __slots__ = ()
    cuda_name = "toy::Vector"
    _fields_ = (("values", Pointer), ("num_values", Int32))


class ScaleParams(ParamsStruct):
    __slots__ = ()
    cuda_name = "toy::ScaleParams"
    _fields_ = (
        ("x", Pointer),
        ("y", Vector),
        ("bias", Float32),
        ("num_arrived", Pointer),
        ("stamps", UInt64 * 2),
        ("first_idx", Int64),
        ("is_reversed", Bool),
    )


def scale_spec(
    config: ScaleConfig | None = None,
    *,
    label: str = "scale",
    header: str = "toy/scale.cuh",
    function: str = "toy::scale",
    include_dirs: Sequence[Path] = (INCLUDE_DIR,),
    needs_nccl: bool = False,
) -> KernelSpec:
    return KernelSpec(
        label=label,
        header=header,
        function=function,
        params_type=ScaleParams,
        include_dirs=tuple(include_dirs),
        max_threads_per_block=MAX_THREADS,
        config=config or ScaleConfig(),
        needs_nccl=needs_nccl,
    )


def all_specs() -> list[KernelSpec]:
    """One variant a way of waiting, as `python -m deep_ep_core.jit precompile toy_kernels:all_specs` takes them."""
    return [scale_spec(ScaleConfig(wait=wait)) for wait in Wait]


def broken_specs() -> list[KernelSpec]:
    """A variant that compiles between two that do not."""
    first, second = (scale_spec(label=f"broken{idx}", function="toy::no_such_function") for idx in range(2))
    return [first, scale_spec(), second]
