"""Owns what the multi-GPU run consists of: its parts, in order, each a command. It runs none of them.

No part uses NVLink multicast: `ENVIRONMENT` turns it off in everything that would.
"""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

PartKind = Literal["peer-copy", "ep", "bench", "tests"]

ROOT = Path(__file__).resolve().parents[2]
HERE = Path(__file__).resolve().parent
PACKAGES = ("deep_ep_core", "deep_ep_ep", "deep_ep_cp", "deep_ep_pp", "deep_ep_engram", "deep_ep_legacy")
# Tests of ranks that share a GPU, which is not what this run is for.
SHARING_TESTS = ("packages/deep_ep_core/tests/test_gpu_ranks.py",)
ENVIRONMENT = {"NCCL_NVLS_ENABLE": "0", "TORCH_SYMM_MEM_DISABLE_MULTICAST": "1", "NVSHMEM_DISABLE_NVLS": "1"}
# What stands in for the suite where there is no GPU: the same operations, small.
_CPU_SWEEP = ("--tokens", "16", "--hidden", "256", "--topk", "4", "--experts", "16", "--dtype", "bf16,fp8")


@dataclass(frozen=True, slots=True, kw_only=True)
class Part:
    """One program of the run.

    Attributes:
        name: What tables call it.
        kind: How its output reads.
        command: The program and its arguments.
        limit_s: How long it may take at most.
        needs_module: A module that it runs: `pytest`, or one of a package of this tree, as `package.module`.
        lines_path: File with its JSON lines; None where they are on its standard output.
    """

    name: str
    kind: PartKind
    command: Sequence[str]
    limit_s: float
    needs_module: str | None = None
    lines_path: Path | None = None

    @property
    def missing(self) -> str | None:
        """Why it cannot be run, or None."""
        if self.needs_module is None or _has_module(self.needs_module):
            return None
        return f"there is no {self.needs_module}"


def make_parts(*, num_gpus: int, device: str, folder: Path, rounds: int = 10) -> list[Part]:
    """The parts, those first whose numbers the others are held against.

    Args:
        num_gpus: GPUs to use, one rank each.
        device: "cuda"; or "cpu", which runs small stand-ins of all parts on ranks without GPUs.
        folder: Where parts leave files.
        rounds: Timed rounds of a case.
    """
    is_cuda = device == "cuda"
    python = sys.executable
    copy_size = () if is_cuda else ("--mib", "4")
    ranks = ("--ranks", str(num_gpus), "--device", device)
    ep_cases = ("--suite", "nvlink", "--backend", "device") if is_cuda else _CPU_SWEEP
    ep_lines = folder / "ep.jsonl"
    parts = [
        Part(
            name="peer copies",
            kind="peer-copy",
            command=(python, str(HERE / "peer_copy.py"), "--num-gpus", str(num_gpus), "--device", device, *copy_size),
            limit_s=60,
        ),
        Part(
            name="EP bench",
            kind="ep",
            command=(
                *(python, "-m", "deep_ep_ep.bench", *ranks, *ep_cases),
                *("--rounds", str(rounds), "--warmup", "3", "--json", str(ep_lines)),
            ),
            limit_s=180,
            needs_module="deep_ep_ep.bench",
            lines_path=ep_lines,
        ),
    ]
    pp_lines = folder / "pp.jsonl"
    parts += [
        Part(
            name="CP bench",
            kind="bench",
            command=(python, "-m", "deep_ep_cp.bench", *ranks, *(() if is_cuda else ("--kib", "64", "--rounds", "3"))),
            limit_s=60,
            needs_module="deep_ep_cp.bench",
        ),
        Part(
            name="PP bench",
            kind="bench",
            command=(
                *(python, "-m", "deep_ep_pp.bench", *ranks, *(() if is_cuda else ("--bytes", "65536"))),
                *("--json", str(pp_lines)),
            ),
            limit_s=60,
            needs_module="deep_ep_pp.bench",
            lines_path=pp_lines,
        ),
    ]
    # The package that the numbers above are of comes first.
    for package in sorted(PACKAGES, key=lambda package: package != "deep_ep_ep"):
        outcomes = folder / f"{package}.tests.jsonl"
        parts.append(
            Part(
                name=f"tests of {package}",
                kind="tests",
                command=_test_command(package, num_gpus, outcomes),
                limit_s=180 if package == "deep_ep_ep" else 90,
                needs_module="pytest",
                lines_path=outcomes,
            )
        )
    return parts


def part_environment(base: Mapping[str, str]) -> dict[str, str]:
    """The environment of a part: packages and plugin found in this tree, multicast off."""
    paths = [str(HERE), *(str(ROOT / "packages" / package / "src") for package in PACKAGES)]
    inherited = [base["PYTHONPATH"]] if base.get("PYTHONPATH") else []
    return {**base, **ENVIRONMENT, "PYTHONPATH": ":".join([*paths, *inherited]), "PYTHONUNBUFFERED": "1"}


def _test_command(package: str, num_gpus: int, outcomes: Path) -> tuple[str, ...]:
    # Without the options of the repository: a GPU machine may lack the plugin that they are for.
    options = ["-o", "addopts=--import-mode=importlib", "-q", "-p", "no:cacheprovider", "-p", "one_rank_a_gpu"]
    options += ["-m", "gpu", "--gpu-ranks", str(num_gpus), "--outcomes", str(outcomes)]
    # A file that cannot be imported fails by itself.
    options += ["--continue-on-collection-errors"]
    options += [argument for path in SHARING_TESTS for argument in ("--ignore", path)]
    return (sys.executable, "-m", "pytest", *options, f"packages/{package}/tests")


def _has_module(name: str) -> bool:
    """Whether a module is there; looked up without importing what it is in, which may be what does not work."""
    package, _, module = name.partition(".")
    if not module:
        return importlib.util.find_spec(package) is not None
    path = ROOT / "packages" / package / "src" / package / module
    return path.with_suffix(".py").is_file() or (path / "__main__.py").is_file()
