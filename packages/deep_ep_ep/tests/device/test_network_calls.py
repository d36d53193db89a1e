"""The host side of dispatch and combine across nodes, without a GPU: which kernels run, and what fits the slabs."""

from __future__ import annotations

import ctypes
import types
from collections.abc import Callable

import pytest
import torch

from deep_ep_core.errors import ConfigError
from deep_ep_core.jit import KernelSpec, LaunchShape
from deep_ep_ep.checks import BufferFacts, CallKind, CombineArgs, DispatchArgs
from deep_ep_ep.device.network.combine import NetworkCombiner
from deep_ep_ep.device.network.context import NetworkContext, NetworkOptions
from deep_ep_ep.device.network.dispatch import NetworkDispatcher
from deep_ep_ep.device.network.params import Network
from deep_ep_ep.handle_tensors import handle_from_tensors, tensors_of_handle
from deep_ep_ep.sizing import BufferShape, buffer_size_hint

PLAN = ["network_count", "network_sum_tiles", "exchange", "network_find_first_rows", "network_write_rows"]
MOVE = ["network_send_rows", "network_place_rows", "network_receive_rows"]
COMBINE = ["network_stage_rows", "exchange", "network_forward_rows", "network_sum_rows"]
DEV_COMM_BYTES = 240


class Heap:
    """A heap without room."""

    def try_empty(self, shape: tuple[int, ...], dtype: torch.dtype) -> None:
        return None


