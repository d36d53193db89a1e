"""What the device backend waits for, in which order, and what it tells other ranks; in one process, without a GPU."""

from __future__ import annotations

import contextlib
from types import SimpleNamespace

import pytest
import torch

from deep_ep_core.errors import CommTimeoutError, ConfigError, TransportError
from deep_ep_core.refusals import rejected
from deep_ep_pp.device import backend as device_backend
from deep_ep_pp.device.backend import DeviceBackend
from deep_ep_pp.device.layout import encode_header
from deep_ep_pp.device.receipts import Receipts
from deep_ep_pp.sizing import PipelineConfig

CONFIG = PipelineConfig(num_max_tensor_bytes=64, num_max_inflight_tensors=1, peers=(1,))
HERE = torch.device("cpu")


class World:
    """What a backend of rank 0 is made of here, and what happened, in order."""

    def __init__(self, is_peer_ready=True):
        self.events = []
        self.told = []
        self.is_peer_ready = is_peer_ready
        # The current stream.
        self.stream = None
        self.expired = None

    # The transport.

    rank, num_ranks = 0, 2

    def begin(self, _name, _fields, values):
        self.told.append(values)
        return SimpleNamespace(peer_values=[values[0], [int(self.is_peer_ready)]])

    # The lane to rank 1.

    def send(self, stream, _number, _parts, *, operation):
        self.events.append(f"{stream}: {operation}")

    def recv(self, stream, _parts, receipt):
        self.events.append(f"{stream}: {receipt.operation}")

    def wait_until_taken(self, _stream, number, *, operation):
        self.events.append(f"{operation}, {number}")

    # Signals.

    def check(self):
        if self.expired is not None:
            raise self.expired

    def check_usable(self, _stream):
        pass

    def abandon(self):
        self.events.append("abandon")

    # The network.

    def drain(self, _stream):
        self.events.append("drain")

    def close(self):
        self.events.append("close")


class FakeLedger:
    """As `Ledger`, for messages of rank 0 and rank 1."""

    def __init__(self, world):
        self.transport = world
        self.has_failed = False
        self.num_sent, self.num_received = [0, 0], [0, 0]
        self.configs = []

    def begin(self):
        return 0.0

    def agree(self, config):
        self.configs.append(config)

    def next_send(self, dst):
        return f"send {self.num_sent[dst] + 1}"

    def next_recv(self, src):
        return f"recv {self.num_received[src] + 1}"

    def other_sizes(self, operation, sizes, given, remedy):
        return rejected(0, f"{operation} must be given {sizes}", given, remedy)

    def fail(self, operation, peer, cause):
        self.has_failed = True
        raise cause


@pytest.fixture
def world(monkeypatch):
    """Streams are names, and events say what they stand behind."""
    world = World()

    class Event:
        def __init__(self, stream):
            self.stream = stream
            self.behind = next((event for event in reversed(world.events) if event.startswith(stream.name)), None)

        def wait_on(self, stream):
            world.events.append(f"{stream.name} behind {self.behind}")

    monkeypatch.setattr(torch.cuda, "device", lambda _device: contextlib.nullcontext())
    monkeypatch.setattr(device_backend, "RecordedEvent", Event)
    monkeypatch.setattr(device_backend, "current_stream", lambda _device_idx: world.stream)
    monkeypatch.setattr(device_backend, "_POLL_S", 0)
    return world


def stream(name):
    return SimpleNamespace(name=name, cuda_stream=name, query=lambda: True)


def make_backend(world, network=None):
    backend = object.__new__(DeviceBackend)
    backend._ledger = FakeLedger(world)
    backend._device, backend._device_idx = HERE, 0
    backend._is_closed, backend._has_waits = False, False
    backend._slots, backend._network, backend._words = None, network, contextlib.ExitStack()
    backend._lanes = {1: world}
    backend._receipts = Receipts(is_pinned=False)
    backend._send_ends, backend._recv_ends = {}, {}
    backend._own_stream = stream("own")
    backend._signals = world
    return backend


def expect(backend, given, came=None):
    """A receive that was made; with what came, or with nothing so far."""
    number = backend._ledger.num_received[1] = backend._ledger.num_received[1] + 1
    receipt = backend._receipts.make(f"pp_recv #{number} from rank 1", 1, number, given)
    backend._receipts.add(receipt)
    backend._has_waits = True
    if came is not None:
        deliver(receipt, came)
    return receipt


