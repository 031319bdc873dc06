"""Gradients through the normal kernels equal those of the same model without an exchange."""

from __future__ import annotations

import pytest
import torch

from ep_backend import Group, NormalBuffer, normal_autograd, virtual_world
from tests.support.normal import NormalShape

SHAPE = NormalShape(3, hidden=12, num_experts=6, top_k=3, dtype=torch.float32)
NUM_TOKENS = [7, 0, 5]


def inputs_of(rank: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(rank)
    shape = (NUM_TOKENS[rank], SHAPE.top_k)
    x = torch.randn((NUM_TOKENS[rank], SHAPE.hidden), generator=generator)
    idx = torch.rand((NUM_TOKENS[rank], SHAPE.num_experts), generator=generator)
    idx = idx.argsort(1)[:, : SHAPE.top_k].contiguous()
    idx[:1, 0] = -1
    return x, idx, torch.rand(shape, generator=generator)


def expert_rows(
    x: torch.Tensor, idx: torch.Tensor, weights: torch.Tensor, scales: torch.Tensor
) -> torch.Tensor:
    """Expert e multiplies a row by `scales[e]`, and squares it: weighted, and summed."""
    of_routes = torch.where(idx >= 0, weights * scales[idx.clamp(min=0)], 0.0)
    return of_routes.sum(1, keepdim=True) * x**2


def expected_gradients(rank: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The result of a rank's tokens, and of its sum of squares the gradients."""
    x, idx, weights = inputs_of(rank)
    x.requires_grad_()
    weights.requires_grad_()
    combined = expert_rows(x, idx, weights, torch.arange(1.0, 1 + SHAPE.num_experts))
    combined.square().sum().backward()
    assert x.grad is not None
    assert weights.grad is not None
    return combined.detach(), x.grad, weights.grad


def check_gradients(buffer: NormalBuffer, num_worst_tokens: int) -> None:
    """Of one rank; all of them call it."""
    rank, device = buffer.group.self_rank, buffer.device
    x, idx, weights = (tensor.to(device) for tensor in inputs_of(rank))
    x.requires_grad_()
    weights.requires_grad_()
    recv_x, recv_weights, result = normal_autograd.dispatch(
        buffer, x, idx, weights, num_worst_tokens=num_worst_tokens
    )
    first = buffer.first_expert
    scales = torch.arange(1.0 + first, 1 + first + buffer.num_local_experts, device=device)
    rows = expert_rows(recv_x, result.recv_topk_idx.long(), recv_weights, scales)
    # What is behind N must not matter, nor get a gradient.
    is_used = result.handle.recv_src_tokens[:, None] >= 0
    rows = torch.where(is_used, rows, 0.0)
    combined = normal_autograd.combine(buffer, rows, result.handle)
    combined.square().sum().backward()
    assert x.grad is not None
    assert weights.grad is not None
    expected, of_x, of_weights = expected_gradients(rank)
    torch.testing.assert_close(combined.cpu(), expected)
    torch.testing.assert_close(x.grad.cpu(), of_x)
    torch.testing.assert_close(weights.grad.cpu(), of_weights)


@pytest.mark.parametrize("num_worst_tokens", [0, 20])
def test_gradients_are_those_without_an_exchange(num_worst_tokens: int) -> None:
    def rank_main(group: Group) -> None:
        with SHAPE.buffer(group, timeout_secs=10.0) as buffer:
            check_gradients(buffer, num_worst_tokens)

    virtual_world(SHAPE.num_ranks).run(rank_main)


def test_float8_has_no_gradient() -> None:
    def rank_main(group: Group) -> None:
        buffer = NormalBuffer(
            group,
            hidden=128,
            num_experts=2,
            top_k=1,
            dtype=torch.bfloat16,
            dispatch_dtype=torch.float8_e4m3fn,
            num_bytes=1 << 20,
        )
        x = torch.ones(1, 128).bfloat16()
        idx, weights = torch.zeros((1, 1), dtype=torch.int64), torch.ones(1, 1)
        with pytest.raises(ValueError, match="through which no gradient flows"):
            normal_autograd.dispatch(buffer, x, idx, weights)

    virtual_world(1).run(rank_main)
