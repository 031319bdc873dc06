"""What buffers on a GPU show of themselves: statistics that wait for nothing, and stamps."""

from __future__ import annotations

import json
import threading
from pathlib import Path

import pytest
import torch

from ep_backend import LowLatencyBuffer
from ep_backend.observe import counts, perfetto
from ep_backend.observe.trace import TRACE_VARIABLE, read_trace
from tests.observe.test_perfetto import check_format
from tests.support.programs import STEPWISE_PROGRAMS, Interpreter
from tests.support.scenario import mixed_scenario
from tests.support.shapes import Shape

CUDA_SHAPE = Shape(2, hidden=64, device="cuda")
KINDS = ("dispatch_send", "dispatch_recv", "combine_send", "combine_recv")


def exchange_once(buffer: LowLatencyBuffer, x: torch.Tensor) -> torch.Tensor:
    idx = torch.zeros(x.shape[0], buffer.top_k, dtype=torch.int32, device="cuda")
    idx += torch.arange(buffer.top_k, dtype=torch.int32, device="cuda")
    result = buffer.dispatch_and_receive(x, idx, torch.ones_like(idx, dtype=torch.float32))
    return buffer.combine_and_receive(result.recv_x, result.handle)


def one_rank() -> tuple[LowLatencyBuffer, torch.Tensor]:
    (buffer,) = Shape(1, hidden=64, device="cuda").virtual_buffers()
    return buffer, torch.ones(3, 64, dtype=buffer.dtype, device="cuda")


def test_replays_are_counted_and_are_in_a_scrape() -> None:
    buffer, x = one_rank()
    exchange_once(buffer, x)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        exchange_once(buffer, x)
    for _ in range(5):
        graph.replay()
    statistics = buffer.statistics()
    assert statistics.num_ops == dict.fromkeys(KINDS, 6)
    read = counts.Source(0, "p2p", 0, buffer.statistics).counts()
    assert read.counters[counts.OPERATIONS]["0", "combine_recv"] == 6
    assert sum(read.counters[counts.EXPERT_ROWS].values()) == 6 * 3 * buffer.top_k


def test_counters_are_read_while_another_thread_captures() -> None:
    """As a scrape does, at any time: it neither fails nor breaks the graph."""
    buffer, x = one_rank()
    exchange_once(buffer, x)
    torch.cuda.synchronize()
    seen: list[int] = []
    errors: list[Exception] = []

    def read() -> None:
        try:
            seen.append(buffer._kernels.statistics().num_ops["dispatch_send"])
        except Exception as e:
            errors.append(e)

    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        exchange_once(buffer, x)
        thread = threading.Thread(target=read)
        thread.start()
        thread.join(10.0)
        exchange_once(buffer, x)
    assert not errors
    assert seen == [1]
    graph.replay()
    assert buffer.statistics().num_ops["dispatch_send"] == 3


def test_reading_waits_for_no_kernel() -> None:
    """A hook waits for a peer that has not sent; its counters can be read meanwhile."""
    buffers = CUDA_SHAPE.virtual_buffers(timeout_secs=30.0)
    ranks = [Interpreter(buffer, mixed_scenario(CUDA_SHAPE)) for buffer in buffers]
    streams = [torch.cuda.Stream() for _ in ranks]
    inputs = [rank.inputs(0) for rank in ranks]
    torch.cuda.synchronize()
    with torch.cuda.stream(streams[0]):
        _, hook = buffers[0].dispatch(*inputs[0])
        hook()
    num_ops = buffers[0]._kernels.statistics().num_ops
    assert num_ops["dispatch_recv"] == 0, "it is still waiting"
    with torch.cuda.stream(streams[1]):
        buffers[1].dispatch(*inputs[1])
    torch.cuda.synchronize()
    assert buffers[0].statistics().num_ops["dispatch_recv"] == 1


def test_a_trace_has_launches_and_kernels(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(TRACE_VARIABLE, str(tmp_path))
    buffers = CUDA_SHAPE.virtual_buffers(timeout_secs=10.0)
    ranks = [Interpreter(buffer, mixed_scenario(CUDA_SHAPE)) for buffer in buffers]
    for step in STEPWISE_PROGRAMS["plain_loop"](4, CUDA_SHAPE.num_banks):
        for rank in ranks:
            rank.step(*step)
    for buffer in buffers:
        buffer.close()
    (path,) = tmp_path.glob("*.trace")
    spans = read_trace(path)
    assert (spans["on_gpu"] == 1).sum() == (spans["on_gpu"] == 0).sum() == 4 * len(KINDS) * 2
    # A launch begins before its kernel.
    keys = ["rank", "kind", "epoch"]
    launched = {tuple(s[keys].tolist()): s for s in spans if not s["on_gpu"]}
    for span in spans[spans["on_gpu"] == 1]:
        begin_ns = int(launched[tuple(span[keys].tolist())]["begin_ns"])
        assert int(span["begin_ns"]) > begin_ns - 200_000, "as exact as the clocks are aligned"
    events = json.loads((tmp_path / "trace.json").read_text())["traceEvents"]
    check_format(events)
    tracks = {e["tid"] for e in events if e["ph"] in "sf"}
    assert tracks == {perfetto.GPU_TRACK}, "arrows are of kernels"
