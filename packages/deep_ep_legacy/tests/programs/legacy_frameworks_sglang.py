"""The calls that SGLang makes, with its arguments: normal and low latency on one buffer, V2."""

from __future__ import annotations

import os

import torch
import torch.distributed as dist
from legacy_frameworks_problem import (
    HIDDEN,
    MAX_TOKENS,
    NUM_EXPERTS,
    NUM_TOPK,
    Problem,
    dequantized,
    num_rows_of_local_experts,
)

from deep_ep import Buffer, Config, ElasticBuffer

TUNED = {
    "num_sms": 24,
    "num_max_nvl_chunked_send_tokens": 8,
    "num_max_nvl_chunked_recv_tokens": 256,
    "num_max_rdma_chunked_send_tokens": 16,
    "num_max_rdma_chunked_recv_tokens": 128,
}


def make_buffer() -> Buffer:
    """One buffer for both modes, as large as either needs."""
    num_ranks = dist.get_world_size()
    hidden_bytes = HIDDEN * 2
    num_nvl_bytes = num_rdma_bytes = 0
    tuned = Config(**TUNED)
    for config in (tuned, Buffer.get_dispatch_config(num_ranks), Buffer.get_combine_config(num_ranks)):
        num_nvl_bytes = max(config.get_nvl_buffer_size_hint(hidden_bytes, num_ranks), num_nvl_bytes)
        num_rdma_bytes = max(config.get_rdma_buffer_size_hint(hidden_bytes, num_ranks), num_rdma_bytes)
    num_rdma_bytes = max(
        Buffer.get_low_latency_rdma_size_hint(MAX_TOKENS, HIDDEN, num_ranks, NUM_EXPERTS), num_rdma_bytes
    )
    buffer = Buffer(
        dist.group.WORLD,
        num_nvl_bytes,
        num_rdma_bytes,
        low_latency_mode=True,
        num_qps_per_rank=max(NUM_EXPERTS // num_ranks, Buffer.num_sms // 2),
        allow_mnnvl=True,
    )
    assert buffer.low_latency_mode
    assert buffer.group_size == num_ranks
    return buffer


def call_normal_and_low_latency() -> None:
    """Prefill, then decoding, on one buffer, which is cleaned in between; twice."""
    buffer = make_buffer()
    for seed in range(2):
        _call_normal(buffer, Problem(seed))
        buffer.clean_low_latency_buffer(MAX_TOKENS, HIDDEN, NUM_EXPERTS)
        _call_low_latency(buffer, Problem(seed))


def _call_normal(buffer: Buffer, p: Problem) -> None:
    for is_fp8 in (False, True):
        for async_finish in (False, True):
            # dispatch_a, dispatch_b
            previous_event = Buffer.capture() if async_finish else None
            streams = {"async_finish": async_finish, "allocate_on_comm_stream": previous_event is not None}
            per_rank, per_rdma_rank, per_expert, is_token_in_rank, previous_event = buffer.get_dispatch_layout(
                p.topk_idx, NUM_EXPERTS, previous_event=previous_event, **streams
            )
            alignment = 128 if is_fp8 else 1
            recv, recv_idx, recv_weights, per_local_expert, handle, event = buffer.dispatch(
                p.quantized() if is_fp8 else p.x,
                topk_idx=p.topk_idx,
                topk_weights=p.topk_weights,
                num_tokens_per_rank=per_rank,
                num_tokens_per_rdma_rank=per_rdma_rank,
                is_token_in_rank=is_token_in_rank,
                num_tokens_per_expert=per_expert,
                previous_event=previous_event if async_finish else None,
                expert_alignment=alignment,
                config=Config(**TUNED),
                **streams,
            )
            if async_finish:
                event.current_stream_wait()
            assert all(count % alignment == 0 for count in per_local_expert)
            rows = p.run_by_token(dequantized(recv) if is_fp8 else recv, recv_idx, recv_weights)
            # combine_a, combine_b
            previous_event = Buffer.capture() if async_finish else None
            combined, _, event = buffer.combine(
                rows,
                handle,
                async_finish=async_finish,
                previous_event=previous_event,
                allocate_on_comm_stream=previous_event is not None,
                config=Config(**TUNED),
            )
            if async_finish:
                event.current_stream_wait()
            p.check(combined)


def _call_low_latency(buffer: Buffer, p: Problem) -> None:
    experts_before = None
    for use_fp8, scales in ((False, {}), (True, {}), (True, {"round_scale": True, "use_ue8m0": True})):
        for return_recv_hook in (False, True):
            recv, masked_m, handle, event, hook = buffer.low_latency_dispatch(
                p.x,
                p.topk_idx,
                MAX_TOKENS,
                NUM_EXPERTS,
                use_fp8=use_fp8,
                async_finish=not return_recv_hook,
                return_recv_hook=return_recv_hook,
                **scales,
            )
            if return_recv_hook:
                hook()
            else:
                event.current_stream_wait()
            counts = masked_m.tolist()
            assert experts_before in (None, counts)
            experts_before = counts
            combined, event, hook = buffer.low_latency_combine(
                x=p.run_by_expert(dequantized(recv) if use_fp8 else recv, counts),
                topk_idx=p.topk_idx,
                topk_weights=p.topk_weights,
                handle=handle,
                async_finish=not return_recv_hook,
                return_recv_hook=return_recv_hook,
            )
            if return_recv_hook:
                hook()
            else:
                event.current_stream_wait()
            p.check(combined)


def call_v2() -> None:
    """Prefill by token with aligned counts, and masked decoding by expert."""
    os.environ.setdefault("EP_REUSE_NCCL_COMM", "0")
    p = Problem()
    buffer = ElasticBuffer(
        dist.group.WORLD,
        num_max_tokens_per_rank=MAX_TOKENS,
        hidden=HIDDEN,
        num_topk=NUM_TOPK,
        use_fp8_dispatch=False,
        allow_hybrid_mode=True,
        sl_idx=0,
        prefer_overlap_with_compute=False,
    )
    assert buffer.num_bytes > 0
    num_sms = buffer.get_theoretical_num_sms(NUM_EXPERTS, NUM_TOPK)
    num_qps = buffer.get_theoretical_num_qps(num_sms)
    for is_decode in (False, True):
        recv, recv_idx, recv_weights, handle, _ = buffer.dispatch(
            p.x if is_decode else p.quantized(),
            topk_idx=p.topk_idx,
            topk_weights=p.topk_weights,
            num_experts=NUM_EXPERTS,
            num_max_tokens_per_rank=MAX_TOKENS,
            expert_alignment=1 if is_decode else 128,
            num_sms=num_sms,
            num_qps=num_qps,
            use_tma_aligned_col_major_sf=not is_decode,
            do_cpu_sync=not is_decode,
            do_expand=is_decode,
        )
        num_recv = handle.psum_num_recv_tokens_per_scaleup_rank[-1].item()
        if is_decode:
            ends = handle.psum_num_recv_tokens_per_expert.tolist()
            counts = num_rows_of_local_experts(p)
            starts = [end - count for end, count in zip(ends, counts, strict=True)]
            rows = p.run_by_sorted_rows(recv, ends, starts)
            for start, end in zip(starts, ends, strict=True):
                rows[start:end] = (rows[start:end].float() * recv_weights[start:end, None]).to(torch.bfloat16)
        else:
            assert all(count % 128 == 0 for count in handle.num_recv_tokens_per_expert_list)
            rows = dequantized(recv)
            assert len(rows) == num_recv
            rows = p.run_by_token(rows, recv_idx, recv_weights)
        combined, weights, _ = buffer.combine(
            rows, handle=handle, topk_weights=recv_weights, num_sms=num_sms, num_qps=num_qps
        )
        assert torch.equal(weights, p.masked_weights)
        p.check(combined)
