"""Which rank owns which expert."""

from __future__ import annotations

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from ep_backend import _native
from ep_backend.reference import experts_of_rank


@given(st.integers(1, 300), st.integers(1, 40))
@example(1, 9)
@example(7, 3)
@example(_native.MAX_EXPERTS, 3)
def test_every_expert_has_exactly_one_owner_in_contiguous_blocks(
    num_experts: int, num_ranks: int
) -> None:
    partition = _native.ExpertPartition(num_experts, num_ranks)
    next_expert = 0
    for rank in range(num_ranks):
        block = experts_of_rank(num_experts, num_ranks, rank)
        assert partition.first_expert(rank) == next_expert == block.start
        assert partition.num_local_experts(rank) == len(block)
        if len(block) > 0:
            assert {partition.owner(block[0]), partition.owner(block[-1])} == {rank}
        if num_experts <= 300:
            assert all(partition.owner(expert) == rank for expert in block)
        next_expert = block.stop
    assert next_expert == num_experts


@given(st.integers(1, 300), st.integers(1, 40))
def test_blocks_differ_by_at_most_one_and_the_first_is_largest(
    num_experts: int, num_ranks: int
) -> None:
    partition = _native.ExpertPartition(num_experts, num_ranks)
    sizes = [partition.num_local_experts(rank) for rank in range(num_ranks)]
    assert sizes == sorted(sizes, reverse=True)
    assert sizes[0] - sizes[-1] <= 1
    assert partition.num_max_local_experts() == sizes[0]


def test_worked_example_of_the_header() -> None:
    partition = _native.ExpertPartition(7, 3)
    owned = [[e for e in range(7) if partition.owner(e) == rank] for rank in range(3)]
    assert owned == [[0, 1, 2], [3, 4], [5, 6]]


@pytest.mark.parametrize("num_ranks", [5, 9])
def test_fewer_experts_than_ranks_leave_the_last_ranks_without(num_ranks: int) -> None:
    partition = _native.ExpertPartition(4, num_ranks)
    expected = [1, 1, 1, 1] + [0] * (num_ranks - 4)
    assert [partition.num_local_experts(rank) for rank in range(num_ranks)] == expected