def deliver(receipt, sizes):
    for idx, word in enumerate(encode_header(receipt.number, sizes)):
        receipt.words[idx] = word


def test_a_message_on_another_stream_waits_for_the_one_before_and_not_for_what_came_on_its_stream_since(world):
    """Which may wait for the message itself: the peer may send it only once it has this one."""
    backend = make_backend(world)
    first, second = stream("s1"), stream("s2")
    x = torch.zeros(1)
    world.stream = first
    backend.send([x], 1)
    backend.recv([x], 1)
    world.stream = second
    backend.send([x], 1)
    backend.recv([x], 1)
    backend.send([x], 1)
    assert world.events == [
        "s1: send 1",
        "s1: recv 1",
        "s2 behind s1: send 1",
        "s2: send 2",
        "s2 behind s1: recv 1",
        "s2: recv 2",
        "s2: send 3",
    ]


def test_a_flush_waits_for_right_messages_behind_a_wrong_one_and_tells_then(world, monkeypatch):
    """Else a close would give up the right ones, and credits for them."""
    backend = make_backend(world, network=world)
    backend._ledger.num_sent[1] = 2
    world.stream = stream("s1")
    backend.recv([torch.zeros(4, dtype=torch.uint8)], 1)
    (wrong,) = backend._receipts._pending[1]
    deliver(wrong, [5])
    late = expect(backend, [7])
    sleeps = []

    def sleep(_seconds):
        sleeps.append(late.is_done)
        if len(sleeps) == 3:
            deliver(late, [7])

    monkeypatch.setattr(device_backend.time, "sleep", sleep)
    with pytest.raises(ConfigError, match=r"recv 1 must be given \[5\] \(got \[4\]"):
        backend.flush()
    assert sleeps == [False] * 3
    backend.close()
    assert world.events == [
        "s1: recv 1",
        "the flush of messages to rank 1, 2",
        "own behind s1: recv 1",
        "drain",
        # Signals and network, and nothing was abandoned.
        "close",
        "close",
    ]


def test_other_wrong_messages_are_told_by_later_calls_one_each(world):
    backend = make_backend(world)
    for size in (5, 6):
        expect(backend, [4], came=[size])
    for size in (5, 6):
        with pytest.raises(ConfigError, match=rf"must be given \[{size}\]"):
            backend.flush()
    backend.flush()


@pytest.mark.parametrize("came_first", [True, False], ids=["before the call", "while all wait"])
def test_other_sizes_are_told_to_all_ranks_that_configure_and_nothing_changes(world, monkeypatch, came_first):
    backend = make_backend(world)
    receipt = expect(backend, [4], came=[5] if came_first else None)
    monkeypatch.setattr(device_backend.time, "sleep", lambda _seconds: deliver(receipt, [5]))
    lanes = backend._lanes
    with pytest.raises(ConfigError, match=r"must be given \[5\]"):
        backend.configure(CONFIG)
    assert backend._ledger.configs == [CONFIG]
    assert world.told == [[[0], [0]]]
    assert backend._lanes is lanes


def test_a_rank_whose_messages_were_right_hears_that_another_one_failed(world):
    world.is_peer_ready = False
    backend = make_backend(world)
    expect(backend, [4], came=[4])
    lanes = backend._lanes
    with pytest.raises(TransportError, match=r"all ranks must have taken their messages \(got a failure on rank 1"):
        backend.configure(CONFIG)
    assert world.told == [[[1], [1]]]
    assert backend._lanes is lanes


def test_a_wait_that_expires_while_ranks_configure_is_told_to_all(world, monkeypatch):
    backend = make_backend(world)
    expect(backend, [4])
    error = CommTimeoutError("rank 1 is late", phase="pp_recv #1 from rank 1", rank=0, peers=[1])
    monkeypatch.setattr(device_backend.time, "sleep", lambda _seconds: setattr(world, "expired", error))
    with pytest.raises(CommTimeoutError, match="rank 1 is late"):
        backend.configure(CONFIG)
    assert world.told == [[[0], [0]]]
