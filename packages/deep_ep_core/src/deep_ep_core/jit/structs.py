"""Owns the Python side of the structs that kernels take: config structs (compile time), parameter structs (run time).

Each struct is written by hand twice, in a CUDA header and here; `mirror` has the compiler prove that the two agree.
What a kernel does with the values is not known here.
"""

from __future__ import annotations

import ctypes
import dataclasses
import enum
from typing import Any, ClassVar

from deep_ep_core.errors import ConfigError

__all__ = [
    "Bool",
    "ConfigStruct",
    "Float32",
    "Int32",
    "Int64",
    "ParamsStruct",
    "Pointer",
    "UInt32",
    "UInt64",
    "opaque",
]

Pointer = ctypes.c_void_p
Int32 = ctypes.c_int32
UInt32 = ctypes.c_uint32
Int64 = ctypes.c_int64
UInt64 = ctypes.c_uint64
Float32 = ctypes.c_float
Bool = ctypes.c_bool

_MIN_INT64, _END_INT64, _END_UINT64 = -(2**63), 2**63, 2**64


def opaque(num_bytes: int) -> type[ctypes.Array[ctypes.c_uint64]]:
    """Field type for a struct that is passed by value and whose members are not mirrored.

    Args:
        num_bytes: `sizeof` of the struct, a multiple of 8; its alignment must be 8.

    Raises:
        ConfigError: The size is no positive multiple of 8.
    """
    if num_bytes <= 0 or num_bytes % 8:
        raise ConfigError(f"an opaque field must be a positive multiple of 8 bytes (got {num_bytes})")
    return ctypes.c_uint64 * (num_bytes // 8)


class ConfigStruct:
    """Base of config structs: what a kernel is specialised by, rendered as a template argument.

    A subclass is a frozen dataclass with slots, whose fields have the names and the order of the C++ struct's members
    and are `int`, `bool`, an `enum.IntEnum` or another config struct:

        @dataclass(frozen=True, slots=True, kw_only=True)
        class CopyConfig(ConfigStruct):
            cuda_name: ClassVar[str] = "deep_ep_core::CopyConfig"
            num_warps: int
            is_async: bool

    The members of an enum are named `kSomeName` in C++ where Python says `SOME_NAME`.
    """

    __slots__ = ()
    cuda_name: ClassVar[str]
    """Qualified name of the C++ struct."""
    __dataclass_fields__: ClassVar[dict[str, dataclasses.Field[Any]]]

    def render(self) -> str:
        """The struct as a C++20 aggregate with designated initialisers.

        Raises:
            ConfigError: A value has no C++ form.
        """
        members = (f".{field.name} = {self._render_value(field.name)}" for field in dataclasses.fields(self))
        return f"{self.cuda_name}{{{', '.join(members)}}}"

    def _render_value(self, name: str) -> str:
        value = getattr(self, name)
        if isinstance(value, ConfigStruct):
            return value.render()
        if isinstance(value, bool):
            return "true" if value else "false"
        if isinstance(value, enum.IntEnum):
            return f"static_cast<decltype({self.cuda_name}::{name})>({value.value})"
        # The smallest int64 has no literal in C++: the minus is an operator on a number that is out of range.
        if isinstance(value, int) and _MIN_INT64 < value < _END_UINT64:
            return f"{value}u" if value >= _END_INT64 else str(value)
        raise ConfigError(
            f"{type(self).__name__}.{name} must be a bool, an int of 64 bits, an IntEnum or a ConfigStruct "
            f"(got {value!r})"
        )


class ParamsStruct(ctypes.Structure):
    """Base of parameter structs: what a kernel is passed at each launch, by value.

    A subclass names the C++ struct and lists the fields in its order, with the types of this module, ctypes arrays
    (`Pointer * 8`) or other parameter structs:

        class CopyParams(ParamsStruct):
            __slots__ = ()
            cuda_name = "deep_ep_core::CopyParams"
            _fields_ = (("x", Pointer), ("num_tokens", Int32))

    Args:
        values: A value for every field. A pointer is an integer address or None. Integers are not range checked here.

    Raises:
        ConfigError: A field is missing, or there is none of that name.
    """

    __slots__ = ()
    cuda_name: ClassVar[str]
    """Qualified name of the C++ struct."""
    _field_names: ClassVar[frozenset[str]] = frozenset()

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        # Without slots a misspelt assignment would make a new attribute, and the kernel would see the old value.
        if "__slots__" not in cls.__dict__ or "_fields_" not in cls.__dict__ or not hasattr(cls, "cuda_name"):
            raise TypeError(f"{cls.__name__} must define cuda_name, _fields_ and `__slots__ = ()`")
        cls._field_names = frozenset(field[0] for field in cls.__dict__["_fields_"])

    def __init__(self, **values: object) -> None:
        # ctypes would leave a field that is not named at zero.
        if values.keys() != self._field_names:
            missing, unknown = self._field_names - values.keys(), values.keys() - self._field_names
            raise ConfigError(
                f"{type(self).__name__} must be given each of its fields once "
                f"(missing: {sorted(missing) or 'none'}, unknown: {sorted(unknown) or 'none'})"
            )
        super().__init__(**values)
