"""Which streams wait for which, and what is kept alive; streams are played. tests/cuda has real
ones."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch

from ep_backend import _native, comm_stream
from ep_backend.comm_stream import CommStream, NoStreams
from ep_backend.events import EventOverlap, check_overlap

DEVICE = torch.device("cuda", 0)


class CallersEvent:
    """As PyTorch's."""

    def __init__(self, gpu: Gpu) -> None:
        self.gpu = gpu

    def wait(self) -> None:
        self.gpu.log.append(f"{self.gpu.current.name} waits for an event")


class Event:
    """As ours; a test says when those have happened that somebody may ask for."""

    def __init__(self, gpu: Gpu) -> None:
        self.gpu, self.is_over = gpu, False

    def record(self, stream: int) -> None:
        self.recorded = self.gpu.names[stream]
        self.gpu.events.append(self)

    def wait(self, stream: int) -> None:
        self.gpu.log.append(f"{self.gpu.names[stream]} waits for {self.recorded}")

    def has_happened(self) -> bool:
        assert not self.gpu.captured, "no event may be asked while a graph is captured"
        return self.is_over


class Stream:
    def __init__(self, gpu: Gpu, name: str) -> None:
        self.name, self.cuda_stream = name, len(gpu.names)
        gpu.names.append(name)


class Tensor:
    def __init__(self) -> None:
        self.recorded: list[str] = []

    def record_stream(self, stream: Stream) -> None:
        self.recorded.append(stream.name)


class Gpu:
    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.log: list[str] = []
        self.events: list[Event] = []
        self.names: list[str] = []
        """Of streams, by their handles."""
        self.callers = self.current = Stream(self, "callers")
        self.captured: set[str] = set()
        """Streams in the graph that is captured."""
        cuda: Any = torch.cuda
        monkeypatch.setattr(cuda, "Stream", lambda *_, **__: Stream(self, "comm"))
        monkeypatch.setattr(cuda, "current_stream", lambda *_: self.current)
        monkeypatch.setattr(cuda, "is_current_stream_capturing", self.is_capturing)
        monkeypatch.setattr(cuda, "stream", self.stream)
        monkeypatch.setattr(comm_stream, "stream_of", lambda _: self.current.cuda_stream)
        monkeypatch.setattr(_native, "CudaEvent", lambda: Event(self), raising=False)

    @contextmanager
    def stream(self, stream: Stream) -> Iterator[None]:
        before, self.current = self.current, stream
        yield
        self.current = before

    def is_capturing(self) -> bool:
        return self.current.name in self.captured

    def take_log(self) -> list[str]:
        log, self.log = self.log, []
        return log


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> Gpu:
    return Gpu(monkeypatch)


def run(
    gpu: Gpu, streams: CommStream, previous: Any = None, async_finish: bool = False
) -> tuple[EventOverlap, Tensor]:
    """An operation that reads a tensor, which nobody else keeps, and makes one."""
    made: Any = Tensor()
    with streams.operation(previous, async_finish) as operation:
        gpu.log.append(f"runs on {gpu.current.name}")
        read: Any = Tensor()
        operation.reads(read, None)
        operation.writes(made)
    return operation.event, made


def num_kept(streams: CommStream) -> int:
    return sum(len(in_flight._read) for in_flight in streams._in_flight)


def test_who_asks_for_nothing_stays_on_the_current_stream(gpu: Gpu) -> None:
    event, made = run(gpu, CommStream(DEVICE))
    assert gpu.log == ["runs on callers"]
    assert event.event is None
    assert made.recorded == []


def test_without_a_previous_event_all_of_the_caller_comes_first(gpu: Gpu) -> None:
    streams = CommStream(DEVICE)
    event, made = run(gpu, streams, async_finish=True)
    assert gpu.take_log() == ["comm waits for callers", "runs on comm"]
    assert made.recorded == ["callers"]
    assert num_kept(streams) == 1
    event.current_stream_wait()
    assert gpu.take_log() == ["callers waits for comm"]
    assert num_kept(streams) == 0, "what the caller lets go of now, it writes to later"


def test_a_previous_event_is_all_that_is_waited_for(gpu: Gpu) -> None:
    streams, previous = CommStream(DEVICE), EventOverlap(CallersEvent(gpu))
    run(gpu, streams, previous)
    first = ["comm waits for callers"]  # which may have been given earlier operations
    rest = ["comm waits for an event", "runs on comm", "callers waits for comm"]
    assert gpu.take_log() == first + rest
    run(gpu, streams, previous)
    assert gpu.take_log() == rest


