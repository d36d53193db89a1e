from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from deep_ep_core.errors import ConfigError
from deep_ep_core.launch import main
from deep_ep_core.local import LaunchConfig, run_as_script

PROGRAMS = Path(__file__).parent / "programs"
SHOW_RANK = str(PROGRAMS / "show_rank.py")
MISBEHAVE = str(PROGRAMS / "misbehave.py")
SUM_RANKS = str(PROGRAMS / "sum_ranks.py")


def shown_by_ranks(output: str) -> dict[int, dict]:
    """What `show_rank.py` printed, by rank."""
    shown = {}
    for line in output.splitlines():
        head, brace, rest = line.partition("{")
        if brace:
            shown[int(head.removeprefix("[rank ").removesuffix("] "))] = json.loads(brace + rest)
    return shown


def wait_for(condition, timeout_s: float = 60.0) -> None:
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, "the condition did not come true in time"
        time.sleep(0.02)


def is_running(pid: int) -> bool:
    """Whether the process lives; a zombie that waits for its new parent does not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except FileNotFoundError:
        return False


def announced_pids(folder: Path, num_ranks: int) -> tuple[list[int], list[int]]:
    """The process ids of the ranks of `misbehave.py` and of the children that they started."""
    pairs = [tuple(map(int, (folder / f"{rank}.pids").read_text().split())) for rank in range(num_ranks)]
    return [pair[0] for pair in pairs], [pair[1] for pair in pairs]


def assert_nothing_is_left(folder: Path, num_ranks: int) -> None:
    ranks, children = announced_pids(folder, num_ranks)
    assert not [pid for pid in ranks if Path(f"/proc/{pid}").exists()], "a rank is left, or its zombie"
    wait_for(lambda: not any(is_running(pid) for pid in children))


def test_ranks_see_the_variables_of_torchrun(capsys, monkeypatch):
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.delenv("GLOO_SOCKET_IFNAME", raising=False)
    monkeypatch.delenv("NCCL_LSA_TEAM_SIZE", raising=False)
    assert main(["--ranks", "3", "--threads", "2", SHOW_RANK, "--ranks", "a b"]) == 0
    shown = shown_by_ranks(capsys.readouterr().out)
    assert sorted(shown) == [0, 1, 2]
    for rank, report in shown.items():
        environment = report["environment"]
        assert report["arguments"] == ["--ranks", "a b"]
        assert environment["RANK"] == environment["LOCAL_RANK"] == str(rank)
        assert environment["WORLD_SIZE"] == environment["LOCAL_WORLD_SIZE"] == "3"
        assert environment["GROUP_RANK"] == environment["NODE_RANK"] == "0"
        assert environment["MASTER_ADDR"] == "127.0.0.1"
        assert int(environment["MASTER_PORT"]) > 0
        assert environment["OMP_NUM_THREADS"] == "2"
        assert environment["GLOO_SOCKET_IFNAME"] == "lo"
        assert "NCCL_LSA_TEAM_SIZE" not in environment


def test_nodes_are_make_believe_teams_of_equal_size(capsys):
    assert main(["--ranks", "4", "--nodes", "2", SHOW_RANK]) == 0
    shown = shown_by_ranks(capsys.readouterr().out)
    names = ("LOCAL_RANK", "LOCAL_WORLD_SIZE", "GROUP_RANK", "NODE_RANK", "NCCL_LSA_TEAM_SIZE")
    assert [[shown[rank]["environment"][name] for name in names] for rank in range(4)] == [
        ["0", "2", "0", "0", "2"],
        ["1", "2", "0", "0", "2"],
        ["0", "2", "1", "1", "2"],
        ["1", "2", "1", "1", "2"],
    ]


def test_settings_of_the_user_are_kept(capsys, monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "5")
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "eth7")
    assert main(["--ranks", "1", SHOW_RANK]) == 0
    environment = shown_by_ranks(capsys.readouterr().out)[0]["environment"]
    assert (environment["OMP_NUM_THREADS"], environment["GLOO_SOCKET_IFNAME"]) == ("5", "eth7")


def test_uneven_nodes_are_refused(capsys):
    with pytest.raises(ConfigError, match="got 4 ranks on 3 nodes"):
        LaunchConfig(num_ranks=4, num_nodes=3)
    with pytest.raises(SystemExit) as leaving:
        main(["--ranks", "4", "--nodes", "3", SHOW_RANK])
    assert leaving.value.code == 2
    assert "got 4 ranks on 3 nodes" in capsys.readouterr().err


def test_output_lines_name_their_rank(capsys):
    assert main(["--ranks", "2", SHOW_RANK]) == 0
    captured = capsys.readouterr()
    assert sorted(captured.err.splitlines()) == ["[rank 0] on standard error", "[rank 1] on standard error"]
    last_words = [line for line in captured.out.splitlines() if "last words" in line]
    assert sorted(last_words) == ["[rank 0] last words", "[rank 1] last words"]


def test_prefix_can_be_left_out(capsys):
    assert main(["--ranks", "2", "--no-prefix", SHOW_RANK]) == 0
    captured = capsys.readouterr()
    assert captured.err == "on standard error\n" * 2
    assert captured.out.splitlines().count("last words") == 2
    assert "[rank" not in captured.out


def test_module_form_runs_a_module(capsys, monkeypatch):
    monkeypatch.chdir(PROGRAMS.parent)
    assert main(["--ranks", "2", "-m", "programs.show_rank", "-m", "x"]) == 0
    shown = shown_by_ranks(capsys.readouterr().out)
    assert [shown[rank]["arguments"] for rank in (0, 1)] == [["-m", "x"], ["-m", "x"]]


def test_failing_rank_ends_the_others_and_shows_its_traceback(capsys, tmp_path):
    assert main(["--ranks", "3", MISBEHAVE, str(tmp_path), "1", "raise"]) == 1
    report = capsys.readouterr().err.partition("deep_ep_core.launch: ")[2]
    assert report.startswith("rank 1 failed first: exit code 1")
    assert "Traceback (most recent call last):" in report
    assert "ValueError: the value is wrong on purpose" in report
    assert_nothing_is_left(tmp_path, 3)


def test_exit_code_of_the_failing_rank_is_passed_on(capsys, tmp_path):
    assert main(["--ranks", "2", MISBEHAVE, str(tmp_path), "0", "exit"]) == 7
    assert "rank 0 failed first: exit code 7" in capsys.readouterr().err


def test_death_by_a_signal_is_named(capsys, tmp_path):
    assert main(["--ranks", "2", MISBEHAVE, str(tmp_path), "1", "kill"]) == 128 + signal.SIGKILL
    assert "rank 1 failed first: killed by SIGKILL" in capsys.readouterr().err
    assert_nothing_is_left(tmp_path, 2)


def test_deadline_names_the_stuck_rank_and_shows_its_stack(capsys, tmp_path):
    assert main(["--ranks", "2", "--timeout", "6", MISBEHAVE, str(tmp_path), "1", "hang"]) == 124
    report = capsys.readouterr().err.partition("deep_ep_core.launch: ")[2]
    assert report.startswith("rank 1 still ran after 6 s")
    assert "in sleep_for_an_hour" in report
    assert "stack of rank 0" not in report
    assert_nothing_is_left(tmp_path, 2)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_ranks_end_with_the_launcher(number, tmp_path):
    command = [sys.executable, "-m", "deep_ep_core.launch", "--ranks", "2", MISBEHAVE, str(tmp_path), "0", "hang"]
    # A test run in the background of a shell may inherit an ignored SIGINT; at a terminal it is not ignored.
    with subprocess.Popen(
        command,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    ) as launcher:
        try:
            wait_for(lambda: len(list(tmp_path.glob("*.pids"))) == 2)
            launcher.send_signal(number)
            assert launcher.wait(timeout=60) != 0
        finally:
            launcher.kill()
    ranks, children = announced_pids(tmp_path, 2)
    wait_for(lambda: not any(is_running(pid) for pid in ranks))
    if number == signal.SIGKILL:
        # Nobody was left to end what the ranks had started.
        for pid in filter(is_running, children):
            subprocess.run(["kill", str(pid)], check=True)
    wait_for(lambda: not any(is_running(pid) for pid in children))


@pytest.mark.parametrize(
    "launcher", [["deep_ep_core.launch", "--no-prefix", "--ranks"], ["torch.distributed.run", "--nproc-per-node"]]
)
def test_worker_script_runs_under_either_launcher(launcher):
    command = [sys.executable, "-m", *launcher, "2", SUM_RANKS]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == ["ok: ranks_add_up", "ok: last_rank_is_content"]


def test_worker_script_fails_with_the_function_that_failed(capsys):
    assert main(["--ranks", "2", SUM_RANKS, "fail"]) == 1
    captured = capsys.readouterr()
    assert captured.out.splitlines() == ["[rank 0] ok: ranks_add_up"]
    assert "rank 1 failed first" in captured.err
    assert "in last_rank_is_content" in captured.err


def test_worker_script_without_a_launcher_says_how_to_start_it(monkeypatch):
    monkeypatch.delenv("RANK", raising=False)
    with pytest.raises(ConfigError, match=r"missing RANK.*; start it with .python -m deep_ep_core.launch --ranks N"):
        run_as_script()
