"""What the package shows: names, what communicates, its version."""

from __future__ import annotations

import re
from pathlib import Path

import deep_ep_cp
from deep_ep_cp import ContextBuffer, SessionHandle

# A name more is a promise more; a name less breaks somebody.
PUBLIC_NAMES = ["ContextBuffer", "SessionHandle", "__version__", "all_gather", "reduce_scatter"]
COLLECTIVE_METHODS = [
    "agrs_new_session",
    "agrs_set_config",
    "all_gather",
    "create_agrs_session",
    "destroy_agrs_session",
    "reduce_scatter",
]
LOCAL_METHODS = [
    "agrs_get_inplace_tensor",
    "close",
    "get_agrs_buffer_size_hint",
    "get_agrs_num_max_session_bytes",
    "get_comm_stream",
]


def test_the_package_shows_these_names():
    assert sorted(deep_ep_cp.__all__) == sorted(PUBLIC_NAMES)
    for name in PUBLIC_NAMES:
        assert getattr(deep_ep_cp, name) is not None


def test_the_buffer_has_these_public_methods_and_each_says_whether_it_communicates():
    shown = [name for name, value in vars(ContextBuffer).items() if name[0] != "_" and not isinstance(value, property)]
    assert sorted(shown) == sorted(COLLECTIVE_METHODS + LOCAL_METHODS)
    for name in COLLECTIVE_METHODS:
        assert "Collective: yes" in getattr(ContextBuffer, name).__doc__, name
    for name in LOCAL_METHODS:
        assert "Collective: no" in getattr(ContextBuffer, name).__doc__, name
    assert "Collective: no" in SessionHandle.__call__.__doc__
    for function in (deep_ep_cp.all_gather, deep_ep_cp.reduce_scatter):
        assert "Collective: yes" in function.__doc__


def test_version_is_that_of_the_project_file():
    text = (Path(__file__).parents[1] / "pyproject.toml").read_text(encoding="utf-8")
    assert re.findall(r'^version = "([^"]+)"$', text, flags=re.MULTILINE) == [deep_ep_cp.__version__]
