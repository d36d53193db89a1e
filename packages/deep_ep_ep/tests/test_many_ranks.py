"""The planning for a thousand ranks and more, played on one CPU: sizes, offsets and rows of real routing.

No rank runs here. What is checked is that numbers stay right where they leave 32 bits, that memory grows with the ranks
and not with their square, and that rows and messages are as many as the formulas say.
"""

from __future__ import annotations

import functools
import itertools
import math
from dataclasses import dataclass, replace

import pytest
import torch

from deep_ep_core.align import align_up
from deep_ep_core.jit.structs import Pointer, UInt64
from deep_ep_core.topology import Topology
from deep_ep_core.window import ControlLayout, ControlRegion
from deep_ep_ep.device.combine_kernel import CombineParams
from deep_ep_ep.device.context import window_sizes
from deep_ep_ep.device.dispatch_kernel import DispatchParams
from deep_ep_ep.device.opening import Opening
from deep_ep_ep.device.plan import routing_layout
from deep_ep_ep.routing import route_tokens
from deep_ep_ep.sizing import (
    BUFFER_ALIGNMENT_BYTES,
    BufferShape,
    buffer_size_hint,
    combine_buffer_bytes,
    dispatch_buffer_bytes,
    max_expanded_tokens,
    max_recv_tokens,
)
from deep_ep_ep.traffic import combine_traffic, dispatch_traffic, expected_network_rows

HIDDEN, NUM_TOPK = 7168, 8
ROW_BYTES = 2 * HIDDEN
NUM_TOKENS = 16
# Of nodes with 4 and 8 GPUs, and of NVLink domains with 72.
GROUPS = [(1024, 4), (1024, 8), (2048, 4), (2048, 8), (1008, 72), (2016, 72)]
# Standard deviations by which a mean of so many tokens may be off.
MAX_SIGMAS = 5


def shape_of(num_ranks: int, node_size: int, *, num_max_tokens: int = 4096, is_hybrid: bool = True) -> BufferShape:
    return BufferShape(
        num_scaleout_ranks=num_ranks // node_size if is_hybrid else 1,
        num_scaleup_ranks=node_size if is_hybrid else num_ranks,
        is_scaleup_nvlink=is_hybrid,
        num_max_tokens_per_rank=num_max_tokens,
        hidden=HIDDEN,
        num_topk=NUM_TOPK,
    )


@dataclass(frozen=True, eq=False)
class Routed:
    """The routing of all ranks, and what follows from it by sorting; nothing here comes from the library.

    Attributes:
        topk_idx: `[num_ranks, NUM_TOKENS, NUM_TOPK]`.
        token, rank: Every (token, rank that it goes to), once, ordered by (rank, token).
        row: Row of each of these pairs at its rank.
        num_remote_ranks, num_remote_nodes: `[num_ranks * NUM_TOKENS]`: what each token reaches outside its own node.
    """

    topk_idx: torch.Tensor
    token: torch.Tensor
    rank: torch.Tensor
    row: torch.Tensor
    num_remote_ranks: torch.Tensor
    num_remote_nodes: torch.Tensor


