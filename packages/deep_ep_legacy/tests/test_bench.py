"""The benchmark of low-latency calls, as far as it needs no GPU: what it counts, and what it says."""

from __future__ import annotations

import dataclasses
import json

import pytest

from deep_ep_legacy.bench.__main__ import main
from deep_ep_legacy.bench.low_latency import Sizes
from deep_ep_legacy.bench.report import Record, table_head, table_row

SIZES = Sizes(num_tokens=128, hidden=7168, num_topk=8, num_experts=256)


def make_record(**changes: object) -> Record:
    values: dict[str, object] = dict.fromkeys(field.name for field in dataclasses.fields(Record))
    values.update(
        op="dispatch",
        backend="device",
        device="a GPU",
        torch="2.14",
        command="python -m deep_ep_legacy.bench",
        num_ranks=8,
        num_nodes=1,
        num_tokens=128,
        hidden=7168,
        num_topk=8,
        num_experts=256,
        dtype="fp8",
        layout="expert",
        median_ms=0.0772,
        min_ms=0.07,
        max_ms=0.08,
        bytes_moved=10**8,
        copy_gbs=3000.0,
        mode="graph",
        has_hook=True,
    )
    return Record(**{**values, **changes})  # type: ignore[arg-type]


def test_rates_are_counted_as_deepep_counts_them() -> None:
    """Its published 98 GB/s of a dispatch in 77 us and 127 GB/s of a combine in 114 us, on 8 ranks."""
    assert SIZES.num_selections * SIZES.row_bytes("fp8") / 77e-6 / 1e9 == pytest.approx(98, abs=1)
    assert SIZES.num_selections * SIZES.row_bytes("bf16") / 114e-6 / 1e9 == pytest.approx(127, abs=2)
    assert SIZES.row_bytes("logfmt") == 7168 * 10 // 8 + 7168 // 128 * 4


def test_least_bytes_are_rows_once_in_and_once_out() -> None:
    tokens, rows = 128 * 7168 * 2, 128 * 8
    assert SIZES.least_bytes("dispatch", "bf16") == tokens + rows * 7168 * 2
    assert SIZES.least_bytes("dispatch", "fp8") == tokens + rows * (7168 + 7168 // 128 * 4)
    assert SIZES.least_bytes("combine", "bf16") == rows * 7168 * 2 + tokens


def test_record_is_one_line_of_json_without_made_up_values() -> None:
    line = make_record().to_json()
    assert "\n" not in line
    told = json.loads(line)
    assert list(told) == [field.name for field in dataclasses.fields(Record)]
    assert (told["op"], told["driver"], told["baseline_ms"]) == ("dispatch", None, None)


def test_table_shows_microseconds_and_dashes_for_what_is_not_known() -> None:
    record = make_record()
    assert "8 ranks, device backend" in table_head(record)
    cells = table_row(record).split()
    assert cells == ["dispatch", "fp8", "graph", "yes", "77.2", "70.0", "80.0", "-", "-", "-"]
    heading = table_head(record).splitlines()[-1]
    assert len(heading) == len(table_row(make_record(floor_ms=0.05, ratio_to_floor=1.5, v1_gbs=98.5)))


def test_wrong_arguments_end_with_the_usage(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["--tokens", "many"])
    assert ended.value.code == 2
    assert "usage: python -m deep_ep_legacy.bench" in capsys.readouterr().err
