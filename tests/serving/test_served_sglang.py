"""A real SGLang serves through ep_backend; a real streaming client compares its tokens."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from rich.console import Console

from ep_backend.bench.demo import DemoResult, DemoSettings, Run
from ep_backend.bench.demo_report import print_report

pytest.importorskip("sglang", reason="SGLang is not installed")
pytestmark = pytest.mark.engine


async def test_prompts_have_different_answers(sglang_reference: Run) -> None:
    """Otherwise equal tokens would prove little."""
    answers = {tuple(c.token_ids) for c in sglang_reference.sequential}
    assert len(answers) == len(sglang_reference.sequential)
    assert all(len(set(answer)) >= 10 for answer in answers)


async def test_two_engines_answer_the_same(reference: Run, sglang_reference: Run) -> None:
    """Neither is compared with itself alone."""
    pytest.importorskip("vllm", reason="vLLM is not installed")
    expected = [c.token_ids for c in reference.sequential]
    assert [c.token_ids for c in sglang_reference.sequential] == expected


async def test_two_ranks_give_the_tokens_of_one(sglang_low_latency: DemoResult) -> None:
    assert sglang_low_latency.tokens_equal("sequential")
    assert sglang_low_latency.tokens_equal("concurrent")


async def test_every_layer_of_every_step_is_dispatched(sglang_low_latency: DemoResult) -> None:
    exchange = sglang_low_latency.ours.exchange
    assert exchange is not None
    assert exchange.all_steps_dispatched, exchange.as_json()
    # Ranks of data-parallel attention step together, so none can have had fewer steps than this.
    least = sglang_low_latency.settings.num_prompts * (sglang_low_latency.settings.num_tokens - 1)
    assert all(rank.num_forwards >= least for rank in exchange.ranks)


async def test_a_broken_combine_is_noticed(sglang_broken: DemoResult) -> None:
    assert not sglang_broken.tokens_equal("sequential")
    assert not sglang_broken.is_good
    assert sglang_broken.ours.exchange is not None
    assert sglang_broken.ours.exchange.all_steps_dispatched, "the exchange itself went on"


async def test_report_says_what_was_served(sglang_low_latency: DemoResult) -> None:
    assert sglang_low_latency.as_json()["engine"] == "sglang"
    console = Console(record=True, width=120)
    print_report(sglang_low_latency, console)
    assert "all 512 tokens equal" in console.export_text()


async def test_servers_that_ended_leave_no_shared_memory(
    sglang_segments: Callable[[], set[str]], sglang_low_latency: DemoResult
) -> None:
    assert sglang_segments() == set()


def test_a_mode_of_another_engine_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="expected for SGLang one of auto, normal, low-latency"):
        DemoSettings(tmp_path, "sglang", mode="high-throughput")
    with pytest.raises(ValueError, match="expected one of vllm, sglang"):
        DemoSettings(tmp_path, "tgi")
