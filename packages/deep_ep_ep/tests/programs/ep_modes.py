"""Every mode of dispatch and combine against the reference. Runs on a rank pool, or by itself under any launcher."""

from __future__ import annotations

import hashlib
import itertools
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
import torch.distributed as dist
from ep_cases import (
    SETTING,
    Case,
    Expected,
    as_bytes,
    assert_bits_equal,
    assert_values_equal,
    check_expert_major,
    check_handle,
    check_token_major,
    make_biases,
    make_buffer,
    padded,
    to_device,
    with_ranks,
)

from deep_ep_core.local import run_as_script
from deep_ep_ep import ElasticBuffer, EPHandle, reference


@dataclass(frozen=True)
class Mode:
    """One of the 144 combinations of how a call can be made."""

    do_handle_copy: bool
    expert_alignment: int
    is_fp8: bool
    num_biases: int
    has_previous_event: bool
    is_async: bool
    allocate_on_comm_stream: bool


def all_modes() -> list[Mode]:
    modes = [
        Mode(*values)
        for values in itertools.product(
            (True, False), (128, 1), (True, False), (0, 1, 2), (False, True), (False, True), (False, True)
        )
    ]
    # A previous event is for memory of the communication stream only.
    return [mode for mode in modes if mode.allocate_on_comm_stream or not mode.has_previous_event]


class Caller:
    """Calls a buffer the way a mode says, and waits for the results."""

    def __init__(self, buffer: ElasticBuffer, mode: Mode) -> None:
        self.buffer = buffer
        self.mode = mode

    def _streams(self) -> dict[str, object]:
        return {
            "previous_event": self.buffer.capture() if self.mode.has_previous_event else None,
            "async_with_compute_stream": int(self.mode.is_async),
            "allocate_on_comm_stream": int(self.mode.allocate_on_comm_stream),
        }

    def dispatch(self, x: object, **arguments: object) -> tuple:  # type: ignore[type-arg]
        *results, event = self.buffer.dispatch(x, **arguments, **self._streams())  # type: ignore[arg-type,call-overload]
        assert (event.event is not None) == self.mode.is_async
        if self.mode.is_async:
            event.current_stream_wait()
        return tuple(results)

    def combine(self, x: torch.Tensor, handle: EPHandle, **arguments: object) -> tuple:  # type: ignore[type-arg]
        combined_x, weights, event = self.buffer.combine(x, handle, **arguments, **self._streams())  # type: ignore[arg-type]
        assert (event.event is not None) == self.mode.is_async
        if self.mode.is_async:
            event.current_stream_wait()
        return combined_x, weights


