"""A pipeline by these messages computes what one process computes."""

import os
import subprocess
import sys

import pp_schedule
import pytest
import torch

from deep_ep_pp.demo.__main__ import Block, _relative_difference, main


@pytest.mark.parametrize("num_microbatches", [1, 3, 8])
@pytest.mark.parametrize("num_ranks", [2, 4])
def test_gradients_of_1f1b_are_those_of_the_whole_model(rank_pool, num_ranks, num_microbatches):
    """Fewer micro-batches than stages, and micro-batches of different sizes, too."""
    assert max(rank_pool(num_ranks).run(pp_schedule.gradient_differences, num_microbatches)) < 1e-12


def test_a_wrong_activation_shows_in_the_gradients_of_other_stages(rank_pool):
    differences = rank_pool(4).run(pp_schedule.gradient_differences, 3, 1)
    assert all(difference > 1e-3 for difference in differences)


def test_the_command_line_starts_the_ranks_and_they_agree():
    environment = {name: value for name, value in os.environ.items() if name not in ("RANK", "WORLD_SIZE")}
    done = subprocess.run(
        [sys.executable, "-m", "deep_ep_pp.demo", "--ranks", "2", "--steps", "2"],
        env=environment,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "step 1: loss " in done.stdout
    assert "the gradients of 2 stages and of the whole model AGREE" in done.stdout


def test_what_cannot_be_run_is_refused(capsys):
    assert main(["--steps", "0"]) == 2
    assert "--microbatches and --steps must be at least 1 (got 8 and 0)" in capsys.readouterr().err


def test_a_difference_is_seen_and_what_is_not_a_number_too():
    torch.manual_seed(0)
    block, other = Block(), Block()
    other.load_state_dict(block.state_dict())
    for model in (block, other):
        model(torch.ones(2, 32, dtype=torch.float64)).sum().backward()
    assert _relative_difference(block, other) == 0
    block.up.weight.grad[3, 1] += 1e-6
    assert _relative_difference(block, other) > 1e-8
    block.up.bias.grad[0] = float("nan")
    assert not _relative_difference(block, other) <= 1
