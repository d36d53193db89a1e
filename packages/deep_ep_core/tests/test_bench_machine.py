"""Which facts about a machine the records of benchmarks get, and that none is made up."""

from __future__ import annotations

import subprocess
from pathlib import Path

import torch

from deep_ep_core import bench_machine
from deep_ep_core.bench_machine import commit_of, read_machine


def git(folder: Path, *arguments: str) -> str:
    identity = ["-c", "user.name=a", "-c", "user.email=a@b", "-c", "commit.gpgsign=false"]
    done = subprocess.run(["git", "-C", str(folder), *identity, *arguments], check=True, capture_output=True, text=True)
    return done.stdout.strip()


def test_commit_is_that_of_the_checkout_which_tracks_the_file(tmp_path):
    git(tmp_path, "init", "--quiet")
    tracked, untracked = tmp_path / "tracked.py", tmp_path / "untracked.py"
    for file in (tracked, untracked):
        file.write_text("1\n")
    git(tmp_path, "add", "tracked.py")
    git(tmp_path, "commit", "--quiet", "-m", "m")
    git(tmp_path, "tag", "-a", "v1", "-m", "m")
    head = git(tmp_path, "rev-parse", "HEAD")
    assert commit_of(tracked) == head
    assert commit_of(untracked) is None, "a library installed inside another project's checkout has no commit"
    tracked.write_text("2\n")
    assert commit_of(tracked) == f"{head}-dirty"


def test_commit_outside_any_checkout_is_unknown(tmp_path):
    (tmp_path / "file.py").touch()
    assert commit_of(tmp_path / "file.py") is None


def test_a_cpu_has_a_name_and_neither_driver_nor_nccl(tmp_path):
    machine = read_machine(torch.device("cpu"), file=tmp_path / "file.py")
    assert machine.torch == torch.__version__
    assert (machine.driver, machine.nccl, machine.commit) == (None, None, None)


def test_the_commit_is_that_of_the_file_which_was_passed():
    """Not that of core: packages may come from different places."""
    file = Path(bench_machine.__file__)
    assert read_machine(torch.device("cpu"), file=file).commit == commit_of(file)
