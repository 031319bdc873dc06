"""csrc/protocol/normal_node_layout.h: no two things lie in one place, and the budget decides on the
tokens of a round."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import product

from hypothesis import given, settings
from hypothesis import strategies as st

from ep_backend import _native
from ep_backend.normal_settings import node_config
from tests.cpu.test_normal import shapes
from tests.support.normal import NormalShape
from tests.support.strategies import NODES

PHASES = (_native.Phase.DISPATCH, _native.Phase.COMBINE)
REGIONS = (
    "node_signals",
    "node_sleepers",
    "node_counts",
    "staged_counts",
    "node_routes",
    "staged_routes",
    "node_inbox",
    "node_outbox",
)


@st.composite
def node_shapes(draw: st.DrawFn) -> NormalShape:
    ranks_per_node, num_nodes = draw(st.sampled_from(NODES))
    shape = draw(shapes(1))
    sizes = {name: getattr(shape, name) for name in shape.__dataclass_fields__}
    sizes |= dict(num_ranks=ranks_per_node * num_nodes, ranks_per_node=ranks_per_node)
    return NormalShape(**sizes)


def parts_of(shape: NormalShape) -> Iterator[tuple[int, int, str]]:
    """(first byte, bytes, region) of everything behind the base layout."""
    layout = shape.node_layout()
    assert shape.ranks_per_node is not None
    remotes = range(shape.num_ranks // shape.ranks_per_node - 1)
    for phase, remote in product(PHASES, remotes):
        yield layout.node_signal_sleepers(phase, remote), 4, "node_sleepers"
        for bank in range(_native.NUM_ROUND_BANKS):
            yield layout.node_signal(bank, phase, remote), 8, "node_signals"
    for remote, rank in product(remotes, range(shape.ranks_per_node)):
        yield layout.node_counts(remote, rank), layout.counts_stride, "node_counts"
        yield layout.staged_counts(remote, rank), layout.counts_stride, "staged_counts"
    row_end = layout.row_in_message + layout.base.row_bytes
    message_bytes = max(layout.dispatch_bytes, row_end)
    slots = range(shape.num_tokens_per_round)
    for bank, remote, slot in product(range(_native.NUM_ROUND_BANKS), remotes, slots):
        yield layout.node_route(bank, remote, slot), layout.route_bytes, "node_routes"
        yield layout.staged_route(bank, remote, slot), layout.route_bytes, "staged_routes"
        yield layout.node_inbox(bank, remote, slot), message_bytes, "node_inbox"
        yield layout.node_outbox(bank, remote, slot), message_bytes, "node_outbox"


@settings(max_examples=200)
@given(node_shapes())
def test_no_two_parts_overlap_and_regions_hold_them(shape: NormalShape) -> None:
    layout = shape.node_layout()
    begins = [getattr(layout, f"{region}_offset") for region in REGIONS]
    assert begins == sorted(begins)
    assert begins[0] >= layout.base.num_bytes
    assert all(begin % 128 == 0 for begin in begins)
    ends = dict(zip(REGIONS, [*begins[1:], layout.num_bytes], strict=True))
    alignments = dict(node_sleepers=4, node_signals=8, node_counts=8, staged_counts=8)
    alignments |= dict(node_routes=4, staged_routes=4)
    end = 0
    for at, num_bytes, region in sorted(parts_of(shape)):
        assert at >= max(end, getattr(layout, f"{region}_offset")), region
        assert at % alignments.get(region, 128) == 0, region
        end = at + num_bytes
        assert end <= ends[region], region


@settings(max_examples=200)
@given(node_shapes(), st.integers(0, 1 << 22))
def test_the_largest_round_that_fits_is_found(shape: NormalShape, num_bytes: int) -> None:
    assert shape.ranks_per_node is not None
    config = shape.settings(1 << 40).config(shape.num_ranks)

    def needed(num_tokens: int) -> int:
        config.num_tokens_per_round = num_tokens
        return _native.NormalNodeLayout(node_config(config, shape.ranks_per_node or 1)).num_bytes

    found = _native.NormalNodeLayout.num_tokens_that_fit(
        node_config(config, shape.ranks_per_node), num_bytes
    )
    if found == 0:
        assert needed(1) > num_bytes
        return
    assert needed(found) <= num_bytes
    assert found == _native.MAX_TOKENS_PER_RANK or needed(found + 1) > num_bytes
