"""Memory of buffers over a network: messages in one piece, the outbox behind all else."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise, product

import torch
from hypothesis import given
from hypothesis import strategies as st

from ep_backend import NetworkConfig, _native
from tests.protocol.test_layout import (
    PHASES,
    SLOT_ALIGN,
    align_up,
    dispatch_row_bytes,
    header_bytes,
    num_scales,
    outcome_bytes,
    parts_by_region,
)
from tests.support.shapes import Shape

NETWORK = NetworkConfig()
shapes = st.builds(
    Shape,
    num_ranks=st.integers(1, 9),
    num_max_tokens_per_rank=st.integers(1, 6),
    hidden=st.integers(1, 300),
    num_experts=st.integers(1, 20),
    top_k=st.integers(1, 32),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
    num_banks=st.integers(2, 4),
    device=st.just("cuda"),
    dispatch_dtype=st.sampled_from([None, torch.float8_e4m3fn]),
    combine_dtype=st.sampled_from([None, torch.float8_e4m3fn]),
    reduction=st.sampled_from(["rank", "source"]),
    network=st.just(NETWORK),
)


def num_rows_home(shape: Shape) -> int:
    """That answer a message, at most."""
    return shape.top_k if shape.is_reduced_at_source else 1


def message_bytes(shape: Shape) -> int:
    """Header, row and scales, each where 16 bytes are aligned."""
    row = header_bytes(shape) + align_up(dispatch_row_bytes(shape), 16)
    return row + align_up(4 * num_scales(shape), 16)


@given(shapes)
def test_a_message_is_in_one_piece(shape: Shape) -> None:
    layout = shape.layout()
    network = _native.NetworkLayout(layout)
    assert network.message_bytes == message_bytes(shape)
    banks, ranks, slots = shape.num_banks, shape.num_ranks, shape.num_max_tokens_per_rank
    for bank, rank, slot in product(range(banks), range(ranks), range(slots)):
        header = layout.header(bank, rank, slot)
        assert header % SLOT_ALIGN == 0
        assert layout.inbox_row(bank, rank, slot) == header + header_bytes(shape)
        scales = header + header_bytes(shape) + align_up(dispatch_row_bytes(shape), 16)
        assert layout.inbox_scales(bank, rank, slot) == scales


@given(shapes)
def test_nothing_overlaps_and_the_size_is_the_end_of_the_last(shape: Shape) -> None:
    layout = shape.layout()
    network = _native.NetworkLayout(layout)
    parts = [(b, e) for region in parts_by_region(shape).values() for b, e, _ in region]
    assert max(end for _, end in parts) <= layout.num_bytes <= network.arrivals_offset
    banks, ranks = range(shape.num_banks), range(shape.num_ranks)
    counts_bytes = 8 * layout.partition.num_max_local_experts()
    parts += [
        (network.arrivals(*place), network.arrivals(*place) + 8)
        for place in product(banks, PHASES, ranks)
    ]
    for bank, rank in product(banks, ranks):
        at = network.staged_counts(bank, rank)
        parts.append((at, at + counts_bytes))
        for slot in range(shape.num_max_tokens_per_rank):
            staged = [(network.staged_message(bank, rank, slot), network.message_bytes)]
            for entry in range(num_rows_home(shape)):
                at = network.staged_outcome(bank, rank, slot, entry)
                staged.append((at, network.outcome_bytes(1)))
            for at, num_bytes in staged:
                assert at % SLOT_ALIGN == 0
                parts.append((at, at + num_bytes))
    parts.sort()
    for (_, end), (begin, _) in pairwise(parts):
        assert end <= begin
    assert network.outcome_bytes(1) == outcome_bytes(shape)
    assert 0 <= network.num_bytes - parts[-1][1] < SLOT_ALIGN
    assert network.num_bytes % SLOT_ALIGN == 0


@given(shapes)
def test_an_outbox_is_an_inbox_for_each_peer(shape: Shape) -> None:
    """A slot of the outbox is as far from the first as the slot of the peer's inbox is from the
    first that is this rank's: kernels count on it."""
    layout = shape.layout()
    network = _native.NetworkLayout(layout)
    last = shape.num_max_tokens_per_rank - 1
    for bank, own, peer in product(range(shape.num_banks), *[range(shape.num_ranks)] * 2):
        in_outbox = network.staged_message(bank, peer, last) - network.staged_message(0, peer, 0)
        in_inbox = layout.header(bank, own, last) - layout.header(0, own, 0)
        assert in_outbox == in_inbox


@given(shapes)
def test_rows_that_answer_a_message_are_put_at_once(shape: Shape) -> None:
    """They lie side by side where they are staged, and as far apart where they are put."""
    layout = shape.layout()
    network = _native.NetworkLayout(layout)
    last = shape.num_max_tokens_per_rank - 1
    first_column = last * layout.num_outcome_columns
    for bank, num_rows in product(range(shape.num_banks), range(1, num_rows_home(shape) + 1)):
        ends = [
            network.staged_outcome(bank, 0, last, num_rows - 1)
            - network.staged_outcome(bank, 0, last, 0),
            layout.outcome(bank, first_column + num_rows - 1) - layout.outcome(bank, first_column),
        ]
        assert {end + outcome_bytes(shape) for end in ends} == {network.outcome_bytes(num_rows)}


def test_documented_size() -> None:
    """EP16, 128 tokens, hidden 7168 in float8, bfloat16 home, two banks: 30 MiB inbox and as much
    outbox, 28 MiB of rows that come home, 56 MiB of rows that go home."""
    shape = Shape(
        16, 128, 7168, 256, 8, device="cuda", dispatch_dtype=torch.float8_e4m3fn, network=NETWORK
    )
    num_bytes = _native.NetworkLayout(shape.layout()).num_bytes
    message, row = align_up(message_bytes(shape), SLOT_ALIGN), 2 * 7168
    rows = 2 * 128 * (16 * (2 * message + row) + 8 * row)
    assert rows < num_bytes < rows + 64 * 1024
    assert num_bytes < 148 * 2**20
    # Added up at home: eight rows for each message.
    shape = replace(shape, reduction="source")
    num_bytes = _native.NetworkLayout(shape.layout()).num_bytes
    rows += 2 * 128 * 16 * 7 * row
    assert rows < num_bytes < rows + 64 * 1024
    assert num_bytes < 540 * 2**20


def test_without_a_network_nothing_is_packed() -> None:
    shape = Shape(2, device="cuda", transfer="push", num_max_tagged_tokens=0, network=NETWORK)
    packed, plain = shape.layout(), replace(shape, network=None).layout()
    assert packed.inbox_offset - packed.headers_offset == header_bytes(shape)
    assert plain.inbox_offset >= plain.headers_offset + 2 * 2 * 6 * header_bytes(shape)
