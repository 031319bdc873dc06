"""A few small exchanges for compute-sanitizer, which makes kernels many times slower.

compute-sanitizer --tool memcheck python -m tests.cuda.sanitized
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch

from tests.support.programs import Interpreter, plain_loop
from tests.support.scenario import mixed_scenario
from tests.support.shapes import Shape

SHAPE = Shape(2, num_max_tokens_per_rank=5, hidden=272, device="cuda")
FLOAT8 = {"dispatch_dtype": torch.float8_e4m3fn, "scale_format": "ue8m0"}
SETTINGS: list[dict[str, Any]] = [
    {"num_max_tagged_tokens": 5},
    {"num_max_tagged_tokens": 0},
    {"num_max_tagged_tokens": 2, "transfer": "push"},
    FLOAT8 | {"num_max_tagged_tokens": 2},
    FLOAT8 | {"output_layout": "rank_major", "num_max_tagged_tokens": 0, "num_combine_inputs": 2},
]
TIMEOUT_SECS = 120.0


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
        num_exchanges += exchange_in_one_kernel_each(ranks)
    print(f"{num_exchanges} exchanges checked")


def exchange_in_one_kernel_each(ranks: list[Interpreter]) -> int:
    """As above, with kernels of all ranks on the GPU at the same time."""
    streams = [torch.cuda.Stream() for _ in ranks]
    inputs = [rank.inputs(0) for rank in ranks]
    torch.cuda.synchronize()
    results = []
    for rank, stream, arguments in zip(ranks, streams, inputs, strict=True):
        with torch.cuda.stream(stream):
            results.append(rank.buffer.dispatch_and_receive(*arguments))
    torch.cuda.synchronize()
    for rank, result in zip(ranks, results, strict=True):
        rank.take_received(0, result)
    torch.cuda.synchronize()
    outs = []
    for rank, stream, result in zip(ranks, streams, results, strict=True):
        with torch.cuda.stream(stream):
            outs.append(rank.buffer.combine_and_receive(rank.expert_out[0], result.handle))
    torch.cuda.synchronize()
    for rank, out in zip(ranks, outs, strict=True):
        rank.check_combined(0, out)
        rank.buffer.raise_if_failed()
    return 1


if __name__ == "__main__":
    main()
