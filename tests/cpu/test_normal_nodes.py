"""The normal kernels of ranks on several nodes equal their reference, bit for bit, over a network
that reorders what RDMA may reorder, with budgets that need many rounds."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ep_backend import Group, NormalBuffer, PeerTimeout, _native
from ep_backend.virtual_network import Traffic
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

    SHAPE.world().run(rank_main)


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


def sent_over_the_network(case: NormalCase) -> list[Traffic]:
    """By a dispatch, and by its combine, of all ranks together."""
    world = case.shape.world()
    assert world.network is not None
    network = world.network
    counted = [network.totals()["rdma"]]

    def rank_main(group: Group) -> None:
        with case.shape.buffer(group) as buffer:
            result = buffer.dispatch(*case.inputs(group.self_rank))
            group.all_gather(None)
            if group.self_rank == 0:
                counted.append(network.totals()["rdma"])
            group.all_gather(None)
            case.combine(buffer, result)

    world.run(rank_main)
    counted.append(network.totals()["rdma"])
    return [after - before for before, after in pairwise(counted)]


def nodes_of_tokens(case: NormalCase) -> dict[tuple[int, int], list[int]]:
    """By rank and remote node: tokens that go there."""
    g = case.shape.ranks_per_node or 1
    tokens: dict[tuple[int, int], list[int]] = {}
    for rank, idx in enumerate(case.topk_idx):
        for token, experts in enumerate(idx.tolist()):
            owners = {_owner(e, case.shape) for e in experts if e >= 0}
            for node in {owner // g for owner in owners} - {rank // g}:
                tokens.setdefault((rank, node), []).append(token)
    return tokens


def _owner(expert: int, shape: NormalShape) -> int:
    return _native.ExpertPartition(shape.num_experts, shape.num_ranks).owner(expert)


@settings(max_examples=60)
@given(cases())
def test_a_token_crosses_once_for_each_node(drawn: list[NormalCase]) -> None:
    """What the network counts is what follows from the routing."""
    case, shape = drawn[0], drawn[0].shape
    assert shape.ranks_per_node is not None
    num_pairs = shape.num_ranks * (shape.num_ranks // shape.ranks_per_node - 1)
    counted = sent_over_the_network(case)
    if num_pairs == 0:
        assert counted == [Traffic(), Traffic()]
        return
    layout, per_round = shape.node_layout(), shape.num_tokens_per_round
    going = nodes_of_tokens(case).values()
    num_messages = sum(map(len, going))
    # Routes of a round's messages for a node travel together.
    num_batches = sum(len({token // per_round for token in tokens}) for tokens in going)
    num_rounds = -(-max(len(x) for x in case.x) // per_round)
    route_bytes = num_messages * layout.route_bytes
    counts_bytes = num_pairs * shape.ranks_per_node * layout.counts_stride
    assert counted[0] == Traffic(
        num_puts=num_messages + num_batches + num_pairs,
        put_bytes=num_messages * layout.dispatch_bytes + route_bytes + counts_bytes,
        # Of counts and of each round: a signal and a credit.
        num_signals=num_pairs * 2 * (1 + num_rounds),
    )
    first = layout.weights_in_message if case.with_weights else layout.row_in_message
    sum_bytes = layout.row_in_message + layout.base.row_bytes - first
    assert counted[1] == Traffic(
        num_puts=num_messages + num_batches,
        put_bytes=num_messages * sum_bytes + route_bytes,
        # Of each round: of routes, of sums, and a credit.
        num_signals=num_pairs * 3 * num_rounds,
    )


def test_sixteen_ranks_on_two_nodes_send_a_copy_a_token() -> None:
    shape = NormalShape(
        16, hidden=64, num_experts=64, top_k=8, num_tokens_per_round=16, ranks_per_node=8
    )
    case = make_case(shape, "uniform", [16] * 16, seed=0)
    num_messages = sum(map(len, nodes_of_tokens(case).values()))
    assert 0.95 < num_messages / (16 * 16) <= 1.0
    num_puts = [traffic.num_puts for traffic in sent_over_the_network(case)]
    assert num_puts == [num_messages + 2 * 16, num_messages + 16]


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
