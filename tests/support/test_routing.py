"""The routing generator does what its names promise: other tests rely on it."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from ep_backend.reference import experts_of_rank
from tests.support.routing import ROUTINGS, make_routing
from tests.support.shapes import Shape


def routing(name: str, shape: Shape, num_tokens: int = 64, seed: int = 0) -> torch.Tensor:
    return make_routing(name, shape, num_tokens, torch.Generator().manual_seed(seed))


@given(
    name=st.sampled_from(ROUTINGS),
    num_ranks=st.integers(1, 9),
    num_experts=st.integers(1, 20),
    top_k=st.integers(1, 32),
    num_tokens=st.integers(0, 9),
    seed=st.integers(0, 1000),
)
def test_every_routing_is_a_legal_table_and_repeats_itself(
    name: str, num_ranks: int, num_experts: int, top_k: int, num_tokens: int, seed: int
) -> None:
    shape = Shape(num_ranks, num_experts=num_experts, top_k=top_k)
    idx = routing(name, shape, num_tokens, seed)
    assert idx.shape == (num_tokens, top_k)
    assert idx.dtype == torch.int64
    assert bool(((idx >= -1) & (idx < num_experts)).all())
    assert torch.equal(idx, routing(name, shape, num_tokens, seed))


def has_repeats(idx: torch.Tensor) -> torch.Tensor:
    """Of each token: it lists some expert twice."""
    ordered = idx.sort(1).values
    return ((ordered[:, 1:] == ordered[:, :-1]) & (ordered[:, 1:] >= 0)).any(1)


@pytest.mark.parametrize("name", ["uniform", "skewed"])
def test_uniform_and_skewed_draw_distinct_experts_while_there_are_enough(name: str) -> None:
    assert not has_repeats(routing(name, Shape(3, num_experts=8, top_k=8))).any()
    assert has_repeats(routing(name, Shape(3, num_experts=8, top_k=9))).all()


def test_uniform_reaches_every_expert_and_skewed_prefers_the_first() -> None:
    shape = Shape(4, num_experts=10, top_k=2)
    uniform = routing("uniform", shape, 1000).flatten().bincount(minlength=10)
    skewed = routing("skewed", shape, 1000).flatten().bincount(minlength=10)
    assert int(uniform.min()) > 100
    assert skewed[0] > 4 * skewed[4] > 0


def test_one_hot_expert_is_the_last_and_only_one() -> None:
    idx = routing("one_hot_expert", Shape(3, num_experts=8, top_k=3))
    assert (idx >= 0).sum(1).tolist() == [1] * 64
    assert set(idx.flatten().tolist()) == {-1, 7}


def test_empty_rank_routes_nothing_to_the_last_rank_and_something_to_all_others() -> None:
    shape = Shape(3, num_experts=8, top_k=3)
    used = set(routing("empty_rank", shape).flatten().tolist())
    assert used == set(range(8)) - set(experts_of_rank(8, 3, 2))
    assert routing("empty_rank", Shape(1, num_experts=8, top_k=3)).min() >= 0  # one rank has all


def test_masked_mixes_and_starts_with_a_token_without_experts() -> None:
    idx = routing("masked", Shape(3, num_experts=8, top_k=4))
    assert idx[0].tolist() == [-1] * 4
    assert 0.3 < float((idx == -1).float().mean()) < 0.7


def test_all_masked_routes_nothing() -> None:
    assert set(routing("all_masked", Shape(3)).flatten().tolist()) == {-1}


def test_repeated_lists_experts_several_times_in_a_token() -> None:
    idx = routing("repeated", Shape(3, num_experts=8, top_k=4))
    assert has_repeats(idx).all()
    assert len(idx.unique()) <= 2


def test_an_unknown_name_is_refused() -> None:
    with pytest.raises(ValueError, match="routing is 'zipf', expected one of"):
        routing("zipf", Shape(1))
