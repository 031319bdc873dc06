"""GEMMs of experts that leave out rows that nobody has filled, for the decode benchmark on a GPU:
as engines' masked grouped GEMMs do with expert-major rows. An expert without rows does not read
its weights.

L experts, S rows an expert has room for, K and N columns of a row before and behind.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

BLOCK_N, BLOCK_K = 128, 64


@triton.jit
def _masked_gemm(
    x,
    weights,
    out,
    counts,
    num_rows,
    n: tl.constexpr,
    k: tl.constexpr,
    is_gated: tl.constexpr,
    block_m: tl.constexpr,
    block_n: tl.constexpr,
    block_k: tl.constexpr,
) -> None:
    # Neighbours are tiles of the same columns of an expert: they share its weights in L2.
    first_row = tl.program_id(0) * block_m
    expert = tl.program_id(2).to(tl.int64)
    count = tl.load(counts + expert)
    if first_row < count:
        rows = first_row + tl.arange(0, block_m)
        columns = tl.program_id(1) * block_n + tl.arange(0, block_n)
        inner = tl.arange(0, block_k)
        is_row = (rows < count)[:, None]
        width = (
            2 * n if is_gated else n
        )  # of a row of weights: the gate's columns, then the value's
        x_at = x + (expert * num_rows + rows[:, None]) * k + inner[None, :]
        weights_at = weights + (expert * k + inner[:, None]) * width + columns[None, :]
        total = tl.zeros((block_m, block_n), dtype=tl.float32)
        value = tl.zeros((block_m, block_n), dtype=tl.float32)
        for _ in range(0, k, block_k):
            some = tl.load(x_at, mask=is_row, other=0.0)
            total = tl.dot(some, tl.load(weights_at), total)
            if is_gated:
                value = tl.dot(some, tl.load(weights_at + n), value)
            x_at += block_k
            weights_at += block_k * width
        if is_gated:
            total = total * tl.sigmoid(total) * value
        out_at = out + (expert * num_rows + rows[:, None]) * n + columns[None, :]
        tl.store(out_at, total.to(out.dtype.element_ty), mask=is_row)


def masked_mlp(
    x: torch.Tensor,
    up: torch.Tensor,
    down: torch.Tensor,
    counts: torch.Tensor,
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    """SwiGLU experts: `[L, S, H]` -> `[L, S, H]`; rows behind an expert's count are not written.

    Args:
        up: `[L, H, 2 I]`, the gate's columns, then the value's.
        down: `[L, I, H]`.
        counts: `[L]` int32, on the GPU.
        out: default: a new tensor.

    Raises:
        ValueError: H or I is not a multiple of the kernel's blocks.
    """
    inner = _launch(x, up, counts, x.new_empty(*x.shape[:2], down.shape[1]), is_gated=True)
    return _launch(inner, down, counts, torch.empty_like(x) if out is None else out, is_gated=False)


def _launch(
    x: torch.Tensor, weights: torch.Tensor, counts: torch.Tensor, out: torch.Tensor, is_gated: bool
) -> torch.Tensor:
    num_experts, num_rows, k = x.shape
    n = out.shape[2]
    if k % BLOCK_K or n % BLOCK_N:
        raise ValueError(f"K is {k}, N is {n}; expected multiples of {BLOCK_K} and {BLOCK_N}")
    block_m = 16 if num_rows <= 64 else 64
    grid = (triton.cdiv(num_rows, block_m), n // BLOCK_N, num_experts)
    _masked_gemm[grid](
        x, weights, out, counts, num_rows, n, k, is_gated, block_m, BLOCK_N, BLOCK_K, num_stages=3
    )
    return out
