from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import pytest


@pytest.fixture(scope="session")
def kernels() -> ModuleType:
    """The module of test kernels beside this file, which GPU scripts import by name."""
    path = Path(__file__).with_name("device_kernels.py")
    spec = importlib.util.spec_from_file_location("device_kernels", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["device_kernels"] = module
    spec.loader.exec_module(module)
    return module
