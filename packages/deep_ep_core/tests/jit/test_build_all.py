"""Several kernels that are asked for at once."""

from __future__ import annotations

import concurrent.futures
import dataclasses
import os
import threading
from types import ModuleType
from typing import Any

import pytest

from deep_ep_core.errors import CompileError
from deep_ep_core.jit import Builder, CompileJob, CompileOutput, JitOptions, KernelSpec


@pytest.fixture
def specs(toy: ModuleType) -> list[KernelSpec]:
    return [dataclasses.replace(toy.scale_spec(), max_threads_per_block=num_threads) for num_threads in (32, 64, 96)]


def test_kernels_are_compiled_at_the_same_time_and_each_once(
    options: JitOptions, make_compiler: Any, specs: list[KernelSpec], monkeypatch: pytest.MonkeyPatch
) -> None:
    all_are_there = threading.Barrier(len(specs))
    sources: list[str] = []

    class MeetingCompiler(make_compiler):  # type: ignore[misc]
        def compile(self, job: CompileJob) -> CompileOutput:
            sources.append(job.source)
            all_are_there.wait(timeout=60)
            return super().compile(job)

    monkeypatch.setattr(os, "cpu_count", lambda: len(specs))
    kernels = Builder(options, compiler=MeetingCompiler()).build_all([*specs, specs[0]], "sm_90a")
    assert kernels[0] is kernels[3]
    assert [kernel.cubin.decode() for kernel in kernels[:3]] == [f"sm_90a {spec.source()}" for spec in specs]
    assert sorted(sources) == sorted(spec.source() for spec in specs)


def test_kernels_beside_one_that_fails_are_compiled(
    options: JitOptions, make_compiler: Any, specs: list[KernelSpec]
) -> None:
    class PickyCompiler(make_compiler):  # type: ignore[misc]
        def compile(self, job: CompileJob) -> CompileOutput:
            output = super().compile(job)
            return dataclasses.replace(output, cubin=None, failure="no") if job.source == specs[1].source() else output

    builder = Builder(options, compiler=PickyCompiler())
    with pytest.raises(CompileError, match="but it failed"):
        builder.build_all(specs, "sm_90a")
    assert len(builder.cache.names()) == 2


def test_no_kernels_are_no_work(options: JitOptions, fake_compiler: Any) -> None:
    assert Builder(options, compiler=fake_compiler).build_all([], "sm_90a") == []


def test_an_interrupt_leaves_what_has_not_begun(
    options: JitOptions, make_compiler: Any, specs: list[KernelSpec], monkeypatch: pytest.MonkeyPatch
) -> None:
    may_go_on, has_begun = threading.Event(), threading.Event()
    sources: list[str] = []

    class SlowCompiler(make_compiler):  # type: ignore[misc]
        def compile(self, job: CompileJob) -> CompileOutput:
            sources.append(job.source)
            has_begun.set()
            may_go_on.wait(timeout=60)
            return super().compile(job)

    def interrupt(futures: object) -> None:
        has_begun.wait(timeout=60)
        threading.Timer(0.1, may_go_on.set).start()
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "cpu_count", lambda: 1)
    monkeypatch.setattr(concurrent.futures, "wait", interrupt)
    with pytest.raises(KeyboardInterrupt):
        Builder(options, compiler=SlowCompiler()).build_all(specs, "sm_90a")
    assert len(sources) == 1
