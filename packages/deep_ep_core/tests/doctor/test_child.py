from __future__ import annotations

import os
import signal
import sys
import time

import pytest

from deep_ep_core.doctor.child import run_child
from deep_ep_core.doctor.gpu_answer import GpuAnswer

FIRST = '{"doing": "asking the driver"}'
DRIVER = '{"step": "driver", "answer": {"is_present": true, "gpu_names": ["a"], "cuda_version": [13, 0]}}'
DOING = '{"doing": "opening a communicator"}'


@pytest.fixture
def run(tmp_path):
    """Runs the text of a module as a child."""

    def run_text(body, timeout_s=60.0):
        (tmp_path / "doctor_child_body.py").write_text(f"import os, sys, time\n{body}\n")
        environ = {**os.environ, "PYTHONPATH": str(tmp_path)}
        return run_child("doctor_child_body", ["30"], timeout_s=timeout_s, environ=environ)

    return run_text


def say(*lines):
    return "".join(f"print({line!r}, flush=True)\n" for line in lines)


def test_records_come_in_order_and_noise_is_left_out(run):
    outcome = run(say(FIRST, "NCCL version 2.30.7", "[1]", DRIVER, '{"step": "gp'))
    assert [next(iter(record)) for record in outcome.records] == ["doing", "step"]
    assert outcome.failure == ""


def test_a_crash_keeps_what_was_learned_and_names_the_step(run):
    outcome = run(say(FIRST, DRIVER, DOING) + "print('NET failed', file=sys.stderr, flush=True)\nos.abort()")
    answer = GpuAnswer.of(outcome)
    assert answer.driver["gpu_names"] == ["a"]
    assert "SIGABRT" in outcome.failure
    assert "NET failed" in outcome.failure
    assert answer.crashed_step == "gpus"
    assert "opening a communicator" in answer.why_unknown("gpus")
    assert "opening a communicator" in answer.why_unknown("nccl")
    assert answer.has_gpu is True


def test_a_child_that_hangs_is_ended_at_the_deadline_with_its_helpers(run, tmp_path):
    pid_file = tmp_path / "pid"
    body = say(FIRST) + (
        "import subprocess\n"
        f"helper = subprocess.Popen([{sys.executable!r}, '-c', 'import time; time.sleep(600)'])\n"
        f"open({str(pid_file)!r}, 'w').write(str(helper.pid))\n"
        "time.sleep(600)"
    )
    outcome = run(body, timeout_s=4.0)
    assert "not done within 4 s" in outcome.failure
    answer = GpuAnswer.of(outcome)
    assert (answer.crashed_step, answer.has_gpu) == ("driver", None)
    assert "asking the driver" in answer.why_unknown("driver")
    helper_pid = int(pid_file.read_text())
    for _ in range(500):
        if not is_running(helper_pid):
            return
        time.sleep(0.02)
    os.kill(helper_pid, signal.SIGKILL)
    pytest.fail("the helper still ran")


def is_running(pid):
    try:
        with open(f"/proc/{pid}/stat") as stat:
            return stat.read().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def test_a_child_that_does_not_start_its_module_says_so():
    outcome = run_child("deep_ep_core.doctor.no_such_module", [], timeout_s=60.0)
    assert outcome.records == ()
    assert "exit status 1" in outcome.failure
    assert "no_such_module" in outcome.failure


def test_an_error_of_a_step_is_no_crash(run):
    answer = GpuAnswer.of(run(say(FIRST, '{"step": "driver", "error": "NVMLError: mismatch"}')))
    assert (answer.errors, answer.crashed_step) == ({"driver": "NVMLError: mismatch"}, None)
    assert answer.has_gpu is None
