from __future__ import annotations

import ctypes
import gc
import random
import threading
import weakref
from dataclasses import dataclass, field

import pytest
import torch

from deep_ep_core.errors import ConfigError
from deep_ep_core.free_ranges import Fence, FreeRange, FreeRanges
from deep_ep_core.heap import Heap, HeapFullError

CPU = torch.device("cpu")
ALIGNMENT = 256
A, B, C = 1, 2, 3


class Memory:
    """Host memory that begins at a multiple of 4096."""

    def __init__(self, num_bytes: int) -> None:
        self._buffer = ctypes.create_string_buffer(num_bytes + 4096)
        self.address = -(-ctypes.addressof(self._buffer) // 4096) * 4096


@dataclass
class FakeEvent:
    stream: int
    capture: int | None
    is_done: bool = False


@dataclass
class FakeOrder:
    """Streams as numbers. Events are done when a test says so; what CUDA forbids during a capture is asserted."""

    stream: int = A
    captures: dict[int, int] = field(default_factory=dict)
    events: list[FakeEvent] = field(default_factory=list)
    waits: list[tuple[int, FakeEvent]] = field(default_factory=list)

    def current(self) -> int:
        return self.stream

    def capture_of(self, stream: int) -> int | None:
        return self.captures.get(stream)

    def record(self, stream: int) -> FakeEvent:
        event = FakeEvent(stream, self.capture_of(stream))
        self.events.append(event)
        return event

    def is_done(self, event: FakeEvent) -> bool:
        assert event.capture is None, "an event in a graph cannot be queried"
        return event.is_done

    def wait(self, stream: int, event: FakeEvent) -> None:
        assert event.capture == self.capture_of(stream), "a wait must not cross the border of a capture"
        self.waits.append((stream, event))

    def finish(self, stream: int) -> None:
        """All work that a stream has is done."""
        for event in self.events:
            event.is_done |= event.stream == stream


class FakeStream:
    def __init__(self, number: int) -> None:
        self.cuda_stream = number


def make_heap(num_bytes: int = 4096, order: FakeOrder | None = None, **options) -> Heap:
    memory = Memory(num_bytes)
    return Heap(memory.address, num_bytes, CPU, memory, order=order, **options)


def full(heap: Heap) -> torch.Tensor:
    return heap.empty((heap.stats().num_bytes,), torch.uint8)


# --- The free parts ---


def always(free: FreeRange) -> int:
    return 0


def layout(ranges: FreeRanges) -> list[tuple[int, int]]:
    return [(free.offset, free.num_bytes) for free in ranges]


def test_the_smallest_range_that_fits_is_cut():
    ranges = FreeRanges(0)
    for offset, num_bytes in ((0, 50), (100, 20), (200, 30)):
        ranges.put(FreeRange(offset=offset, num_bytes=num_bytes))
    assert ranges.take(15, always).offset == 100
    assert ranges.take(25, always).offset == 200
    assert layout(ranges) == [(0, 50), (115, 5), (225, 5)]


def test_a_cheaper_range_wins_over_a_smaller_one():
    ranges = FreeRanges(0)
    ranges.put(FreeRange(offset=0, num_bytes=50))
    ranges.put(FreeRange(offset=100, num_bytes=20))
    assert ranges.take(10, lambda free: free.offset).offset == 0
    assert ranges.take(10, lambda free: None if free.offset < 100 else 0).offset == 100


def test_neighbours_join_on_both_sides():
    ranges = FreeRanges(0)
    for offset in (0, 20, 10):
        ranges.put(FreeRange(offset=offset, num_bytes=10))
    assert layout(ranges) == [(0, 30)]


def test_neighbours_of_different_captures_stay_apart():
    ranges = FreeRanges(0)
    for offset, capture in ((0, None), (20, None), (10, 7)):
        ranges.put(FreeRange(offset=offset, num_bytes=10, capture=capture))
    assert layout(ranges) == [(0, 10), (10, 10), (20, 10)]


def test_joined_ranges_keep_the_later_fence_of_each_stream():
    ranges = FreeRanges(0)
    ranges.put(FreeRange(offset=0, num_bytes=10, fences={A: Fence(1, "a1"), B: Fence(4, "b4")}))
    ranges.put(FreeRange(offset=10, num_bytes=10, fences={A: Fence(3, "a3"), B: Fence(2, "b2"), C: Fence(5, "c5")}))
    (joined,) = ranges
    assert joined.fences == {A: Fence(3, "a3"), B: Fence(4, "b4"), C: Fence(5, "c5")}


def test_both_parts_of_a_cut_range_keep_its_fences():
    ranges = FreeRanges(0)
    ranges.put(FreeRange(offset=0, num_bytes=20, fences={A: Fence(1, "a")}))
    taken = ranges.take(5, always)
    (rest,) = ranges
    assert taken.fences == rest.fences == {A: Fence(1, "a")}
    taken.fences.clear()
    assert rest.fences == {A: Fence(1, "a")}


# --- Handing out and taking back ---


@pytest.mark.parametrize("seed", range(4))
def test_random_use_agrees_with_a_map_of_bytes(seed):
    """No two live tensors overlap, nothing is lost, values stay, and the largest free region is what the map says."""
    rng = random.Random(seed)
    num_bytes = 64 * 1024
    heap = make_heap(num_bytes)
    owner_of_unit = [0] * (num_bytes // ALIGNMENT)
    live: dict[int, tuple[torch.Tensor, range]] = {}
    for key in range(1, 1200):
        if live and rng.random() < 0.48:
            gone, (tensor, units) = live.popitem() if rng.random() < 0.3 else _pop_any(live, rng)
            assert (tensor == gone % 251).all()
            assert {owner_of_unit[unit] for unit in units} == {gone}
            for unit in units:
                owner_of_unit[unit] = 0
            del tensor
        else:
            size = rng.choice([1, 31, 255, 256, 257, 1000, 5000, rng.randrange(1, 20_000)])
            num_units = -(-size // ALIGNMENT)
            tensor = heap.try_empty((size,), torch.uint8)
            if tensor is None:
                assert _largest_gap(owner_of_unit) < num_units
                continue
            offset = heap.offset_of(tensor)
            assert offset % ALIGNMENT == 0
            units = range(offset // ALIGNMENT, offset // ALIGNMENT + num_units)
            assert all(owner_of_unit[unit] == 0 for unit in units)
            for unit in units:
                owner_of_unit[unit] = key
            live[key] = (tensor.fill_(key % 251), units)
        stats = heap.stats()
        assert stats.num_regions == len(live)
        assert stats.used_bytes == ALIGNMENT * sum(owner != 0 for owner in owner_of_unit)
        assert stats.used_bytes + stats.free_bytes == stats.num_bytes
        assert stats.largest_free_bytes == ALIGNMENT * _largest_gap(owner_of_unit)
    live.clear()
    tensor = None
    stats = heap.stats()
    assert (stats.used_bytes, stats.largest_free_bytes) == (0, num_bytes)
    assert stats.peak_used_bytes > num_bytes // 2


def _pop_any(live: dict, rng: random.Random):
    key = rng.choice(list(live))
    return key, live.pop(key)


def _largest_gap(owner_of_unit: list[int]) -> int:
    best = run = 0
    for owner in owner_of_unit:
        run = run + 1 if owner == 0 else 0
        best = max(best, run)
    return best


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float8_e4m3fn, torch.int64, torch.bool])
@pytest.mark.parametrize("shape", [(3, 5), (7,), (2, 0, 4), ()])
def test_a_tensor_has_the_shape_and_dtype_asked_for(shape, dtype):
    heap = make_heap()
    tensor = heap.empty(shape, dtype)
    assert (tensor.shape, tensor.dtype, tensor.is_contiguous()) == (shape, dtype, True)
    assert heap.offset_of(tensor) == 0


@pytest.mark.parametrize("alignment", [1, 16, 256, 4096])
def test_every_tensor_is_aligned(alignment):
    heap = make_heap(65536, alignment=alignment)
    tensors = [heap.empty((size,), torch.uint8) for size in (1, 3, 4097, 255)]
    assert all(tensor.data_ptr() % alignment == 0 for tensor in tensors)


@pytest.mark.parametrize("alignment", [0, 3, 8192])
def test_an_alignment_that_cannot_be_is_refused(alignment):
    memory = Memory(8192)
    with pytest.raises(ConfigError, match="power of two that divides its address"):
        Heap(memory.address // 8192 * 8192 + 4096, 4096, CPU, memory, alignment=alignment)


def test_an_offset_counts_from_the_first_byte_of_the_heap_to_the_first_element_of_the_view():
    heap = make_heap()
    first, second = heap.empty((10,), torch.uint8), heap.empty((8, 4), torch.float32)
    assert (heap.offset_of(first), heap.offset_of(second)) == (0, 256)
    assert heap.offset_of(second[2:, 1:]) == 256 + (2 * 4 + 1) * 4
    assert heap.offset_of(torch.empty(4)) is None


def test_a_region_is_free_when_the_last_view_dies_and_not_before():
    heap = make_heap()
    view = full(heap).view(torch.int32)[5:]
    assert heap.try_empty((1,), torch.uint8) is None
    del view
    assert full(heap) is not None


def test_a_full_heap_says_what_it_has_and_what_was_asked_for():
    heap = make_heap(4096)
    _kept = [heap.empty((1024,), torch.uint8) for _ in range(3)]
    with pytest.raises(HeapFullError) as caught:
        heap.empty((1000, 2), torch.float32)
    message = str(caught.value)
    assert "8000 bytes for [1000, 2] torch.float32" in message
    assert "of 4096 bytes 3072 are used by 3 tensors" in message
    assert "largest free region has 1024" in message


def test_the_rest_of_a_heap_below_its_alignment_is_not_used():
    heap = make_heap(1000)
    assert heap.stats().num_bytes == 768
    assert full(heap).numel() == 768


def test_a_closed_heap_hands_out_nothing_and_keeps_what_lives():
    memory = Memory(4096)
    owner = weakref.ref(memory)
    heap = Heap(memory.address, 4096, CPU, memory)
    tensor = heap.empty((16,), torch.int64).fill_(7)
    heap.close()
    heap.close()
    with pytest.raises(ConfigError, match="it is closed; make a new one"):
        heap.empty((1,), torch.uint8)
    del heap, memory
    gc.collect()
    assert owner() is not None
    assert tensor.sum() == 7 * 16
    del tensor
    gc.collect()
    assert owner() is None


def test_a_closed_heap_without_tensors_lets_its_memory_go_at_once():
    memory = Memory(4096)
    owner = weakref.ref(memory)
    heap = Heap(memory.address, 4096, CPU, memory)
    tensor = heap.empty((16,), torch.int64)
    del memory, tensor
    heap.stats()
    heap.close()
    gc.collect()
    assert owner() is None


def test_a_tensor_keeps_heap_memory_alive_though_the_heap_was_dropped():
    heap = make_heap()
    tensor = heap.empty((16,), torch.int64).fill_(3)
    del heap
    gc.collect()
    assert tensor.sum() == 48


def test_garbage_that_dies_while_the_heap_works_does_no_harm():
    """A cycle that holds a tensor is collected at any allocation, also at those of the heap itself."""
    heap = make_heap(64 * ALIGNMENT)
    thresholds = gc.get_threshold()
    gc.set_threshold(1)
    try:
        for _ in range(300):
            cycle = [heap.empty((ALIGNMENT,), torch.uint8)]
            cycle.append(cycle)
            del cycle
    finally:
        gc.set_threshold(*thresholds)
    gc.collect()
    assert heap.stats().used_bytes == 0


@pytest.mark.timeout(60)
def test_a_tensor_may_die_while_the_death_of_another_is_dealt_with():
    """As when the garbage collector runs inside the recording of an event."""

    class Order(FakeOrder):
        def record(self, stream: int) -> FakeEvent:
            victims.clear()
            return super().record(stream)

    order = Order()
    heap = make_heap(4 * ALIGNMENT, order=order)
    victims: list[torch.Tensor] = []
    tensor, victim = (heap.empty((ALIGNMENT,), torch.uint8) for _ in range(2))
    victims.append(victim)
    del victim
    del tensor
    assert victims == []
    assert heap.stats().used_bytes == 0
    order.stream = B
    full(heap)
    assert [(stream, event.stream) for stream, event in order.waits] == [(B, A)]
    # The event of the one that had to wait was recorded later, and covers both.
    assert order.waits[0][1] is order.events[1]


def test_threads_share_a_heap():
    heap = make_heap(256 * ALIGNMENT)
    wrong = []

    def work(value: int) -> None:
        for _ in range(150):
            tensor = heap.empty((700,), torch.uint8).fill_(value)
            if not (tensor == value).all():
                wrong.append(value)

    threads = [threading.Thread(target=work, args=(value,)) for value in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []
    assert heap.stats().used_bytes == 0


# --- Streams ---


def test_the_stream_that_used_a_region_has_it_again_without_waiting():
    order = FakeOrder()
    heap = make_heap(order=order)
    full(heap)
    full(heap)
    assert order.waits == []


def test_another_stream_waits_for_the_event_behind_the_last_use():
    order = FakeOrder(stream=A)
    heap = make_heap(order=order)
    tensor = full(heap)
    del tensor
    (event,) = order.events
    order.stream = B
    full(heap)
    assert order.waits == [(B, event)]


def test_another_stream_does_not_wait_for_an_event_that_is_done():
    order = FakeOrder(stream=A)
    heap = make_heap(order=order)
    full(heap)
    order.finish(A)
    order.stream = B
    full(heap)
    assert order.waits == []


def test_the_event_stands_where_the_view_died_not_where_the_region_is_taken_again():
    """What a stream is given later must not delay another one."""
    order = FakeOrder(stream=A)
    heap = make_heap(order=order)
    tensor = full(heap)
    assert order.events == []
    del tensor
    assert [event.stream for event in order.events] == [A]


def test_the_stream_that_is_current_where_a_view_dies_counts_as_a_user():
    order = FakeOrder(stream=A)
    heap = make_heap(order=order)
    tensor = full(heap)
    order.stream = B
    del tensor
    order.stream = A
    full(heap)
    assert [(stream, event.stream) for stream, event in order.waits] == [(A, B)]


def test_a_recorded_stream_is_waited_for():
    order = FakeOrder(stream=A)
    heap = make_heap(order=order)
    tensor = full(heap)
    heap.record_stream(tensor.view(torch.int32)[4:], FakeStream(C))
    del tensor
    full(heap)
    assert [(stream, event.stream) for stream, event in order.waits] == [(A, C)]


def test_a_tensor_from_elsewhere_cannot_be_recorded():
    with pytest.raises(ConfigError, match="needs a tensor of this heap"):
        make_heap().record_stream(torch.empty(4), FakeStream(A))


def test_a_region_that_needs_no_wait_is_preferred_to_a_smaller_one_that_does():
    order = FakeOrder(stream=A)
    heap = make_heap(8 * ALIGNMENT, order=order)
    small, wall = heap.empty((ALIGNMENT,), torch.uint8), heap.empty((ALIGNMENT,), torch.uint8)
    del small
    order.stream = B
    tensor = heap.empty((ALIGNMENT,), torch.uint8)
    assert heap.offset_of(tensor) == 2 * ALIGNMENT
    assert order.waits == []
    rest = heap.empty((5 * ALIGNMENT,), torch.uint8)
    tensor = heap.empty((ALIGNMENT,), torch.uint8)
    assert [stream for stream, _ in order.waits] == [B]
    del wall, rest


def test_of_two_uses_by_a_stream_the_later_one_is_waited_for():
    order = FakeOrder(stream=A)
    heap = make_heap(2 * ALIGNMENT, order=order)
    first, second = (heap.empty((ALIGNMENT,), torch.uint8) for _ in range(2))
    del second
    del first
    order.stream = B
    full(heap)
    assert order.waits == [(B, order.events[1])]


def test_a_stream_that_has_waited_does_not_wait_again_for_what_was_dropped_before():
    order = FakeOrder(stream=A)
    heap = make_heap(2 * ALIGNMENT, order=order)
    first, second = (heap.empty((ALIGNMENT,), torch.uint8) for _ in range(2))
    del first
    del second
    order.stream = B
    _kept = [heap.empty((ALIGNMENT,), torch.uint8) for _ in range(2)]
    assert order.waits == [(B, order.events[1])]


def test_a_wait_says_nothing_of_what_is_dropped_later():
    order = FakeOrder(stream=A)
    heap = make_heap(order=order)
    full(heap)
    order.stream = B
    full(heap)
    order.stream = A
    full(heap)
    order.stream = B
    full(heap)
    assert [(stream, event.stream) for stream, event in order.waits] == [(B, A), (A, B), (B, A)]
    assert order.waits[0][1] is not order.waits[2][1]


def test_a_wait_of_one_stream_does_not_count_for_another():
    order = FakeOrder(stream=A)
    heap = make_heap(2 * ALIGNMENT, order=order)
    first, second = (heap.empty((ALIGNMENT,), torch.uint8) for _ in range(2))
    del first
    del second
    for order.stream in (B, C):
        kept = heap.empty((ALIGNMENT,), torch.uint8)
        assert [stream for stream, event in order.waits if event.stream == A][-1] == order.stream
    del kept


def test_a_region_that_dies_on_another_stream_each_time_is_waited_for_each_time():
    """The way of every result: made on the communication stream, dropped by a caller on a stream of his own."""
    order = FakeOrder()
    heap = make_heap(order=order)
    for _ in range(3):
        order.stream = A
        tensor = full(heap)
        order.stream = B
        del tensor
    of_b = [event for event in order.events if event.stream == B]
    assert order.waits == [(A, of_b[0]), (A, of_b[1])]


def test_a_request_takes_the_region_of_its_size_that_came_back_last():
    heap = make_heap(order=FakeOrder())
    tensors = [heap.empty((ALIGNMENT,), torch.uint8) for _ in range(7)]
    offsets = [heap.offset_of(tensor) for tensor in tensors]
    for idx in (1, 5, 3):
        tensors[idx] = None
    taken = [heap.empty((ALIGNMENT,), torch.uint8) for _ in range(3)]
    assert [heap.offset_of(tensor) for tensor in taken] == [offsets[3], offsets[5], offsets[1]]


def test_a_region_of_the_right_size_that_needs_a_wait_does_not_hide_one_that_needs_none():
    order = FakeOrder(stream=B)
    heap = make_heap(3 * ALIGNMENT, order=order)
    of_b = heap.empty((ALIGNMENT,), torch.uint8)
    order.stream = A
    of_a, wall = (heap.empty((ALIGNMENT,), torch.uint8) for _ in range(2))
    offset_of_b = heap.offset_of(of_b)
    order.stream = B
    del of_b
    order.stream = A
    del of_a
    order.stream = B
    tensor = heap.empty((ALIGNMENT,), torch.uint8)
    assert (heap.offset_of(tensor), order.waits) == (offset_of_b, [])
    del wall


# --- Graphs ---


def test_memory_of_a_graph_is_not_used_outside_of_it():
    order = FakeOrder(stream=A, captures={A: 7})
    heap = make_heap(order=order)
    tensor = heap.empty((1024,), torch.uint8)
    del tensor
    order.captures.clear()
    assert heap.try_empty((4096,), torch.uint8) is None
    outside = heap.empty((3072,), torch.uint8)
    assert heap.offset_of(outside) == 1024
    stats = heap.stats()
    assert (stats.graph_bytes, stats.free_bytes, stats.used_bytes) == (1024, 0, 3072)


def test_memory_of_a_graph_is_not_used_by_another_graph():
    order = FakeOrder(stream=A, captures={A: 7})
    heap = make_heap(order=order)
    full(heap)
    order.captures[A] = 8
    assert heap.try_empty((1,), torch.uint8) is None


def test_memory_is_used_again_inside_one_capture_in_the_graphs_own_order():
    order = FakeOrder(stream=A, captures={A: 7, B: 7})
    heap = make_heap(order=order)
    full(heap)
    full(heap)
    assert order.waits == []
    order.stream = B
    full(heap)
    assert [(stream, event.stream, event.capture) for stream, event in order.waits] == [(B, A, 7)]


def test_a_capture_takes_no_memory_that_is_still_in_use():
    """A graph may be replayed on any stream, so the order of this one is no help."""
    order = FakeOrder(stream=A)
    heap = make_heap(order=order)
    full(heap)
    order.captures[A] = 7
    assert heap.try_empty((1,), torch.uint8) is None
    order.captures.clear()
    order.finish(A)
    order.captures[A] = 7
    assert heap.try_empty((1,), torch.uint8) is not None
    assert order.waits == []


def test_a_region_that_dies_during_a_capture_is_free_after_it():
    order = FakeOrder(stream=A)
    heap = make_heap(order=order)
    tensor = full(heap)
    order.captures[A] = 7
    del tensor
    assert heap.try_empty((1,), torch.uint8) is None
    order.captures.clear()
    assert heap.try_empty((1,), torch.uint8) is not None
    assert all(event.capture is None for event in order.events)


def test_a_region_of_a_graph_that_dies_after_the_capture_stays_with_the_graph():
    order = FakeOrder(stream=A, captures={A: 7})
    heap = make_heap(order=order)
    tensor = heap.empty((1024,), torch.uint8)
    order.captures.clear()
    del tensor
    assert heap.stats().graph_bytes == 1024
    order.captures[A] = 7
    outside = heap.empty((1,), torch.uint8)
    assert heap.offset_of(outside) == 1024


def test_a_wait_inside_a_graph_says_nothing_of_work_outside_of_it():
    """It orders replays; the stream itself has waited for nothing."""
    order = FakeOrder(stream=A)
    heap = make_heap(3 * ALIGNMENT, order=order)
    outside, wall = (heap.empty((ALIGNMENT,), torch.uint8) for _ in range(2))
    del outside
    order.captures = {A: 7, B: 7}
    heap.empty((ALIGNMENT,), torch.uint8)
    order.stream = B
    heap.empty((ALIGNMENT,), torch.uint8)
    assert [(stream, event.capture) for stream, event in order.waits] == [(B, 7)]
    order.captures.clear()
    heap.empty((ALIGNMENT,), torch.uint8)
    assert [(stream, event.stream, event.capture) for stream, event in order.waits[1:]] == [(B, A, None)]
    del wall


def test_a_capture_gets_what_the_same_stream_used_before_it():
    """As in a warm-up on the stream that is captured next. Asked then, CUDA could say nothing of that stream's work.

    From then on it is the graph's.
    """
    order = FakeOrder(stream=A)
    heap = make_heap(order=order)
    for _ in range(2):
        full(heap)
    order.finish(A)
    order.captures[A] = 7
    tensor = full(heap)
    del tensor
    order.captures.clear()
    assert heap.try_empty((1,), torch.uint8) is None
    assert heap.stats().graph_bytes == 4096


def test_a_wait_of_a_stream_does_not_let_a_capture_of_it_in():
    """The graph may be replayed on a stream that has not waited."""
    order = FakeOrder(stream=A)
    heap = make_heap(2 * ALIGNMENT, order=order)
    first, second = (heap.empty((ALIGNMENT,), torch.uint8) for _ in range(2))
    del first
    del second
    order.stream = B
    tensor = heap.empty((ALIGNMENT,), torch.uint8)
    order.captures[B] = 7
    assert heap.try_empty((ALIGNMENT,), torch.uint8) is None
    del tensor


# --- Reservations ---


def test_a_reservation_is_taken_in_part_and_the_rest_goes_back():
    heap = make_heap(4096)
    reservation = heap.try_reserve(4096)
    assert heap.try_empty((1,), torch.uint8) is None
    tensor = reservation.take((5, 60), torch.int32)
    assert heap.offset_of(tensor) == reservation.offset == 0
    assert heap.stats().used_bytes == 1280
    rest = heap.empty((4096 - 1280,), torch.uint8)
    assert heap.offset_of(rest) == 1280
    del tensor, rest, reservation
    assert heap.stats().free_bytes == 4096


def test_what_lies_behind_a_taken_tensor_waits_for_the_stream_that_reserved():
    order = FakeOrder()
    heap = make_heap(1024, order=order)
    reservation = heap.try_reserve(1024)
    tensor = reservation.take((256,), torch.uint8)
    order.stream = B
    rest = heap.empty((768,), torch.uint8)
    assert [(stream, event.stream) for stream, event in order.waits] == [(B, A)]
    del tensor, rest


def test_a_place_that_is_reserved_again_and_again_stays_in_one_piece():
    """Else each round would cost an event more, and a search for two pieces to join."""
    order = FakeOrder()
    heap = make_heap(4096, order=order)
    for num_rounds in range(1, 4):
        reservation = heap.try_reserve(1024)
        assert reservation.offset == 0
        tensor = reservation.take((256,), torch.uint8)
        del tensor
        assert len(order.events) == num_rounds


def test_what_lies_behind_a_tensor_that_died_is_cut_off_no_more():
    heap = make_heap(1024)
    tensor = heap.try_reserve(1024).take((256,), torch.uint8)
    del tensor
    whole = heap.empty((1024,), torch.uint8)
    assert heap.try_empty((1,), torch.uint8) is None
    assert heap.stats().used_bytes == 1024
    del whole


def test_a_reservation_that_is_dropped_goes_back_whole():
    heap = make_heap(1024)
    reservation = heap.try_reserve(1000)
    del reservation
    assert heap.stats().free_bytes == 1024


def test_a_reservation_is_taken_once_and_not_beyond_its_size():
    heap = make_heap(1024)
    reservation = heap.try_reserve(512)
    with pytest.raises(ConfigError, match="must fit in its reservation of 512 bytes"):
        reservation.take((513,), torch.uint8)
    tensor = reservation.take((0, 7), torch.float32)
    assert tensor.shape == (0, 7)
    with pytest.raises(ConfigError, match="can be taken once"):
        reservation.take((1,), torch.uint8)
    del tensor
    assert heap.stats().free_bytes == 1024


def test_a_reservation_of_a_capture_stays_with_its_graph():
    order = FakeOrder(captures={A: 7})
    heap = make_heap(1024, order=order)
    tensor = heap.try_reserve(1024).take((256,), torch.uint8)
    del tensor
    order.captures.clear()
    assert heap.try_empty((1,), torch.uint8) is None
    assert heap.stats().graph_bytes == 1024


def test_reserve_gives_a_region_or_says_what_there_is():
    heap = make_heap(1024)
    kept = heap.reserve(1024)
    assert kept.offset == 0
    with pytest.raises(HeapFullError, match=r"a free region of 256 bytes for \[256\] torch.uint8"):
        heap.reserve(256)
    del kept
    assert heap.reserve(1024).offset == 0
