"""The protocol of the device backend, played by ranks in one process, whose streams run in any order they may.

What a stream is given runs later, one step at a time, in an order that chance decides, as far as streams, words and
NCCL's rules for signals leave it open. So a wrong order, a slot that is used too early or a word that goes back shows.
"""

from __future__ import annotations

import ctypes
import random
from collections import defaultdict, deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import pytest

from deep_ep_core.align import align_up
from deep_ep_core.copy_engine import Copy
from deep_ep_core.window import ControlLayout
from deep_ep_pp.device.lanes import Lane
from deep_ep_pp.device.layout import Header, SlotLayout
from deep_ep_pp.device.links import DirectLink, NetworkLink, Part
from deep_ep_pp.device.receipts import Receipts
from deep_ep_pp.device.wiring import Wiring, slot_region, word_regions
from deep_ep_pp.sizing import PipelineConfig, peers_with_slots

SIZES = (0, 1, 31, 32, 33, 100)


class Clockwork:
    """All streams of all ranks, and the network between them."""

    def __init__(self, rng: random.Random) -> None:
        self._rng = rng
        # A step returns whether it could be done.
        self.queues: dict[object, deque[Callable[[], bool]]] = defaultdict(deque)

    def run(self) -> None:
        """Run until everything is done.

        Raises:
            AssertionError: What is left waits for each other.
        """
        while names := [name for name, queue in self.queues.items() if queue]:
            self._rng.shuffle(names)
            for name in names:
                if self.queues[name][0]():
                    self.queues[name].popleft()
                    break
            else:
                raise AssertionError(f"nothing can go on: {names}")

    def run_some(self, num_steps: int) -> None:
        """Run a few steps, as far as there are any that can be done."""
        for _ in range(num_steps):
            names = [name for name, queue in self.queues.items() if queue]
            name = self._rng.choice(names) if names else None
            if name is not None and self.queues[name][0]():
                self.queues[name].popleft()


class Memory:
    """A window of one rank; the others are found in `team`."""

    def __init__(self, layout: ControlLayout, rank: int, team: dict[int, Memory], reached: set[int]) -> None:
        self.layout = layout
        self.buffer = ctypes.create_string_buffer(layout.num_bytes + 8)
        self.address = align_up(ctypes.addressof(self.buffer), 8)
        self._team, self._reached = team, reached
        team[rank] = self

    def peer_address(self, rank: int, offset: int = 0) -> int | None:
        return self._team[rank].address + offset if rank in self._reached else None


def word(address: int) -> ctypes.c_int64:
    return ctypes.c_int64.from_address(address)


@dataclass
class Device:
    """Signals, copies and network of one rank, as steps of the clockwork."""

    rank: int
    clockwork: Clockwork
    rng: random.Random
    slots: dict[int, Memory] = field(default_factory=dict)
    words: dict[int, Memory] = field(default_factory=dict)

    def _add(self, stream: int, step: Callable[[], object]) -> None:
        self.clockwork.queues[self.rank, stream].append(lambda: step() is not False)

    def write(self, stream: int, address: int, value: int) -> None:
        def step() -> None:
            assert word(address).value < value or not self._is_word(address), "a count must grow"
            word(address).value = value

        self._add(stream, step)

    def write_all(self, stream: int, words: Sequence[tuple[int, int]]) -> None:
        for address, value in words:
            self.write(stream, address, value)

    def wait(self, stream: int, address: int, least: int, *, peer: int, phase: str) -> None:
        memory = self.words[self.rank]
        assert memory.address <= address < memory.address + memory.layout.num_bytes, "a rank waits on its own memory"
        self._add(stream, lambda: word(address).value >= least)

    def copy(self, stream: int, copies: Sequence[Copy]) -> None:
        for copy in self.rng.sample(list(copies), len(copies)):
            self._add(stream, lambda copy=copy: ctypes.memmove(copy.dst, copy.src, copy.num_bytes) and None)

    def put_and_signal(
        self, stream: int, peer: int, *, to_offset: int, from_offset: int, num_bytes: int, word_offset: int
    ) -> None:
        wire = self.clockwork.queues["network", self.rank, peer]

        def deliver() -> bool:
            target, source = self.slots[peer].address + to_offset, self.slots[self.rank].address + from_offset
            ctypes.memmove(target, source, num_bytes)
            return True

        def signal() -> bool:
            word(self.words[peer].address + word_offset).value += 1
            return True

        # Asked for at once, read and delivered some time later, in order for a strong signal.
        self._add(stream, lambda: wire.extend([deliver, signal]))

    def _is_word(self, address: int) -> bool:
        return any(
            memory.address <= address < memory.address + memory.layout.num_bytes for memory in self.words.values()
        )


