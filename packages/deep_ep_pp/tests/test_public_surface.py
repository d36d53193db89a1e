"""What the package shows: names, docstrings, its version."""

import re
from pathlib import Path

import pytest

import deep_ep_pp
from deep_ep_pp import PipelineBuffer

# A name more is a promise more; a name less breaks somebody.
PUBLIC_NAMES = [
    "BackendName",
    "PipelineBuffer",
    "__version__",
    "get_pp_buffer_size_hint",
    "pp_recv",
    "pp_send",
    "pp_set_config",
]
PUBLIC_BUFFER_METHODS = ["close", "get_pp_buffer_size_hint", "pp_recv", "pp_send", "pp_set_config"]
COLLECTIVE = ["PipelineBuffer", "pp_set_config"]


def test_the_package_shows_these_names():
    assert sorted(deep_ep_pp.__all__) == PUBLIC_NAMES
    for name in PUBLIC_NAMES:
        assert getattr(deep_ep_pp, name) is not None


def test_the_buffer_has_these_public_methods():
    assert sorted(name for name in vars(PipelineBuffer) if name[0] != "_") == PUBLIC_BUFFER_METHODS


@pytest.mark.parametrize("name", PUBLIC_BUFFER_METHODS)
def test_every_method_says_whether_it_communicates(name):
    expected = "Collective: yes" if name in COLLECTIVE else "Collective: no"
    assert expected in getattr(PipelineBuffer, name).__doc__


@pytest.mark.parametrize("name", [name for name in PUBLIC_NAMES if name not in ("BackendName", "__version__")])
def test_every_name_says_whether_it_communicates(name):
    expected = "Collective: yes" if name in COLLECTIVE else "Collective: no"
    assert expected in getattr(deep_ep_pp, name).__doc__


def test_version_is_that_of_the_project_file():
    text = (Path(__file__).parents[1] / "pyproject.toml").read_text()
    assert re.findall(r'^version = "([^"]+)"$', text, flags=re.MULTILINE) == [deep_ep_pp.__version__]
