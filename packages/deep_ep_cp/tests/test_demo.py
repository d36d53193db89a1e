"""The example: attention over a split sequence equals the unsplit one, and the comparison sees when it does not."""

from __future__ import annotations

import subprocess
import sys

import cp_demo
import pytest


@pytest.mark.parametrize("num_ranks", [2, 4])
def test_split_attention_equals_the_unsplit_one_forward_and_backward(rank_pool, num_ranks):
    for differences in rank_pool(num_ranks).run(cp_demo.differences):
        assert len(differences) == 3
        assert max(differences.values()) < 1e-12


@pytest.mark.parametrize("fault", list(cp_demo.FAULTS))
def test_a_planted_fault_is_seen(rank_pool, fault):
    for differences in rank_pool(2).run(cp_demo.differences, fault):
        assert max(differences.values()) > 1e-3


def test_the_command_line_tells_that_they_agree():
    done = run_demo("--ranks", "2", "--tokens", "64")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "2 ranks with 32 tokens each" in done.stdout
    assert "the split and the unsplit attention AGREE" in done.stdout


def test_tokens_that_cannot_be_shared_out_are_refused():
    done = run_demo("--ranks", "4", "--tokens", "6")
    assert done.returncode == 2
    assert "the number of tokens must be a positive multiple of the number of ranks (got 6 tokens" in done.stderr


def run_demo(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "deep_ep_cp.demo", *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
