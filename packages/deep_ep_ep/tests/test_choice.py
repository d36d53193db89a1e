"""Which backend a buffer gets where there is no GPU, and what the ranks must agree on."""

from __future__ import annotations

import ep_unit_choice
import pytest

from deep_ep_core.errors import ConfigError
from deep_ep_ep.choice import agreed_by_choice, check_choice


@pytest.mark.parametrize("backend", ["auto", "collective", "device"])
@pytest.mark.parametrize("recv_memory", ["auto", "window", "torch"])
def test_known_names_pass(backend: str, recv_memory: str) -> None:
    check_choice(backend, recv_memory)


def test_unknown_names_are_refused() -> None:
    with pytest.raises(ConfigError, match=r'backend must be "auto", "collective" or "device" \(got None\)'):
        check_choice(None, "auto")
    with pytest.raises(ConfigError, match=r"recv_memory must be .* \(got 'host'\)"):
        check_choice("auto", "host")


def test_choices_are_shown_by_their_names() -> None:
    shown = {field.name: field.show(field.value) for field in agreed_by_choice("device", "torch")}
    assert shown["backend"] == "device"
    assert shown["recv_memory"] == "torch"
    assert shown["use of CUDA"] in ("has CUDA", "has none")


def test_the_device_backend_is_refused_without_a_gpu_and_the_next_buffer_works(rank_pool) -> None:
    for rank, message in enumerate(rank_pool(2).run(ep_unit_choice.ask_for_the_device_backend)):
        assert message.startswith('backend="device" needs GPUs (got none: torch finds no CUDA device, ')
        assert f"on rank {rank}" in message


@pytest.mark.parametrize(
    ("backend", "reason"),
    [("auto", "torch finds no CUDA device"), ("collective", 'backend="collective" was passed')],
)
def test_the_collective_backend_is_taken_and_the_log_says_why(rank_pool, backend, reason) -> None:
    for name, lines in rank_pool(2).run(ep_unit_choice.logged_choice, backend):
        assert name == "collective"
        assert lines == [f"ElasticBuffer uses the collective backend: {reason}"]


@pytest.mark.parametrize(
    ("choices", "field", "values"),
    [
        ([{"backend": "auto"}, {"backend": "collective"}], "backend", ["auto", "collective"]),
        ([{"recv_memory": "window"}, {"recv_memory": "torch"}], "recv_memory", ["window", "torch"]),
    ],
    ids=["backend", "recv_memory"],
)
def test_ranks_that_choose_differently_are_all_told(rank_pool, choices, field, values) -> None:
    for outcome in rank_pool(2).run_catching(ep_unit_choice.choose, choices):
        assert outcome.error_type_name == "RankMismatchError", outcome
        assert outcome.error_attributes["field"] == field
        assert list(outcome.error_attributes["values"]) == values


def test_memory_for_rows_without_a_window_is_ordinary_memory(rank_pool) -> None:
    """`empty_like_recv` and every `recv_memory` are valid on the collective backend, and change nothing."""
    rank_pool(2).run(ep_unit_choice.check_empty_like_recv)
