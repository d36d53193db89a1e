"""Owns the proof, by a CUDA compiler, that structs in CUDA headers agree with their Python mirrors.

Every generated kernel asserts the layout of its parameter struct; `mirror_source` asserts all that can be asserted, and
is for tests and for `python -m deep_ep_core.jit check`. The mirrors themselves are written in `structs`.
"""

from __future__ import annotations

import ctypes
import dataclasses
import enum
import typing
from collections.abc import Iterator, Sequence
from typing import Any

from deep_ep_core.jit.structs import (
    Bool,
    ConfigStruct,
    Float32,
    Int32,
    Int64,
    ParamsStruct,
    Pointer,
    UInt32,
    UInt64,
)

__all__ = ["layout_asserts", "mirror_source"]


Struct = type[ConfigStruct] | type[ParamsStruct]

# A macro, since a member's name is no value. NVRTC learnt the usual word for it only after 13.0; it has always
# known that of its front end, which the host compiler behind nvcc does not know.
_OFFSETOF_SOURCE = """#ifdef __CUDACC_RTC__
#define DEEP_EP_CORE_OFFSETOF(type, member) __INTADDR__(&((type*)0)->member)
#else
#define DEEP_EP_CORE_OFFSETOF(type, member) __builtin_offsetof(type, member)
#endif"""


def layout_asserts(params_type: type[ParamsStruct]) -> str:
    """The `static_assert`s that hold a parameter struct's layout against its Python mirror, nested structs included.

    They need no standard header, so that both compilers take them.
    """
    structs = (struct for struct in _with_nested([params_type]) if issubclass(struct, ParamsStruct))
    return "\n".join([_OFFSETOF_SOURCE, *(line for struct in structs for line in _layout_lines(struct))]) + "\n"


def mirror_source(header: str, structs: Sequence[Struct]) -> str:
    """A translation unit that compiles only if every struct agrees with its Python mirror, nested structs included.

    Proved of parameter structs: size, alignment, number of members, and each member's offset, size and kind (pointer,
    signed, unsigned, floating point, bool). Proved of config structs: names, order and number of members, each member's
    kind, and the value of each enum member.

    Args:
        header: The header that declares the structs, as it stands between the angle brackets of an `#include`.
        structs: The mirrors.
    """
    blocks = [f"#include <{header}>\n", _OFFSETOF_SOURCE, _KIND_SOURCE]
    for struct_idx, struct in enumerate(_with_nested(structs)):
        if issubclass(struct, ConfigStruct):
            lines, num_members = _config_lines(struct), len(dataclasses.fields(struct))
        else:
            lines, num_members = _params_lines(struct), len(struct._fields_)
        blocks.append("\n".join([*lines, *_count_lines(struct, num_members, struct_idx)]) + "\n")
    return "\n".join(blocks)


# Classes, arrays and vectors have no kind: their size and offset must do.
_KIND_SOURCE = """\
namespace deep_ep_core_mirror {
template <bool kIsEnum> struct Other { static constexpr char kKind = kIsEnum ? 'e' : '?'; };
template <class T> struct Of : Other<__is_enum(T)> {};
template <class T> struct Of<const T> : Of<T> {};
template <class T> struct Of<T*> { static constexpr char kKind = 'p'; };
template <class T> struct Of<T* __restrict__> { static constexpr char kKind = 'p'; };
template <> struct Of<bool> { static constexpr char kKind = 'b'; };
template <> struct Of<float> { static constexpr char kKind = 'f'; };
template <> struct Of<double> { static constexpr char kKind = 'f'; };
template <> struct Of<int> { static constexpr char kKind = 'i'; };
template <> struct Of<long> { static constexpr char kKind = 'i'; };
template <> struct Of<long long> { static constexpr char kKind = 'i'; };
template <> struct Of<unsigned> { static constexpr char kKind = 'u'; };
template <> struct Of<unsigned long> { static constexpr char kKind = 'u'; };
template <> struct Of<unsigned long long> { static constexpr char kKind = 'u'; };
template <class T> constexpr char kKindOf = Of<T>::kKind;
}  // namespace deep_ep_core_mirror
"""