def test_an_event_that_nobody_waits_for_keeps_tensors_until_it_happens(gpu: Gpu) -> None:
    streams = CommStream(DEVICE)
    event, _ = run(gpu, streams, async_finish=True)
    with gpu.stream(Stream(gpu, "third")):
        event.current_stream_wait()
    run(gpu, streams, async_finish=True)
    assert num_kept(streams) == 2, "the caller's stream has not waited"
    in_flight: Any = streams._in_flight[0]
    in_flight._event.is_over = True
    run(gpu, streams, async_finish=True)
    assert num_kept(streams) == 2
    for happened in gpu.events:
        happened.is_over = True
    run(gpu, streams, async_finish=True)
    assert num_kept(streams) == 1
    streams.close()
    assert num_kept(streams) == 0


def test_operations_are_ordered_whatever_stream_each_is_on(gpu: Gpu) -> None:
    streams = CommStream(DEVICE)
    run(gpu, streams, async_finish=True)
    gpu.take_log()
    run(gpu, streams)
    assert gpu.take_log() == ["callers waits for comm", "runs on callers"]
    run(gpu, streams, EventOverlap(), async_finish=True)
    assert gpu.take_log() == ["comm waits for callers", "runs on comm"]
    run(gpu, streams, EventOverlap(), async_finish=True)
    assert gpu.take_log() == ["runs on comm"]


def test_in_a_graph_nothing_is_recorded_and_readers_come_first(gpu: Gpu) -> None:
    streams = CommStream(DEVICE)
    gpu.captured = {"callers"}
    previous = EventOverlap(CallersEvent(gpu))
    _, made = run(gpu, streams, previous, async_finish=True)
    assert gpu.take_log() == [
        "comm waits for callers",
        "comm waits for an event",
        "runs on comm",
    ]
    assert made.recorded == []
    event, _ = run(gpu, streams, previous, async_finish=True)
    assert num_kept(streams) == 2
    event.current_stream_wait()
    assert num_kept(streams) == 1
    gpu.captured.add("comm")  # it is, since it waits for one that is
    gpu.take_log()
    run(gpu, streams)
    assert gpu.take_log() == ["callers waits for comm", "runs on callers"]
    gpu.captured = {"callers"}
    run(gpu, streams)
    assert gpu.take_log() == ["runs on callers"], "the other stream is not in this graph"
    gpu.captured = set()
    run(gpu, streams)
    assert gpu.take_log() == ["runs on callers"], "what is in graphs comes with their replays"
    run(gpu, streams, async_finish=True)
    assert num_kept(streams) == 1, "the graph has been captured; its memory is its own"


def test_an_operation_that_only_launches_says_where_itself(gpu: Gpu) -> None:
    streams = CommStream(DEVICE)
    for previous, current in ((None, "callers"), (EventOverlap(), "comm")):
        with streams.operation(previous, True, only_launches=True) as operation:
            assert gpu.names[operation.stream] == "comm"
            assert gpu.current.name == current
    with streams.operation(only_launches=True) as operation:
        assert gpu.names[operation.stream] == "callers"


def test_an_operation_that_fails_is_waited_for(gpu: Gpu) -> None:
    streams = CommStream(DEVICE)

    def fail() -> None:
        with streams.operation(async_finish=True):
            raise ValueError("no")

    with pytest.raises(ValueError, match="no"):
        fail()
    assert gpu.log == ["comm waits for callers", "callers waits for comm"]


def test_on_a_cpu_an_event_is_waited_for_and_none_returned(gpu: Gpu) -> None:
    with NoStreams().operation(EventOverlap(CallersEvent(gpu)), True) as operation:
        pass
    assert gpu.log == ["callers waits for an event"]
    assert operation.event.event is None


@pytest.mark.parametrize(("previous", "is_async"), [(None, True), (EventOverlap(), False)])
def test_allocation_on_the_other_stream_needs_both(previous: Any, is_async: bool) -> None:
    check_overlap(EventOverlap(), True, True)
    with pytest.raises(ValueError, match="needs async_finish=True and a previous_event"):
        check_overlap(previous, is_async, True)
