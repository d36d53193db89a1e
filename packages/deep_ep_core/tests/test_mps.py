from __future__ import annotations

import importlib.util
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch.distributed as dist

from deep_ep_core.errors import ConfigError
from deep_ep_core.launch import main
from deep_ep_core.local import LaunchConfig, RankPool, mps

PROGRAMS = Path(__file__).parent / "programs"
JOURNAL_RANK = str(PROGRAMS / "journal_rank.py")
SHARED = ("NCCL_MULTI_RANK_GPU_ENABLE", "NCCL_MAX_CTAS", "CUDA_DEVICE_MAX_CONNECTIONS")
NO_MPS_LINE = re.compile(r"^deep_ep_core.local: 2 ranks share 1 GPU without MPS \((.*)\), so each .* about 2 ms$", re.M)


@dataclass(frozen=True)
class Machine:
    """A machine whose GPUs and MPS daemon are make-believe."""

    folder: Path
    journal: Path

    def lines(self, start: str = "") -> list[str]:
        return [line for line in self.journal.read_text().splitlines() if line.startswith(start)]

    def folders(self) -> list[tuple[Path, Path]]:
        """The pipe and log folders of the daemons that were started."""
        return [(Path(words[1]), Path(words[2])) for words in map(str.split, self.lines("start /"))]

    def assert_nothing_is_left(self) -> None:
        pids = [int(line.split()[1]) for line in self.lines("daemon ") + self.lines("server ")]
        assert not [pid for pid in pids if is_running(pid)]
        for pipe, log in self.folders():
            assert not pipe.parent.exists()
            assert log.parent == pipe.parent


