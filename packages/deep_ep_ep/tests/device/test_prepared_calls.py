"""What the kernels are passed: a later call of a kind gets the same as if it were the first one.

No kernel runs: memory is that of the CPU, and launches only take note of their parameters.
"""

from __future__ import annotations

import ctypes
import types
from typing import Any

import pytest
import torch

from deep_ep_core.heap import Heap, HeapFullError
from deep_ep_core.lsa_team import LsaTeam
from deep_ep_core.stream import CommScope, StreamOptions
from deep_ep_core.wait import WaitParams
from deep_ep_ep.checks import BufferFacts, check_combine, check_dispatch
from deep_ep_ep.device.combine import Combiner
from deep_ep_ep.device.context import DeviceContext
from deep_ep_ep.device.dispatch import Dispatcher

CPU = torch.device("cpu")
NUM_RANKS, NUM_EXPERTS, MAX_TOKENS, HIDDEN, NUM_TOPK = 2, 8, 16, 64, 2
NUM_LOCAL = NUM_EXPERTS // NUM_RANKS
# Rows that come, and by local expert.
TOLD_COUNTS = [5, 1, 0, 2, 4]
WINDOW_BEGIN = 4096
FACTS = BufferFacts(
    rank=0,
    num_ranks=NUM_RANKS,
    buffer_id=1,
    num_max_tokens_per_rank=MAX_TOKENS,
    num_allocated_qps=9,
    device_num_sms=None,
    allow_multiple_reduction=True,
)
# Where these point to is up to the call.
POINTERS_TO_RESULTS = frozenset(
    (
        *("block_counts", "row_of_entry", "expert_row_of_entry", "num_send_rows", "recv_row_ends", "dst_slot"),
        *("topk_idx_copy", "expert_ends", "num_expert_rows", "metadata", "recv_x", "recv_sf", "recv_topk_idx"),
        *("recv_topk_weights", "out", "out_weights", "opening", "host_counts", "host_stamp", "team", "wait", "state"),
        "told",
    )
)


