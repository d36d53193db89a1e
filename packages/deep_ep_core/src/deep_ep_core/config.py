"""Owns the changes to the settings files: `python -m deep_ep_core.config set NAME VALUE | unset NAME | list | path`.

What the names mean, and how the files are read and layered under the environment, is `deep_ep_core.env`. Processes that
run keep the settings that they began with.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from deep_ep_core.env import (
    VARIABLES,
    find_variable,
    prefix_settings_path,
    read_settings,
    settings_paths,
    user_settings_path,
)
from deep_ep_core.errors import ConfigError

__all__ = ["main", "set_setting", "unset_setting", "writable_settings_path"]


def writable_settings_path() -> Path:
    """The settings file that `set` writes.

    That of the Python environment, where this is a virtual or a conda environment that the user may write to; else that
    of the user.
    """
    has_own_prefix = sys.prefix != sys.base_prefix or Path(sys.prefix, "conda-meta").is_dir()
    path = prefix_settings_path()
    if has_own_prefix and os.access(next(folder for folder in path.parents if folder.exists()), os.W_OK):
        return path
    return user_settings_path()


def set_setting(name: str, value: str) -> Path:
    """Store a setting for later processes.

    Args:
        name: A variable that can be stored.
        value: As one would write it in the environment. A path must be absolute or begin with `~`.

    Returns:
        The file that it was written to.

    Raises:
        ConfigError: The name cannot be stored, the value is not allowed, or the file is corrupt.
        OSError: The file cannot be read or written.
    """
    variable = find_variable(name)
    if not variable.is_storable:
        reason = variable.no_effect_because or "it belongs to other programs too"
        raise ConfigError(f"{name} cannot be stored: {reason}; set it in the environment if you need it")
    path = writable_settings_path()
    parsed = variable.parse(value, "the command line")
    if isinstance(parsed, Path) and not parsed.is_absolute():
        raise ConfigError(
            f"{name} must be an absolute path, or begin with ~, to be stored (got {value!r}); "
            "a relative one would be another place in each process"
        )
    _write_settings(path, {**read_settings(path), name: value})
    return path


def unset_setting(name: str) -> list[Path]:
    """Remove a setting from every settings file that holds it.

    Returns:
        The files that held it; empty when none did.

    Raises:
        ConfigError: A file is corrupt.
        OSError: A file cannot be read or written.
    """
    changed = []
    for path in settings_paths():
        settings = read_settings(path)
        if name in settings:
            del settings[name]
            _write_settings(path, settings)
            changed.append(path)
    return changed


def _write_settings(path: Path, settings: Mapping[str, str]) -> None:
    """Replace the file as a whole, so that a reader, or a crash, never meets a half-written one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with open(temporary, "w", encoding="utf-8") as file:
            json.dump(settings, file, indent=2, sort_keys=True)
            file.write("\n")
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def _print_settings() -> None:
    seen = {
        variable.name: "the environment" for variable in VARIABLES if variable.is_set_by(os.environ.get(variable.name))
    }
    for path in settings_paths():
        for name, value in sorted(read_settings(path).items()):
            shadow = f"  (hidden by {seen[name]})" if name in seen else ""
            print(f"{name}={value}  # {path}{shadow}")
            seen.setdefault(name, str(path))


def _make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m deep_ep_core.config",
        description="Keep settings for later processes. The environment wins over what is kept here.",
    )
    commands = parser.add_subparsers(dest="command", required=True)
    set_parser = commands.add_parser("set", help="store a setting")
    set_parser.add_argument("name", metavar="NAME", help="name of an EP_ variable")
    set_parser.add_argument("value", metavar="VALUE", help="as one would write it in the environment")
    unset_parser = commands.add_parser("unset", help="remove a setting from every settings file")
    unset_parser.add_argument("name", metavar="NAME", help="name of a stored setting")
    commands.add_parser("list", help="print what is stored, and where")
    commands.add_parser("path", help="print the file that set writes")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line.

    Args:
        argv: The arguments without the program's name; None takes those of the process.

    Returns:
        The exit status: 0, or 1 when the command failed, with the reason on the error output.
    """
    arguments = _make_parser().parse_args(argv)
    try:
        if arguments.command == "set":
            path = set_setting(arguments.name, arguments.value)
            print(f"{arguments.name}={arguments.value} written to {path}")
            if no_effect_because := find_variable(arguments.name).no_effect_because:
                print(f"note: {arguments.name} has no effect: {no_effect_because}", file=sys.stderr)
        elif arguments.command == "unset":
            paths = unset_setting(arguments.name)
            if not paths:
                find_variable(arguments.name)  # a misspelt name is told the right one
                raise ConfigError(f"{arguments.name} is in no settings file; `list` prints what is stored")
            print(f"{arguments.name} removed from {', '.join(map(str, paths))}")
        elif arguments.command == "list":
            _print_settings()
        else:
            print(writable_settings_path())
    except (ConfigError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
