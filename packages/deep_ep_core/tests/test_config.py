from __future__ import annotations

import json
import os
import stat
import subprocess
import sys
from pathlib import Path

import pytest

from deep_ep_core import config
from deep_ep_core.config import main, writable_settings_path
from deep_ep_core.env import VARIABLES, get_env, prefix_settings_path, read_settings, reset_env, user_settings_path


@pytest.fixture(autouse=True)
def own_places(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A virtual environment and a user's folder of the test's own, both empty."""
    for variable in VARIABLES:
        monkeypatch.delenv(variable.name, raising=False)
    (tmp_path / "prefix").mkdir()
    monkeypatch.setattr(sys, "prefix", str(tmp_path / "prefix"))
    monkeypatch.setattr(sys, "base_prefix", str(tmp_path / "base"))
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "user"))


def test_set_value_is_read_by_the_next_process(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["set", "EP_JIT_CACHE_DIR", "/kernels"]) == 0
    assert str(prefix_settings_path()) in capsys.readouterr().out
    reset_env()
    try:
        assert get_env().jit_cache_dir == Path("/kernels")
    finally:
        reset_env()


def test_set_keeps_the_other_settings() -> None:
    main(["set", "EP_JIT_CACHE_DIR", "/a"])
    main(["set", "EP_NIC_NAME", "mlx5_1"])
    main(["set", "EP_JIT_CACHE_DIR", "~/b"])
    assert read_settings(prefix_settings_path()) == {"EP_JIT_CACHE_DIR": "~/b", "EP_NIC_NAME": "mlx5_1"}


def test_prefix_is_written_only_in_an_environment_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    assert writable_settings_path() == prefix_settings_path()
    monkeypatch.setattr(sys, "base_prefix", sys.prefix)
    assert writable_settings_path() == user_settings_path()
    Path(sys.prefix, "conda-meta").mkdir()
    assert writable_settings_path() == prefix_settings_path()


def test_prefix_that_may_not_be_written_is_passed_over(monkeypatch: pytest.MonkeyPatch) -> None:
    """The refusal is simulated, because root may write everywhere."""
    monkeypatch.setattr(os, "access", lambda path, mode: str(path) != sys.prefix)
    assert main(["set", "EP_NIC_NAME", "mlx5_1"]) == 0
    assert not prefix_settings_path().exists()
    assert read_settings(user_settings_path()) == {"EP_NIC_NAME": "mlx5_1"}


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("EP_JIT_CACHE_DIR", "/c"),
        ("EP_JIT_PRINT_COMPILER_COMMAND", "on"),
        ("EP_NUM_TOPK_IDX_BITS", "64"),
        ("EP_NCCL_ROOT_DIR", "~/nccl"),
    ],
)
def test_upstream_persistent_name_can_be_stored(name: str, value: str) -> None:
    assert main(["set", name, value]) == 0
    assert read_settings(prefix_settings_path()) == {name: value}


def test_storing_a_setting_without_effect_says_so(capsys: pytest.CaptureFixture[str]) -> None:
    main(["set", "EP_NUM_TOPK_IDX_BITS", "32"])
    assert "no effect" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("name", "value", "words"),
    [
        ("EP_JIT_CACHEDIR", "/c", ["EP_JIT_CACHEDIR", "did you mean EP_JIT_CACHE_DIR?"]),
        ("PATH", "/c", ["must be a known variable"]),
        ("CUDA_HOME", "/c", ["CUDA_HOME cannot be stored"]),
        ("EP_NUM_MAX_LOCAL_RANKS", "8", ["EP_NUM_MAX_LOCAL_RANKS cannot be stored", "process group"]),
        ("EP_JIT_DEBUG", "perhaps", ["EP_JIT_DEBUG must be", "'perhaps'", "from the command line"]),
        ("EP_NUM_TOPK_IDX_BITS", "16", ["one of 0, 32, 64"]),
        ("EP_NIC_NAME", "", ["not empty"]),
        ("EP_JIT_CACHE_DIR", "", ["must be a path"]),
        ("EP_JIT_CACHE_DIR", "kernels", ["absolute path", "'kernels'"]),
    ],
)
def test_setting_that_cannot_work_is_refused_and_nothing_written(
    name: str, value: str, words: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["set", name, value]) == 1
    message = capsys.readouterr().err
    assert all(word in message for word in words), message
    assert not prefix_settings_path().exists()


def test_unset_removes_from_both_files(capsys: pytest.CaptureFixture[str]) -> None:
    main(["set", "EP_NIC_NAME", "mlx5_1"])
    main(["set", "EP_JIT_DEBUG", "1"])
    user_settings_path().parent.mkdir(parents=True)
    user_settings_path().write_text('{"EP_NIC_NAME": "mlx5_2"}')
    capsys.readouterr()
    assert main(["unset", "EP_NIC_NAME"]) == 0
    assert read_settings(prefix_settings_path()) == {"EP_JIT_DEBUG": "1"}
    assert read_settings(user_settings_path()) == {}
    message = capsys.readouterr().out
    assert str(prefix_settings_path()) in message
    assert str(user_settings_path()) in message


def test_unset_of_what_is_not_stored_fails_and_writes_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["unset", "EP_NIC_NAME"]) == 1
    assert "EP_NIC_NAME is in no settings file" in capsys.readouterr().err
    assert main(["unset", "EP_NICNAME"]) == 1
    assert "did you mean EP_NIC_NAME?" in capsys.readouterr().err
    assert not prefix_settings_path().exists()


def test_list_shows_what_is_stored_where_and_what_hides_it(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    main(["set", "EP_NIC_NAME", "mlx5_1"])
    main(["set", "EP_JIT_DEBUG", "1"])
    user_settings_path().parent.mkdir(parents=True)
    user_settings_path().write_text('{"EP_NIC_NAME": "mlx5_2"}')
    monkeypatch.setenv("EP_JIT_DEBUG", "0")
    capsys.readouterr()
    assert main(["list"]) == 0
    assert capsys.readouterr().out.splitlines() == [
        f"EP_JIT_DEBUG=1  # {prefix_settings_path()}  (hidden by the environment)",
        f"EP_NIC_NAME=mlx5_1  # {prefix_settings_path()}",
        f"EP_NIC_NAME=mlx5_2  # {user_settings_path()}  (hidden by {prefix_settings_path()})",
    ]


def test_path_is_the_file_that_set_writes(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["path"]) == 0
    path = Path(capsys.readouterr().out.strip())
    main(["set", "EP_NIC_NAME", "mlx5_1"])
    assert read_settings(path) == {"EP_NIC_NAME": "mlx5_1"}


def test_corrupt_file_is_reported_and_kept(capsys: pytest.CaptureFixture[str]) -> None:
    """Overwriting it would lose what its owner could still save."""
    prefix_settings_path().parent.mkdir(parents=True)
    prefix_settings_path().write_text('{"EP_NIC_NAME": ')
    assert main(["set", "EP_JIT_DEBUG", "1"]) == 1
    message = capsys.readouterr().err
    assert str(prefix_settings_path()) in message
    assert "correct it or delete it" in message
    assert prefix_settings_path().read_text() == '{"EP_NIC_NAME": '


def test_failure_while_writing_leaves_the_old_file_and_no_other(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    main(["set", "EP_NIC_NAME", "mlx5_1"])
    before = prefix_settings_path().read_bytes()

    def fail_half_way(settings: object, file: object, **_: object) -> None:
        file.write('{"EP_NIC')  # type: ignore[attr-defined]
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(config.json, "dump", fail_half_way)
    capsys.readouterr()
    assert main(["set", "EP_NIC_NAME", "mlx5_2"]) == 1
    assert "No space left on device" in capsys.readouterr().err
    assert prefix_settings_path().read_bytes() == before
    assert list(prefix_settings_path().parent.iterdir()) == [prefix_settings_path()]


def test_file_is_whole_before_it_takes_the_name(monkeypatch: pytest.MonkeyPatch) -> None:
    main(["set", "EP_NIC_NAME", "mlx5_1"])
    seen = []
    replace = os.replace

    def look_and_replace(source: Path, target: Path) -> None:
        seen.append((json.loads(Path(source).read_text()), json.loads(Path(target).read_text())))
        replace(source, target)

    monkeypatch.setattr(os, "replace", look_and_replace)
    main(["set", "EP_NIC_NAME", "mlx5_2"])
    assert seen == [({"EP_NIC_NAME": "mlx5_2"}, {"EP_NIC_NAME": "mlx5_1"})]


def test_others_may_read_the_file_as_the_umask_says() -> None:
    """A shared environment is set up by one user and read by all."""
    old_umask = os.umask(0o022)
    try:
        main(["set", "EP_NIC_NAME", "mlx5_1"])
    finally:
        os.umask(old_umask)
    assert stat.S_IMODE(prefix_settings_path().stat().st_mode) == 0o644


def test_command_line_runs_as_a_module(tmp_path: Path) -> None:
    environ = {**os.environ, "XDG_CONFIG_HOME": str(tmp_path / "user")}
    command = [sys.executable, "-W", "error::RuntimeWarning", "-m", "deep_ep_core.config"]
    refused = subprocess.run(
        [*command, "set", "EP_NICNAME", "x"], env=environ, capture_output=True, text=True, timeout=120
    )
    assert refused.returncode == 1
    assert "did you mean EP_NIC_NAME?" in refused.stderr
    path = subprocess.run([*command, "path"], env=environ, capture_output=True, text=True, timeout=120, check=True)
    assert path.stdout.strip().endswith("config.json")
