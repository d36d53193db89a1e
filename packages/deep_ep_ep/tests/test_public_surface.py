"""What the packages show: names, docstrings, versions, and imports that do no work."""

from __future__ import annotations

import importlib
import inspect
import json
import os
import pkgutil
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import ep_unit_import
import pytest

import deep_ep_ep
from deep_ep_ep import ElasticBuffer, autograd

PACKAGES = ("deep_ep_core", "deep_ep_ep", "deep_ep_pp", "deep_ep_cp", "deep_ep_engram", "deep_ep_legacy")
PACKAGES_ROOT = Path(__file__).parents[2]

# A name more is a promise more; a name less breaks somebody.
PUBLIC_NAMES = [
    "EPHandle",
    "ElasticBuffer",
    "EventHandle",
    "EventOverlap",
    "__version__",
    "get_logical_domain_size",
    "get_physical_domain_size",
    "topk_idx_t",
]
PUBLIC_BUFFER_METHODS = [
    "barrier",
    "capture",
    "close",
    "combine",
    "destroy",
    "dispatch",
    "empty_like_recv",
    "get_buffer_size_hint",
    "get_comm_stream",
    "get_logical_domain_size",
    "get_physical_domain_size",
    "get_theoretical_num_qps",
    "get_theoretical_num_sms",
]


def module_names() -> list[str]:
    names = list(PACKAGES)
    for package in PACKAGES:
        path = importlib.import_module(package).__path__
        names += [module.name for module in pkgutil.walk_packages(path, f"{package}.")]
    return sorted(names)


def is_program(module_name: str) -> bool:
    return module_name.rpartition(".")[2] == "__main__"


def own_public_objects(module: ModuleType) -> Iterator[tuple[str, Any]]:
    """The functions and classes of `__all__` that the module defines itself."""
    for name in getattr(module, "__all__", ()):
        value = getattr(module, name)
        if (inspect.isfunction(value) or inspect.isclass(value)) and value.__module__ == module.__name__:
            yield name, value


def own_public_methods(cls: type) -> Iterator[tuple[str, Callable[..., Any]]]:
    """Functions, static and class methods, and getters of properties that the class defines itself."""
    for name, value in vars(cls).items():
        function = value.fget if isinstance(value, property) else inspect.unwrap(getattr(value, "__func__", value))
        if not name.startswith("_") and inspect.isfunction(function):
            yield name, function


def test_the_package_shows_these_names():
    assert sorted(deep_ep_ep.__all__) == sorted(PUBLIC_NAMES)
    for name in PUBLIC_NAMES:
        assert getattr(deep_ep_ep, name) is not None


def test_the_buffer_has_these_public_methods():
    methods = [
        name for name, value in vars(ElasticBuffer).items() if not isinstance(value, property) and name[0] != "_"
    ]
    assert sorted(methods) == PUBLIC_BUFFER_METHODS


@pytest.mark.parametrize("name", module_names())
def test_every_name_that_a_module_shows_is_there(name):
    module = importlib.import_module(name)
    assert module.__doc__
    # A module that only opens a folder, or that is run, shows nothing.
    if "__all__" not in vars(module):
        assert is_program(name) or hasattr(module, "__path__")
        return
    assert len(set(module.__all__)) == len(module.__all__)
    for public in module.__all__:
        assert hasattr(module, public), public


@pytest.mark.parametrize("name", module_names())
def test_every_public_function_class_and_method_says_what_it_does(name):
    for public, value in own_public_objects(importlib.import_module(name)):
        # A dataclass without a docstring is given its signature for one.
        assert value.__doc__, public
        assert not value.__doc__.startswith(f"{public}("), f"{public} has no docstring"
        if inspect.isclass(value):
            for method, function in own_public_methods(value):
                assert function.__doc__, f"{public}.{method}"


COMMUNICATING = [
    ElasticBuffer,
    ElasticBuffer.barrier,
    ElasticBuffer.combine,
    ElasticBuffer.dispatch,
    ElasticBuffer.get_buffer_size_hint,
    deep_ep_ep.get_logical_domain_size,
    deep_ep_ep.get_physical_domain_size,
    autograd.combine,
    autograd.dispatch,
]


@pytest.mark.parametrize("value", COMMUNICATING, ids=lambda value: value.__qualname__)
def test_what_communicates_says_so(value):
    assert "Collective: yes" in value.__doc__


@pytest.mark.parametrize("name", PUBLIC_BUFFER_METHODS)
def test_every_method_of_the_buffer_says_whether_it_communicates(name):
    method = getattr(ElasticBuffer, name)
    expected = "Collective: yes" if method in COMMUNICATING else "Collective: no"
    assert expected in method.__doc__


def watch_imports(*names: str, **variables: str) -> list[str]:
    """What the modules do when a fresh process imports them, one line a deed."""
    program = [sys.executable, str(Path(ep_unit_import.__file__)), *names]
    done = subprocess.run(
        program, capture_output=True, text=True, timeout=120, check=False, env={**os.environ, **variables}
    )
    assert done.returncode == 0, done.stderr
    told = json.loads(done.stdout)
    assert told["modules"] == list(names)
    return told["work"]


def test_importing_every_module_does_no_work():
    """No file, process, socket, library, environment variable, thread, warning or output.

    What the modules import of others is loaded before, so that only their own deeds are seen.
    """
    assert watch_imports(*module_names()) == []


def test_work_at_import_is_seen(tmp_path):
    """The program that looks for work finds each kind that it looks for."""
    (tmp_path / "deep_ep_busy.py").write_text(
        "import ctypes, os, socket, subprocess, sys, threading, warnings\n"
        "os.environ.get('EP_BUSY')\n"
        "os.getenv('EP_BUSY_TOO')\n"
        "os.environ['EP_BUSY'] = '1'\n"
        "open(__file__ + '.txt', 'w').close()\n"
        "os.mkdir(__file__ + '.folder')\n"
        "subprocess.run([sys.executable, '-c', ''])\n"
        "socket.socket().close()\n"
        "ctypes.CDLL(None)\n"
        "threading.Thread(target=print).start()\n"
        "warnings.warn('busy')\n"
    )
    work = watch_imports("deep_ep_busy", PYTHONPATH=str(tmp_path), PYTHONDONTWRITEBYTECODE="1")
    kinds = {line.split(": ")[1].split()[0] for line in work}
    expected = {"reads", "writes", "open", "os.mkdir", "subprocess.Popen", "socket.__new__", "ctypes.dlopen"}
    assert expected | {"starts", "warns", "prints"} <= kinds
    assert "deep_ep_busy: reads EP_BUSY_TOO" in work


@pytest.mark.parametrize("package", PACKAGES)
def test_version_is_that_of_the_project_file(package):
    text = (PACKAGES_ROOT / package / "pyproject.toml").read_text()
    (version,) = re.findall(r'^version = "([^"]+)"$', text, flags=re.MULTILINE)
    assert importlib.import_module(package).__version__ == version
