"""Owns the table of environment variables, their parsing, and how process environment and settings files are layered.

It never writes: not to `os.environ`, and not to the settings files, which `deep_ep_core.config` changes. What a
variable does lives with the code that asks `get_env()` for it.
"""

from __future__ import annotations

import difflib
import functools
import json
import os
import sys
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import KW_ONLY, dataclass
from pathlib import Path
from typing import Literal

import platformdirs

from deep_ep_core.errors import ConfigError

__all__ = [
    "VARIABLES",
    "Env",
    "Variable",
    "environment_tables",
    "find_variable",
    "get_env",
    "load_env",
    "prefix_settings_path",
    "read_settings",
    "reset_env",
    "settings_paths",
    "user_settings_path",
]

_FALSE_WORDS = frozenset({"", "0", "false", "no", "off"})
_TRUE_WORDS = frozenset({"1", "true", "yes", "on"})

# The names whose values upstream bakes into an installation; all of them can be stored, with or without an effect.
_UPSTREAM_PERSISTENT = frozenset(
    {"EP_JIT_CACHE_DIR", "EP_JIT_PRINT_COMPILER_COMMAND", "EP_NUM_TOPK_IDX_BITS", "EP_NCCL_ROOT_DIR"}
)

# High enough that a launch script's own EP_SIZE or EP_RANK is not taken for a misspelt setting.
_MIN_SIMILARITY = 0.7

_TYPE_NAMES = {bool: "bool", int: "int", str: "str", Path: "path"}


@dataclass(frozen=True, slots=True)
class Variable:
    """One line of the table.

    Attributes:
        name: Name in the environment.
        group: Heading that it is documented under.
        type: Type of the parsed value.
        default: Default as one would write it in the environment, or None when unset means something of its own.
        effect: What it does, one sentence.
        unit: Unit of the value, or an empty string.
        default_note: What being unset means, when `default` is None.
        minimum: Smallest integer allowed, or None.
        choices: The only integers allowed, or empty for no such limit.
        no_effect_because: Why nothing here reads it; None for a variable that is used.
        fallback_of: The variable that this one stands in for when that one is unset, or None.
    """

    name: str
    group: Literal["General", "Network", "JIT", "Debugging", "Locating", "Legacy"]
    type: type[bool] | type[int] | type[str] | type[Path]
    default: str | None
    effect: str
    _: KW_ONLY
    unit: str = ""
    default_note: str = "unset"
    minimum: int | None = None
    choices: tuple[int, ...] = ()
    no_effect_because: str | None = None
    fallback_of: str | None = None

    @property
    def is_used(self) -> bool:
        """Whether this implementation gives it a meaning; the others are accepted, for the sake of existing scripts."""
        return self.no_effect_because is None

    @property
    def is_storable(self) -> bool:
        """Whether `python -m deep_ep_core.config` stores a value of it."""
        return self.name in _UPSTREAM_PERSISTENT or (self.is_used and self.name.startswith("EP_"))

    @property
    def field_name(self) -> str | None:
        """Name of its field in `Env`, or None where it has none of its own."""
        if not self.is_used or self.fallback_of is not None:
            return None
        return self.name.removeprefix("EP_").lower()

    def is_set_by(self, text: str | None) -> bool:
        """Whether a text, or None, sets it: an empty flag is off, any other empty text counts as unset."""
        return text is not None and (text != "" or self.type is bool)

    def parse(self, text: str, source: str) -> bool | int | str | Path:
        """Turn the text of a setting into its value.

        Args:
            text: What was set.
            source: Where it was set, for the message.

        Raises:
            ConfigError: The text is not an allowed value.
        """
        value = self._value_of(text)
        if value is None:
            raise ConfigError(
                f"{self.name} must be {self._allowed} (got {text!r}, from {source}); unset it or set an allowed value"
            )
        return value

    def _value_of(self, text: str) -> bool | int | str | Path | None:
        """The value, or None when the text is not allowed."""
        if self.type is str:
            return text or None
        if self.type is Path:
            return Path(os.path.expanduser(text)) if text else None
        word = text.strip().lower()
        if self.type is bool and word in _FALSE_WORDS | _TRUE_WORDS:
            return word in _TRUE_WORDS
        try:
            number = int(word)
        except ValueError:
            return None
        if self.type is bool:
            return number != 0
        is_allowed = (self.minimum is None or number >= self.minimum) and (not self.choices or number in self.choices)
        return number if is_allowed else None

    @property
    def _allowed(self) -> str:
        if self.type is bool:
            return "0, false, no or off, or 1, true, yes, on or another integer"
        if self.choices:
            return f"one of {', '.join(map(str, self.choices))}"
        if self.type is int:
            return "an integer" if self.minimum is None else f"an integer of at least {self.minimum}"
        return "a path" if self.type is Path else "a name that is not empty"


