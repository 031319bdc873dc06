"""The trace ring: written by any thread, read by any process, also while it is written."""

from __future__ import annotations

import os
import threading
from pathlib import Path

import pytest
import torch

from ep_backend.observe import trace
from ep_backend.observe.trace import RECORD, Operation, TraceWriter, read_trace
from tests.support.processes import Rank, RankProcesses
from tests.support.programs import PROGRAMS, Interpreter
from tests.support.scenario import Scenario, mixed_scenario
from tests.support.shapes import Shape


@pytest.fixture
def small_ring(monkeypatch: pytest.MonkeyPatch) -> int:
    monkeypatch.setattr(trace, "CAPACITY", 16)
    return 16


def test_a_reader_gets_what_was_written_in_order(tmp_path: Path) -> None:
    writer = TraceWriter(tmp_path / "t")
    writer.add("dispatch_send", num_tokens=7, begin_ns=100, duration_ns=30, wait_ns=20)
    writer.add("dispatch_recv", num_tokens=0, begin_ns=200, duration_ns=40)
    spans = read_trace(tmp_path / "t")
    assert spans.dtype == RECORD
    fields = ["kind", "num_tokens", "begin_ns", "duration_ns", "wait_ns", "epoch"]
    assert spans[fields].tolist() == [
        (b"dispatch_send", 7, 100, 30, 20, 0),
        (b"dispatch_recv", 0, 200, 40, 0, 0),
    ]
    assert spans["thread"].tolist() == [threading.get_native_id()] * 2


def test_a_span_knows_its_operation(tmp_path: Path) -> None:
    writer = TraceWriter(tmp_path / "t")
    writer.add("dispatch_send", 1, 0, 1, operation=Operation(rank=3, buffer=2, epoch=9))
    (span,) = read_trace(tmp_path / "t")
    assert (span["rank"], span["buffer"], span["epoch"]) == (3, 2, 9)


def test_an_empty_trace_reads_as_empty(tmp_path: Path) -> None:
    TraceWriter(tmp_path / "t")
    assert len(read_trace(tmp_path / "t")) == 0


@pytest.mark.parametrize("num_written", [15, 16, 17, 32, 43])
def test_a_full_ring_keeps_the_newest_spans_oldest_first(
    tmp_path: Path, small_ring: int, num_written: int
) -> None:
    writer = TraceWriter(tmp_path / "t")
    for i in range(num_written):
        writer.add("op", num_tokens=i, begin_ns=i, duration_ns=1)
    kept = read_trace(tmp_path / "t")["num_tokens"].tolist()
    assert kept == list(range(max(0, num_written - small_ring), num_written))


def test_an_existing_file_is_not_overwritten(tmp_path: Path) -> None:
    TraceWriter(tmp_path / "t").add("op", 1, 0, 0)
    with pytest.raises(FileExistsError):
        TraceWriter(tmp_path / "t")
    assert len(read_trace(tmp_path / "t")) == 1


def test_span_times_its_body_and_drops_one_that_raised(tmp_path: Path) -> None:
    writer = TraceWriter(tmp_path / "t")
    with writer.span("good", num_tokens=3) as span:
        span.wait_ns = 5
    with pytest.raises(KeyError), writer.span("bad", num_tokens=3):
        raise KeyError
    (record,) = read_trace(tmp_path / "t")
    assert (record["kind"], record["num_tokens"], record["wait_ns"]) == (b"good", 3, 5)
    assert record["duration_ns"] > 0


def test_threads_lose_no_span(tmp_path: Path) -> None:
    writer = TraceWriter(tmp_path / "t")
    num_threads, num_spans = 4, 2000

    def write(thread: int) -> None:
        for i in range(num_spans):
            writer.add(f"thread{thread}", num_tokens=i, begin_ns=0, duration_ns=0)

    threads = [threading.Thread(target=write, args=(i,)) for i in range(num_threads)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    spans = read_trace(tmp_path / "t")
    assert len(spans) == num_threads * num_spans
    for i in range(num_threads):
        own = spans[spans["kind"] == f"thread{i}".encode()]
        assert own["num_tokens"].tolist() == list(range(num_spans))


def test_without_the_variable_nothing_is_written(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(trace.TRACE_VARIABLE, raising=False)
    assert TraceWriter.from_env("rank0") is None


def test_a_process_has_one_writer_a_directory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(trace.TRACE_VARIABLE, str(tmp_path))
    first = TraceWriter.from_env("rank0")
    assert first is TraceWriter.from_env("adapter")
    assert [p.name for p in tmp_path.iterdir()] == [f"rank0-{os.getpid()}.trace"]


def run_traced(rank: Rank, scenario: Scenario, directory: str) -> int:
    os.environ[trace.TRACE_VARIABLE] = directory
    with scenario.shape.buffer(rank.group) as buffer:
        Interpreter(buffer, scenario).run(PROGRAMS["plain_loop"](5, 2))
    return os.getpid()


def test_every_rank_writes_its_sends_and_hooks_to_its_own_file(tmp_path: Path) -> None:
    scenario = mixed_scenario(Shape(2), seed=31)
    with RankProcesses(2) as ranks:
        pids = ranks.run(run_traced, scenario, str(tmp_path))
    for rank, pid in enumerate(pids):
        spans = read_trace(tmp_path / f"rank{rank}-{pid}.trace")
        kinds = [b"dispatch_send", b"dispatch_recv", b"combine_send", b"combine_recv"]
        assert spans["kind"].tolist() == kinds * 5
        num_tokens = [scenario.variant(op).x[rank].shape[0] for op in range(5) for _ in range(4)]
        assert spans["num_tokens"].tolist() == num_tokens
        assert spans["epoch"].tolist() == [op + 1 for op in range(5) for _ in range(4)]
        assert set(spans["rank"].tolist()) == {rank}
        assert (spans["wait_ns"] <= spans["duration_ns"]).all()
        ends = spans["begin_ns"] + spans["duration_ns"]
        assert (spans["begin_ns"][1:] >= ends[:-1]).all()


def test_a_call_that_was_refused_is_no_operation(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else its rank would number the next ones differently from its peers."""
    monkeypatch.setenv(trace.TRACE_VARIABLE, str(tmp_path))
    (buffer,) = Shape(1, top_k=1).virtual_buffers()
    x = torch.ones(1, buffer.hidden, dtype=buffer.dtype)
    for expert in (0, buffer.num_experts, 1):
        idx = torch.tensor([[expert]])
        if expert == buffer.num_experts:
            with pytest.raises(ValueError, match="Nothing was sent"):
                buffer.dispatch(x, idx, torch.ones(1, 1))
        else:
            buffer.dispatch_and_receive(x, idx, torch.ones(1, 1))
    (path,) = tmp_path.glob("*.trace")
    spans = read_trace(path)
    assert spans["epoch"][spans["kind"] == b"dispatch_send"].tolist() == [1, 2]
