"""A few small exchanges for compute-sanitizer, which makes kernels many times slower.

compute-sanitizer --tool memcheck python -m tests.cuda.sanitized [--one-stream]
"""

from __future__ import annotations

import sys
from dataclasses import replace
from typing import Any

import torch

from tests.cuda.streams import exchange
from tests.support.normal import NormalShape, make_case
from tests.support.normal_cuda import CudaNormalRank, CudaNormalShape, How, on_ranks
from tests.support.programs import Interpreter, plain_loop
from tests.support.scenario import mixed_scenario
from tests.support.shapes import Shape

SHAPE = Shape(2, num_max_tokens_per_rank=5, hidden=272, device="cuda")
UNPACKED = {"dispatch_dtype": torch.float8_e4m3fn}
FLOAT8 = UNPACKED | {"scale_format": "ue8m0"}
SETTINGS: list[dict[str, Any]] = [
    {"num_max_tagged_tokens": 5},
    {"num_max_tagged_tokens": 0},
    {"num_max_tagged_tokens": 2, "transfer": "push"},
    FLOAT8 | {"num_max_tagged_tokens": 2},
    {"combine_dtype": torch.float8_e4m3fn, "num_max_tagged_tokens": 2},
    {"combine_dtype": torch.float8_e4m3fn, "num_max_tagged_tokens": 2, "reduction": "source"},
    FLOAT8 | {"output_layout": "rank_major", "num_workspaces": 2, "num_max_tagged_tokens": 0},
    UNPACKED | {"output_layout": "rank_major", "num_workspaces": 2, "num_max_tagged_tokens": 4},
    {
        "output_layout": "rank_major",
        "num_workspaces": 2,
        "num_max_tagged_tokens": 4,
        "transfer": "pull_push",
    },
]
# Sends of all ranks wait for each other.
ON_STREAMS: list[dict[str, Any]] = [FLOAT8 | {"reduction": "source", "num_workspaces": 2}]
NORMAL_SETTINGS: list[dict[str, Any]] = [
    {},
    {"dtype": torch.float32},
    {"dispatch_dtype": torch.float8_e4m3fn, "scale_format": "ue8m0"},
    {"dispatch_dtype": torch.float8_e4m3fn, "hidden": 9216},  # a row is three chunks
]
NUM_ROWS = (64, 8)
"""There is room for all; or they travel in rounds."""
TIMEOUT_SECS = 120.0


def exchange_normally(num_ranks: int) -> int:
    """Dispatches and combines of the normal kernels, checked; returns how many."""
    num_exchanges = 0
    for settings in NORMAL_SETTINGS:
        for num_rows in NUM_ROWS:
            shape = NormalShape(num_ranks, num_experts=6, **({"hidden": 272} | settings))
            case = make_case(shape, "uniform", [11, 6][:num_ranks], 0, num_biases=1)
            weighted = make_case(shape, "masked", [4, 9][:num_ranks], 1, with_weights=True)

            def act(rank: CudaNormalRank) -> None:
                rank.run_again(case, rank.run(case, How(in_place=True)), How())  # noqa: B023
                rank.run(weighted, How(num_worst_tokens=40, copy=True))  # noqa: B023

            on_ranks(CudaNormalShape(shape, num_rows, num_sms=2), act, TIMEOUT_SECS)
            num_exchanges += 3
    return num_exchanges


def main() -> None:
    num_exchanges = 0
    for settings in SETTINGS:
        scenario = mixed_scenario(replace(SHAPE, **settings), num_variants=3)
        ranks = [
            Interpreter(buffer, scenario)
            for buffer in scenario.shape.virtual_buffers(timeout_secs=TIMEOUT_SECS)
        ]
        for step in plain_loop(3, SHAPE.num_banks):
            for rank in ranks:
                rank.step(*step)
        num_exchanges += 3
        if "--one-stream" not in sys.argv:
            exchange(ranks, op=0, is_fused=True)
            num_exchanges += 1
    for settings in ON_STREAMS if "--one-stream" not in sys.argv else []:
        scenario = mixed_scenario(replace(SHAPE, **settings), num_variants=3)
        buffers = scenario.shape.virtual_buffers(timeout_secs=TIMEOUT_SECS)
        ranks = [Interpreter(buffer, scenario) for buffer in buffers]
        for op in range(3):
            exchange(ranks, op, is_fused=op > 0)
        num_exchanges += 3
    num_exchanges += exchange_normally(num_ranks=1 if "--one-stream" in sys.argv else 2)
    print(f"{num_exchanges} exchanges checked")


if __name__ == "__main__":
    main()
