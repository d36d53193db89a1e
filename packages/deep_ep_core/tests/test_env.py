from __future__ import annotations

import dataclasses
import importlib.util
import json
import os
import subprocess
import sys
import warnings
from pathlib import Path
from types import ModuleType, UnionType
from typing import Any, get_args, get_type_hints

import pytest

from deep_ep_core.env import (
    VARIABLES,
    Env,
    environment_tables,
    find_variable,
    get_env,
    load_env,
    read_settings,
    reset_env,
    settings_paths,
)
from deep_ep_core.errors import ConfigError

_REPOSITORY = Path(__file__).parents[3]

# The names that upstream documents or reads, and their defaults.
_UPSTREAM_DEFAULTS = {
    "EP_BUFFER_DEBUG": "0",
    "EP_SUPPRESS_NCCL_CHECK": "0",
    "EP_AVOID_RECORD_STREAM": "0",
    "EP_NUM_TOPK_IDX_BITS": "0",
    "EP_REUSE_NCCL_COMM": "1",
    "EP_NUM_MAX_LOCAL_RANKS": "16",
    "EP_NIC_NAME": "mlx5_0",
    "EP_OVERRIDE_RDMA_SL": None,
    "EP_DISABLE_GIN": "0",
    "EP_JIT_DEBUG": "0",
    "EP_JIT_CACHE_DIR": "~/.deep_ep",
    "EP_JIT_NVCC_COMPILER": None,
    "EP_JIT_CPP_STANDARD": "20",
    "EP_JIT_PRINT_COMPILER_COMMAND": "0",
    "EP_JIT_PTXAS_VERBOSE": "0",
    "EP_JIT_PTXAS_CHECK": "0",
    "EP_JIT_WITH_LINEINFO": "0",
    "EP_JIT_DUMP_ASM": "0",
    "EP_JIT_DUMP_PTX": "0",
    "EP_JIT_DUMP_SASS": "0",
    "EP_GIN_GDAKI_DEBUG": "0",
    "EP_USE_NVIDIA_TOOLS": "0",
    "EP_DISABLE_BARRIER_PROFILING": "0",
    "EP_NCCL_ROOT_DIR": None,
    "EP_NVSHMEM_ROOT_DIR": None,
    "TORCH_CUDA_ARCH_LIST": None,
    "DISABLE_SM90_FEATURES": "0",
    "DISABLE_AGGRESSIVE_PTX_INSTRS": "0",
    "CUDA_HOME": None,
    "CUDA_PATH": None,
    "NCCL_DIR": None,
    "NVSHMEM_DIR": None,
}


@pytest.fixture
def clean_process(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """A process with no settings, whose settings files are in a folder of the test."""
    for variable in VARIABLES:
        monkeypatch.delenv(variable.name, raising=False)
    monkeypatch.setattr(sys, "prefix", str(tmp_path / "prefix"))
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "user"))
    reset_env()
    yield
    reset_env()


def _store(path: Path, settings: object) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(settings))
    return path


def test_table_holds_every_upstream_variable_once_with_its_default() -> None:
    defaults = {variable.name: variable.default for variable in VARIABLES}
    assert len(defaults) == len(VARIABLES)
    assert {name: defaults[name] for name in _UPSTREAM_DEFAULTS} == _UPSTREAM_DEFAULTS


def test_env_has_a_field_of_the_right_type_for_each_used_variable() -> None:
    """The fields are written out for the type checker; this holds them against the table."""
    by_field = {variable.field_name: variable for variable in VARIABLES if variable.field_name is not None}
    assert sorted(by_field) == sorted(field.name for field in dataclasses.fields(Env))
    for name, hint in get_type_hints(Env).items():
        may_be_none = isinstance(hint, UnionType)
        assert may_be_none == (by_field[name].default is None), name
        assert (get_args(hint)[0] if may_be_none else hint) is by_field[name].type, name


def test_empty_environment_gives_the_defaults() -> None:
    env = load_env({})
    assert env.reuse_nccl_comm is True
    assert env.buffer_debug is False
    assert env.nic_name == "mlx5_0"
    assert env.jit_cpp_standard == 20
    assert env.jit_cache_dir == Path.home() / ".deep_ep"
    assert env.override_rdma_sl is None
    assert env.nccl_root_dir is None


