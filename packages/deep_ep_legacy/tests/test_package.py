"""What the two import names show, with `deep-ep-ep` and without it."""

import importlib
import json
import os
import pkgutil
import re
import subprocess
import sys
from pathlib import Path

import import_deep_ep
import pytest
import torch

import deep_ep
import deep_ep.utils
import deep_ep_ep
import deep_ep_legacy

FROM_LEGACY = ["Buffer", "Config", "EventHandle", "EventOverlap", "__version__", "topk_idx_t"]
FROM_EP = ["EPHandle", "ElasticBuffer", "get_logical_domain_size", "get_physical_domain_size"]


def test_deep_ep_shows_v1_and_v2():
    assert sorted(deep_ep.__all__) == sorted(FROM_LEGACY + FROM_EP)
    for name in FROM_LEGACY:
        assert getattr(deep_ep, name) is getattr(deep_ep_legacy, name)
    for name in FROM_EP:
        assert getattr(deep_ep, name) is getattr(deep_ep_ep, name)
    assert set(FROM_EP) <= set(dir(deep_ep))
    assert deep_ep.topk_idx_t == torch.int64
    assert deep_ep.utils.EventOverlap is deep_ep_ep.EventOverlap, "one class for all packages"
    with pytest.raises(AttributeError, match="module 'deep_ep' has no attribute 'Bufer'"):
        _ = deep_ep.Bufer


def test_without_deep_ep_ep_v1_works_and_v2_says_what_to_install():
    done = subprocess.run(
        [sys.executable, import_deep_ep.__file__],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    told = json.loads(done.stdout)
    advice = "needs the package deep-ep-ep; pip install deep-ep-ep, or deep-ep-legacy[ep]"
    assert told["from"] == f"ImportError: deep_ep.ElasticBuffer {advice}"
    assert told["attribute"] == f"AttributeError: deep_ep.EPHandle {advice}"
    assert told["v1"] == "fine"
    assert told["utils"] == "fine"
    assert told["hasattr"] is False, "so that callers can ask which API is there"


def test_deep_ep_legacy_shows_these_names():
    expected = [*FROM_LEGACY, "InternodeHandle", "IntranodeHandle"]
    assert sorted(deep_ep_legacy.__all__) == sorted(expected)
    for name in expected:
        assert getattr(deep_ep_legacy, name) is not None


def test_every_module_says_what_it_owns_and_has_what_it_names():
    for info in pkgutil.iter_modules(deep_ep_legacy.__path__, "deep_ep_legacy."):
        module = importlib.import_module(info.name)
        assert module.__doc__.startswith("Owns "), info.name
        for name in module.__all__:
            assert hasattr(module, name), (info.name, name)


def test_version_is_that_of_the_project_file():
    text = (Path(__file__).parents[1] / "pyproject.toml").read_text()
    assert re.search(r'^version = "(.+)"$', text, flags=re.MULTILINE)[1] == deep_ep_legacy.__version__
