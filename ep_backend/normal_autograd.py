"""Normal dispatch and combine for training: the gradient of each travels through the other.

T tokens of this rank, N rows received, H hidden, K top_k.

    recv_x, recv_topk_weights, result = dispatch(buffer, x, topk_idx, topk_weights)
    y = experts(recv_x, result.recv_topk_idx, recv_topk_weights)  # weighted, summed
    combined = combine(buffer, y, result.handle)
    combined.sum().backward()

Backward calls are operations of the buffer like any other: every rank runs them, in the same order.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.autograd.function import once_differentiable

from ep_backend.normal import NormalBuffer
from ep_backend.normal_handles import NormalDispatchHandle, NormalDispatchResult


def dispatch(
    buffer: NormalBuffer,
    x: torch.Tensor,
    topk_idx: torch.Tensor,
    topk_weights: torch.Tensor,
    **options: Any,
) -> tuple[torch.Tensor, torch.Tensor, NormalDispatchResult]:
    """`buffer.dispatch`, through which gradients of `x` and `topk_weights` flow.

    Args:
        options: `num_worst_tokens`, `expert_alignment`, `num_sms`.

    Returns:
        `recv_x` `[N, H]` and `recv_topk_weights` `[N, K]` with their gradients, and the result,
        whose own tensors have none. All of them are the caller's.

    Raises:
        ValueError: rows travel as float8, which has no gradient; else as `buffer.dispatch`.
    """
    if buffer.dispatch_dtype != buffer.dtype:
        raise ValueError(
            f"dispatch_dtype is {buffer.dispatch_dtype}, through which no gradient flows. Create "
            f"the buffer with dispatch_dtype={buffer.dtype}."
        )
    result = buffer.dispatch(x.detach(), topk_idx, topk_weights.detach(), copy=True, **options)
    recv_x, recv_topk_weights = _Dispatch.apply(x, topk_weights, buffer, result)
    return recv_x, recv_topk_weights, result


def combine(
    buffer: NormalBuffer,
    x: torch.Tensor,
    handle: NormalDispatchHandle,
    num_sms: int | None = None,
) -> torch.Tensor:
    """`buffer.combine`, through which the gradient of `x` flows, once: it has none itself.

    Returns:
        `[T, H]`.
    """
    combined: torch.Tensor = _Combine.apply(x, buffer, handle, num_sms)
    return combined


class _Dispatch(torch.autograd.Function):
    """From what has been dispatched already."""

    @staticmethod
    def forward(
        ctx: Any,
        x: torch.Tensor,
        topk_weights: torch.Tensor,
        buffer: NormalBuffer,
        result: NormalDispatchResult,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        ctx.buffer, ctx.handle = buffer, result.handle
        return result.recv_x.view_as(result.recv_x), result.recv_topk_weights.clone()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        of_rows, of_weights = grads
        # Places that list no expert of this rank are 0 whatever the weights.
        of_weights = of_weights.masked_fill(ctx.handle.recv_topk_idx < 0, 0.0)
        of_x, of_topk_weights = ctx.buffer.combine(
            of_rows.contiguous(), ctx.handle, topk_weights=of_weights.contiguous()
        )
        return of_x, of_topk_weights, None, None


class _Combine(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: torch.Tensor,
        buffer: NormalBuffer,
        handle: NormalDispatchHandle,
        num_sms: int | None,
    ) -> torch.Tensor:
        ctx.buffer, ctx.handle = buffer, handle
        combined: torch.Tensor = buffer.combine(x, handle, num_sms=num_sms)
        return combined

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        (of_combined,) = grads
        of_x = ctx.buffer.dispatch(of_combined.contiguous(), handle=ctx.handle, copy=True).recv_x
        # Rows behind N were not read.
        return of_x.masked_fill(ctx.handle.recv_src_tokens[:, None] < 0, 0.0), None, None, None
