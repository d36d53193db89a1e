"""The multi-GPU run, as far as it goes without a GPU: its parts, how it ends them, what it reads and what it says."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path
from typing import Any

import gpu_parts
import gpu_report
import peer_copy
import pytest
import run
from gpu_parts import Part, make_parts, part_environment
from gpu_report import PartResult

from deep_ep_ep.bench.cases import Case, make_topk_idx
from deep_ep_ep.bench.suites import SUITES

COPIES = [
    {"op": "peer-copy", "pattern": pattern, "each_way_gbs": gbs, "has_peer_access": True}
    for pattern, gbs in (("one-way", 400.0), ("both-ways", 380.0), ("ring", 350.0), ("all", 360.0))
]


def ep_record(**changes: Any) -> dict[str, Any]:
    record = {
        "op": "dispatch",
        "layout": "token",
        "dtype": "fp8",
        "num_ranks": 4,
        "num_tokens": 32,
        "hidden": 256,
        "num_topk": 3,
        "num_experts": 8,
        "num_sms": 16,
        "case": "dispatch-16sms",
        "backend": "device",
        "device": "Some GPU",
        "median_ms": 0.5,
        "baseline_ms": 2.0,
    }
    return {**record, **changes}


def part(*command: str, kind: gpu_parts.PartKind = "bench", **changes: Any) -> Part:
    values: dict[str, Any] = {"name": "a part", "kind": kind, "command": (sys.executable, *command), "limit_s": 30.0}
    return Part(**{**values, **changes})


# The parts


def test_parts_cover_the_ceiling_the_benches_and_the_tests_of_every_package(tmp_path: Path) -> None:
    parts = make_parts(num_gpus=4, device="cuda", folder=tmp_path)
    assert [each.name for each in parts[:4]] == ["peer copies", "EP bench", "CP bench", "PP bench"]
    packages = {path.name for path in (gpu_parts.ROOT / "packages").glob("deep_ep_*")}
    assert {each.command[-1] for each in parts[4:]} == {f"packages/{package}/tests" for package in packages}
    for each in parts:
        assert any(option in each.command for option in ("--ranks", "--num-gpus", "--gpu-ranks"))
        assert "4" in each.command


def test_all_parts_of_two_gpus_fit_the_time_of_one_call(tmp_path: Path) -> None:
    """The call has 8 minutes; the first parts may not take all of it from the tests."""
    parts = make_parts(num_gpus=2, device="cuda", folder=tmp_path)
    assert sum(each.limit_s for each in parts[:4]) < run._DEFAULT_BUDGET_S < 480


def test_suite_of_the_ep_bench_has_all_numbers_of_sms_for_three_amounts_of_tokens(tmp_path: Path) -> None:
    (ep,) = (each for each in make_parts(num_gpus=8, device="cuda", folder=tmp_path) if each.kind == "ep")
    cases = SUITES[ep.command[ep.command.index("--suite") + 1]].select([], num_ranks=8)
    for op, dtype, num_tokens in (
        ("dispatch", "bf16", 4096),
        ("combine", "bf16", 4096),
        ("dispatch", "bf16", 128),
        ("combine", "bf16", 128),
        ("dispatch", "fp8", 8192),
        ("combine", "bf16", 8192),
    ):
        found = [case.num_sms for case in cases if (case.op, case.dtype, case.num_tokens) == (op, dtype, num_tokens)]
        assert found == [4, 8, 16, 24, 32, 64]
    assert len(cases) == 36


def test_multicast_is_off_whatever_the_environment_says_and_this_tree_comes_first() -> None:
    environment = part_environment({"NCCL_NVLS_ENABLE": "2", "PYTHONPATH": "/elsewhere", "HOME": "/home"})
    assert environment["NCCL_NVLS_ENABLE"] == "0"
    assert environment["TORCH_SYMM_MEM_DISABLE_MULTICAST"] == environment["NVSHMEM_DISABLE_NVLS"] == "1"
    paths = environment["PYTHONPATH"].split(":")
    assert paths[-1] == "/elsewhere"
    assert str(gpu_parts.ROOT / "packages" / "deep_ep_ep" / "src") in paths
    assert environment["HOME"] == "/home"


def test_module_is_looked_up_without_importing_its_package() -> None:
    assert part(needs_module="deep_ep_ep.bench").missing is None
    assert part(needs_module="deep_ep_core.launch").missing is None
    assert part(needs_module="deep_ep_ep.no_such_bench").missing == "there is no deep_ep_ep.no_such_bench"
    assert part(needs_module="no_such_module").missing == "there is no no_such_module"


# Running them


def test_part_that_takes_too_long_is_ended_with_its_children_and_keeps_what_it_told(tmp_path: Path) -> None:
    child_path = tmp_path / "child"
    program = textwrap.dedent(
        f"""
        import pathlib, subprocess, sys, time
        child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
        pathlib.Path({str(child_path)!r}).write_text(str(child.pid))
        print('{{"op": "first"}}', flush=True)
        print("waiting", file=sys.stderr, flush=True)
        time.sleep(600)
        """
    )
    started = time.monotonic()
    result = run.run_part(part("-c", program), tmp_path, limit_s=5)
    assert time.monotonic() - started < 60
    assert (result.status, result.reason) == ("too long", "ended after 5 s")
    assert result.records == [{"op": "first"}]
    assert result.tail[-1] == "waiting"
    assert not is_running(int(child_path.read_text()))


def test_script_that_is_ended_ends_the_part_that_runs(tmp_path: Path) -> None:
    """`timeout` of a caller sends SIGTERM; ranks that stay behind would hold the GPUs."""
    script = str(Path(run.__file__))
    command = [sys.executable, script, "--device", "cpu", "--only", "EP bench"]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    assert process.stderr is not None
    assert "EP bench" in process.stderr.readline()
    children: list[str] = []
    deadline = time.monotonic() + 60
    while not children and time.monotonic() < deadline:
        children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
        time.sleep(0.05)
    process.terminate()
    assert process.wait(60) == 128 + signal.SIGTERM
    process.stderr.close()
    assert children
    assert not any(is_running(int(pid)) for pid in children)


def is_running(pid: int) -> bool:
    """Whether a process runs; one that ended and that nobody has asked for does not."""
    try:
        return (Path("/proc") / str(pid) / "stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def test_part_that_fails_tells_its_status_and_the_end_of_its_output(tmp_path: Path) -> None:
    program = "import sys; print('{\"op\": 1}'); sys.exit('the last word')"
    result = run.run_part(part("-c", program), tmp_path, limit_s=30)
    assert (result.status, result.reason, result.records) == ("failed", "exit status 1", [{"op": 1}])
    assert result.tail[-1] == "the last word"


def test_tests_that_were_all_skipped_do_not_count_as_ok(tmp_path: Path) -> None:
    path = tmp_path / "outcomes.jsonl"
    for outcomes, status in (("skipped", "not there"), ("skipped passed", "ok")):
        lines = "".join(json.dumps(outcome("a", each, "why")) + "\n" for each in outcomes.split())
        program = f"open({str(path)!r}, 'w').write({lines!r})"
        assert run.run_part(part("-c", program, kind="tests", lines_path=path), tmp_path, limit_s=30).status == status


def test_lines_come_from_the_file_of_a_part_that_has_one(tmp_path: Path) -> None:
    path = tmp_path / "lines.jsonl"
    program = f"open({str(path)!r}, 'w').write('{{\"op\": 7}}\\n'); print('{{\"op\": 8}}')"
    assert run.run_part(part("-c", program, lines_path=path), tmp_path, limit_s=30).records == [{"op": 7}]
    absent = part("-c", "pass", lines_path=tmp_path / "none")
    assert run.run_part(absent, tmp_path, limit_s=30).records == []


def test_spent_budget_leaves_parts_out_and_says_so(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "all.json"
    assert run.main(["--device", "cpu", "--budget-s", "1", "--json", str(path)]) == 0
    printed = capsys.readouterr().out
    assert "peer copies: left out: 1 s of the budget were left" in printed
    assert "tests of deep_ep_legacy: left out" in printed
    told = json.loads(path.read_text())
    assert {each["status"] for each in told["parts"]} <= {"left out", "not there"}
    assert told["ceiling_gbs"] is None


def test_chosen_part_runs_on_a_cpu_and_is_written_whole(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "all.json"
    assert run.main(["--device", "cpu", "--only", "peer copies", "--json", str(path)]) == 0
    told = json.loads(path.read_text())
    (copies,) = told["parts"]
    assert [record["pattern"] for record in copies["records"]] == list(peer_copy.PATTERNS)
    assert told["ceiling_gbs"] == max(record["each_way_gbs"] for record in copies["records"][1:])
    assert "every part ran and was ok" in capsys.readouterr().out
    assert [entry.name for entry in tmp_path.iterdir()] == ["all.json"]


def test_unknown_part_and_too_few_gpus_are_refused(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(SystemExit, match="--only must name parts"):
        run.main(["--device", "cpu", "--only", "EP"])
    monkeypatch.setattr(run, "_count_gpus", lambda: 4)
    for num_gpus in (1, 5):
        assert run.main(["--num-gpus", str(num_gpus)]) == 2
        assert f"with a GPU each (got {num_gpus}, there are 4 GPUs)" in capsys.readouterr().err


# Peer copies


@pytest.mark.parametrize("num_gpus", [2, 3, 8])
def test_patterns_load_all_gpus_alike(num_gpus: int) -> None:
    for pattern in ("ring", "all"):
        pairs = peer_copy.pairs_of(pattern, num_gpus)
        senders, receivers = ([pair[end] for pair in pairs] for end in (0, 1))
        assert sorted(senders) == sorted(receivers)
        assert set(senders) == set(range(num_gpus))
        assert all(source != target for source, target in pairs)
    assert len(peer_copy.pairs_of("all", num_gpus)) == num_gpus * (num_gpus - 1)


def test_peer_copies_on_a_cpu_tell_a_line_a_pattern(capsys: pytest.CaptureFixture[str]) -> None:
    assert peer_copy.main(["--device", "cpu", "--num-gpus", "3", "--mib", "1", "--rounds", "1"]) == 0
    lines = gpu_report.parse_lines(capsys.readouterr().out)
    assert [line["pattern"] for line in lines] == list(peer_copy.PATTERNS)
    assert all(line["each_way_gbs"] > 0 for line in lines)
    # As much leaves each GPU, to one or to two others.
    assert {line["bytes_each_way"] for line in lines} == {8 << 20}
    assert peer_copy.main(["--device", "cpu", "--num-gpus", "1"]) == 2


# What is read


def test_only_whole_json_objects_are_read() -> None:
    text = 'a warning\n{"op": 1}\n[2]\n{"op": 3, "x": [4]}\n{"op": 5, "to'
    assert gpu_report.parse_lines(text) == [{"op": 1}, {"op": 3, "x": [4]}]


def test_ceiling_is_the_fastest_with_both_ways_busy() -> None:
    assert gpu_report.ceiling_gbs(COPIES) == 380
    assert gpu_report.ceiling_gbs(COPIES[:1]) is None


@pytest.mark.parametrize(("op", "dtype", "row_bytes"), [("dispatch", "fp8", 256 + 8), ("combine", "bf16", 512)])
def test_link_rates_are_those_of_rows_between_ranks(op: Any, dtype: Any, row_bytes: int) -> None:
    record = ep_record(op=op, dtype=dtype)
    case = Case(op=op, layout="token", dtype=dtype, num_ranks=4, num_tokens=32, hidden=256, num_topk=3, num_experts=8)
    num_sent, num_received = [0] * 4, [0] * 4
    for source, tokens in enumerate(make_topk_idx(case).tolist()):
        for experts in tokens:
            for target in {expert // 2 for expert in experts} - {source}:
                num_sent[source] += 1
                num_received[target] += 1
    if op == "combine":
        num_sent, num_received = num_received, num_sent
    told = gpu_report.add_link_rates(record, 100.0)
    assert (told["link_bytes_out"], told["link_bytes_in"]) == (max(num_sent) * row_bytes, max(num_received) * row_bytes)
    assert told["link_gbs_out"] == pytest.approx(max(num_sent) * row_bytes / 0.5e-3 / 1e9)
    assert told["share_of_copy"] == pytest.approx(max(told["link_gbs_out"], told["link_gbs_in"]) / 100)
    assert told["speedup_over_all_to_all"] == 4


def test_without_a_ceiling_or_a_baseline_there_is_no_share_of_them() -> None:
    told = gpu_report.add_link_rates(ep_record(baseline_ms=None), None)
    assert (told["share_of_copy"], told["speedup_over_all_to_all"]) == (None, None)


@pytest.mark.parametrize(
    ("record", "num_bytes"),
    [
        ({"op": "all_gather", "slot_bytes": 1000, "num_ranks": 4}, 3000),
        ({"op": "reduce_scatter", "slot_bytes": 1000, "num_ranks": 2}, 1000),
        ({"op": "ring", "message_bytes": 500, "mode": "stream"}, 500),
        ({"op": "both", "message_bytes": 500, "mode": "stream"}, 1000),
        ({"op": "both", "message_bytes": 500, "mode": "host"}, None),
        ({"op": "something new"}, None),
    ],
)
def test_rates_of_cp_and_pp_are_those_of_what_leaves_a_gpu(record: dict[str, Any], num_bytes: int | None) -> None:
    told = gpu_report.add_bench_rates({**record, "median_ms": 0.01, "baseline_ms": 0.03}, 0.5)
    assert told["link_bytes"] == num_bytes
    if num_bytes is None:
        assert (told["link_gbs"], told["share_of_copy"]) == (None, None)
    else:
        assert told["link_gbs"] == pytest.approx(num_bytes / 1e-5 / 1e9)
        assert told["share_of_copy"] == pytest.approx(2 * told["link_gbs"])
    assert told["speedup_over_torch"] == pytest.approx(3)
    assert gpu_report.add_bench_rates(record, None)["link_gbs"] is None


# What is said


def outcome(test: str, outcome: str, reason: str = "") -> dict[str, Any]:
    return {"test": test, "outcome": outcome, "seconds": 0.1, "reason": reason}


def test_table_shows_rates_failures_and_what_was_left_out() -> None:
    outcomes = [
        outcome("a", "passed"),
        outcome("b", "failed", "AssertionError: row 7 " + "x" * 400),
        outcome("c", "skipped", f"{gpu_report.OTHER_NUMBER}: 4, not 2"),
        outcome("d", "skipped", "no nvcc was found"),
    ]
    results = [
        PartResult(part=part(kind="peer-copy"), status="ok", records=COPIES),
        PartResult(part=part(kind="ep"), status="ok", records=[ep_record(), ep_record(num_sms=None, case=None)]),
        PartResult(
            part=part(kind="tests", name="tests of deep_ep_ep"),
            status="failed",
            reason="exit status 1",
            seconds=61.2,
            records=outcomes,
            tail=["one failed"],
        ),
        PartResult(
            part=part(name="CP bench"),
            status="ok",
            records=[
                {"op": "all_gather", "slot_bytes": 2 << 20, "num_ranks": 2, "backend": "device", "median_ms": 0.01}
            ],
        ),
        PartResult(part=part(name="PP bench"), status="left out", reason="3 s of the budget were left"),
    ]
    lines = gpu_report.render(results, head="2 ranks").splitlines()
    assert lines[0] == "2 ranks"
    assert "peer copies, GB/s each way: one-way 400, both-ways 380, ring 350, all 360" in lines
    (row,) = (line.split() for line in lines if line.startswith("dispatch-16sms"))
    assert row[:3] == ["dispatch-16sms", "16", "0.5"]
    assert row[-2:] == ["2", "4"]
    (bench,) = (line.split() for line in lines if line.startswith("CP all_gather 2 MiB"))
    assert bench == ["CP", "all_gather", "2", "MiB", "device", "0.01", "210", "55"]
    (tests,) = (line.split() for line in lines if line.startswith("deep_ep_ep "))
    assert tests == ["deep_ep_ep", "1", "1", "1", "1", "61"]
    (failed,) = (line for line in lines if line.startswith("failed: b: AssertionError: row 7"))
    assert len(failed) < 280
    assert "PP bench: left out: 3 s of the budget were left" in lines
    assert lines[-2:] == ["--- end of tests of deep_ep_ep", "one failed"]
    assert max(len(line) for line in lines if line != failed) <= 130


def test_copies_without_peer_access_are_called_so() -> None:
    copies = [{**copy, "has_peer_access": False} for copy in COPIES]
    told = gpu_report.render([PartResult(part=part(kind="peer-copy"), status="ok", records=copies)], head="")
    assert "(no peer access: through the host)" in told


# The plugin

FAKE_TESTS = """
import pytest