class Memory:
    """A window: the heap begins behind its control regions."""

    def __init__(self, num_bytes: int) -> None:
        self.bytes = ctypes.create_string_buffer(num_bytes + 256)
        address = -(-ctypes.addressof(self.bytes) // 256) * 256
        self.heap = Heap(address, num_bytes, CPU, self.bytes)
        self.layout = types.SimpleNamespace(num_bytes=WINDOW_BEGIN)

    def offset_of(self, tensor: torch.Tensor) -> int | None:
        offset = self.heap.offset_of(tensor)
        return None if offset is None else WINDOW_BEGIN + offset


class Context(DeviceContext):
    """A context whose kernels do nothing but tell the counts, where they are asked for them."""

    def __init__(self, recv_memory: str, *, heap_bytes: int = 8 << 20) -> None:
        self.device, self.rank, self.num_ranks = CPU, 0, NUM_RANKS
        self.recv_memory, self.shares_gpu, self.counts_capacity = recv_memory, False, 16
        self.max_num_sms = 132
        self.memory = Memory(heap_bytes)
        self.opening_offset, self.counts_offset, self.arrivals_offset = 0, 256, 512
        self.stage_offset = None if recv_memory == "window" else 1024
        self.state_address = ctypes.addressof(self.memory.bytes)
        self.log = types.SimpleNamespace(has_record=False)
        self.team = LsaTeam.__new__(LsaTeam)
        self.wait = WaitParams.__new__(WaitParams)
        self._host_words = (ctypes.c_int32 * 64)(0, *TOLD_COUNTS)
        self.host_counts_address = ctypes.addressof(self._host_words)
        self.seen: list[dict[str, Any]] = []

    def launch(self, key: object, make: object) -> Any:
        def launch(params: ctypes.Structure, stream: int) -> None:
            values = {name: getattr(params, name) for name, *_ in params._fields_}
            values["agreed"], values["told"] = list(params.opening.agreed), list(params.opening.told)
            values["biases"] = list(values.get("biases", []))
            self.seen.append(values)
            if values.get("host_counts"):
                self._host_words[0] = params.host_stamp

        return launch


class Buffer:
    """Calls through a context; those of one name are of one kind."""

    def __init__(self, recv_memory: str, **changes: Any) -> None:
        self.context = Context(recv_memory, **changes)
        self.dispatcher, self.combiner = Dispatcher(self.context, FACTS), Combiner(self.context, FACTS)
        self._kinds: dict[str, Any] = {}

    def dispatch(self, num_tokens: int = 3, *, kind: str = "dispatch", **changes: Any) -> Any:
        arguments: dict[str, Any] = {
            "x": torch.ones(num_tokens, HIDDEN, dtype=torch.bfloat16),
            "topk_idx": torch.zeros(num_tokens, NUM_TOPK, dtype=torch.int64),
            "topk_weights": torch.ones(num_tokens, NUM_TOPK),
            "cumulative_local_expert_recv_stats": None,
            "num_experts": NUM_EXPERTS,
            "num_max_tokens_per_rank": None,
            "expert_alignment": None,
            "num_sms": 4,
            "num_qps": 0,
            "handle": None,
            "do_handle_copy": True,
            "do_cpu_sync": False,
            "do_expand": False,
            "do_zero_padding": False,
            "use_tma_aligned_col_major_sf": False,
            **changes,
        }
        args = check_dispatch(FACTS, **arguments, default_num_sms=lambda *_: 4)
        args.kind = self._kinds.setdefault(kind, args.kind)
        with CommScope(CPU, StreamOptions(), may_stay=True) as scope:
            return self.dispatcher.dispatch(args, scope)

    def combine(self, x: torch.Tensor, handle: Any, *, kind: str = "combine", **changes: Any) -> Any:
        arguments = {"topk_weights": None, "bias": None, "num_sms": 0, "num_qps": 0, **changes}
        args = check_combine(FACTS, x=x, handle=handle, **arguments)
        args.kind = self._kinds.setdefault(kind, args.kind)
        with CommScope(CPU, StreamOptions(), may_stay=True) as scope:
            return self.combiner.combine(args, scope)

    @property
    def seen(self) -> dict[str, Any]:
        """The parameters of the last launch."""
        return self.context.seen[-1]


def fixed(seen: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in seen.items() if name not in POINTERS_TO_RESULTS}


VARIANTS: dict[str, dict[str, Any]] = {
    "plain": {},
    "sync": {"do_cpu_sync": True},
    "by expert": {"do_expand": True, "expert_alignment": 4},
    "by expert, sync": {"do_expand": True, "do_cpu_sync": True, "do_zero_padding": True},
    "without weights": {"topk_weights": None},
    "the caller's topk_idx": {"do_handle_copy": False},
}


@pytest.mark.parametrize("recv_memory", ["auto", "window", "torch"])
@pytest.mark.parametrize("variant", list(VARIANTS))
def test_a_later_dispatch_of_a_kind_passes_what_a_first_one_would(recv_memory: str, variant: str) -> None:
    """Also after calls of other kinds and with other numbers of tokens."""
    changes = VARIANTS[variant]
    warm, cold = Buffer(recv_memory), Buffer(recv_memory)
    stats = torch.zeros(NUM_LOCAL, dtype=torch.int32)
    warm.dispatch(5, kind=variant, **changes)
    warm.dispatch(7, kind="another", do_expand=True, cumulative_local_expert_recv_stats=stats)
    for num_tokens in (3, 0, 600):
        shared = {
            "x": torch.ones(num_tokens, HIDDEN, dtype=torch.bfloat16),
            "topk_idx": torch.zeros(num_tokens, NUM_TOPK, dtype=torch.int64),
            "topk_weights": torch.ones(num_tokens, NUM_TOPK),
            "num_max_tokens_per_rank": 1024,
            **changes,
        }
        sent = warm.dispatch(kind=f"{variant} of many", **shared)
        sent = warm.dispatch(kind=f"{variant} of many", **shared)
        first = cold.dispatch(kind=f"{variant} {num_tokens}", **shared)
        empty_weights = {"topk_weights"} if num_tokens == 0 else set()
        for name, value in fixed(cold.seen).items():
            if name not in empty_weights:
                assert warm.seen[name] == value, name
        if recv_memory == "torch":
            assert warm.seen["told"] == cold.seen["told"]
        else:
            assert warm.context.seen[-1]["told"][0] == warm.context.memory.offset_of(sent.recv_x)
        assert sent.recv_x.shape == first.recv_x.shape
        assert warm.seen["recv_x"] == (sent.recv_x.data_ptr() or None)
        assert warm.seen["recv_topk_weights"] == (
            None if sent.recv_topk_weights is None else sent.recv_topk_weights.data_ptr()
        )


def test_what_a_kernel_writes_is_what_the_handle_shows() -> None:
    buffer = Buffer("auto")
    names = {
        "recv_row_ends": "psum_num_recv_tokens_per_scaleup_rank",
        "expert_ends": "psum_num_recv_tokens_per_expert",
        "num_expert_rows": "num_unaligned_recv_tokens_per_expert",
        "metadata": "recv_src_metadata",
        "dst_slot": "dst_buffer_slot_idx",
        "topk_idx_copy": "topk_idx",
    }
    for idx_dtype in (torch.int64, torch.int32):
        for do_cpu_sync in (False, True):
            topk_idx = torch.zeros(3, NUM_TOPK, dtype=idx_dtype)
            handle = buffer.dispatch(
                topk_idx=topk_idx, do_cpu_sync=do_cpu_sync, kind=f"{idx_dtype}{do_cpu_sync}"
            ).handle
            seen = buffer.context.seen[-2] | buffer.seen if do_cpu_sync else buffer.seen
            for param, name in names.items():
                assert seen[param] == getattr(handle, name).data_ptr(), name
            assert (handle.topk_idx.shape, handle.topk_idx.dtype) == (topk_idx.shape, idx_dtype)
            num_rows = TOLD_COUNTS[0] if do_cpu_sync else NUM_RANKS * MAX_TOKENS
            assert handle.recv_src_metadata.shape == (num_rows, NUM_TOPK + 2)
            assert handle.num_recv_tokens_per_expert_list == (TOLD_COUNTS[1:] if do_cpu_sync else [])


def test_a_small_dispatch_with_cpu_sync_is_one_kernel_whose_results_shrink() -> None:
    buffer = Buffer("auto")
    sent = buffer.dispatch(do_cpu_sync=True)
    assert len(buffer.context.seen) == 1
    num_recv = TOLD_COUNTS[0]
    assert sent.recv_x.shape == (num_recv, HIDDEN)
    assert sent.recv_topk_idx.shape == sent.recv_topk_weights.shape == (num_recv, NUM_TOPK)
    assert sent.handle.recv_src_metadata.shape == (num_recv, NUM_TOPK + 2)
    assert buffer.seen["recv_topk_idx"] == sent.recv_topk_idx.data_ptr()
    # A view made without gradients could not be changed in place by what has some, and shares its count of changes.
    assert not sent.recv_topk_weights._is_view()
    factor = torch.ones(1, requires_grad=True)
    sent.recv_topk_weights.mul_(factor)
    assert buffer.combine(sent.recv_x, sent.handle).combined_x.shape == (3, HIDDEN)
    assert buffer.seen["told"][0] != 2**64 - 1


@pytest.mark.parametrize(
    ("recv_memory", "changes"),
    [
        # Results beside the rows would keep more than they need.
        ("auto", {"num_max_tokens_per_rank": 1 << 15}),
        # Rows are copied on, and their last place must have the right size.
        ("torch", {}),
        # Scales lie as far apart as there are rows.
        ("auto", {"x": "fp8", "use_tma_aligned_col_major_sf": True}),
    ],
    ids=["large", "copied on", "scales by columns"],
)
def test_other_dispatches_with_cpu_sync_are_two_kernels(recv_memory: str, changes: dict[str, Any]) -> None:
    buffer = Buffer(recv_memory, heap_bytes=16 << 20)
    if "x" in changes:
        x = torch.ones(3, HIDDEN).to(torch.float8_e4m3fn), torch.ones(3, HIDDEN // 32)
        changes = {**changes, "x": x}
    sent = buffer.dispatch(do_cpu_sync=True, **changes)
    assert len(buffer.context.seen) == 2
    assert sent.recv_topk_weights.untyped_storage().nbytes() == 4 * TOLD_COUNTS[0] * NUM_TOPK


def test_tensors_of_one_routing_do_not_overlap() -> None:
    handle = Buffer("auto").dispatch(do_expand=True).handle
    names = (
        "topk_idx",
        "psum_num_recv_tokens_per_scaleup_rank",
        "psum_num_recv_tokens_per_expert",
        "num_unaligned_recv_tokens_per_expert",
        "dst_buffer_slot_idx",
        "recv_src_metadata",
    )
    tensors = [getattr(handle, name) for name in names] + handle.plan.parts(handle.recv_src_metadata).tensors
    for idx, tensor in enumerate(tensors):
        tensor.fill_(idx)
    for idx, tensor in enumerate(tensors):
        assert (tensor == idx).all()


def test_each_dispatch_and_each_handle_opens_with_its_own_numbers() -> None:
    buffer = Buffer("auto")
    # A cached dispatch has the handle behind the operation and nine values, a combine right behind the operation.
    handles, dispatch_agreed, cached_agreed, combine_agreed = [], [], [], []
    for _ in range(3):
        sent = buffer.dispatch()
        handles.append(sent.handle)
        dispatch_agreed.append(buffer.seen["agreed"])
        buffer.dispatch(kind="cached", topk_idx=None, num_experts=None, handle=sent.handle)
        cached_agreed.append(buffer.seen["agreed"])
        buffer.combine(sent.recv_x, sent.handle)
        combine_agreed.append(buffer.seen["agreed"])
    assert [handle.dispatch_idx for handle in handles] == [1, 2, 3]
    assert dispatch_agreed[0] == dispatch_agreed[1] == dispatch_agreed[2]
    assert [agreed[10] for agreed in cached_agreed] == [1, 2, 3]
    assert [agreed[1] for agreed in combine_agreed] == [1, 2, 3]


@pytest.mark.parametrize("recv_memory", ["auto", "window", "torch"])
def test_a_later_combine_of_a_kind_passes_what_a_first_one_would(recv_memory: str) -> None:
    warm = Buffer(recv_memory)
    earlier, sent = warm.dispatch(), warm.dispatch(5)
    bias, weights = torch.ones(5, HIDDEN, dtype=torch.bfloat16), sent.recv_topk_weights
    for kind, changes in {"plain": {}, "full": {"bias": bias, "topk_weights": weights}}.items():
        early_changes = changes and {"bias": bias[:3], "topk_weights": earlier.recv_topk_weights}
        warm.combine(earlier.recv_x, earlier.handle, kind=kind, **early_changes)
        back = warm.combine(sent.recv_x, sent.handle, kind=kind, **changes)
        later = fixed(warm.seen)
        assert warm.seen["out"] == back.combined_x.data_ptr()
        first = warm.combine(sent.recv_x, sent.handle, kind=f"{kind}, another object", **changes)
        assert later == fixed(warm.seen)
        assert first.combined_x.shape == back.combined_x.shape == (5, HIDDEN)


def test_permuted_metadata_are_noticed_by_a_combine_of_a_known_kind() -> None:
    """Rows that no longer lie as the dispatch laid them are pushed, with the metadata that came with them."""
    buffer = Buffer("auto")
    sent = buffer.dispatch()
    buffer.combine(sent.recv_x, sent.handle)
    assert buffer.seen["told"][0] != 2**64 - 1
    permuted = sent.handle.recv_src_metadata.flip(0)
    buffer.combine(sent.recv_x, sent.handle)
    assert buffer.seen["told"][0] != 2**64 - 1
    sent.handle.recv_src_metadata = permuted
    buffer.combine(sent.recv_x, sent.handle)
    assert buffer.seen["told"][0] == 2**64 - 1
    assert buffer.seen["metadata"] == permuted.data_ptr()
    changed_in_place = buffer.dispatch()
    changed_in_place.handle.recv_src_metadata.fill_(0)
    buffer.combine(changed_in_place.recv_x, changed_in_place.handle)
    assert buffer.seen["told"][0] == 2**64 - 1


def test_a_combine_asks_for_no_tensor_of_the_handle() -> None:
    """To make one takes the host longer than all the rest of a combine."""
    buffer = Buffer("auto")
    sent = buffer.dispatch()
    buffer.combine(sent.recv_x, sent.handle)
    for name in ("topk_idx", "recv_src_metadata", "psum_num_recv_tokens_per_scaleup_rank"):
        assert sent.handle.made(name) is None


def test_a_window_without_room_for_side_records_says_so() -> None:
    with pytest.raises(HeapFullError, match="the heap must have a free region of 1024 bytes"):
        Buffer("window", heap_bytes=4096).dispatch()
