"""Owns the building of many kernel variants at once, ahead of their use.

Each goes through the same cache and the same locks as at run time, so ranks may run meanwhile.
"""

from __future__ import annotations

import concurrent.futures
import shlex
import shutil
import subprocess
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from deep_ep_core.errors import CompileError
from deep_ep_core.jit.builder import Builder, BuildPlan, CompiledKernel
from deep_ep_core.jit.compiler import CompileOutput, NvccCompiler, describe_status
from deep_ep_core.jit.spec import KernelSpec

__all__ = ["PrecompileReport", "find_ninja", "precompile_specs"]

# A shell reports a program that a signal ended as this plus the signal's number.
_SHELL_SIGNAL_BASE = 128


@dataclass(frozen=True, slots=True, kw_only=True)
class PrecompileReport:
    """What became of the variants.

    Attributes:
        kernels: Those that are in the cache now, in the order asked for; equal ones appear once.
        errors: One error for each of the others.
    """

    kernels: tuple[CompiledKernel, ...]
    errors: tuple[CompileError, ...]


def find_ninja() -> Path | None:
    """The program ninja on PATH, or None."""
    found = shutil.which("ninja")
    return None if found is None else Path(found)


def precompile_specs(
    builder: Builder, specs: Iterable[KernelSpec], archs: Sequence[str], *, num_jobs: int, ninja: Path | None
) -> PrecompileReport:
    """Build every spec for every architecture, as many at once as asked for; a failure does not stop the others.

    Args:
        builder: Who builds.
        specs: The kernels.
        archs: The architectures, for example `sm_90a`.
        num_jobs: How many compilers may run at once.
        ninja: Runs the nvcc processes, if there is one; otherwise threads do, as they do for NVRTC in any case.

    Raises:
        CompileError: A header is missing, or there is no compiler.

    Collective: no.
    """
    plans = list({plan.name: plan for spec in specs for arch in archs for plan in [builder.plan(spec, arch)]}.values())
    outputs: dict[str, CompileOutput] = {}
    if ninja is not None:
        outputs = _run_ninja([plan for plan in plans if not builder.is_cached(plan)], ninja, num_jobs)
    kernels, errors = [], []
    with concurrent.futures.ThreadPoolExecutor(max_workers=num_jobs) as pool:
        for future in [pool.submit(_build, builder, plan, outputs) for plan in plans]:
            try:
                kernels.append(future.result())
            except CompileError as error:
                errors.append(error)
    return PrecompileReport(kernels=tuple(kernels), errors=tuple(errors))


def _build(builder: Builder, plan: BuildPlan, outputs: Mapping[str, CompileOutput]) -> CompiledKernel:
    output = outputs.get(plan.name)
    return builder.build_plan(plan, run=None if output is None else lambda: output)


def _run_ninja(plans: Sequence[BuildPlan], ninja: Path, num_jobs: int) -> dict[str, CompileOutput]:
    """Run nvcc for each plan that nvcc compiles; return the outputs by name."""
    jobs = [(plan, plan.compiler) for plan in plans if isinstance(plan.compiler, NvccCompiler)]
    if not jobs:
        return {}
    with tempfile.TemporaryDirectory(prefix="deep_ep_jit_") as root_name:
        root = Path(root_name)
        # One folder a plan, and only their names in the file: nothing there needs ninja's escapes.
        lines = ["rule compile", "  command = sh $name/compile.sh", "  description = $name"]
        for plan, compiler in jobs:
            folder = root / plan.name
            folder.mkdir()
            compiler.write_source(plan.job, folder)
            steps = " && ".join(shlex.join(command) for command in compiler.commands(plan.job))
            script = f"cd {plan.name} && {{ {steps}; }} > log 2>&1\nstatus=$?\necho $status > status\nexit $status\n"
            (folder / "compile.sh").write_text(script, encoding="utf-8")
            lines += [f"build {plan.name}/status: compile", f"  name = {plan.name}"]
        (root / "build.ninja").write_text("\n".join(lines) + "\n", encoding="utf-8")
        answer = subprocess.run(
            [str(ninja), "-C", str(root), "-j", str(num_jobs), "-k", "0"],
            env=jobs[0][1].environ,
            capture_output=True,
            encoding="utf-8",
            errors="replace",
            check=False,
        )
        return {plan.name: _collect(plan, compiler, root / plan.name, answer.stdout) for plan, compiler in jobs}


def _collect(plan: BuildPlan, compiler: NvccCompiler, folder: Path, ninja_log: str) -> CompileOutput:
    if not (folder / "status").is_file():
        return compiler.collect(plan.job, folder, log=ninja_log, failure="ninja did not run it to its end")
    status = int((folder / "status").read_text())
    log = (folder / "log").read_text(encoding="utf-8", errors="replace")
    failure = describe_status(_SHELL_SIGNAL_BASE - status if status > _SHELL_SIGNAL_BASE else status)
    return compiler.collect(plan.job, folder, log=log, failure=failure)
