"""Scrapes of running ranks: the metrics that are promised, with the values of the counters."""

from __future__ import annotations

import dataclasses
import os
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from typer.testing import CliRunner

from ep_backend import LowLatencyBuffer, NormalBuffer, PeerTimeout, _native
from ep_backend.cli import app
from ep_backend.handles import KernelStatistics
from ep_backend.observe import counts, metrics, scrape
from ep_backend.observe.metrics import DIRECTORY_VARIABLE, PORT_VARIABLE, Collector, Exporter
from tests.support.ports import free_ports
from tests.support.processes import Answer, Rank, RankProcesses
from tests.support.programs import PROGRAMS, Interpreter
from tests.support.scenario import Scenario, mixed_scenario
from tests.support.shapes import Shape

pytest.importorskip("prometheus_client")
SHAPE = Shape(2)
NUM_OPS = 5
Samples = dict[tuple[str, tuple[tuple[str, str], ...]], float]


def samples_of(text: str) -> Samples:
    from prometheus_client.parser import text_string_to_metric_families

    return {
        (sample.name, tuple(sorted(sample.labels.items()))): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }


def value(samples: Samples, name: str, **labels: Any) -> float:
    return samples[name, tuple(sorted((key, str(text)) for key, text in labels.items()))]


def serve_and_count(
    rank: Rank, scenario: Scenario, variables: dict[str, str]
) -> tuple[KernelStatistics, KernelStatistics]:
    """Runs a low-latency and a normal buffer; then waits for the test's word, with both open."""
    os.environ.update(variables)
    with (
        scenario.shape.buffer(rank.group) as buffer,
        NormalBuffer(
            rank.group, hidden=8, num_experts=4, top_k=2, dtype=torch.float32, num_bytes=1 << 16
        ) as normal,
    ):
        Interpreter(buffer, scenario).run(PROGRAMS["plain_loop"](NUM_OPS, 2))
        idx = torch.tensor([[0, 2], [1, 3], [3, 0]])
        result = normal.dispatch(torch.ones(3, 8), idx, torch.ones(3, 2))
        normal.combine(result.recv_x, result.handle)
        rank.tell((buffer.statistics(), normal.statistics()))
        return rank.ask()


def told(ranks: RankProcesses, rank: int) -> tuple[KernelStatistics, KernelStatistics]:
    message = ranks.next_from(rank)
    assert not isinstance(message, Answer), message.details
    return message


def check_values(
    samples: Samples, rank: int, low: KernelStatistics, normal: KernelStatistics
) -> None:
    """Every number of the statistics is in the scrape."""
    for statistics in (low, normal):
        for op, counters in statistics.counters.items():
            labels = {"rank": rank, "op": op}
            assert value(samples, "ep_backend_operations_total", **labels) == counters.num_ops
            assert value(samples, "ep_backend_op_seconds_count", **labels) == counters.num_ops
            assert value(samples, "ep_backend_op_seconds_sum", **labels) == pytest.approx(
                counters.total_ns * 1e-9
            )
            for peer in range(2):
                waited = value(samples, "ep_backend_wait_seconds_total", **labels, peer=peer)
                assert waited == pytest.approx(statistics.wait_ns[op][peer] * 1e-9)
                num_bytes = statistics.sent_bytes[op][peer]
                link = "self" if peer == rank else "shm"
                sent = ("ep_backend_sent_bytes_total", {**labels, "peer": peer, "link": link})
                if num_bytes > 0:
                    assert value(samples, sent[0], **sent[1]) == num_bytes
                else:
                    with pytest.raises(KeyError):
                        value(samples, sent[0], **sent[1])
    tokens = low.counters["dispatch_send"].num_rows + normal.counters["normal_dispatch"].num_rows
    assert value(samples, "ep_backend_tokens_total", rank=rank) == tokens
    # Both buffers have experts of the same numbers.
    rows: dict[int, int] = {}
    for statistics, num_experts in ((low, SHAPE.num_experts), (normal, 4)):
        first = rank * num_experts // 2
        for expert, num_rows in enumerate(statistics.num_expert_rows, first):
            rows[expert] = rows.get(expert, 0) + num_rows
    for expert, num_rows in rows.items():
        labels = {"rank": rank, "expert": expert}
        assert value(samples, "ep_backend_expert_rows_total", **labels) == num_rows