_V1_ONLY = "the kernels of V1 are not part of this version"

VARIABLES: tuple[Variable, ...] = (
    Variable("EP_BUFFER_DEBUG", "General", bool, "0", "Print a new buffer's sizes, SM estimate and backend."),
    Variable("EP_SUPPRESS_NCCL_CHECK", "General", bool, "0", "Do not fail on a mismatch of NCCL versions."),
    Variable("EP_AVOID_RECORD_STREAM", "General", bool, "0", "Keep tensors alive by the event, not `record_stream`."),
    Variable("EP_REUSE_NCCL_COMM", "General", bool, "1", "Borrow torch's NCCL communicator instead of making one."),
    Variable(
        "EP_NUM_TOPK_IDX_BITS",
        "General",
        int,
        "0",
        "Width of top-k indices upstream.",
        unit="bits",
        choices=(0, 32, 64),
        no_effect_because="int32 and int64 indices are both taken, by the tensor's dtype",
    ),
    Variable(
        "EP_NUM_MAX_LOCAL_RANKS",
        "General",
        int,
        "16",
        "Ranks on a node that upstream sizes host memory for.",
        unit="ranks",
        minimum=1,
        no_effect_because="the ranks of a node are taken from the process group",
    ),
    Variable("EP_NIC_NAME", "Network", str, "mlx5_0", "Network card whose rate is read before that of any other."),
    Variable("EP_OVERRIDE_RDMA_SL", "Network", int, None, "RDMA service level; wins over `sl_idx`.", minimum=0),
    Variable("EP_DISABLE_GIN", "Network", bool, "0", "Ask NCCL for no GIN (RDMA) and take the path without it."),
    Variable(
        "NCCL_LSA_TEAM_SIZE",
        "Network",
        int,
        None,
        "Cut the ranks into scale-up domains of this many, smaller than the machine's.",
        unit="ranks",
        minimum=1,
    ),
    Variable(
        "EP_LOOPBACK_DELAY_US",
        "Network",
        int,
        "0",
        "Loopback network: how long a message is under way; with reordering, at most.",
        unit="us",
        minimum=0,
    ),
    Variable(
        "EP_LOOPBACK_REORDER",
        "Network",
        int,
        None,
        "Loopback network: seed of random delays, so that messages overtake each other where GIN permits.",
        default_note="in order",
        minimum=0,
    ),
    Variable(
        "EP_LOOPBACK_DROP_RANK",
        "Network",
        int,
        None,
        "Loopback network: lose the messages of this rank, and those to it.",
        default_note="none",
        minimum=0,
    ),
    Variable(
        "EP_LOOPBACK_DROP_AFTER",
        "Network",
        int,
        "0",
        "Loopback network: messages that the lost rank sends to others before it falls silent.",
        unit="messages",
        minimum=0,
    ),
    Variable(
        "EP_LOOPBACK_COUNTERS",
        "Network",
        Path,
        None,
        "Loopback network: folder for files with the messages and bytes that each rank sent to each peer.",
    ),
    Variable("EP_JIT_DEBUG", "JIT", bool, "0", "Print what the JIT does, ptxas output too; embed source lines."),
    Variable("EP_JIT_CACHE_DIR", "JIT", Path, "~/.deep_ep", "Folder of compiled kernels."),
    Variable("EP_JIT_NVCC_COMPILER", "JIT", Path, None, "The nvcc program.", default_note="nvcc of `CUDA_HOME`"),
    Variable("EP_JIT_CPP_STANDARD", "JIT", int, "20", "C++ standard; the headers need at least 20.", minimum=20),
    Variable("EP_JIT_PRINT_COMPILER_COMMAND", "JIT", bool, "0", "Print each compiler command line."),
    Variable("EP_JIT_PTXAS_VERBOSE", "JIT", bool, "0", "Print what ptxas says of registers, spills and memory."),
    Variable("EP_JIT_PTXAS_CHECK", "JIT", bool, "0", "Fail when a kernel uses local memory."),
    Variable("EP_JIT_WITH_LINEINFO", "JIT", bool, "0", "Embed source lines in the machine code, for profilers."),
    Variable("EP_JIT_DUMP_ASM", "JIT", bool, "0", "Keep PTX and SASS beside the compiled kernel."),
    Variable("EP_JIT_DUMP_PTX", "JIT", bool, "0", "Keep PTX beside the compiled kernel."),
    Variable("EP_JIT_DUMP_SASS", "JIT", bool, "0", "Keep SASS beside the compiled kernel."),
    Variable("EP_GIN_GDAKI_DEBUG", "Debugging", bool, "0", "Turn on the debug output of NCCL's GIN GDAKI in kernels."),
    Variable(
        "EP_USE_NVIDIA_TOOLS",
        "Debugging",
        bool,
        "0",
        "Benchmarks leave profiling to an external profiler.",
        no_effect_because="benchmarks take no profile of their own",
    ),
    Variable("EP_DISABLE_BARRIER_PROFILING", "Debugging", bool, "0", "Benchmarks put no barrier before each call."),
    Variable("EP_NCCL_ROOT_DIR", "Locating", Path, None, "NCCL installation (`include`, `lib`).", default_note="auto"),
    Variable("NCCL_DIR", "Locating", Path, None, "Stands in for `EP_NCCL_ROOT_DIR`.", fallback_of="EP_NCCL_ROOT_DIR"),
    Variable("EP_NVSHMEM_ROOT_DIR", "Locating", Path, None, "NVSHMEM installation, likewise.", default_note="auto"),
    Variable(
        "NVSHMEM_DIR", "Locating", Path, None, "Stands in for `EP_NVSHMEM_ROOT_DIR`.", fallback_of="EP_NVSHMEM_ROOT_DIR"
    ),
    Variable("CUDA_HOME", "Locating", Path, None, "CUDA toolkit.", default_note="auto"),
    Variable("CUDA_PATH", "Locating", Path, None, "Stands in for `CUDA_HOME`.", fallback_of="CUDA_HOME"),
    Variable("TORCH_CUDA_ARCH_LIST", "Legacy", str, None, "Architectures of V1 kernels.", no_effect_because=_V1_ONLY),
    Variable("DISABLE_SM90_FEATURES", "Legacy", bool, "0", "V1 without Hopper features.", no_effect_because=_V1_ONLY),
    Variable(
        "DISABLE_AGGRESSIVE_PTX_INSTRS",
        "Legacy",
        bool,
        "0",
        "V1 without aggressive loads and stores.",
        no_effect_because=_V1_ONLY,
    ),
)
"""Every variable that is known, in the order of the documentation."""

