"""The benchmark runs without a GPU, says what it measured, and finds a wrong result."""

import json
import os
import subprocess
import sys

import pytest
import torch

from deep_ep_core.errors import DeepEPError
from deep_ep_pp.bench.__main__ import main
from deep_ep_pp.bench.tasks import Case, busiest_device_bytes, make_task


def case(op, message_bytes=100):
    return Case(op=op, mode="stream", message_bytes=message_bytes, window=2)


@pytest.mark.parametrize("num_ranks", [2, 3, 4])
@pytest.mark.parametrize("op", ["ring", "both"])
def test_every_message_that_is_sent_is_received(op, num_ranks):
    sent = sorted((rank, dst) for rank in range(num_ranks) for dst in case(op).destinations(rank, num_ranks))
    received = sorted((src, rank) for rank in range(num_ranks) for src in case(op).sources(rank, num_ranks))
    assert sent == received
    assert len(sent) == num_ranks * (1 if op == "ring" else 2)


def test_bytes_are_those_of_two_copies_a_message_on_the_busiest_device():
    assert busiest_device_bytes(case("ring"), ["a", "b"]) == 400
    assert busiest_device_bytes(case("both"), ["a", "b"]) == 800
    assert busiest_device_bytes(case("ring"), ["a", "a", "b", "a"]) == 1200


class Buffer:
    """One rank of two that receives what it is told to."""

    rank_idx, num_ranks, group = 0, 2, None

    def __init__(self, value):
        self.value = value

    def pp_send(self, t, dst):
        assert (t == 0).all()
        assert dst == 1

    def pp_recv(self, t, src):
        assert src == 1
        t.fill_(self.value)


def test_a_wrong_byte_is_found_and_one_that_was_there_before_does_not_count():
    task = make_task(case("both"), Buffer(1), torch.device("cpu"))
    task.run()
    task.check("the library")
    with pytest.raises(DeepEPError, match="the library must bring every byte of a message"):
        task.check("the library")
    wrong = make_task(case("ring"), Buffer(0), torch.device("cpu"))
    wrong.run()
    with pytest.raises(DeepEPError, match="the baseline must"):
        wrong.check("the baseline")


def test_the_command_line_starts_the_ranks_and_writes_records():
    environment = {name: value for name, value in os.environ.items() if name not in ("RANK", "WORLD_SIZE")}
    options = ["--device", "cpu", "--bytes", "4096,100", "--ops", "ring", "--mode", "stream,host", "--rounds", "2"]
    done = subprocess.run(
        [sys.executable, "-m", "deep_ep_pp.bench", *options, "--warmup", "1", "--json", "-"],
        env=environment,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    records = [json.loads(line) for line in done.stdout.splitlines()]
    assert [(record["mode"], record["message_bytes"]) for record in records] == [
        ("stream", 4096),
        ("stream", 100),
        ("host", 4096),
        ("host", 100),
    ]
    for record in records:
        assert record["backend"] == "collective"
        assert record["num_ranks"] == 2
        assert 0 < record["min_ms"] <= record["median_ms"] <= record["max_ms"]
        assert record["baseline_ms"] > 0
        assert record["bytes_moved"] == 8 * record["message_bytes"]
        if record["mode"] == "stream":
            assert record["floor_ms"] == pytest.approx(record["bytes_moved"] / record["copy_gbs"] / 1e6)
            assert record["ratio_to_floor"] == pytest.approx(record["median_ms"] / record["floor_ms"])
        else:
            assert record["floor_ms"] is None
    assert "ring" in done.stderr


@pytest.mark.parametrize(
    ("options", "words"),
    [(["--bytes", "0"], "at least 1 (got '0')"), (["--ops", "star"], "must be of ring, both (got 'star')")],
    ids=str,
)
def test_what_cannot_be_run_is_refused(options, words, capsys):
    with pytest.raises(SystemExit):
        main(options)
    assert words in capsys.readouterr().err
