"""Inputs that every rank can make for all ranks, and checks of results against the reference.

Values are unique to (rank, token) or (rank, token, top-k position), so that a row or weight from a wrong place cannot
pass. Comparisons are to the bit.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

import torch
import torch.distributed as dist

from deep_ep_ep import ElasticBuffer, EPHandle, reference
from deep_ep_ep.quant import cast_to_fp8


@dataclass
class Setting:
    """Where cases run in this process, unless they say otherwise.

    Attributes:
        device: Device of their tensors.
        options: Options of their buffers.
        ranks_per_node: Ranks of a node where buffers use the hierarchy of several nodes, else None.
        before_compare: Called with the buffer when all calls are made, before their results are looked at.
    """

    device: str = "cpu"
    options: dict[str, object] = field(default_factory=dict)
    ranks_per_node: int | None = None
    before_compare: Callable[[ElasticBuffer], None] = lambda buffer: None


SETTING = Setting()


@dataclass(frozen=True)
class Case:
    """One problem: the same on all ranks."""

    num_tokens: tuple[int, ...]
    num_experts: int = 16
    num_topk: int = 4
    hidden: int = 256
    expert_alignment: int = 1
    payload: str = "bfloat16"
    topk_idx_dtype: torch.dtype = torch.int64
    masked_share: float = 0.2
    routing: str = "random"
    seed: int = 0
    num_max_tokens_per_rank: int = 48
    num_biases: int = 0
    column_major_input_sf: bool = False
    device: str = field(default_factory=lambda: SETTING.device)

    @property
    def num_ranks(self) -> int:
        return len(self.num_tokens)

    @property
    def num_local_experts(self) -> int:
        return self.num_experts // self.num_ranks


def make_topk_idx(case: Case, rank: int, generator: torch.Generator) -> torch.Tensor:
    num_tokens = case.num_tokens[rank]
    scores = torch.rand(num_tokens, case.num_experts, generator=generator)
    if case.routing == "all to one":
        # Every expert that is picked lives on the second to last rank.
        target = max(case.num_ranks - 2, 0)
        is_target = torch.arange(case.num_experts) // case.num_local_experts == target
        scores[:, ~is_target] = -1.0
        num_picked = min(case.num_topk, case.num_local_experts)
        picked = scores.topk(num_picked, dim=1, sorted=False).indices
        topk_idx = torch.full((num_tokens, case.num_topk), -1)
        topk_idx[:, :num_picked] = picked
    else:
        topk_idx = scores.topk(case.num_topk, dim=1, sorted=False).indices
    if case.routing == "none":
        topk_idx[:] = -1
    is_masked = torch.rand(topk_idx.shape, generator=generator) < case.masked_share
    topk_idx[is_masked] = -1
    return topk_idx.to(case.topk_idx_dtype)


def make_sent(case: Case) -> list[reference.Sent]:
    """What each rank passes to dispatch."""
    everyone = []
    for rank in range(case.num_ranks):
        generator = torch.Generator().manual_seed(case.seed * 1000 + rank)
        num_tokens = case.num_tokens[rank]
        topk_idx = make_topk_idx(case, rank, generator)
        values = torch.randn(num_tokens, case.hidden, generator=generator)
        sf = None
        if case.payload == "fp8 float32":
            x, sf = cast_to_fp8(values, group_size=128)
        elif case.payload == "fp8 ue8m0":
            x, sf = cast_to_fp8(values, group_size=32, scale_format="ue8m0")
        elif case.payload == "opaque bytes":
            x = torch.randint(0, 256, (num_tokens, case.hidden), generator=generator, dtype=torch.uint8)
        else:
            x = values.to(getattr(torch, case.payload))
        if sf is not None and case.column_major_input_sf:
            sf = sf.t().contiguous().t()
        first = rank * case.num_max_tokens_per_rank * case.num_topk + 1
        weights = torch.arange(first, first + num_tokens * case.num_topk, dtype=torch.float32).view(
            num_tokens, case.num_topk
        )
        everyone.append(reference.Sent(x=x, topk_idx=topk_idx, sf=sf, topk_weights=weights))
    return everyone


def to_device(case: Case, value: object) -> object:
    """Tensors, alone or in a tuple, on the device of the case; None stays None."""
    if isinstance(value, tuple):
        return tuple(to_device(case, each) for each in value)
    return value.to(case.device) if isinstance(value, torch.Tensor) else value


def make_expert_output(case: Case, rank: int, token: int, position: int) -> torch.Tensor:
    """The output of the expert at a top-k position, unlike any other; `[hidden]`, bfloat16.

    Two elements in three are large and cancel against others', so that a sum in another order, or with another
    rounding, gives other bits.
    """
    generator = torch.Generator().manual_seed(((case.seed * 64 + rank) * 4096 + token) * 64 + position + 7)
    sign = torch.randint(-1, 2, (case.hidden,), generator=generator)
    return (torch.randn(case.hidden, generator=generator) + sign * 2.0**18).to(torch.bfloat16)


def make_biases(case: Case, rank: int) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(case.seed * 1000 + 500 + rank)
    shape = (case.num_tokens[rank], case.hidden)
    return [torch.randn(shape, generator=generator).to(torch.bfloat16) for _ in range(case.num_biases)]


@dataclass(frozen=True)
class Expected:
    """All that the reference says about one case."""

    case: Case
    sent: list[reference.Sent]
    received: list[reference.Received]

    @classmethod
    def of(cls, case: Case) -> Expected:
        sent = make_sent(case)
        received = reference.dispatch(sent, num_experts=case.num_experts, expert_alignment=case.expert_alignment)
        return cls(case=case, sent=sent, received=received)

    def token_major_outputs(self) -> list[torch.Tensor]:
        """What each rank passes to a token-major combine: its experts' outputs summed by the user, in bfloat16."""
        outputs = []
        for received in self.received:
            rows = torch.zeros(len(received.source), self.case.hidden, dtype=torch.bfloat16)
            for row, (source, token) in enumerate(received.source):
                total = torch.zeros(self.case.hidden)
                for position in received.local_experts[row]:
                    total += make_expert_output(self.case, source, token, position)
                rows[row] = total.to(torch.bfloat16)
            outputs.append(rows)
        return outputs

    def expert_major_outputs(self) -> list[torch.Tensor]:
        """What each rank passes to an expert-major combine; padding rows hold NaN, which must not get anywhere."""
        outputs = []
        for received in self.received:
            rows = torch.full((sum(received.num_aligned), self.case.hidden), float("nan"), dtype=torch.bfloat16)
            for pairs, start in zip(received.expert_rows, received.expert_starts, strict=True):
                for place, (row, position) in enumerate(pairs):
                    source, token = received.source[row]
                    rows[start + place] = make_expert_output(self.case, source, token, position)
            outputs.append(rows)
        return outputs


