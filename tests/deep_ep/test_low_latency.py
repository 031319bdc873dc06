"""DeepEP's low-latency calls equal the reference, over virtual ranks and between processes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
import torch.distributed as dist

from ep_backend import Group, OrderError, deep_ep, reference, virtual_world
from tests.deep_ep.support import Exchange, buffer_of
from tests.support.processes import Rank, RankProcesses
from tests.support.routing import ROUTINGS
from tests.support.scenario import Scenario
from tests.support.shapes import Shape

FLOAT8 = torch.float8_e4m3fn
SHAPES = {
    "bf16": Shape(3, reduction="source"),
    "bf16-weights-at-dispatch": Shape(3),
    "float32": Shape(2, dtype=torch.float32, hidden=33, reduction="source"),
    "fp8": Shape(2, hidden=256, dispatch_dtype=FLOAT8, reduction="source"),
    "fp8-round_scale": Shape(2, 4, 7168, 8, 8, dispatch_dtype=FLOAT8, scale_format="power_of_two"),
    "fp8-ue8m0": Shape(
        3, hidden=1536, dispatch_dtype=FLOAT8, scale_format="ue8m0", reduction="source"
    ),
    "fp8-hidden-200": Shape(2, hidden=200, dispatch_dtype=FLOAT8, scale_format="ue8m0"),
    "top-16-of-11-experts": Shape(3, hidden=3584, num_experts=11, top_k=16, reduction="source"),
    "one-rank": Shape(1, reduction="source"),
}


def run_on_ranks(num_ranks: int, rank_main: Callable[[deep_ep.Buffer], object]) -> None:
    """On a `Buffer` of each virtual rank."""

    def run(group: Group) -> None:
        buffer = buffer_of(group)
        rank_main(buffer)
        buffer.destroy()

    virtual_world(num_ranks).run(run)


def scenario_of(shape: Shape, routing: str = "masked", num_variants: int = 1) -> Scenario:
    """Every rank has tokens, but the last of several has none in the first variant."""
    scenario, most = Scenario(shape), shape.num_max_tokens_per_rank
    for seed in range(num_variants):
        num_tokens = [max(0, most - seed - rank) for rank in range(shape.num_ranks)]
        if shape.num_ranks > 1 and seed == 0:
            num_tokens[-1] = 0
        scenario.add(routing, num_tokens, seed)
    return scenario


@pytest.mark.parametrize("is_hooked", [True, False], ids=["hook", "no-hook"])
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES.keys())
def test_every_format_and_routing_equals_the_reference(shape: Shape, is_hooked: bool) -> None:
    scenarios = [scenario_of(shape, routing, 2) for routing in ROUTINGS]

    def rank_main(buffer: deep_ep.Buffer) -> None:
        for variant in (v for s in scenarios for v in s.variants):
            Exchange(buffer, shape, variant, is_hooked).run()

    run_on_ranks(shape.num_ranks, rank_main)


@pytest.mark.parametrize("name", ["bf16", "fp8-ue8m0", "bf16-weights-at-dispatch"])
def test_ranks_on_several_nodes(name: str) -> None:
    """Over a network that delivers in another order for each seed."""
    shape = replace(SHAPES[name], num_ranks=4, ranks_per_node=2)
    scenario = scenario_of(shape, "repeated", 3)

    def rank_main(group: Group) -> None:
        buffer = buffer_of(group)
        for op in range(4):
            variant = scenario.variant(op)
            Exchange(buffer, shape, variant, is_hooked=op % 2 == 0).run(zero_copy=op == 3)
        buffer.destroy()

    for seed in range(10):
        shape.world(seed).run(rank_main)


def exchange_in_process(rank: Rank, scenario: Scenario) -> int:
    assert dist.group.WORLD is not None
    buffer = buffer_of(dist.group.WORLD)
    for op in range(7):
        variant = scenario.variant(op)
        Exchange(buffer, scenario.shape, variant, is_hooked=op % 3 != 0).run(zero_copy=op % 2 == 1)
    buffer.destroy()
    return buffer.group_size


def test_processes_of_a_torch_process_group() -> None:
    shapes = [SHAPES["bf16"], replace(SHAPES["fp8-ue8m0"], reduction="rank")]
    with RankProcesses(3) as ranks:
        for shape in shapes:
            scenario = scenario_of(shape, "repeated", 3)
            assert ranks.run(exchange_in_process, scenario) == [3, 3, 3]


def test_shapes_take_turns_on_one_buffer_and_each_has_two_dispatches_in_flight() -> None:
    shapes = [SHAPES["fp8"], SHAPES["float32"], Shape(2, hidden=48, num_experts=5)]
    scenarios = [scenario_of(shape, "uniform", 3) for shape in shapes]

    def rank_main(buffer: deep_ep.Buffer) -> None:
        for first in range(3):
            in_flight = [
                Exchange(buffer, shape, scenario.variant(first + i))
                for shape, scenario in zip(shapes, scenarios, strict=True)
                for i in range(2)
            ]
            for half in ("dispatch", "receive", "combine", "finish"):
                for exchange in in_flight:
                    getattr(exchange, half)()

    run_on_ranks(2, rank_main)


def test_a_third_dispatch_before_a_hook_is_an_order_error() -> None:
    shape = Shape(2, reduction="source")
    variants = scenario_of(shape, "uniform", 3).variants

    def rank_main(buffer: deep_ep.Buffer) -> None:
        exchanges = [Exchange(buffer, shape, variant) for variant in variants]
        exchanges[0].dispatch()
        exchanges[1].dispatch()
        with pytest.raises(OrderError, match="dispatch 3 needs the bank of dispatch 1, whose hook"):
            exchanges[2].dispatch()
        without_hook = Exchange(buffer, shape, variants[2], is_hooked=False)
        with pytest.raises(OrderError, match="while dispatch 1 waits for its hook"):
            without_hook.dispatch()
        with pytest.raises(OrderError, match="hook of dispatch 2 was called before"):
            exchanges[1].hook()
        exchanges[0].receive()
        with pytest.raises(OrderError, match="called twice"):
            exchanges[0].hook()
        exchanges[2].dispatch()  # nothing was lost
        with pytest.raises(OrderError, match="dispatch 2, whose hook has not been called"):
            exchanges[1].combine()
        exchanges[1].receive()
        exchanges[2].receive()

    run_on_ranks(2, rank_main)


@pytest.mark.parametrize("name", ["bf16", "top-16-of-11-experts", "one-rank"])
@pytest.mark.parametrize("routing", ["masked", "repeated", "all_masked", "empty_rank"])
def test_the_handle_says_where_every_row_came_from(name: str, routing: str) -> None:
    shape = SHAPES[name]
    variant = scenario_of(shape, routing, 2).variants[1]
    num_ranks, most = shape.num_ranks, shape.num_max_tokens_per_rank

    def rank_main(buffer: deep_ep.Buffer) -> None:
        exchange = Exchange(buffer, shape, variant)
        exchange.dispatch()
        with pytest.raises(OrderError, match="before the dispatch hook"):
            _ = exchange.handle[0]
        exchange.receive()
        src_info, layout_range, *sizes = exchange.handle
        assert sizes == [most, shape.hidden, shape.num_experts]
        assert (len(exchange.handle), exchange.handle[-1]) == (5, shape.num_experts)
        assert exchange.handle[2:4] == (most, shape.hidden)
        experts = reference.experts_of_rank(shape.num_experts, num_ranks, buffer.rank)
        assert src_info.dtype == torch.int32
        assert src_info.shape == (len(experts), num_ranks * most)
        assert layout_range.dtype == torch.int64
        assert layout_range.shape == (len(experts), num_ranks)
        for local, expert in enumerate(experts):
            origins = variant.received[expert].origins
            tokens = [token for _, token in origins]
            assert src_info[local].tolist() == tokens + [-1] * (num_ranks * most - len(tokens))
            for src_rank, packed in enumerate(layout_range[local].tolist()):
                begin, count = packed >> 32, packed & 0xFFFFFFFF
                assert count == sum(rank == src_rank for rank, _ in origins)
                assert begin == sum(rank < src_rank for rank, _ in origins)

    run_on_ranks(num_ranks, rank_main)


@pytest.mark.parametrize("is_hooked", [True, False], ids=["hook", "no-hook"])
def test_stats_add_up_what_experts_received_when_it_is_received(is_hooked: bool) -> None:
    shape = Shape(2, num_experts=5, reduction="source")
    variants = scenario_of(shape, "repeated", 3).variants

    def rank_main(buffer: deep_ep.Buffer) -> None:
        experts = reference.experts_of_rank(shape.num_experts, 2, buffer.rank)
        expected = torch.full((len(experts),), 100, dtype=torch.int32)
        stats = expected.clone()
        for variant in variants:
            exchange = Exchange(buffer, shape, variant, is_hooked)
            exchange.dispatch(cumulative_local_expert_recv_stats=stats)
            if is_hooked:
                assert torch.equal(stats, expected)
            exchange.receive()
            expected += torch.tensor([len(variant.received[e].origins) for e in experts])
            assert torch.equal(stats, expected)

    run_on_ranks(2, rank_main)


@pytest.mark.parametrize("name", ["bf16", "float32", "fp8-round_scale"])
def test_zero_copy_combines_what_is_in_the_combine_buffer(name: str) -> None:
    shape = SHAPES[name]
    scenario = scenario_of(shape, "uniform", 3)

    def rank_main(buffer: deep_ep.Buffer) -> None:
        for op in range(5):
            a, b = (Exchange(buffer, shape, scenario.variant(op + i)) for i in range(2))
            a.dispatch()
            b.dispatch()
            a.receive()
            b.receive()
            ours = buffer.get_next_low_latency_combine_buffer(a.handle)
            assert ours.shape == a.recv_x.shape
            assert ours.dtype == shape.dtype
            others = buffer.get_next_low_latency_combine_buffer(b.handle)
            assert ours.data_ptr() != others.data_ptr()
            a.combine(zero_copy=True)
            b.combine(zero_copy=True)
            assert ours is buffer.get_next_low_latency_combine_buffer(a.handle)
            a.finish()
            b.finish()

    run_on_ranks(shape.num_ranks, rank_main)


def test_zero_copy_needs_the_combine_buffer_of_this_very_dispatch() -> None:
    shape = Shape(2, reduction="source")
    variants = scenario_of(shape, "uniform", 3).variants

    def rank_main(buffer: deep_ep.Buffer) -> None:
        first, second, third = (Exchange(buffer, shape, variant) for variant in variants)
        first.dispatch()
        first.receive()
        rows = torch.zeros_like(first.recv_x)
        arguments = (rows, first.topk_idx, first.topk_weights, first.handle)
        with pytest.raises(OrderError, match="was not called with the handle of dispatch 1"):
            buffer.low_latency_combine(*arguments, zero_copy=True)
        buffer.get_next_low_latency_combine_buffer(first.handle)
        second.run()
        third.run(zero_copy=True)  # in the bank of the first
        with pytest.raises(OrderError, match="called for a later dispatch since"):
            buffer.low_latency_combine(*arguments, zero_copy=True)

    run_on_ranks(2, rank_main)


def test_the_result_goes_to_out() -> None:
    shape = Shape(2, reduction="source")
    variant = scenario_of(shape, "uniform", 2).variants[1]

    def rank_main(buffer: deep_ep.Buffer) -> None:
        exchange = Exchange(buffer, shape, variant)
        exchange.dispatch()
        exchange.receive()
        out = torch.full_like(variant.x[buffer.rank], float("nan"))
        exchange.combine(out=out)
        assert exchange.combined is out
        exchange.finish()

    run_on_ranks(2, rank_main)


def test_weights_at_dispatch_need_not_be_repeated_at_combine_and_may_not_differ() -> None:
    shape = Shape(2)
    variant = scenario_of(shape, "uniform", 2).variants[1]

    def rank_main(buffer: deep_ep.Buffer) -> None:
        exchange = Exchange(buffer, shape, variant)
        exchange.dispatch()
        exchange.receive()
        same = exchange.topk_weights
        exchange.topk_weights = same.clone()
        with pytest.raises(ValueError, match="another tensor than low_latency_dispatch was given"):
            exchange.combine()
        for weights in (None, same, same.view(-1).view(same.shape)):
            exchange.topk_weights = weights
            exchange.combine()
            exchange.finish()

    run_on_ranks(2, rank_main)
