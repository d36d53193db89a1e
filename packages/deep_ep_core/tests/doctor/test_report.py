from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys

import pytest

from deep_ep_core.doctor import Finding, Report, Section, Status, examine
from deep_ep_core.doctor import __main__ as command
from deep_ep_core.doctor.examine import Probe
from deep_ep_core.doctor.gpu_answer import GpuAnswer

GLOO = Finding(name="gloo", status=Status.OK, text="there")


def report_of(*findings, has_gpu=True, is_gpu_allowed=True):
    section = Section(key="parts", title="Parts", findings=(GLOO, *findings))
    return Report(sections=(section,), has_gpu=has_gpu, is_gpu_allowed=is_gpu_allowed)


def needed(status):
    return Finding(name="NCCL", status=status, text="2.28.9", why="it moves", fix="pip install x", is_needed=True)


@pytest.mark.parametrize(
    ("report", "backend", "status", "status_if_required"),
    [
        (report_of(needed(Status.OK)), "device", 0, 0),
        (report_of(needed(Status.NOTE)), "device", 0, 0),
        (report_of(needed(Status.MISSING)), "collective", 1, 1),
        (report_of(needed(Status.WARNING)), "collective", 1, 1),
        (report_of(needed(Status.UNKNOWN)), None, 1, 1),
        (report_of(needed(Status.UNKNOWN), needed(Status.MISSING)), "collective", 1, 1),
        (report_of(dataclasses.replace(needed(Status.MISSING), is_needed=False)), "device", 0, 0),
        (report_of(needed(Status.MISSING), has_gpu=False), "collective", 0, 1),
        (report_of(needed(Status.OK), has_gpu=None), None, 1, 1),
        (report_of(needed(Status.MISSING), has_gpu=None, is_gpu_allowed=False), None, 0, 1),
    ],
)
def test_backend_and_exit_status_follow_from_the_findings(report, backend, status, status_if_required):
    assert report.auto_backend == backend
    assert report.exit_status() == status
    assert report.exit_status(is_device_required=True) == status_if_required
    assert bool(report.reasons) is (backend != "device")


def test_a_machine_without_gpu_and_without_gloo_is_not_well():
    report = Report(sections=(), has_gpu=False, is_gpu_allowed=True)
    assert report.exit_status() == 1
    assert "does not work" in report.text()


def test_what_is_missing_is_one_line_with_what_why_and_how():
    lines = report_of(dataclasses.replace(needed(Status.MISSING), text="2.28.9\nis old")).text().splitlines()
    assert "  missing  NCCL  2.28.9 is old; it moves; pip install x" in lines
    assert "  ok       gloo  there" in lines


def test_the_reasons_name_what_blocks_once():
    text = report_of(needed(Status.MISSING), needed(Status.MISSING)).text()
    assert "CUDA tensors: auto takes the collective backend. The device backend cannot run:" in text
    assert text.count("  NCCL: 2.28.9\n") == 1


def test_a_gpu_machine_that_has_all_says_device():
    assert "CUDA tensors: auto takes the device backend" in report_of(needed(Status.OK)).text()


def test_the_json_object_has_every_key():
    report = report_of(dataclasses.replace(needed(Status.OK), facts={"version": "2.30.7"}))
    found = json.loads(report.json_text())
    assert {key: found[key] for key in found if key not in ("deep_ep_core", "sections")} == {
        "schema": 1,
        "has_gpu": True,
        "can_run_device": True,
        "can_run_collective_on_cpu": True,
        "auto_backend": "device",
        "reasons": [],
        "exit_status": 0,
    }
    assert found["sections"][0]["findings"][1] == {
        "name": "NCCL",
        "status": "ok",
        "text": "2.28.9",
        "why": "it moves",
        "fix": "pip install x",
        "is_needed": True,
        "facts": {"version": "2.30.7"},
    }


# Examining


def crash(machine):
    raise RuntimeError("no such luck")


def ask_none(timeout_s, *, driver_only):
    driver = {"is_present": False, "version": None, "cuda_version": None, "gpu_names": [], "reason": ""}
    return GpuAnswer(answers={"driver": driver})


def test_a_crashing_probe_is_reported_and_the_others_go_on():
    probes = [
        Probe(key="bad", title="Bad", look=crash, is_needed=True),
        Probe(key="good", title="Good", look=lambda machine: [GLOO], is_needed=False),
    ]
    report = examine(environ={}, settings_files=(), probes=probes, ask=ask_none)
    bad, good = report.findings
    assert (bad.status, bad.leaves_device_open) == (Status.UNKNOWN, True)
    assert "RuntimeError: no such luck" in bad.text
    assert good is GLOO


def test_no_gpu_asks_nothing():
    def ask(timeout_s, *, driver_only):
        raise AssertionError("asked")

    report = examine(is_gpu_allowed=False, environ={}, settings_files=(), ask=ask)
    assert (report.has_gpu, report.auto_backend) == (None, None)
    assert report.exit_status() == 0


def test_every_missing_part_of_this_machine_tells_why_and_what_to_do():
    report = examine(environ={}, settings_files=(), ask=ask_none)
    missing = [finding for finding in report.findings if finding.status is Status.MISSING]
    assert missing, "with make-believe answers the driver at least is missing"
    for finding in missing:
        assert finding.why, finding.name
        assert finding.fix, finding.name
    assert not [finding for finding in report.findings if "this check failed" in finding.text]


# The command


def run_doctor(*options, **environ):
    return subprocess.run(
        [sys.executable, "-m", "deep_ep_core.doctor", *options],
        env={**os.environ, **environ},
        capture_output=True,
        text=True,
        timeout=120,
    )


def test_the_command_runs_on_this_machine():
    done = run_doctor("--json")
    found = json.loads(done.stdout)
    assert done.stderr == ""
    assert done.returncode == found["exit_status"]
    assert [section["key"] for section in found["sections"]] == [
        "torch",
        "gpus",
        "nccl",
        "network",
        "compilers",
        "cache",
        "settings",
        "packages",
    ]
    assert found["can_run_collective_on_cpu"] is True
    texts = [finding["text"] for section in found["sections"] for finding in section["findings"]]
    assert [text for text in texts if "this check failed" in text] == []


def test_the_command_without_gpus_is_well_and_says_what_works():
    done = run_doctor("--no-gpu")
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.endswith("CPU tensors: the collective backend works on this machine.\n")
    assert run_doctor("--no-gpu", "--require-device").returncode == 1


def test_bad_settings_do_not_end_the_command():
    done = run_doctor("--no-gpu", EP_JIT_DEBUG="perhaps", EP_NCCL_ROOT_DIR="/nowhere")
    assert done.stderr == ""
    assert "missing  settings" in done.stdout


def test_the_exit_status_is_that_of_the_report(monkeypatch):
    reports = {True: report_of(needed(Status.OK)), False: report_of(has_gpu=None, is_gpu_allowed=False)}
    seen = []

    def examine_fake(*, is_gpu_allowed, timeout_s):
        seen.append(timeout_s)
        return reports[is_gpu_allowed]

    monkeypatch.setattr(command, "examine", examine_fake)
    assert command.main(["--require-device", "--timeout", "5"]) == 0
    assert command.main(["--no-gpu", "--require-device"]) == 1
    assert command.main(["--no-gpu", "--json"]) == 0
    assert seen == [5.0, 60.0, 60.0]
