"""csrc/protocol/nodes.h and multi_node_layout.h: who is where, and that no two things lie in one
place."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import product

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ep_backend import _native
from tests.support.shapes import Shape
from tests.support.strategies import NODES, shapes

Part = tuple[int, int, str]
REGIONS = (
    "node_signals",
    "node_sleepers",
    "node_inbox",
    "node_outbox",
    "node_partials",
    "node_sums",
    "staged_headers",
    "staged_rows",
    "staged_scales",
    "staged_counts",
    "row_outbox",
)


def test_worked_example_of_the_nodes() -> None:
    """Numbers of the first comment of csrc/protocol/nodes.h."""
    nodes = _native.Nodes(6, 2)
    assert nodes.num_nodes == 3
    assert [nodes.node_of(rank) for rank in range(6)] == [0, 0, 1, 1, 2, 2]
    assert [nodes.rank_at(1, i) for i in range(2)] == [2, 3]
    assert nodes.rank_in_node(3) == 1
    assert [nodes.forwarder(node, 3) for node in range(3)] == [1, 3, 5]
    assert [nodes.remote_idx(1, node) for node in (0, 2)] == [0, 1]
    assert [nodes.remote_node(1, i) for i in range(2)] == [0, 2]
    assert nodes.share_node(2, 3)
    assert not nodes.share_node(1, 2)


@given(st.integers(1, 40), st.integers(1, 40))
def test_ranks_and_numbers_in_a_node_are_each_others_inverse(g: int, num_nodes: int) -> None:
    nodes = _native.Nodes(g * num_nodes, g)
    ranks = [nodes.rank_at(node, i) for node in range(num_nodes) for i in range(g)]
    assert ranks == list(range(g * num_nodes))
    assert all(nodes.rank_at(nodes.node_of(r), nodes.rank_in_node(r)) == r for r in ranks)
    for node in range(num_nodes):
        others = [n for n in range(num_nodes) if n != node]
        assert [nodes.remote_node(node, i) for i in range(num_nodes - 1)] == others
        assert [nodes.remote_idx(node, other) for other in others] == list(range(num_nodes - 1))


def parts_of(shape: Shape) -> Iterator[Part]:
    """(region, first byte, bytes) of every word, message and row behind the base layout."""
    layout = shape.multi_node_layout()
    assert shape.ranks_per_node is not None
    num_remote = shape.num_ranks // shape.ranks_per_node - 1
    banks, slots = range(shape.num_banks), range(shape.num_max_tokens_per_rank)
    if shape.ranks_added_up is not None:
        for remote in range(num_remote):
            yield layout.node_signal_sleepers(remote), 4, "node_sleepers"
        for bank, remote in product(banks, range(num_remote)):
            yield layout.node_signal(bank, remote), 8, "node_signals"
            for slot in slots:
                message_bytes = layout.node_message_bytes
                yield layout.node_inbox(bank, remote, slot), message_bytes, "node_inbox"
                yield layout.node_outbox(bank, remote, slot), message_bytes, "node_outbox"
                yield layout.node_sum(bank, remote, slot), layout.combine_bytes, "node_sums"
            for slot in range(shape.num_max_tokens_per_rank * layout.num_columns):
                at = layout.node_partial(bank, remote, slot)
                yield at, layout.combine_bytes, "node_partials"
    elif num_remote > 0:
        num_home = shape.top_k if shape.is_reduced_at_source else 1
        num_counts = layout.base.partition.num_max_local_experts()
        for bank, rank in product(banks, range(num_remote * shape.ranks_per_node)):
            yield layout.staged_counts(bank, rank), 8 * num_counts, "staged_counts"
            for slot in slots:
                yield layout.staged_header(bank, rank, slot), layout.header_bytes, "staged_headers"
            for i in range(shape.num_max_tokens_per_rank * num_home):
                yield layout.row_outbox(bank, rank, i), layout.combine_bytes, "row_outbox"
        for bank, token in product(banks, slots):
            yield layout.staged_row(bank, token), layout.base.dispatch_row_bytes, "staged_rows"
            if layout.scales_bytes > 0:
                yield layout.staged_scales(bank, token), layout.scales_bytes, "staged_scales"


@settings(max_examples=200)
@given(shapes(on_nodes=True))
def test_no_two_parts_overlap_and_regions_hold_them(shape: Shape) -> None:
    layout = shape.multi_node_layout()
    begins = [getattr(layout, f"{region}_offset") for region in REGIONS]
    assert begins == sorted(begins)
    assert begins[0] >= layout.base.num_bytes
    assert all(begin % 128 == 0 for begin in begins)
    ends = dict(zip(REGIONS, [*begins[1:], layout.num_bytes], strict=True))
    end = 0
    for at, num_bytes, region in sorted(parts_of(shape)):
        assert at >= max(end, getattr(layout, f"{region}_offset")), region
        end = at + num_bytes
        assert end <= ends[region], region
    if end > 0:
        assert end > layout.num_bytes - 128  # nothing but padding behind the last


@settings(max_examples=100)
@given(shapes(on_nodes=True))
def test_what_is_read_as_words_is_aligned(shape: Shape) -> None:
    for at, _, region in parts_of(shape):
        alignment = {"staged_counts": 8, "node_sleepers": 4, "node_signals": 8}
        alignment |= {"staged_headers": 64, "staged_scales": 16}
        assert at % alignment.get(region, 128) == 0, region
    # In a message its row, and the scales behind it.
    assert shape.multi_node_layout().header_bytes % 64 == 0


@pytest.mark.parametrize(("ranks_per_node", "num_nodes"), NODES)
def test_one_rank_of_a_node_is_this_ranks_way_there(ranks_per_node: int, num_nodes: int) -> None:
    shape = Shape(ranks_per_node * num_nodes, ranks_per_node=ranks_per_node)
    layout, nodes = shape.multi_node_layout(), _native.Nodes(shape.num_ranks, ranks_per_node)
    for rank in range(shape.num_ranks):
        remote = [r for r in range(shape.num_ranks) if not nodes.share_node(rank, r)]
        assert [layout.remote_rank(rank, r) for r in remote] == list(range(len(remote)))


def test_hierarchical_memory_of_a_decode_shape() -> None:
    """DeepSeek-V3's, four nodes of eight ranks: what it takes beside the flat protocol's."""
    sizes = dict(
        num_max_tokens_per_rank=128,
        hidden=7168,
        num_experts=256,
        top_k=8,
        dispatch_dtype=torch.float8_e4m3fn,
        ranks_per_node=8,
    )
    flat = Shape(32, **sizes).multi_node_layout()  # type: ignore[arg-type]
    hierarchical = Shape(32, hierarchical=True, **sizes).multi_node_layout()  # type: ignore[arg-type]
    assert hierarchical.base.num_bytes == flat.base.num_bytes
    assert hierarchical.num_bytes - hierarchical.base.num_bytes < 110 << 20
    assert flat.num_bytes - flat.base.num_bytes < 100 << 20
