"""Where everything lies: nothing overlaps, all is aligned, the size is the last part's end."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise, product

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st

from ep_backend import _native
from tests.support.shapes import Shape

PHASES = (_native.Phase.DISPATCH, _native.Phase.COMBINE)
SLOT_ALIGN, PAYLOAD_ALIGN = 128, 64

shapes = st.builds(
    Shape,
    num_ranks=st.integers(1, 9),
    num_max_tokens_per_rank=st.integers(1, 6),
    hidden=st.integers(1, 300),
    num_experts=st.integers(1, 20),
    top_k=st.integers(1, 32),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
    num_banks=st.integers(2, 4),
)

Part = tuple[int, int, str]
"""First byte, end, name."""


def parts_by_region(shape: Shape) -> dict[str, list[Part]]:
    """Every word, message and row of one rank's memory, by region, in the order of the regions."""
    layout, ranks = shape.layout(), range(shape.num_ranks)
    banks = range(shape.num_banks)
    element_bytes = 4 if shape.dtype == torch.float32 else 2
    row_bytes = shape.hidden * element_bytes

    def words() -> Iterator[tuple[str, Part]]:
        for bank, phase, rank in product(banks, PHASES, ranks):
            at = layout.signal(bank, phase, rank)
            yield "signals", (at, at + 8, f"signal {bank} {phase} {rank}")
        for phase, rank in product(PHASES, ranks):
            at = layout.credit(phase, rank)
            yield "credits", (at, at + 8, f"credit {phase} {rank}")
        for phase, rank in product(PHASES, ranks):
            at = layout.signal_sleepers(phase, rank)
            yield "sleepers", (at, at + 4, f"signal sleepers {phase} {rank}")
            at = layout.credit_sleepers(phase, rank)
            yield "sleepers", (at, at + 4, f"credit sleepers {phase} {rank}")
        for bank, rank in product(banks, ranks):
            at = layout.counts(bank, rank)
            for local in range(layout.partition.num_max_local_experts()):
                yield "counts", (at + 8 * local, at + 8 * local + 8, f"count {bank} {rank} {local}")
        for bank, rank, slot in product(banks, ranks, range(shape.num_max_tokens_per_rank)):
            at = layout.message(bank, rank, slot)
            end = at + layout.payload_in_message + row_bytes
            yield "inbox", (at, end, f"message {bank} {rank} {slot}")
        for bank, slot in product(banks, range(layout.num_outcome_slots)):
            at = layout.outcome(bank, slot)
            yield "outcome", (at, at + row_bytes, f"outcome {bank} {slot}")

    regions: dict[str, list[Part]] = {}
    for region, part in words():
        regions.setdefault(region, []).append(part)
    return regions


@given(shapes)
@example(Shape(9, hidden=1, num_experts=1, top_k=1, num_max_tokens_per_rank=1))
def test_no_two_parts_overlap_and_the_size_is_the_end_of_the_last(shape: Shape) -> None:
    regions = parts_by_region(shape)
    parts = sorted(part for region in regions.values() for part in region)
    for (_, end, name), (begin, _, next_name) in pairwise(parts):
        assert end <= begin, f"{name} runs into {next_name}"
    layout = shape.layout()
    assert parts[0][0] == 0
    assert 0 <= layout.num_bytes - parts[-1][1] < SLOT_ALIGN  # only padding behind it
    assert layout.num_bytes % SLOT_ALIGN == 0


@given(shapes)
def test_regions_lie_in_the_documented_order_and_share_no_slot_line(shape: Shape) -> None:
    regions, layout = parts_by_region(shape), shape.layout()
    names = ["signals", "credits", "sleepers", "counts", "inbox", "outcome"]
    assert list(regions) == names
    offsets = [getattr(layout, f"{name}_offset") for name in names] + [layout.num_bytes]
    for name, begin, end in zip(names, offsets, offsets[1:], strict=False):
        assert begin % SLOT_ALIGN == 0
        assert min(part[0] for part in regions[name]) == begin
        assert max(part[1] for part in regions[name]) <= end