_SCALAR_KINDS: dict[Any, str] = {
    Pointer: "p",
    Bool: "b",
    Float32: "f",
    Int32: "i",
    Int64: "i",
    UInt32: "u",
    UInt64: "u",
}


def _with_nested(structs: Sequence[Struct]) -> list[Struct]:
    """The structs and every struct inside them, innermost first, each once."""
    found: dict[Struct, None] = {}
    for struct in structs:
        if issubclass(struct, ConfigStruct):
            member_types: list[Any] = list(typing.get_type_hints(struct).values())
        else:
            member_types = [_element_type(field[1]) for field in struct._fields_]
        bases = (ConfigStruct, ParamsStruct)
        nested = [kind for kind in member_types if isinstance(kind, type) and issubclass(kind, bases)]
        found.update(dict.fromkeys([*_with_nested(nested), struct]))
    return list(found)


def _element_type(field_type: Any) -> Any:
    while issubclass(field_type, ctypes.Array):
        field_type = field_type._type_
    return field_type


# The compiler prints the line of an assert that fails, and with it what was asserted.
_MESSAGE = "the Python mirror differs"


def _assert_line(expression: str, expected: int) -> str:
    return f'static_assert({expression} == {expected}, "{_MESSAGE}");'


def _layout_lines(struct: type[ParamsStruct]) -> Iterator[str]:
    name = struct.cuda_name
    yield _assert_line(f"sizeof({name})", ctypes.sizeof(struct))
    yield _assert_line(f"alignof({name})", ctypes.alignment(struct))
    for field in struct._fields_:
        descriptor = getattr(struct, field[0])
        yield _assert_line(f"DEEP_EP_CORE_OFFSETOF({name}, {field[0]})", descriptor.offset)
        yield _assert_line(f"sizeof({name}::{field[0]})", descriptor.size)


def _kind_line(name: str, member: str, kinds: str) -> str:
    kind = f"deep_ep_core_mirror::kKindOf<decltype({name}::{member})>"
    test = " || ".join(f"{kind} == '{letter}'" for letter in kinds)
    return f'static_assert({test}, "{_MESSAGE}");'


def _params_lines(struct: type[ParamsStruct]) -> Iterator[str]:
    yield from _layout_lines(struct)
    for field in struct._fields_:
        kind = _SCALAR_KINDS.get(field[1])
        if kind is not None:
            # An enum class travels as the integer below it.
            yield _kind_line(struct.cuda_name, field[0], f"{kind}e" if kind in "iu" else kind)


def _config_lines(struct: type[ConfigStruct]) -> Iterator[str]:
    name, hints, fields = struct.cuda_name, typing.get_type_hints(struct), dataclasses.fields(struct)
    # Designated initialisers must stand in the order of the members.
    yield f"static_assert(sizeof({name}{{{', '.join(f'.{field.name} = {{}}' for field in fields)}}}) > 0);"
    for field in fields:
        hint = hints[field.name]
        if issubclass(hint, enum.IntEnum):
            yield _kind_line(name, field.name, "e")
            for item in hint:
                expression = f"static_cast<long long>(decltype({name}::{field.name})::{_constant_name(item.name)})"
                yield _assert_line(expression, item.value)
        elif not issubclass(hint, ConfigStruct):
            yield _kind_line(name, field.name, "b" if hint is bool else "iu")


def _constant_name(python_name: str) -> str:
    return "k" + "".join(part.capitalize() for part in python_name.split("_"))


def _count_lines(struct: Struct, num_members: int, struct_idx: int) -> Iterator[str]:
    """A structured binding, which compiles only with exactly one name for each member."""
    names = ", ".join(f"member{member_idx}" for member_idx in range(num_members))
    yield f"[[maybe_unused]] static __device__ void num_members_{struct_idx}(const {struct.cuda_name}& whole) {{"
    yield f"    [[maybe_unused]] const auto& [{names}] = whole;"
    yield "}"
