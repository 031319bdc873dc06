"""The low-latency kernels of ranks on several nodes equal the reference, bit for bit, over a
network that reorders what RDMA may reorder: flat and hierarchical, on shapes that nobody listed."""

from __future__ import annotations

from dataclasses import replace
from itertools import product

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ep_backend import Group, LowLatencyBuffer, NetworkConfig, SettingsMismatch, virtual_world
from tests.support.programs import PROGRAMS, Delays, Interpreter
from tests.support.scenario import Scenario, mixed_scenario, same_bits
from tests.support.shapes import Shape
from tests.support.strategies import scenarios


def run_on_threads(
    scenario: Scenario, program: str, num_ops: int, seed: int = 0, delays: Delays | None = None
) -> None:
    def rank_main(group: Group) -> None:
        with scenario.shape.buffer(group, timeout_secs=20.0) as buffer:
            Interpreter(buffer, scenario).run(PROGRAMS[program](num_ops, buffer.num_banks), delays)

    scenario.shape.world(seed).run(rank_main)


@settings(max_examples=150)
@given(scenarios(on_nodes=True), st.sampled_from(sorted(PROGRAMS)), st.integers(0, 2**64 - 1))
def test_drawn_shapes_equal_the_reference(scenario: Scenario, program: str, seed: int) -> None:
    run_on_threads(scenario, program, num_ops=6, seed=seed)


@pytest.mark.parametrize("program", sorted(PROGRAMS))
@pytest.mark.parametrize("hierarchical", [False, True], ids=["flat", "hierarchical"])
def test_every_program_with_ranks_that_drift_apart(program: str, hierarchical: bool) -> None:
    shape = Shape(6, num_experts=13, top_k=4, ranks_per_node=3, hierarchical=hierarchical)
    run_on_threads(mixed_scenario(shape), program, num_ops=34, seed=5, delays=Delays(seed=1))


@pytest.mark.parametrize("ranks_per_node", [8, 4, 2, 1])
def test_sixteen_ranks(ranks_per_node: int) -> None:
    shape = Shape(16, num_experts=32, top_k=8, ranks_per_node=ranks_per_node, hierarchical=True)
    run_on_threads(mixed_scenario(shape, num_variants=3), "plain_loop", num_ops=3)


SHAPE = Shape(4, ranks_per_node=2)


def combined(shape: Shape, scenario: Scenario, seed: int = 0) -> list[torch.Tensor]:
    """Of the first variant, whatever the reference thinks of it."""
    variant = scenario.variants[0]

    def rank_main(group: Group) -> torch.Tensor:
        with shape.buffer(group) as buffer:
            result = buffer.dispatch_and_receive(*variant.inputs(group.self_rank))
            return buffer.combine_and_receive(result.recv_x, result.handle)

    return shape.world(seed).run(rank_main)