def test_each_rank_answers_on_a_port_of_its_own() -> None:
    port = free_ports(2)
    with RankProcesses(2) as ranks:
        ranks.start(serve_and_count, mixed_scenario(SHAPE, seed=3), {PORT_VARIABLE: str(port)})
        statistics = [told(ranks, rank) for rank in range(2)]
        urls = scrape.endpoint_urls([f"127.0.0.1:{port}"], num_ranks=2)
        for rank in range(2):
            samples = samples_of(httpx.get(urls[rank], trust_env=False).text)
            check_values(samples, rank, *statistics[rank])
            low = statistics[rank][0]
            assert low.num_ops == dict.fromkeys(low.num_ops, NUM_OPS)
            assert sum(low.wait_ns["dispatch_recv"]) == low.counters["dispatch_recv"].wait_ns
            assert sum(low.num_in_bucket["combine_recv"]) == NUM_OPS
        table = CliRunner().invoke(app, ["top", "--once", f"127.0.0.1:{port}", "--ranks", "2"])
        assert table.exit_code == 0, table.output
        seen = scrape.look(urls)
        assert seen.ranks == [0, 1]
        assert seen.operations == {0: NUM_OPS + 1, 1: NUM_OPS + 1}
        assert "Straggler map" in table.output
        for rank in range(2):
            ranks.tell(rank, None)
        ranks.answers()


def test_an_engines_registry_of_several_processes_has_them_beside_its_own(tmp_path: Path) -> None:
    with RankProcesses(2) as ranks:
        variables = {DIRECTORY_VARIABLE: str(tmp_path)}
        ranks.start(serve_and_count, mixed_scenario(SHAPE, seed=3), variables)
        statistics = [told(ranks, rank) for rank in range(2)]
        time.sleep(2 * metrics.INTERVAL_SECS)
        samples = samples_of(engine_scrape(tmp_path))
        for rank in range(2):
            check_values(samples, rank, *statistics[rank])
            ranks.tell(rank, None)
        ranks.answers()
    assert value(samples, "engine_steps_total") == 3.0
    limits = [float(dict(labels)["le"]) for name, labels in samples if name.endswith("_bucket")]
    assert max(limits) == float("inf")


def engine_scrape(directory: Path) -> str:
    """What another process of the engine would answer: it counts its own steps there, too."""
    code = """
import prometheus_client
from prometheus_client import CollectorRegistry, generate_latest, multiprocess
prometheus_client.Counter("engine_steps", "Of the engine.").inc(3)
registry = CollectorRegistry()
multiprocess.MultiProcessCollector(registry)
print(generate_latest(registry).decode())
"""
    environment = os.environ | {DIRECTORY_VARIABLE: str(directory)}
    return subprocess.run(
        [sys.executable, "-c", code], env=environment, check=True, capture_output=True, text=True
    ).stdout


def test_a_scrape_shows_all_metrics_that_are_listed() -> None:
    """By their names; those of the engine and of timeouts once there are any."""
    process_counts = counts.ProcessCounts()
    (buffer,) = Shape(1).virtual_buffers()
    source = counts.Source(0, "shm", 0, buffer.statistics)
    process_counts.add(source)
    process_counts.count_forward(1000)
    process_counts.count_timeout(
        PeerTimeout("", {"self_rank": 0, "peer_rank": 1, "phase": "combine", "half": "recv"})
    )
    run_once(buffer)
    names = {s.name for family in Collector(process_counts).collect() for s in family.samples}
    assert names == {name for metric in counts.METRICS for name in metric.samples}


