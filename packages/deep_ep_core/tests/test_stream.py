"""Events and stream scopes: on the CPU, where they wait for nothing, and on a GPU, where they order work.

A kernel that only spends time stands before the work that must be waited for, so that a wait that is missing shows.
"""

from __future__ import annotations

import gc
import threading
import weakref
from typing import ClassVar

import pytest
import torch

from deep_ep_core import cuda_streams
from deep_ep_core import stream as stream_module
from deep_ep_core.env import reset_env
from deep_ep_core.errors import ConfigError
from deep_ep_core.stream import CommScope, EventHandle, EventOverlap, NoEventError, StreamOptions, comm_stream

CPU = torch.device("cpu")
# About two seconds of a GPU that runs at 2 GHz.
LONG_CYCLES = 4_000_000_000
SHORT_CYCLES = 200_000_000


@pytest.fixture
def cuda():
    """The current CUDA device, with no work left on it before and after."""
    torch.cuda.synchronize()
    yield torch.device("cuda", torch.cuda.current_device())
    torch.cuda.synchronize()


@pytest.fixture
def second_cuda(cuda):
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two CUDA devices")
    return torch.device("cuda", 1 - cuda.index)


@pytest.fixture
def set_avoid_record_stream(monkeypatch):
    """Sets EP_AVOID_RECORD_STREAM for this process."""

    def set_to(text):
        monkeypatch.setenv("EP_AVOID_RECORD_STREAM", text)
        reset_env()

    yield set_to
    reset_env()


# EventHandle and EventOverlap


@pytest.mark.parametrize("device", [None, CPU])
def test_event_on_the_cpu_is_waited_for_at_once(device):
    event = EventHandle(device)
    event.current_stream_wait()
    event.wait_on(None)
    assert event.device == CPU
    assert "device=cpu" in repr(event)


def test_event_keeps_tensors_alive_as_long_as_it_lives():
    tensor = torch.ones(3)
    is_alive = weakref.ref(tensor)
    event = EventHandle(CPU, kept_tensors=[tensor])
    assert "kept_tensors=1" in repr(event)
    del tensor
    gc.collect()
    assert is_alive() is not None
    del event
    gc.collect()
    assert is_alive() is None


def test_wait_leaves_the_event_unless_it_is_released():
    overlap = EventOverlap(EventHandle(CPU))
    event = overlap.event
    overlap.current_stream_wait()
    assert overlap.event is event
    overlap.current_stream_wait(release_handle=True)
    assert overlap.event is None


def test_released_event_drops_its_tensors_but_not_the_extra_ones():
    kept, extra = torch.ones(3), torch.ones(3)
    is_kept_alive, is_extra_alive = weakref.ref(kept), weakref.ref(extra)
    overlap = EventOverlap(EventHandle(CPU, kept_tensors=[kept]), (extra,))
    del kept, extra
    gc.collect()
    assert is_kept_alive() is not None
    overlap.current_stream_wait(release_handle=True)
    gc.collect()
    assert is_kept_alive() is None
    assert is_extra_alive() is overlap.extra_tensors[0]


@pytest.mark.parametrize("error", [NoEventError, ConfigError, AssertionError, ValueError])
def test_wait_without_an_event_is_refused_in_words_that_help(error):
    """Callers of upstream catch AssertionError, callers of this library ConfigError."""
    with pytest.raises(error, match=r"holds none.*async_with_compute_stream=True.*released"):
        EventOverlap().current_stream_wait()


def test_wait_after_the_release_is_refused():
    overlap = EventOverlap(EventHandle(CPU))
    overlap.current_stream_wait(release_handle=True)
    with pytest.raises(NoEventError):
        overlap.current_stream_wait()


def test_hook_runs_once_after_the_next_wait():
    calls = []
    overlap = EventOverlap(EventHandle(CPU))
    overlap.register_hook_after_wait(lambda: calls.append(overlap.event is not None))
    assert calls == []
    overlap.current_stream_wait(release_handle=True)
    assert calls == [True], "the hook must run before the event is released"
    assert overlap.hook_after_wait is None


def test_hook_does_not_run_again():
    calls = []
    overlap = EventOverlap(EventHandle(CPU))
    overlap.register_hook_after_wait(lambda: calls.append(1))
    overlap.current_stream_wait()
    overlap.current_stream_wait()
    assert calls == [1]


