"""Low-latency calls of the device backend as the host makes them: what is launched with what, and what is refused."""

from __future__ import annotations

import ctypes
from typing import Any

import pytest
import torch

from deep_ep_core.errors import CommTimeoutError, ConfigError, RankMismatchError
from deep_ep_core.lsa_team import LsaTeam
from deep_ep_core.wait import TimeoutLog, TimeoutRecord
from deep_ep_core.window import ControlLayout
from deep_ep_legacy.device.low_latency import DeviceLatency, low_latency_needs
from deep_ep_legacy.device.low_latency_kernels import CombineConfig, DispatchConfig
from deep_ep_legacy.device.low_latency_memory import STATE_BYTES, told_of
from deep_ep_legacy.low_latency_combine import CombineArgs
from deep_ep_legacy.low_latency_dispatch import DispatchArgs
from deep_ep_legacy.low_latency_sizing import get_low_latency_rdma_size_hint

NUM_RANKS, T, E, HIDDEN = 4, 8, 8, 512
HINT = get_low_latency_rdma_size_hint(T, HIDDEN, NUM_RANKS, E)


class Memory:
    def __init__(self, num_rdma_bytes: int) -> None:
        self.layout = ControlLayout(low_latency_needs(num_rdma_bytes).regions)


class Context:
    """What the backend needs of a `DeviceContext`, on the CPU; nothing is launched."""

    def __init__(self, num_rdma_bytes: int) -> None:
        self.device, self.rank, self.num_ranks, self.timeout_s = torch.device("cpu"), 1, NUM_RANKS, 10.0
        self.memory = Memory(num_rdma_bytes)
        self.log = TimeoutLog(rank=1, device=self.device)
        self.team = LsaTeam(windows=(16, 32, 48, 64), rank=1, num_ranks=NUM_RANKS, first_rank=0)

    def wait_params(self, phases: Any) -> Any:
        return self.log.params(first_phase=self.log.add_phases(phases), timeout_s=self.timeout_s)

    def offset_of(self, region: str) -> int:
        return self.memory.layout.offset_of(region)

    def check(self) -> None:
        self.log.check()


@pytest.fixture(autouse=True)
def no_streams(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "current_stream", lambda _device: torch.cpu.current_stream())
    monkeypatch.setattr(torch.cpu.Stream, "synchronize", lambda _stream: None, raising=False)


class Launched(DeviceLatency):
    """Keeps what would be launched."""

    def __init__(self, *, num_rdma_bytes: int = HINT, enable_shrink: bool = False) -> None:
        super().__init__(Context(num_rdma_bytes), enable_shrink=enable_shrink)  # type: ignore[arg-type]
        self.launches: list[tuple[Any, Any]] = []

    def launch(self, params: Any, config: Any) -> None:
        self.launches.append((type(params).from_buffer_copy(params), config))


def dispatch_args(**changes: Any) -> DispatchArgs:
    values: dict[str, Any] = {
        "x": torch.zeros(3, HIDDEN, dtype=torch.bfloat16),
        "topk_idx": torch.zeros(3, 2, dtype=torch.int64),
        "num_max_tokens": T,
        "num_experts": E,
        "recv_stats": None,
        "wait_stats": None,
        "use_fp8": True,
        "round_scale": False,
        "use_ue8m0": False,
    }
    return DispatchArgs(**{**values, **changes})