def test_the_order_of_sums_is_that_of_the_nodes() -> None:
    """Hierarchical results differ from flat ones in the last bits; neither depends on the network,
    nor, flat, on the nodes."""
    shape = Shape(4, hidden=64, num_experts=8, top_k=8, dtype=torch.float32, ranks_per_node=2)
    scenario = Scenario(shape).add("uniform", [6] * 4, seed=0)
    for rows in scenario.variants[0].x:
        rows.copy_(torch.randn(rows.shape, generator=torch.Generator().manual_seed(1)))
    hierarchical = replace(shape, hierarchical=True)
    flat = combined(shape, scenario)
    by_node = combined(hierarchical, scenario)
    assert not all(map(torch.equal, flat, by_node))
    for a, b in zip(flat, by_node, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
    for seed in (1, 2):
        assert all(map(same_bits, flat, combined(shape, scenario, seed)))
        assert all(map(same_bits, by_node, combined(hierarchical, scenario, seed)))
    assert all(map(same_bits, flat, combined(replace(shape, ranks_per_node=None), scenario)))


@pytest.mark.parametrize("combine_dtype", [None, torch.float8_e4m3fn], ids=["float32", "float8"])
def test_rows_added_up_at_home_have_the_bits_of_one_node(
    combine_dtype: torch.dtype | None,
) -> None:
    shape = Shape(
        4,
        hidden=130,
        num_experts=7,
        top_k=6,
        dtype=torch.float32,
        combine_dtype=combine_dtype,
        reduction="source",
    )
    variant = Scenario(shape).add("repeated", [6, 1, 0, 5], seed=3).variants[0]

    def rank_main(group: Group) -> torch.Tensor:
        x, topk_idx, topk_weights = (
            rows[group.self_rank] for rows in (variant.x, variant.topk_idx, variant.topk_weights)
        )
        x = torch.randn(x.shape, generator=torch.Generator().manual_seed(group.self_rank))
        with shape.buffer(group) as buffer:
            result = buffer.dispatch_and_receive(x, topk_idx)
            return buffer.combine_and_receive(
                result.recv_x, result.handle, topk_weights=topk_weights
            )

    expected = shape.world().run(rank_main)
    assert any(rows.abs().sum() > 0 for rows in expected)
    for ranks_per_node, seed in product((1, 2), range(10)):
        on_nodes = replace(shape, ranks_per_node=ranks_per_node).world(seed).run(rank_main)
        assert all(map(same_bits, expected, on_nodes))


@pytest.mark.parametrize("hierarchical", [False, True], ids=["flat", "hierarchical"])
@pytest.mark.parametrize("combine_dtype", [None, torch.float8_e4m3fn], ids=["bfloat16", "float8"])
def test_bytes_are_counted_where_they_go(
    hierarchical: bool, combine_dtype: torch.dtype | None
) -> None:
    """A rank's statistics of a combine say what the network has counted of every pair."""
    shape = Shape(6, combine_dtype=combine_dtype, ranks_per_node=2, hierarchical=hierarchical)
    variant = Scenario(shape).add("uniform", [6] * 6, seed=0).variants[0]
    world = shape.world()
    assert world.network is not None
    network = world.network
    buffers = world.run(shape.buffer)
    results = world.run(
        lambda group: buffers[group.self_rank].dispatch_and_receive(
            *variant.inputs(group.self_rank)
        )
    )
    pairs = list(product(range(6), range(6)))
    before = {pair: network.traffic(*pair) for pair in pairs}
    expert_out = [torch.zeros_like(result.recv_x) for result in results]
    world.run(
        lambda group: buffers[group.self_rank].combine_and_receive(
            expert_out[group.self_rank], results[group.self_rank].handle
        )
    )
    sent = [buffer.statistics().sent_bytes for buffer in buffers]
    for src_rank, dst_rank in pairs:
        counted = network.traffic(src_rank, dst_rank) - before[src_rank, dst_rank]
        told = sum(sent[src_rank][kind][dst_rank] for kind in ("combine_send", "combine_recv"))
        assert told == counted.put_bytes, (src_rank, dst_rank)
    world.run(lambda group: buffers[group.self_rank].close())


def test_one_node_is_as_if_there_was_no_network() -> None:
    shape = Shape(3, combine_dtype=torch.float8_e4m3fn, ranks_per_node=3, hierarchical=True)
    run_on_threads(mixed_scenario(shape), "two_micro_batches", num_ops=6)


def test_a_slow_network_is_waited_for() -> None:
    world = virtual_world(4, ranks_per_node=2, network_delay_us=300)
    shape = Shape(4, ranks_per_node=2, hierarchical=True)
    scenario = mixed_scenario(shape, num_variants=3)

    def rank_main(group: Group) -> None:
        with shape.buffer(group) as buffer:
            Interpreter(buffer, scenario).run(PROGRAMS["late_hooks"](4, buffer.num_banks))

    world.run(rank_main)


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (dict(hierarchical=True, reduction="source"), "at home nobody could weight them"),
        (
            dict(hierarchical=True, device="cuda", network=NetworkConfig(links="rdma")),
            "links are 'rdma', but ranks of a node forward",
        ),
    ],
)
def test_what_a_hierarchical_buffer_cannot_do_is_refused(
    arguments: dict[str, object], expected: str
) -> None:
    def rank_main(group: Group) -> None:
        with pytest.raises(ValueError, match=expected):
            LowLatencyBuffer(
                group,
                num_max_tokens_per_rank=2,
                hidden=16,
                num_experts=4,
                top_k=2,
                dtype=torch.float32,
                **arguments,  # type: ignore[arg-type]
            )

    virtual_world(2).run(rank_main)


def test_ranks_on_nodes_must_be_on_cpus() -> None:
    def rank_main(group: Group) -> None:
        with pytest.raises(
            ValueError, match="device is 'cuda', but the virtual ranks are on 2 nod"
        ):
            replace(SHAPE, device="cuda", hidden=16).buffer(group)

    SHAPE.world().run(rank_main)


def test_ranks_must_agree_on_the_algorithm() -> None:
    def rank_main(group: Group) -> None:
        shape = Shape(4, ranks_per_node=2, hierarchical=group.self_rank == 2)
        with pytest.raises(SettingsMismatch, match="hierarchical differs between ranks"):
            shape.buffer(group)

    virtual_world(4, ranks_per_node=2).run(rank_main)


def test_nodes_must_have_as_many_ranks_each() -> None:
    with pytest.raises(ValueError, match="ranks_per_node is 3, which does not divide the 4 ranks"):
        virtual_world(4, ranks_per_node=3)
    with pytest.raises(ValueError, match="ranks_per_node is 5"):
        virtual_world(4, ranks_per_node=5)
