"""Calls that must be refused, ranks that disagree or refuse, and what each of them is told."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.distributed as dist
from legacy_cases import BF16, FP8, HIDDEN, World

from deep_ep_core.errors import ConfigError
from deep_ep_legacy import Buffer, Config, EventHandle

Words = tuple[str, ...]


class Setup:
    """A buffer, and a dispatch to spoil."""

    def __init__(self) -> None:
        self.world = World(num_tokens=[8] * dist.get_world_size())
        self.buffer = Buffer(dist.group.WORLD, 1 << 10, num_cpu_timeout_secs=30)
        self.x = self.world.xs[self.world.rank]
        self.layout = self.world.layout(self.buffer)
        self.routed = self.world.routed()
        self.recv_x, _, self.weights, _, self.handle, _ = self.dispatch()

    def dispatch(self, x: object = None, **changed: object) -> tuple:
        arguments = {**self.layout, **self.routed, **changed}
        return self.buffer.dispatch(self.x if x is None else x, **arguments)

    def cached(self, x: object = None, handle: object = None, **changed: object) -> tuple:
        return self.buffer.dispatch(
            self.x if x is None else x, handle=self.handle if handle is None else handle, **changed
        )

    def combine(self, x: object = None, handle: object = None, **changed: object) -> tuple:
        return self.buffer.combine(
            self.recv_x if x is None else x, self.handle if handle is None else handle, **changed
        )


def destroyed(setup: Setup) -> None:
    buffer = Buffer(dist.group.WORLD, explicitly_destroy=True)
    buffer.destroy()
    buffer.destroy()
    buffer.get_dispatch_layout(setup.routed["topk_idx"], setup.world.num_experts)


REJECTIONS: dict[str, tuple[Callable[[Setup], object], Words]] = {
    "rows of one axis": (lambda s: s.dispatch(s.x[0]), ("x must be [num_tokens, hidden]", "[64] bfloat16")),
    "rows with gaps": (lambda s: s.dispatch(s.x[:, ::2]), ("contiguous", "with strides [64, 2]")),
    "rows that are no tensor": (lambda s: s.dispatch([1]), ("x must be [num_tokens, hidden]", "list")),
    "rows of 8 bytes": (lambda s: s.dispatch(s.x[:, :4].contiguous()), ("a row of x must be a positive multiple", "8")),
    "scales beside wide rows": (
        lambda s: s.dispatch((s.x, torch.ones(8, 2))),
        ("the scales of x must be [8, num_scales] float32 or int32 beside rows of one-byte", "[8, 2] float32 on cpu"),
    ),
    "scales of another number of rows": (
        lambda s: s.dispatch((s.x.to(FP8), torch.ones(7, 2))),
        ("the scales of x must be [8, num_scales]", "[7, 2]"),
    ),
    "scales that are None": (lambda s: s.dispatch((s.x.to(FP8), None)), ("the scales of x must be", "None beside")),
    "no layout": (
        lambda s: s.buffer.dispatch(s.x, **s.routed),
        ("is_token_in_rank must be [8, 2] bool, contiguous, on cpu", "got None"),
    ),
    "counts of another dtype": (
        lambda s: s.dispatch(num_tokens_per_rank=s.layout["num_tokens_per_rank"].long()),
        ("num_tokens_per_rank must be [2] int32", "int64"),
    ),
    "counts of another routing": (
        lambda s: s.dispatch(num_tokens_per_rank=s.layout["num_tokens_per_rank"] + 1),
        ("num_tokens_per_rank must count the tokens of is_token_in_rank", "as get_dispatch_layout returned them"),
    ),
    "counts of experts": (
        lambda s: s.dispatch(num_tokens_per_expert=s.layout["num_tokens_per_expert"][:3]),
        ("num_experts must be a multiple of the 2 ranks", "got 3"),
    ),
    "weights alone": (
        lambda s: s.dispatch(topk_idx=None),
        ("topk_idx and topk_weights must be given together", "pass both, or neither"),
    ),
    "half weights": (
        lambda s: s.dispatch(topk_weights=s.routed["topk_weights"].half()),
        ("topk_weights must be [8, 3] float32", "float16"),
    ),
    "too many experts a token": (
        lambda s: s.dispatch(topk_idx=torch.zeros(8, 33, dtype=torch.int64)),
        ("num_topk must lie in [1, 32]", "33"),
    ),
    "no alignment": (lambda s: s.dispatch(expert_alignment=0), ("expert_alignment must be an integer >= 1", "0")),
    "worst tokens of a float": (lambda s: s.dispatch(num_worst_tokens=8.0), ("num_worst_tokens must be an integer",)),
    "worst tokens without topk": (
        lambda s: s.dispatch(topk_idx=None, topk_weights=None, num_worst_tokens=99),
        ("num_worst_tokens needs topk_idx and topk_weights",),
    ),
    "too few worst tokens": (
        lambda s: s.dispatch(num_worst_tokens=1),
        ("num_worst_tokens must be at least the ", "that rank 0 receives", "nothing was sent"),
    ),
    "a config that is none": (lambda s: s.dispatch(config=20), ("config must be a deep_ep_legacy.Config", "20")),
    "a handle and topk": (
        lambda s: s.cached(**s.routed),
        ("topk_idx and topk_weights must be None with a handle", "leave them out"),
    ),
    "a handle and more rows": (
        lambda s: s.cached(torch.cat([s.x, s.x])),
        ("x must have as many rows as the dispatch that made the handle, 8", "16"),
    ),
    "a handle of five items": (
        lambda s: s.cached(handle=tuple(s.handle)[:5]),
        ("handle must be what dispatch returned to 2 ranks on 1 nodes", "tuple of 5 items"),
    ),
    "a handle of other items": (lambda s: s.cached(handle=(s.x,) * 6), ("handle must be what dispatch returned",)),
    "an event that is none": (lambda s: s.dispatch(previous_event=3), ("previous_event must be an EventOverlap", "3")),
    "memory of the other stream": (
        lambda s: s.dispatch(allocate_on_comm_stream=True, previous_event=EventHandle()),
        ("allocate_on_comm_stream=True needs a previous_event and async_finish=True", "async_finish=False"),
    ),
    "an unknown argument": (
        lambda s: s.buffer.dispatch(s.x, use_nvfp4=True),
        ("dispatch must be called without arguments that it does not have (got use_nvfp4=True)",),
    ),
    "combine of floats": (lambda s: s.combine(s.recv_x.float()), ("x must be [num_recv_tokens, hidden] bfloat16",)),
    "combine of fewer rows": (lambda s: s.combine(s.recv_x[1:]), ("x must be [", ", hidden] bfloat16, contiguous")),
    "weights of other rows": (lambda s: s.combine(topk_weights=s.weights[1:]), ("topk_weights must be [",)),
    "three biases": (lambda s: s.combine(bias=(s.x, s.x, s.x)), ("bias must be a tensor, two tensors or None",)),
    "a bias of floats": (lambda s: s.combine(bias=s.x.float()), ("bias must be [8, 64] bfloat16", "float32")),
    "combine with no handle": (
        lambda s: s.buffer.combine(s.recv_x, None),
        ("handle must be what dispatch", "NoneType"),
    ),
    "experts that cannot be shared out": (
        lambda s: s.buffer.get_dispatch_layout(s.routed["topk_idx"], 3),
        ("num_experts must be a multiple of the 2 ranks", "3"),
    ),
    "indices of floats": (
        lambda s: s.buffer.get_dispatch_layout(s.x, 4),
        ("topk_idx must be [num_tokens, num_topk] int64 or int32", "bfloat16"),
    ),
    "a destroyed buffer": (destroyed, ("the buffer must be open", "make a new Buffer")),
    "destroy without the flag": (
        lambda s: s.buffer.destroy(),
        ("destroy() is for buffers made with explicitly_destroy",),
    ),
    "low latency without the mode": (
        lambda s: s.buffer.clean_low_latency_buffer(1, 128, 2),
        ("low-latency calls need an open buffer made with low_latency_mode=True", "low_latency_mode=False"),
    ),
    "a view too large": (
        lambda s: s.buffer.get_local_buffer_tensor(torch.int32, [1 << 10]),
        ("offset and size must name aligned elements of the 1024 bytes of the buffer",),
    ),
    "a view that is not aligned": (
        lambda s: s.buffer.get_local_buffer_tensor(torch.int32, offset=2),
        ("offset and size must name aligned elements", "offset counts bytes"),
    ),
}


def collect_rejections() -> dict[str, str | None]:
    """What this rank was told for each bad call; None where it was accepted. A good call still works afterwards."""
    setup, told = Setup(), {}
    for name, (call, _) in REJECTIONS.items():
        try:
            call(setup)
            told[name] = None
        except ConfigError as error:
            told[name] = str(error)
    recv_x = setup.dispatch()[0]
    assert torch.equal(recv_x, setup.recv_x)
    return told


def disagree(changed_rank: int, change: str) -> None:
    setup, is_changed = Setup(), dist.get_rank() == changed_rank
    match change:
        case "operation" if is_changed:
            setup.combine()
        case "hidden" if is_changed:
            setup.dispatch(torch.zeros(8, 2 * HIDDEN, dtype=BF16))
        case "dtype of x" if is_changed:
            setup.dispatch(setup.x.half())
        case "number of scales":
            setup.dispatch((setup.x.to(FP8), torch.ones(8, 3 if is_changed else 2)))
        case "use of a handle" if is_changed:
            setup.cached()
        case "dtype of topk_idx" if is_changed:
            setup.dispatch(topk_idx=setup.routed["topk_idx"].int())
        case "number of columns of topk_weights":
            setup.combine(topk_weights=None if is_changed else setup.weights)
        case "num_nvl_bytes":
            Buffer(dist.group.WORLD, 256 if is_changed else 128)
        case "low_latency_mode":
            Buffer(dist.group.WORLD, low_latency_mode=is_changed)
        case _:
            setup.dispatch()


def refuse(refusing_rank: int, timeout_s: float) -> None:
    setup = Setup()
    setup.buffer = Buffer(dist.group.WORLD, num_cpu_timeout_secs=timeout_s)
    setup.dispatch(expert_alignment=0 if dist.get_rank() == refusing_rank else 1)


def mix_handles(changed_rank: int) -> None:
    """One rank passes the handle of another dispatch, which has as many tokens."""
    setup = Setup()
    other = World(num_tokens=[8] * dist.get_world_size(), seed=9)
    handle = setup.buffer.dispatch(setup.x, **other.layout(setup.buffer), **other.routed())[4]
    setup.cached(handle=handle if dist.get_rank() == changed_rank else None)


CONSTRUCTOR_REJECTIONS: dict[str, tuple[Callable[[], object], Words]] = {
    "neither group nor comm": (lambda: Buffer(None), ("Buffer needs a group or a comm (got neither)",)),
    "a comm that is none": (lambda: Buffer(None, comm=3), ("comm must have the methods Get_rank, Get_size", "int")),
    "odd bytes": (lambda: Buffer(None, 100), ("num_nvl_bytes must be a multiple of 128, at least 0 (got 100)",)),
    "negative bytes": (lambda: Buffer(None, 0, -128), ("num_rdma_bytes must be a multiple of 128", "-128")),
    "no QPs": (lambda: Buffer(None, num_qps_per_rank=0), ("num_qps_per_rank must be positive",)),
    "no timeout": (lambda: Buffer(None, num_cpu_timeout_secs=0), ("num_cpu_timeout_secs must be positive",)),
    "another backend": (
        lambda: Buffer(None, backend="mpi"),
        ('backend must be "auto", "collective" or "device"', "mpi"),
    ),
    "another transport": (
        lambda: Buffer(None, transport="ib"),
        ('transport must be "nccl" or "nvshmem" (got \'ib\')',),
    ),
    "NVSHMEM": (
        lambda: Buffer(None, transport="nvshmem"),
        ('transport="nvshmem" is not part of this version of deep-ep-legacy', "NVLink", 'backend="collective"'),
    ),
    "an unknown argument": (
        lambda: Buffer(None, compress=True),
        ("Buffer must be called without arguments that it does not have (got compress=True)",),
    ),
    "an odd number of SMs": (lambda: Buffer.set_num_sms(3), ("new_num_sms must be even", "3")),
    "ranks without a default": (lambda: Buffer.get_dispatch_config(3), ("num_ranks must be one of 2, 4, 8, 16", "3")),
    "negative SMs": (lambda: Config(-2), ("num_sms must be at least 0",)),
    "an empty chunk": (lambda: Config(20, 0), ("the chunk sizes of a Config must be positive",)),
    "a chunk as long as its queue": (
        lambda: Config(20, 256, 256),
        ("num_max_nvl_chunked_send_tokens must be less than num_max_nvl_chunked_recv_tokens", "256 and 256"),
    ),
    "more than half a queue": (
        lambda: Config(20, 6, 256, 7, 13),
        ("num_max_rdma_chunked_send_tokens must be at most half", "7 and 13"),
    ),
    "nodes that V1 does not know": (
        lambda: Config().get_nvl_buffer_size_hint(128, 12),
        ("num_ranks must be 1 to 7 or a multiple of 8", "12"),
    ),
    "odd SMs with nodes": (
        lambda: Config(3).get_rdma_buffer_size_hint(128, 16),
        ("num_sms must be even for more than 8 ranks", "3"),
    ),
    "negative bytes of a token": (
        lambda: Config().get_nvl_buffer_size_hint(-1, 8),
        ("hidden_bytes must be at least 0", "-1"),
    ),
}
