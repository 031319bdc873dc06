"""Traces of real ranks in the trace-event format: what a viewer relies on holds."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections import defaultdict
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from ep_backend import NormalBuffer
from ep_backend.cli import app
from ep_backend.observe import perfetto
from ep_backend.observe.trace import TRACE_VARIABLE, Operation, TraceWriter, write_if_done
from tests.support.processes import Rank, RankProcesses
from tests.support.programs import PROGRAMS, Interpreter
from tests.support.scenario import Scenario, mixed_scenario
from tests.support.shapes import Shape

NUM_OPS = 6
Event = dict[str, Any]


def run_traced(rank: Rank, scenario: Scenario, directory: str) -> None:
    os.environ[TRACE_VARIABLE] = directory
    with scenario.shape.buffer(rank.group) as buffer:
        Interpreter(buffer, scenario).run(PROGRAMS["plain_loop"](NUM_OPS, 2))


def run_normal(rank: Rank, directory: str) -> None:
    os.environ[TRACE_VARIABLE] = directory
    with NormalBuffer(
        rank.group, hidden=8, num_experts=4, top_k=2, dtype=torch.float32, num_bytes=1 << 16
    ) as buffer:
        idx = torch.tensor([[0, 2], [1, 3], [3, 0]])
        result = buffer.dispatch(torch.ones(3, 8), idx, torch.ones(3, 2))
        buffer.combine(result.recv_x, result.handle)


def events_of(directory: Path) -> list[Event]:
    return json.loads((directory / "trace.json").read_text())["traceEvents"]


@pytest.fixture(scope="module")
def two_ranks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What two processes have left: the last one to close its buffer has made the JSON."""
    directory = tmp_path_factory.mktemp("trace")
    with RankProcesses(2) as ranks:
        ranks.run(run_traced, mixed_scenario(Shape(2), seed=31), str(directory))
    return directory


def check_format(events: list[Event]) -> None:
    """The rules of the trace-event format, for the kinds of events that we use."""
    assert events
    for event in events:
        assert event["ph"] in {"M", "X", "b", "e", "s", "f"}, event
        assert isinstance(event["name"], str)
        assert isinstance(event["pid"], int)
        assert isinstance(event["tid"], int)
        assert isinstance(event["ts"], (int, float))
        assert event["ts"] >= 0
        if event["ph"] == "X":
            assert event["dur"] >= 0
        if event["ph"] in "sfbe":
            assert event["cat"]
            assert "id" in event
    named = {(e["pid"], e["tid"]) for e in events if e["name"] == "thread_name"}
    assert named >= {(e["pid"], e["tid"]) for e in events if e["ph"] == "X"}

    # Slices of a track nest or follow each other.
    tracks = defaultdict(list)
    for e in events:
        if e["ph"] == "X":
            tracks[e["pid"], e["tid"]].append((e["ts"], -e["dur"]))
    for slices in tracks.values():
        ends: list[float] = []
        for begin, minus_duration in sorted(slices):
            while ends and ends[-1] <= begin:
                ends.pop()
            assert not ends or begin - minus_duration <= ends[-1] + 1e-6
            ends.append(begin - minus_duration)

    # Asynchronous slices: one begin and one end an id, in that order.
    for first, second in (("b", "e"), ("s", "f")):
        begins = {e["id"]: e for e in events if e["ph"] == first}
        ends_of = {e["id"]: e for e in events if e["ph"] == second}
        assert begins.keys() == ends_of.keys()
        assert len(begins) == sum(e["ph"] == first for e in events)
        for identity, begin in begins.items():
            assert begin["ts"] <= ends_of[identity]["ts"]
            assert begin["cat"] == ends_of[identity]["cat"]


def slice_at(events: list[Event], flow: Event) -> Event:
    """The slice that an end of an arrow is bound to."""
    (found,) = (
        e
        for e in events
        if e["ph"] == "X"
        and (e["pid"], e["tid"]) == (flow["pid"], flow["tid"])
        and e["ts"] <= flow["ts"] <= e["ts"] + e["dur"]
    )
    return found


def test_two_ranks_make_a_valid_trace(two_ranks: Path) -> None:
    events = events_of(two_ranks)
    check_format(events)
    names = [e["args"]["name"] for e in events if e["name"] == "process_name"]
    assert [name.split(",")[0] for name in sorted(names)] == ["rank 0", "rank 1"]


def test_every_hook_has_its_send_and_a_flight_between(two_ranks: Path) -> None:
    events = events_of(two_ranks)
    slices = {
        (e["pid"], e["name"], e["args"]["epoch"]): e
        for e in events
        if e["ph"] == "X" and e["cat"] == "operation"
    }
    pids = {pid for pid, _, _ in slices}
    assert len(pids) == 2
    flights = {e["id"]: e for e in events if e["ph"] == "b"}
    landings = {e["id"]: e for e in events if e["ph"] == "e"}
    assert len(flights) == 2 * 2 * NUM_OPS
    for pid in pids:
        for phase in ("dispatch", "combine"):
            for epoch in range(1, NUM_OPS + 1):
                send, hook = (slices[pid, f"{phase}_{half}", epoch] for half in ("send", "recv"))
                (flight,) = (
                    f
                    for f in flights.values()
                    if (f["pid"], f["name"]) == (pid, f"{phase} in flight")
                    and f["args"]["epoch"] == epoch
                )
                assert flight["ts"] == pytest.approx(send["ts"] + send["dur"])
                landing = landings[flight["id"]]["ts"]
                assert hook["ts"] - 1e-3 <= landing <= hook["ts"] + hook["dur"] + 1e-3