def check_round_trip(buffer: ElasticBuffer, expected: Expected, mode: Mode, *, do_cpu_sync: bool = True) -> None:
    """Both layouts there and back, fresh and cached, with everything compared.

    All calls are made before anything is compared, so that a rank which finds a difference leaves no other waiting.
    """
    rank, case = dist.get_rank(), expected.case
    sent = expected.sent[rank]
    x, topk_idx, topk_weights = to_device(case, (sent.x, sent.topk_idx, sent.topk_weights))
    if sent.sf is not None:
        x = (x, to_device(case, sent.sf))
    caller = Caller(buffer, mode)
    stats = torch.full((case.num_local_experts,), 5, dtype=torch.int32, device=case.device)
    common = {
        "topk_idx": topk_idx,
        "num_experts": case.num_experts,
        "expert_alignment": case.expert_alignment,
        "do_cpu_sync": int(do_cpu_sync),
        "do_handle_copy": int(mode.do_handle_copy),
    }
    by_column = {"use_tma_aligned_col_major_sf": 1}
    token_major = caller.dispatch(x, topk_weights=topk_weights, cumulative_local_expert_recv_stats=stats, **common)
    expert_major = caller.dispatch(x, topk_weights=topk_weights, do_expand=1, **by_column, **common)
    handle, exp_handle = token_major[3], expert_major[3]
    # Without weights; the SM count is left to the handle.
    cached_token_major = caller.dispatch(x, handle=handle, num_sms=0)
    cached_expert_major = caller.dispatch(
        x, handle=exp_handle, topk_weights=topk_weights, do_expand=True, do_zero_padding=True, **by_column
    )
    # A token-major cached dispatch may use an expert-major handle.
    crossed = caller.dispatch(x, handle=exp_handle)
    compare_combines = call_combines(caller, expected, handle, exp_handle)
    SETTING.before_compare(buffer)

    num_rows = None if do_cpu_sync else case.num_ranks * case.num_max_tokens_per_rank
    num_exp_rows = None if do_cpu_sync else exp_handle.num_expanded_tokens
    check_token_major(expected, rank, *token_major[:3], num_rows=num_rows)
    check_handle(expected, rank, handle, buffer, do_cpu_sync=do_cpu_sync)
    assert (stats - 5).tolist() == [len(pairs) for pairs in expected.received[rank].expert_rows]
    is_shared = handle.topk_idx.data_ptr() == topk_idx.data_ptr()
    assert is_shared == (not mode.do_handle_copy or sent.topk_idx.numel() == 0)
    assert_bits_equal(handle.topk_idx, sent.topk_idx, "handle.topk_idx")
    check_expert_major(expected, rank, *expert_major[:3], is_zero_padded=False, num_rows=num_exp_rows)
    check_handle(expected, rank, exp_handle, buffer, do_cpu_sync=do_cpu_sync)
    if isinstance(expert_major[0], tuple):
        sf = expert_major[0][1]
        assert sf.stride() == (1, (sf.size(0) + 3) // 4 * 4)
        # The padding of the last column is there too: a TMA descriptor reads whole columns.
        assert sf.untyped_storage().nbytes() == sf.size(1) * sf.stride(1) * sf.element_size()
    assert cached_token_major[3] is handle
    assert cached_token_major[2] is None
    check_token_major(expected, rank, *cached_token_major[:2], None, num_rows=num_rows)
    assert cached_expert_major[3] is exp_handle
    check_expert_major(expected, rank, *cached_expert_major[:3], is_zero_padded=True, num_rows=num_exp_rows)
    check_token_major(expected, rank, *crossed[:2], None, num_rows=num_rows)
    compare_combines()


def call_combines(
    caller: Caller, expected: Expected, handle: EPHandle, exp_handle: EPHandle, *, with_bias: bool = True
) -> Callable[[], None]:
    """Combine both layouts now; returns what compares the results."""
    rank, case, buffer = dist.get_rank(), expected.case, caller.buffer
    sent, received = expected.sent[rank], expected.received
    biases = make_biases(case, rank) if with_bias else []
    bias = (None, biases[0] if biases else None, tuple(biases))[len(biases)]
    # Weights that come back, unlike those that went out: unique to (rank, row, position).
    token_weights = [
        (torch.arange(len(r.source) * case.num_topk) + 100000.0 * (i + 1)).float().view(-1, case.num_topk)
        for i, r in enumerate(received)
    ]
    exp_weights = [(torch.arange(sum(r.num_aligned)) + 100000.0 * (i + 1)).float() for i, r in enumerate(received)]
    layouts = (
        (False, handle, expected.token_major_outputs(), token_weights),
        (True, exp_handle, expected.expert_major_outputs(), exp_weights),
    )
    results = []
    for is_expanded, use_handle, outputs, weights in layouts:
        num_rows = use_handle.num_expanded_tokens if is_expanded else use_handle.num_recv_tokens
        has_weights = not is_expanded or buffer.allow_multiple_reduction
        own_weights = padded(weights[rank], num_rows) if has_weights else None
        x, own_weights, own_bias = to_device(case, (padded(outputs[rank], num_rows), own_weights, bias))
        results.append(caller.combine(x, use_handle, bias=own_bias, topk_weights=own_weights))

    def compare() -> None:
        for (is_expanded, _, outputs, weights), (combined, combined_weights) in zip(layouts, results, strict=True):
            layout = "expert-major" if is_expanded else "token-major"
            common = {"num_experts": case.num_experts, "is_expanded": is_expanded}
            expected_sum = reference.combine(
                rank,
                sent.topk_idx,
                outputs,
                received,
                allow_multiple_reduction=buffer.allow_multiple_reduction,
                ranks_per_node=buffer.num_scaleup_ranks if buffer.num_scaleout_ranks > 1 else None,
                biases=biases,
                **common,
            )
            assert_values_equal(combined, expected_sum, f"{layout} combined_x")
            if is_expanded and not buffer.allow_multiple_reduction:
                assert combined_weights is None
                continue
            expected_weights = reference.combine_weights(rank, sent.topk_idx, weights, received, **common)
            assert_bits_equal(combined_weights, expected_weights, f"{layout} combined weights")

    return compare


def case_of(mode: Mode, num_tokens: tuple[int, ...]) -> Case:
    return Case(
        num_tokens=num_tokens,
        expert_alignment=mode.expert_alignment,
        payload="fp8 float32" if mode.is_fp8 else "bfloat16",
        num_biases=mode.num_biases,
    )


UNEVEN = (33, 31, 1, 20)


def check_all_modes(first: int = 0, step: int = 1, options: dict[str, object] | None = None) -> int:
    """Run modes first, first + step, ... on one buffer; returns how many ran."""
    modes = all_modes()[first::step]
    buffer = None
    for mode in modes:
        case = with_ranks(case_of(mode, UNEVEN))
        buffer = buffer or make_buffer(case, **(options or {}))
        check_round_trip(buffer, Expected.of(case), mode)
    assert buffer is not None
    buffer.destroy()
    return len(modes)


def check_topologies() -> None:
    """The reduction orders of every domain layout: with and without the hierarchy, with and without partial sums."""
    for options in itertools.product((True, False), (True, False)):
        check_all_modes(
            first=3, step=11, options={"allow_hybrid_mode": options[0], "allow_multiple_reduction": options[1]}
        )


PLAIN = Mode(True, 1, False, 1, False, False, False)


def check_case(case: Case, options: dict[str, object] | None = None, do_cpu_sync: bool = True) -> None:
    """One case in the plain mode on a buffer of its own."""
    buffer = make_buffer(case, **(options or {}))
    check_round_trip(buffer, Expected.of(case), PLAIN, do_cpu_sync=do_cpu_sync)
    buffer.destroy()


def check_sizes() -> None:
    """Token counts of 0, 1, 31, 32, 33, uneven, all to one rank, and no expert at all."""
    base = with_ranks(Case(num_tokens=(1,), num_biases=1, expert_alignment=4))
    n = base.num_ranks
    counts = [(size,) * n for size in (0, 1, 31, 32, 33)]
    counts += [tuple((7 * r) % 40 for r in range(n)), tuple(40 if r == n - 1 else 0 for r in range(n))]
    for num_tokens in counts:
        check_case(replace(base, num_tokens=num_tokens))
        check_case(replace(base, num_tokens=num_tokens), do_cpu_sync=False)
    for routing in ("all to one", "none"):
        check_case(replace(base, num_tokens=(33,) * n, routing=routing))
        check_case(replace(base, num_tokens=(33,) * n, routing=routing), do_cpu_sync=False)
    check_case(replace(base, num_tokens=(33,) * n, masked_share=0.9))


def check_payloads() -> None:
    """Any dtype and any scale layout moves as bytes; int32 indices come back as int32."""
    base = with_ranks(Case(num_tokens=(9, 0, 33, 17)))
    for payload in ("bfloat16", "float16", "float32", "opaque bytes", "fp8 float32", "fp8 ue8m0"):
        for topk_idx_dtype in (torch.int64, torch.int32):
            check_case(replace(base, payload=payload, topk_idx_dtype=topk_idx_dtype), {"num_bytes": 64 << 20})
    for payload in ("fp8 float32", "fp8 ue8m0"):
        check_case(replace(base, payload=payload, column_major_input_sf=True))


def check_topk() -> None:
    """From one expert a token to all of them."""
    base = with_ranks(Case(num_tokens=(12, 3, 20, 7)))
    for num_topk in (1, 2, 3, 8, 16):
        check_case(replace(base, num_topk=num_topk))


def check_interleaved() -> None:
    """Several handles live at once, used in any order; results do not depend on what ran between."""
    first = with_ranks(Case(num_tokens=(12, 0, 33, 7), num_biases=1))
    second = replace(first, seed=5, num_topk=6, expert_alignment=8, payload="fp8 float32")
    buffer = make_buffer(first)
    rank = dist.get_rank()
    handles = {}
    for name, case in (("first", first), ("second", second)):
        expected = Expected.of(case)
        sent = expected.sent[rank]
        x = to_device(case, sent.x if sent.sf is None else (sent.x, sent.sf))
        for do_expand in (False, True):
            results = buffer.dispatch(
                x,
                topk_idx=to_device(case, sent.topk_idx),
                num_experts=case.num_experts,
                expert_alignment=case.expert_alignment,
                do_expand=do_expand,
            )
            handles[name, do_expand] = results[3]
    for name, case in (("first", first), ("second", second)):
        caller = Caller(buffer, PLAIN)
        call_combines(caller, Expected.of(case), handles[name, False], handles[name, True], with_bias=False)()
    buffer.destroy()


def check_permuted_rows() -> None:
    """Rows may be permuted between dispatch and combine if the handle's metadata is permuted alike."""
    case = with_ranks(Case(num_tokens=(12, 3, 33, 7)))
    expected = Expected.of(case)
    buffer, rank = make_buffer(case), dist.get_rank()
    sent = expected.sent[rank]
    x, topk_idx = to_device(case, (sent.x, sent.topk_idx))
    *_, handle, _ = buffer.dispatch(x, topk_idx=topk_idx, num_experts=case.num_experts)
    outputs = expected.token_major_outputs()
    order = torch.randperm(handle.num_recv_tokens, generator=torch.Generator().manual_seed(1))
    handle.recv_src_metadata = handle.recv_src_metadata[to_device(case, order)]
    combined, _, _ = buffer.combine(to_device(case, outputs[rank][order]), handle)
    expected_sum = reference.combine(
        rank,
        sent.topk_idx,
        outputs,
        expected.received,
        num_experts=case.num_experts,
        is_expanded=False,
        ranks_per_node=buffer.num_scaleup_ranks if buffer.num_scaleout_ranks > 1 else None,
    )
    assert_values_equal(combined, expected_sum, "combined_x")
    buffer.destroy()


def check_repeated(num_rounds: int = 100) -> None:
    """The same dispatch gives the same bytes every time."""
    case = with_ranks(Case(num_tokens=UNEVEN))
    buffer, sent = make_buffer(case), Expected.of(case).sent[dist.get_rank()]
    x, topk_idx = to_device(case, (sent.x, sent.topk_idx))
    digests = set()
    for _ in range(num_rounds):
        recv_x, recv_idx, _, handle, _ = buffer.dispatch(x, topk_idx=topk_idx, num_experts=case.num_experts)
        parts = [recv_x, recv_idx, handle.recv_src_metadata]
        digests.add(hashlib.sha256(b"".join(as_bytes(part).numpy().tobytes() for part in parts)).hexdigest())
    assert len(digests) == 1, digests
    buffer.destroy()


CHECKS = (
    check_all_modes,
    check_topologies,
    check_sizes,
    check_payloads,
    check_topk,
    check_interleaved,
    check_permuted_rows,
    check_repeated,
)

if __name__ == "__main__":
    # Names on the command line choose checks.
    run_as_script(*[check for check in CHECKS if not sys.argv[1:] or check.__name__ in sys.argv[1:]])
