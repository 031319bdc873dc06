"""vLLM's dual-batch overlap: its order of sends and hooks, through our adapters."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("vllm", reason="vLLM is not installed")

from tests.integrations.vllm_layer import NUM_RANKS, batch_of, dense_layer, weights_of_experts
from tests.support.processes import Rank, RankProcesses

NUM_LAYERS, NUM_STEPS = 3, 2


def step_inputs(seed: int) -> tuple[list, list]:
    """Of every rank: two micro-batches; and the layers' weights."""
    generator = torch.Generator().manual_seed(seed)
    layers = [weights_of_experts(generator) for _ in range(NUM_LAYERS)]
    batches = [[batch_of(generator, n) for n in (5, 3)], [batch_of(generator, n) for n in (2, 3)]]
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
    for step in range(NUM_STEPS):
        _, batches = step_inputs(step)
        outs.append(micro_batches.run_step(layers, batches[rank.group.self_rank], [5, 3]))
    return outs


@pytest.mark.parametrize("output_format", ["batched", "standard"])
def test_two_micro_batches_equal_the_dense_model(output_format: str) -> None:
    with RankProcesses(NUM_RANKS) as ranks:
        outs = ranks.run(run_model, output_format)
    layers, _ = step_inputs(0)
    for step in range(NUM_STEPS):
        _, batches = step_inputs(step)
        for rank in range(NUM_RANKS):
            for (x, ids, weights), out in zip(batches[rank], outs[rank][step], strict=True):
                expected = x
                for w1, w2 in layers:
                    expected = expected + dense_layer(expected, ids, weights, w1, w2)
                torch.testing.assert_close(out, expected, rtol=1e-4, atol=1e-4)
