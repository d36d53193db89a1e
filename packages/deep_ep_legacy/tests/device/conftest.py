from __future__ import annotations

from collections.abc import Callable

import pytest

from deep_ep_core.jit import CompileJob, Compiler, package_include_dir

_INCLUDE_DIRS = (package_include_dir("deep_ep_core"), package_include_dir("deep_ep_legacy"))


@pytest.fixture
def compile_without_warnings(compiler: Compiler) -> Callable[[str, str], str]:
    """Compiles a source for an architecture, and returns what the compiler says."""

    def compile_source(source: str, arch: str) -> str:
        output = compiler.compile(CompileJob(source=source, arch=arch, include_dirs=_INCLUDE_DIRS))
        assert output.failure == "", output.log
        assert "warning" not in output.log
        return output.log

    return compile_source
