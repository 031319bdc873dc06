"""What buffers on a GPU show of themselves: statistics that wait for nothing, and stamps."""

from __future__ import annotations

import json
import threading
from pathlib import Path

import pytest
import torch

from ep_backend import LowLatencyBuffer
from ep_backend.bench.op_cuda_graph import capture
from ep_backend.observe import counts, metrics, perfetto
from ep_backend.observe.trace import TRACE_VARIABLE, read_trace
from tests.observe.test_perfetto import check_format
from tests.support.normal import NormalShape, make_case
from tests.support.normal_cuda import CudaNormalRank, CudaNormalShape, How, on_gpu, on_ranks
from tests.support.programs import STEPWISE_PROGRAMS, Interpreter
from tests.support.scenario import mixed_scenario
from tests.support.shapes import Shape

CUDA_SHAPE = Shape(2, hidden=64, device="cuda")
SMALL = NormalShape(1, hidden=64, num_experts=6, top_k=3)
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


def test_normal_kernels_count_what_they_move(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(metrics, "are_wanted", lambda: True)
    shape = NormalShape(2, hidden=64, num_experts=6, top_k=3)
    case = make_case(shape, "masked", [30, 17], seed=2)

    def act(rank: CudaNormalRank) -> None:
        first = rank.run(case, How())
        rank.run(case, How(num_worst_tokens=100, is_async=True))
        rank.run_again(case, first, How())
        buffer = rank.buffer
        counted = buffer.statistics()
        assert counted.num_ops == dict(normal_counts=1, normal_dispatch=3, normal_combine=3)
        assert counted.num_tokens == 3 * len(case.x[rank.rank])
        expected = case.received[rank.rank]
        assert counted.num_expert_rows == [2 * n for n in expected.num_tokens_per_expert]
        sent = [sum(src == rank.rank for src, _ in case.received[r].origins) for r in range(2)]
        home = [sum(src == r for src, _ in expected.origins) for r in range(2)]
        row_bytes = 64 * 2
        assert counted.sent_bytes == dict(
            normal_dispatch=[3 * n * row_bytes for n in sent],
            normal_combine=[3 * n * row_bytes for n in home],
        )
        assert counted.counters["normal_counts"].num_rows == len(case.x[rank.rank])
        assert sum(counted.num_in_bucket["normal_counts"]) == 1
        read = counts.Source(rank.rank, "p2p", buffer.first_expert, buffer.statistics).counts()
        assert sum(read.counters[counts.EXPERT_ROWS].values()) == sum(counted.num_expert_rows)
        peer, own = str(1 - rank.rank), str(rank.rank)
        links = {labels[2:]: value for labels, value in read.counters[counts.SENT_BYTES].items()}
        assert set(links) == {(peer, "p2p"), (own, "self")}
        assert read.counters[counts.TOKENS][own,] == counted.num_tokens

    on_ranks(CudaNormalShape(shape), act)


def test_replays_of_normal_kernels_are_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(metrics, "are_wanted", lambda: True)
    case = make_case(SMALL, "uniform", [9], seed=0)

    def act(rank: CudaNormalRank) -> None:
        inputs = on_gpu(case.inputs(0))

        def pair() -> None:
            result = rank.buffer.dispatch(*inputs, num_worst_tokens=9)
            rank.buffer.combine(result.recv_x, result.handle)

        pair()
        graph = capture([pair])
        for _ in range(5):
            graph.replay()
        counted = rank.buffer.statistics()
        assert counted.num_ops["normal_dispatch"] == counted.num_ops["normal_combine"] == 6
        assert counted.num_tokens == 6 * 9
        assert counted.sent_bytes["normal_combine"] == [6 * 9 * 64 * 2]

    on_ranks(CudaNormalShape(SMALL), act)


def test_rows_of_normal_kernels_are_counted_only_where_metrics_are_wanted() -> None:
    def act(rank: CudaNormalRank) -> None:
        rank.run(make_case(SMALL, "uniform", [4], seed=0), How())
        counted = rank.buffer.statistics()
        assert counted.num_ops["normal_dispatch"] == counted.num_ops["normal_combine"] == 1
        assert counted.num_tokens is None
        assert counted.sent_bytes == {}

    on_ranks(CudaNormalShape(SMALL), act)