def as_bytes(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.cpu().contiguous().view(-1).view(torch.uint8)


def assert_bits_equal(actual: torch.Tensor, expected: torch.Tensor, what: str) -> None:
    assert actual.dtype == expected.dtype, f"{what}: dtype {actual.dtype}, expected {expected.dtype}"
    assert actual.shape == expected.shape, f"{what}: shape {list(actual.shape)}, expected {list(expected.shape)}"
    actual_bytes, expected_bytes = as_bytes(actual), as_bytes(expected)
    if not torch.equal(actual_bytes, expected_bytes):
        bad = (actual_bytes != expected_bytes).nonzero()[:, 0]
        raise AssertionError(f"{what}: {len(bad)} of {len(actual_bytes)} bytes differ, the first at byte {int(bad[0])}")


def assert_values_equal(actual: torch.Tensor, expected: torch.Tensor, what: str) -> None:
    """Equal to the bit but for the sign of a zero, which the contract leaves open."""
    actual = actual.cpu()
    assert_bits_equal(torch.where(actual == 0, 0, actual), torch.where(expected == 0, 0, expected), what)


def padded(rows: torch.Tensor, num_rows: int) -> torch.Tensor:
    """Rows with NaN or 255s below them, as a worst-case tensor has."""
    tail = torch.full((num_rows - len(rows), *rows.shape[1:]), float("nan")).to(rows.dtype)
    return torch.cat([rows, tail])


def gather(sent: Sequence[reference.Sent], attribute: str, source: Sequence[tuple[int, int]]) -> torch.Tensor:
    tensors = [getattr(each, attribute) for each in sent]
    if not source:
        return tensors[0][:0]
    return torch.stack([tensors[rank][token] for rank, token in source])


def check_token_major(
    expected: Expected,
    rank: int,
    recv_x: object,
    recv_topk_idx: torch.Tensor | None,
    recv_topk_weights: torch.Tensor | None,
    *,
    num_rows: int | None = None,
) -> None:
    """The token-major results of one rank; `num_rows` is the worst case of a dispatch without CPU sync."""
    case, received = expected.case, expected.received[rank]
    num_recv = len(received.source)
    payload, sf = recv_x if isinstance(recv_x, tuple) else (recv_x, None)
    assert isinstance(payload, torch.Tensor)
    assert len(payload) == (num_recv if num_rows is None else num_rows), (len(payload), num_recv, num_rows)
    assert_bits_equal(payload[:num_recv], gather(expected.sent, "x", received.source), "recv_x")
    assert (sf is None) == (expected.sent[rank].sf is None)
    if sf is not None:
        assert_bits_equal(sf[:num_recv], gather(expected.sent, "sf", received.source), "recv_sf")
    assert recv_topk_idx is not None
    local = torch.full((num_recv, case.num_topk), -1, dtype=case.topk_idx_dtype)
    for row, experts in enumerate(received.local_experts):
        for position, expert in experts.items():
            local[row, position] = expert
    assert_bits_equal(recv_topk_idx[:num_recv], local, "recv_topk_idx")
    if recv_topk_weights is not None:
        expected_weights = gather(expected.sent, "topk_weights", received.source)
        assert_bits_equal(recv_topk_weights[:num_recv], expected_weights, "recv_topk_weights")


def check_expert_major(
    expected: Expected,
    rank: int,
    recv_x: object,
    recv_topk_idx: torch.Tensor | None,
    recv_topk_weights: torch.Tensor | None,
    *,
    is_zero_padded: bool,
    num_rows: int | None = None,
) -> None:
    received = expected.received[rank]
    payload, sf = recv_x if isinstance(recv_x, tuple) else (recv_x, None)
    assert isinstance(payload, torch.Tensor)
    assert recv_topk_idx is None
    num_expanded = sum(received.num_aligned)
    assert len(payload) == (num_expanded if num_rows is None else num_rows)
    for expert, pairs in enumerate(received.expert_rows):
        start = received.expert_starts[expert]
        source = [received.source[row] for row, _ in pairs]
        real = slice(start, start + len(pairs))
        assert_bits_equal(payload[real], gather(expected.sent, "x", source), f"recv_x of expert {expert}")
        if sf is not None:
            assert_bits_equal(sf[real], gather(expected.sent, "sf", source), f"recv_sf of expert {expert}")
        if recv_topk_weights is not None:
            assert recv_topk_weights.dim() == 1
            weights = [
                float(expected.sent[rank_].topk_weights[token, position])  # type: ignore[index]
                for (rank_, token), (_, position) in zip(source, pairs, strict=True)
            ]
            assert_bits_equal(recv_topk_weights[real], torch.tensor(weights), f"weights of expert {expert}")
        if is_zero_padded:
            gap = slice(start + len(pairs), start + received.num_aligned[expert])
            assert not as_bytes(payload[gap]).any(), f"padding of expert {expert}"
            assert sf is None or not as_bytes(sf[gap]).any(), f"scale padding of expert {expert}"
            assert recv_topk_weights is None or not recv_topk_weights[gap].any(), f"weight padding of expert {expert}"


def check_handle(expected: Expected, rank: int, handle: EPHandle, buffer: ElasticBuffer, *, do_cpu_sync: bool) -> None:
    case, received = expected.case, expected.received[rank]
    num_ranks, max_tokens, num_topk = case.num_ranks, case.num_max_tokens_per_rank, case.num_topk
    num_recv = len(received.source)
    assert handle.num_recv_tokens == (num_recv if do_cpu_sync else num_ranks * max_tokens)
    assert handle.num_recv_tokens_per_expert_list == (received.num_aligned if do_cpu_sync else [])
    if do_cpu_sync:
        assert handle.num_expanded_tokens == sum(received.num_aligned)
    num_real = [len(pairs) for pairs in received.expert_rows]
    assert handle.num_unaligned_recv_tokens_per_expert.tolist() == num_real
    ends, total = [], 0
    for expert in range(case.num_local_experts):
        ends.append(total + (num_real[expert] if handle.do_expand else received.num_aligned[expert]))
        total += received.num_aligned[expert]
    assert handle.psum_num_recv_tokens_per_expert.tolist() == ends
    num_peers = buffer.num_scaleup_ranks
    per_peer = [sum(1 for source, _ in received.source if source % num_peers == peer) for peer in range(num_peers)]
    assert handle.psum_num_recv_tokens_per_scaleup_rank.tolist() == [sum(per_peer[: i + 1]) for i in range(num_peers)]
    metadata = handle.recv_src_metadata.cpu()
    assert metadata.shape == (handle.num_recv_tokens, num_topk + 2)
    assert metadata.dtype == torch.int32
    for row, (source, token) in enumerate(received.source):
        experts = received.local_experts[row]
        assert metadata[row, 0] == source * max_tokens + token
        assert metadata[row, 1] == source * num_topk + max(experts)
        if handle.do_expand:
            places = [received.expanded_row(row, k) if k in experts else -1 for k in range(num_topk)]
            assert metadata[row, 2:].tolist() == places
    slots = torch.full((case.num_tokens[rank], num_topk), -1, dtype=torch.int32)
    for token, experts_row in enumerate(expected.sent[rank].topk_idx.tolist()):
        ranks = {k: expert // case.num_local_experts for k, expert in enumerate(experts_row) if expert >= 0}
        for k, destination in ranks.items():
            if all(ranks.get(later) != destination for later in range(k + 1, num_topk)):
                sent_before = sum(
                    1 for source, other in expected.received[destination].source if source == rank and other < token
                )
                slots[token, k] = rank * max_tokens + sent_before
    assert_bits_equal(handle.dst_buffer_slot_idx, slots, "dst_buffer_slot_idx")


def make_buffer(case: Case, **options: object) -> ElasticBuffer:
    arguments: dict[str, object] = {
        "group": dist.group.WORLD,
        "num_max_tokens_per_rank": case.num_max_tokens_per_rank,
        "hidden": case.hidden,
        "explicitly_destroy": True,
        "num_cpu_timeout_secs": 60,
    }
    return ElasticBuffer(**{**arguments, **SETTING.options, **options})  # type: ignore[arg-type]


def with_ranks(case: Case) -> Case:
    """The case cut to the ranks that are there, for runs under another launcher."""
    num_ranks = dist.get_world_size()
    counts = (case.num_tokens * num_ranks)[:num_ranks]
    return replace(case, num_tokens=counts)
