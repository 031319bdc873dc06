"""A real vLLM serves through ep_backend; a real streaming client compares its tokens."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from rich.console import Console

from ep_backend.bench.demo import DemoResult, Run
from ep_backend.bench.demo_report import plot_latencies, print_report
from ep_backend.bench.exchange import ADAPTER_SPANS, LOW_LATENCY_SPANS, NORMAL_SPANS
from ep_backend.bench.report import write_report
from ep_backend.observe.perfetto import JSON_NAME
from tests.bench.pages import check_self_contained
from tests.observe.test_dashboard import ENGINES, OURS
from tests.observe.test_perfetto import check_format

pytest.importorskip("vllm", reason="vLLM is not installed")
from prometheus_client.parser import text_string_to_metric_families  # comes with vLLM

pytestmark = pytest.mark.engine


async def test_prompts_have_different_answers(reference: Run) -> None:
    """Otherwise equal tokens would prove little."""
    answers = {tuple(c.token_ids) for c in reference.sequential}
    assert len(answers) == len(reference.sequential)
    assert all(len(set(answer)) >= 10 for answer in answers)


async def test_two_ranks_give_the_tokens_of_one(two_ranks: DemoResult) -> None:
    assert two_ranks.tokens_equal("sequential")
    assert two_ranks.tokens_equal("concurrent")


async def test_four_ranks_give_the_tokens_of_one(four_ranks: DemoResult) -> None:
    assert four_ranks.tokens_equal("sequential")
    assert four_ranks.tokens_equal("concurrent")


async def test_normal_kernels_give_the_tokens_of_one_rank(high_throughput: DemoResult) -> None:
    assert high_throughput.tokens_equal("sequential")
    assert high_throughput.tokens_equal("concurrent")


async def test_every_layer_of_every_step_is_dispatched(
    two_ranks: DemoResult, four_ranks: DemoResult, high_throughput: DemoResult
) -> None:
    for result in (two_ranks, four_ranks, high_throughput):
        assert result.ours.exchange is not None
        assert result.ours.exchange.all_steps_dispatched, result.ours.exchange.as_json()
        # A step makes at most one token a prompt, so no rank can have had fewer steps than this.
        least = result.settings.num_tokens - 1
        assert all(rank.num_forwards >= least for rank in result.ours.exchange.ranks)


async def test_a_broken_combine_is_noticed(
    broken: DemoResult, broken_high_throughput: DemoResult
) -> None:
    for result in (broken, broken_high_throughput):
        assert not result.tokens_equal("sequential")
        assert not result.is_good
        assert result.ours.exchange is not None
        assert result.ours.exchange.all_steps_dispatched, "the exchange itself went on"


async def test_the_servers_metrics_hold_ours_and_match_the_counters(
    two_ranks: DemoResult, high_throughput: DemoResult
) -> None:
    for result, sends in ((two_ranks, "dispatch_send"), (high_throughput, "normal_dispatch")):
        exchange = result.ours.exchange
        assert exchange is not None
        samples = {
            (sample.name, sample.labels.get("rank"), sample.labels.get("op")): sample.value
            for family in text_string_to_metric_families(result.ours.metrics)
            for sample in family.samples
        }
        for rank in exchange.ranks:
            number = rank.name.removeprefix("rank")
            num_dispatches = samples["ep_backend_operations_total", number, sends]
            assert num_dispatches == rank.num_dispatches
            assert samples["ep_backend_op_seconds_count", number, sends] == num_dispatches
            assert samples["ep_backend_forwards_total", number, None] == rank.num_forwards
            inside = sum(
                value
                for (name, of_rank, _), value in samples.items()
                if (name, of_rank) == ("ep_backend_op_seconds_sum", number)
            )
            assert 0 < inside < samples["ep_backend_forward_seconds_total", number, None]
        names = {name for name, _, _ in samples}
        assert names >= {name for name in ENGINES if name.startswith("vllm:")}
        assert names >= OURS.keys() - {"ep_backend_timeouts_total"}


async def test_the_servers_ranks_make_a_trace(two_ranks: DemoResult) -> None:
    # Servers with as many ranks record in turn in the same place: of one, or of the other.
    trace_dir = two_ranks.settings.output / "trace-2-ranks"
    events = json.loads((trace_dir / JSON_NAME).read_text())["traceEvents"]
    check_format(events)
    names = {event["name"] for event in events if event["ph"] == "X"}
    assert names >= {"forward", *ADAPTER_SPANS}
    assert any(names >= set(spans) for spans in (LOW_LATENCY_SPANS, NORMAL_SPANS))
    starts = {event["id"]: event["pid"] for event in events if event["ph"] == "s"}
    assert {starts[e["id"]] != e["pid"] for e in events if e["ph"] == "f"} == {True}


async def test_report_says_what_was_served(two_ranks: DemoResult, tmp_path: Path) -> None:
    result = json.loads(json.dumps(two_ranks.as_json()))
    assert [run["tokens_equal"] for run in result["runs"]] == [True, True]
    assert result["exchange"]["dispatches_equal_layers_times_steps"] is True
    console = Console(record=True, width=120)
    print_report(two_ranks, console)
    text = console.export_text()
    assert "all 512 tokens equal" in text
    assert "exchange as the engine sees it" in text
    path = tmp_path / "result.json"
    path.write_text(json.dumps(result))
    (section,) = write_report(tmp_path / "report.html", [path])
    assert [len(chart.series) for chart in section.charts] == [2]
    check_self_contained((tmp_path / "report.html").read_text())
    plot = tmp_path / "plot.png"
    plot_latencies(two_ranks, plot)
    assert plot.read_bytes().startswith(b"\x89PNG")