@functools.cache
def routed(num_ranks: int, node_size: int) -> Routed:
    """One expert a rank, all equally likely; the experts of a token distinct."""
    generator = torch.Generator().manual_seed(num_ranks)
    num_all = num_ranks * NUM_TOKENS
    # The first distinct ones of more draws than are needed.
    draws = torch.randint(num_ranks, (num_all, 2 * NUM_TOPK), generator=generator)
    is_again = (draws[:, :, None] == draws[:, None, :]).tril(-1).any(2)
    order = is_again.long().argsort(dim=1, stable=True)
    topk_idx = draws.gather(1, order)[:, :NUM_TOPK]
    assert int((~is_again).sum(1).min()) >= NUM_TOPK, "draw more"
    token = torch.arange(num_all).repeat_interleave(NUM_TOPK)
    keys = (topk_idx.reshape(-1) * num_all + token).sort().values
    rank, sorted_token = keys // num_all, keys % num_all
    first = torch.searchsorted(rank, torch.arange(num_ranks))
    node = topk_idx // node_size
    own_node = (torch.arange(num_all) // NUM_TOKENS // node_size)[:, None]
    sorted_node = node.sort(1).values
    is_new = torch.cat([torch.ones(num_all, 1, dtype=torch.bool), sorted_node[:, 1:] != sorted_node[:, :-1]], 1)
    return Routed(
        topk_idx=topk_idx.view(num_ranks, NUM_TOKENS, NUM_TOPK),
        token=sorted_token,
        rank=rank,
        row=torch.arange(len(keys)) - first[rank],
        num_remote_ranks=(node != own_node).sum(1),
        num_remote_nodes=(is_new & (sorted_node != own_node)).sum(1),
    )


# Sizes


@pytest.mark.parametrize("is_hybrid", [True, False])
@pytest.mark.parametrize("node_size", [4, 8, 72])
def test_buffer_grows_with_the_ranks_and_not_with_their_square(node_size: int, is_hybrid: bool) -> None:
    """Exactly: each node more costs as many bytes as the one before it."""
    nodes = [2, 3, 4, 100, 101, 255, 256]
    for bytes_of in (dispatch_buffer_bytes, combine_buffer_bytes):
        sizes = [bytes_of(shape_of(num * node_size, node_size, is_hybrid=is_hybrid)) for num in nodes]
        # A token has 8 choices: the layers of a combine do not grow once there are so many nodes or ranks.
        steps = {
            (after - before) / (num_after - num_before)
            for (num_before, before), (num_after, after) in itertools.pairwise(zip(nodes, sizes, strict=True))
            if num_before >= NUM_TOPK
        }
        assert len(steps) == 1
        assert sizes == sorted(sizes)


@pytest.mark.parametrize(("num_ranks", "node_size"), GROUPS)
def test_sizes_are_exact_beyond_32_bits(num_ranks: int, node_size: int) -> None:
    shape = shape_of(num_ranks, node_size)
    num_nodes, max_tokens = num_ranks // node_size, 4096
    # 8 ids, 8 weights, 8 list indices and a source id behind the row; without the last two kinds on the way back.
    dispatch_record, combine_record = ROW_BYTES + 128, ROW_BYTES + 64
    per_node = max_tokens + 1280
    assert dispatch_buffer_bytes(shape) == dispatch_record * (
        num_ranks * max_tokens + max_tokens + num_nodes * per_node
    )
    layers = min(node_size, 8) * num_nodes * max_tokens + min(num_nodes, 8) * max_tokens + num_nodes * per_node
    assert combine_buffer_bytes(shape) == combine_record * layers
    hint = buffer_size_hint(shape)
    assert hint % BUFFER_ALIGNMENT_BYTES == 0
    assert 2**32 < hint < 2**63
    sizes = window_sizes(hint, num_ranks=num_ranks, recv_memory="auto")
    # What is kept for results is a share that does not grow with the ranks.
    assert hint <= sizes.stage_bytes < hint + 2**13
    assert sizes.heap_bytes == math.ceil(8 * hint / num_ranks)


def test_rows_of_2048_ranks_are_counted_exactly() -> None:
    assert max_recv_tokens(2048, 8192) == 2**24
    assert max_expanded_tokens(2048, 8192, 8, 1, 128) == 2**24 + 128
    # Past 2^31, where a 32-bit count would turn negative.
    assert max_expanded_tokens(2048, 2**18, 8, 8, 1) == 2**32


def test_offsets_of_a_control_area_are_exact_beyond_32_bits_and_apart() -> None:
    sizes = [(1 << 20) + 8 * source for source in range(8192)]
    layout = ControlLayout([ControlRegion(name=f"from.{source}", num_bytes=size) for source, size in enumerate(sizes)])
    ends = [0]
    for source, size in enumerate(sizes):
        offset = layout.offset_of(f"from.{source}")
        assert offset == align_up(ends[-1], 128)
        ends.append(offset + size)
    assert layout.num_bytes == align_up(ends[-1], 4096) > 2**32


@pytest.mark.parametrize("params", [DispatchParams, CombineParams])
def test_kernels_take_addresses_and_offsets_of_windows_in_64_bits(params: type) -> None:
    kinds = {name: kind for name, kind in params._fields_ if name.endswith("_offset")}
    # Of shared memory, which is small.
    kinds.pop("stages_offset", None)
    assert set(kinds.values()) == {UInt64}
    assert dict(params._fields_)["x"] is Pointer
    assert dict(Opening._fields_)["told"]._type_ is UInt64, "the places of rows"


def test_memory_of_a_routing_grows_with_the_ranks_and_its_parts_do_not_overlap() -> None:
    words = []
    for num_ranks in (512, 1024, 2048):
        layout = routing_layout(num_ranks, 1, 4096, NUM_TOPK, num_ranks * 4096, 0, torch.int64, True)
        words.append(layout.num_words)
        pieces = []
        for name, shape in layout.shapes.items():
            num_words = math.prod(shape) * (2 if name == "topk_idx" else 1)
            pieces.append((layout.begins[name], layout.begins[name] + num_words))
            assert layout.offsets[name] == 4 * layout.begins[name]
        assert all(end == begin for (_, end), (begin, _) in itertools.pairwise(sorted(pieces)))
        assert sorted(pieces)[-1][1] == layout.num_words
    assert words[2] - words[1] == 2 * (words[1] - words[0])


# Offsets


@pytest.mark.parametrize(("num_ranks", "node_size"), GROUPS)
def test_regions_of_all_sources_tile_the_rows_of_every_receiver(num_ranks: int, node_size: int) -> None:
    """The counts that ranks exchange give each (source, receiver) a region; none overlaps, none leaves a hole."""
    known = routed(num_ranks, node_size)
    pair = known.token // NUM_TOKENS * num_ranks + known.rank
    counts = torch.bincount(pair, minlength=num_ranks**2).view(num_ranks, num_ranks)
    begins = counts.cumsum(0) - counts
    assert begins.dtype == torch.int64
    assert torch.equal(begins[1:], begins[:-1] + counts[:-1])
    assert int(counts.sum()) == num_ranks * NUM_TOKENS * NUM_TOPK
    assert int(counts.sum(0).max()) <= max_recv_tokens(num_ranks, NUM_TOKENS)
    # What the library plans on a rank, for some of them.
    for source in range(0, num_ranks, num_ranks // 16 + 1):
        plan = route_tokens(known.topk_idx[source], num_ranks=num_ranks, num_local_experts=1)
        assert torch.equal(plan.num_send_rows, counts[source])
        is_mine = known.token // NUM_TOKENS == source
        row_of = torch.full((NUM_TOKENS, num_ranks), -1)
        row_of[known.token[is_mine] % NUM_TOKENS, known.rank[is_mine]] = known.row[is_mine]
        receiver = known.topk_idx[source]
        assert torch.equal(begins[source][receiver] + plan.slot_idx, row_of.gather(1, receiver))


@pytest.mark.parametrize(("num_ranks", "node_size"), GROUPS)
def test_bytes_of_the_last_row_stay_exact(num_ranks: int, node_size: int) -> None:
    """At full size a row's place in bytes is past 32 bits, its number is not."""
    num_rows = max_recv_tokens(num_ranks, 8192)
    assert num_rows * (NUM_TOPK + 2) < 2**31, "metadata counts its words in int32"
    last = torch.tensor([num_rows - 1]) * ROW_BYTES
    assert int(last) == (num_rows - 1) * ROW_BYTES > 2**32


# Rows on the links


@pytest.mark.parametrize(("num_ranks", "node_size"), GROUPS)
def test_rows_on_the_network_are_those_of_the_formula(num_ranks: int, node_size: int) -> None:
    known = routed(num_ranks, node_size)
    domains = {"num_experts": num_ranks, "num_scaleup_ranks": node_size}
    hybrid = dispatch_traffic(known.topk_idx, is_hybrid=True, **domains)
    direct = dispatch_traffic(known.topk_idx, is_hybrid=False, **domains)
    source_of_token = torch.arange(num_ranks).repeat_interleave(NUM_TOKENS)
    for traffic, num_remote in ((hybrid, known.num_remote_nodes), (direct, known.num_remote_ranks)):
        by_source = torch.zeros(num_ranks, dtype=torch.int64).index_add_(0, source_of_token, num_remote)
        assert torch.equal(traffic.network.num_sent(), by_source)
        assert traffic.network.num_rows == int(num_remote.sum())
    # On its rail, and never more than all tokens of the source: what a staging slab a source must hold.
    paths = hybrid.network
    assert torch.equal(paths.from_rank % node_size, paths.to_rank % node_size)
    assert bool((paths.from_rank // node_size != paths.to_rank // node_size).all())
    assert int(paths.num_between().max()) <= NUM_TOKENS
    # Each (token, rank) is served once: over NVLink, or by what already lies on the rank.
    topology = Topology(rank=0, num_ranks=num_ranks, num_scaleup_ranks=node_size)
    forwarder = known.rank - known.rank % node_size + known.token // NUM_TOKENS % node_size
    assert hybrid.nvlink.num_rows == int((forwarder != known.rank).sum())
    assert int((hybrid.nvlink.from_rank // node_size != hybrid.nvlink.to_rank // node_size).sum()) == 0
    assert topology.num_scaleout_ranks > 8


@pytest.mark.parametrize(("num_ranks", "node_size"), GROUPS)
def test_reduced_combine_sends_a_row_a_token_and_node_and_another_one_a_rank(num_ranks: int, node_size: int) -> None:
    known = routed(num_ranks, node_size)
    domains = {"num_experts": num_ranks, "num_scaleup_ranks": node_size, "is_hybrid": True}
    there = dispatch_traffic(known.topk_idx, **domains).network
    reduced = combine_traffic(known.topk_idx, **domains).network
    assert torch.equal(reduced.num_between(), there.num_between().t())
    unreduced = combine_traffic(known.topk_idx, reduces_in_node=False, **domains).network
    assert unreduced.num_rows == int(known.num_remote_ranks.sum()) >= reduced.num_rows
    assert torch.equal(unreduced.from_rank % node_size, unreduced.to_rank % node_size)


@pytest.mark.parametrize(("num_ranks", "node_size"), GROUPS)
def test_average_of_rows_is_the_expected_one(num_ranks: int, node_size: int) -> None:
    known = routed(num_ranks, node_size)
    for is_hybrid, num_remote in ((True, known.num_remote_nodes), (False, known.num_remote_ranks)):
        expected = expected_network_rows(
            num_ranks, node_size, num_experts=num_ranks, num_topk=NUM_TOPK, is_hybrid=is_hybrid
        )
        spread = float(num_remote.double().std()) / math.sqrt(len(num_remote))
        assert abs(float(num_remote.double().mean()) - expected) < MAX_SIGMAS * spread
        assert 0 < expected < NUM_TOPK


def test_direct_and_hybrid_agree_where_a_node_is_one_rank() -> None:
    known = routed(1024, 4)
    both = [
        dispatch_traffic(known.topk_idx, num_experts=1024, num_scaleup_ranks=1, is_hybrid=is_hybrid)
        for is_hybrid in (True, False)
    ]
    assert torch.equal(*(traffic.network.num_between() for traffic in both))
    assert [traffic.nvlink.num_rows for traffic in both] == [0, 0]


def test_fewer_choices_need_no_more_memory() -> None:
    full = shape_of(2048, 8)
    assert (
        buffer_size_hint(replace(full, num_topk=4))
        < buffer_size_hint(full)
        < buffer_size_hint(replace(full, num_topk=0))
    )
