from __future__ import annotations

import ctypes
import os
import subprocess
import sys
from pathlib import Path

import pytest

from deep_ep_core.env import reset_env
from deep_ep_core.errors import CompileError, ConfigError
from deep_ep_core.local.config import LaunchConfig
from deep_ep_core.local.processes import RankProcesses
from deep_ep_core.loopback import build, build_plugin, loopback_variables
from deep_ep_core.loopback.variables import NETWORK_CHOICES

pytestmark = [pytest.mark.timeout(180), pytest.mark.usefixtures("fresh_env")]


def test_plugin_is_built_once_and_exports_the_tables_that_nccl_looks_up(tmp_path: Path) -> None:
    path = build_plugin(tmp_path / "cache")
    stamp = path.stat().st_mtime_ns
    assert build_plugin(tmp_path / "cache") == path
    assert path.stat().st_mtime_ns == stamp
    library = ctypes.CDLL(str(path))
    for version in (14, 16):
        assert ctypes.c_void_p.in_dll(library, f"ncclRmaPlugin_v{version}").value is not None
    # NCCL copies the name into 255 characters.
    assert len(str(path.relative_to(tmp_path))) < 120


def test_processes_that_build_at_once_get_one_library(tmp_path: Path) -> None:
    command = [sys.executable, "-c", "from deep_ep_core.loopback import build_plugin; print(build_plugin())"]
    environment = {**os.environ, "EP_JIT_CACHE_DIR": str(tmp_path / "shared")}
    processes = [subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True) for _ in range(3)]
    paths = {process.communicate()[0].strip() for process in processes}
    assert len(paths) == 1
    assert [path.name for path in Path(paths.pop()).parent.iterdir()] == ["libnccl-rma-deep-ep-loopback.so"]


def test_changed_source_gives_another_library(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = build_plugin(tmp_path / "cache")
    sources = tmp_path / "sources"
    sources.mkdir()
    for path in build.SOURCE_DIR.glob("*.[ch]"):
        (sources / path.name).write_text(path.read_text())
    with open(sources / "faults.h", "a") as file:
        file.write("// changed\n")
    monkeypatch.setattr(build, "SOURCE_DIR", sources)
    assert build_plugin(tmp_path / "cache") != first


def test_source_that_does_not_compile_is_shown(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "broken.c").write_text("int broken(void) { return missing_name; }\n")
    monkeypatch.setattr(build, "SOURCE_DIR", tmp_path)
    with pytest.raises(CompileError, match="missing_name"):
        build_plugin(tmp_path / "cache")
    assert not list((tmp_path / "cache").rglob("*.so*"))


def test_missing_compiler_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(ConfigError, match="needs a C compiler"):
        build_plugin(tmp_path / "cache")


def test_folder_that_cannot_be_written_costs_a_warning(tmp_path: Path) -> None:
    (tmp_path / "cache").write_text("a file where the folder should be")
    with pytest.warns(RuntimeWarning, match="EP_JIT_CACHE_DIR"):
        path = build_plugin(tmp_path / "cache")
    assert path.is_file()


def test_variables_name_the_plugin_and_pass_settings_on(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("EP_LOOPBACK_REORDER", "9")
    monkeypatch.setenv("EP_LOOPBACK_COUNTERS", str(tmp_path))
    reset_env()
    variables = loopback_variables({})
    assert Path(variables.pop("NCCL_RMA_PLUGIN")).is_file()
    assert variables == {
        "NCCL_GIN_TYPE": "2",
        "EP_LOOPBACK_DELAY_US": "0",
        "EP_LOOPBACK_REORDER": "9",
        "EP_LOOPBACK_DROP_AFTER": "0",
        "EP_LOOPBACK_COUNTERS": str(tmp_path),
    }


@pytest.mark.parametrize("name", NETWORK_CHOICES)
def test_network_of_the_user_is_left_alone(name: str) -> None:
    assert loopback_variables({name: "1"}) == {}


def test_no_network_is_given_where_gin_is_off(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("EP_DISABLE_GIN", "1")
    reset_env()
    assert loopback_variables({}) == {}


@pytest.mark.parametrize(
    ("device", "num_nodes", "has_network"), [("cuda", 2, True), ("cuda", 1, False), ("cpu", 2, False)]
)
def test_ranks_of_make_believe_nodes_get_the_network(
    monkeypatch: pytest.MonkeyPatch, device: str, num_nodes: int, has_network: bool
) -> None:
    monkeypatch.setattr("deep_ep_core.local.processes.find_gpus", lambda environment: ("GPU-0",))
    lines: list[str] = []
    program = "import os; print(os.environ.get('NCCL_RMA_PLUGIN'), os.environ.get('NCCL_GIN_TYPE'))"
    config = LaunchConfig(num_ranks=2, num_nodes=num_nodes, device=device, mps="off" if device == "cuda" else "auto")  # type: ignore[arg-type]
    with RankProcesses(config, ["-c", program], on_line=lambda rank, stream, line: lines.append(line)) as ranks:
        while ranks.running:
            ranks.pump(0.05)
            ranks.poll()
        ranks.pump(0.05)
    expected = f"{build_plugin()} 2" if has_network else "None None"
    assert [line.strip() for line in lines] == [expected] * 2


def test_launch_without_a_compiler_goes_on_without_a_network(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("deep_ep_core.local.processes.find_gpus", lambda environment: ("GPU-0",))
    monkeypatch.setattr(build, "find_compiler", _no_compiler)
    config = LaunchConfig(num_ranks=2, num_nodes=2, device="cuda", mps="off")
    with pytest.warns(RuntimeWarning, match="no network between the make-believe nodes: there is none"):
        ranks = RankProcesses(config, ["-c", "pass"], on_line=lambda *_: None)
    ranks.stop(grace_s=0)
    assert "NCCL_RMA_PLUGIN" not in os.environ


def _no_compiler() -> str:
    raise ConfigError("there is none")
