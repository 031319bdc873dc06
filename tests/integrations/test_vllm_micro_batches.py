"""vLLM's dual-batch overlap: its order of sends and hooks, through our adapters."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("vllm", reason="vLLM is not installed")

from tests.integrations.vllm_layer import NUM_RANKS, batch_of, dense_layer, weights_of_experts
from tests.support.processes import Rank, RankProcesses

NUM_LAYERS = 3
# Tokens of each rank: in two micro-batches, or all at once, as when a rank has too few to split.
STEPS = (
    ((5, 3), (2, 3)),
    ((7,), (1,)),
    ((4, 4), (4, 4)),
    ((0,), (12,)),
    ((1,), (0,)),
    ((8, 8), (7, 1)),
)


def step_inputs(step: int) -> tuple[list, list]:
    """The layers' weights, and of every rank the step's batches."""
    generator = torch.Generator().manual_seed(0)
    layers = [weights_of_experts(generator) for _ in range(NUM_LAYERS)]
    generator.manual_seed(step + 1)
    batches = [[batch_of(generator, n) for n in of_rank] for of_rank in STEPS[step]]
    return layers, batches


def run_model(rank: Rank, output_format: str) -> list[list[torch.Tensor]]:
    from tests.integrations import micro_batches
    from tests.integrations.test_vllm_workspace import PlayedWorkspaces
    from tests.integrations.vllm_layer import low_latency_buffer

    micro_batches.play_streams()
    layers_weights, _ = step_inputs(0)
    if output_format == "batched":
        _, layers = micro_batches.batched_layers(rank.group, layers_weights)
    else:
        inner = low_latency_buffer(rank.group, torch.float32, output_layout="rank_major")
        played = PlayedWorkspaces(inner)
        _, layers = micro_batches.workspace_layers(rank.group, layers_weights, played)
    outs = []
    for step in range(len(STEPS)):
        _, batches = step_inputs(step)
        num_slots = [max(1, *sizes) for sizes in zip(*STEPS[step], strict=True)]
        outs.append(micro_batches.run_step(layers, batches[rank.group.self_rank], num_slots))
    return outs


@pytest.mark.parametrize("output_format", ["batched", "standard"])
def test_steps_in_micro_batches_and_whole_ones_equal_the_dense_model(output_format: str) -> None:
    with RankProcesses(NUM_RANKS) as ranks:
        outs = ranks.run(run_model, output_format)
    layers, _ = step_inputs(0)
    for step in range(len(STEPS)):
        _, batches = step_inputs(step)
        for rank in range(NUM_RANKS):
            for (x, ids, weights), out in zip(batches[rank], outs[rank][step], strict=True):
                expected = x
                for w1, w2 in layers:
                    expected = expected + dense_layer(expected, ids, weights, w1, w2)
                torch.testing.assert_close(out, expected, rtol=1e-4, atol=1e-4)
