"""Normal-mode calls of V1 that each rank compares with loops over the inputs of all ranks, to the bit."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import pytest
import torch
import torch.distributed as dist

from deep_ep_core.domains import detect_topology
from deep_ep_core.errors import ConfigError
from deep_ep_legacy import Buffer, Config, EventHandle, EventOverlap, InternodeHandle, IntranodeHandle

BF16, FP8 = torch.bfloat16, torch.float8_e4m3fn
HIDDEN = 64


def num_nodes() -> int:
    return detect_topology(None).num_scaleout_ranks


@dataclass(kw_only=True)
class World:
    """The inputs of all ranks, which every rank makes for itself."""

    num_tokens: Sequence[int]
    num_topk: int = 3
    num_local_experts: int = 2
    index_dtype: torch.dtype = torch.int64
    seed: int = 0
    rank: int = field(init=False)
    num_ranks: int = field(init=False)
    num_experts: int = field(init=False)
    xs: list[torch.Tensor] = field(init=False)
    scales: list[torch.Tensor] = field(init=False)
    topk: list[torch.Tensor] = field(init=False)
    weights: list[torch.Tensor] = field(init=False)

    def __post_init__(self) -> None:
        self.rank, self.num_ranks = dist.get_rank(), dist.get_world_size()
        self.num_experts = self.num_local_experts * self.num_ranks
        generator = torch.Generator().manual_seed(self.seed)
        self.xs = [torch.randn(num, HIDDEN, generator=generator).to(BF16) for num in self.num_tokens]
        self.scales = [torch.randn(num, 5, generator=generator) for num in self.num_tokens]
        self.weights = [torch.rand(num, self.num_topk, generator=generator) for num in self.num_tokens]
        self.topk = []
        for num in self.num_tokens:
            order = torch.rand(num, self.num_experts, generator=generator).argsort(1)[:, : self.num_topk]
            is_dropped = torch.rand(num, order.size(1), generator=generator) < 0.3
            chosen = torch.where(is_dropped, -1, order).to(self.index_dtype)
            self.topk.append(torch.nn.functional.pad(chosen, (0, self.num_topk - order.size(1)), value=-1))

    def goes_to(self, src: int, token: int, dst: int) -> bool:
        return any(expert // self.num_local_experts == dst for expert in self.topk[src][token].tolist() if expert >= 0)

    def received(self, dst: int) -> list[tuple[int, int]]:
        """(source rank, token) of each row that a rank receives, in order."""
        return [
            (src, token)
            for src, num in enumerate(self.num_tokens)
            for token in range(num)
            if self.goes_to(src, token, dst)
        ]

    def layout(self, buffer: Buffer, **streams: object) -> dict[str, torch.Tensor | None]:
        names = ("num_tokens_per_rank", "num_tokens_per_rdma_rank", "num_tokens_per_expert", "is_token_in_rank")
        return dict(
            zip(names, buffer.get_dispatch_layout(self.topk[self.rank], self.num_experts, **streams)[:4], strict=True)
        )

    def routed(self) -> dict[str, torch.Tensor]:
        return {"topk_idx": self.topk[self.rank], "topk_weights": self.weights[self.rank]}

    def expected_rows(self, of: Sequence[torch.Tensor], width: int) -> torch.Tensor:
        rows = [of[src][token] for src, token in self.received(self.rank)]
        return torch.stack(rows) if rows else of[0].new_empty(0, width)

    def expected_topk(self) -> tuple[torch.Tensor, torch.Tensor]:
        idx = self.expected_rows(self.topk, self.num_topk).clone()
        weights = self.expected_rows(self.weights, self.num_topk).clone()
        first = self.rank * self.num_local_experts
        for row in range(len(idx)):
            for k in range(self.num_topk):
                if first <= idx[row, k] < first + self.num_local_experts:
                    idx[row, k] -= first
                else:
                    idx[row, k], weights[row, k] = -1, 0
        return idx, weights

    def expected_counts(self, alignment: int) -> list[int]:
        counts = [0] * self.num_local_experts
        for src, token in self.received(self.rank):
            for expert in self.topk[src][token].tolist():
                if expert // self.num_local_experts == self.rank:
                    counts[expert % self.num_local_experts] += 1
        return [-(-count // alignment) * alignment for count in counts]

    def expected_combined(self, outputs: Sequence[torch.Tensor], biases: Sequence[torch.Tensor] = ()) -> torch.Tensor:
        """Sum of what each rank made of a token: float32, biases first, then by rank, rounded once."""
        total = torch.zeros(self.num_tokens[self.rank], outputs[0].size(1))
        for bias in biases:
            total += bias.float()
        for dst in range(self.num_ranks):
            for row, (src, token) in enumerate(self.received(dst)):
                if src == self.rank:
                    total[token] += outputs[dst][row].float()
        return total

    def outputs(self) -> list[torch.Tensor]:
        """What the experts of each rank make of their rows; unlike what came in."""
        generator = torch.Generator().manual_seed(self.seed + 1)
        return [
            torch.randn(len(self.received(rank)), HIDDEN, generator=generator).to(BF16)
            for rank in range(self.num_ranks)
        ]


def worlds() -> list[World]:
    num_ranks = dist.get_world_size()
    return [
        World(num_tokens=[33] * num_ranks),
        World(num_tokens=[7 * rank for rank in range(num_ranks)], index_dtype=torch.int32, seed=1),
        World(num_tokens=[0] * num_ranks, seed=2),
        World(num_tokens=[1] * num_ranks, num_topk=1, num_local_experts=1, seed=3),
        World(num_tokens=[64] + [0] * (num_ranks - 1), num_topk=8, num_local_experts=4, seed=4),
    ]


def same(actual: torch.Tensor | None, expected: torch.Tensor) -> None:
    assert actual is not None
    assert (actual.dtype, actual.shape) == (expected.dtype, expected.shape), (actual.dtype, actual.shape)
    assert actual.is_contiguous()
    assert torch.equal(actual, expected)


def check_layout() -> None:
    buffer, per_node = Buffer(dist.group.WORLD), dist.get_world_size() // num_nodes()
    for world in worlds():
        topk = world.topk[world.rank].clone()
        if len(topk):
            topk[0, 0] = world.num_experts  # out of range, so it selects nothing
            world.topk[world.rank] = torch.where(topk == world.num_experts, -1, topk)
        per_rank, on_nodes, per_expert, is_in_rank, event = buffer.get_dispatch_layout(topk, world.num_experts)
        tokens, ranks = range(len(topk)), range(world.num_ranks)
        goes = [[world.goes_to(world.rank, token, dst) for dst in ranks] for token in tokens]
        same(is_in_rank, torch.tensor(goes, dtype=torch.bool).view(len(topk), world.num_ranks))
        same(per_rank, torch.tensor([sum(row[dst] for row in goes) for dst in ranks], dtype=torch.int32))
        flat = world.topk[world.rank].flatten().tolist()
        same(per_expert, torch.tensor([flat.count(expert) for expert in range(world.num_experts)], dtype=torch.int32))
        if num_nodes() == 1:
            assert on_nodes is None
        else:
            by_node = [[any(row[i : i + per_node]) for i in range(0, world.num_ranks, per_node)] for row in goes]
            counts = [sum(row[node] for row in by_node) for node in range(num_nodes())]
            same(on_nodes, torch.tensor(counts, dtype=torch.int32))
        assert event.event is None


def check_dispatch(kind: str) -> None:
    """Rows, indices, weights and counts of a first dispatch, with rows of the kind."""
    buffer = Buffer(dist.group.WORLD, 1 << 20)
    for world in worlds():
        xs, scales = world.xs, None
        if kind != "bf16":
            xs = [x.to(FP8) for x in xs]
            scales = [s.view(torch.int32) if kind == "fp8 packed" else s for s in world.scales]
        x = xs[world.rank]
        given = x
        if scales is not None:
            # Column by column in memory, as quantisation kernels write them.
            given = (x, scales[world.rank].t().contiguous().t())
        recv, idx, weights, counts, handle, event = buffer.dispatch(
            given, **world.layout(buffer), **world.routed(), expert_alignment=4, config=Config(8)
        )
        rows = recv
        if scales is not None:
            rows, recv_scales = recv
            same(recv_scales, world.expected_rows(scales, 5))
        same(rows.view(torch.uint8), world.expected_rows([x.view(torch.uint8) for x in xs], x.element_size() * HIDDEN))
        assert rows.dtype == x.dtype
        for actual, expected in zip((idx, weights), world.expected_topk(), strict=True):
            same(actual, expected)
        assert counts == world.expected_counts(4)
        assert event.event is None
        again = buffer.dispatch(given, handle=handle)
        assert again[1:5] == (None, None, None, None)
        cached = again[0] if scales is None else again[0][0]
        same(cached.view(torch.uint8), rows.view(torch.uint8))
        if scales is not None:
            same(again[0][1], recv_scales)


def check_dispatch_without_topk() -> None:
    buffer = Buffer(dist.group.WORLD)
    for world in worlds():
        recv_x, idx, weights, counts, _, _ = buffer.dispatch(world.xs[world.rank], **world.layout(buffer))
        same(recv_x, world.expected_rows(world.xs, HIDDEN))
        assert idx is None
        assert weights is None
        assert counts == world.expected_counts(1), "counted by num_tokens_per_expert"


def check_combine() -> None:
    buffer = Buffer(dist.group.WORLD)
    for world in worlds():
        x = world.xs[world.rank]
        _, _, recv_weights, _, handle, _ = buffer.dispatch(x, **world.layout(buffer), **world.routed())
        before = [item.clone() for item in handle]
        outputs = world.outputs()
        biases = (torch.randn(x.shape).to(BF16), torch.randn(x.shape).to(BF16))
        for bias in (None, biases[0], biases):
            used = () if bias is None else (bias,) if isinstance(bias, torch.Tensor) else bias
            combined, weights, event = buffer.combine(outputs[world.rank], handle, bias=bias)
            same(combined, world.expected_combined(outputs, used).to(BF16))
            assert weights is None
            assert event.event is None
        # A plain tuple, as callers save it.
        combined, weights, _ = buffer.combine(outputs[world.rank], tuple(handle), topk_weights=recv_weights)
        same(combined, world.expected_combined(outputs).to(BF16))
        is_sent = world.topk[world.rank] >= 0
        same(weights, torch.where(is_sent, world.weights[world.rank], 0))
        assert all(torch.equal(old, new) for old, new in zip(before, handle, strict=True)), "a handle is not changed"


def check_worst_tokens() -> None:
    buffer = Buffer(dist.group.WORLD)
    for world in worlds():
        bound = sum(world.num_tokens) + 3
        x = world.xs[world.rank]
        recv_x, idx, weights, counts, handle, _ = buffer.dispatch(
            x, **world.layout(buffer), **world.routed(), num_worst_tokens=bound
        )
        num = len(world.received(world.rank))
        assert recv_x.shape == (bound, HIDDEN)
        same(recv_x[:num], world.expected_rows(world.xs, HIDDEN))
        expected_idx, expected_weights = world.expected_topk()
        same(idx[:num], expected_idx)
        same(weights[:num], expected_weights)
        assert (idx[num:] == -1).all()
        assert counts == []
        same(buffer.dispatch(x, handle=handle)[0][:num], world.expected_rows(world.xs, HIDDEN))
        outputs = world.outputs()
        padded = torch.cat([outputs[world.rank], torch.full((bound - num, HIDDEN), torch.nan, dtype=BF16)])
        same(buffer.combine(padded, handle)[0], world.expected_combined(outputs).to(BF16))


def check_refusals_with_several_nodes() -> None:
    buffer, world = Buffer(dist.group.WORLD), worlds()[0]
    arguments = {**world.layout(buffer), **world.routed()}
    with pytest.raises(ConfigError, match="num_worst_tokens must be 0 with several nodes"):
        buffer.dispatch(world.xs[world.rank], **arguments, num_worst_tokens=999)
    with pytest.raises(ConfigError, match=r"num_tokens_per_rdma_rank must be \[2\] int32"):
        buffer.dispatch(world.xs[world.rank], **{**arguments, "num_tokens_per_rdma_rank": None})


def check_gradients() -> None:
    """The calls of a backward pass: combine of dispatch's gradient with weights, cached dispatch of combine's."""
    buffer = Buffer(dist.group.WORLD)
    world = worlds()[0]
    recv_x, _, recv_weights, _, handle, _ = buffer.dispatch(
        world.xs[world.rank], **world.layout(buffer), **world.routed()
    )
    grad_x, grad_weights, _ = buffer.combine(recv_x, handle, topk_weights=recv_weights)
    num_copies = world.layout(buffer)["is_token_in_rank"].sum(1, keepdim=True)
    # Sums of equal bfloat16 values are exact in float32.
    same(grad_x, (world.xs[world.rank].float() * num_copies).to(BF16))
    same(grad_weights, torch.where(world.topk[world.rank] >= 0, world.weights[world.rank], 0))
    grads = [x * 2 for x in world.xs]
    same(buffer.dispatch(grads[world.rank], handle=handle)[0], world.expected_rows(grads, HIDDEN))


def check_events() -> None:
    """Asynchronous calls return events, and take those of others; an empty one counts as none."""
    buffer, world = Buffer(dist.group.WORLD), worlds()[0]
    x = world.xs[world.rank]
    streams = {"async_finish": True, "allocate_on_comm_stream": True}
    *layout, event = buffer.get_dispatch_layout(
        world.topk[world.rank], world.num_experts, previous_event=Buffer.capture(), **streams
    )
    assert isinstance(event, EventOverlap)
    assert event.event is not None
    names = ("num_tokens_per_rank", "num_tokens_per_rdma_rank", "num_tokens_per_expert", "is_token_in_rank")
    recv_x, _, _, _, handle, event = buffer.dispatch(
        x, **dict(zip(names, layout, strict=True)), **world.routed(), previous_event=event, **streams
    )
    with event:
        pass
    combined, _, event = buffer.combine(recv_x, handle, previous_event=EventOverlap(EventHandle()), **streams)
    event.current_stream_wait()
    synchronous, _, nothing = buffer.combine(recv_x, handle, previous_event=EventOverlap(None))
    assert nothing.event is None
    same(combined, synchronous)


def check_handle() -> None:
    """What handles tell is what V1's kernels make of the same routing."""
    buffer, nodes, channels = Buffer(dist.group.WORLD), num_nodes(), 4
    for world in worlds():
        x = world.xs[world.rank]
        handle = buffer.dispatch(x, **world.layout(buffer), **world.routed(), config=Config(2 * channels))[4]
        ranks, me = range(world.num_ranks), world.rank
        sent = torch.tensor([[sum(src == i for src, _ in world.received(j)) for j in ranks] for i in ranks])
        ends = sent.cumsum(0).to(torch.int32)
        received = world.received(me)
        goes = [[world.goes_to(me, token, dst) for dst in ranks] for token in range(len(x))]
        starts = [
            [sum(src == i and channel_of(world, i, t, channels) < c for src, t in received) for c in range(channels)]
            for i in ranks
        ]
        starts = torch.tensor(starts, dtype=torch.int32)
        channel_ends = ends_by_channel(world, goes, channels, world.num_ranks)
        if nodes == 1:
            assert isinstance(handle, IntranodeHandle)
            assert len(handle) == 6
            same(handle[0], ends)
            same(handle[1], channel_ends)
            same(handle[2], starts)
            same(handle[3], torch.tensor([token for _, token in received], dtype=torch.int32))
            same(handle[5], positions(world, goes, channels, world.num_ranks))
            continue
        assert isinstance(handle, InternodeHandle)
        assert len(handle) == 10
        per_node = world.num_ranks // nodes
        first = me // per_node * per_node
        on_nodes = [[any(row[n * per_node : (n + 1) * per_node]) for n in range(nodes)] for row in goes]
        same(handle[1], ends_by_channel(world, on_nodes, channels, nodes))
        same(handle[2], channel_ends)
        forwarded = [
            sum(
                any(world.goes_to(src, token, dst) for dst in range(first, first + per_node))
                for token in range(world.num_tokens[src])
            )
            for src in range(me % per_node, world.num_ranks, per_node)
        ]
        same(handle[4], torch.tensor(forwarded).cumsum(0).to(torch.int32))
        same(handle[5], starts + (ends - sent)[:, me : me + 1].to(torch.int32))
        same(handle[-4], ends[:, me].contiguous())
        masks = [
            (src // per_node, sum(world.goes_to(src, token, first + i) << i for i in range(per_node)))
            for src, token in received
        ]
        meta = torch.tensor(masks, dtype=torch.int32).view(-1, 2)
        assert handle[7].dtype == torch.uint8
        assert handle[7].shape == (len(received), 8)
        assert torch.equal(handle[7].view(torch.int32), meta)
        same(handle[8], positions(world, on_nodes, channels, nodes))
        assert handle[9].shape == (sum(forwarded), per_node)


def channel_of(world: World, src: int, token: int, channels: int) -> int:
    return token // -(-world.num_tokens[src] // channels)


def ends_by_channel(world: World, goes: list[list[bool]], channels: int, num_dst: int) -> torch.Tensor:
    ends = [
        [sum(row[dst] for t, row in enumerate(goes) if channel_of(world, world.rank, t, channels) <= c)]
        for dst in range(num_dst)
        for c in range(channels)
    ]
    return torch.tensor(ends, dtype=torch.int32).view(num_dst, channels)


def positions(world: World, goes: list[list[bool]], channels: int, num_dst: int) -> torch.Tensor:
    result = torch.full((len(goes), num_dst), -1, dtype=torch.int32)
    num_seen: dict[tuple[int, int], int] = {}
    for token, row in enumerate(goes):
        for dst in range(num_dst):
            if row[dst]:
                queue = channel_of(world, world.rank, token, channels), dst
                result[token, dst] = num_seen.get(queue, 0)
                num_seen[queue] = num_seen.get(queue, 0) + 1
    return result
