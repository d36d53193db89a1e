"""Deliberate faults, planted one at a time in the library; a check that passes in spite of one is worth nothing."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import replace

import torch
from ep_cases import Case, Expected, make_buffer
from ep_modes import Mode, all_modes, check_round_trip

from deep_ep_ep import collective, reduction, routing


def _replace_result(function: Callable, **changes: Callable) -> Callable:
    """The function, with fields of its result changed."""

    def faulty(*args, **kwargs):
        result = function(*args, **kwargs)
        return replace(result, **{name: change(getattr(result, name)) for name, change in changes.items()})

    return faulty


def _wrong_slot() -> Callable:
    # Entries that select nothing stay -1.
    return _replace_result(collective.route_tokens, slot_idx=lambda idx: torch.where(idx >= 0, idx + 1, idx))


def _wrong_row_order() -> Callable:
    def reverse_two(token_idx: torch.Tensor) -> torch.Tensor:
        swapped = token_idx.clone()
        swapped[:2] = token_idx[:2].flip(0)
        return swapped

    return _replace_result(collective.route_tokens, send_token_idx=reverse_two)


def _swapped_weight() -> Callable:
    original = collective._exchange_tokens

    def faulty(*args, **kwargs):
        arrived = original(*args, **kwargs)
        if arrived.topk_weights is None:
            return arrived
        return replace(arrived, topk_weights=arrived.topk_weights[:, [1, 0, *range(2, arrived.topk_weights.size(1))]])

    return faulty


def _missing_padding() -> Callable:
    return lambda handle, dst_row: dst_row[:0]


def _unmasked_local_experts() -> Callable:
    return lambda topk_idx, rank, num_local_experts: torch.where(topk_idx >= 0, topk_idx % num_local_experts, -1)


def _ignored_alignment() -> Callable:
    original = collective.layout_experts
    return lambda local_idx, num_local_experts, expert_alignment: original(
        local_idx, num_local_experts=num_local_experts, expert_alignment=1
    )


def _reversed_sum() -> Callable:
    original = reduction.sum_rows_in_order
    return lambda rows, row_idx, biases=(): original(rows, row_idx.flip(1), biases)


def _rounded_at_each_step() -> Callable:
    def faulty(rows, row_idx, biases=()):
        total = torch.zeros(row_idx.size(0), rows.size(1), dtype=rows.dtype)
        for bias in biases:
            total += bias
        for k in range(row_idx.size(1)):
            has_row = row_idx[:, k] >= 0
            total[has_row] += rows[row_idx[has_row, k]]
        return total

    return faulty


def _bias_last() -> Callable:
    original = reduction.sum_rows_in_order
    return lambda rows, row_idx, biases=(): sum(biases, original(rows, row_idx))


def _first_of_group_for_last() -> Callable:
    original = reduction.last_of_each_group
    return lambda group_idx: original(group_idx.flip(1)).flip(1)


def _shifted_scales() -> Callable:
    original = collective._place_sf
    return lambda args, sf, num_rows, row_idx=None: original(args, sf.roll(1, 0), num_rows, row_idx)


def _dropped_token_offset() -> Callable:
    original = collective._exchange_tokens

    def faulty(*args, **kwargs):
        arrived = original(*args, **kwargs)
        return replace(arrived, token_idx=torch.zeros_like(arrived.token_idx))

    return faulty


def _stale_payload() -> Callable:
    original = collective._exchange_tokens

    def faulty(*args, **kwargs):
        arrived = original(*args, **kwargs)
        # The last row that arrived keeps the bytes of the one before.
        arrived.x.view(torch.uint8)[-1:] = arrived.x.view(torch.uint8)[-2:-1]
        return arrived

    return faulty


# Name: (modules that hold the function, its name, what replaces it).
FAULTS: dict[str, tuple[tuple[object, ...], str, Callable[[], Callable]]] = {
    "wrong slot": ((collective,), "route_tokens", _wrong_slot),
    "two rows in the wrong order": ((collective,), "route_tokens", _wrong_row_order),
    "swapped weights": ((collective,), "_exchange_tokens", _swapped_weight),
    "missing zero padding": ((collective,), "_padding_rows", _missing_padding),
    "experts of other ranks taken for local": ((collective,), "local_expert_idx", _unmasked_local_experts),
    "ignored alignment": ((collective,), "layout_experts", _ignored_alignment),
    "sum in descending order": ((reduction, collective), "sum_rows_in_order", _reversed_sum),
    "sum rounded at each step": ((reduction, collective), "sum_rows_in_order", _rounded_at_each_step),
    "bias added last": ((reduction,), "sum_rows_in_order", _bias_last),
    "first entry of a rank instead of the last": ((routing, reduction), "last_of_each_group", _first_of_group_for_last),
    "scales shifted by a row": ((collective,), "_place_sf", _shifted_scales),
    "source token lost": ((collective,), "_exchange_tokens", _dropped_token_offset),
    "stale payload in the last row": ((collective,), "_exchange_tokens", _stale_payload),
}


@contextlib.contextmanager
def planted(name: str) -> Iterator[None]:
    modules, attribute, make = FAULTS[name]
    originals = [getattr(module, attribute) for module in modules]
    faulty = make()
    try:
        for module in modules:
            setattr(module, attribute, faulty)
        yield
    finally:
        for module, original in zip(modules, originals, strict=True):
            setattr(module, attribute, original)


MODE: Mode = next(mode for mode in all_modes() if mode.is_fp8 and mode.expert_alignment == 128 and mode.num_biases == 1)


def outcome_with_fault(name: str | None) -> str:
    """What the round trip says with a fault planted: "passed", "caught: ..." when a comparison failed, or
    "stopped: ..." when the library itself ran into the consequence.
    """
    case = Case(num_tokens=(33, 31, 20, 9), expert_alignment=8, payload="fp8 float32", num_biases=1)
    buffer = make_buffer(case, num_cpu_timeout_secs=4)
    expected = Expected.of(case)
    with planted(name) if name is not None else contextlib.nullcontext():
        try:
            check_round_trip(buffer, expected, MODE)
        except AssertionError as error:
            return f"caught: {error}"
        except Exception as error:
            return f"stopped: {type(error).__name__}: {error}"
    return "passed"
