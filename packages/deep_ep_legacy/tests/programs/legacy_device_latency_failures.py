"""Low-latency calls on the device backend when ranks are masked, late, or call otherwise than the others.

usage: python -m deep_ep_core.launch --device cuda --ranks 4 legacy_device_latency_failures.py [check ...]
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable

import torch
import torch.distributed as dist
from legacy_device_low_latency import make_buffer, on_gpu, same, timed, uneven
from legacy_low_latency_cases import Case, check_layout, check_rows, expected_combined, expert_outputs, make_batches

from deep_ep_core.errors import DeepEPError
from deep_ep_core.local import run_as_script
from deep_ep_legacy import Buffer


def round_trip(
    buffer: Buffer, case: Case, *, gone: int | None = None, leaves: bool = False, is_split: bool = False
) -> None:
    """There and back, as if the rank that is gone had no tokens and no experts."""
    batches = make_batches(case)
    batch = batches[dist.get_rank()]
    mine = on_gpu(batch)
    recv_x, recv_count, handle, _, hook = buffer.low_latency_dispatch(
        mine.x, mine.topk_idx, case.num_max_tokens, case.num_experts, use_fp8=False, return_recv_hook=is_split
    )
    if hook is not None:
        hook()
    if gone is not None and not leaves:
        batches[gone].topk_idx.fill_(-1)
    recv_x, recv_count = recv_x.cpu(), recv_count.cpu()
    check_layout(case, batches, recv_count, (handle[0].cpu(), handle[1].cpu(), *handle[2:]))
    check_rows(case, [each.x for each in batches], batches, recv_x)
    if leaves:
        if dist.get_rank() == gone:
            return
        buffer.low_latency_update_mask_buffer(gone, True)
    x = expert_outputs(case, recv_x, recv_count).cuda()
    combined, _, hook = buffer.low_latency_combine(
        x, mine.topk_idx, mine.topk_weights, handle, return_recv_hook=is_split
    )
    if hook is not None:
        hook()
    masked = () if gone is None else (gone,)
    same("combined", combined, expected_combined(case, batch, batch.x, masked=masked))


def mask_of(buffer: Buffer) -> list[int]:
    status = torch.full((dist.get_world_size(),), 7, dtype=torch.int32, device="cuda")
    buffer.low_latency_query_mask_buffer(status)
    return status.tolist()


def told(call: Callable[[], object]) -> tuple[str, str, list[int]]:
    """Class and text of the error that a call must raise, and the peers that it names."""
    try:
        call()
    except DeepEPError as error:
        return type(error).__name__, str(error), list(getattr(error, "peers", ()))
    raise AssertionError(f"the call must fail on rank {dist.get_rank()}")


def check_masked_rank_is_left_out() -> None:
    """The last rank is masked by all others and stays away; or is masked between dispatch and combine."""
    for leaves in (False, True):
        buffer, case = make_buffer(enable_shrink=True), uneven()
        rank, gone = dist.get_rank(), dist.get_world_size() - 1
        round_trip(buffer, case)
        if leaves:
            round_trip(buffer, case, gone=gone, leaves=True)
        elif rank != gone:
            buffer.low_latency_update_mask_buffer(gone, True)
            assert mask_of(buffer) == [0] * gone + [1]
            for is_split in (False, True):
                round_trip(buffer, case, gone=gone, is_split=is_split)
            buffer.clean_low_latency_buffer(case.num_max_tokens, case.hidden, case.num_experts)
            buffer.low_latency_clean_mask_buffer()
            assert mask_of(buffer) == [0] * (gone + 1)
        torch.cuda.synchronize()
        dist.barrier()
        buffer.destroy()


def check_late_rank_is_masked(timeout_s: float = 1.0) -> list[int]:
    """The last rank does not come: the others wait once, and go on without it."""
    buffer, case = make_buffer(enable_shrink=True, num_cpu_timeout_secs=timeout_s), uneven()
    gone = dist.get_world_size() - 1
    round_trip(buffer, case)
    begin = time.monotonic()
    if dist.get_rank() != gone:
        for is_split in (False, True, False):
            round_trip(buffer, case, gone=gone, is_split=is_split)
        assert mask_of(buffer) == [0] * gone + [1]
        assert timeout_s <= time.monotonic() - begin < 20 * timeout_s
        # Masked ranks are no failure.
        round_trip(buffer, case, gone=gone)
    torch.cuda.synchronize()
    dist.barrier()
    buffer.destroy()
    return [0] * gone + [1]


def check_masked_rank_is_taken_back(timeout_s: float = 1.0) -> None:
    """A rank that came late, and has made as many calls as the others, is taken back by all and takes all back."""
    buffer, case = make_buffer(enable_shrink=True, num_cpu_timeout_secs=timeout_s), uneven()
    rank, gone = dist.get_rank(), dist.get_world_size() - 1
    round_trip(buffer, case)
    if rank == gone:
        dist.barrier()
        mine = on_gpu(make_batches(case)[rank])
        for _ in range(3):
            recv_x, _, handle, _, _ = buffer.low_latency_dispatch(
                mine.x, mine.topk_idx, case.num_max_tokens, case.num_experts, use_fp8=False
            )
            buffer.low_latency_combine(recv_x, mine.topk_idx, mine.topk_weights, handle)
        torch.cuda.synchronize()
        assert mask_of(buffer) == [1] * gone + [0]
    else:
        for is_split in (False, True, False):
            round_trip(buffer, case, gone=gone, is_split=is_split)
        torch.cuda.synchronize()
        assert mask_of(buffer) == [0] * gone + [1]
        dist.barrier()
    dist.barrier()
    if rank % 2 == 0:
        buffer.low_latency_clean_mask_buffer()
    else:
        for other in range(gone + 1):
            if other != rank:
                buffer.low_latency_update_mask_buffer(other, False)
    torch.cuda.synchronize()
    dist.barrier()
    for is_split in (False, True):
        round_trip(buffer, case, is_split=is_split)
    assert mask_of(buffer) == [0] * (gone + 1)
    dist.barrier()
    buffer.destroy()


def check_late_rank_is_named(timeout_s: float = 1.0) -> None:
    """Without masks the wait ends all later calls, with an error that names the rank that did not come."""
    buffer, case = make_buffer(num_cpu_timeout_secs=timeout_s), uneven()
    gone = dist.get_world_size() - 1
    round_trip(buffer, case)
    if dist.get_rank() != gone:
        mine = on_gpu(make_batches(case)[dist.get_rank()])
        dispatch = (mine.x, mine.topk_idx, case.num_max_tokens, case.num_experts)
        _, count, *_ = buffer.low_latency_dispatch(*dispatch)
        torch.cuda.synchronize()
        assert int(count.max()) <= case.num_ranks * case.num_max_tokens
        for _ in range(2):
            kind, text, peers = told(lambda: buffer.low_latency_dispatch(*dispatch))
            assert (kind, peers) == ("CommTimeoutError", [gone]), (kind, text)
            assert "the arrival of dispatched rows" in text, text
    dist.barrier()
    buffer.destroy()


def check_wrong_experts_are_told() -> None:
    """Entries that are no expert go nowhere; the next call of their rank says so, and then all goes on."""
    buffer, case = make_buffer(), uneven()
    rank = dist.get_rank()
    mine = on_gpu(make_batches(case)[rank])
    for wrong, words in ((case.num_experts, "got another entry for token 3"), (-2, "got another entry for token 3")):
        topk_idx = mine.topk_idx.clone()
        if rank == 0:
            topk_idx[3, 0] = wrong
        buffer.low_latency_dispatch(mine.x, topk_idx, case.num_max_tokens, case.num_experts)
        torch.cuda.synchronize()
        if rank == 0:
            kind, text, _ = told(lambda: round_trip(buffer, case))
            assert kind == "ConfigError", text
            assert words in text, text
        round_trip(buffer, case)
    topk_idx = torch.zeros(case.num_max_tokens, 2, dtype=torch.int64, device="cuda")
    x = torch.ones(case.num_max_tokens, case.hidden, dtype=torch.bfloat16, device="cuda")
    _, count, *_ = buffer.low_latency_dispatch(x, topk_idx, case.num_max_tokens, case.num_experts)
    assert int(count.sum()) == (case.num_ranks * case.num_max_tokens if rank == 0 else 0)
    kind, text, _ = told(lambda: round_trip(buffer, case))
    assert kind == "ConfigError", text
    assert "so often that more than num_max_dispatch_tokens_per_rank rows" in text, text
    round_trip(buffer, case)
    torch.cuda.synchronize()
    buffer.destroy()


def check_disagreement_is_told() -> None:
    """Ranks that pass other sizes or flags take nothing from each other, say so, and can go on."""
    buffer, case = make_buffer(), uneven()
    rank = dist.get_rank()
    mine = on_gpu(make_batches(case)[rank])
    for options in ({"use_fp8": False}, {"round_scale": True}, {"num_max_tokens": case.num_max_tokens + 1}):
        changed = dict(options) if rank == 0 else {}
        num_max_tokens = changed.pop("num_max_tokens", case.num_max_tokens)
        _, count, *_ = buffer.low_latency_dispatch(mine.x, mine.topk_idx, num_max_tokens, case.num_experts, **changed)
        torch.cuda.synchronize()
        assert int(count.max()) <= case.num_ranks * case.num_max_tokens
        kind, text, _ = told(lambda: round_trip(buffer, case))
        assert kind == "RankMismatchError", text
        assert "with the same sizes and flags" in text, text
        assert rank == 0 or "got another call on rank 0" in text, text
        round_trip(buffer, case)
    buffer.destroy()


def check_refusals() -> None:
    """What the kernels do not take is refused before anything is sent."""
    buffer, case = make_buffer(), uneven()
    mine = on_gpu(make_batches(case)[dist.get_rank()])
    sizes = (case.num_max_tokens, case.num_experts)
    for call, words in (
        (lambda: buffer.low_latency_dispatch(mine.x.cpu(), mine.topk_idx.cpu(), *sizes), "x must be on cuda"),
        (lambda: buffer.low_latency_dispatch(mine.x, mine.topk_idx, 8000, case.num_experts), "num_rdma_bytes must be"),
        (lambda: buffer.low_latency_dispatch(mine.x, mine.topk_idx, 70000, case.num_experts), "must be at most 65535"),
        (
            lambda: buffer.low_latency_dispatch(
                torch.zeros(8 * 1024 + 1, dtype=torch.bfloat16, device="cuda")[1:].view(8, 1024),
                torch.zeros(8, 1, dtype=torch.int64, device="cuda"),
                *sizes,
            ),
            "must begin at a multiple of 16 bytes",
        ),
    ):
        kind, text, _ = told(call)
        assert kind == "ConfigError", text
        assert words in text, text
    round_trip(buffer, case)
    buffer.destroy()
    use = {"backend": "device", "low_latency_mode": True, "num_cpu_timeout_secs": 20}
    kind, text, _ = told(lambda: Buffer(dist.group.WORLD, 0, 0, **use))
    assert (kind, "num_rdma_bytes" in text) == ("ConfigError", True), text


CHECKS: tuple[Callable[[], object], ...] = (
    check_masked_rank_is_left_out,
    check_late_rank_is_masked,
    check_masked_rank_is_taken_back,
    check_late_rank_is_named,
    check_wrong_experts_are_told,
    check_disagreement_is_told,
    check_refusals,
)


if __name__ == "__main__":
    run_as_script(*[timed(check) for check in CHECKS if check.__name__ in sys.argv[1:] or len(sys.argv) == 1])