def is_running(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except OSError:
        return False


def wait_for(condition, timeout_s: float = 60.0) -> None:
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, "the condition did not come true in time"
        time.sleep(0.02)


def write_control(folder: Path) -> None:
    control = folder / "nvidia-cuda-mps-control"
    control.write_text(f'#!/bin/sh\nexec "{sys.executable}" -I -S "{PROGRAMS / "mps_fake.py"}" "$@"\n')
    control.chmod(0o755)


@pytest.fixture
def machine(monkeypatch, tmp_path):
    """`machine(num_gpus)` makes this machine look as if it had GPUs, and a control program of MPS first on PATH."""
    for name in ("CUDA_VISIBLE_DEVICES", *mps.MPS_VARIABLES, *SHARED, "NCCL_LSA_TEAM_SIZE", "FAKE_MPS_FAULT"):
        monkeypatch.delenv(name, raising=False)

    def make(num_gpus: int = 1, *, has_mps: bool = True) -> Machine:
        library = tmp_path / "pynvml.py"
        library.write_text(
            f"class NVMLError(Exception): pass\ndef nvmlInit(): pass\ndef nvmlShutdown(): pass\n"
            f"def nvmlDeviceGetCount(): return {num_gpus}\n"
            "def nvmlDeviceGetHandleByIndex(idx): return idx\ndef nvmlDeviceGetUUID(idx): return f'GPU-{idx}'\n"
        )
        spec = importlib.util.spec_from_file_location("pynvml", library)
        assert spec is not None
        assert spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        monkeypatch.setitem(sys.modules, "pynvml", module)
        # For a launcher that runs in a process of its own.
        monkeypatch.setenv("PYTHONPATH", os.pathsep.join(filter(None, [str(tmp_path), os.environ.get("PYTHONPATH")])))
        monkeypatch.setenv("FAKE_MPS_JOURNAL", str(tmp_path / "journal"))
        (tmp_path / "journal").touch()
        if has_mps:
            write_control(tmp_path)
        monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
        return Machine(folder=tmp_path, journal=tmp_path / "journal")

    return make


def environments(output: str) -> dict[int, dict[str, str]]:
    """What `journal_rank.py` printed, by rank."""
    shown = re.findall(r"^\[rank (\d+)\] (\{.*\})$", output, flags=re.MULTILINE)
    return {int(rank): json.loads(text)["environment"] for rank, text in shown}


def test_ranks_of_one_gpu_run_between_start_and_quit_of_their_daemon(machine, capsys):
    gpu = machine(num_gpus=1)
    assert main(["--ranks", "4", "--nodes", "2", "--device", "cuda", JOURNAL_RANK, "end"]) == 0
    captured = capsys.readouterr()
    ((pipe, log),) = gpu.folders()
    kinds = [line.split()[0] for line in gpu.lines()]
    assert kinds == ["start", "daemon", "start_server", "server", *["rank"] * 4, "quit,"]
    assert gpu.lines("start_server") == [f"start_server -uid {os.getuid()}"]
    assert gpu.lines("start /")[0].split()[3] == "GPU-0"
    assert gpu.lines("quit") == ["quit, ranks that run: []"]
    assert len(os.fsencode(pipe)) < 80, "a socket's path may have 107 bytes"
    for environment in environments(captured.out).values():
        assert environment["CUDA_MPS_PIPE_DIRECTORY"] == str(pipe)
        assert environment["CUDA_MPS_LOG_DIRECTORY"] == str(log)
        assert environment["CUDA_VISIBLE_DEVICES"] == "GPU-0"
        assert [environment[name] for name in (*SHARED, "NCCL_LSA_TEAM_SIZE")] == ["1", "2", "8", "2"]
    assert sorted(environments(captured.out)) == [0, 1, 2, 3]
    assert captured.err == ""
    gpu.assert_nothing_is_left()


def test_ranks_with_a_gpu_each_need_no_daemon(machine, capsys):
    gpus = machine(num_gpus=4)
    assert main(["--ranks", "4", "--nodes", "2", "--device", "cuda", JOURNAL_RANK, "end"]) == 0
    shown = environments(capsys.readouterr().out)
    assert [shown[rank]["CUDA_VISIBLE_DEVICES"] for rank in range(4)] == [
        *["GPU-0,GPU-1,GPU-2,GPU-3"] * 2,
        *["GPU-2,GPU-3,GPU-0,GPU-1"] * 2,
    ]
    for environment in shown.values():
        assert not {*mps.MPS_VARIABLES, *SHARED} & environment.keys()
    assert gpus.folders() == []


def test_mps_can_be_asked_for_where_each_rank_has_a_gpu(machine):
    gpus = machine(num_gpus=2)
    assert main(["--ranks", "2", "--device", "cuda", "--mps", "on", JOURNAL_RANK, "end"]) == 0
    assert gpus.lines("start /")[0].split()[3] == "GPU-0,GPU-1"
    gpus.assert_nothing_is_left()


def test_nothing_about_gpus_is_set_by_default(machine, capsys):
    gpu = machine(num_gpus=1)
    assert main(["--ranks", "2", JOURNAL_RANK, "end"]) == 0
    for environment in environments(capsys.readouterr().out).values():
        assert not {"CUDA_VISIBLE_DEVICES", *mps.MPS_VARIABLES, *SHARED} & environment.keys()
    assert gpu.folders() == []


def test_settings_of_the_user_for_nccl_are_kept(machine, capsys, monkeypatch):
    machine(num_gpus=1)
    monkeypatch.setenv("NCCL_MAX_CTAS", "7")
    assert main(["--ranks", "2", "--device", "cuda", "--mps", "off", JOURNAL_RANK, "end"]) == 0
    assert [shown["NCCL_MAX_CTAS"] for shown in environments(capsys.readouterr().out).values()] == ["7", "7"]


def test_only_gpus_that_the_user_shows_are_used(machine, capsys, monkeypatch):
    machine(num_gpus=4)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3,GPU-1")
    assert main(["--ranks", "2", "--device", "cuda", JOURNAL_RANK, "end"]) == 0
    shown = environments(capsys.readouterr().out)
    assert [shown[rank]["CUDA_VISIBLE_DEVICES"] for rank in range(2)] == ["GPU-3,GPU-1"] * 2


def test_daemon_is_quit_after_a_rank_failed_and_all_have_ended(machine, capsys):
    gpu = machine(num_gpus=1)
    assert main(["--ranks", "3", "--device", "cuda", JOURNAL_RANK, "raise"]) == 1
    assert "rank 1 failed first" in capsys.readouterr().err
    assert gpu.lines("quit") == ["quit, ranks that run: []"]
    gpu.assert_nothing_is_left()


@pytest.mark.parametrize(
    ("number", "fault", "begun"),
    [
        (signal.SIGINT, "", "rank 1"),
        (signal.SIGTERM, "", "rank 1"),
        (signal.SIGHUP, "", "rank 1"),
        (signal.SIGTERM, "slow", "daemon"),
    ],
)
def test_daemon_ends_when_a_signal_ends_the_launcher(machine, monkeypatch, number, fault, begun):
    gpu = machine(num_gpus=1)
    monkeypatch.setenv("FAKE_MPS_FAULT", fault)
    command = ["deep_ep_core.launch", "--ranks", "2", "--device", "cuda", JOURNAL_RANK, "sleep"]
    with subprocess.Popen(
        [sys.executable, "-m", *command],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        # A test that runs in the background of a shell, or under nohup, inherits ignored signals.
        preexec_fn=lambda: [signal.signal(n, signal.SIG_DFL) for n in (signal.SIGINT, signal.SIGHUP)],
    ) as launcher:
        try:
            wait_for(lambda: gpu.lines(begun))
            launcher.send_signal(number)
            assert launcher.wait(timeout=60) == 128 + number
        finally:
            launcher.kill()
    # A daemon that does not listen yet cannot be asked to quit.
    assert gpu.lines("quit") == ([] if fault else ["quit, ranks that run: []"])
    gpu.assert_nothing_is_left()


def test_daemon_that_does_not_quit_is_killed_with_its_server(machine, monkeypatch):
    gpu = machine(num_gpus=1)
    monkeypatch.setenv("FAKE_MPS_FAULT", "deaf")
    monkeypatch.setattr(mps, "_QUIT_S", 0.5)
    assert main(["--ranks", "2", "--device", "cuda", JOURNAL_RANK, "end"]) == 0
    assert len(gpu.lines("quit")) == 1
    assert gpu.lines("server ")
    gpu.assert_nothing_is_left()


def test_daemon_that_listens_late_is_waited_for(machine, capsys, monkeypatch):
    gpu = machine(num_gpus=1)
    monkeypatch.setenv("FAKE_MPS_FAULT", "slow")
    assert main(["--ranks", "2", "--device", "cuda", "--mps", "on", JOURNAL_RANK, "end"]) == 0
    assert "CUDA_MPS_PIPE_DIRECTORY" in environments(capsys.readouterr().out)[0]
    gpu.assert_nothing_is_left()


@pytest.mark.parametrize(
    ("fault", "reason"),
    [
        ("absent", r"nvidia-cuda-mps-control is not on PATH"),
        ("refuses", r"`nvidia-cuda-mps-control -d` failed: the daemon does not want to; no such device"),
        ("serverless", r"no MPS server within 0.5 s"),
    ],
)
def test_launch_goes_on_without_a_daemon_unless_it_is_demanded(machine, capsys, monkeypatch, fault, reason):
    gpu = machine(num_gpus=1, has_mps=fault != "absent")
    monkeypatch.setenv("FAKE_MPS_FAULT", fault)
    monkeypatch.setattr(mps, "_START_S", 0.5 if fault == "serverless" else 10)
    assert main(["--ranks", "2", "--device", "cuda", JOURNAL_RANK, "end"]) == 0
    captured = capsys.readouterr()
    (told,) = NO_MPS_LINE.findall(captured.err)
    assert re.fullmatch(reason, told)
    assert not set(mps.MPS_VARIABLES) & environments(captured.out)[0].keys()
    assert main(["--ranks", "2", "--device", "cuda", "--mps", "on", JOURNAL_RANK, "end"]) == 2
    assert re.search(rf'deep_ep_core.launch: mps="on" needs an MPS daemon.*\(got: {reason}\)', capsys.readouterr().err)
    assert len(gpu.lines("rank ")) == 2, "no rank started the second time"
    gpu.assert_nothing_is_left()


def test_ranks_take_turns_without_a_word_when_mps_is_off(machine, capsys, monkeypatch):
    gpu = machine(num_gpus=1)
    monkeypatch.setenv("CUDA_MPS_PIPE_DIRECTORY", "/nonexistent/pipe")
    assert main(["--ranks", "2", "--device", "cuda", "--mps", "off", JOURNAL_RANK, "end"]) == 0
    captured = capsys.readouterr()
    assert captured.err == ""
    for environment in environments(captured.out).values():
        assert not set(mps.MPS_VARIABLES) & environment.keys()
        assert environment["NCCL_MULTI_RANK_GPU_ENABLE"] == "1"
    assert gpu.folders() == []


@pytest.fixture
def users_daemon(machine, monkeypatch):
    """A daemon that the user started, and its machine."""
    gpu = machine(num_gpus=1)
    with tempfile.TemporaryDirectory(prefix="user-") as folder:
        monkeypatch.setenv("CUDA_MPS_PIPE_DIRECTORY", folder)
        monkeypatch.setenv("CUDA_MPS_LOG_DIRECTORY", folder)
        control = gpu.folder / "nvidia-cuda-mps-control"
        subprocess.run([control, "-d"], env={**os.environ, "CUDA_VISIBLE_DEVICES": ""}, check=True)
        wait_for(lambda: Path(folder, "control_privileged").exists())
        yield gpu, folder
        for line in gpu.lines("daemon "):
            pid = int(line.split()[1])
            if is_running(pid):
                os.kill(pid, signal.SIGKILL)


@pytest.mark.parametrize("mode", ["auto", "on"])
def test_daemon_of_the_user_serves_the_ranks_and_lives_on(users_daemon, capsys, mode):
    gpu, folder = users_daemon
    assert main(["--ranks", "2", "--device", "cuda", "--mps", mode, JOURNAL_RANK, "end"]) == 0
    captured = capsys.readouterr()
    assert captured.err == ""
    assert {shown["CUDA_MPS_PIPE_DIRECTORY"] for shown in environments(captured.out).values()} == {folder}
    assert len(gpu.lines("daemon ")) == 1
    assert gpu.lines("quit") == []
    assert is_running(int(gpu.lines("daemon ")[0].split()[1]))
    assert Path(folder).exists()


def test_daemon_of_the_user_that_is_gone_is_replaced(machine, capsys, monkeypatch, tmp_path):
    gpu = machine(num_gpus=1)
    monkeypatch.setenv("CUDA_MPS_PIPE_DIRECTORY", str(tmp_path))
    assert main(["--ranks", "2", "--device", "cuda", JOURNAL_RANK, "end"]) == 0
    ((pipe, _),) = gpu.folders()
    assert pipe != tmp_path
    assert environments(capsys.readouterr().out)[0]["CUDA_MPS_PIPE_DIRECTORY"] == str(pipe)
    gpu.assert_nothing_is_left()


def test_long_temporary_folder_does_not_make_the_socket_path_too_long(machine, monkeypatch, tmp_path):
    long_folder = tmp_path / ("x" * 100)
    long_folder.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(long_folder))
    gpu = machine(num_gpus=1)
    assert main(["--ranks", "2", "--device", "cuda", "--mps", "on", JOURNAL_RANK, "end"]) == 0
    gpu.assert_nothing_is_left()


