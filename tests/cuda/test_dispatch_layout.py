"""What a GPU counts of where tokens go is what a CPU counts."""

from __future__ import annotations

from dataclasses import astuple

import pytest
import torch

from ep_backend.deep_ep_routing import layout_of
from ep_backend.kernels import current_stream


@pytest.mark.parametrize("dtype", [torch.int64, torch.int32])
@pytest.mark.parametrize(
    ("num_tokens", "num_experts", "num_ranks", "top_k"),
    [(0, 5, 2, 3), (1, 1, 1, 1), (700, 7, 3, 9), (3000, 256, 8, 8), (40, 3, 5, 2), (9, 5000, 1, 4)],
)
def test_a_gpu_counts_as_a_cpu(
    num_tokens: int, num_experts: int, num_ranks: int, top_k: int, dtype: torch.dtype
) -> None:
    """With tokens that list an expert twice, and some that list one that does not exist."""
    generator = torch.Generator().manual_seed(num_tokens)
    shape = (num_tokens, top_k)
    topk_idx = torch.randint(-3, num_experts + 2, shape, generator=generator).to(dtype)
    on_gpu = topk_idx.cuda()
    # Where the results will lie is not zero.
    dirty = [torch.full((size,), -1, device="cuda") for size in (num_experts, num_tokens * 8, 64)]
    del dirty
    stream = current_stream(on_gpu.device)
    seen = layout_of(on_gpu, num_experts, num_ranks, stream)
    expected = layout_of(topk_idx.clamp(-1, num_experts - 1), num_experts, num_ranks)
    for on_this, on_that in zip(astuple(seen), astuple(expected), strict=True):
        assert on_this.dtype == on_that.dtype
        assert torch.equal(on_this.cpu(), on_that)
