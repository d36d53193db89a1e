"""Dispatch and combine inside CUDA graphs: replayed with other tokens, routing and weights, next to calls outside."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.distributed as dist
from ep_device_setting import is_in_window, on_device
from ep_device_shapes import make_large_buffer
from ep_rows import Problem, arrival_of, check_arrival, check_combined, check_rows, make_problem

from deep_ep_ep import ElasticBuffer

Comparison = Callable[[Problem], None]


class Step:
    """Both layouts there and back, one of them also with its handle, on tensors that stay where they are."""

    def __init__(self, buffer: ElasticBuffer, problem: Problem, *, num_sms: int) -> None:
        self.buffer = buffer
        self.inputs = problem.inputs(dist.get_rank())
        self.options = {"expert_alignment": problem.expert_alignment, "num_sms": num_sms}
        self.num_experts = problem.num_experts
        # What an expert would do between dispatch and combine: kernels of the caller's stream.
        self.factor = torch.ones((), dtype=problem.dtype, device="cuda")

    def set_inputs(self, problem: Problem) -> None:
        for place, value in zip(self.inputs, problem.inputs(dist.get_rank()), strict=True):
            place.copy_(value)  # type: ignore[attr-defined]

    def run(self, *, is_async: bool = False) -> Comparison:
        """Make all calls; returns what compares the results, as they are when it is called, with a problem."""
        x, topk_idx, weights = self.inputs
        buffer = self.buffer
        common = {"num_experts": self.num_experts, "do_cpu_sync": False, **self.options}
        sent = buffer.dispatch(x, topk_idx=topk_idx, topk_weights=weights, **common)  # type: ignore[arg-type]
        expanded = buffer.dispatch(
            x,  # type: ignore[arg-type]
            topk_idx=topk_idx,
            topk_weights=weights,
            do_expand=True,
            do_zero_padding=True,
            async_with_compute_stream=is_async,
            **common,
        )
        again = buffer.dispatch(x, handle=sent[3])  # type: ignore[arg-type]
        if is_async:
            expanded[4].current_stream_wait()
        outputs = buffer.empty_like_recv(sent[3], sent[0].size(1))  # type: ignore[union-attr]
        torch.mul(sent[0], self.factor, out=outputs)
        back = buffer.combine(outputs, sent[3], topk_weights=sent[2])
        expanded_back = buffer.combine(expanded[0] * self.factor, expanded[3], topk_weights=expanded[2])

        def compare(problem: Problem) -> None:
            rank = dist.get_rank()
            check_arrival(problem, rank, sent, do_cpu_sync=False)
            check_arrival(problem, rank, expanded, do_cpu_sync=False)
            check_rows(problem, arrival_of(problem, rank), again[0], None, do_expand=False, do_cpu_sync=False)
            check_combined(problem, rank, back[0], back[1], do_expand=False)
            check_combined(problem, rank, expanded_back[0], expanded_back[1], do_expand=True)

        self.last_recv_x = sent[0]
        return compare


def _problem(seed: int) -> Problem:
    num_ranks = dist.get_world_size()
    # The number of tokens is part of a graph; whom they go to is not.
    return make_problem(
        seed,
        [(33, 0, 31, 1, 20, 32, 7, 40)[rank] for rank in range(num_ranks)],
        num_experts=4 * num_ranks,
        num_topk=4,
        num_max_tokens=40,
        hidden=128,
        expert_alignment=4,
        masked_share=(0.0, 0.2, 0.9, 1.0)[seed % 4],
    )


def check_graphs(recv_memory: str, num_replays: int = 20) -> int:
    """A graph gives the right rows at each replay, whatever it is given, and calls outside do not disturb it."""
    with on_device(recv_memory, num_bytes=64 << 20):
        buffer = make_large_buffer(40, 128)
        step = Step(buffer, _problem(0), num_sms=4)
        # The first call loads kernels, which a capture must not.
        step.run()(_problem(0))
        torch.cuda.synchronize()
        graphs = []
        for is_async in (False, True):
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                compare = step.run(is_async=is_async)
            assert is_in_window(buffer, step.last_recv_x) == (recv_memory != "torch")
            graphs.append((graph, compare))
        outside = Step(buffer, _problem(1), num_sms=3)
        for seed in range(1, num_replays + 1):
            graph, compare = graphs[seed % 2]
            problem = _problem(seed)
            step.set_inputs(problem)
            graph.replay()
            compare(problem)
            if seed % 5 == 0:
                outside.set_inputs(problem)
                outside.run()(problem)
        # Behind each other, without a look in between: the last one counts.
        for _ in range(num_replays):
            graphs[0][0].replay()
        graphs[0][1](problem)
        del graphs, graph, compare
        outside.run()(problem)
        buffer.close()
    return num_replays


def check_graph_outlives_its_buffer(recv_memory: str) -> None:
    """A buffer that was closed on all ranks leaves the memory of a graph's results alone."""
    with on_device(recv_memory, num_bytes=16 << 20):
        buffer = make_large_buffer(40, 128)
        step = Step(buffer, _problem(0), num_sms=2)
        step.run()(_problem(0))
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            compare = step.run()
        graph.replay()
        torch.cuda.synchronize()
        buffer.close()
        del buffer
        later = make_large_buffer(40, 128)
        Step(later, _problem(3), num_sms=2).run()(_problem(3))
        compare(_problem(0))
        later.close()
