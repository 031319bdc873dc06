"""`ep_backend_high_throughput`: NormalBuffer behind vLLM's modular MoE kernel, for prefill.

The standard format with exact sizes: experts get the N rows that other ranks have for this one, and
no more. So the number is known on the host, and a step waits for it.
"""

from __future__ import annotations

import time
from typing import Any

import torch
import vllm.model_executor.layers.fused_moe.modular_kernel as mk
from vllm.model_executor.layers.fused_moe.topk_weight_and_reduce import (
    TopKWeightAndReduceContiguous,
    TopKWeightAndReduceDelegate,
)

from ep_backend import NormalBuffer, NormalDispatchHandle
from ep_backend.observe.trace import TraceWriter
from ep_backend_vllm.low_latency import Prepared, weighted_input

NUM_BYTES = 64 << 20
"""Of symmetric memory a rank and shape. Larger batches travel in rounds."""


class NormalPrepareAndFinalize(mk.FusedMoEPrepareAndFinalizeModular):
    """One per layer; layers of one shape share the buffer.

    Args:
        buffer: created for the layer's shape over the expert-parallel group.
    """

    def __init__(self, buffer: NormalBuffer) -> None:
        super().__init__()
        self.buffer = buffer
        self._handle: NormalDispatchHandle | None = None
        self._trace = TraceWriter.from_env(f"rank{buffer.group.self_rank}")

    @property
    def activation_format(self) -> mk.FusedMoEActivationFormat:
        return mk.FusedMoEActivationFormat.Standard

    def topk_indices_dtype(self) -> torch.dtype | None:
        return torch.int32

    def max_num_tokens_per_rank(self) -> int | None:
        return None

    def num_dispatchers(self) -> int:
        return self.buffer.group.num_ranks

    def output_is_reduced(self) -> bool:
        return True

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
        if isinstance(weight_and_reduce_impl, TopKWeightAndReduceDelegate):
            weight_and_reduce_impl = TopKWeightAndReduceContiguous()
        rows = weight_and_reduce_impl.apply(
            output=None,
            fused_expert_output=fused_expert_output,
            topk_weights=topk_weights,
            topk_ids=topk_ids,
            apply_router_weight_on_input=apply_router_weight_on_input,
        )
        handle, self._handle = self._handle, None
        assert handle is not None
        self.buffer.combine(rows, handle, out=output)
        self._record("finalize", output.shape[0], begin_ns)

    def _record(self, kind: str, num_tokens: int, begin_ns: int) -> None:
        if self._trace is not None:
            self._trace.add(kind, num_tokens, begin_ns, time.monotonic_ns() - begin_ns)
