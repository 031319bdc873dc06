"""The reference itself: against a dense formula in float64, and by hand.

The kernels are compared with the reference, so nothing here may use them.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from ep_backend import reference
from tests.support.routing import ROUTINGS, make_routing
from tests.support.shapes import Shape


def dense_outputs(
    x: torch.Tensor, idx: torch.Tensor, weights: torch.Tensor, expert_matrix: torch.Tensor
) -> torch.Tensor:
    """`sum_k w[t, k] * x[t] @ A[idx[t, k]]` in float64, with no notion of ranks or rows."""
    num_experts = expert_matrix.shape[0]
    one_hot = torch.nn.functional.one_hot(idx + 1, num_experts + 1)[..., 1:].double()
    gates = (weights.double()[..., None] * one_hot).sum(1)  # [T, E]
    every_expert = torch.einsum("th,ehg->teg", x.double(), expert_matrix.double())
    return torch.einsum("te,teg->tg", gates, every_expert)


@given(
    num_ranks=st.integers(1, 9),
    num_experts=st.integers(1, 12),
    top_k=st.integers(1, 12),
    routing=st.sampled_from(ROUTINGS),
    seed=st.integers(0, 1000),
)
def test_combine_after_experts_equals_the_dense_formula(
    num_ranks: int, num_experts: int, top_k: int, routing: str, seed: int
) -> None:
    shape = Shape(num_ranks, num_experts=num_experts, top_k=top_k, hidden=7)
    g = torch.Generator().manual_seed(seed)
    num_tokens = torch.randint(7, (num_ranks,), generator=g).tolist()
    x = [torch.randn(n, 7, generator=g) for n in num_tokens]
    idx = [make_routing(routing, shape, n, g) for n in num_tokens]
    weights = [torch.randn(n, top_k, generator=g) for n in num_tokens]
    matrices = torch.randn(num_experts, 7, 7, generator=g)

    received = reference.dispatch(x, idx, num_experts)
    outputs = [r.rows @ matrices[e] for e, r in enumerate(received)]
    combined = reference.combine(outputs, received, idx, weights, torch.float32)
    at_home = reference.combine_source(outputs, received, idx, weights, torch.float32)
    for rank in range(num_ranks):
        dense = dense_outputs(x[rank], idx[rank], weights[rank], matrices)
        # float32 sums of at most K * H products of order 1.
        for out in (combined[rank], at_home[rank]):
            torch.testing.assert_close(out.double(), dense, rtol=1e-4, atol=1e-4)


def test_dispatch_orders_rows_by_source_then_token_and_lists_a_repeated_expert_once() -> None:
    x = [torch.tensor([[0.0], [1.0]]), torch.tensor([[10.0], [11.0]])]
    idx = [torch.tensor([[1, -1], [1, 1]]), torch.tensor([[0, 1], [-1, -1]])]
    expert_0, expert_1, expert_2 = reference.dispatch(x, idx, num_experts=3)
    assert expert_0.origins == [(1, 0)]
    assert expert_1.origins == [(0, 0), (0, 1), (1, 0)]
    assert expert_1.rows.flatten().tolist() == [0.0, 1.0, 10.0]
    assert expert_2.rows.shape == (0, 1)


def test_both_weights_of_a_repeated_expert_count() -> None:
    x, idx = [torch.tensor([[3.0]])], [torch.tensor([[0, 0, -1]])]
    received = reference.dispatch(x, idx, num_experts=1)
    weights = [torch.tensor([[0.5, 0.25, 100.0]])]
    for combine in (reference.combine, reference.combine_source):
        (out,) = combine([received[0].rows], received, idx, weights, torch.float32)
        assert out.tolist() == [[3.0 * 0.5 + 3.0 * 0.25]]


def test_a_weighted_row_is_added_with_one_rounding() -> None:
    """Where a product rounded by itself, or a sum rounded to float64 first, gives other bits."""

    def fused(weight: float, row: float, total: float) -> float:
        return reference.multiply_add(*map(torch.tensor, (weight, row, total))).item()

    a = 1 + 2.0**-12
    assert fused(a, a, -(1 + 2.0**-11)) == 2.0**-24  # the product's last bit
    # 2^-24 - 2^-54 is less than half a step of 1 + 2^-23, which float64 does not see.
    assert fused(2.0**-24 * (1 + 2.0**-15), 1 - 2.0**-15, 1 + 2.0**-23) == 1 + 2.0**-23
    assert fused(-(2.0**-24) * (1 + 2.0**-15), 1 - 2.0**-15, -(1 + 2.0**-23)) == -(1 + 2.0**-23)
    assert fused(1.0, float("inf"), 1.0) == float("inf")
    assert fused(0.0, 1.0, -0.0) == 0.0


def test_worked_example_of_the_dispatch_kernel() -> None:
    """Numbers of the first comment of csrc/cpu/low_latency_dispatch.cpp and _combine.cpp."""
    a, b, c, p, q = 1.0, 2.0, 4.0, 0.5, 0.25
    x = [torch.tensor([[a], [b]]), torch.tensor([[c]])]
    idx = [torch.tensor([[0, 2], [3, 2]]), torch.tensor([[2, 0]])]
    received = reference.dispatch(x, idx, num_experts=4)
    assert received[2].rows.flatten().tolist() == [a, b, c]
    assert received[3].rows.flatten().tolist() == [b]
    weights = [torch.tensor([[1.0, 1.0], [p, q]]), torch.tensor([[1.0, 1.0]])]
    outputs = [r.rows + e for e, r in enumerate(received)]
    combined = reference.combine(outputs, received, idx, weights, torch.float32)
    assert combined[0].flatten().tolist() == [a + (a + 2), p * (b + 3) + q * (b + 2)]
    assert combined[1].flatten().tolist() == [(c + 2) + c]


def test_a_ranks_partial_sum_is_rounded_before_it_travels() -> None:
    """256 + 1 is 256 in bfloat16: with both experts on one rank the float32 sum 1 + 1 is exact and
    survives; with one expert a rank each 1 is lost."""
    idx, weights = torch.tensor([[0, 1, 2]]), torch.ones(1, 3)
    values = [256.0, 1.0, 1.0]

    def combined_on(num_ranks: int, combine: Callable = reference.combine) -> float:
        x = [torch.zeros(1, 1, dtype=torch.bfloat16)] * 1 + [
            torch.zeros(0, 1, dtype=torch.bfloat16)
        ] * (num_ranks - 1)
        idxs = [idx] + [idx[:0]] * (num_ranks - 1)
        w = [weights] + [weights[:0]] * (num_ranks - 1)
        received = reference.dispatch(x, idxs, num_experts=3)
        outputs = [torch.tensor([[v]], dtype=torch.bfloat16) for v in values]
        return combine(outputs, received, idxs, w, torch.bfloat16)[0].item()

    assert combined_on(1) == 258.0
    # Two ranks: {0, 1} and {2}. 256 + 1 rounds to 256, and 256 + 1 again.
    assert combined_on(2) == 256.0
    # Reduced at home, nothing is rounded in between.
    assert combined_on(2, reference.combine_source) == 258.0


def test_a_token_reduced_at_home_adds_its_rows_in_k_order_whatever_ranks_they_come_from() -> None:
    """In float32 2^24 + 1 is 2^24: the order shows."""
    big, x = 2.0**24, [torch.zeros(1, 1), torch.zeros(0, 1)]
    idx = [torch.tensor([[2, 0, 3, -1]]), torch.zeros((0, 4), dtype=torch.int64)]
    weights = [torch.tensor([[1.0, 1.0, 1.0, torch.nan]]), torch.zeros(0, 4)]
    received = reference.dispatch(x, idx, num_experts=4)
    outputs = [
        torch.full((len(r.rows), 1), v) for r, v in zip(received, [1, 0, big, 1], strict=True)
    ]
    arguments = (outputs, received, idx, weights, torch.float32)
    assert reference.combine_source(*arguments)[0].item() == big  # (big + 1) + 1
    assert reference.combine(*arguments)[0].item() == big  # 1 + (big + 1)
    outputs[0], outputs[2] = outputs[2], outputs[0]
    assert reference.combine_source(*arguments)[0].item() == big  # (1 + big) + 1
    assert reference.combine(*arguments)[0].item() == big + 2  # big + (1 + 1)


@pytest.mark.parametrize("num_ranks", [1, 3, 8])
def test_a_token_without_experts_comes_back_as_zeros(num_ranks: int) -> None:
    x = [torch.ones(2, 3) for _ in range(num_ranks)]
    idx = [torch.full((2, 2), -1) for _ in range(num_ranks)]
    received = reference.dispatch(x, idx, num_experts=4)
    outputs = [r.rows for r in received]
    weights = [torch.ones(2, 2) for _ in range(num_ranks)]
    for combine in (reference.combine, reference.combine_source):
        for out in combine(outputs, received, idx, weights, torch.float32):
            assert torch.equal(out, torch.zeros(2, 3))


def test_a_float8_row_by_hand() -> None:
    """Two groups: amax 448 and 7. A power of two keeps 7 / 448 = 1 / 64."""
    x = torch.zeros(1, 130)
    x[0, :3] = torch.tensor([448.0, -27.0, 0.001])
    x[0, 128:] = torch.tensor([7.0, 0.5])
    for scale_format in ("float32", "power_of_two", "ue8m0"):
        rows, scales = reference.quantize(x, scale_format)
        assert scales.tolist() == [[1.0, 1 / 64]]
        assert rows[0, :3].tolist() == [448.0, -28.0, 2.0**-9]  # 27 is a tie: to even
        assert rows[0, 128:].tolist() == [448.0, 32.0]
        assert reference.dequantize(rows, scales)[0, 128:].tolist() == [7.0, 0.5]


def test_powers_of_two_round_the_scale_up() -> None:
    x = torch.tensor([[450.0], [448.0 * 4], [448.0 * 4.001], [0.0]])
    _, scales = reference.quantize(x, "power_of_two")
    assert scales.flatten().tolist() == [2.0, 4.0, 8.0, 2.0**-22]


def test_a_nan_marks_its_channel_and_no_other() -> None:
    x = torch.tensor([[1.0, float("nan"), -float("nan"), 2.0]])
    rows, scales = reference.quantize(x)
    assert scales.item() == torch.tensor(2.0 / 448).item()
    assert rows.view(torch.uint8).tolist() == [[0x76, 0x7F, 0x7F, 0x7E]]


def test_exponent_bytes() -> None:
    words = torch.tensor([[0x02_7F_80_7E, 0x81]], dtype=torch.int32)
    assert reference.unpack_ue8m0(words, 5).tolist() == [[0.5, 2.0, 1.0, 2.0**-125, 4.0]]


def test_rank_major_by_hand() -> None:
    """Rank 1 owns experts 2 and 3."""
    x = [torch.tensor([[0.0], [1.0]]), torch.tensor([[10.0]])]
    idx = [torch.tensor([[0, 2, -1], [3, 2, 3]]), torch.tensor([[-1, 1, 0]])]
    weights = [torch.tensor([[0.1, 0.2, 0.3], [0.4, 0.5, 0.6]]), torch.tensor([[0.7, 0.8, 0.9]])]
    (from_0, from_1), (to_1, none) = reference.dispatch_rank_major(x, idx, weights, num_experts=4)
    assert (from_0.tokens, from_1.tokens, to_1.tokens, none.tokens) == ([0], [0], [0, 1], [])
    assert to_1.rows.flatten().tolist() == [0.0, 1.0]
    assert to_1.topk_idx.tolist() == [[0, -1, -1], [1, 0, 1]]
    expected_weights = torch.tensor([[0.2, 0, 0], [0.4, 0.5, 0.6]])
    assert torch.equal(to_1.topk_weights, expected_weights)
    assert from_1.topk_idx.tolist() == [[1, 0, -1]]
    assert none.topk_idx.shape == (0, 3)

    sums = [[torch.tensor([[1.0]]), torch.tensor([[2.0]])], [torch.tensor([[4.0], [8.0]])]]
    sums[1].append(torch.empty(0, 1))
    received = [[from_0, from_1], [to_1, none]]
    outs = reference.combine_rank_major(sums, received, [2, 1], torch.float32)
    assert [out.flatten().tolist() for out in outs] == [[1.0 + 4.0, 8.0], [2.0]]
