"""The prefill adapter in vLLM's real modular kernel."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("vllm", reason="vLLM is not installed")

import ep_backend_vllm
import vllm.model_executor.layers.fused_moe.modular_kernel as mk
from ep_backend_vllm.high_throughput import NormalPrepareAndFinalize
from vllm.model_executor.layers.fused_moe.config import (
    FUSED_MOE_UNQUANTIZED_CONFIG,
    fp8_w8a8_moe_quant_config,
)

from ep_backend import Group, NormalBuffer, virtual_world
from tests.integrations.vllm_layer import (
    HIDDEN,
    NUM_EXPERTS,
    NUM_RANKS,
    TOP_K,
    LoopExperts,
    apply_layer,
    batch_of,
    dense_layer,
    moe_config_of,
    weights_of_experts,
)


@pytest.fixture(scope="module", autouse=True)
def _registered() -> None:
    ep_backend_vllm.register()


def buffer_of(group: Group) -> NormalBuffer:
    return NormalBuffer(
        group,
        hidden=HIDDEN,
        num_experts=NUM_EXPERTS,
        top_k=TOP_K,
        dtype=torch.float32,
        num_bytes=1 << 20,
    )


@pytest.mark.parametrize("num_tokens", [(5, 2), (4, 4), (3, 0)])
def test_the_real_modular_kernel_equals_the_dense_layer(num_tokens: tuple[int, int]) -> None:
    """With (4, 4) a rank may receive as many rows as it has tokens: experts then write to the
    output itself."""
    generator = torch.Generator().manual_seed(0)
    w1, w2 = weights_of_experts(generator)
    batches = [batch_of(generator, n) for n in num_tokens]

    def rank_main(group: Group) -> torch.Tensor:
        buffer = buffer_of(group)
        experts = LoopExperts(
            moe_config=moe_config_of(group, buffer), quant_config=FUSED_MOE_UNQUANTIZED_CONFIG
        )
        kernel = mk.FusedMoEKernel(NormalPrepareAndFinalize(buffer), experts)
        return apply_layer(kernel, buffer, (w1, w2), batches[group.self_rank])

    outs = virtual_world(NUM_RANKS).run(rank_main)
    for out, (x, ids, weights) in zip(outs, batches, strict=True):
        torch.testing.assert_close(out, dense_layer(x, ids, weights, w1, w2))


def test_all_that_vllm_declares_abstract_is_there() -> None:
    assert not NormalPrepareAndFinalize.__abstractmethods__


def test_quantised_activations_are_refused() -> None:
    one = torch.ones(1)
    blocks = fp8_w8a8_moe_quant_config(one, one, block_shape=[128, 128])
    x, ids, weights = batch_of(torch.Generator().manual_seed(0), num_tokens=3)

    def rank_main(group: Group) -> None:
        adapter = NormalPrepareAndFinalize(buffer_of(group))
        with pytest.raises(NotImplementedError, match="this layer wants"):
            adapter.prepare(x, weights, ids, NUM_EXPERTS, None, False, blocks)

    virtual_world(1).run(rank_main)
