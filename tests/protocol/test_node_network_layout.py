"""Memory of hierarchical buffers over NVSHMEM: words that count arrivals, behind all else."""

from __future__ import annotations

from dataclasses import replace
from itertools import product

from hypothesis import given

from ep_backend import NetworkConfig, _native
from tests.protocol.test_layout import PHASES, SLOT_ALIGN
from tests.support.shapes import Shape
from tests.support.strategies import shapes


def on_gpus(shape: Shape) -> Shape:
    """The same shape, hierarchical, over a network."""
    return replace(
        shape, device="cuda", network=NetworkConfig(), reduction="rank", hierarchical=True
    )


@given(shapes(on_nodes=True).map(on_gpus))
def test_every_node_has_its_words(shape: Shape) -> None:
    layout = shape.multi_node_layout()
    network = _native.NodeNetworkLayout(layout)
    assert network.arrivals_offset % SLOT_ALIGN == 0
    assert network.arrivals_offset >= layout.num_bytes
    assert shape.ranks_per_node is not None
    num_remote = shape.num_ranks // shape.ranks_per_node - 1
    words = [
        network.arrivals(bank, phase, remote)
        for bank, phase, remote in product(range(shape.num_banks), PHASES, range(num_remote))
    ]
    assert words == [network.arrivals_offset + 8 * i for i in range(len(words))]
    end = network.arrivals_offset + 8 * len(words)
    assert end <= network.num_bytes < end + SLOT_ALIGN


@given(shapes(on_nodes=True).map(on_gpus))
def test_it_begins_as_on_cpus(shape: Shape) -> None:
    """What is proven of the protocol there is proven of the same bytes."""
    cpu = replace(shape, device="cpu", network=None).multi_node_layout()
    layout = shape.multi_node_layout()
    for name in ("num_bytes", "node_inbox_offset", "node_partials_offset", "node_sums_offset"):
        assert getattr(layout, name) == getattr(cpu, name)
    assert layout.base.num_bytes == cpu.base.num_bytes


@given(shapes(on_nodes=True).map(on_gpus))
def test_a_buffer_takes_as_much(shape: Shape) -> None:
    assert shape.ranks_per_node is not None
    settings = shape.settings()
    if shape.ranks_per_node == shape.num_ranks:
        flat = replace(settings, hierarchical=False)
        layout = _native.LowLatencyLayout(flat.config(shape.num_ranks))
        assert flat.num_symmetric_bytes(layout, None) == _native.NetworkLayout(layout).num_bytes
        return
    multi_node = settings.multi_node_config(shape.num_ranks, shape.ranks_per_node)
    layout = _native.LowLatencyLayout(settings.config(shape.num_ranks))
    expected = _native.NodeNetworkLayout(_native.MultiNodeLayout(multi_node)).num_bytes
    assert settings.num_symmetric_bytes(layout, multi_node) == expected
