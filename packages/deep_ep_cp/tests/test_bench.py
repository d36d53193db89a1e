"""The benchmark: what it counts, its lines, and its options; the figures themselves are no test."""

from __future__ import annotations

import json
import subprocess
import sys
from collections import Counter

import pytest

from deep_ep_core.errors import ConfigError
from deep_ep_cp.bench import __main__ as bench_main
from deep_ep_cp.bench.cases import OPS, Case
from deep_ep_cp.bench.profile import kernels_among

# The fields that the design gives a record and that mean something here, in its order.
FIELDS = [
    *("op", "backend", "device", "driver", "nccl", "torch", "commit", "command", "num_ranks", "num_ranks_of_device"),
    *("slot_bytes", "dtype", "median_ms", "min_ms", "max_ms", "bytes_moved", "copy_gbs", "floor_ms"),
    *("ratio_to_floor", "baseline_ms"),
]


@pytest.mark.parametrize(
    ("op", "num_bytes"),
    [
        # Four slots read and written.
        ("all_gather", 4 * 2 * 1000),
        # Three: its own lies there.
        ("all_gather_in_place", 3 * 2 * 1000),
        # Four addends read and written, four read and the sum written.
        ("reduce_scatter", 4 * 2 * 1000 + 5 * 1000),
    ],
)
def test_bytes_of_a_rank_are_those_it_reads_and_writes(op, num_bytes):
    assert Case(op=op, slot_bytes=1000, num_ranks=4).bytes_of_rank == num_bytes


def test_a_line_of_each_case_has_the_fields_of_the_design():
    command = [sys.executable, "-m", "deep_ep_cp.bench", "--device", "cpu", "--ranks", "2", "--kib", "1,64"]
    done = subprocess.run(
        [*command, "--rounds", "3", "--warmup", "1"], capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    records = [json.loads(line) for line in done.stdout.splitlines()]
    assert [(record["slot_bytes"], record["op"]) for record in records] == [
        (slot_bytes, op) for slot_bytes in (1024, 65536) for op in OPS
    ]
    for record in records:
        assert list(record) == FIELDS
        assert record["backend"] == "collective"
        assert record["device"] is None
        assert 0 < record["min_ms"] <= record["median_ms"] <= record["max_ms"]
        assert record["baseline_ms"] > 0
        assert record["num_ranks_of_device"] == 2
        floor_ms = record["bytes_moved"] / 1e6 / record["copy_gbs"]
        assert record["floor_ms"] == pytest.approx(floor_ms)
        assert record["ratio_to_floor"] == pytest.approx(record["median_ms"] / floor_ms)
        assert "--kib 1,64" in record["command"]


@pytest.mark.parametrize("arguments", [["--ops", "gather"], ["--kib", "0"], ["--ranks", "x"], ["--rounds", "0"]])
def test_bad_options_end_with_the_usage(arguments, capsys):
    with pytest.raises(SystemExit, match="2"):
        bench_main.main(arguments)
    said = capsys.readouterr().err
    assert "usage: python -m deep_ep_cp.bench" in said
    assert "must be" in said


def test_a_profile_needs_a_gpu():
    options = bench_main._parser().parse_args(["--device", "cpu", "--profile"])
    with pytest.raises(ConfigError, match="--profile needs a GPU"):
        bench_main._open_session(options)


def test_only_copies_and_fills_are_no_kernels():
    seen = Counter({"Memcpy DtoD (Device -> Device)": 4, "Memset (Device)": 1, "void copy_kernel<4>()": 2})
    assert kernels_among(seen) == ["void copy_kernel<4>()"]
