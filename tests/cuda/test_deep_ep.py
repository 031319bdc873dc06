"""DeepEP's low-latency calls on CUDA tensors: virtual ranks, each a thread and a stream."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch

from ep_backend import Group, virtual_world
from tests.deep_ep.support import Exchange, buffer_of
from tests.support.scenario import Scenario
from tests.support.shapes import Shape

SHAPE = Shape(2, hidden=256, device="cuda")
FLOAT8 = {"dispatch_dtype": torch.float8_e4m3fn, "scale_format": "ue8m0"}


@pytest.mark.parametrize("way", ["hook", "no-hook", "async"])
@pytest.mark.parametrize("format_of", [{}, FLOAT8], ids=["bf16", "fp8-ue8m0"])
@pytest.mark.parametrize("reduction", ["rank", "source"])
def test_exchanges_equal_the_reference(reduction: str, format_of: dict[str, Any], way: str) -> None:
    shape = replace(SHAPE, reduction=reduction, **format_of)
    scenario = Scenario(shape)
    for seed, routing in enumerate(("uniform", "masked", "repeated", "skewed")):
        scenario.add(routing, [6, 3], seed)
    world = virtual_world(shape.num_ranks)
    streams = [torch.cuda.Stream() for _ in world.groups]

    def on_ranks(act: Callable[[int], object]) -> None:
        """All ranks at once; then the host waits for their kernels."""

        def run(group: Group) -> None:
            with torch.cuda.stream(streams[group.self_rank]):
                act(group.self_rank)

        torch.cuda.synchronize()
        world.run(run)
        torch.cuda.synchronize()

    buffers = [buffer_of(group) for group in world.groups]
    for op in range(10):
        # The first with hooks: what it loads on the way would wait for kernels that wait for peers.
        with_hook, variant = way == "hook" or op == 0, scenario.variant(op)
        is_async = way == "async" and not with_hook
        exchanges = [Exchange(buffer, shape, variant, with_hook, is_async) for buffer in buffers]
        on_ranks(lambda r: exchanges[r].dispatch())  # noqa: B023
        on_ranks(lambda r: exchanges[r].receive())  # noqa: B023
        on_ranks(lambda r: exchanges[r].combine(zero_copy=op % 2 == 1))  # noqa: B023
        on_ranks(lambda r: exchanges[r].finish())  # noqa: B023
    for buffer in buffers:
        buffer.destroy()
