"""Ranks that really share a GPU. `test_mps.py` has what can be shown without one."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import gpu_rank
import pytest

from deep_ep_core.errors import RankFailedError
from deep_ep_core.local.gpus import find_gpus

pytestmark = pytest.mark.gpu

GPU_RANK = str(Path(__file__).parent / "programs" / "gpu_rank.py")
SUM = 999 * 1000 // 2
HAS_MPS = shutil.which("nvidia-cuda-mps-control") is not None
# A machine with a GPU may be one without MPS; then the launch says so.
NO_MPS = "share 1 GPU without MPS (nvidia-cuda-mps-control is not on PATH)"


@pytest.fixture
def launch(gpu_rank_pool, tmp_path, monkeypatch):
    """`launch(num_ranks, action)` runs `gpu_rank.py` on the first GPU alone."""
    # One MPS server at a time, so that a failure has one cause.
    gpu_rank_pool.close()
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", find_gpus(os.environ)[0])

    def run(num_ranks: int, action: str, *options: str) -> subprocess.CompletedProcess[str]:
        folder = tmp_path / action
        folder.mkdir(exist_ok=True)
        command = [sys.executable, "-m", "deep_ep_core.launch", "--ranks", str(num_ranks), "--device", "cuda"]
        return subprocess.run(
            [*command, "--timeout", "120", *options, GPU_RANK, action, str(folder)],
            capture_output=True,
            text=True,
            timeout=200,
            check=False,
        )

    return run


def reports(done: subprocess.CompletedProcess[str]) -> list[dict]:
    """What the ranks printed, by rank, once it is sure that they ended well."""
    assert done.returncode == 0, done.stdout + done.stderr
    shown = {int(rank): json.loads(text) for rank, text in re.findall(r"^\[rank (\d+)\] (\{.*\})$", done.stdout, re.M)}
    return [shown[rank] for rank in sorted(shown)]


def assert_private_daemon(done: subprocess.CompletedProcess[str]) -> str | None:
    """Whether all ranks had one MPS daemon, which is gone now; its folder, or None where there is no MPS."""
    folders = {report["environment"].get("CUDA_MPS_PIPE_DIRECTORY") for report in reports(done)}
    assert len(folders) == 1
    (folder,) = folders
    if not HAS_MPS:
        assert NO_MPS in done.stderr
        return None
    assert "without MPS" not in done.stderr, done.stderr
    assert folder is not None
    assert not Path(folder).parent.exists()
    return folder


@pytest.mark.parametrize(("num_ranks", "options"), [(2, []), (4, ["--nodes", "2"])], ids=["2 ranks", "2 nodes of 2"])
def test_ranks_of_a_launch_share_one_gpu(launch, num_ranks, options):
    done = launch(num_ranks, "report", *options)
    assert_private_daemon(done)
    shown = reports(done)
    assert [report["sum"] for report in shown] == [SUM] * num_ranks
    assert {report["gpu"] for report in shown} == {os.environ["CUDA_VISIBLE_DEVICES"]}
    for report in shown:
        assert report["environment"]["NCCL_MULTI_RANK_GPU_ENABLE"] == "1"


def test_ranks_of_a_launch_take_turns_without_mps(launch):
    done = launch(2, "report", "--mps", "off")
    shown = reports(done)
    assert [report["sum"] for report in shown] == [SUM] * 2
    assert "CUDA_MPS_PIPE_DIRECTORY" not in shown[0]["environment"]
    assert "without MPS" not in done.stderr


def test_launch_after_one_whose_rank_was_killed_inside_a_kernel_works(launch):
    before = assert_private_daemon(launch(2, "report"))
    killed = launch(2, "kill")
    assert killed.returncode == 137, killed.stdout + killed.stderr
    assert "rank 1 failed first: killed by SIGKILL" in killed.stderr
    done = launch(2, "report")
    after = assert_private_daemon(done)
    assert [report["sum"] for report in reports(done)] == [SUM] * 2
    assert not HAS_MPS or after != before


def test_pool_whose_rank_was_killed_inside_a_kernel_works_after_a_restart(gpu_rank_pool, monkeypatch):
    gpu_rank_pool.close()
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", find_gpus(os.environ)[0])
    try:
        ranks = gpu_rank_pool(2)
        first = ranks.run(gpu_rank.report)
        assert [report["sum"] for report in first] == [SUM] * 2
        with pytest.raises(RankFailedError, match="killed by SIGKILL"):
            ranks.run(gpu_rank.die_while_kernel_runs)
        assert ranks.is_broken
        ranks = gpu_rank_pool(2)
        second = ranks.run(gpu_rank.report)
        assert [report["sum"] for report in second] == [SUM] * 2
        if HAS_MPS:
            folders = [shown[0]["environment"]["CUDA_MPS_PIPE_DIRECTORY"] for shown in (first, second)]
            assert folders[0] != folders[1]
    finally:
        # Its ranks see one GPU only; those of other tests shall see all.
        gpu_rank_pool.close()
