"""The checks of `ep_modes` on CUDA tensors; each rank takes the device of its number, several may share one."""

from __future__ import annotations

import os
import sys
from dataclasses import replace

import torch
import torch.distributed as dist
from ep_cases import Case, Expected, assert_bits_equal, gather, make_buffer, with_ranks
from ep_modes import UNEVEN, all_modes, case_of, check_round_trip

from deep_ep_core.local import run_as_script


def make_group(backend: str) -> dist.ProcessGroup:
    torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")) % torch.cuda.device_count())
    return dist.new_group(backend=backend)


def check_modes(backend: str, step: int = 7) -> int:
    """Every 7th mode, in each way of sizing, on a group of that backend."""
    group = make_group(backend)
    modes = all_modes()[::step]
    for do_cpu_sync in (True, False):
        for mode in modes:
            case = replace(with_ranks(case_of(mode, UNEVEN)), device="cuda")
            buffer = make_buffer(case, group=group)
            check_round_trip(buffer, Expected.of(case), mode, do_cpu_sync=do_cpu_sync)
    dist.destroy_process_group(group)
    return len(modes)


def check_streams(backend: str) -> None:
    """Work before a call and after its event is ordered with it, without a synchronisation of the host in between."""
    group = make_group(backend)
    case = replace(with_ranks(Case(num_tokens=UNEVEN, hidden=1024)), device="cuda")
    expected, rank = Expected.of(case), dist.get_rank()
    buffer = make_buffer(case, group=group)
    sent = expected.sent[rank]
    topk_idx = sent.topk_idx.cuda()
    caller_stream = torch.cuda.Stream()
    for _ in range(5):
        with torch.cuda.stream(caller_stream):
            x = torch.zeros_like(sent.x, device="cuda")
            torch.cuda._sleep(20_000_000)
            x.copy_(sent.x.cuda())
            recv_x, _, _, _, event = buffer.dispatch(
                x, topk_idx=topk_idx, num_experts=case.num_experts, async_with_compute_stream=True
            )
            assert torch.cuda.current_stream() == caller_stream
            event.current_stream_wait()
            copy = recv_x.clone()
        caller_stream.synchronize()
        assert_bits_equal(copy, gather(expected.sent, "x", expected.received[rank].source), "recv_x")
    dist.destroy_process_group(group)


if __name__ == "__main__":
    backends = sys.argv[1:] or ["cpu:gloo,cuda:nccl", "gloo", "nccl"]
    run_as_script(*[lambda backend=backend: print(backend, check_modes(backend)) for backend in backends])
