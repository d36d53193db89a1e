"""The order of writes and fetches, with parts that only note what they are asked; GPUs run it in `test_device`."""

from __future__ import annotations

import contextlib
from types import SimpleNamespace
from unittest import mock

import pytest
import torch

from deep_ep_core.errors import CommTimeoutError, ConfigError
from deep_ep_engram.checks import FetchArgs, WriteArgs, out_of_range
from deep_ep_engram.collective import FINISH_WRITE
from deep_ep_engram.device.backend import DeviceBackend, _DeviceFetch
from deep_ep_engram.device.fetcher import FetchRequest

CUDA = torch.device("cuda", 3)
NUM_EACH = 20


class FakeEntries:
    """Stands for the entries of this rank on a GPU."""

    device, dtype, nbytes = CUDA, torch.bfloat16, NUM_EACH * 16

    def __len__(self) -> int:
        return NUM_EACH

    def size(self, _: int) -> int:
        return 8

    def element_size(self) -> int:
        return 2


class Parts:
    """What a backend of rank 0 of 2 works with. Notes calls, and the device that is current then."""

    rank, num_ranks, num_contexts = 0, 2, 1

    def __init__(self) -> None:
        self.calls: list[str] = []
        self.current: torch.device | None = None
        self.found: ConfigError | None = None
        self.failures: list[Exception] = []

    def begin(self, operation: str, _: object, values: list[list[int]] | None = None) -> SimpleNamespace:
        self.calls.append(operation)
        return SimpleNamespace(peer_values=values)

    def note(self, call: str) -> None:
        self.calls.append(f"{call} on {self.current}")
        if self.failures:
            raise self.failures.pop()

    def wait(self, _gets: object, _stream: int) -> None:
        self.note("wait")

    def launch(self, *_: object) -> None:
        self.note("launch")

    def check(self) -> None:
        """As that of the fetcher: raises once."""
        found, self.found = self.found, None
        if found is not None:
            raise found

    def do_nothing(self, *_: object) -> None: ...

    prepare = set_starts = set_entries = fill = do_nothing

    @contextlib.contextmanager
    def make_current(self, device: torch.device):
        before, self.current = self.current, device
        try:
            yield
        finally:
            self.current = before


@pytest.fixture
def parts():
    parts = Parts()
    with (
        mock.patch.object(torch.cuda, "device", parts.make_current),
        mock.patch.object(torch.cuda, "synchronize"),
        mock.patch.object(torch.cuda, "is_current_stream_capturing", return_value=False),
        mock.patch.object(torch.cuda, "current_stream", return_value=mock.Mock(cuda_stream=0)),
    ):
        yield parts


def make_backend(parts: Parts, network: object = None) -> DeviceBackend:
    return DeviceBackend(parts, parts, storage=parts, fetcher=parts, network=network, device=CUDA)


def write(backend: DeviceBackend) -> None:
    backend.write(WriteArgs(storage=FakeEntries(), sf=None))


def fetch(backend: DeviceBackend) -> None:
    indices = torch.zeros(1, 1, dtype=torch.int64)
    backend.fetch(FetchArgs(indices=indices, num_qps=0, use_tma_aligned_col_major_sf=False))


@pytest.mark.parametrize("num_writes", [1, 2])
def test_a_write_goes_on_after_a_wrong_index_and_the_next_call_tells(parts, num_writes):
    """Peers know nothing of the fetch, and would wait for the write."""
    backend = make_backend(parts)
    write(backend)
    parts.calls.clear()
    parts.found = out_of_range(0, 40, "77 at [0, 0] of engram_fetch #1")
    for _ in range(num_writes):
        write(backend)
    assert parts.calls == ["engram_write", FINISH_WRITE] * num_writes
    with pytest.raises(ConfigError, match=r"in \[0, 40\).*77 at \[0, 0\]"):
        fetch(backend)
    backend.check()


def test_what_a_write_keeps_of_a_wrong_index_holds_no_entries(parts):
    backend = make_backend(parts)
    parts.found = out_of_range(0, 40, "77 at [0, 0] of engram_fetch #1")
    write(backend)
    with pytest.raises(ConfigError) as told:
        backend.check()
    assert "write" not in [entry.name for entry in told.traceback]


def test_a_write_is_not_begun_where_entries_did_not_come(parts):
    late = CommTimeoutError("rank 1 is late", phase="the arrival of entries", rank=0, peers=[1])
    backend = make_backend(parts, mock.Mock(check=mock.Mock(side_effect=late)))
    with pytest.raises(CommTimeoutError):
        write(backend)
    assert parts.calls == []


def make_fetch(backend: DeviceBackend) -> _DeviceFetch:
    data = mock.Mock(device=torch.device("cpu"))
    indices = mock.Mock()
    request = FetchRequest(indices=indices, data=data, row_bytes=16, sf=None, out_sf=None, fetch_idx=1)
    return _DeviceFetch(backend, request, mock.Mock(), mock.Mock())


def test_what_came_over_the_network_is_copied_with_the_device_current(parts):
    """The default stream has the same handle on every device."""
    make_fetch(make_backend(parts, parts)).complete()
    assert parts.calls == ["wait on cuda:3", "launch on cuda:3"]
    assert parts.current is None


def test_a_hook_that_failed_does_not_give_what_has_not_come(parts):
    hook = make_fetch(make_backend(parts, parts))
    for _ in range(2):
        parts.failures = [RuntimeError("no launch")]
        with pytest.raises(RuntimeError, match="no launch"):
            hook()
    parts.calls.clear()
    assert hook().data is hook().data
    assert parts.calls == ["wait on cuda:3", "launch on cuda:3"]
