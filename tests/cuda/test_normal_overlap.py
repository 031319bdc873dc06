"""Normal calls on a stream of their own: what runs beside what, and whose memory is whose. There is
one rank, and a stream is held up where a test wants it; that ranks find each other on such streams
is in test_normal.py."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from ep_backend import virtual_world
from ep_backend.comm_stream import CommStream
from ep_backend.events import EventHandle, EventOverlap
from ep_backend.normal_cuda import CudaNormalBuffer
from tests.support.normal import NormalShape
from tests.support.normal_cuda import CudaNormalShape

T, H, K = 300, 1024, 2
LONG_CYCLES = 400_000_000
"""Of the GPU: a fifth of a second, in which the host gets far ahead."""


@pytest.fixture
def buffer() -> CudaNormalBuffer:
    shape = CudaNormalShape(NormalShape(1, hidden=H, num_experts=4, top_k=K), num_rows=2 * T)
    (buffer,) = virtual_world(1).run(lambda group: shape.buffer(group))
    for events in ({}, dict(async_finish=True)):  # loads all kernels, PyTorch's too
        check(buffer, run_pair(buffer, rows(0) + 1, events).clone(), 1)
    return buffer


def rows(value: float) -> torch.Tensor:
    return torch.full((T, H), value, dtype=torch.bfloat16, device="cuda")


def routing() -> tuple[torch.Tensor, torch.Tensor]:
    idx = torch.arange(K, device="cuda").expand(T, K).contiguous()
    return idx, torch.ones((T, K), device="cuda")


def now() -> EventOverlap:
    return EventOverlap(EventHandle())


def stream_of(buffer: CudaNormalBuffer) -> torch.cuda.Stream:
    assert isinstance(buffer._streams, CommStream)
    return buffer._streams.stream


def hold_up(stream: torch.cuda.Stream) -> None:
    with torch.cuda.stream(stream):
        torch.cuda._sleep(LONG_CYCLES)


def run_pair(
    buffer: CudaNormalBuffer, x: torch.Tensor, events: dict[str, Any], worst: int = T
) -> torch.Tensor:
    result = buffer.dispatch(x, *routing(), num_worst_tokens=worst, copy=True, **events)
    result.event.current_stream_wait()
    combined: Any = buffer.combine(result.recv_x, result.handle)
    return combined


def check(buffer: CudaNormalBuffer, tensor: torch.Tensor, value: float) -> None:
    torch.cuda.synchronize()
    buffer.raise_if_failed()
    assert tensor.float().unique().tolist() == [value]


def test_a_call_does_not_wait_for_what_came_after_its_event(buffer: CudaNormalBuffer) -> None:
    x, how = rows(3), routing()
    previous = now()
    hold_up(torch.cuda.current_stream())
    # Exact sizes: the host waits for counts, which the kernel finds although the current stream is
    # held up.
    result = buffer.dispatch(x, *how, previous_event=previous, async_finish=True)
    assert not torch.cuda.current_stream().query(), "the dispatch was ahead of it"
    result.event.current_stream_wait()
    check(buffer, result.recv_x, 3)


def test_the_current_stream_waits_when_it_is_told_to(buffer: CudaNormalBuffer) -> None:
    x, how = rows(5), routing()
    torch.cuda.synchronize()
    hold_up(stream_of(buffer))
    result = buffer.dispatch(x, *how, num_worst_tokens=T, async_finish=True)
    assert (x + 1).float().unique().tolist() == [6]
    assert not stream_of(buffer).query(), "the other stream is still held up"
    result.event.current_stream_wait()
    got = result.recv_x.clone()
    assert not torch.cuda.current_stream().query()
    check(buffer, got, 5)


def test_without_async_finish_the_current_stream_waits_at_once(buffer: CudaNormalBuffer) -> None:
    x, how, previous = rows(5), routing(), now()
    hold_up(stream_of(buffer))
    result = buffer.dispatch(x, *how, num_worst_tokens=T, previous_event=previous)
    got = result.recv_x.clone()
    assert result.event.event is None
    check(buffer, got, 5)


@pytest.mark.parametrize("has_previous", [False, True])
def test_what_a_call_reads_is_kept_until_it_has_read_it(
    buffer: CudaNormalBuffer, has_previous: bool
) -> None:
    x, how = rows(7), routing()
    torch.cuda.synchronize()
    hold_up(stream_of(buffer))
    options = dict(previous_event=now() if has_previous else None)
    result = buffer.dispatch(x, *how, num_worst_tokens=T, async_finish=True, **options)
    num_bytes = x.nbytes
    del x, how
    others = [rows(-1) for _ in range(4)]  # one would take its memory
    allocated = torch.cuda.memory_allocated()
    result.event.current_stream_wait()
    assert torch.cuda.memory_allocated() <= allocated - num_bytes
    check(buffer, result.recv_x, 7)
    assert len(others) == 4


def test_an_event_may_be_dropped(buffer: CudaNormalBuffer) -> None:
    x, how = rows(7), routing()
    torch.cuda.synchronize()
    hold_up(stream_of(buffer))
    received = buffer.dispatch(x, *how, num_worst_tokens=T, async_finish=True).recv_x
    del x, how
    others = [rows(-1) for _ in range(4)]
    check(buffer, received, 7)
    assert len(others) == 4


def test_what_a_call_made_is_not_overwritten_while_it_is_read(buffer: CudaNormalBuffer) -> None:
    x, other, how, read = rows(2), rows(9), routing(), rows(0)
    result = buffer.dispatch(x, *how, copy=True)
    out, event = buffer.combine(
        result.recv_x, result.handle, previous_event=now(), async_finish=True
    )
    event.current_stream_wait()
    options: dict[str, Any] = dict(previous_event=now(), async_finish=True)
    hold_up(torch.cuda.current_stream())
    read.copy_(out)  # when the stream goes on
    del out
    for _ in range(4):  # these take memory of the other stream, and write there at once
        result = buffer.dispatch(other, *how, num_worst_tokens=T, copy=True, **options)
        buffer.combine(result.recv_x, result.handle, **options)
    check(buffer, read, 2)


def test_calls_are_in_order_whatever_stream_each_is_on(buffer: CudaNormalBuffer) -> None:
    how = routing()
    for value in range(1, 6):
        hold_up(stream_of(buffer) if value % 2 else torch.cuda.current_stream())
        result = buffer.dispatch(rows(value), *how, num_worst_tokens=T, async_finish=value % 2 == 1)
        # On the other stream, which nobody has told to wait.
        if value % 2:
            out: Any = buffer.combine(result.recv_x, result.handle)
        else:
            nothing = EventOverlap()
            out = buffer.combine(result.recv_x, result.handle, previous_event=nothing)
        check(buffer, out, value)


def capture(act: Callable[[], object]) -> torch.cuda.CUDAGraph:
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        act()
    return graph


@pytest.mark.parametrize("has_previous", [False, True])
def test_graphs_replay_calls_on_both_streams(buffer: CudaNormalBuffer, has_previous: bool) -> None:
    x, out, how = rows(0), rows(0), routing()

    def layer() -> None:
        options: dict[str, Any] = dict(async_finish=True)
        if has_previous:
            options |= dict(previous_event=now(), allocate_on_comm_stream=True)
        result = buffer.dispatch(x, *how, num_worst_tokens=T, **options)
        beside = x * 2  # beside the dispatch
        result.event.current_stream_wait()
        y = result.recv_x + beside
        if has_previous:
            options["previous_event"] = now()
        combined, event = buffer.combine(y, result.handle, **options)
        event.current_stream_wait()
        out.copy_(combined)

    graph = capture(lambda: (layer(), layer()))
    for value in (1, 4):
        x.fill_(value)
        graph.replay()
        check(buffer, out, 3 * value)


def test_a_graph_takes_no_more_memory_for_more_layers(buffer: CudaNormalBuffer) -> None:
    x, how = rows(1), routing()

    def layer() -> None:
        result = buffer.dispatch(
            x, *how, num_worst_tokens=T, copy=True, previous_event=now(), async_finish=True
        )
        result.event.current_stream_wait()
        combined, event = buffer.combine(
            result.recv_x, result.handle, previous_event=now(), async_finish=True
        )
        event.current_stream_wait()
        x.copy_(combined)

    def bytes_of(num_layers: int) -> int:
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
        before = torch.cuda.memory_reserved()
        graphs.append(capture(lambda: [layer() for _ in range(num_layers)]))
        return torch.cuda.memory_reserved() - before

    graphs: list[torch.cuda.CUDAGraph] = []
    few, many = bytes_of(3), bytes_of(60)
    assert many <= few
    for graph in graphs:
        graph.replay()
    check(buffer, x, 1)
