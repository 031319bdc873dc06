"""Ranks as real processes, against the reference: named routings, every number of ranks."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import pytest
import torch

from tests.support.processes import Rank, RankProcesses
from tests.support.programs import PROGRAMS, Delays, Interpreter
from tests.support.scenario import Scenario, mixed_scenario
from tests.support.shapes import Shape


@dataclass(frozen=True)
class Case:
    routing: str
    dtype: torch.dtype
    hidden: int = 72
    num_experts: int = 10
    top_k: int = 4
    num_max_tokens_per_rank: int = 12
    scale_format: str | None = None
    """Of float8 rows; None: rows travel as they are."""
    output_layout: str = "expert_major"
    reduction: str = "rank"
    comes_home_as_float8: bool = False

    @property
    def id(self) -> str:
        dtype = str(self.dtype).removeprefix("torch.")
        scales = "" if self.scale_format is None else f"-float8_{self.scale_format}"
        arranged = f"{self.output_layout}-{self.reduction}"
        if self.comes_home_as_float8:
            arranged += "-float8_back"
        shape = f"H{self.hidden}-E{self.num_experts}-K{self.top_k}-{arranged}"
        return f"{self.routing}-{dtype}{scales}-{shape}"

    def scenario(self, num_ranks: int) -> Scenario:
        shape = Shape(
            num_ranks=num_ranks,
            num_max_tokens_per_rank=self.num_max_tokens_per_rank,
            hidden=self.hidden,
            num_experts=self.num_experts,
            top_k=self.top_k,
            dtype=self.dtype,
            dispatch_dtype=None if self.scale_format is None else torch.float8_e4m3fn,
            scale_format=self.scale_format or "float32",
            output_layout=self.output_layout,
            reduction=self.reduction,
            combine_dtype=torch.float8_e4m3fn if self.comes_home_as_float8 else None,
        )
        full = self.num_max_tokens_per_rank
        # The last rank has no token in the case of that name, and in the others now and then.
        sparse = [full] * (num_ranks - 1) + [0]
        scenario = Scenario(shape)
        scenario.add(
            self.routing, sparse if self.routing == "empty_rank" else [full] * num_ranks, 1
        )
        scenario.add(self.routing, [(3 * r) % full for r in range(num_ranks)], 2, torch.int32)
        return scenario.add(self.routing, sparse, 3, is_quantized=shape.is_float8)


CASES = [
    Case("uniform", torch.bfloat16),
    Case("uniform", torch.float32, hidden=7168, num_max_tokens_per_rank=5),
    Case("skewed", torch.bfloat16, hidden=33, num_experts=7),
    Case("one_hot_expert", torch.float32),
    Case("empty_rank", torch.bfloat16),
    Case("masked", torch.float32, hidden=1),
    Case("all_masked", torch.bfloat16),
    Case("repeated", torch.bfloat16, num_experts=2, top_k=32),
    Case("uniform", torch.bfloat16, hidden=7168, num_max_tokens_per_rank=5, scale_format="ue8m0"),
    Case("masked", torch.float32, hidden=200, scale_format="float32"),
    Case("skewed", torch.bfloat16, output_layout="rank_major"),
    Case("repeated", torch.float32, 130, 2, 32, 12, "power_of_two", "rank_major"),
    Case("masked", torch.bfloat16, reduction="source"),
    Case("repeated", torch.float32, num_experts=2, top_k=32, reduction="source"),
    Case("uniform", torch.bfloat16, 7168, num_max_tokens_per_rank=5, comes_home_as_float8=True),
    Case("masked", torch.float32, hidden=130, reduction="source", comes_home_as_float8=True),
]


@pytest.fixture(scope="module", params=[1, 2, 3, 4, 5], ids=lambda n: f"R{n}")
def ranks(request: pytest.FixtureRequest) -> Iterator[RankProcesses]:
    with RankProcesses(request.param) as processes:
        yield processes


def run_checked(
    rank: Rank, scenario: Scenario, program: str, num_ops: int, delays: Delays | None = None
) -> int:
    with scenario.shape.buffer(rank.group) as buffer:
        steps = PROGRAMS[program](num_ops, scenario.shape.num_banks)
        return Interpreter(buffer, scenario).run(steps, delays)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.id)
def test_every_routing_equals_the_reference(ranks: RankProcesses, case: Case) -> None:
    num_ops = 7  # every bank is used again
    scenario = case.scenario(ranks.num_ranks)
    num_steps = ranks.run(run_checked, scenario, "plain_loop", num_ops)
    assert num_steps == [4 * num_ops] * ranks.num_ranks


@pytest.mark.parametrize("program", PROGRAMS)
def test_every_order_of_sends_and_hooks_while_ranks_drift(
    ranks: RankProcesses, program: str
) -> None:
    scenario = mixed_scenario(Shape(ranks.num_ranks), seed=5)
    assert min(ranks.run(run_checked, scenario, program, 60, Delays(seed=5))) >= 100


@pytest.mark.parametrize("program", ["plain_loop", "steady"])
def test_eight_ranks_share_the_cores_over_hundreds_of_operations(program: str) -> None:
    scenario = mixed_scenario(Shape(8, num_experts=12, top_k=4), seed=8)
    with RankProcesses(8) as ranks:
        ranks.run(run_checked, scenario, program, 400, deadline_secs=120)
