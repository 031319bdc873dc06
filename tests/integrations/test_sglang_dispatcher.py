"""SGLang's real `DeepEPDispatcher` over our buffer, between processes, in each of its modes."""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch

pytest.importorskip("sglang", reason="SGLang is not installed")

from ep_backend import deep_ep
from tests.integrations import sglang_ranks
from tests.integrations.sglang_ranks import Plan
from tests.integrations.sglang_steps import LowLatencyStep, NormalStep, Step
from tests.support.normal import NormalShape, make_case
from tests.support.processes import RankProcesses
from tests.support.scenario import Scenario
from tests.support.shapes import Shape

FLOAT8 = torch.float8_e4m3fn
NUM_RANKS = (1, 2)
BUFFER = "ep_backend_sglang.buffer.Buffer"


@pytest.fixture(scope="module")
def ranks() -> Iterator[dict[int, RankProcesses]]:
    """By their number."""
    with RankProcesses(1) as one, RankProcesses(2) as two:
        yield {1: one, 2: two}


def low_latency_steps(shape: Shape) -> list[Step]:
    """Every rank has tokens, then the last has none, then some slots are masked."""
    most = shape.num_max_tokens_per_rank
    scenario = (
        Scenario(shape)
        .add("uniform", [most, most - 2][: shape.num_ranks], seed=0)
        .add("skewed", [most - 1, 0][-shape.num_ranks :], seed=1)
        .add("masked", [1, most][-shape.num_ranks :], seed=2)
    )
    return [LowLatencyStep(shape, variant) for variant in scenario.variants]


def normal_steps(shape: Shape) -> list[Step]:
    """The same of prefills, which are larger than a decode step may be."""
    like = NormalShape(shape.num_ranks, shape.hidden, shape.num_experts, shape.top_k, shape.dtype)
    most = 5 * shape.num_max_tokens_per_rank
    return [
        NormalStep(make_case(like, routing, num_tokens[-shape.num_ranks :], seed))
        for seed, (routing, num_tokens) in enumerate(
            (("uniform", [most - 2, most]), ("skewed", [most, 0]), ("masked", [1, most]))
        )
    ]


LOW_LATENCY_SHAPES = {
    "bf16": {},
    "float32": {"dtype": torch.float32, "hidden": 33},
    "fp8": {"hidden": 256, "dispatch_dtype": FLOAT8},
}


@pytest.mark.parametrize("num_ranks", NUM_RANKS)
@pytest.mark.parametrize("kind", LOW_LATENCY_SHAPES)
def test_low_latency_equals_the_reference(
    ranks: dict[int, RankProcesses], kind: str, num_ranks: int
) -> None:
    shape = Shape(num_ranks, **LOW_LATENCY_SHAPES[kind])
    steps = low_latency_steps(shape)
    for step in steps[1:]:  # in this mode prefills go the same way
        step.is_extend = True
    logs = ranks[num_ranks].run(sglang_ranks.exchange, Plan(shape, "low_latency", steps))
    assert logs == [["sent", "deepep_ll"] * 6 + [BUFFER]] * num_ranks


@pytest.mark.parametrize("num_ranks", NUM_RANKS)
@pytest.mark.parametrize("kind", ["bf16", "float32"])
def test_normal_equals_the_reference(
    ranks: dict[int, RankProcesses], kind: str, num_ranks: int
) -> None:
    shape = Shape(num_ranks, **LOW_LATENCY_SHAPES[kind])
    steps = normal_steps(shape)
    steps[1].is_extend = False  # in this mode decode goes the same way
    logs = ranks[num_ranks].run(sglang_ranks.exchange, Plan(shape, "normal", steps))
    assert logs == [["sent", "deepep_normal"] * 6 + [BUFFER]] * num_ranks


@pytest.mark.parametrize("num_ranks", NUM_RANKS)
@pytest.mark.parametrize("kind", ["bf16", "float32"])
def test_auto_prefills_with_one_and_decodes_with_the_other(
    ranks: dict[int, RankProcesses], kind: str, num_ranks: int
) -> None:
    shape = Shape(num_ranks, **LOW_LATENCY_SHAPES[kind])
    pairs = zip(normal_steps(shape), low_latency_steps(shape), strict=True)
    steps = [step for pair in pairs for step in pair]
    logs = ranks[num_ranks].run(sglang_ranks.exchange, Plan(shape, "auto", steps))
    expected = ["sent", "deepep_normal", "sent", "deepep_ll"] * 6 + [BUFFER]
    assert logs == [expected] * num_ranks


@pytest.mark.parametrize("num_ranks", NUM_RANKS)
@pytest.mark.parametrize("kind", ["bf16", "float32"])
def test_experts_of_the_standard_format_get_rows_by_token(
    ranks: dict[int, RankProcesses], kind: str, num_ranks: int
) -> None:
    shape = Shape(num_ranks, **LOW_LATENCY_SHAPES[kind], output_layout="rank_major")
    pairs = zip(normal_steps(shape), low_latency_steps(shape), strict=True)
    steps = [step for pair in pairs for step in pair]
    plan = Plan(shape, "auto", steps, is_standard=True)
    logs = ranks[num_ranks].run(sglang_ranks.exchange, plan)
    assert logs == [["sent", "standard"] * 12 + [BUFFER]] * num_ranks