@given(shapes)
def test_words_messages_payloads_and_rows_are_aligned(shape: Shape) -> None:
    regions, layout = parts_by_region(shape), shape.layout()
    alignment = {"sleepers": 4, "inbox": SLOT_ALIGN, "outcome": SLOT_ALIGN}
    for region, parts in regions.items():
        assert all(part[0] % alignment.get(region, 8) == 0 for part in parts)
    assert layout.payload_in_message % PAYLOAD_ALIGN == 0
    assert layout.payload_in_message >= 16 + 8 * shape.top_k
    assert layout.message_bytes % SLOT_ALIGN == 0


@given(shapes)
def test_the_documented_sizes(shape: Shape) -> None:
    layout = shape.layout()
    columns = min(shape.top_k, shape.num_ranks)
    assert layout.num_outcome_columns == columns
    assert layout.num_outcome_slots == shape.num_max_tokens_per_rank * columns
    assert layout.expert_capacity == shape.num_ranks * shape.num_max_tokens_per_rank
    assert layout.row_bytes == shape.hidden * (4 if shape.dtype == torch.float32 else 2)


def bytes_of_messages_and_rows(shape: Shape) -> int:
    """(R * M messages + M * min(K, R) rows) * banks: the formula of the README."""
    row_bytes = shape.hidden * 2
    message_bytes = -(-(-(-(16 + 8 * shape.top_k) // 64) * 64 + row_bytes) // 128) * 128
    outcome_bytes = -(-row_bytes // 128) * 128
    num_messages = shape.num_ranks * shape.num_max_tokens_per_rank
    num_rows = shape.num_max_tokens_per_rank * min(shape.top_k, shape.num_ranks)
    return (num_messages * message_bytes + num_rows * outcome_bytes) * shape.num_banks


@pytest.mark.parametrize(
    ("shape", "at_most_mib"),
    [
        # 56.3 MiB, half of it inbox. With a slot for each (expert, token) the inbox would be 32
        # times as large.
        (Shape(8, 128, 7168, 256, 8), 64),
        (Shape(8, 128, 2048, 64, 8), 17),
        (Shape(2, 128, 7168, 256, 8), 16),
    ],
    ids=["R8-H7168", "R8-H2048", "R2-H7168"],
)
def test_a_buffer_holds_a_message_per_rank_not_per_expert(shape: Shape, at_most_mib: int) -> None:
    num_bytes = shape.layout().num_bytes
    slots_bytes = bytes_of_messages_and_rows(shape)
    num_words = shape.num_banks * shape.num_ranks * (2 + shape.num_experts // shape.num_ranks)
    assert slots_bytes < num_bytes < slots_bytes + 8 * num_words + 1024
    assert num_bytes < at_most_mib * 2**20


def test_memory_does_not_grow_with_the_number_of_experts() -> None:
    few, many = (Shape(8, 128, 7168, e, 8).layout().num_bytes for e in (8, 256))
    assert many - few < 8 * 2 * 8 * 32  # only their counts: u64 x banks x ranks x experts a rank


@pytest.mark.gpu
@pytest.mark.parametrize(
    "shape",
    [Shape(1), Shape(8, 128, 7168, 256, 8), Shape(9, 5, 33, 7, 32, torch.float32, 3)],
    ids=["R1", "R8", "R9"],
)
def test_a_gpu_computes_the_same_layout_as_the_host(shape: Shape) -> None:
    if not _native.has_cuda:
        pytest.skip("CPU-only build: the protocol headers were NOT compared on a GPU")
    num_mismatches = _native.cuda_protocol_mismatches(shape.config())
    if num_mismatches == -1:
        pytest.skip("no GPU: the protocol headers were NOT compared on one")
    assert num_mismatches == 0
