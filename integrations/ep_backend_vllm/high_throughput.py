"""`ep_backend_high_throughput`: NormalBuffer behind vLLM's modular MoE kernel, for prefill.

The standard format. With exact sizes experts get the N rows that other ranks have for this one, and
no more: the host must know N, and waits for it once a layer. Or they get as many rows as all ranks
have tokens, of which some hold none, and nothing waits: CUDA graphs can hold such a step.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import torch
import vllm.model_executor.layers.fused_moe.modular_kernel as mk

from ep_backend import NormalBuffer, NormalDispatchHandle, NormalDispatchResult
from ep_backend_vllm.adapter import (
    Prepared,
    StandardAdapter,
    quantised_rows,
    reduced_rows,
    tokens_of_ranks,
    weighted_input,
)

LEAST_CUDA_BYTES, MOST_CUDA_BYTES = 64 << 20, 1 << 30
"""Of symmetric memory a rank and shape on a GPU, where rounds cost more than on a CPU; the most is
what vLLM gives DeepEP's buffer."""

LEAST_USED = 0.6
"""Of those rows, if experts are as likely, for a step that is in no graph to do without the wait:
up to 8 ranks of 8 experts a token. Rows that hold no token cost experts memory and little time."""


def num_bytes_for(moe: Any, num_ranks: int, device: str) -> int | None:
    """Symmetric memory for a layer of vLLM's `FusedMoEConfig`: on a GPU, up to the limit, room for
    what a rank gets when all have the largest batch and experts get equal shares. On a CPU None:
    as tuned, or by default."""
    if device == "cpu":
        return None
    num_rows = moe.max_num_tokens * min(num_ranks, moe.experts_per_token)
    # There and back, scales for every 128 channels, and an expert, a weight and a weight that goes
    # home for each k.
    row_bytes = moe.hidden_dim * (2 * moe.in_dtype.itemsize + 1) + 16 * moe.experts_per_token
    return max(LEAST_CUDA_BYTES, min(MOST_CUDA_BYTES, num_rows * row_bytes))


