from __future__ import annotations

from pathlib import Path

import pytest

from deep_ep_core.errors import CompileError
from deep_ep_core.jit.headers import reach_headers


def write(root: Path, **texts: str) -> Path:
    (root / "mine").mkdir(parents=True, exist_ok=True)
    for name, text in texts.items():
        (root / "mine" / f"{name}.cuh").write_text(text)
    return root


def names(root: Path, first: str = "mine/first.cuh") -> list[str]:
    return [header.name for header in reach_headers(first, [root])]


def test_includes_are_followed_through_every_step(tmp_path: Path) -> None:
    write(tmp_path, first="#include <mine/second.cuh>", second="  #  include <mine/third.cuh>  // why", third="x")
    assert names(tmp_path) == ["mine/first.cuh", "mine/second.cuh", "mine/third.cuh"]


def test_text_of_each_header_is_returned(tmp_path: Path) -> None:
    write(tmp_path, first="#include <mine/second.cuh>", second="int x;")
    assert [header.text for header in reach_headers("mine/first.cuh", [tmp_path])] == [
        "#include <mine/second.cuh>",
        "int x;",
    ]


def test_cycle_ends(tmp_path: Path) -> None:
    write(tmp_path, first="#include <mine/second.cuh>", second="#include <mine/first.cuh>")
    assert names(tmp_path) == ["mine/first.cuh", "mine/second.cuh"]


def test_header_of_another_include_directory_is_found(tmp_path: Path) -> None:
    first = write(tmp_path / "a", first="#include <theirs/base.cuh>")
    (tmp_path / "b" / "theirs").mkdir(parents=True)
    (tmp_path / "b" / "theirs" / "base.cuh").write_text("")
    found = reach_headers("mine/first.cuh", [first, tmp_path / "b"])
    assert [header.name for header in found] == ["mine/first.cuh", "theirs/base.cuh"]


def test_quotes_look_beside_the_includer_first(tmp_path: Path) -> None:
    write(tmp_path, first='#include "second.cuh"', second="beside")
    (tmp_path / "second.cuh").write_text("at the root")
    assert names(tmp_path) == ["mine/first.cuh", "mine/second.cuh"]


def test_one_header_spelt_in_two_ways_counts_once(tmp_path: Path) -> None:
    write(tmp_path, first='#include "second.cuh"\n#include <mine/second.cuh>', second="")
    assert names(tmp_path) == ["mine/first.cuh", "mine/second.cuh"]


def test_headers_of_the_system_are_not_followed(tmp_path: Path) -> None:
    write(tmp_path, first="#include <cstdint>\n#include <cuda/std/atomic>\n#include <nccl_device.h>")
    assert names(tmp_path) == ["mine/first.cuh"]


def test_include_in_a_comment_is_not_followed(tmp_path: Path) -> None:
    write(
        tmp_path, first='/*\n#include <mine/a.cuh>\n*/\n// #include <mine/b.cuh>\nauto s = "/*";\n#include <mine/c.cuh>'
    )
    write(tmp_path, c="")
    assert names(tmp_path) == ["mine/c.cuh", "mine/first.cuh"]


def test_missing_header_is_an_error_with_the_way_to_it(tmp_path: Path) -> None:
    write(tmp_path, first="#include <mine/second.cuh>", second="#include <mine/gone.cuh>")
    with pytest.raises(CompileError, match=r"mine/gone\.cuh must exist") as caught:
        names(tmp_path)
    assert caught.value.log == "mine/first.cuh -> mine/second.cuh -> mine/gone.cuh"
    assert str(tmp_path) in str(caught.value)


def test_missing_first_header_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(CompileError, match=r"nowhere/first\.cuh must exist"):
        names(tmp_path, "nowhere/first.cuh")


def test_missing_quoted_header_is_an_error(tmp_path: Path) -> None:
    write(tmp_path, first='#include "gone.h"')
    with pytest.raises(CompileError, match=r"gone\.h must exist"):
        names(tmp_path)


def test_include_that_names_no_file_is_refused(tmp_path: Path) -> None:
    """The key could not cover what a macro brings in."""
    write(tmp_path, first="#include MY_HEADER")
    with pytest.raises(CompileError, match=r"got `#include MY_HEADER` in mine/first\.cuh"):
        names(tmp_path)