class World:
    """Some ranks, with their windows and lanes."""

    def __init__(self, num_ranks: int, team_size: int, rng: random.Random, max_config: tuple[int, int]) -> None:
        self.num_ranks, self.rng = num_ranks, rng
        self.team_size = team_size
        self.clockwork = Clockwork(rng)
        self.words: dict[int, Memory] = {}
        self.slots: dict[int, Memory] = {}
        self.devices = [Device(rank, self.clockwork, rng, self.slots, self.words) for rank in range(num_ranks)]
        self.receipts = [Receipts(is_pinned=False) for _ in range(num_ranks)]
        self.num_sent = [[0] * num_ranks for _ in range(num_ranks)]
        self.num_received = [[0] * num_ranks for _ in range(num_ranks)]
        self.lanes: list[dict[int, Lane]] = []
        self.kept_alive: list[object] = []
        for rank in range(num_ranks):
            Memory(ControlLayout(word_regions(num_ranks)), rank, self.words, self._team_of(rank))
            largest = self._layout(rank, *max_config, num_ranks)
            Memory(ControlLayout([slot_region(largest)]), rank, self.slots, self._team_of(rank))

    def _team_of(self, rank: int) -> set[int]:
        first = rank - rank % self.team_size
        return set(range(first, first + self.team_size))

    def _config(self, rank: int, max_bytes: int, window: int, num_links: int) -> PipelineConfig:
        peers = peers_with_slots(rank, self.num_ranks, num_links)
        return PipelineConfig(num_max_tensor_bytes=max_bytes, num_max_inflight_tensors=window, peers=peers)

    def _layout(self, rank: int, max_bytes: int, window: int, num_links: int) -> SlotLayout:
        config = self._config(rank, max_bytes, window, num_links)
        has_stage = self.team_size < self.num_ranks
        return SlotLayout.of(config, rank=rank, num_ranks=self.num_ranks, has_stage=has_stage)

    def configure(self, max_bytes: int, window: int, num_links: int) -> None:
        self.clockwork.run()
        self.lanes = []
        for rank, device in enumerate(self.devices):
            layout = self._layout(rank, max_bytes, window, num_links)
            wiring = Wiring(
                rank=rank,
                num_ranks=self.num_ranks,
                words=self.words[rank],
                slots=self.slots[rank],
                layout=layout,
                signals=device,
                copy=device.copy,
                network=device,
            )
            peers = self._config(rank, max_bytes, window, num_links).peers
            self.lanes.append(wiring.lanes(peers, self.num_sent[rank]))

    def send(self, src: int, dst: int, payloads: list[bytes], stream: int = 0) -> None:
        self.num_sent[src][dst] += 1
        parts = [self._memory(payload) for payload in payloads]
        self.lanes[src][dst].send(stream, self.num_sent[src][dst], parts, operation="send")

    def recv(self, dst: int, src: int, sizes: list[int], stream: int = 0) -> list[Part]:
        self.num_received[dst][src] += 1
        number = self.num_received[dst][src]
        parts = [self._memory(b"\xee" * size) for size in sizes]
        receipt = self.receipts[dst].make(f"recv #{number} from {src}", src, number, sizes)
        self.lanes[dst][src].recv(stream, parts, receipt)
        self.receipts[dst].add(receipt)
        return parts

    def _memory(self, content: bytes) -> Part:
        memory = ctypes.create_string_buffer(content, max(len(content), 1))
        self.kept_alive.append(memory)
        return Part(ctypes.addressof(memory), len(content))


def read(part: Part) -> bytes:
    return ctypes.string_at(part.address, part.num_bytes)


def payload(rng: random.Random, size: int) -> bytes:
    return rng.randbytes(size)


