"""Dispatch and combine on CPU ranks against the plain-torch reference, to the bit."""

import subprocess
import sys
from pathlib import Path

import ep_faults
import ep_modes
import pytest

PROGRAMS = Path(__file__).parent / "programs"
NUM_CHUNKS = 6


def test_there_are_144_modes():
    modes = ep_modes.all_modes()
    assert len(modes) == 144
    assert len(set(modes)) == 144


@pytest.mark.parametrize("chunk", range(NUM_CHUNKS))
def test_every_mode_matches_the_reference(rank_pool, chunk):
    assert rank_pool(4).run(ep_modes.check_all_modes, chunk, NUM_CHUNKS, timeout_s=240) == [144 // NUM_CHUNKS] * 4


@pytest.mark.parametrize("num_ranks", [1, 2, 4])
def test_any_number_of_tokens_matches_the_reference(rank_pool, num_ranks):
    """0, 1, 31, 32, 33, uneven, all to one rank, none; with exact and with worst-case sizes."""
    rank_pool(num_ranks).run(ep_modes.check_sizes, timeout_s=240)


def test_any_payload_and_scale_layout_moves_unchanged(rank_pool):
    rank_pool(4).run(ep_modes.check_payloads, timeout_s=240)


def test_one_to_all_experts_a_token_match_the_reference(rank_pool):
    rank_pool(4).run(ep_modes.check_topk, timeout_s=240)


def test_several_handles_can_be_alive(rank_pool):
    rank_pool(4).run(ep_modes.check_interleaved)


def test_rows_and_metadata_may_be_permuted_together(rank_pool):
    rank_pool(4).run(ep_modes.check_permuted_rows)


def test_a_hundred_dispatches_give_one_hash(rank_pool):
    rank_pool(4).run(ep_modes.check_repeated)


def test_reduction_orders_of_two_nodes_match_the_reference(rank_pool):
    """Two make-believe nodes of two ranks: with and without the hierarchy, with and without partial sums."""
    rank_pool(4, num_nodes=2).run(ep_modes.check_topologies, timeout_s=240)


def test_no_fault_passes(rank_pool):
    """The round trip that the faults are planted in passes without one."""
    assert rank_pool(4).run(ep_faults.outcome_with_fault, None) == ["passed"] * 4


@pytest.mark.parametrize("fault", list(ep_faults.FAULTS))
def test_a_planted_fault_is_caught(rank_pool, fault):
    pool = rank_pool(4)
    outcomes = pool.run(ep_faults.outcome_with_fault, fault)
    if any(outcome.startswith("stopped: ") for outcome in outcomes):
        # The group's connections may be broken.
        pool.restart()
    assert any(outcome != "passed" for outcome in outcomes), outcomes


@pytest.mark.parametrize(
    "launcher",
    [
        [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "4"],
        [sys.executable, "-m", "deep_ep_core.launch", "--ranks", "4"],
    ],
    ids=["torchrun", "launch"],
)
def test_the_worker_script_runs_under_a_launcher(launcher):
    command = [*launcher, str(PROGRAMS / "ep_modes.py"), "check_sizes", "check_interleaved"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=240, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "ok: check_sizes" in done.stdout
    assert "ok: check_interleaved" in done.stdout