_BY_NAME = {variable.name: variable for variable in VARIABLES}


@dataclass(frozen=True, slots=True, kw_only=True)
class Env:
    """The settings of this process.

    One field for each variable of `VARIABLES` that is used, named like it, in lower case and without `EP_`; a variable
    that stands in for another shares its field. What each does, its unit and its default are in the table. `None` means
    unset.
    """

    buffer_debug: bool
    suppress_nccl_check: bool
    avoid_record_stream: bool
    reuse_nccl_comm: bool
    nic_name: str
    override_rdma_sl: int | None
    disable_gin: bool
    nccl_lsa_team_size: int | None
    loopback_delay_us: int
    loopback_reorder: int | None
    loopback_drop_rank: int | None
    loopback_drop_after: int
    loopback_counters: Path | None
    jit_debug: bool
    jit_cache_dir: Path
    jit_nvcc_compiler: Path | None
    jit_cpp_standard: int
    jit_print_compiler_command: bool
    jit_ptxas_verbose: bool
    jit_ptxas_check: bool
    jit_with_lineinfo: bool
    jit_dump_asm: bool
    jit_dump_ptx: bool
    jit_dump_sass: bool
    gin_gdaki_debug: bool
    disable_barrier_profiling: bool
    nccl_root_dir: Path | None
    nvshmem_root_dir: Path | None
    cuda_home: Path | None


@functools.cache
def get_env() -> Env:
    """The settings of this process, read at the first call and the same object from then on.

    Later changes of `os.environ` or of a settings file are not seen.

    Raises:
        ConfigError: A value is not allowed, or a settings file is corrupt.

    Collective: no. Warns: of unknown `EP_` names, and of variables that have no effect.
    """
    return load_env(os.environ, settings_paths())


def reset_env() -> None:
    """Make the next `get_env` read everything anew. For tests: objects that exist keep what they read."""
    get_env.cache_clear()


def load_env(environ: Mapping[str, str], paths: Sequence[Path] = ()) -> Env:
    """Read the settings from given places; `get_env` is this with the places of the process.

    Args:
        environ: The environment, which wins over all files.
        paths: Settings files, the strongest first. A file that does not exist counts as empty; one that cannot be read,
            for example for lack of permission, is left out with a warning.

    Raises:
        ConfigError: A value is not allowed, or a settings file is corrupt.
    """
    layers: list[tuple[str, Mapping[str, str]]] = [("the environment", environ)]
    layers += [(str(path), _read_layer(path)) for path in paths]
    _warn_of_names(environ)
    values = {variable.field_name: _resolve(variable, layers) for variable in VARIABLES if variable.field_name}
    return Env(**values)  # type: ignore[arg-type]  # a test holds the fields' types against the table