@pytest.mark.parametrize(("num_ranks", "team_size"), [(2, 2), (4, 4), (3, 3), (2, 1), (4, 2), (6, 2)])
def test_random_messages_arrive_to_the_bit_in_any_order_of_streams(num_ranks, team_size):
    """Mixed sizes and peers, several tensors, windows that fill up, other configurations in between."""
    rng = random.Random(num_ranks * 10 + team_size)
    max_config = (4 * 128, 3)
    world = World(num_ranks, team_size, rng, max_config)
    for _ in range(60):
        window, num_links = rng.randint(1, 3), rng.choice([2, num_ranks])
        world.configure(4 * 128, window, num_links)
        expected: list[tuple[list[Part], list[bytes]]] = []
        # In this order nothing waits for ever, whichever stream is slow: no receive before its send.
        waiting: dict[tuple[int, int], deque[list[bytes]]] = defaultdict(deque)
        for _ in range(30):
            src = rng.randrange(num_ranks)
            dst = rng.choice(list(world.lanes[src]))
            queue = waiting[src, dst]
            if len(queue) < window and rng.random() < 0.7:
                payloads = [payload(rng, rng.choice(SIZES)) for _ in range(rng.choice((1, 1, 2, 4)))]
                world.send(src, dst, payloads)
                queue.append(payloads)
            elif queue:
                payloads = queue.popleft()
                expected.append((world.recv(dst, src, [len(one) for one in payloads]), payloads))
            world.clockwork.run_some(rng.randint(0, 20))
        for (src, dst), queue in waiting.items():
            for payloads in queue:
                expected.append((world.recv(dst, src, [len(one) for one in payloads]), payloads))
        world.clockwork.run()
        for parts, payloads in expected:
            assert [read(part) for part in parts] == payloads
        for receipts in world.receipts:
            assert receipts.next_wrong() is None
            assert not receipts.are_awaited
        world.kept_alive.clear()


@pytest.mark.parametrize("team_size", [1, 2])
def test_a_sender_ahead_of_the_window_waits_in_its_stream(team_size):
    """The host enqueues everything; the device holds back what has no slot."""
    rng = random.Random(team_size)
    world = World(2, team_size, rng, (128, 2))
    world.configure(128, 2, 2)
    payloads = [payload(rng, 100) for _ in range(7)]
    for one in payloads:
        world.send(0, 1, [one])
    with pytest.raises(AssertionError, match="nothing can go on"):
        world.clockwork.run()
    parts = [world.recv(1, 0, [100]) for _ in payloads]
    world.clockwork.run()
    assert [read(*part) for part in parts] == payloads


def test_ranks_that_send_and_then_receive_on_streams_of_their_own_do_not_stop_each_other():
    """Beyond the window, which one stream could not do."""
    rng = random.Random(3)
    world = World(2, 2, rng, (128, 1))
    world.configure(128, 1, 2)
    for rank in range(2):
        for idx in range(5):
            world.send(rank, 1 - rank, [bytes([rank, idx])], stream=0)
            world.recv(rank, 1 - rank, [2], stream=1)
    world.clockwork.run()
    assert not any(receipts.next_wrong() for receipts in world.receipts)


def test_other_sizes_are_told_with_both_and_what_follows_is_right():
    rng = random.Random(4)
    world = World(2, 2, rng, (128, 2))
    world.configure(128, 2, 2)
    world.send(0, 1, [b"abc", b"d"])
    world.send(0, 1, [b"right"])
    world.recv(1, 0, [3])
    part = world.recv(1, 0, [5])
    world.clockwork.run()
    found = world.receipts[1].next_wrong()
    assert found is not None
    assert (found.number, found.given, found.header) == (1, [3], Header(stamp=1, sizes=[3, 1]))
    assert world.receipts[1].next_wrong() is None
    assert read(*part) == b"right"


def test_a_message_that_a_sender_has_overwritten_is_told_by_its_number():
    """A sender whose wait expired goes on; its receiver, which is only slow, must not take the wrong message."""
    rng = random.Random(5)
    world = World(2, 2, rng, (128, 1))
    world.configure(128, 1, 2)
    world.send(0, 1, [b"first"])
    world.send(0, 1, [b"other"])
    credit = world.lanes[0][1].credit_address
    with pytest.raises(AssertionError, match="nothing can go on"):
        world.clockwork.run()
    word(credit).value = 1
    world.clockwork.run()
    word(credit).value = 0
    world.recv(1, 0, [5])
    world.clockwork.run()
    found = world.receipts[1].next_wrong()
    assert found is not None
    assert (found.number, found.header) == (1, Header(stamp=2, sizes=[5]))


def test_ranks_of_a_team_are_reached_directly_and_others_by_the_network():
    world = World(4, 2, random.Random(6), (128, 1))
    world.configure(128, 1, 4)
    for rank, lanes in enumerate(world.lanes):
        for peer, lane in lanes.items():
            assert isinstance(lane.link, DirectLink if peer // 2 == rank // 2 else NetworkLink)
