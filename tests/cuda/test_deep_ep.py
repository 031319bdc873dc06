"""DeepEP's low-latency calls on CUDA tensors: virtual ranks on one GPU, a thread and a stream each."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from ep_backend import Group, virtual_world
from tests.deep_ep.support import Exchange, buffer_of
from tests.support.scenario import mixed_scenario
from tests.support.shapes import Shape

SHAPE = Shape(2, hidden=256, device="cuda")
FLOAT8 = {"dispatch_dtype": torch.float8_e4m3fn, "scale_format": "ue8m0"}


@pytest.mark.parametrize("is_hooked", [True, False], ids=["hook", "no-hook"])
@pytest.mark.parametrize("format", [{}, FLOAT8], ids=["bf16", "fp8-ue8m0"])
@pytest.mark.parametrize("reduction", ["rank", "source"])
def test_exchanges_equal_the_reference(
    reduction: str, format: dict[str, object], is_hooked: bool
) -> None:
    shape = replace(SHAPE, reduction=reduction, **format)
    scenario = mixed_scenario(shape, num_variants=5)

    def rank_main(group: Group) -> None:
        with torch.cuda.stream(torch.cuda.Stream()):
            buffer = buffer_of(group)
            for op in range(10):
                variant = scenario.variant(op)
                Exchange(buffer, shape, variant, is_hooked).run(zero_copy=op % 2 == 1)
            torch.cuda.synchronize()
            buffer.destroy()

    virtual_world(shape.num_ranks).run(rank_main)