class Context(NetworkContext):
    """A context whose kernels only leave their names. Host counts say that 5 rows come, 4 to each expert."""

    def __init__(self, num_ranks: int, num_nodes: int, *, is_hybrid: bool, num_bytes: int) -> None:
        self.num_ranks, self.rank, self.num_nodes = num_ranks, 0, num_nodes
        self.options = NetworkOptions(is_hybrid=is_hybrid, num_contexts=4, traffic_class=3)
        self.num_relays = num_nodes if is_hybrid else num_ranks
        self.num_contexts, self.dev_comm_bytes = 4, DEV_COMM_BYTES
        self._device_comm = types.SimpleNamespace(data=(ctypes.c_uint64 * (DEV_COMM_BYTES // 8))())  # type: ignore[assignment]
        self.memory = types.SimpleNamespace(  # type: ignore[assignment]
            heap=Heap(), address=1 << 40, window=types.SimpleNamespace(handle=8), offset_of=lambda tensor: None
        )
        self.stage_offset, self.stage_bytes = 4096, num_bytes + 4096
        self.slabs_offset, self.slabs_bytes = 1 << 33, 2 * num_bytes + 4096
        self._network = Network.__new__(Network)
        self.device = torch.device("cpu")
        self.max_num_sms, self.recv_memory = 8, "auto"
        self.state_address = self.host_counts_address = 8
        self.log = types.SimpleNamespace(has_record=False)  # type: ignore[assignment]
        self.fields, self.num_failures = (), 0
        self.launched: list[str] = []

    def launch(self, key: object, make: Callable[[], tuple[KernelSpec, LaunchShape]]) -> Callable[[object, int], None]:  # type: ignore[override]
        spec, _ = make()

        def run(params: object, stream: int) -> None:
            assert type(params) is spec.params_type
            self.launched.append(spec.label)

        return run

    def exchange(self, params: object, stream: int) -> None:  # type: ignore[override]
        self.launched.append("exchange")

    def wait_for_counts(self, stamp: int) -> None:
        pass

    def read_counts(self, num_counts: int) -> list[int]:
        return [5] + [4] * (num_counts - 1)

    def take(self) -> list[str]:
        launched, self.launched = self.launched, []
        return launched


class Scope:
    """The caller's stream."""

    stream_handle, is_crossed, comm_stream = 0, False, None

    def wait_before_epilogue(self) -> None:
        pass


def facts_of(context: Context, max_tokens: int, *, allow_multiple_reduction: bool) -> BufferFacts:
    return BufferFacts(
        rank=0,
        num_ranks=context.num_ranks,
        buffer_id=1,
        num_max_tokens_per_rank=max_tokens,
        num_allocated_qps=4,
        device_num_sms=8,
        allow_multiple_reduction=allow_multiple_reduction,
    )


def dispatch_args(
    x: torch.Tensor, topk_idx: torch.Tensor, max_tokens: int, *, num_experts: int, do_expand: bool, do_cpu_sync: bool
) -> DispatchArgs:
    weights = torch.ones(topk_idx.shape)
    kind = CallKind(settings=())
    rest = (num_experts, max_tokens, 1, 8, 4, True, do_cpu_sync, do_expand, do_expand, False)
    return DispatchArgs(x, None, topk_idx, weights, None, None, kind, *rest)


@pytest.mark.parametrize("is_hybrid", [True, False])
@pytest.mark.parametrize("do_expand", [True, False])
@pytest.mark.parametrize("do_cpu_sync", [True, False])
def test_kernels_run_in_their_order(is_hybrid: bool, do_expand: bool, do_cpu_sync: bool) -> None:
    """With CPU sync ranks open twice: rows move when the host knows how many come."""
    context = Context(4, 2, is_hybrid=is_hybrid, num_bytes=1 << 24)
    facts = facts_of(context, 64, allow_multiple_reduction=True)
    dispatcher, combiner = NetworkDispatcher(context, facts), NetworkCombiner(context, facts)
    x, topk_idx = torch.zeros(37, 256, dtype=torch.bfloat16), torch.zeros(37, 4, dtype=torch.int64)
    args = dispatch_args(x, topk_idx, 64, num_experts=16, do_expand=do_expand, do_cpu_sync=do_cpu_sync)
    handle = dispatcher.dispatch(args, Scope()).handle  # type: ignore[arg-type]
    assert context.take() == [*PLAN, *(["exchange"] if do_cpu_sync else []), *MOVE]
    assert handle.was_cpu_synced == do_cpu_sync
    args.handle, args.kind = handle, CallKind(settings=())
    assert dispatcher.dispatch(args, Scope()).handle is handle  # type: ignore[arg-type]
    assert context.take() == ["exchange", *MOVE]
    # A handle that went through an operator is as good.
    passed = handle_from_tensors(
        [handle.topk_idx, *tensors_of_handle(handle)],
        buffer_id=1,
        num_experts=16,
        num_max_tokens_per_rank=64,
        expert_alignment=1,
        do_expand=do_expand,
    )
    num_rows = handle.num_expanded_tokens if do_expand else handle.num_recv_tokens
    rows = torch.zeros(num_rows, 256, dtype=torch.bfloat16)
    for each in (handle, passed):
        combiner.combine(CombineArgs(rows, each, None, (), CallKind(settings=()), 8, 4), Scope())  # type: ignore[arg-type]
        assert context.take() == COMBINE


@pytest.mark.parametrize("allow_multiple_reduction", [True, False])
@pytest.mark.parametrize("is_hybrid", [True, False])
@pytest.mark.parametrize(("num_ranks", "num_nodes"), [(4, 2), (4, 4), (8, 2), (16, 2), (64, 8), (128, 16)])
@pytest.mark.parametrize(("hidden", "num_topk"), [(512, 4), (7168, 8)])
def test_a_buffer_of_the_hinted_size_takes_what_it_is_for(
    num_ranks: int, num_nodes: int, is_hybrid: bool, allow_multiple_reduction: bool, hidden: int, num_topk: int
) -> None:
    """The calls are not made: sizes are settled when the first of a kind is prepared."""
    max_tokens = 128
    shape = BufferShape(
        num_scaleout_ranks=num_nodes if is_hybrid else 1,
        num_scaleup_ranks=num_ranks // num_nodes if is_hybrid else num_ranks,
        is_scaleup_nvlink=is_hybrid,
        num_max_tokens_per_rank=max_tokens,
        hidden=hidden,
        num_topk=num_topk,
        allow_multiple_reduction=allow_multiple_reduction,
    )
    context = Context(num_ranks, num_nodes, is_hybrid=is_hybrid, num_bytes=buffer_size_hint(shape))
    facts = facts_of(context, max_tokens, allow_multiple_reduction=allow_multiple_reduction)
    x, topk_idx = torch.zeros(1, hidden, dtype=torch.bfloat16), torch.zeros(1, num_topk, dtype=torch.int64)
    for do_expand in (False, True):
        args = dispatch_args(x, topk_idx, max_tokens, num_experts=num_ranks, do_expand=do_expand, do_cpu_sync=True)
        handle = NetworkDispatcher(context, facts).dispatch(args, Scope()).handle  # type: ignore[arg-type]
        rows = torch.zeros(1, hidden, dtype=torch.bfloat16)
        combine = CombineArgs(rows, handle, None, (), CallKind(settings=()), 8, 4)
        NetworkCombiner(context, facts).combine(combine, Scope())  # type: ignore[arg-type]


def test_what_does_not_fit_is_refused_with_its_size() -> None:
    context = Context(4, 2, is_hybrid=True, num_bytes=1 << 12)
    dispatcher = NetworkDispatcher(context, facts_of(context, 64, allow_multiple_reduction=True))
    x, topk_idx = torch.zeros(37, 256, dtype=torch.bfloat16), torch.zeros(37, 4, dtype=torch.int64)
    args = dispatch_args(x, topk_idx, 64, num_experts=16, do_expand=False, do_cpu_sync=False)
    with pytest.raises(ConfigError, match=r"rows of a dispatch must fit .* \(got \d+ bytes needed, 12288 there"):
        dispatcher.dispatch(args, Scope())  # type: ignore[arg-type]


def test_what_fails_on_one_rank_is_told_to_all(monkeypatch: pytest.MonkeyPatch) -> None:
    """Behind the opening that others have seen, and in front of the next one, for which they wait."""
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: None)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    context = Context(4, 2, is_hybrid=True, num_bytes=1 << 24)
    facts = facts_of(context, 64, allow_multiple_reduction=True)
    dispatcher, combiner = NetworkDispatcher(context, facts), NetworkCombiner(context, facts)
    x, topk_idx = torch.zeros(37, 256, dtype=torch.bfloat16), torch.zeros(37, 4, dtype=torch.int64)
    args = dispatch_args(x, topk_idx, 64, num_experts=16, do_expand=False, do_cpu_sync=True)
    handle = dispatcher.dispatch(args, Scope()).handle  # type: ignore[arg-type]
    context.take()
    context.stage_bytes = 1024
    with pytest.raises(ConfigError, match="must fit the memory for rows"):
        dispatcher.dispatch(args, Scope())  # type: ignore[arg-type]
    assert context.take() == [*PLAN, "exchange"]
    rows = torch.zeros(handle.num_recv_tokens, 256, dtype=torch.bfloat16)
    with pytest.raises(ConfigError, match="must fit the memory for rows"):
        combiner.combine(CombineArgs(rows, handle, None, (), CallKind(settings=()), 8, 4), Scope())  # type: ignore[arg-type]
    assert context.take() == ["exchange"]


def test_numbers_of_handles_begin_anew_behind_a_failure() -> None:
    """Of what was under way then, one rank may have enqueued more than another; all have been told of the failure."""
    numbers = []
    for num_lost in (0, 3):
        context = Context(4, 2, is_hybrid=True, num_bytes=1 << 24)
        dispatcher = NetworkDispatcher(context, facts_of(context, 64, allow_multiple_reduction=True))
        x, topk_idx = torch.zeros(37, 256, dtype=torch.bfloat16), torch.zeros(37, 4, dtype=torch.int64)

        def dispatch(
            dispatcher: NetworkDispatcher = dispatcher, x: torch.Tensor = x, topk_idx: torch.Tensor = topk_idx
        ) -> int:
            args = dispatch_args(x, topk_idx, 64, num_experts=16, do_expand=False, do_cpu_sync=False)
            return dispatcher.dispatch(args, Scope()).handle.dispatch_idx  # type: ignore[arg-type]

        before = [dispatch() for _ in range(1 + num_lost)]
        context.num_failures += 1
        numbers.append([before[0], dispatch(), dispatch()])
    assert numbers[0] == numbers[1]
    assert len(set(numbers[0])) == 3


@pytest.mark.parametrize("is_hybrid", [True, False])
def test_contexts_of_a_call_are_those_it_names_or_those_of_the_model(is_hybrid: bool) -> None:
    context = Context(4, 2, is_hybrid=is_hybrid, num_bytes=1 << 24)
    args = dispatch_args(
        torch.zeros(1, 256), torch.zeros(1, 4, dtype=torch.int64), 64, num_experts=16, do_expand=False, do_cpu_sync=True
    )
    args.num_qps = 3
    assert context.network(num_qps=context.num_qps_of(args)).num_contexts == 3
    args.num_qps, args.num_sms = 0, 1
    assert context.num_qps_of(args) == (4 if is_hybrid else 1)
    args.num_qps = 9
    assert context.network(num_qps=context.num_qps_of(args)).num_contexts == 4
