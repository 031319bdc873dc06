"""A small MoE layer for vLLM's real modular kernel: its shape, weights, tokens and results."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
import vllm.model_executor.layers.fused_moe.modular_kernel as mk
from ep_backend_vllm import adapter
from ep_backend_vllm.backends import LOW_LATENCY
from vllm.model_executor.layers.fused_moe.topk_weight_and_reduce import TopKWeightAndReduceNoOP

from ep_backend import Group, LowLatencyBuffer, NormalBuffer

NUM_RANKS, NUM_EXPERTS, TOP_K, HIDDEN, INTERMEDIATE, MAX_TOKENS = 2, 6, 2, 64, 32, 16


def weights_of_experts(generator: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
    """w1 `[E, 2I, H]` and w2 `[E, H, I]`."""
    w1 = torch.randn(NUM_EXPERTS, 2 * INTERMEDIATE, HIDDEN, generator=generator) / HIDDEN**0.5
    w2 = torch.randn(NUM_EXPERTS, HIDDEN, INTERMEDIATE, generator=generator) / INTERMEDIATE**0.5
    return w1, w2


def batch_of(
    generator: torch.Generator, num_tokens: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    x = torch.randn(num_tokens, HIDDEN, generator=generator)
    scores = torch.rand(num_tokens, NUM_EXPERTS, generator=generator)
    weights, ids = scores.topk(TOP_K, dim=-1)
    return x, ids.to(torch.int32), weights


def dense_layer(
    x: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor, w1: torch.Tensor, w2: torch.Tensor
) -> torch.Tensor:
    out = torch.zeros_like(x)
    for token in range(x.shape[0]):
        for k in range(TOP_K):
            expert = int(ids[token, k])
            gate, up = (w1[expert] @ x[token]).chunk(2)
            out[token] += weights[token, k] * (w2[expert] @ (torch.nn.functional.silu(gate) * up))
    return out


def set_tokens_of_ranks(monkeypatch: pytest.MonkeyPatch, num_tokens: list[int]) -> None:
    """As vLLM tells them in a step."""
    metadata = SimpleNamespace(get_chunk_sizes_across_dp_rank=lambda: num_tokens)
    context = SimpleNamespace(dp_metadata=metadata)
    monkeypatch.setattr(adapter, "is_forward_context_available", lambda: True)
    monkeypatch.setattr(adapter, "get_forward_context", lambda: context)


class LoopExperts(mk.FusedMoEExpertsModular):
    """Standard-format experts, row by row."""

    @staticmethod
    def activation_format() -> mk.FusedMoEActivationFormat:
        return mk.FusedMoEActivationFormat.Standard

    @staticmethod
    def _supports_current_device() -> bool:
        return True

    @staticmethod
    def _supports_no_act_and_mul() -> bool:
        return False

    @staticmethod
    def _supports_quant_scheme(*args: Any) -> bool:
        return True

    @staticmethod
    def _supports_activation(*args: Any) -> bool:
        return True

    @staticmethod
    def _supports_parallel_config(*args: Any) -> bool:
        return True

    def finalize_weight_and_reduce_impl(self) -> mk.TopKWeightAndReduce:
        return TopKWeightAndReduceNoOP()

    def workspace_shapes(self, m: int, n: int, k: int, topk: int, *args: Any, **_: Any) -> Any:
        return (0,), (0,), (m, k)

    def apply(self, output: torch.Tensor, **given: Any) -> None:
        x, w1, w2 = given["hidden_states"], given["w1"], given["w2"]
        rows = torch.zeros(len(x), TOP_K, HIDDEN)
        for row in range(len(x)):
            for k in range(TOP_K):
                local = int(given["topk_ids"][row, k])
                if given["expert_map"] is not None:
                    local = int(given["expert_map"][local])
                if local >= 0:
                    gate, up = (w1[local] @ x[row]).chunk(2)
                    rows[row, k] = w2[local] @ (torch.nn.functional.silu(gate) * up)
        output.copy_((rows * given["topk_weights"][:, :, None]).sum(1))


class DenseExperts(LoopExperts):
    """The same without a loop over rows: every expert computes all of them, so that a graph can
    hold it. Rows without a token may hold anything."""

    def apply(self, output: torch.Tensor, **given: Any) -> None:
        x, w1, w2 = given["hidden_states"], given["w1"], given["w2"]
        local = given["expert_map"][given["topk_ids"].long()]
        used = (local >= 0).any(1)[:, None]
        x = torch.where(used, x, 0)
        total = torch.zeros_like(x)
        for expert in range(len(w1)):
            gate, up = (x @ w1[expert].T).chunk(2, dim=1)
            rows = (torch.nn.functional.silu(gate) * up) @ w2[expert].T
            weight = torch.where(local == expert, given["topk_weights"], 0).sum(1)
            total += weight[:, None].to(rows.dtype) * rows
        output.copy_(total)


def low_latency_buffer(
    group: Group,
    dtype: torch.dtype,
    dispatch_dtype: torch.dtype | None = None,
    output_layout: str = "expert_major",
) -> LowLatencyBuffer:
    return LowLatencyBuffer(
        group,
        num_max_tokens_per_rank=MAX_TOKENS,
        hidden=HIDDEN,
        num_experts=NUM_EXPERTS,
        top_k=TOP_K,
        dtype=dtype,
        dispatch_dtype=dispatch_dtype,
        output_layout=output_layout,
    )


def normal_buffer(
    group: Group,
    dtype: torch.dtype = torch.float32,
    dispatch_dtype: torch.dtype | None = None,
    device: str = "cpu",
    expert_ids: str = "local",
) -> NormalBuffer:
    return NormalBuffer(
        group,
        hidden=HIDDEN,
        num_experts=NUM_EXPERTS,
        top_k=TOP_K,
        dtype=dtype,
        dispatch_dtype=dispatch_dtype,
        num_bytes=1 << 20,
        device=device,
        expert_ids=expert_ids,
    )


def expert_map_of(buffer: LowLatencyBuffer | NormalBuffer) -> torch.Tensor:
    expert_map = torch.full((NUM_EXPERTS,), -1, dtype=torch.int32)
    owned = torch.arange(buffer.num_local_experts, dtype=torch.int32)
    expert_map[buffer.first_expert :][: len(owned)] = owned
    return expert_map


def apply_layer(
    kernel: mk.FusedMoEKernel,
    buffer: LowLatencyBuffer | NormalBuffer,
    weights_of_all: tuple[torch.Tensor, torch.Tensor],
    batch: tuple[torch.Tensor, torch.Tensor, torch.Tensor],
    expert_map: torch.Tensor | None = None,
) -> torch.Tensor:
    """One rank's share of the layer. `buffer` says which experts are its own."""
    owned = slice(buffer.first_expert, buffer.first_expert + buffer.num_local_experts)
    w1, w2 = weights_of_all
    x, ids, weights = batch
    return kernel.apply(
        hidden_states=x,
        w1=w1[owned],
        w2=w2[owned],
        topk_weights=weights,
        topk_ids=ids,
        activation=kernel.moe_config.activation,
        global_num_experts=NUM_EXPERTS,
        expert_map=expert_map,
        apply_router_weight_on_input=False,
    )


