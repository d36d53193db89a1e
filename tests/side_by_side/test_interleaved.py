"""Packages that share a process group do not disturb each other: calls interleaved, results right."""

from __future__ import annotations

import interleaved
import pytest

COMPANIES = [("pp",), ("cp",), ("ep",), ("pp", "cp", "ep")]
IDS = ["+".join(names) for names in COMPANIES]


@pytest.mark.parametrize("num_ranks", [2, 4])
@pytest.mark.parametrize("names", COMPANIES, ids=IDS)
def test_a_table_beside_others_on_one_group(rank_pool, names, num_ranks):
    compared = rank_pool(num_ranks).run(interleaved.run_side_by_side, names, "cpu", "collective")
    assert compared == [12 * (1 + len(names))] * num_ranks


@pytest.mark.gpu
@pytest.mark.parametrize("backend", ["collective", "device"])
@pytest.mark.parametrize("names", COMPANIES, ids=IDS)
def test_a_table_beside_others_on_gpus(gpu_rank_pool, names, backend):
    compared = gpu_rank_pool(4).run(interleaved.run_side_by_side, names, "cuda", backend, timeout_s=120)
    assert compared == [12 * (1 + len(names))] * 4
