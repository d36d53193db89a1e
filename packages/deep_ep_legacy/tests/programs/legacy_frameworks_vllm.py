"""The calls that vLLM makes, with its arguments: high throughput, low latency, V2."""

from __future__ import annotations

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

import deep_ep

BUFFER_BYTES = 1 << 20


def call_high_throughput() -> None:
    """Prefill: FP8 and bfloat16, overlapped and with its two micro-batches, which pass events."""
    p = Problem()
    sms_before = deep_ep.Buffer.num_sms
    buffer = deep_ep.Buffer(
        group=dist.group.WORLD,
        num_nvl_bytes=BUFFER_BYTES,
        num_rdma_bytes=0,
        low_latency_mode=False,
        num_qps_per_rank=1,
        explicitly_destroy=True,
    )
    deep_ep.Buffer.set_num_sms(16)
    dispatch_config, combine_config = (
        deep_ep.Buffer.get_dispatch_config(p.num_ranks),
        deep_ep.Buffer.get_combine_config(p.num_ranks),
    )
    for is_fp8 in (False, True):
        for has_micro_batches in (False, True):
            previous_event = buffer.capture() if has_micro_batches else None
            per_rank, per_rdma_rank, per_expert, is_token_in_rank, event = buffer.get_dispatch_layout(
                topk_idx=p.topk_idx,
                num_experts=NUM_EXPERTS,
                previous_event=previous_event,
                async_finish=False,
                allocate_on_comm_stream=False,
            )
            recv, recv_idx, recv_weights, per_local_expert, handle, event = buffer.dispatch(
                x=p.quantized() if is_fp8 else p.x,
                handle=None,
                num_tokens_per_rank=per_rank,
                num_tokens_per_rdma_rank=per_rdma_rank,
                is_token_in_rank=is_token_in_rank,
                num_tokens_per_expert=per_expert,
                topk_idx=p.topk_idx,
                topk_weights=p.topk_weights,
                expert_alignment=1,
                config=dispatch_config,
                previous_event=previous_event,
                async_finish=not has_micro_batches,
                allocate_on_comm_stream=False,
            )
            if event.event is not None:
                event.current_stream_wait()
            assert per_local_expert == num_rows_of_local_experts(p)
            rows = dequantized(recv) if is_fp8 else recv
            combined, _, event = buffer.combine(
                x=p.run_by_token(rows, recv_idx, recv_weights),
                handle=handle,
                topk_weights=None,
                config=combine_config,
                previous_event=previous_event,
                async_finish=not has_micro_batches,
                allocate_on_comm_stream=False,
            )
            assert (event.event is None) == has_micro_batches
            if event.event is not None:
                event.current_stream_wait()
            p.check(combined)
    buffer.destroy()
    deep_ep.Buffer.set_num_sms(sms_before)


def call_low_latency() -> None:
    """Decoding with hooks; with and without a mask of ranks, which it reads and cleans."""
    p = Problem()
    num_rdma_bytes = deep_ep.Buffer.get_low_latency_rdma_size_hint(
        num_max_dispatch_tokens_per_rank=MAX_TOKENS, hidden=HIDDEN, num_ranks=p.num_ranks, num_experts=NUM_EXPERTS
    )
    for enable_shrink in (False, True):
        buffer = deep_ep.Buffer(
            group=dist.group.WORLD,
            num_nvl_bytes=BUFFER_BYTES,
            num_rdma_bytes=num_rdma_bytes,
            low_latency_mode=True,
            num_qps_per_rank=p.num_local_experts,
            allow_nvlink_for_low_latency_mode=True,
            allow_mnnvl=False,
            explicitly_destroy=True,
            enable_shrink=enable_shrink,
        )
        memory = buffer.get_local_buffer_tensor(dtype=torch.int8, use_rdma_buffer=True)
        assert memory.shape == (num_rdma_bytes,)
        for use_fp8, use_ue8m0 in ((False, False), (True, False), (True, True)):
            expert_x, expert_num_tokens, handle, _, hook = buffer.low_latency_dispatch(
                p.x,
                p.topk_idx,
                MAX_TOKENS,
                NUM_EXPERTS,
                use_fp8=use_fp8,
                round_scale=use_ue8m0,
                use_ue8m0=use_ue8m0,
                async_finish=False,
                return_recv_hook=True,
            )
            hook()
            assert expert_num_tokens.dtype == torch.int32
            counts = expert_num_tokens.tolist()
            assert counts == num_rows_of_local_experts(p)
            rows = dequantized(expert_x) if use_fp8 else expert_x
            assert rows.shape == (p.num_local_experts, MAX_TOKENS * p.num_ranks, HIDDEN)
            for with_hook in (False, True):
                output = torch.full_like(p.x, torch.nan)
                _, _, hook = buffer.low_latency_combine(
                    p.run_by_expert(rows, counts),
                    p.topk_idx,
                    p.topk_weights,
                    handle,
                    async_finish=False,
                    zero_copy=False,
                    return_recv_hook=with_hook,
                    out=output,
                )
                if with_hook:
                    hook()
                p.check(output)
        if enable_shrink:
            mask = torch.ones(p.num_ranks, dtype=torch.int32, device=p.x.device)
            buffer.low_latency_query_mask_buffer(mask)
            assert not mask.any()
            buffer.low_latency_clean_mask_buffer()
        buffer.destroy()


def call_v2() -> None:
    """Exact sizes by expert, and worst-case sizes for a CUDA graph."""
    p = Problem()
    buffer = deep_ep.ElasticBuffer(
        group=dist.group.WORLD,
        num_max_tokens_per_rank=MAX_TOKENS,
        hidden=HIDDEN,
        num_topk=NUM_TOPK,
        use_fp8_dispatch=True,
        allow_hybrid_mode=False,
        prefer_overlap_with_compute=True,
        allow_multiple_reduction=True,
        num_cpu_timeout_secs=1800,
        num_gpu_timeout_secs=1800,
        explicitly_destroy=True,
    )
    assert buffer.get_theoretical_num_sms(num_experts=NUM_EXPERTS, num_topk=NUM_TOPK) >= 4
    for cudagraph in (False, True):
        recv, recv_idx, recv_weights, handle, event = buffer.dispatch(
            x=p.quantized(),
            topk_idx=p.topk_idx,
            topk_weights=p.topk_weights,
            num_experts=NUM_EXPERTS,
            num_max_tokens_per_rank=MAX_TOKENS if cudagraph else None,
            do_expand=not cudagraph,
            do_cpu_sync=not cudagraph,
            async_with_compute_stream=False,
        )
        assert isinstance(handle, deep_ep.EPHandle)
        assert event.event is None
        rows = dequantized(recv)
        if cudagraph:
            num_recv = int(handle.psum_num_recv_tokens_per_scaleup_rank[-1])
            rows[:num_recv] = p.run_by_token(rows[:num_recv], recv_idx[:num_recv], recv_weights[:num_recv])
        else:
            counts = handle.num_recv_tokens_per_expert_list
            assert counts == num_rows_of_local_experts(p)
            ends = torch.tensor(counts).cumsum(0).tolist()
            rows = p.run_by_sorted_rows(rows, ends, [0, *ends[:-1]])
            rows = (rows.float() * recv_weights.unsqueeze(1)).to(torch.bfloat16)
        for run_async in (False, True):
            combined, _, event = buffer.combine(
                x=rows,
                handle=handle,
                topk_weights=None,
                async_with_compute_stream=run_async,
                allocate_on_comm_stream=run_async,
            )
            if event.event is not None:
                event.current_stream_wait()
            p.check(combined)
    buffer.destroy()