def test_hook_does_not_run_where_the_wait_is_refused():
    overlap = EventOverlap()
    overlap.register_hook_after_wait(pytest.fail)
    with pytest.raises(NoEventError):
        overlap.current_stream_wait()
    assert overlap.hook_after_wait is pytest.fail


def test_second_pending_hook_is_refused_and_a_later_one_is_not():
    overlap = EventOverlap(EventHandle(CPU))
    overlap.register_hook_after_wait(int)
    with pytest.raises(ConfigError, match="at most one hook"):
        overlap.register_hook_after_wait(float)
    assert overlap.hook_after_wait is int
    overlap.current_stream_wait()
    overlap.register_hook_after_wait(float)
    assert overlap.hook_after_wait is float


def test_hook_may_register_the_next_one():
    overlap = EventOverlap(EventHandle(CPU))
    overlap.register_hook_after_wait(lambda: overlap.register_hook_after_wait(int))
    overlap.current_stream_wait()
    assert overlap.hook_after_wait is int


def test_hook_that_raises_is_cleared():
    def fail():
        raise KeyError("of the hook")

    overlap = EventOverlap(EventHandle(CPU))
    overlap.register_hook_after_wait(fail)
    with pytest.raises(KeyError):
        overlap.current_stream_wait()
    overlap.current_stream_wait()


def test_with_block_waits_when_it_ends():
    calls = []
    overlap = EventOverlap(EventHandle(CPU))
    overlap.register_hook_after_wait(lambda: calls.append("hook"))
    with overlap as entered:
        calls.append("block")
        assert entered is overlap
    assert calls == ["block", "hook"]
    assert overlap.event is not None


def test_with_block_without_an_event_waits_for_nothing():
    overlap = EventOverlap()
    overlap.register_hook_after_wait(pytest.fail)
    with overlap(release_handle=True):
        pass
    assert overlap.hook_after_wait is pytest.fail


def test_with_block_waits_and_releases_also_after_an_exception():
    calls = []
    overlap = EventOverlap(EventHandle(CPU))
    overlap.register_hook_after_wait(lambda: calls.append(1))
    with pytest.raises(KeyError), overlap(release_handle=True):
        raise KeyError("of the block")
    assert calls == [1]
    assert overlap.event is None


def test_call_returns_the_object_and_its_flag_is_good_for_one_block():
    overlap = EventOverlap(EventHandle(CPU))
    assert overlap(release_handle=True) is overlap
    with overlap:
        pass
    assert overlap.event is None
    overlap.event = EventHandle(CPU)
    with overlap:
        pass
    assert overlap.event is not None, "the flag must be forgotten when the block ends"


def test_flag_is_forgotten_also_where_there_was_no_event():
    overlap = EventOverlap()
    with overlap(release_handle=True):
        pass
    overlap.event = EventHandle(CPU)
    with overlap:
        pass
    assert overlap.event is not None


def test_last_call_decides_about_the_release():
    overlap = EventOverlap(EventHandle(CPU))
    with overlap(release_handle=True)():
        pass
    assert overlap.event is not None


# CommScope on the CPU


def test_comm_stream_of_the_cpu_is_one_object_that_takes_with_blocks():
    stream = comm_stream(CPU)
    assert stream is comm_stream(CPU)
    assert isinstance(stream, torch.cpu.Stream)
    with torch.cpu.stream(stream):
        pass


@pytest.mark.parametrize("is_async", [False, True])
def test_only_an_asynchronous_operation_returns_an_event(is_async):
    with CommScope(CPU, StreamOptions(async_with_compute_stream=is_async)) as scope:
        scope.wait_before_epilogue()
        overlap = scope.finish(inputs=[torch.ones(2), None], outputs=[torch.ones(2), None])
    assert type(overlap) is EventOverlap
    assert (overlap.event is not None) == is_async
    if is_async:
        overlap.current_stream_wait()


@pytest.mark.parametrize("make_event", [EventHandle, lambda: EventOverlap(EventHandle(CPU))])
def test_events_of_both_kinds_may_be_waited_for_on_the_cpu(make_event):
    options = StreamOptions(previous_event=make_event(), previous_event_before_epilogue=make_event())
    with CommScope(CPU, options) as scope:
        scope.wait_before_epilogue()
        scope.finish()