@pytest.mark.parametrize("text", ["0", "", "false", "no", "off", "False", "OFF", " 0 ", "00"])
def test_flag_is_off(text: str) -> None:
    """Upstream takes any text, "0" too, for EP_BUFFER_DEBUG set."""
    env = load_env({"EP_BUFFER_DEBUG": text, "EP_REUSE_NCCL_COMM": text})
    assert (env.buffer_debug, env.reuse_nccl_comm) == (False, False)


@pytest.mark.parametrize("text", ["1", "true", "yes", "on", "TRUE", "Yes", "2", "-1"])
def test_flag_is_on(text: str) -> None:
    assert load_env({"EP_BUFFER_DEBUG": text}).buffer_debug is True


@pytest.mark.parametrize("text", ["y", "maybe", "1.0", "0x1", "true false"])
def test_flag_that_is_neither_is_refused(text: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load_env({"EP_DISABLE_GIN": text})
    message = str(caught.value)
    assert "EP_DISABLE_GIN" in message
    assert repr(text) in message
    assert "from the environment" in message
    assert all(word in message for word in ("0", "false", "no", "off", "1", "true", "yes", "on"))


@pytest.mark.parametrize(("text", "value"), [("0", 0), ("3", 3), (" 7 ", 7)])
def test_integer_is_parsed(text: str, value: int) -> None:
    assert load_env({"EP_OVERRIDE_RDMA_SL": text}).override_rdma_sl == value


@pytest.mark.parametrize(
    ("name", "text", "allowed"),
    [
        ("EP_OVERRIDE_RDMA_SL", "-1", "at least 0"),
        ("EP_OVERRIDE_RDMA_SL", "high", "an integer"),
        ("EP_JIT_CPP_STANDARD", "17", "at least 20"),
        ("EP_JIT_CPP_STANDARD", "c++20", "an integer"),
    ],
)
def test_integer_out_of_range_is_refused(name: str, text: str, allowed: str) -> None:
    with pytest.raises(ConfigError, match=f"{name} must be .*{allowed}.*{text.replace('+', '.')}"):
        load_env({name: text})


def test_index_width_must_be_a_width_that_exists() -> None:
    with pytest.raises(ConfigError, match=r"one of 0, 32, 64 \(got '16'"):
        find_variable("EP_NUM_TOPK_IDX_BITS").parse("16", "the command line")
    assert find_variable("EP_NUM_TOPK_IDX_BITS").parse("32", "the command line") == 32


def test_home_is_expanded_in_paths() -> None:
    assert load_env({"EP_JIT_CACHE_DIR": "~/kernels"}).jit_cache_dir == Path.home() / "kernels"


def test_empty_text_means_unset_except_for_flags(tmp_path: Path) -> None:
    file = _store(tmp_path / "config.json", {"EP_NIC_NAME": "mlx5_3", "EP_REUSE_NCCL_COMM": "1"})
    env = load_env({"EP_NIC_NAME": "", "EP_REUSE_NCCL_COMM": "", "EP_JIT_CPP_STANDARD": "", "CUDA_HOME": ""}, [file])
    assert env.nic_name == "mlx5_3"
    assert env.reuse_nccl_comm is False
    assert env.jit_cpp_standard == 20
    assert env.cuda_home is None


@pytest.mark.parametrize(
    ("name", "stand_in", "field"),
    [
        ("CUDA_HOME", "CUDA_PATH", "cuda_home"),
        ("EP_NCCL_ROOT_DIR", "NCCL_DIR", "nccl_root_dir"),
        ("EP_NVSHMEM_ROOT_DIR", "NVSHMEM_DIR", "nvshmem_root_dir"),
    ],
)
def test_stand_in_is_read_only_when_the_variable_is_unset(name: str, stand_in: str, field: str) -> None:
    assert getattr(load_env({stand_in: "/b"}), field) == Path("/b")
    assert getattr(load_env({stand_in: "/b", name: "/a"}), field) == Path("/a")


def test_environment_wins_over_prefix_file_and_prefix_file_over_user_file(tmp_path: Path) -> None:
    prefix = _store(tmp_path / "prefix.json", {"EP_NIC_NAME": "prefix", "EP_JIT_CACHE_DIR": "/prefix"})
    user = _store(
        tmp_path / "user.json", {"EP_NIC_NAME": "user", "EP_JIT_CACHE_DIR": "/user", "EP_NCCL_ROOT_DIR": "/user"}
    )
    env = load_env({"EP_NIC_NAME": "environment"}, [prefix, user])
    assert env.nic_name == "environment"
    assert env.jit_cache_dir == Path("/prefix")
    assert env.nccl_root_dir == Path("/user")


@pytest.mark.usefixtures("clean_process")
def test_process_reads_the_prefix_file_before_the_user_file() -> None:
    prefix, user = settings_paths()
    assert prefix == Path(sys.prefix, "etc", "deep_ep", "config.json")
    assert user == Path(os.environ["XDG_CONFIG_HOME"], "deep_ep", "config.json")
    _store(user, {"EP_NIC_NAME": "user", "EP_JIT_DEBUG": "1"})
    _store(prefix, {"EP_NIC_NAME": "prefix"})
    assert get_env().nic_name == "prefix"
    assert get_env().jit_debug is True


@pytest.mark.usefixtures("clean_process")
def test_environment_is_read_once(monkeypatch: pytest.MonkeyPatch) -> None:
    first = get_env()
    monkeypatch.setenv("EP_DISABLE_GIN", "1")
    assert get_env() is first
    assert first.disable_gin is False
    reset_env()
    assert get_env().disable_gin is True


@pytest.mark.usefixtures("clean_process")
def test_reading_changes_nothing_in_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NCCL_DIR", "/b")
    before = dict(os.environ)
    assert get_env().nccl_root_dir == Path("/b")
    assert dict(os.environ) == before


def test_import_reads_no_environment() -> None:
    """A value that is not allowed is reported by the call that needs the settings, not by the import."""
    environ = {**os.environ, "EP_BUFFER_DEBUG": "perhaps"}
    code = "import deep_ep_core.env, deep_ep_core.config, deep_ep_core.links"
    subprocess.run([sys.executable, "-c", code], env=environ, check=True, timeout=120)


def test_misspelt_name_is_warned_of_with_the_right_one() -> None:
    with pytest.warns(UserWarning, match="EP_JIT_CACHEDIR is set but is no setting.*mean EP_JIT_CACHE_DIR"):
        load_env({"EP_JIT_CACHEDIR": "/x"})


def test_foreign_name_is_warned_of_without_a_suggestion() -> None:
    """Launch scripts use EP_SIZE for their own purposes; it resembles nothing here."""
    with pytest.warns(UserWarning, match="EP_SIZE is set") as caught:
        load_env({"EP_SIZE": "8"})
    assert "did you mean" not in str(caught[0].message)


@pytest.mark.parametrize(
    ("name", "text", "reason"),
    [("EP_NUM_TOPK_IDX_BITS", "32", "int32 and int64"), ("EP_NUM_MAX_LOCAL_RANKS", "8", "process group")],
)
def test_variable_without_effect_is_accepted_with_the_reason(name: str, text: str, reason: str) -> None:
    with pytest.warns(UserWarning, match=f"{name} is set but has no effect: .*{reason}") as caught:
        env = load_env({name: text})
    assert len(caught) == 1
    assert env == load_env({})


def test_variables_of_others_cause_no_warning() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        load_env({"DISABLE_SM90_FEATURES": "1", "TORCH_CUDA_ARCH_LIST": "9.0", "EPOCHS": "3", "CUDA_HOME": "/c"})


@pytest.mark.usefixtures("clean_process")
def test_process_is_warned_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("EP_NIC", "mlx5_1")
    with pytest.warns(UserWarning, match="did you mean EP_NIC_NAME"):
        get_env()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        get_env()


@pytest.mark.parametrize("content", [b"{", b"", b"[1]", b'{"EP_JIT_DEBUG": 1}', b'{"EP_JIT_DEBUG": "\xff"}'])
def test_corrupt_file_is_named_with_what_to_do(content: bytes, tmp_path: Path) -> None:
    file = tmp_path / "config.json"
    file.write_bytes(content)
    with pytest.raises(ConfigError, match=r"config\.json must hold .*correct it or delete it") as caught:
        load_env({}, [file])
    assert str(file) in str(caught.value)


def test_bad_value_in_a_file_is_reported_with_the_file(tmp_path: Path) -> None:
    file = _store(tmp_path / "config.json", {"EP_JIT_DEBUG": "perhaps"})
    with pytest.raises(ConfigError, match="EP_JIT_DEBUG must be") as caught:
        load_env({}, [file])
    assert f"from {file}" in str(caught.value)


def test_file_without_permission_is_left_out_with_a_warning(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The refusal is simulated, because root reads every file."""
    secret = _store(tmp_path / "secret.json", {"EP_NIC_NAME": "secret"})
    user = _store(tmp_path / "user.json", {"EP_NIC_NAME": "user"})
    read_bytes = Path.read_bytes

    def refuse_secret(path: Path) -> bytes:
        if path == secret:
            raise PermissionError(13, "Permission denied", str(path))
        return read_bytes(path)

    monkeypatch.setattr(Path, "read_bytes", refuse_secret)
    with pytest.warns(UserWarning, match=r"secret\.json.*left out.*Permission denied"):
        assert load_env({}, [secret, user]).nic_name == "user"


def test_missing_file_is_empty(tmp_path: Path) -> None:
    assert read_settings(tmp_path / "config.json") == {}
    blocker = tmp_path / "etc"
    blocker.write_text("a file where a folder is looked for")
    assert read_settings(blocker / "config.json") == {}


def test_name_in_a_file_that_cannot_be_stored_is_ignored_with_a_warning(tmp_path: Path) -> None:
    file = _store(tmp_path / "config.json", {"EP_NICNAME": "mlx5_1", "CUDA_HOME": "/c"})
    with pytest.warns(UserWarning, match="no setting that can be stored") as caught:
        env = load_env({}, [file])
    messages = [str(warning.message) for warning in caught]
    assert len(messages) == 2
    assert any("EP_NICNAME" in message and "did you mean EP_NIC_NAME" in message for message in messages)
    assert env.cuda_home is None


def test_unknown_name_is_refused_with_a_suggestion() -> None:
    with pytest.raises(ConfigError, match=r"got ep_jit_debug.*did you mean EP_JIT_DEBUG\?"):
        find_variable("ep_jit_debug")


def test_tables_hold_each_variable_once_with_type_default_and_effect() -> None:
    tables = environment_tables()
    rows = {row.split("`")[1]: row for row in tables.splitlines() if row.startswith("| `")}
    assert set(rows) >= set(_UPSTREAM_DEFAULTS)
    for variable in VARIABLES:
        assert tables.count(f"| `{variable.name}` |") == 1
        assert variable.effect in rows[variable.name]
        assert variable.default is None or f"| `{variable.default}` |" in rows[variable.name]
        assert rows[variable.name].count("|") == 6
        assert ("without effect" in rows[variable.name]) == (not variable.is_used)
    assert "| int | bits |" in rows["EP_NUM_TOPK_IDX_BITS"]
    assert [line for line in tables.splitlines() if line.startswith("### ")] == [
        "### General",
        "### Network",
        "### JIT",
        "### Debugging",
        "### Locating",
        "### Legacy",
    ]


@pytest.fixture
def hooks() -> ModuleType:
    if not (_REPOSITORY / "packages").is_dir():
        pytest.skip("a source distribution has no docs")
    spec = importlib.util.spec_from_file_location("docs_hooks", _REPOSITORY / "docs" / "hooks.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_page_gets_the_tables_in_the_place_of_the_marker(hooks: ModuleType) -> None:
    page = (_REPOSITORY / "docs" / "reference" / "environment.md").read_text()
    assert page.count("<!-- environment-table -->") == 1
    before, after = page.split("<!-- environment-table -->")
    assert hooks.on_page_markdown(page, page=None, config=None, files=None) == before + environment_tables() + after


def test_page_without_the_marker_line_is_left_alone(hooks: ModuleType) -> None:
    text = "# Title\n\nThe marker is `<!-- environment-table -->` on a line of its own.\n"
    assert hooks.on_page_markdown(text, page=None, config=None, files=None) == text
