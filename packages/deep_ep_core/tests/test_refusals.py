from __future__ import annotations

from deep_ep_core.errors import ConfigError
from deep_ep_core.refusals import rejected


def test_a_refusal_says_what_must_hold_what_came_where_and_what_to_do():
    error = rejected(3, "x must be positive", -1, "pass more")
    assert type(error) is ConfigError
    assert str(error) == "x must be positive (got -1, on rank 3); pass more"