def moe_config_of(group: Group, buffer: LowLatencyBuffer | NormalBuffer) -> object:
    from vllm.model_executor.layers.fused_moe.activation import MoEActivation
    from vllm.model_executor.layers.fused_moe.config import (
        FusedMoEConfig,
        FusedMoEParallelConfig,
        RoutingMethodType,
    )

    parallel = FusedMoEParallelConfig(
        tp_size=1,
        pcp_size=1,
        dp_size=group.num_ranks,
        ep_size=group.num_ranks,
        tp_rank=0,
        pcp_rank=0,
        dp_rank=group.self_rank,
        ep_rank=group.self_rank,
        sp_size=1,
        use_ep=True,
        all2all_backend=LOW_LATENCY,
        enable_eplb=False,
    )
    return FusedMoEConfig(
        num_experts=NUM_EXPERTS,
        experts_per_token=TOP_K,
        hidden_dim=HIDDEN,
        intermediate_size=INTERMEDIATE,
        num_local_experts=buffer.num_local_experts,
        num_logical_experts=NUM_EXPERTS,
        activation=MoEActivation.SILU,
        device="cpu",
        routing_method=RoutingMethodType.Renormalize,
        moe_parallel_config=parallel,
        in_dtype=torch.float32,
        max_num_tokens=MAX_TOKENS,
    )
