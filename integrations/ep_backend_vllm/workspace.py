"""`ep_backend_low_latency` on CUDA: LowLatencyBuffer's workspaces behind vLLM's modular MoE kernel.

The standard format, which most of vLLM's experts take: a row for each token that a source has for
this rank, with the experts and weights of its router beside it. Rows arrive where the experts read
them, and the experts write where the sources fetch them: nothing is packed or copied.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypedDict

import torch
import vllm.model_executor.layers.fused_moe.modular_kernel as mk
from vllm.v1.worker.ubatching import dbo_current_ubatch_id, dbo_maybe_run_recv_hook

from ep_backend import DispatchHandle, DispatchResult, LowLatencyBuffer
from ep_backend_vllm.adapter import (
    Prepared,
    StandardAdapter,
    quantised_rows,
    reduced_rows,
    tokens_of_ranks,
    weighted_input,
)

# A micro-batch of vLLM's dual-batch overlap each.
NUM_WORKSPACES = 2


class _Place(TypedDict):
    """Of a dispatch: the micro-batch's workspace, and its slots."""

    workspace: int
    num_slots: int


@dataclass
class _InFlight:
    """What a micro-batch's finalize needs of its prepare."""

    handle: DispatchHandle
    combine_input: torch.Tensor


class WorkspacePrepareAndFinalize(StandardAdapter[LowLatencyBuffer]):
    """In the standard format.

    Args:
        buffer: with `NUM_WORKSPACES` workspaces, or one, and global expert numbers.
        is_async: send and receive in two kernels, so that the other micro-batch or shared experts
            overlap with the transfer; else in one, which is faster where nothing overlaps.
    """

    def __init__(self, buffer: LowLatencyBuffer, is_async: bool) -> None:
        super().__init__(buffer)
        self._is_async = is_async
        self._in_flight: dict[int, _InFlight] = {}  # by micro-batch

    def supports_async(self) -> bool:
        return self._is_async

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
        """Sends `a1` `[T, H]` to its experts, and receives `(x [R * S, H], scales or None, None,
        ids [R * S, K], weights [R * S, K])`, S the most tokens of a rank. Ids are global; a place
        without an expert of this rank has one of another, which `expert_map` says to skip."""
        begin_ns = time.monotonic_ns()
        result = self.buffer.dispatch_and_receive(
            *_to_dispatch(a1, topk_weights, topk_ids, apply_router_weight_on_input),
            **_place(a1),
        )
        self._remember(result)
        return self._prepared(result, quant_config, defer_input_quant, begin_ns)

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
        """`prepare` in two steps: (hook, receiver)."""
        begin_ns = time.monotonic_ns()
        result, hook = self.buffer.dispatch(
            *_to_dispatch(a1, topk_weights, topk_ids, apply_router_weight_on_input),
            **_place(a1),
        )
        self._remember(result)
        return hook, lambda: self._prepared(result, quant_config, defer_input_quant, begin_ns)

    def allocate_fused_expert_output(
        self,
        shape: tuple[int, ...],
        dtype: torch.dtype,
        device: torch.device,
        weight_and_reduce_impl: mk.TopKWeightAndReduce | None = None,
    ) -> torch.Tensor | None:
        """Where the experts leave their output of the current micro-batch, so that peers find it;
        None where it would not fit what they leave."""
        in_flight = self._in_flight.get(dbo_current_ubatch_id())
        if in_flight is None:
            return None
        rows = in_flight.combine_input.flatten(0, 1)
        return rows if rows.shape == tuple(shape) and rows.dtype == dtype else None

    def finalize(self, output: torch.Tensor, *experts: Any) -> None:
        """Adds up, for each of this rank's tokens, the rows `[R * S, H]` that ranks have for it.

        Args:
            output: `[T, H]`, where the sums go.
            experts: of `reduced_rows`.
        """
        begin_ns = time.monotonic_ns()
        combine_input, handle = self._to_combine(*experts)
        self.buffer.combine_and_receive(combine_input, handle, out=output)
        self._record("finalize", output.shape[0], begin_ns)

    def finalize_async(
        self, output: torch.Tensor, *experts: Any
    ) -> tuple[Callable[[], None], Callable[[], None]]:
        """`finalize` in two steps: (hook, receiver)."""
        begin_ns = time.monotonic_ns()
        combine_input, handle = self._to_combine(*experts)
        dbo_maybe_run_recv_hook()  # of the other micro-batch: hooks run in the order of their sends
        _, hook = self.buffer.combine(combine_input, handle, out=output)
        return hook, lambda: self._record("finalize", output.shape[0], begin_ns)

    def _remember(self, result: DispatchResult) -> None:
        handle = result.handle
        combine_input = self.buffer.combine_input(handle.workspace, handle.num_slots)
        self._in_flight[dbo_current_ubatch_id()] = _InFlight(handle, combine_input)

    def _prepared(
        self, result: DispatchResult, quant_config: Any, defer_input_quant: bool, begin_ns: int
    ) -> Prepared:
        assert result.recv_topk_idx is not None
        assert result.recv_topk_weights is not None
        scales = result.recv_scales
        idx, weights = result.recv_topk_idx.flatten(0, 1), result.recv_topk_weights.flatten(0, 1)
        x, scales = quantised_rows(
            result.recv_x.flatten(0, 1),
            None if scales is None else scales.flatten(0, 1),
            quant_config,
            defer_input_quant,
            lambda: self._have_own_expert(idx),
        )
        self._record("prepare", result.handle.num_tokens, begin_ns)
        return x, scales, None, idx, weights

    def _to_combine(self, *experts: Any) -> tuple[torch.Tensor, DispatchHandle]:
        """The workspace's combine input, filled, and the handle it belongs to."""
        rows = reduced_rows(*experts)
        in_flight = self._in_flight.pop(dbo_current_ubatch_id())
        if rows.data_ptr() != in_flight.combine_input.data_ptr():
            in_flight.combine_input.copy_(rows.view_as(in_flight.combine_input))
        return in_flight.combine_input, in_flight.handle


def _to_dispatch(
    a1: torch.Tensor,
    topk_weights: torch.Tensor,
    topk_ids: torch.Tensor,
    apply_router_weight_on_input: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Of the buffer's dispatch, in its order."""
    if apply_router_weight_on_input:
        a1, topk_weights = weighted_input(a1, topk_weights)
    return a1.contiguous(), topk_ids, topk_weights


def _place(a1: torch.Tensor) -> _Place:
    return {
        "workspace": dbo_current_ubatch_id(),
        "num_slots": max(1, a1.shape[0], *tokens_of_ranks()),
    }