def most_tokens_without_wait(
    buffer: NormalBuffer, num_graph_tokens: int, num_max_tokens: int
) -> int:
    """Of a rank, in a step whose sizes are not exact: what graphs hold; where they use most of the
    rows, all that the buffer on a GPU has room for, and vLLM has measured memory for.

    Args:
        num_graph_tokens: see `graphs.most_tokens`.
        num_max_tokens: of a rank, in the largest step; vLLM measures its memory by that.
    """
    num_ranks = buffer.group.num_ranks
    used = 1 - (1 - 1 / num_ranks) ** buffer.top_k
    num_rows: int = getattr(buffer, "num_rows", 0)  # over a network there is no such limit
    num_tokens = num_rows // num_ranks if used >= LEAST_USED else 0
    if num_tokens < num_max_tokens:
        # That step has exact sizes then. Experts that know no sizes on the host may take memory for
        # all K places of every row (DeepGEMM's do): no more than it filled, if experts are as
        # likely.
        num_tokens = min(num_tokens, num_max_tokens // num_ranks)
    return max(num_graph_tokens, num_tokens)


class NormalPrepareAndFinalize(StandardAdapter[NormalBuffer]):
    """A finalize follows each prepare.

    Args:
        is_for_gpus: experts are vLLM's for GPUs, which take global ids with an `expert_map`, and
            the rows of each expert; shared experts run beside combine, which is on a stream of its
            own. Else those for CPUs.
        num_waitless_tokens: where no rank has more, sizes are not exact. 0: they always are.
    """

    def __init__(
        self, buffer: NormalBuffer, is_for_gpus: bool = False, num_waitless_tokens: int = 0
    ) -> None:
        super().__init__(buffer)
        self._is_for_gpus = is_for_gpus
        self._num_waitless_tokens = num_waitless_tokens
        self._handle: NormalDispatchHandle | None = None

    def supports_async(self) -> bool:
        return self._is_for_gpus

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
        """Sends `a1` `[T, H]` to its experts, and receives `(x [N, H], scales or None, rows of each
        expert or None, ids [N, K], weights [N, K])`. A place without an expert of this rank has
        weight 0, and on a GPU an expert of another rank, which `expert_map` says to skip; on a CPU,
        whose experts take local ids, expert 0. Where sizes are not exact, N is the tokens of all
        ranks, and rows that hold none have no expert of this rank."""
        begin_ns = time.monotonic_ns()
        self._check_quantisation(quant_config, defer_input_quant)
        if apply_router_weight_on_input:
            a1, topk_weights = weighted_input(a1, topk_weights)
        num_rows = self._num_worst_tokens()
        result = self.buffer.dispatch(
            a1.contiguous(), topk_ids, topk_weights, num_worst_tokens=num_rows
        )
        self._handle = result.handle
        self._record("prepare", a1.shape[0], begin_ns)
        if not self._is_for_gpus:
            ids = result.recv_topk_idx.clamp(min=0).to(torch.int32)
            return result.recv_x, None, None, ids, result.recv_topk_weights
        ids = self._global_ids(result, num_experts)
        x, scales = quantised_rows(
            result.recv_x,
            result.recv_scales,
            quant_config,
            defer_input_quant,
            (lambda: self._have_own_expert(ids)) if num_rows > 0 else None,
        )
        per_expert = result.num_recv_tokens_per_expert
        if num_rows > 0:
            counts = mk.ExpertTokensMetadata(per_expert, expert_num_tokens_cpu=None)
        else:
            counts = mk.ExpertTokensMetadata.make_from_list(per_expert, device=x.device)
        return x, scales, counts, ids, result.recv_topk_weights

    def prepare_async(self, *args: Any, **kwargs: Any) -> Callable[[], Prepared]:
        """`prepare`, whose host must wait: what is received is there."""
        prepared = self.prepare(*args, **kwargs)
        return lambda: prepared

    def allocate_fused_expert_output(
        self,
        shape: tuple[int, ...],
        dtype: torch.dtype,
        device: torch.device,
        weight_and_reduce_impl: mk.TopKWeightAndReduce | None = None,
    ) -> torch.Tensor | None:
        """Where experts on a GPU leave their output, so that peers find it; None where it would not
        fit what they leave."""
        if not self._is_for_gpus or self._handle is None:
            return None
        rows = self.buffer.combine_input(self._handle)
        return rows if rows.shape == tuple(shape) and rows.dtype == dtype else None

    def finalize(self, output: torch.Tensor, *experts: Any) -> None:
        """Sends the experts' rows `[N, H]` home; `output` `[T, H]` is the sum.

        Args:
            experts: of `reduced_rows`.
        """
        begin_ns = time.monotonic_ns()
        rows, handle = self._to_combine(*experts)
        self.buffer.combine(rows, handle, out=output)
        self._record("finalize", output.shape[0], begin_ns)

    def finalize_async(self, output: torch.Tensor, *experts: Any) -> Callable[[], None]:
        """`finalize` on a stream of its own; the receiver lets the current stream wait for it."""
        begin_ns = time.monotonic_ns()
        rows, handle = self._to_combine(*experts)
        _, event = self.buffer.combine(rows, handle, out=output, async_finish=True)

        def receiver() -> None:
            event.current_stream_wait()
            self._record("finalize", output.shape[0], begin_ns)

        return receiver

    def _num_worst_tokens(self) -> int:
        """Of this step's dispatch; every rank comes to the same."""
        if self._num_waitless_tokens == 0:
            return 0
        sizes = tokens_of_ranks()
        if not sizes or max(sizes) > self._num_waitless_tokens:
            return 0
        # A model that does not share out tokens among tensor-parallel ranks has all of them on
        # each: vLLM then lists data-parallel ranks, but every rank of one sends as many.
        return sum(sizes) * (self.buffer.group.num_ranks // len(sizes))

    def _to_combine(
        self, fused_expert_output: torch.Tensor, *how: Any
    ) -> tuple[torch.Tensor, NormalDispatchHandle]:
        handle, self._handle = self._handle, None
        assert handle is not None
        if fused_expert_output.numel() == 0:  # nothing has come; vLLM's reductions need rows
            return fused_expert_output, handle
        return reduced_rows(fused_expert_output, *how), handle

    def _global_ids(self, result: NormalDispatchResult, num_experts: int) -> torch.Tensor:
        if self.buffer.expert_ids == "global":
            return result.recv_topk_idx
        first = self.buffer.first_expert
        foreign = num_experts - 1 if first == 0 else 0
        idx = result.recv_topk_idx
        return torch.where(idx < 0, foreign, idx + first)

    def _check_quantisation(self, quant_config: Any, defer_input_quant: bool) -> None:
        """The buffer was made for what the layer's experts take; experts may differ in the end."""
        wanted = None if defer_input_quant else quant_config.quant_dtype
        is_right = self._is_for_gpus or wanted is None
        if self.buffer.num_scales > 0 and wanted != self.buffer.dispatch_dtype:
            is_right = False
        if not is_right:
            raise NotImplementedError(
                f"ep_backend_high_throughput dispatches {self.buffer.dispatch_dtype} here; this "
                f"layer wants {wanted or 'unquantised activations'}. Choose other experts, or "
                "another --all2all-backend."
            )
