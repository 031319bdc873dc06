"""`ep_backend_low_latency`: LowLatencyBuffer behind vLLM's modular MoE kernel.

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
from ep_backend.observe.trace import TraceWriter

Prepared = tuple[Any, ...]


class LowLatencyPrepareAndFinalize(mk.FusedMoEPrepareAndFinalizeModular):
    """One per layer; layers of one shape share the buffer.

    Args:
        buffer: created for the layer's shape over the expert-parallel group.
    """

    def __init__(self, buffer: LowLatencyBuffer) -> None:
        super().__init__()
        self.buffer = buffer
        # By micro-batch: finalize follows prepare, but the other micro-batch may come in between.
        self._handles: dict[int, DispatchHandle] = {}
        self._trace = TraceWriter.from_env(f"rank{buffer.group.self_rank}")

    @property
    def activation_format(self) -> mk.FusedMoEActivationFormat:
        return mk.FusedMoEActivationFormat.BatchedExperts

    def topk_indices_dtype(self) -> torch.dtype | None:
        return torch.int32

    def max_num_tokens_per_rank(self) -> int | None:
        return self.buffer.num_max_tokens_per_rank

    def num_dispatchers(self) -> int:
        return self.buffer.group.num_ranks

    def output_is_reduced(self) -> bool:
        return True

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
        `(x [L, S, H], None, counts, None, None)`; None ids and weights mean vLLM keeps its own."""
        begin_ns = time.monotonic_ns()
        if quant_config.quant_dtype is not None and not defer_input_quant:
            raise NotImplementedError(
                f"ep_backend_low_latency dispatches unquantised activations; this layer wants "
                f"{quant_config.quant_dtype}. Choose experts that quantise their input themselves, "
                "or another --all2all-backend."
            )
        if apply_router_weight_on_input:
            if topk_ids.shape[1] != 1:
                raise NotImplementedError(
                    f"apply_router_weight_on_input needs top_k 1, this layer has "
                    f"{topk_ids.shape[1]}."
                )
            a1 = a1 * topk_weights.to(a1.dtype)
            topk_weights = torch.ones_like(topk_weights)
        result, hook = self.buffer.dispatch(a1.contiguous(), topk_ids, topk_weights)
        self._handles[dbo_current_ubatch_id()] = result.handle

        def receiver() -> Prepared:
            counts = result.num_recv_tokens_per_expert
            meta = mk.ExpertTokensMetadata(
                expert_num_tokens=counts,
                expert_num_tokens_cpu=counts if counts.device.type == "cpu" else None,
            )
            self._record("prepare", a1.shape[0], begin_ns)
            return result.recv_x, None, meta, None, None

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

    def _record(self, kind: str, num_tokens: int, begin_ns: int) -> None:
        if self._trace is not None:
            self._trace.add(kind, num_tokens, begin_ns, time.monotonic_ns() - begin_ns)