def test_arrows_go_from_each_send_to_the_hooks_of_the_other_rank(two_ranks: Path) -> None:
    events = events_of(two_ranks)
    starts = {e["id"]: e for e in events if e["ph"] == "s"}
    finishes = {e["id"]: e for e in events if e["ph"] == "f"}
    found = set()
    for identity, start in starts.items():
        send, hook = slice_at(events, start), slice_at(events, finishes[identity])
        phase = send["name"].removesuffix("_send")
        assert hook["name"] == f"{phase}_recv"
        assert send["args"]["epoch"] == hook["args"]["epoch"]
        assert send["pid"] != hook["pid"], "an arrow connects two ranks"
        assert finishes[identity]["bp"] == "e"
        found.add((send["pid"], phase, send["args"]["epoch"]))
    assert len(found) == len(starts) == 2 * 2 * NUM_OPS


def test_calls_that_send_and_receive_are_both_ends(tmp_path: Path) -> None:
    with RankProcesses(2) as ranks:
        ranks.run(run_normal, str(tmp_path))
    events = events_of(tmp_path)
    check_format(events)
    starts = [slice_at(events, e)["name"] for e in events if e["ph"] == "s"]
    assert sorted(starts) == sorted(perfetto.EXCHANGES[2:] * 2)
    assert not [e for e in events if e["ph"] == "b"]


def test_a_service_that_was_started_again_gets_no_arrows_from_before(tmp_path: Path) -> None:
    for _ in range(2):
        with RankProcesses(2) as ranks:
            ranks.run(run_traced, mixed_scenario(Shape(2), seed=31), str(tmp_path))
    events = events_of(tmp_path)
    check_format(events)
    assert len({e["pid"] for e in events}) == 4
    starts = {e["id"]: e["pid"] for e in events if e["ph"] == "s"}
    finishes = {e["id"]: e["pid"] for e in events if e["ph"] == "f"}
    pairs = {frozenset((starts[i], finishes[i])) for i in starts}
    assert len(pairs) == 2, "each run's ranks among themselves"
    assert len(starts) == 2 * 2 * 2 * NUM_OPS


def test_ranks_that_were_killed_are_merged_by_hand(tmp_path: Path) -> None:
    send, hook = Operation(0, 1, 1), Operation(1, 1, 1)
    TraceWriter(tmp_path / "rank0-1.trace").add("dispatch_send", 1, 1000, 500, operation=send)
    TraceWriter(tmp_path / "rank1-2.trace").add("dispatch_recv", 1, 1200, 900, operation=hook)
    result = CliRunner().invoke(app, ["trace", "merge", str(tmp_path)])
    assert result.exit_code == 0, result.output
    assert "trace.json" in result.output
    events = events_of(tmp_path)
    check_format(events)
    assert [e["ts"] for e in events if e["ph"] in "sf"] == [0.499, 1.099]


def test_json_waits_for_those_who_record_and_not_for_the_dead(tmp_path: Path) -> None:
    path = tmp_path / "rank0-1.trace"
    writer = TraceWriter(path)
    writer.add("dispatch_send", 1, 1000, 500, operation=Operation(0, 1, 1))
    write_if_done(tmp_path)
    assert not (tmp_path / "trace.json").exists(), "this process has not said that it is done"
    killed = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    writer._header["pid"] = killed.pid
    write_if_done(tmp_path)
    assert not (tmp_path / "trace.json").exists(), "it lives"
    killed.kill()
    os.waitid(os.P_PID, killed.pid, os.WEXITED | os.WNOWAIT)  # a zombie: nobody has taken it away
    write_if_done(tmp_path)
    check_format(events_of(tmp_path))
    killed.communicate()


def test_of_too_many_spans_the_newest_are_kept(tmp_path: Path) -> None:
    writer = TraceWriter(tmp_path / "rank0-1.trace")
    for epoch in range(1, 11):
        operation = Operation(0, 1, epoch)
        writer.add("dispatch_send", 1, epoch * 1000, 1, operation=operation)
    trace = perfetto.trace_of(tmp_path.glob("*.trace"), max_spans=4)
    epochs = [e["args"]["epoch"] for e in trace["traceEvents"] if e["ph"] == "X"]
    assert epochs == [7, 8, 9, 10]
    assert list(trace["otherData"].values()) == [6]


def test_a_directory_without_traces_is_refused(tmp_path: Path) -> None:
    result = CliRunner().invoke(app, ["trace", "merge", str(tmp_path)])
    assert result.exit_code == 1
    assert f"EP_BACKEND_TRACE={tmp_path}" in result.output
