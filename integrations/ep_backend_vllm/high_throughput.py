"""`ep_backend_high_throughput`: NormalBuffer behind vLLM's modular MoE kernel, for prefill.

The standard format with exact sizes: experts get the N rows that other ranks have for this one, and
no more. So the number is known on the host, and a step waits for it.
"""

from __future__ import annotations

import time
from typing import Any

import torch
import vllm.model_executor.layers.fused_moe.modular_kernel as mk

from ep_backend import NormalBuffer, NormalDispatchHandle
from ep_backend_vllm.adapter import Prepared, StandardAdapter, reduced_rows, weighted_input


class NormalPrepareAndFinalize(StandardAdapter[NormalBuffer]):
    """A finalize follows each prepare."""

    def __init__(self, buffer: NormalBuffer) -> None:
        super().__init__(buffer)
        self._handle: NormalDispatchHandle | None = None

    def supports_async(self) -> bool:
        return False

    def prepare(
        self,
        a1: torch.Tensor,
        topk_weights: torch.Tensor,
        topk_ids: torch.Tensor,
        num_experts: int,
        expert_map: torch.Tensor | None,
        apply_router_weight_on_input: bool,
        quant_config: Any,
        defer_input_quant: bool = False,
    ) -> Prepared:
        """Sends `a1` `[T, H]` to its experts, and receives `(x [N, H], None, None, ids [N, K],
        weights [N, K])`. Ids are local, as vLLM's CPU experts want them; a place without an expert
        of this rank has expert 0 with weight 0."""
        begin_ns = time.monotonic_ns()
        if quant_config.quant_dtype is not None and not defer_input_quant:
            raise NotImplementedError(
                f"ep_backend_high_throughput dispatches rows as they are; this layer wants "
                f"{quant_config.quant_dtype}. Choose another --all2all-backend."
            )
        if apply_router_weight_on_input:
            a1, topk_weights = weighted_input(a1, topk_weights)
        result = self.buffer.dispatch(a1.contiguous(), topk_ids, topk_weights)
        self._handle = result.handle
        self._record("prepare", a1.shape[0], begin_ns)
        ids = result.recv_topk_idx.clamp(min=0).to(torch.int32)
        return result.recv_x, None, None, ids, result.recv_topk_weights

    def finalize(
        self,
        output: torch.Tensor,
        fused_expert_output: torch.Tensor,
        topk_weights: torch.Tensor,
        topk_ids: torch.Tensor,
        apply_router_weight_on_input: bool,
        weight_and_reduce_impl: mk.TopKWeightAndReduce,
    ) -> None:
        """Sends the experts' rows `[N, H]` home; `output` `[T, H]` is the sum."""
        begin_ns = time.monotonic_ns()
        rows = reduced_rows(
            fused_expert_output,
            topk_weights,
            topk_ids,
            apply_router_weight_on_input,
            weight_and_reduce_impl,
        )
        handle, self._handle = self._handle, None
        assert handle is not None
        self.buffer.combine(rows, handle, out=output)
        self._record("finalize", output.shape[0], begin_ns)