def test_machine_without_a_gpu_is_told_on_one_line(machine, capsys):
    machine(num_gpus=0)
    assert main(["--ranks", "2", "--device", "cuda", JOURNAL_RANK, "end"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith('deep_ep_core.launch: device="cuda" needs an NVIDIA GPU')


def test_config_refuses_what_it_does_not_know():
    with pytest.raises(ConfigError, match="device must be one of cpu, cuda"):
        LaunchConfig(num_ranks=1, device="gpu")
    with pytest.raises(ConfigError, match="mps must be one of auto, on, off"):
        LaunchConfig(num_ranks=1, mps="yes")
    with pytest.raises(ConfigError, match='mps="on" needs device="cuda"'):
        LaunchConfig(num_ranks=1, mps="on")


def pipe_folder_and_backend() -> tuple[str | None, str]:
    return os.environ.get("CUDA_MPS_PIPE_DIRECTORY"), dist.get_backend()


def die_on(rank: int) -> None:
    if dist.get_rank() == rank:
        os.kill(os.getpid(), signal.SIGKILL)


def test_pool_that_restarts_has_a_new_daemon_in_new_folders(machine):
    gpu = machine(num_gpus=1)
    with RankPool(2, device="cuda", mps="on") as ranks:
        first = str(gpu.folders()[0][0])
        assert ranks.run(pipe_folder_and_backend) == [(first, "gloo")] * 2
        ranks.run_catching(die_on, 1)
        assert ranks.is_broken
        # The broken pool has quit its daemon by now: none is left that a restart could take.
        gpu.assert_nothing_is_left()
        ranks.restart()
        (second,) = {folder for folder, _ in ranks.run(pipe_folder_and_backend)}
        assert second == str(gpu.folders()[1][0]) != first
    assert len(gpu.lines("quit")) == 2
    gpu.assert_nothing_is_left()