@pytest.mark.parametrize("has_hook", [False, True])
def test_in_workspaces_ranks_have_as_many_slots_as_the_largest_has_tokens(
    ranks: dict[int, RankProcesses], has_hook: bool
) -> None:
    shape = Shape(2, output_layout="rank_major")
    steps = low_latency_steps(shape)
    plan = Plan(shape, "low_latency", steps, has_hook=has_hook, is_standard=True)
    used = ranks[2].run(sglang_ranks.exchange_in_workspaces, plan)
    assert used == [[(0, 6), (0, 5)]] * 2, "the largest has 6, 5 and 6 tokens"


@pytest.mark.parametrize("knows_counts", [False, True])
def test_auto_prefills_few_tokens_as_it_decodes(
    ranks: dict[int, RankProcesses], knows_counts: bool
) -> None:
    """Few on every rank: of the last of the larger steps, one rank has a single token."""
    shape = Shape(2)
    small, large = low_latency_steps(shape), normal_steps(shape)
    for step in small:
        step.is_extend = True
    plan = Plan(
        shape, "auto", [*small, *large] if knows_counts else large, knows_counts=knows_counts
    )
    logs = ranks[2].run(sglang_ranks.exchange, plan)
    expected = ["sent", "deepep_ll"] * 3 * knows_counts + ["sent", "deepep_normal"] * 3
    assert logs == [expected * 2 + [BUFFER]] * 2


@pytest.mark.parametrize(("has_hook", "num_dispatches"), [(True, 0), (False, 6)])
def test_what_is_received_behind_its_send_goes_through_one_kernel(
    ranks: dict[int, RankProcesses], has_hook: bool, num_dispatches: int
) -> None:
    shape = Shape(2)
    for is_standard in (False, True):
        layout = {"output_layout": "rank_major"} if is_standard else {}
        of_layout = replace(shape, **layout)
        plan = Plan(
            of_layout,
            "low_latency",
            low_latency_steps(of_layout),
            has_hook=has_hook,
            is_standard=is_standard,
        )
        assert ranks[2].run(sglang_ranks.received_at_once, plan) == [[num_dispatches, 6]] * 2


def test_deepep_config_is_read(ranks: dict[int, RankProcesses]) -> None:
    shape = Shape(2)
    tuned = {"num_sms": 4, "num_max_nvl_chunked_recv_tokens": 128}
    config = json.dumps({"normal_dispatch": tuned, "normal_combine": {"num_sms": 4}})
    plan = Plan(shape, "normal", normal_steps(shape), config)
    configs = ranks[2].run(sglang_ranks.config_of_dispatch, plan)
    assert configs == [deep_ep.Config(**tuned)] * 2


def test_a_step_with_too_many_tokens_says_what_to_set(ranks: dict[int, RankProcesses]) -> None:
    shape = Shape(2)
    plan = Plan(shape, "low_latency", low_latency_steps(shape))
    ranks[2].start(sglang_ranks.too_many_tokens, plan)
    for answer in ranks[2].answers():
        assert answer.error_type == "ValueError"
        assert "a step has 12 tokens on this rank, but dispatch takes at most 6" in answer.error
        assert "--chunked-prefill-size" in answer.error


def most_in_flight(log: list[str], operation: str) -> int:
    sends = [f"{operation}_a" in line for line in log if operation in line]
    return max(itertools.accumulate(1 if is_send else -1 for is_send in sends))


@pytest.mark.parametrize("is_standard", [False, True])
@pytest.mark.parametrize(
    ("deepep_mode", "is_decode", "most"),
    [("low_latency", False, 2), ("low_latency", True, 1), ("normal", False, 2), ("auto", False, 2)],
)
def test_two_batch_overlap_in_the_order_of_sglang(
    ranks: dict[int, RankProcesses], deepep_mode: str, is_decode: bool, most: int, is_standard: bool
) -> None:
    shape = Shape(2, output_layout="rank_major") if is_standard else Shape(2)
    steps = (low_latency_steps if deepep_mode == "low_latency" else normal_steps)(shape)
    plan = Plan(shape, deepep_mode, steps, is_standard=is_standard)
    logs = ranks[2].run(sglang_ranks.overlap_two_batches, plan, is_decode)
    assert logs[0] == logs[1]
    for operation in ("dispatch", "combine"):
        assert most_in_flight(logs[0], operation) == most
        for half in "ab":
            parts = [line for line in logs[0] if operation in line and line.endswith(half)]
            assert parts == [f"{operation}_a {half}", f"{operation}_b {half}"] * 2, "two layers"


@pytest.mark.parametrize("is_decode", [False, True])
def test_halves_have_a_workspace_each_of_as_many_slots_as_their_batch_has_tokens(
    ranks: dict[int, RankProcesses], is_decode: bool
) -> None:
    shape = Shape(2, output_layout="rank_major")
    plan = Plan(shape, "low_latency", low_latency_steps(shape), is_standard=True)
    most = max(sum(len(step.x(r)) for step in plan.steps[:2]) for r in range(2))
    used = ranks[2].run(sglang_ranks.overlap_in_workspaces, plan, is_decode)
    assert used == [[(0, most), (1, most)]] * 2