@pytest.mark.parametrize("name", ["previous_event", "previous_event_before_epilogue"])
def test_empty_event_to_wait_for_is_refused_on_every_device_before_the_operation(name):
    """It comes from a call that was not asynchronous; only a GPU would notice, and too late for its peers."""
    with pytest.raises(NoEventError, match=f"{name} must hold an event.*pass None"):
        StreamOptions(**{name: EventOverlap()})


def test_exception_passes_through_the_scope():
    with pytest.raises(KeyError), CommScope(CPU, StreamOptions()):
        raise KeyError("of the operation")


class FakeStream:
    def __init__(self, name: str) -> None:
        self.name, self.device_index = name, 0


class FakeEvent:
    """Notes where it is recorded and who waits for it, in `log`."""

    log: ClassVar[list[tuple[str, ...]]] = []

    def record(self, stream):
        self.stream = stream
        self.log.append(("record", stream.name))

    def wait(self, stream):
        self.log.append((stream.name, "waits for", self.stream.name))


class FakeTensor:
    is_cuda = True

    def __init__(self) -> None:
        self.recorded: list[str] = []

    def record_stream(self, stream):
        self.recorded.append(stream.name)


@pytest.fixture
def fake_cuda(monkeypatch):
    """A device of which only the order of calls is kept: a list of them, and the device."""
    streams = {"current": FakeStream("compute"), "comm": FakeStream("comm")}
    monkeypatch.setattr(torch.cuda, "Event", FakeEvent)
    monkeypatch.setattr(torch.cuda, "Stream", FakeStream)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "set_stream", lambda stream: streams.update(current=stream))
    monkeypatch.setattr(stream_module, "current_stream", lambda device_idx: streams["current"])
    monkeypatch.setattr(stream_module, "_comm_streams", {0: streams["comm"]})
    monkeypatch.setattr(cuda_streams, "_spare_events", {})
    monkeypatch.setattr(FakeEvent, "log", [])
    return FakeEvent.log, torch.device("cuda", 0)


@pytest.mark.parametrize("is_async", [False, True])
def test_a_tensor_is_recorded_on_the_stream_that_it_does_not_come_from(fake_cuda, set_avoid_record_stream, is_async):
    set_avoid_record_stream("0")
    _, device = fake_cuda
    given, made, both = FakeTensor(), FakeTensor(), FakeTensor()
    with CommScope(device, StreamOptions(async_with_compute_stream=is_async)) as scope:
        scope.finish(inputs=[given, None, both], outputs=[made, None, both])
    assert (given.recorded, made.recorded, both.recorded) == (["comm"], ["compute"], ["comm", "compute"])


def test_streams_wait_for_each_other_once_at_either_end(fake_cuda):
    log, device = fake_cuda
    with CommScope(device, StreamOptions()) as scope:
        assert (scope.compute_stream.name, scope.comm_stream.name) == ("compute", "comm")
        scope.finish()
    assert log == [
        ("record", "compute"),
        ("comm", "waits for", "compute"),
        ("record", "comm"),
        ("compute", "waits for", "comm"),
    ]
    assert (scope.compute_stream, scope.comm_stream) == (None, None)


def test_on_a_cpu_a_scope_has_no_streams():
    with CommScope(CPU, StreamOptions()) as scope:
        assert (scope.compute_stream, scope.comm_stream) == (None, None)
        assert (scope.stream_handle, scope.is_crossed) == (0, False)


def test_tensors_cross_streams_only_where_an_operation_has_one_of_its_own(fake_cuda):
    _, device = fake_cuda
    with CommScope(device, StreamOptions()) as scope:
        assert scope.is_crossed
    with CommScope(device, StreamOptions(), may_stay=True) as scope:
        assert not scope.is_crossed
    with CommScope(device, StreamOptions(async_with_compute_stream=True), may_stay=True) as scope:
        assert scope.is_crossed


# On a GPU


def late_ones(cycles=SHORT_CYCLES):
    """A tensor that is filled on the current stream, after a while."""
    tensor = torch.zeros(1024, device="cuda")
    torch.cuda._sleep(cycles)
    tensor.fill_(1)
    return tensor


