"""The device backend of several ranks in one process without a GPU: memory of the host, copies and words at once."""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Sequence
from types import SimpleNamespace

import pytest
import torch

from deep_ep_core.copy_engine import Copy
from deep_ep_core.stream_signals import Awaited
from deep_ep_cp.device import backend as backend_module
from deep_ep_cp.device import meetings as meetings_module
from deep_ep_cp.device.backend import DeviceBackend
from deep_ep_cp.device.memory import NUM_HALVES, WORD_BYTES

NUM_BYTES = 4096
STREAM = SimpleNamespace(cuda_stream=7)


class HostMemory:
    """What `ContextMemory` offers, over tensors of all ranks on the CPU."""

    def __init__(self, rank: int, windows: Sequence[torch.Tensor]) -> None:
        self.rank, self.num_ranks = rank, len(windows)
        self.device, self.device_idx = torch.device("cpu"), 0
        self.data = windows[rank][:NUM_BYTES]
        self.data_addresses = [window.data_ptr() for window in windows]

    def arrival_address(self, at: int, of: int) -> int:
        return self.data_addresses[at] + NUM_BYTES + of * WORD_BYTES

    def digest_address(self, at: int, half: int, of: int) -> int:
        return self.arrival_address(at, self.num_ranks) + (half * self.num_ranks + of) * WORD_BYTES

    def close(self) -> None:
        pass


class HostSignals:
    """Words that are written at once, and waits that are kept: `awaited` has those of the last one."""

    def __init__(self) -> None:
        self.awaited: list[Awaited] = []
        self.phase = ""
        self.error: Exception | None = None
        self.is_abandoned = False

    def write_all(self, stream: int, words: Sequence[tuple[int, int]]) -> None:
        assert stream == STREAM.cuda_stream
        for address, value in words:
            ctypes.c_uint64.from_address(address).value = value

    def wait_all(self, stream: int, words: Sequence[Awaited], *, phase: str) -> None:
        assert stream == STREAM.cuda_stream
        self.awaited, self.phase = list(words), phase

    def has_come(self) -> bool:
        return all(ctypes.c_uint64.from_address(word.address).value >= word.least for word in self.awaited)

    def check(self) -> None:
        if self.error is not None:
            raise self.error

    def abandon(self) -> None:
        self.is_abandoned = True

    def check_usable(self, stream: int) -> None:
        assert stream == STREAM.cuda_stream
        self.check()

    def close(self) -> None:
        pass


class HostTransport:
    """Finds the words for ranks that disagree, as told."""

    name = "ContextBuffer"

    def __init__(self) -> None:
        self.opened: list[tuple[str, list[str]]] = []
        self.error: Exception | None = None

    def begin(self, name: str, fields: Sequence[object]) -> None:
        self.opened.append((name, [field.name for field in fields]))
        if self.error is not None:
            raise self.error


class HostEvent:
    """Done as soon as it is made. The digests of the peers that came before are there."""

    def __init__(self, stream: object) -> None:
        assert stream is STREAM


def _copy_at_once(stream: int, copies: Sequence[Copy]) -> None:
    assert stream == STREAM.cuda_stream
    for copy in copies:
        assert copy.dst != copy.src or not copy.num_bytes, "what lies there already is not to be copied"
        ctypes.memmove(copy.dst, copy.src, copy.num_bytes)


@pytest.fixture
def make_ranks(monkeypatch: pytest.MonkeyPatch) -> Callable[[int], list[DeviceBackend]]:
    """`make_ranks(num_ranks)` gives a backend for each rank."""
    for module in (backend_module, meetings_module):
        monkeypatch.setattr(module, "copy_batch", _copy_at_once)
        monkeypatch.setattr(module, "RecordedEvent", HostEvent)
    monkeypatch.setattr(backend_module, "current_stream", lambda device_idx: STREAM)
    monkeypatch.setattr(meetings_module, "CudaStreamOrder", lambda device: SimpleNamespace(is_done=lambda event: True))

    def make(num_ranks: int) -> list[DeviceBackend]:
        num_words = num_ranks * (1 + NUM_HALVES)
        windows = [torch.zeros(NUM_BYTES + num_words * WORD_BYTES, dtype=torch.uint8) for _ in range(num_ranks)]
        return [DeviceBackend(HostMemory(rank, windows), HostSignals(), HostTransport()) for rank in range(num_ranks)]

    return make
