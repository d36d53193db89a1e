"""Owns the command line of the kernel cache: `python -m deep_ep_core.jit list|precompile|check|clear`."""

from __future__ import annotations

import argparse
import dataclasses
import importlib
import os
import sys
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

from deep_ep_core.env import get_env
from deep_ep_core.errors import CompileError, ConfigError, DeepEPError
from deep_ep_core.jit.builder import Builder
from deep_ep_core.jit.cache import CorruptEntryError
from deep_ep_core.jit.compiler import parse_arch
from deep_ep_core.jit.options import JitOptions
from deep_ep_core.jit.precompile import find_ninja, precompile_specs
from deep_ep_core.jit.spec import KernelSpec

__all__ = ["main"]

# Mirrors do not depend on the architecture; any that every compiler in use knows will do.
_MIRROR_ARCH = "sm_90a"


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command.

    Args:
        arguments: The command line, without the program's name; None takes that of the process.

    Returns:
        The exit status: 0 if all is well, 1 if an entry is corrupt, a kernel failed or something could not be removed.
    """
    parser = argparse.ArgumentParser(prog="python -m deep_ep_core.jit", description="The cache of compiled kernels.")
    parser.add_argument("--cache-dir", type=Path, help="root of the cache (default: EP_JIT_CACHE_DIR)")
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("list", help="list the entries")
    targets_help = "a function without arguments that returns an iterable of KernelSpec"
    precompile_parser = commands.add_parser("precompile", help="build kernels ahead of their use")
    precompile_parser.add_argument("targets", nargs="+", metavar="MODULE:FUNCTION", help=targets_help)
    precompile_parser.add_argument("--arch", nargs="+", required=True, help="architectures, for example 9.0 10.0")
    precompile_parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1, help="compilers at once")
    check_parser = commands.add_parser("check", help="verify the entries, and the struct mirrors of given kernels")
    check_parser.add_argument("targets", nargs="*", metavar="MODULE:FUNCTION", help=targets_help)
    commands.add_parser("clear", help="remove the entries")
    parsed = parser.parse_args(arguments)
    options = JitOptions.from_env(get_env())
    if parsed.cache_dir is not None:
        options = dataclasses.replace(options, cache_dir=parsed.cache_dir)
    builder = Builder(options)
    run: dict[str, Callable[[], int]] = {
        "list": lambda: _list(builder),
        "precompile": lambda: _precompile(builder, parsed.targets, parsed.arch, parsed.jobs),
        "check": lambda: _check(builder, parsed.targets),
        "clear": lambda: _clear(builder),
    }
    try:
        return run[parsed.command]()
    except (DeepEPError, OSError) as error:
        print(error, file=sys.stderr)
        return 1


def _list(builder: Builder) -> int:
    rows = [("LABEL", "ARCH", "COMPILER", "KIB", "ENTRY")]
    num_corrupt = 0
    for name in builder.cache.names():
        size = f"{builder.cache.num_bytes(name) / 1024:.1f}"
        try:
            entry = builder.cache.read(name)
        except CorruptEntryError:
            num_corrupt += 1
            rows.append((name.partition(".")[0], "?", "corrupt", size, name))
            continue
        if entry is not None:
            rows.append((entry.meta.label, entry.meta.arch, entry.meta.compiler, size, name))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        print("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())
    return 1 if num_corrupt else 0


def _precompile(builder: Builder, targets: Sequence[str], archs: Sequence[str], num_jobs: int) -> int:
    if num_jobs < 1:
        raise ConfigError(f"--jobs must be at least 1 (got {num_jobs})")
    report = precompile_specs(
        builder, _load_specs(targets), [parse_arch(arch) for arch in archs], num_jobs=num_jobs, ninja=find_ninja()
    )
    for kernel in report.kernels:
        print(f"{kernel.name}  {kernel.arch}  {kernel.usage}")
    for error in report.errors:
        print(error, file=sys.stderr)
    print(f"{len(report.kernels)} kernels in {builder.cache.root}, {len(report.errors)} failed")
    return 1 if report.errors else 0


def _check(builder: Builder, targets: Sequence[str]) -> int:
    names, num_bad = builder.cache.names(), 0
    for name in names:
        try:
            builder.cache.read(name)
        except CorruptEntryError as error:
            num_bad += 1
            print(f"corrupt, to be rebuilt at its next use: {error}", file=sys.stderr)
    print(f"{len(names)} entries, {num_bad} corrupt")
    errors = _mirror_errors(builder, _load_specs(targets))
    for wrong in errors:
        print(wrong, file=sys.stderr)
    return 1 if num_bad or errors else 0


def _mirror_errors(builder: Builder, specs: Iterable[KernelSpec]) -> list[CompileError]:
    distinct = {(spec.header, spec.params_type, type(spec.config), spec.include_dirs): spec for spec in specs}
    errors = []
    for spec in distinct.values():
        try:
            builder.prove_mirrors(spec, _MIRROR_ARCH)
        except CompileError as error:
            errors.append(error)
    if distinct:
        print(f"{len(distinct)} sets of struct mirrors, {len(errors)} wrong")
    return errors


def _clear(builder: Builder) -> int:
    removed, busy = builder.cache.clear()
    print(f"{len(removed)} entries removed from {builder.cache.root}")
    for name in busy:
        print(f"left, because a process is building it: {name}", file=sys.stderr)
    return 1 if busy else 0


def _load_specs(targets: Sequence[str]) -> list[KernelSpec]:
    specs: list[KernelSpec] = []
    for target in targets:
        module_name, _, function_name = target.partition(":")
        try:
            function = getattr(importlib.import_module(module_name), function_name)
        except (ImportError, AttributeError, ValueError) as error:
            raise ConfigError(
                f"a target must be MODULE:FUNCTION that can be imported (got {target!r}: {error})"
            ) from error
        found = list(function())
        if not all(isinstance(spec, KernelSpec) for spec in found):
            raise ConfigError(f"{target} must return an iterable of KernelSpec (got {found!r})")
        specs += found
    return specs


if __name__ == "__main__":
    sys.exit(main())
