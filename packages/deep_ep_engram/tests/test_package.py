"""Sizes, the demo, and what the package shows."""

import importlib
import json
import pkgutil
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import deep_ep_engram
from deep_ep_engram import EngramTable, demo, get_engram_storage_size_hint

# A name more is a promise more; a name less breaks somebody.
PUBLIC_NAMES = [
    "EngramTable",
    "FetchHook",
    "Fetched",
    "__version__",
    "engram_fetch",
    "engram_write",
    "get_engram_storage_size_hint",
]


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ((524288, 128, 512 * 24), (4_194_304, 134_217_728)),
        ((524288, 128, 512 * 24, torch.float8_e4m3fn), (2_097_152, 67_108_864)),
        ((0, 128, 0), (0, 0)),
        # Rows of 2 bytes count as 32.
        ((65536, 1, 65537), (4_194_304, 2_097_152)),
    ],
)
def test_size_hint_is_that_of_upstream(arguments, expected):
    assert get_engram_storage_size_hint(*arguments) == expected
    assert EngramTable.get_engram_storage_size_hint(*arguments) == expected


def run_demo(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "deep_ep_engram.demo", *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)


def test_demo_on_four_ranks_equals_the_unsharded_table():
    done = run_demo("--entries", "777", "--hidden", "33")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "777 entries of 33 bfloat16 over 4 ranks" in done.stdout
    assert "all ranks: equal to the unsharded table, to the bit" in done.stdout


def test_demo_refuses_what_it_cannot_run():
    done = run_demo("--entries", "0")
    assert done.returncode == 2
    assert "--entries and --hidden must be positive" in done.stderr


def run_bench(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "deep_ep_engram.bench", *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)


def test_bench_prints_a_json_line_a_case():
    done = run_bench("--device", "cpu", "--ranks", "2", "--rounds", "2", "--scale-down", "256")
    assert done.returncode == 0, done.stdout + done.stderr
    records = [json.loads(line) for line in done.stdout.splitlines()]
    assert [(record["case"], record["memory"]) for record in records] == [
        ("rows-4k", "device"),
        ("rows-4k", "host"),
        ("ngrams", "device"),
        ("ngrams", "host"),
    ]
    for record in records:
        assert (record["op"], record["backend"], record["num_ranks"], record["num_nodes"]) == (
            "fetch",
            "collective",
            2,
            1,
        )
        assert 0 < record["min_ms"] <= record["median_ms"] <= record["max_ms"]
        assert record["ratio_to_local"] == record["median_ms"] / record["local_ms"]
        assert record["baseline_ms"] > 0
        assert record["command"].startswith("python -m deep_ep_engram.bench --device cpu")
    # Both ranks read and write 32 rows of 4 KiB on one device.
    assert records[0]["bytes_moved"] == 2 * 2 * 32 * 4096


def test_bench_refuses_a_case_that_there_is_not():
    done = run_bench("--cases", "rows-4k", "none")
    assert done.returncode == 2
    assert "--cases must be of rows-4k, ngrams (got none)" in done.stderr


def test_ngrams_that_end_alike_have_the_same_entries():
    """An index depends on the last three tokens and on nothing else, and on all of them."""
    tokens = torch.tensor([5, 1, 2, 3, 9, 1, 2, 3, 1, 3])
    indices = demo.ngram_indices(tokens, 10**6, num_heads=4)
    assert indices.shape == (10, 8)
    assert torch.equal(indices[3], indices[7])
    assert torch.equal(indices[2, :4], indices[6, :4]), "2-grams"
    assert not (indices[2, 4:] == indices[6, 4:]).any(), "3-grams"
    assert not (indices[3] == indices[9]).any()
    assert len(indices.unique()) > 60
    assert demo.ngram_indices(tokens[:1], 7, num_heads=1).shape == (1, 2)


def test_the_package_shows_these_names():
    assert sorted(deep_ep_engram.__all__) == sorted(PUBLIC_NAMES)
    for name in PUBLIC_NAMES:
        assert getattr(deep_ep_engram, name) is not None


def test_every_module_says_what_it_owns_and_has_what_it_names():
    for info in pkgutil.walk_packages(deep_ep_engram.__path__, "deep_ep_engram."):
        module = importlib.import_module(info.name)
        assert module.__doc__.startswith("Owns "), info.name
        for name in getattr(module, "__all__", ()):
            assert hasattr(module, name), (info.name, name)


def test_version_is_that_of_the_project_file():
    text = (Path(__file__).parents[1] / "pyproject.toml").read_text()
    assert re.search(r'^version = "(.+)"$', text, flags=re.MULTILINE)[1] == deep_ep_engram.__version__
