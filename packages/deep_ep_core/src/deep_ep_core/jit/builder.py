"""Owns the way from a `KernelSpec` to machine code: choice of the compiler, cache key, compilation, checks.

It loads nothing onto a GPU, and needs none.
"""

from __future__ import annotations

import concurrent.futures
import contextlib
import dataclasses
import functools
import hashlib
import os
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

from deep_ep_core.env import get_env
from deep_ep_core.errors import CompileError, ConfigError
from deep_ep_core.jit.cache import CacheEntry, CorruptEntryError, EntryMeta, KernelCache
from deep_ep_core.jit.choice import CompilerChoice
from deep_ep_core.jit.compiler import CompileJob, CompileOutput, Compiler
from deep_ep_core.jit.headers import reach_headers
from deep_ep_core.jit.mirror import mirror_source
from deep_ep_core.jit.options import JitOptions
from deep_ep_core.jit.resources import ResourceUsage, parse_usage
from deep_ep_core.jit.spec import KernelSpec
from deep_ep_core.jit.structs import ConfigStruct, ParamsStruct
from deep_ep_core.jit.toolchain import find_cuobjdump

__all__ = ["BuildPlan", "Builder", "CompiledKernel", "default_builder"]

# Part of every key. Raise it when the meaning of an entry's files changes.
_FORMAT_VERSION = "1"
_CUOBJDUMP_TIMEOUT_S = 300.0


@dataclass(frozen=True, slots=True, kw_only=True)
class CompiledKernel:
    """Machine code of one kernel variant for one architecture.

    Attributes:
        name: Its name in the cache.
        entry_name: The kernel's symbol.
        arch: The architecture, for example `sm_90a`.
        cubin: The machine code.
        usage: What it uses, or None when the compiler's log did not tell.
    """

    name: str
    entry_name: str
    arch: str
    cubin: bytes
    usage: ResourceUsage | None


@dataclass(frozen=True, slots=True, kw_only=True)
class BuildPlan:
    """All that is decided about a build before a compiler runs.

    Attributes:
        spec: The kernel.
        job: What the compiler is given.
        compiler: Who compiles.
        name: Name of the cache entry, which ends in the digest of everything that decides the machine code.
    """

    spec: KernelSpec
    job: CompileJob
    compiler: Compiler
    name: str