def combine_args(backend: Launched, **changes: Any) -> CombineArgs:
    handle = backend.dispatch(dispatch_args(), is_split=False).results.handle
    backend.launches.clear()
    values: dict[str, Any] = {
        "x": torch.zeros(E // NUM_RANKS, NUM_RANKS * T, HIDDEN, dtype=torch.bfloat16),
        "topk_idx": torch.zeros(3, 2, dtype=torch.int64),
        "topk_weights": torch.zeros(3, 2),
        "handle": handle,
        "use_logfmt": False,
        "out": None,
        "wait_stats": None,
    }
    return CombineArgs(**{**values, **changes})


def test_call_without_a_hook_is_one_kernel() -> None:
    backend = Launched()
    call = backend.dispatch(dispatch_args(), is_split=False)
    call.complete()
    ((params, config),) = backend.launches
    assert config == DispatchConfig(has_send=True, has_receive=True, is_fp8=True, is_idx64=True)
    assert (params.num_tokens, params.num_topk, params.call.num_experts, params.call.hidden) == (3, 2, E, HIDDEN)
    assert params.recv_x == call.results.recv_x.data_ptr()


def test_call_with_a_hook_is_two_kernels_with_one_number_between_them() -> None:
    """The number of the operation is handed on in memory of the call, so hooks may come in any order."""
    backend = Launched()
    calls = [backend.dispatch(dispatch_args(use_fp8=False), is_split=True) for _ in range(2)]
    assert [config.has_receive for _, config in backend.launches] == [False, False]
    for call in reversed(calls):
        call.complete()
        call.complete()
    epochs = [params.call.epoch for params, _ in backend.launches]
    assert len(epochs) == 4, "completing again launches nothing"
    assert epochs == [epochs[0], epochs[1], epochs[1], epochs[0]]
    assert epochs[0] != epochs[1]
    assert [config.has_send for _, config in backend.launches] == [True, True, False, False]


def test_only_the_half_that_reads_indices_is_compiled_for_their_type() -> None:
    backend = Launched()
    topk_idx = torch.zeros(3, 2, dtype=torch.int32)
    backend.dispatch(dispatch_args(topk_idx=topk_idx), is_split=True).complete()
    assert [config.is_idx64 for _, config in backend.launches] == [False, True]
    args = combine_args(backend, topk_idx=topk_idx)
    backend.combine(args, is_split=True).complete()
    assert [config.is_idx64 for _, config in backend.launches] == [True, False]


def test_combine_writes_to_what_the_caller_gave() -> None:
    backend = Launched()
    out = torch.zeros(3, HIDDEN, dtype=torch.bfloat16)
    call = backend.combine(combine_args(backend, out=out), is_split=False)
    assert call.combined_x is out
    assert backend.launches[0][0].out == out.data_ptr()


def test_meeting_is_a_combine_without_rows() -> None:
    backend = Launched()
    backend.meet(T, HIDDEN, E)
    ((params, config),) = backend.launches
    assert config == CombineConfig(has_send=True, has_receive=True, is_logfmt=False, is_idx64=True)
    assert (params.num_tokens, params.call.num_experts) == (0, 0)


def test_digest_differs_with_each_size_and_flag() -> None:
    """By it ranks see that they were called with different ones."""
    backend = Launched(num_rdma_bytes=8 * HINT)
    changes = [{}, {"use_fp8": False}, {"round_scale": True}, {"num_max_tokens": T + 1}, {"num_experts": 2 * E}]
    for change in changes:
        backend.dispatch(dispatch_args(**change), is_split=False)
    backend.combine(combine_args(Launched()), is_split=False)
    backend.meet(T, HIDDEN, E)
    digests = [params.call.digest for params, _ in backend.launches]
    assert len(set(digests)) == len(digests) == 7
    assert all(digest < 2**16 for digest in digests)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"num_max_tokens": 70000}, r"num_max_dispatch_tokens_per_rank must be at most 65535 .* 70000, on rank 1"),
        ({"num_experts": 8192}, r"num_experts must be at most 4096 on the device backend .* 8192"),
        ({"num_max_tokens": 4 * T}, r"num_rdma_bytes must be \d+ for a call of num_max_dispatch_tokens_per_rank=32"),
        ({"topk_idx": torch.zeros(3, 600, dtype=torch.int64)}, r"topk_idx must have at most 512 columns .* 600"),
        (
            {"x": torch.zeros(3 * HIDDEN + 1, dtype=torch.bfloat16)[1:].view(3, HIDDEN)},
            r"x must begin at a multiple of 16 bytes .* copy it",
        ),
    ],
)
def test_what_kernels_do_not_take_is_refused(change: dict[str, Any], words: str) -> None:
    backend = Launched()
    with pytest.raises(ConfigError, match=words):
        backend.dispatch(dispatch_args(**change), is_split=False)
    assert backend.launches == []


def report(log: TimeoutLog, *, phase: int, peer: int, seen: int) -> None:
    """What a kernel writes."""
    values = TimeoutRecord(state=1, phase=phase, rank=1, peer=peer, expected=0, seen=seen, waited_ns=0)
    ctypes.memmove(log._record_bytes.data_ptr(), ctypes.addressof(values), ctypes.sizeof(values))


@pytest.mark.parametrize(
    ("note", "seen", "error", "words"),
    [
        (0, 7, RankMismatchError, r"got another call on rank 2 than on rank 1, whose last one was .*use_fp8=True"),
        (1, 5, ConfigError, r"topk_idx must hold experts in \[0, 8\), .* another entry for token 5 .* on rank 1"),
        (2, 6, ConfigError, r"topk_idx must not name an expert so often .* for expert 6 .* on rank 1"),
    ],
)
def test_note_of_a_kernel_is_raised_once_by_the_next_call(
    note: int, seen: int, error: type[Exception], words: str
) -> None:
    backend = Launched()
    backend.dispatch(dispatch_args(), is_split=False)
    report(backend._notes_log, phase=note, peer=2, seen=seen)
    with pytest.raises(error, match=words):
        backend.dispatch(dispatch_args(), is_split=False)
    assert len(backend.launches) == 1, "ranks that go on must not be a call behind"
    assert not backend.has_failed
    backend.dispatch(dispatch_args(), is_split=False)
    assert len(backend.launches) == 2


def test_wait_that_expired_ends_all_later_calls() -> None:
    backend = Launched()
    report(backend._context.log, phase=1, peer=3, seen=0)
    assert backend.has_failed
    for _ in range(2):
        with pytest.raises(CommTimeoutError, match="the arrival of dispatched rows") as raised:
            backend.meet(T, HIDDEN, E)
        assert list(raised.value.peers) == [3]
    assert backend.launches == []


def test_rank_that_is_taken_back_is_not_waited_for_on_account_of_earlier_calls() -> None:
    """Of the others it stays known what they were told, so their slabs are not written too early."""
    backend = Launched(enable_shrink=True)
    told = told_of(backend._state[:STATE_BYTES])
    for take_back in (lambda: backend.set_masked(2, False), backend.clean_mask):
        told[:, :NUM_RANKS] = torch.tensor([[5], [6]])
        backend.set_masked(2, True)
        status = torch.zeros(NUM_RANKS, dtype=torch.int32)
        backend.copy_mask(status)
        assert status.tolist() == [0, 0, 1, 0]
        assert told[:, 2].tolist() == [5, 6]
        take_back()
        backend.copy_mask(status)
        assert status.tolist() == [0] * NUM_RANKS
        assert told[:, :NUM_RANKS].tolist() == [[5, 5, 0, 5], [6, 6, 0, 6]]
    backend.set_masked(1, False)
    assert told[:, 1].tolist() == [5, 6], "it was not masked"