def run_once(buffer: LowLatencyBuffer) -> None:
    x = torch.ones(2, buffer.hidden, dtype=buffer.dtype)
    idx = torch.arange(2 * buffer.top_k).view(2, -1) % buffer.num_experts
    result = buffer.dispatch_and_receive(x, idx, torch.ones(idx.shape))
    buffer.combine_and_receive(result.recv_x, result.handle)


def test_bytes_between_nodes_are_of_another_link() -> None:
    shape = Shape(4, num_experts=4, top_k=4, ranks_per_node=2)
    world = shape.world()
    buffers = world.run(shape.buffer)
    world.run(lambda group: run_once(buffers[group.self_rank]))
    nodes = [group.ranks_of_node for group in world.groups]
    assert nodes == [range(2), range(2), range(2, 4), range(2, 4)]
    for rank, buffer in enumerate(buffers):
        source = counts.Source(rank, "shm", rank, buffer.statistics, nodes[rank])
        sent = {labels[2:] for labels in source.counts().counters[counts.SENT_BYTES]}
        links = {str(p): "shm" if p in nodes[rank] else "rdma" for p in range(4)}
        assert sent == set((links | {str(rank): "self"}).items())
    world.run(lambda group: buffers[group.self_rank].close())


def test_a_closed_buffer_still_counts() -> None:
    process_counts = counts.ProcessCounts()
    (first,) = Shape(1).virtual_buffers()
    (second,) = Shape(1).virtual_buffers()
    sources = [counts.Source(0, "shm", 0, buffer.statistics) for buffer in (first, second)]
    process_counts.add(sources[0])
    run_once(first)
    process_counts.close(sources[0])
    process_counts.add(sources[1])
    run_once(second)
    read = process_counts.read()
    labels = ("0", "combine_send")
    assert read.counters[counts.OPERATIONS][labels] == 2
    assert sum(read.buckets[counts.OP_SECONDS][labels]) == 2
    assert read.counters[counts.OPERATIONS] == process_counts.read().counters[counts.OPERATIONS]


def give_up(rank: Rank, port: int) -> str:
    os.environ[PORT_VARIABLE] = str(port)
    shape = dataclasses.replace(SHAPE, num_banks=2)
    with shape.buffer(rank.group, timeout_secs=0.2) as buffer:
        if rank.group.self_rank == 1:
            return str(rank.ask())
        x = torch.ones(1, shape.hidden, dtype=shape.dtype)
        _, hook = buffer.dispatch(x, torch.zeros(1, shape.top_k).int(), torch.ones(1, shape.top_k))
        for _ in range(2):  # the second time the buffer has failed already
            with pytest.raises(PeerTimeout):
                hook()
        return httpx.get(f"http://127.0.0.1:{port}/metrics", trust_env=False).text


def test_a_wait_that_is_given_up_is_counted_once_and_names_the_peer() -> None:
    port = free_ports(2)
    with RankProcesses(2) as ranks:
        ranks.start(give_up, port)
        (text,) = (a.value for a in ranks.answers(ranks=[0]))
        ranks.tell(1, "done")
        ranks.answers(ranks=[1])
    samples = samples_of(text)
    labels = {"rank": 0, "op": "dispatch_recv", "peer": 1}
    assert value(samples, "ep_backend_timeouts_total", **labels) == 1
    assert value(samples, "ep_backend_wait_seconds_total", **labels) >= 0.2


def late(rank: Rank) -> dict[str, list[int]]:
    scenario = mixed_scenario(Shape(3), seed=1)
    with scenario.shape.buffer(rank.group) as buffer:
        if rank.group.self_rank == 2:
            time.sleep(0.5)
        Interpreter(buffer, scenario).run(PROGRAMS["plain_loop"](1, 2))
        return buffer.statistics().wait_ns


def test_a_straggler_has_a_name() -> None:
    with RankProcesses(3) as ranks:
        waits = ranks.run(late)
    for rank in (0, 1):
        assert waits[rank]["dispatch_recv"][2] > 0.3e9
        assert max(waits[rank]["dispatch_recv"][:2]) < 0.2e9


