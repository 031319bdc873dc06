"""The CUDA adapter in vLLM's real modular kernel, on a CPU: the buffer's workspaces are played."""

from __future__ import annotations

from typing import Any

import pytest
import torch

pytest.importorskip("vllm", reason="vLLM is not installed")

import ep_backend_vllm
import vllm.model_executor.layers.fused_moe.modular_kernel as mk
from ep_backend_vllm import backends, workspace

from ep_backend import Group, reference, virtual_world
from tests.integrations.played_workspaces import PlayedWorkspaces
from tests.integrations.vllm_layer import (
    HIDDEN,
    NUM_EXPERTS,
    NUM_RANKS,
    LoopExperts,
    apply_layer,
    batch_of,
    dense_layer,
    low_latency_buffer,
    moe_config_of,
    set_tokens_of_ranks,
    weights_of_experts,
)


@pytest.fixture(scope="module", autouse=True)
def _registered() -> None:
    ep_backend_vllm.register()


@pytest.mark.parametrize("is_async", [False, True], ids=["one-kernel", "hooks"])
def test_the_real_modular_kernel_equals_the_dense_layer(
    is_async: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    generator = torch.Generator().manual_seed(0)
    w1, w2 = weights_of_experts(generator)
    batches = [batch_of(generator, num_tokens) for num_tokens in (5, 2)]
    set_tokens_of_ranks(monkeypatch, [5, 2])

    def rank_main(group: Group) -> torch.Tensor:
        from vllm.model_executor.layers.fused_moe.config import FUSED_MOE_UNQUANTIZED_CONFIG

        inner = low_latency_buffer(group, torch.float32, output_layout="rank_major")
        buffer: Any = PlayedWorkspaces(inner)
        owned = slice(inner.first_expert, inner.first_expert + inner.num_local_experts)
        expert_map = torch.full((NUM_EXPERTS,), -1, dtype=torch.int32)
        expert_map[owned] = torch.arange(inner.num_local_experts, dtype=torch.int32)
        experts = LoopExperts(
            moe_config=moe_config_of(group, inner),
            quant_config=FUSED_MOE_UNQUANTIZED_CONFIG,
        )
        adapter = workspace.WorkspacePrepareAndFinalize(buffer, is_async)
        given: list[torch.Tensor | None] = []
        ask = adapter.allocate_fused_expert_output
        adapter.allocate_fused_expert_output = lambda *a: given.append(ask(*a)) or given[-1]
        kernel = mk.FusedMoEKernel(adapter, experts)
        out = apply_layer(kernel, inner, (w1, w2), batches[group.self_rank], expert_map)
        # vLLM asked where the experts shall write. (On a CPU it then does not care.)
        assert [t.data_ptr() for t in given if t is not None] == [
            buffer.combine_input(0, 5).data_ptr()
        ]
        return out

    outs = virtual_world(NUM_RANKS).run(rank_main)
    for out, (x, ids, weights) in zip(outs, batches, strict=True):
        torch.testing.assert_close(out, dense_layer(x, ids, weights, w1, w2))


def test_experts_that_want_float8_blocks_get_rows_and_scales(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from vllm.model_executor.layers.fused_moe.config import fp8_w8a8_moe_quant_config

    one = torch.ones(1)
    blocks = fp8_w8a8_moe_quant_config(one, one, block_shape=[128, 128])
    x, ids, weights = batch_of(torch.Generator().manual_seed(0), num_tokens=3)
    x = x.to(torch.bfloat16)
    set_tokens_of_ranks(monkeypatch, [4])  # another rank would have one more

    def rank_main(group: Group) -> None:
        inner = low_latency_buffer(group, torch.bfloat16, torch.float8_e4m3fn, "rank_major")
        adapter = workspace.WorkspacePrepareAndFinalize(PlayedWorkspaces(inner), is_async=False)
        rows, scales, meta, got_ids, got_weights = adapter.prepare(
            x, weights, ids, NUM_EXPERTS, None, False, blocks
        )
        expected, expected_scales = reference.quantize(x, "float32")
        assert meta is None
        assert rows.shape == (4, HIDDEN)
        assert torch.equal(rows[:3].view(torch.uint8), expected.view(torch.uint8))
        assert torch.equal(scales[:3], expected_scales)
        assert torch.equal(got_ids[:3], ids)
        assert torch.equal(got_weights[:3], weights)

    virtual_world(1).run(rank_main)


def test_all_that_vllm_declares_abstract_is_there() -> None:
    assert not workspace.WorkspacePrepareAndFinalize.__abstractmethods__


def test_the_format_is_batched_on_a_cpu_unless_asked_otherwise(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.delenv(backends.FORMAT_VARIABLE, raising=False)
    assert backends.uses_batched_format()
    monkeypatch.setenv(backends.FORMAT_VARIABLE, "standard")
    assert not backends.uses_batched_format()
    monkeypatch.setenv(backends.FORMAT_VARIABLE, "packed")
    with pytest.raises(ValueError, match="EP_BACKEND_VLLM_FORMAT is 'packed', expected batched or"):
        backends.uses_batched_format()
