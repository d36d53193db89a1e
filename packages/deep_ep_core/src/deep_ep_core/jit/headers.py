"""Owns the set of header texts that a kernel reaches through `#include`, which is what its cache key must cover.

Followed are the headers that lie in the given include directories. The toolkit's and NCCL's headers are not followed:
their versions and texts enter the key in other ways (see `cache` and `toolchain`).
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from deep_ep_core.errors import CompileError

__all__ = ["Header", "reach_headers"]

_STRING_OR_COMMENT = re.compile(
    r"""("(?:\\.|[^"\\\n])*" | '(?:\\.|[^'\\\n])*') | //[^\n]* | /\*.*?\*/""", re.VERBOSE | re.DOTALL
)
_INCLUDE = re.compile(r"^[ \t]*\#[ \t]*include[ \t]*(?P<what>.*?)[ \t]*$", re.MULTILINE)
_INCLUDE_NAME = re.compile(r"<(?P<angle>[^>]+)>|\"(?P<quote>[^\"]+)\"")


@dataclass(frozen=True, slots=True)
class Header:
    """A header that a kernel reaches.

    Attributes:
        name: Its path below the include directory that holds it; the same in every installation.
        text: Its text.
    """

    name: str
    text: str


def reach_headers(header: str, include_dirs: Sequence[Path]) -> tuple[Header, ...]:
    """The header and everything of the include directories that it includes, in any number of steps.

    A cycle ends at the header that was seen before, as `#pragma once` ends it for the compiler. Conditions are not
    evaluated: an include in any branch counts.

    Args:
        header: Name of the first header below an include directory.
        include_dirs: Where to look, the first match counting.

    Returns:
        The headers, sorted by name.

    Raises:
        CompileError: A header that must lie in the include directories does not. Must means: it is the first one, it is
            included with quotes, or it lies in a folder of that name; `<cstdint>` and the like need not.
    """
    found: dict[str, Header] = {}
    pending: list[tuple[str, Path | None, tuple[str, ...]]] = [(header, None, ())]
    owned_folders = {entry.name for root in include_dirs if root.is_dir() for entry in root.iterdir() if entry.is_dir()}
    while pending:
        name, quoting_folder, chain = pending.pop()
        path = _find(name, quoting_folder, include_dirs)
        if path is None:
            is_owned = not chain or quoting_folder is not None or name.split("/")[0] in owned_folders
            if is_owned:
                raise _missing(name, chain, include_dirs)
            continue
        canonical = _name_below(path, include_dirs)
        if canonical in found:
            continue
        text = path.read_text(encoding="utf-8")
        found[canonical] = Header(canonical, text)
        next_chain = (*chain, canonical)
        for next_name, is_quoted in _includes(text, next_chain):
            pending.append((next_name, path.parent if is_quoted else None, next_chain))
    return tuple(found[name] for name in sorted(found))


def _find(name: str, quoting_folder: Path | None, include_dirs: Sequence[Path]) -> Path | None:
    folders = [*([] if quoting_folder is None else [quoting_folder]), *include_dirs]
    for folder in folders:
        path = folder / name
        if path.is_file():
            return path
    return None


def _name_below(path: Path, include_dirs: Sequence[Path]) -> str:
    absolute = os.path.abspath(path)
    for root in include_dirs:
        relative = os.path.relpath(absolute, os.path.abspath(root))
        if not relative.startswith(os.pardir):
            return Path(relative).as_posix()
    return path.name


def _includes(text: str, chain: tuple[str, ...]) -> Iterator[tuple[str, bool]]:
    """Each included name, and whether quotes stand around it."""
    for match in _INCLUDE.finditer(_STRING_OR_COMMENT.sub(lambda found: found[1] or " ", text)):
        name = _INCLUDE_NAME.fullmatch(match["what"])
        if name is None:
            raise CompileError(
                f"an #include must name its file, so that the cache key can cover it (got `{match[0].strip()}` in "
                f"{chain[-1]}); write the name out",
                command=f"resolve the includes of {chain[0]}",
                log=" -> ".join(chain),
            )
        yield name["angle"] or name["quote"], name["quote"] is not None


def _missing(name: str, chain: tuple[str, ...], include_dirs: Sequence[Path]) -> CompileError:
    path_text = " -> ".join((*chain, name))
    folders = ", ".join(str(folder) for folder in include_dirs) or "no folder"
    return CompileError(
        f"the header {name} must exist (searched {folders}; included through {path_text}); reinstall the package "
        "that owns it, or correct the include",
        command=f"resolve the includes of {(*chain, name)[0]}",
        log=path_text,
    )