class Builder:
    """Compiles kernels through the cache.

    Safe to use from several threads. Making one looks for nothing and touches no file.

    Args:
        options: Settings.
        compiler: Compiles everything, instead of what `options` and the machine offer.
    """

    def __init__(self, options: JitOptions, *, compiler: Compiler | None = None) -> None:
        self.options = options
        self.cache = KernelCache(options.cache_dir)
        self._given_compiler = compiler
        self._choice = CompilerChoice(options)
        self._memo: dict[tuple[KernelSpec, str], CompiledKernel] = {}
        self._memo_locks: dict[tuple[KernelSpec, str], threading.Lock] = {}
        self._lock = threading.Lock()

    def build(self, spec: KernelSpec, arch: str) -> CompiledKernel:
        """Compile a kernel, or take it from this process's memory or from the cache.

        Args:
            spec: The kernel.
            arch: Architecture, for example `sm_90a`; see `arch_name`.

        Raises:
            CompileError: It does not compile, there is no compiler, or it uses local memory and `ptxas_check` is set.

        Collective: no; of processes that share a cache and ask at once, one compiles and the others wait.
        """
        key = (spec, arch)
        with self._lock:
            found = self._memo.get(key)
            memo_lock = self._memo_locks.setdefault(key, threading.Lock())
        if found is not None:
            return found
        with memo_lock:
            if key not in self._memo:
                self._memo[key] = self.build_plan(self.plan(spec, arch))
            return self._memo[key]

    def build_all(self, specs: Iterable[KernelSpec], arch: str) -> list[CompiledKernel]:
        """Build kernels at the same time, as many as the machine has CPUs.

        Args:
            specs: The kernels.
            arch: As for `build`.

        Returns:
            One for each spec.

        Raises:
            CompileError: As for `build`, of the first one that fails; the others are built nevertheless.

        Collective: no; of processes that ask for the same kernels at once, each kernel is compiled by one.
        """
        wanted = list(specs)
        if not wanted:
            return []
        num_threads = min(len(wanted), os.cpu_count() or 1)
        with concurrent.futures.ThreadPoolExecutor(num_threads, thread_name_prefix="deep_ep_jit") as pool:
            futures = [pool.submit(self.build, spec, arch) for spec in wanted]
            try:
                concurrent.futures.wait(futures)
            except BaseException:
                # As of a key that is pressed: what has not begun is not to be waited for.
                pool.shutdown(wait=False, cancel_futures=True)
                raise
        return [future.result() for future in futures]

    def plan(self, spec: KernelSpec, arch: str) -> BuildPlan:
        """Decide how a kernel is built, and under which name; reads headers, runs no compilation.

        Raises:
            CompileError: A header is missing, or there is no compiler.
        """
        compiler = self._given_compiler or self._choice.choose(needs_nccl=spec.needs_nccl)
        job = CompileJob(
            source=spec.source(),
            arch=arch,
            include_dirs=spec.include_dirs,
            needs_nccl=spec.needs_nccl,
            with_ptx=self.options.dump_ptx,
        )
        digest = hashlib.sha256()
        headers = reach_headers(spec.header, spec.include_dirs)
        parts = [_FORMAT_VERSION, compiler.identity, arch, *compiler.key_flags(job), job.source]
        for part in (*parts, *(part for header in headers for part in (header.name, header.text))):
            # The length in front keeps ("ab", "c") and ("a", "bc") apart.
            encoded = part.encode()
            digest.update(f"{len(encoded)}:".encode() + encoded)
        return BuildPlan(spec=spec, job=job, compiler=compiler, name=f"{spec.label}.{digest.hexdigest()[:32]}")

    def build_plan(self, plan: BuildPlan, *, run: Callable[[], CompileOutput] | None = None) -> CompiledKernel:
        """Compile what was planned, through the cache.

        Args:
            plan: From `plan`.
            run: Gives the compiler's output, instead of running the compiler; called only if the entry is not there.

        Raises:
            CompileError: As for `build`.
        """
        entry = self.cache.get_or_build(
            plan.name,
            plan.job.source,
            functools.partial(self._compile, plan, run or functools.partial(plan.compiler.compile, plan.job)),
            wanted_dumps=self._wanted_dumps,
        )
        kernel = CompiledKernel(
            name=entry.name,
            entry_name=entry.meta.entry_name,
            arch=entry.meta.arch,
            cubin=entry.cubin,
            usage=parse_usage(entry.meta.log, entry.meta.entry_name),
        )
        if self.options.debug:
            _say(f"{kernel.name} for {kernel.arch} by {entry.meta.compiler}: {kernel.usage}")
        if self.options.ptxas_verbose:
            _say(f"{kernel.name}: {entry.meta.log.strip()}")
        if self.options.ptxas_check:
            self._check_local_memory(plan, kernel, entry)
        return kernel

    def prove_mirrors(self, spec: KernelSpec, arch: str) -> None:
        """Compile the proof that a kernel's structs agree with their Python mirrors; see `mirror_source`.

        Raises:
            CompileError: They do not; the log shows each difference.

        Collective: no.
        """
        structs: list[type[ConfigStruct] | type[ParamsStruct]] = [spec.params_type]
        if spec.config is not None:
            structs.append(type(spec.config))
        plan = self.plan(spec, arch)
        plan = dataclasses.replace(plan, job=dataclasses.replace(plan.job, source=mirror_source(spec.header, structs)))
        output = plan.compiler.compile(plan.job)
        if output.cubin is None:
            raise self._failure(plan, output, f"the proof of its struct mirrors failed ({output.failure})")

    def is_cached(self, plan: BuildPlan) -> bool:
        """Whether the cache holds what was planned, whole and with the dumps that are wanted."""
        with contextlib.suppress(CorruptEntryError):
            entry = self.cache.read(plan.name)
            return entry is not None and self._wanted_dumps <= entry.dumps.keys()
        return False

    @property
    def _wanted_dumps(self) -> frozenset[str]:
        wanted = {"kernel.ptx": self.options.dump_ptx, "kernel.sass": self.options.dump_sass}
        return frozenset(name for name, is_wanted in wanted.items() if is_wanted)

    def _compile(self, plan: BuildPlan, run: Callable[[], CompileOutput]) -> CacheEntry:
        if self.options.debug:
            _say(f"compiling {plan.name} for {plan.job.arch} with {plan.compiler.identity}")
        output = run()
        if self.options.print_compiler_command:
            _say(output.command)
        if output.cubin is None:
            raise self._failure(plan, output, f"it failed ({output.failure})")
        dumps = {} if output.ptx is None else {"kernel.ptx": output.ptx}
        if self.options.dump_sass:
            dumps["kernel.sass"] = self._disassemble(output.cubin)
        return CacheEntry(
            name=plan.name,
            source=plan.job.source,
            cubin=output.cubin,
            meta=EntryMeta(
                label=plan.spec.label,
                arch=plan.job.arch,
                compiler=plan.compiler.identity,
                entry_name=plan.spec.entry_name,
                flags=plan.compiler.key_flags(plan.job),
                log=output.log,
            ),
            dumps=dumps,
        )

    def _failure(self, plan: BuildPlan, output: CompileOutput, what: str) -> CompileError:
        source_path = self.cache.keep_failed_source(plan.name, plan.job.source)
        return CompileError(
            f"{plan.compiler.identity} must compile the kernel {plan.spec.label} for {plan.job.arch}, but {what}; the "
            f"source is kept at {source_path}\ncommand: {output.command}\n{output.log.strip()}",
            command=output.command,
            log=output.log,
            source_path=str(source_path),
        )

    def _check_local_memory(self, plan: BuildPlan, kernel: CompiledKernel, entry: CacheEntry) -> None:
        what = ""
        if kernel.usage is None:
            what = "EP_JIT_PTXAS_CHECK is set and ptxas did not say what the kernel uses"
        elif kernel.usage.uses_local_memory:
            what = f"EP_JIT_PTXAS_CHECK is set and the kernel uses local memory: {kernel.usage}"
        if what:
            output = CompileOutput(cubin=kernel.cubin, log=entry.meta.log, command=" ".join(entry.meta.flags))
            raise self._failure(plan, output, what)

    def _disassemble(self, cubin: bytes) -> str:
        cuobjdump = find_cuobjdump(self.options)
        if cuobjdump is None:
            raise ConfigError(
                "EP_JIT_DUMP_SASS and EP_JIT_DUMP_ASM need the program cuobjdump, which is neither in a CUDA toolkit "
                "nor on PATH; install it or use EP_JIT_DUMP_PTX"
            )
        with tempfile.TemporaryDirectory(prefix="deep_ep_jit_") as folder:
            path = Path(folder, "kernel.cubin")
            path.write_bytes(cubin)
            command = [str(cuobjdump), "--dump-sass", str(path)]
            answer = subprocess.run(command, capture_output=True, text=True, timeout=_CUOBJDUMP_TIMEOUT_S, check=False)
        if answer.returncode:
            raise CompileError(f"{cuobjdump} failed: {answer.stderr}", command=" ".join(command), log=answer.stderr)
        return answer.stdout


def _say(text: str) -> None:
    # The settings that ask for it promise print, whatever the application does with logging.
    print(f"deep_ep_core.jit: {text}", file=sys.stderr, flush=True)


@functools.cache
def default_builder() -> Builder:
    """The builder of this process, with the options of `get_env`; the same object at every call."""
    return Builder(JitOptions.from_env(get_env()))
