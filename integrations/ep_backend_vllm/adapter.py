"""What our adapters to vLLM's modular MoE kernel have in common."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any, Generic, TypeVar

import torch
import vllm.model_executor.layers.fused_moe.modular_kernel as mk
from vllm.forward_context import get_forward_context, is_forward_context_available
from vllm.model_executor.layers.fused_moe.topk_weight_and_reduce import (
    TopKWeightAndReduceContiguous,
    TopKWeightAndReduceDelegate,
)
from vllm.model_executor.layers.fused_moe.utils import moe_kernel_quantize_input

from ep_backend import LowLatencyBuffer, NormalBuffer
from ep_backend.observe.trace import TraceWriter

Prepared = tuple[Any, ...]
B = TypeVar("B", LowLatencyBuffer, NormalBuffer)


class Adapter(mk.FusedMoEPrepareAndFinalizeModular, Generic[B]):
    """One per layer; layers of one shape share the buffer.

    Args:
        buffer: created for the layer's shape over the expert-parallel group.
    """

    def __init__(self, buffer: B) -> None:
        super().__init__()
        self.buffer: B = buffer
        self._trace = TraceWriter.from_env(f"rank{buffer.group.self_rank}")

    def topk_indices_dtype(self) -> torch.dtype | None:
        return torch.int32

    def num_dispatchers(self) -> int:
        return self.buffer.group.num_ranks

    def output_is_reduced(self) -> bool:
        return True

    def _record(self, kind: str, num_tokens: int, begin_ns: int) -> None:
        if self._trace is not None:
            self._trace.add(kind, num_tokens, begin_ns, time.monotonic_ns() - begin_ns)


class StandardAdapter(Adapter[B]):
    """Of vLLM's standard format: a row a token, with its experts and weights beside it."""

    @property
    def activation_format(self) -> mk.FusedMoEActivationFormat:
        return mk.FusedMoEActivationFormat.Standard

    def max_num_tokens_per_rank(self) -> int | None:
        return None

    def _have_own_expert(self, idx: torch.Tensor) -> torch.Tensor:
        """`[N]` bool, of rows with global numbers `[N, K]`."""
        first = self.buffer.first_expert
        return ((idx >= first) & (idx < first + self.buffer.num_local_experts)).any(1)


def tokens_of_ranks() -> list[int]:
    """Of this step, of each rank that exchanges, or of each data-parallel rank, where all of its
    tensor-parallel ranks hold as many; the same list on all of them. Empty where vLLM does not
    say."""
    if not is_forward_context_available():
        return []
    metadata = get_forward_context().dp_metadata
    sizes = None if metadata is None else metadata.get_chunk_sizes_across_dp_rank()
    return list(sizes or ())


def weighted_input(
    a1: torch.Tensor, topk_weights: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """`a1` times the weights of its only expert, and weights of 1."""
    if topk_weights.shape[1] != 1:
        raise NotImplementedError(
            f"apply_router_weight_on_input needs top_k 1, this layer has {topk_weights.shape[1]}."
        )
    return a1 * topk_weights.to(a1.dtype), torch.ones_like(topk_weights)


def quantised_rows(
    x: torch.Tensor,
    scales: torch.Tensor | None,
    quant_config: Any,
    defer_input_quant: bool,
    find_used: Callable[[], torch.Tensor] | None = None,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Received rows as the experts take them. What travels is bfloat16, or blocks of float8 with
    scales; experts that want anything else get it quantised here.

    Args:
        find_used: `[N]` bool, which rows hold a token; None: all. Others hold anything, which must
            not count where all rows share a scale that is made here.
    """
    is_wanted = quant_config.quant_dtype is not None and not defer_input_quant
    if scales is not None or not is_wanted or x.numel() == 0:
        return x, scales
    is_nvfp4 = quant_config.quant_dtype == "nvfp4"
    scale = quant_config.a1_gscale if is_nvfp4 else quant_config.a1_scale
    has_one_scale = not quant_config.per_act_token_quant and quant_config.block_shape is None
    if find_used is not None and scale is None and has_one_scale:
        x = torch.where(find_used()[:, None], x, 0)
    return moe_kernel_quantize_input(
        x,
        scale,
        quant_dtype=quant_config.quant_dtype,
        per_act_token_quant=quant_config.per_act_token_quant,
        block_shape=quant_config.block_shape,
        is_scale_swizzled=quant_config.is_scale_swizzled,
    )


def dispatch_dtype_for(quant_config: Any, dtype: torch.dtype) -> torch.dtype:
    """How rows travel: quantised where the experts want float8 with a scale for every 128 channels,
    which is half the bytes of bfloat16, else as they are."""
    wants_blocks = (
        quant_config is not None
        and quant_config.quant_dtype == torch.float8_e4m3fn
        and quant_config.block_shape is not None
        and quant_config.block_shape[1] == 128
    )
    return torch.float8_e4m3fn if wants_blocks else dtype


def reduced_rows(
    fused_expert_output: torch.Tensor,
    topk_weights: torch.Tensor,
    topk_ids: torch.Tensor,
    apply_router_weight_on_input: bool,
    weight_and_reduce_impl: mk.TopKWeightAndReduce,
) -> torch.Tensor:
    """Of standard-format experts: their output, weighted and summed over k if they have not done so
    themselves."""
    if isinstance(weight_and_reduce_impl, TopKWeightAndReduceDelegate):
        weight_and_reduce_impl = TopKWeightAndReduceContiguous()
    return weight_and_reduce_impl.apply(
        output=None,
        fused_expert_output=fused_expert_output,
        topk_weights=topk_weights,
        topk_ids=topk_ids,
        apply_router_weight_on_input=apply_router_weight_on_input,
    )