def _resolve(variable: Variable, layers: Sequence[tuple[str, Mapping[str, str]]]) -> bool | int | str | Path | None:
    stand_ins = [other for other in VARIABLES if other.fallback_of == variable.name]
    for candidate in (variable, *stand_ins):
        for source, texts in layers:
            text = texts.get(candidate.name)
            if text is not None and candidate.is_set_by(text):
                return candidate.parse(text, source)
    return None if variable.default is None else variable.parse(variable.default, "the defaults")


def _warn_of_names(environ: Mapping[str, str]) -> None:
    for name in sorted(name for name in environ if name.startswith("EP_")):
        variable = _BY_NAME.get(name)
        if variable is None:
            warnings.warn(f"{name} is set but is no setting of deep_ep_core{_suggestion(name)}", stacklevel=2)
        elif not variable.is_used:
            warnings.warn(f"{name} is set but has no effect: {variable.no_effect_because}", stacklevel=2)


def _read_layer(path: Path) -> Mapping[str, str]:
    try:
        texts = read_settings(path)
    except OSError as error:
        warnings.warn(f"the settings in {path} are left out, because it cannot be read: {error}", stacklevel=2)
        return {}
    storable = {name: text for name, text in texts.items() if name in _BY_NAME and _BY_NAME[name].is_storable}
    for name in sorted(texts.keys() - storable.keys()):
        warnings.warn(f"{path}: {name} is no setting that can be stored, ignored{_suggestion(name)}", stacklevel=2)
    return storable


def find_variable(name: str) -> Variable:
    """The line of the table for a name.

    Raises:
        ConfigError: There is none; the message names the closest one.
    """
    if name not in _BY_NAME:
        raise ConfigError(f"the name must be a known variable (got {name}){_suggestion(name)}")
    return _BY_NAME[name]


def _suggestion(name: str) -> str:
    useful = [other.name for other in VARIABLES if (other.is_used or other.is_storable) and other.name != name]
    close = difflib.get_close_matches(name.upper(), useful, n=1, cutoff=_MIN_SIMILARITY)
    return f"; did you mean {close[0]}?" if close else ""


def prefix_settings_path() -> Path:
    """The settings file of this Python environment; it need not exist."""
    return Path(sys.prefix, "etc", "deep_ep", "config.json")


def user_settings_path() -> Path:
    """The settings file of this user; it need not exist."""
    return platformdirs.user_config_path("deep_ep", appauthor=False) / "config.json"


def settings_paths() -> tuple[Path, ...]:
    """The settings files that are read, the strongest first."""
    return (prefix_settings_path(), user_settings_path())


def read_settings(path: Path) -> dict[str, str]:
    """What a settings file holds, by name; empty when there is no such file. Names and values are not checked.

    Raises:
        ConfigError: The file does not hold a JSON object of strings.
        OSError: The file exists and cannot be read.
    """
    try:
        content = path.read_bytes()
    except (FileNotFoundError, NotADirectoryError):
        return {}
    try:
        texts = json.loads(content)
    except ValueError as error:
        raise ConfigError(f"{path} must hold a JSON object (got {error}); correct it or delete it") from error
    if not isinstance(texts, dict) or not all(isinstance(text, str) for text in texts.values()):
        raise ConfigError(
            f"{path} must hold one JSON object whose values are strings (got {texts!r}); correct it or delete it"
        )
    return texts


def environment_tables() -> str:
    """The table of variables as Markdown: a heading of level 3 and a table for each group."""
    sections = []
    for group in dict.fromkeys(variable.group for variable in VARIABLES):
        rows = [_table_row(variable) for variable in VARIABLES if variable.group == group]
        head = "| Variable | Type | Unit | Default | Effect |\n| --- | --- | --- | --- | --- |"
        sections.append("\n".join([f"### {group}", "", head, *rows]))
    return "\n\n".join(sections) + "\n"


def _table_row(variable: Variable) -> str:
    default = variable.default_note if variable.default is None else f"`{variable.default}`"
    effect = variable.effect
    if variable.no_effect_because is not None:
        effect += f" Accepted, without effect: {variable.no_effect_because}."
    cells = [f"`{variable.name}`", _TYPE_NAMES[variable.type], variable.unit, default, effect]
    return f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in cells)} |"
