"""csrc/protocol/normal_network_layout.h: words of arrivals lie behind all else, each alone, and the
budget decides on the tokens of a round."""

from __future__ import annotations

from itertools import product

from hypothesis import given
from hypothesis import strategies as st

from ep_backend import _native
from tests.protocol.test_normal_node_layout import node_shapes
from tests.support.normal import NormalShape

KINDS = (_native.Arrival.DISPATCH, _native.Arrival.ROUTES, _native.Arrival.SUMS)


@given(node_shapes())
def test_words_lie_behind_all_else(shape: NormalShape) -> None:
    layout = _native.NormalNetworkLayout(shape.node_config())
    assert shape.ranks_per_node is not None
    remotes = range(shape.num_ranks // shape.ranks_per_node - 1)
    banks = range(_native.NUM_ROUND_BANKS)
    words = [layout.arrivals(*place) for place in product(banks, KINDS, remotes)]
    assert layout.arrivals_offset >= layout.nodes.num_bytes == shape.node_layout().num_bytes
    assert words == [layout.arrivals_offset + 8 * i for i in range(len(words))]
    assert layout.arrivals_offset + 8 * len(words) <= layout.num_bytes
    assert layout.num_bytes % 128 == 0


@given(node_shapes(), st.integers(0, 1000))
def test_the_budget_decides(shape: NormalShape, num_spare: int) -> None:
    config = shape.node_config()
    num_bytes = _native.NormalNetworkLayout(config).num_bytes
    fits = _native.NormalNetworkLayout.num_tokens_that_fit
    assert fits(config, num_bytes + min(num_spare, 127)) == shape.num_tokens_per_round
    assert fits(config, num_bytes - 1) < shape.num_tokens_per_round