def is_done(stream):
    """Whether a stream has no work left."""
    return stream.query()


@pytest.mark.gpu
def test_comm_stream_is_one_per_device_and_of_high_priority(cuda):
    streams = []
    threads = [threading.Thread(target=lambda: streams.append(comm_stream(cuda))) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(streams) == 8
    assert all(stream is streams[0] for stream in streams)
    assert comm_stream(torch.device("cuda")) is streams[0]
    assert streams[0].device == cuda
    assert streams[0].priority == -1
    assert streams[0] != torch.cuda.current_stream(cuda)


@pytest.mark.gpu
def test_bare_event_records_on_the_current_stream_of_the_current_device(cuda):
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        tensor = late_ones()
        event = EventHandle()
    assert event.device == cuda
    event.current_stream_wait()
    assert tensor.clone().min().item() == 1


@pytest.mark.gpu
def test_event_of_a_given_stream_is_waited_for_by_a_given_stream(cuda):
    first, second = torch.cuda.Stream(), torch.cuda.Stream()
    with torch.cuda.stream(first):
        tensor = late_ones()
    EventHandle(cuda, stream=first).wait_on(second)
    with torch.cuda.stream(second):
        copy = tensor.clone()
    second.synchronize()
    assert copy.min().item() == 1


@pytest.mark.gpu
def test_comm_stream_is_current_inside_and_the_caller_s_stream_is_afterwards(cuda):
    side = torch.cuda.Stream()
    for stream in (torch.cuda.default_stream(), side):
        with torch.cuda.stream(stream):
            with CommScope(cuda, StreamOptions()) as scope:
                assert torch.cuda.current_stream() == comm_stream(cuda)
                scope.finish()
            assert torch.cuda.current_stream() == stream


@pytest.mark.gpu
def test_caller_s_stream_is_current_again_after_an_exception(cuda):
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        with pytest.raises(KeyError), CommScope(cuda, StreamOptions()):
            raise KeyError("of the operation")
        assert torch.cuda.current_stream() == side


@pytest.mark.gpu
def test_caller_s_device_is_current_again_where_the_operation_is_on_another(cuda, second_cuda):
    before = torch.cuda.current_stream(cuda), torch.cuda.current_stream(second_cuda)
    with CommScope(second_cuda, StreamOptions()) as scope:
        assert torch.cuda.current_stream(second_cuda) == comm_stream(second_cuda)
        scope.finish()
    assert torch.cuda.current_device() == cuda.index
    assert (torch.cuda.current_stream(cuda), torch.cuda.current_stream(second_cuda)) == before


@pytest.mark.gpu
def test_call_from_the_comm_stream_is_refused_and_changes_nothing(cuda):
    with torch.cuda.stream(comm_stream(cuda)):
        with pytest.raises(ConfigError, match=r"stream of its own.*get_comm_stream"), CommScope(cuda, StreamOptions()):
            pytest.fail("the block must not run")
        assert torch.cuda.current_stream() == comm_stream(cuda)


@pytest.mark.gpu
def test_comm_stream_waits_for_the_current_stream(cuda):
    tensor = late_ones()
    with CommScope(cuda, StreamOptions(async_with_compute_stream=True)) as scope:
        copy = tensor.clone()
        overlap = scope.finish(inputs=[tensor], outputs=[copy])
    overlap.current_stream_wait()
    assert copy.min().item() == 1


@pytest.mark.gpu
@pytest.mark.parametrize("wrap", [lambda event: event, EventOverlap], ids=["handle", "overlap"])
def test_comm_stream_waits_for_the_previous_event_instead(cuda, wrap):
    """The event is on another stream and late; the current stream's tail is later still, and not waited for."""
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        tensor = late_ones()
        previous = EventHandle()
    torch.cuda._sleep(LONG_CYCLES)
    with CommScope(cuda, StreamOptions(previous_event=wrap(previous), async_with_compute_stream=True)) as scope:
        copy = tensor.clone()
        scope.finish(inputs=[tensor], outputs=[copy])
    comm_stream(cuda).synchronize()
    assert not is_done(torch.cuda.current_stream())
    assert copy.min().item() == 1


@pytest.mark.gpu
def test_only_the_epilogue_waits_for_its_event(cuda):
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        tensor = late_ones(LONG_CYCLES)
        previous = EventHandle()
    with CommScope(cuda, StreamOptions(previous_event_before_epilogue=previous)) as scope:
        comm_stream(cuda).synchronize()
        assert not is_done(side)
        scope.wait_before_epilogue()
        copy = tensor.clone()
        overlap = scope.finish(inputs=[tensor], outputs=[copy])
    assert overlap.event is None
    assert copy.min().item() == 1


@pytest.mark.gpu
def test_current_stream_waits_for_a_synchronous_operation(cuda):
    with CommScope(cuda, StreamOptions()) as scope:
        tensor = late_ones()
        overlap = scope.finish(outputs=[tensor])
    assert overlap.event is None
    assert tensor.clone().min().item() == 1


@pytest.mark.gpu
def test_current_stream_waits_for_an_asynchronous_operation_only_when_told(cuda):
    with CommScope(cuda, StreamOptions(async_with_compute_stream=True)) as scope:
        tensor = late_ones(LONG_CYCLES)
        overlap = scope.finish(outputs=[tensor])
    torch.cuda.current_stream().synchronize()
    assert not is_done(comm_stream(cuda))
    overlap.current_stream_wait()
    assert tensor.clone().min().item() == 1


def address_of_next_tensor_like_freed(device, is_async):
    """Free a tensor that the comm stream still uses; returns its address, and that of the next one of its size."""
    torch.cuda.empty_cache()
    num_bytes = 21 << 20
    tensor = torch.empty(num_bytes, dtype=torch.uint8, device=device)
    freed = tensor.data_ptr()
    with CommScope(device, StreamOptions(async_with_compute_stream=is_async)) as scope:
        torch.cuda._sleep(LONG_CYCLES)
        overlap = scope.finish(inputs=[tensor, None])
    is_alive = weakref.ref(tensor)
    del tensor, scope
    gc.collect()
    following = torch.empty(num_bytes, dtype=torch.uint8, device=device)
    assert not is_done(comm_stream(device))
    return freed, following.data_ptr(), is_alive, overlap


@pytest.mark.gpu
@pytest.mark.parametrize("is_async", [False, True])
def test_memory_is_not_reused_while_the_comm_stream_uses_it(cuda, set_avoid_record_stream, is_async):
    set_avoid_record_stream("0")
    freed, following, is_alive, _ = address_of_next_tensor_like_freed(cuda, is_async)
    assert following != freed
    assert is_alive() is None, "a recorded tensor needs no reference"


@pytest.mark.gpu
def test_event_keeps_tensors_alive_where_streams_are_not_recorded(cuda, set_avoid_record_stream):
    set_avoid_record_stream("1")
    freed, following, is_alive, overlap = address_of_next_tensor_like_freed(cuda, is_async=True)
    assert following != freed
    assert is_alive() is not None
    overlap.current_stream_wait(release_handle=True)
    gc.collect()
    assert is_alive() is None


@pytest.mark.gpu
def test_synchronous_operation_records_streams_in_any_case(cuda, set_avoid_record_stream):
    """It returns no event that could keep the tensors."""
    set_avoid_record_stream("1")
    freed, following, is_alive, _ = address_of_next_tensor_like_freed(cuda, is_async=False)
    assert following != freed
    assert is_alive() is None


@pytest.mark.gpu
def test_result_is_not_reused_by_the_comm_stream_while_the_current_stream_reads_it(cuda, set_avoid_record_stream):
    """Results come from the comm stream's pool, and are freed by a caller whose stream still reads them."""
    set_avoid_record_stream("0")
    num_bytes = 21 << 20
    with CommScope(cuda, StreamOptions()) as scope:
        result = torch.empty(num_bytes, dtype=torch.uint8, device=cuda)
        scope.finish(outputs=[result])
    torch.cuda._sleep(LONG_CYCLES)
    freed = result.data_ptr()
    del result, scope
    gc.collect()
    with torch.cuda.stream(comm_stream(cuda)):
        following = torch.empty(num_bytes, dtype=torch.uint8, device=cuda)
    assert not is_done(torch.cuda.current_stream())
    assert following.data_ptr() != freed
