"""The normal kernels of ranks on several nodes equal their reference, bit for bit, over a network
that reorders what RDMA may reorder, with budgets that need many rounds."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ep_backend import Group, NormalBuffer, PeerTimeout
from tests.cpu.test_normal import shapes
from tests.support.normal import NormalCase, NormalShape, check_received, make_case
from tests.support.routing import ROUTINGS
from tests.support.scenario import same_bits
from tests.support.strategies import NODES


@st.composite
def cases(draw: st.DrawFn) -> list[NormalCase]:
    ranks_per_node, num_nodes = draw(st.sampled_from(NODES))
    num_ranks = ranks_per_node * num_nodes
    shape = replace(draw(shapes(1)), num_ranks=num_ranks, ranks_per_node=ranks_per_node)
    num_tokens = st.lists(st.integers(0, 40), min_size=num_ranks, max_size=num_ranks)
    return [
        make_case(
            shape,
            draw(st.sampled_from(ROUTINGS)),
            draw(num_tokens),
            seed=draw(st.integers(0, 1000)),
            num_biases=draw(st.integers(0, 2)),
            with_weights=draw(st.booleans()),
            is_quantized=shape.is_float8 and draw(st.booleans()),
        )
        for _ in range(draw(st.integers(1, 3)))
    ]


@settings(max_examples=150)
@given(cases(), st.integers(0, 2**64 - 1))
def test_drawn_shapes_equal_the_reference(drawn: list[NormalCase], seed: int) -> None:
    shape = drawn[0].shape

    def rank_main(group: Group) -> None:
        with shape.buffer(group, timeout_secs=20.0) as buffer:
            for case in drawn:
                case.run(buffer)

    shape.world(seed).run(rank_main)


SHAPE = NormalShape(6, num_experts=11, top_k=4, num_tokens_per_round=3, ranks_per_node=2)


def test_a_cached_routing_brings_other_rows() -> None:
    first = make_case(SHAPE, "uniform", [7, 0, 3, 8, 1, 9], seed=1)
    # The same routing: payloads are drawn apart from it.
    again = make_case(SHAPE, "uniform", [7, 0, 3, 8, 1, 9], seed=1)
    for x in again.x:
        x += 1
    for received in again.received:
        received.rows += 1

    def rank_main(group: Group) -> None:
        with SHAPE.buffer(group) as buffer:
            handle = first.run(buffer)
            for case in (again, first):
                result = buffer.dispatch(**case.rows(group.self_rank), handle=handle)
                check_received(result, case, group.self_rank)
            first.combine(buffer, result)

    SHAPE.world(seed := 3).run(rank_main)
    assert seed == 3


def test_the_budget_and_the_network_change_nothing() -> None:
    """Of rows whose order of addition shows."""

    def outs(num_tokens_per_round: int, seed: int) -> list[torch.Tensor]:
        shape = replace(SHAPE, num_tokens_per_round=num_tokens_per_round)
        case = make_case(shape, "uniform", [9] * 6, seed=0)

        def rank_main(group: Group) -> torch.Tensor:
            with shape.buffer(group) as buffer:
                rank = group.self_rank
                result = buffer.dispatch(*case.inputs(rank))
                case.combine(buffer, result)
                return buffer.combine(result.recv_x, result.handle)

        return shape.world(seed).run(rank_main)

    expected = outs(1, 0)
    for num_tokens_per_round, seed in ((1, 1), (4, 2), (9, 3)):
        assert all(map(same_bits, expected, outs(num_tokens_per_round, seed)))


def test_each_token_crosses_once_for_each_node() -> None:
    """Copies that the network has counted, of 16 ranks on two nodes, eight experts a token."""
    shape = NormalShape(
        16, hidden=64, num_experts=64, top_k=8, num_tokens_per_round=16, ranks_per_node=8
    )
    case = make_case(shape, "uniform", [16] * 16, seed=0)
    world = shape.world()
    assert world.network is not None
    network = world.network

    def rank_main(group: Group) -> int:
        with shape.buffer(group) as buffer:
            result = buffer.dispatch(*case.inputs(group.self_rank))
            group.all_gather(None)
            before = network.totals()["rdma"].num_puts
            group.all_gather(None)
            case.combine(buffer, result)
            return before

    num_dispatch_puts = world.run(rank_main)[0]
    num_combine_puts = network.totals()["rdma"].num_puts - num_dispatch_puts
    num_messages = sum(
        len({expert // 32 for expert in token} - {rank // 8})
        for rank, idx in enumerate(case.topk_idx)
        for token in idx.tolist()
    )
    assert 0.95 < num_messages / (16 * 16) <= 1.0
    # And from each rank its counts and, in either phase, its routes.
    assert num_dispatch_puts == num_messages + 2 * 16
    assert num_combine_puts == num_messages + 16


def test_whoever_does_not_come_is_named() -> None:
    shape = replace(SHAPE, num_ranks=4)

    def rank_main(group: Group) -> str | None:
        with shape.buffer(group, timeout_secs=0.5) as buffer:
            if group.self_rank == 3:
                group.all_gather(None)
                return None
            try:
                x = torch.ones((1, shape.hidden), dtype=shape.dtype)
                idx = torch.zeros((1, shape.top_k), dtype=torch.int64)
                buffer.dispatch(x, idx, torch.ones((1, shape.top_k)))
            except PeerTimeout as e:
                return str(e)
            finally:
                group.all_gather(None)
        raise AssertionError("rank 3 was not missed")

    texts = shape.world().run(rank_main)
    # Rank 1 exchanges with 3, rank 2 gets from it what it would forward; rank 0 waits for rank 1.
    assert "of rank 3 did not come" in str(texts[1])
    assert "of rank 3 did not come" in str(texts[2])


def test_a_budget_without_room_for_a_token_is_refused() -> None:
    least = replace(SHAPE, num_tokens_per_round=1).node_layout().num_bytes

    def rank_main(group: Group) -> None:
        with pytest.raises(ValueError, match=f"num_bytes is {least - 1}, expected .*{least}"):
            NormalBuffer(
                group,
                hidden=SHAPE.hidden,
                num_experts=SHAPE.num_experts,
                top_k=SHAPE.top_k,
                dtype=SHAPE.dtype,
                num_bytes=least - 1,
            )

    SHAPE.world().run(rank_main)