@pytest.mark.gpu
@pytest.mark.parametrize("num_ranks", [1, 2, 4])
def test_in_its_body(gpu_rank_pool, num_ranks):
    assert gpu_rank_pool(num_ranks, num_nodes=1) == f"{num_ranks} ranks"
    assert gpu_rank_pool.close() is None

@pytest.fixture
def four(gpu_rank_pool):
    return gpu_rank_pool(4)

@pytest.mark.gpu
def test_behind_a_fixture(four):
    pass

@pytest.mark.gpu
def test_that_fails():
    raise ValueError("rank 0 failed:\\nTraceback\\nKeyError: 7")

@pytest.mark.gpu
def test_of_one_gpu():
    pass
"""
FAKE_CONFTEST = """
import pytest

class Pools:
    def __call__(self, num_ranks, num_nodes=1):
        return f"{num_ranks} ranks"

    def close(self):
        pass

def pytest_addoption(parser):
    parser.addoption("--gpu-ranks", type=int, default=1)

@pytest.fixture(scope="session")
def gpu_rank_pool():
    yield Pools()
"""


def test_plugin_keeps_tests_of_one_rank_a_gpu_and_logs_each(tmp_path: Path) -> None:
    (tmp_path / "conftest.py").write_text(FAKE_CONFTEST)
    (tmp_path / "test_fake.py").write_text(FAKE_TESTS)
    (tmp_path / "pytest.ini").write_text("[pytest]\nmarkers = gpu: x\n")
    path = tmp_path / "outcomes.jsonl"
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", "one_rank_a_gpu"]
    done = subprocess.run(
        [*command, "-m", "gpu", "--gpu-ranks", "2", "--outcomes", str(path), str(tmp_path)],
        env=part_environment(os.environ),
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 1, done.stdout
    outcomes = gpu_report.parse_lines(path.read_text())
    assert {line["test"].partition("::")[2]: line["outcome"] for line in outcomes} == {
        "test_in_its_body[1]": "skipped",
        "test_in_its_body[2]": "passed",
        "test_in_its_body[4]": "skipped",
        "test_behind_a_fixture": "skipped",
        "test_that_fails": "failed",
        "test_of_one_gpu": "passed",
    }
    assert gpu_report.outcome_counts(outcomes) == {"passed": 2, "failed": 1, "skipped": 0, "other number": 3}
    (reason,) = (line["reason"] for line in outcomes if line["outcome"] == "failed")
    assert reason == "ValueError: rank 0 failed: ... KeyError: 7"
