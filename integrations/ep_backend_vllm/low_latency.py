"""`ep_backend_low_latency` on CPU: LowLatencyBuffer behind vLLM's modular MoE kernel.

The batched-experts format: experts get `[L, S, H]` and a count each (L local experts,
S = ranks * max tokens rows). `prepare_async` and `finalize_async` send and return (hook, receiver),
so that vLLM overlaps transfers with shared experts, and with the other micro-batch.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import torch
import vllm.model_executor.layers.fused_moe.modular_kernel as mk
from vllm.model_executor.layers.fused_moe.topk_weight_and_reduce import TopKWeightAndReduceDelegate
from vllm.v1.worker.ubatching import dbo_current_ubatch_id, dbo_maybe_run_recv_hook

from ep_backend import DispatchHandle, LowLatencyBuffer
from ep_backend_vllm.adapter import Adapter, Prepared, weighted_input


class LowLatencyPrepareAndFinalize(Adapter[LowLatencyBuffer]):
    """In the batched-experts format."""

    def __init__(self, buffer: LowLatencyBuffer) -> None:
        super().__init__(buffer)
        # By micro-batch: finalize follows prepare, but the other micro-batch may come in between.
        self._handles: dict[int, DispatchHandle] = {}

    @property
    def activation_format(self) -> mk.FusedMoEActivationFormat:
        return mk.FusedMoEActivationFormat.BatchedExperts

    def max_num_tokens_per_rank(self) -> int | None:
        return self.buffer.num_max_tokens_per_rank

    def supports_async(self) -> bool:
        return True

    def prepare_async(
        self,
        a1: torch.Tensor,
        topk_weights: torch.Tensor,
        topk_ids: torch.Tensor,
        num_experts: int,
        expert_map: torch.Tensor | None,
        apply_router_weight_on_input: bool,
        quant_config: Any,
        defer_input_quant: bool = False,
    ) -> tuple[Callable[[], None], Callable[[], Prepared]]:
        """Sends `a1` `[T, H]` to its experts. The receiver gives
        `(x [L, S, H], scales [L, S, H / 128] or None, counts, None, None)`; None ids and weights
        mean vLLM keeps its own."""
        begin_ns = time.monotonic_ns()
        self._check_quantisation(quant_config, defer_input_quant)
        if apply_router_weight_on_input:
            a1, topk_weights = weighted_input(a1, topk_weights)
        result, hook = self.buffer.dispatch(a1.contiguous(), topk_ids, topk_weights)
        self._handles[dbo_current_ubatch_id()] = result.handle

        def receiver() -> Prepared:
            counts = result.num_recv_tokens_per_expert
            meta = mk.ExpertTokensMetadata(
                expert_num_tokens=counts,
                expert_num_tokens_cpu=counts if counts.device.type == "cpu" else None,
            )
            self._record("prepare", a1.shape[0], begin_ns)
            return result.recv_x, result.recv_scales, meta, None, None

        return hook, receiver

    def finalize_async(
        self,
        output: torch.Tensor,
        fused_expert_output: torch.Tensor,
        topk_weights: torch.Tensor,
        topk_ids: torch.Tensor,
        apply_router_weight_on_input: bool,
        weight_and_reduce_impl: mk.TopKWeightAndReduce,
    ) -> tuple[Callable[[], None], Callable[[], None]]:
        """Sends the experts' rows `[L, S, H]` home, weighted; `output` `[T, H]` is the sum."""
        begin_ns = time.monotonic_ns()
        if not isinstance(weight_and_reduce_impl, TopKWeightAndReduceDelegate):
            raise NotImplementedError(
                "ep_backend_low_latency weights and sums inside combine; these experts bring "
                f"{type(weight_and_reduce_impl).__name__}, expected TopKWeightAndReduceDelegate."
            )
        handle = self._handles.pop(dbo_current_ubatch_id())
        dbo_maybe_run_recv_hook()  # of the other micro-batch: hooks run in the order of their sends
        _, hook = self.buffer.combine(fused_expert_output, handle, out=output)
        return hook, lambda: self._record("finalize", output.shape[0], begin_ns)

    def prepare(self, *args: Any, **kwargs: Any) -> Prepared:
        hook, receiver = self.prepare_async(*args, **kwargs)
        hook()
        return receiver()

    def finalize(self, *args: Any, **kwargs: Any) -> None:
        hook, receiver = self.finalize_async(*args, **kwargs)
        hook()
        receiver()

    def _check_quantisation(self, quant_config: Any, defer_input_quant: bool) -> None:
        """The buffer was made for what the layer's experts take; experts may differ in the end."""
        is_quantised = self.buffer.num_scales > 0
        if defer_input_quant:
            is_right, wanted = not is_quantised, "unquantised activations"
        else:
            wanted = quant_config.quant_dtype
            is_right = is_quantised or wanted is None
        if not is_right:
            raise NotImplementedError(
                f"ep_backend_low_latency dispatches {self.buffer.dispatch_dtype} here; this layer "
                f"wants {wanted}. It dispatches float8 with a scale for every 128 channels, and "
                "unquantised activations: choose experts that take either, or another "
                "--all2all-backend."
            )
