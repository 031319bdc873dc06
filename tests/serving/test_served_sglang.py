"""A real SGLang serves through ep_backend; a real streaming client compares its tokens."""

from __future__ import annotations

from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path

import pytest
from rich.console import Console

from ep_backend.bench.demo import DemoResult, DemoSettings, Run
from ep_backend.bench.demo_report import print_report
from ep_backend.bench.exchange import RankExchange
from ep_backend.bench.model import TinyMoE

pytest.importorskip("sglang", reason="SGLang is not installed")
pytestmark = pytest.mark.engine


async def test_prompts_have_different_answers(sglang_reference: Run) -> None:
    """Otherwise equal tokens would prove little."""
    answers = {tuple(c.token_ids) for c in sglang_reference.sequential}
    assert len(answers) == len(sglang_reference.sequential)
    assert all(len(set(answer)) >= 10 for answer in answers)


@pytest.mark.skipif(find_spec("vllm") is None, reason="vLLM is not installed")
async def test_two_engines_answer_the_same(reference: Run, sglang_reference: Run) -> None:
    """Neither is compared with itself alone."""
    expected = [c.token_ids for c in reference.sequential]
    assert [c.token_ids for c in sglang_reference.sequential] == expected


async def test_low_latency_gives_the_tokens_of_one_rank(sglang_low_latency: DemoResult) -> None:
    check_tokens_and_steps(sglang_low_latency)
    assert all(rank.num_normal_dispatches == 0 for rank in ranks_of(sglang_low_latency))


async def test_normal_gives_the_tokens_of_one_rank(sglang_normal: DemoResult) -> None:
    check_tokens_and_steps(sglang_normal)
    ranks = ranks_of(sglang_normal)
    assert all(rank.num_normal_dispatches == rank.num_dispatches for rank in ranks)


async def test_auto_prefills_with_one_and_decodes_with_the_other(
    sglang_auto: DemoResult, sglang_auto_by_expert: DemoResult
) -> None:
    for result in (sglang_auto, sglang_auto_by_expert):
        check_tokens_and_steps(result)
        for rank in ranks_of(result):
            assert 0 < rank.num_normal_dispatches < rank.num_dispatches / 2, "most steps are decode"
            assert "dispatch_send" in rank.span_us, "which goes through low-latency kernels"
        num_prefills = sum(rank.num_low_latency_prefills for rank in ranks_of(result))
        assert num_prefills > 0, "of the shorter prompts"


async def test_two_batch_overlap_gives_the_tokens_of_one_rank(
    sglang_in_halves: DemoResult,
) -> None:
    assert sglang_in_halves.tokens_equal("sequential")
    assert sglang_in_halves.tokens_equal("concurrent")
    assert sglang_in_halves.ours.exchange is not None
    num_layers = sglang_in_halves.ours.exchange.num_layers
    for rank in ranks_of(sglang_in_halves):
        assert 0 < rank.num_normal_dispatches < rank.num_dispatches / 2, "most steps are decode"
        in_halves = 2 * num_layers * rank.num_forwards
        assert in_halves * 0.9 < rank.num_dispatches <= in_halves, "almost every step is split"


async def test_rebalanced_experts_give_the_tokens_of_one_rank(
    sglang_rebalanced: DemoResult, output: Path
) -> None:
    check_tokens_and_steps(sglang_rebalanced)
    assert (output / "sglang-2-ranks.log").read_text().count("rebalance end") > 2


async def test_a_broken_combine_is_noticed(
    sglang_broken: DemoResult, sglang_broken_normal: DemoResult
) -> None:
    for result in (sglang_broken, sglang_broken_normal):
        assert not result.tokens_equal("sequential")
        assert not result.is_good
        assert result.ours.exchange is not None
        assert result.ours.exchange.all_steps_dispatched, "the exchange itself went on"


def ranks_of(result: DemoResult) -> list[RankExchange]:
    assert result.ours.exchange is not None
    return result.ours.exchange.ranks


def check_tokens_and_steps(result: DemoResult) -> None:
    assert result.tokens_equal("sequential")
    assert result.tokens_equal("concurrent")
    assert result.is_good, "every layer of every step was dispatched"
    # Ranks of data-parallel attention step together, so none can have had fewer steps than this.
    least = result.settings.num_prompts * (result.settings.num_tokens - 1)
    assert all(rank.num_forwards >= least for rank in ranks_of(result))


async def test_report_says_what_was_served(sglang_low_latency: DemoResult) -> None:
    assert sglang_low_latency.as_json()["engine"] == "sglang"
    console = Console(record=True, width=120)
    print_report(sglang_low_latency, console)
    assert "all 512 tokens equal" in console.export_text()


async def test_servers_that_ended_leave_no_shared_memory(
    sglang_segments: Callable[[], set[str]], sglang_low_latency: DemoResult
) -> None:
    assert sglang_segments() == set()


def test_what_an_engine_does_not_have_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"2 key heads, which SGLang .* Pass hidden 256 or a"):
        DemoSettings(tmp_path, "sglang", ranks=4)
    DemoSettings(tmp_path, "sglang", ranks=4, shape=TinyMoE(hidden=256))
    with pytest.raises(ValueError, match="expected for SGLang one of auto, normal, low-latency"):
        DemoSettings(tmp_path, "sglang", mode="high-throughput")
    with pytest.raises(ValueError, match="expected one of vllm, sglang"):
        DemoSettings(tmp_path, "tgi")