def test_without_the_variables_nothing_starts() -> None:
    code = """
import sys, threading
from tests.support.shapes import Shape
(buffer,) = Shape(1).virtual_buffers()
assert "prometheus_client" not in sys.modules
assert threading.active_count() == 1, threading.enumerate()
"""
    environment = {
        name: text
        for name, text in os.environ.items()
        if name not in (PORT_VARIABLE, DIRECTORY_VARIABLE)
    }
    subprocess.run([sys.executable, "-c", code], env=environment, check=True)


@pytest.mark.parametrize("text", ["http", "70000", "-1"])
def test_a_port_that_is_none_is_refused_by_name(text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(PORT_VARIABLE, text)
    with pytest.raises(ValueError, match=f"{PORT_VARIABLE} is '{text}'"):
        Shape(1).virtual_buffers()


def test_a_port_that_is_taken_is_refused_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.socket() as taken:
        taken.bind(("0.0.0.0", 0))
        taken.listen()
        monkeypatch.setenv(PORT_VARIABLE, str(taken.getsockname()[1]))
        with pytest.raises(ValueError, match="rank 0 cannot listen"):
            Shape(1).virtual_buffers()
    assert Exporter._instance is None


@given(st.integers(0, 1 << 34))
def test_a_duration_is_in_the_first_bucket_that_holds_it(ns: int) -> None:
    limits = _native.BUCKET_LIMITS_NS
    expected = next((i for i, limit in enumerate(limits) if ns <= limit), len(limits))
    assert _native.bucket_of(ns) == expected


def test_bytes_are_those_of_rows_and_scales_by_peer() -> None:
    shape = Shape(2, hidden=256, num_experts=4, top_k=2, dispatch_dtype=torch.float8_e4m3fn)
    idx = [torch.tensor([[0, 1], [0, 2]]), torch.tensor([[3, -1], [-1, -1], [0, 3]])]
    buffers = shape.virtual_buffers()
    x = [torch.zeros(i.shape[0], 256, dtype=shape.dtype) for i in idx]
    sent = [b.dispatch(x[r], idx[r], torch.ones(idx[r].shape)) for r, b in enumerate(buffers)]
    for _, hook in sent:
        hook()
    back = [
        b.combine(torch.zeros(s[0].recv_x.shape, dtype=shape.dtype), s[0].handle)
        for b, s in zip(buffers, sent, strict=True)
    ]
    for _, hook in back:
        hook()
    # Rank 0: two messages to itself, one to rank 1; rank 1: one to rank 0, two to itself.
    row, partial = 256 + 2 * 4, 256 * 2
    statistics = [buffer.statistics() for buffer in buffers]
    assert [s.sent_bytes["dispatch_send"] for s in statistics] == [[2 * row, row], [row, 2 * row]]
    # Answered to where they came from.
    assert [s.sent_bytes["combine_send"] for s in statistics] == [
        [2 * partial, partial],
        [partial, 2 * partial],
    ]
    assert [s.num_expert_rows for s in statistics] == [[3, 1], [1, 2]]


def test_a_rank_without_experts_has_statistics() -> None:
    buffers = Shape(2, num_experts=1, top_k=1).virtual_buffers()
    assert [buffer.statistics().num_expert_rows for buffer in buffers] == [[0], []]


def test_bytes_of_rows_that_come_home_as_float8() -> None:
    shape = Shape(1, hidden=256, num_experts=2, top_k=1, combine_dtype=torch.float8_e4m3fn)
    (buffer,) = shape.virtual_buffers()
    idx = torch.tensor([[0], [1], [0]])
    x = torch.zeros(3, 256, dtype=shape.dtype)
    result = buffer.dispatch_and_receive(x, idx, torch.ones(3, 1))
    rows = torch.zeros(result.recv_x.shape, dtype=shape.dtype)
    buffer.combine_and_receive(rows, result.handle)
    assert buffer.statistics().sent_bytes["combine_send"] == [3 * (256 + 2 * 4)]
