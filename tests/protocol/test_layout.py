"""Where everything lies: nothing overlaps, all is aligned, the size is the last part's end."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from itertools import chain, pairwise, product

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st

from ep_backend import _native
from tests.support.shapes import Shape

PHASES = (_native.Phase.DISPATCH, _native.Phase.COMBINE)
SLOT_ALIGN, HEADER_ALIGN, SCALES_ALIGN = 128, 64, 16
WORD_BYTES, PART_BYTES = 16, 1024
TAGGED_PART_BYTES = 3 * 32 * WORD_BYTES  # three words a lane
COUNTS_PER_WORD = 6
FLOAT8 = torch.float8_e4m3fn

num_tokens = st.shared(st.integers(1, 6), key="tokens")
dispatch_dtypes = st.shared(st.sampled_from([None, FLOAT8]), key="dispatch dtype")
shapes = st.builds(
    Shape,
    num_ranks=st.integers(1, 9),
    num_max_tokens_per_rank=num_tokens,
    hidden=st.integers(1, 300),
    num_experts=st.integers(1, 20),
    top_k=st.integers(1, 32),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
    num_banks=st.integers(2, 4),
    device=st.just("cuda"),  # the only one with a choice of transfers
    dispatch_dtype=dispatch_dtypes,
    combine_dtype=st.sampled_from([None, FLOAT8]),
    transfer=st.sampled_from(["push", "pull", "pull_push"]),
    reduction=st.sampled_from(["rank", "source"]),
    num_max_tagged_tokens=num_tokens.flatmap(lambda n: st.integers(0, n)),
)

# Exchanges in workspaces, which have no inbox and no outcome.
workspace_shapes = st.builds(
    lambda shape, num_workspaces: replace(
        shape,
        combine_dtype=None,
        output_layout="rank_major" if shape.reduction == "rank" else "expert_major",
        transfer="pull_push" if shape.reduction == "rank" and shape.transfer == "push" else "pull",
        num_workspaces=num_workspaces,
    ),
    shapes,
    st.integers(1, 3),
)
all_shapes = st.one_of(shapes, workspace_shapes)

Part = tuple[int, int, str]
"""First byte, end, name."""


def align_up(num_bytes: int, alignment: int) -> int:
    return -(-num_bytes // alignment) * alignment


def header_bytes(shape: Shape) -> int:
    return align_up(16 + 12 * shape.top_k, HEADER_ALIGN)


def dispatch_row_bytes(shape: Shape) -> int:
    return shape.hidden * (shape.dispatch_dtype or shape.dtype).itemsize


def num_scales(shape: Shape) -> int:
    return -(-shape.hidden // 128) if shape.is_float8 else 0


def combine_row_bytes(shape: Shape) -> int:
    return shape.hidden * (shape.combine_dtype or shape.dtype).itemsize


def outcome_bytes(shape: Shape) -> int:
    """A row of combine, and its scales where they start aligned behind it."""
    if shape.combine_dtype is None:
        return combine_row_bytes(shape)
    return align_up(combine_row_bytes(shape), SCALES_ALIGN) + 4 * -(-shape.hidden // 128)


def tagged_row_bytes(row_bytes: int) -> int:
    return -(-row_bytes // PART_BYTES) * TAGGED_PART_BYTES


def parts_by_region(shape: Shape) -> dict[str, list[Part]]:
    """Every word, header and row of one rank's memory, by region, in the order of the regions."""
    regions: dict[str, list[Part]] = {}
    messages = workspaces_of if shape.num_workspaces > 0 else messages_of
    for region, (begin, num_bytes, name) in chain(words_of(shape), messages(shape)):
        if num_bytes > 0:
            regions.setdefault(region, []).append((begin, begin + num_bytes, name))
    return regions


def words_of(shape: Shape) -> Iterator[tuple[str, Part]]:
    """Region, and (first byte, bytes, name)."""
    layout, ranks, banks = shape.layout(), range(shape.num_ranks), range(shape.num_banks)
    for bank, phase, rank in product(banks, PHASES, ranks):
        yield "signals", (layout.signal(bank, phase, rank), 8, f"signal {bank} {phase} {rank}")
    for phase, rank in product(PHASES, ranks):
        yield "credits", (layout.credit(phase, rank), 8, f"credit {phase} {rank}")
    for workspace, rank in product(range(shape.num_workspaces), ranks):
        at = layout.workspace_credit(workspace, rank)
        yield "workspace_credits", (at, 8, f"workspace credit {workspace} {rank}")
    for rank in ranks if shape.num_workspaces > 0 else ():
        yield "workspace_arrivals", (layout.workspace_arrivals(rank), 8, f"arrivals {rank}")
    for phase, rank in product(PHASES, ranks):
        at = layout.signal_sleepers(phase, rank)
        yield "sleepers", (at, 4, f"signal sleepers {phase} {rank}")
        at = layout.credit_sleepers(phase, rank)
        yield "sleepers", (at, 4, f"credit sleepers {phase} {rank}")
    for bank, rank in product(banks, ranks):
        if shape.num_workspaces == 0:
            at = layout.counts(bank, rank)
            for local in range(layout.partition.num_max_local_experts()):
                yield "counts", (at + 8 * local, 8, f"count {bank} {rank} {local}")
        elif shape.reduction == "source":
            for word in range(-(-shape.num_experts // COUNTS_PER_WORD)):
                at = layout.all_counts(bank, rank) + WORD_BYTES * word
                yield "counts", (at, WORD_BYTES, f"counts {bank} {rank} {word}")


def messages_of(shape: Shape) -> Iterator[tuple[str, Part]]:
    """Headers, rows and scales, partial rows, and all of it as tagged words."""
    layout, banks = shape.layout(), range(shape.num_banks)
    ranks, tokens = range(shape.num_ranks), range(shape.num_max_tokens_per_rank)
    row_bytes = outcome_bytes(shape)
    slots = list(product(banks, ranks, tokens))
    transfer = shape.config().transfer
    is_pull = transfer != _native.Transfer.PUSH
    has_outbox = transfer == _native.Transfer.PULL and shape.reduction == "rank"
    places = list(product(banks, tokens)) if is_pull else slots
    row_of, scales_of = (
        (layout.staged_row, layout.staged_scales)
        if is_pull
        else (layout.inbox_row, layout.inbox_scales)
    )
    for place in slots:
        yield "headers", (layout.header(*place), header_bytes(shape), f"header {place}")
    for place in places:
        yield "inbox", (row_of(*place), dispatch_row_bytes(shape), f"row {place}")
    for place in places:
        yield "scales", (scales_of(*place), 4 * num_scales(shape), f"scales {place}")
    if has_outbox:
        for place in slots:
            yield "outcome", (layout.outbox(*place), row_bytes, f"outbox {place}")
    else:
        for place in product(banks, range(layout.num_outcome_slots)):
            yield "outcome", (layout.outcome(*place), row_bytes, f"outcome {place}")

    tagged = range(shape.config().num_max_tagged_tokens)
    for place in product(banks, ranks, tagged):
        at = layout.tagged_message(*place)
        yield "tagged_inbox", (at, layout.tagged_message_bytes, f"tagged message {place}")
    for place in product(banks, range(len(tagged) * layout.num_outcome_columns)):
        is_tagged = shape.combine_dtype is not None
        num_bytes = tagged_row_bytes(combine_row_bytes(shape)) if is_tagged else row_bytes
        yield "tagged_outcome", (layout.tagged_outcome(*place), num_bytes, f"tagged row {place}")


def has_answers(shape: Shape) -> bool:
    """In workspaces: whether rows of combine come to their sources."""
    return shape.config().transfer != _native.Transfer.PULL


def workspaces_of(shape: Shape) -> Iterator[tuple[str, Part]]:
    """Rows, scales, experts and weights, and combine's rows. By expert, a row for each expert that
    a rank may own and each message that may list it, and no experts and weights."""
    layout, is_by_expert = shape.layout(), shape.reduction == "source"
    num_rows = shape.num_ranks * shape.num_max_tokens_per_rank
    num_rows *= layout.partition.num_max_local_experts() if is_by_expert else 1
    listed_bytes = 0 if is_by_expert else 4 * shape.top_k
    tagged = range(shape.config().num_max_tagged_tokens)
    places = list(product(range(shape.num_banks), range(shape.num_ranks), tagged))
    for place in places:
        at = layout.tagged_message(*place)
        yield "tagged_inbox", (at, layout.tagged_message_bytes, f"tagged message {place}")
    for place in places if has_answers(shape) else ():
        at = layout.answering_row(*place)
        yield "tagged_outcome", (at, combine_row_bytes(shape), f"answering row {place}")
    scale_bytes = 4 * num_scales(shape)
    if shape.scale_format == "ue8m0":
        scale_bytes = align_up(num_scales(shape), 4)
    for workspace in range(shape.num_workspaces):
        for part_of, num_bytes in (
            (layout.workspace_row, dispatch_row_bytes(shape)),
            (layout.workspace_scales, scale_bytes),
            (layout.workspace_topk_idx, listed_bytes),
            (layout.workspace_topk_weights, listed_bytes),
            (layout.combine_input, shape.hidden * shape.dtype.itemsize),
        ):
            # Tensors without gaps, from an aligned address.
            assert part_of(workspace, 0) % SLOT_ALIGN == 0
            for row in range(num_rows if num_bytes > 0 else 0):
                at = part_of(workspace, row)
                assert at == part_of(workspace, 0) + row * num_bytes
                yield "workspaces", (at, num_bytes, f"{part_of} {workspace} {row}")


@given(all_shapes)
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


@given(all_shapes)
def test_regions_lie_in_the_documented_order_and_share_no_slot_line(shape: Shape) -> None:
    regions, layout = parts_by_region(shape), shape.layout()
    if shape.num_workspaces > 0:
        is_tagged = shape.config().num_max_tagged_tokens > 0
        names = ["signals", "credits", "workspace_credits", "workspace_arrivals", "sleepers"]
        names += ["counts"] * (shape.reduction == "source")
        names += ["tagged_inbox"] * is_tagged
        names += ["tagged_outcome"] * (is_tagged and has_answers(shape)) + ["workspaces"]
    else:
        names = ["signals", "credits", "sleepers", "counts", "headers", "inbox"]
        names += ["scales"] * shape.is_float8 + ["outcome"]
        names += ["tagged_inbox", "tagged_outcome"] * (shape.num_max_tagged_tokens > 0)
    assert list(regions) == names
    offsets = [getattr(layout, f"{name}_offset") for name in names] + [layout.num_bytes]
    for name, begin, end in zip(names, offsets, offsets[1:], strict=False):
        assert begin % SLOT_ALIGN == 0
        assert min(part[0] for part in regions[name]) == begin
        assert max(part[1] for part in regions[name]) <= end


@given(shapes)
def test_words_headers_and_rows_are_aligned(shape: Shape) -> None:
    regions, layout = parts_by_region(shape), shape.layout()
    alignment = {
        "sleepers": 4,
        "headers": HEADER_ALIGN,
        "inbox": SLOT_ALIGN,
        "scales": SCALES_ALIGN,
        "outcome": SLOT_ALIGN,
        "tagged_inbox": SLOT_ALIGN,
        "tagged_outcome": SLOT_ALIGN,
    }
    for region, parts in regions.items():
        assert all(part[0] % alignment.get(region, 8) == 0 for part in parts)
    assert layout.tagged_row_in_message % SLOT_ALIGN == 0


@given(shapes)
def test_the_documented_sizes(shape: Shape) -> None:
    layout = shape.layout()
    columns = shape.top_k
    if shape.reduction == "rank":
        columns = min(columns, shape.num_ranks)
    assert layout.num_outcome_columns == columns
    assert layout.num_outcome_slots == shape.num_max_tokens_per_rank * columns
    assert layout.expert_capacity == shape.num_ranks * shape.num_max_tokens_per_rank
    assert layout.row_bytes == shape.hidden * shape.dtype.itemsize
    assert layout.dispatch_row_bytes == dispatch_row_bytes(shape)
    assert layout.num_scales == num_scales(shape)
    assert layout.combine_row_bytes == combine_row_bytes(shape)
    assert layout.num_combine_scales == (
        0 if shape.combine_dtype is None else -(-shape.hidden // 128)
    )
    if shape.combine_dtype is not None:
        scales_end = layout.combine_scales_in_row + 4 * layout.num_combine_scales
        assert scales_end == outcome_bytes(shape)
    # A tagged message: a word for its header and one for each entry, then the parts of its row.
    assert layout.tagged_row_in_message == align_up((1 + shape.top_k) * WORD_BYTES, SLOT_ALIGN)
    assert layout.tagged_row_in_message == _native.tagged_header_bytes(shape.top_k)
    tagged_bytes = layout.tagged_row_in_message + tagged_row_bytes(dispatch_row_bytes(shape))
    assert layout.tagged_message_bytes == tagged_bytes


@given(st.integers(1, 1 << 22))
@example(PART_BYTES)
@example(PART_BYTES + 1)
def test_a_tagged_row_is_whole_parts_that_hold_the_row_and_its_scales(row_bytes: int) -> None:
    assert _native.tagged_row_bytes(row_bytes) == tagged_row_bytes(row_bytes)
    assert TAGGED_PART_BYTES * 12 // 16 >= PART_BYTES + 8 * 4  # 12 bytes of a word are data


def bytes_of_messages_and_rows(shape: Shape) -> int:
    """Push: (R * M (headers + rows) + M * min(K, R) partial rows) * banks, in bfloat16."""
    row_bytes = align_up(shape.hidden * 2, SLOT_ALIGN)
    num_messages = shape.num_ranks * shape.num_max_tokens_per_rank
    num_rows = shape.num_max_tokens_per_rank * min(shape.top_k, shape.num_ranks)
    message_bytes = header_bytes(shape) + row_bytes
    return (num_messages * message_bytes + num_rows * row_bytes) * shape.num_banks


@pytest.mark.parametrize(
    ("shape", "at_most_mib"),
    [
        # 56.4 MiB, half of it inbox. With a slot for each (expert, token) the inbox would be 32
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


def test_pulled_rows_are_staged_once_not_once_a_rank() -> None:
    push = Shape(8, 128, 7168, 256, 8, device="cuda", transfer="push", num_max_tagged_tokens=0)
    pull = replace(push, transfer="pull")
    row_bytes = 2 * 7168
    # Dispatch stages a row a token instead of one a message; combine's outbox has one a message.
    assert pull.layout().num_bytes == push.layout().num_bytes - 2 * 7 * 128 * row_bytes
    # Nor do partial rows take more where they are pushed.
    assert replace(push, transfer="pull_push").layout().num_bytes == pull.layout().num_bytes


@pytest.mark.parametrize("transfer", ["push", "pull"])
def test_rows_that_are_reduced_at_home_are_pushed_there_one_for_each_expert(transfer: str) -> None:
    rank = Shape(4, 128, 7168, 256, 8, device="cuda", transfer=transfer, num_max_tagged_tokens=0)
    source = replace(rank, reduction="source")
    assert source.layout().num_outcome_columns == 8
    # Either way the outcome of "rank" has four places a token: min(K, R) columns or R sources.
    more_rows = 2 * 128 * (8 - 4)
    assert source.layout().num_bytes == rank.layout().num_bytes + more_rows * 2 * 7168


def test_a_workspace_is_all_the_memory_there_is() -> None:
    shape = Shape(
        8,
        128,
        7168,
        256,
        8,
        device="cuda",
        dispatch_dtype=torch.float8_e4m3fn,
        output_layout="rank_major",
        num_max_tagged_tokens=0,
        num_workspaces=1,
    )
    num_messages, words = 8 * 128, 2048
    message_bytes = 7168 + 56 * 4 + 2 * 8 * 4 + 2 * 7168
    num_bytes = shape.layout().num_bytes
    assert 0 <= num_bytes - num_messages * message_bytes < words
    two = replace(shape, num_workspaces=2).layout().num_bytes
    assert 0 <= two - 2 * num_messages * message_bytes < words


def test_float8_halves_the_inbox_and_adds_its_scales() -> None:
    bfloat16 = Shape(8, 128, 7168, 256, 8)
    float8 = replace(bfloat16, dispatch_dtype=torch.float8_e4m3fn)
    saved = bfloat16.layout().num_bytes - float8.layout().num_bytes
    assert saved == 2 * 8 * 128 * (7168 - 56 * 4)


def test_float8_halves_the_outcome_and_adds_its_scales() -> None:
    bfloat16 = Shape(8, 128, 7168, 256, 8)
    float8 = replace(bfloat16, combine_dtype=FLOAT8)
    saved = bfloat16.layout().num_bytes - float8.layout().num_bytes
    row_bytes = align_up(7168 + 56 * 4, SLOT_ALIGN)
    assert saved == 2 * 128 * 8 * (2 * 7168 - row_bytes)
    assert row_bytes < 0.53 * 2 * 7168


def test_memory_does_not_grow_with_the_number_of_experts() -> None:
    few, many = (Shape(8, 128, 7168, e, 8).layout().num_bytes for e in (8, 256))
    assert many - few < 8 * 2 * 8 * 32  # only their counts: u64 x banks x ranks x experts a rank


@pytest.mark.gpu
@pytest.mark.parametrize(
    "shape",
    [
        Shape(1, device="cuda"),
        Shape(8, 128, 7168, 256, 8, device="cuda"),
        Shape(8, 128, 7168, 256, 8, device="cuda", transfer="push", num_max_tagged_tokens=0),
        Shape(9, 5, 33, 7, 32, torch.float32, 3, "cuda", FLOAT8, FLOAT8, "ue8m0"),
        Shape(4, 128, 7168, 256, 8, device="cuda", reduction="source"),
        Shape(4, 9, 256, device="cuda", output_layout="rank_major", num_workspaces=2),
        Shape(
            4,
            9,
            256,
            device="cuda",
            output_layout="rank_major",
            num_workspaces=2,
            transfer="pull_push",
        ),
        Shape(4, 9, 256, device="cuda", reduction="source", num_workspaces=2),
    ],
    ids=[
        "R1",
        "R8",
        "R8-push",
        "R9-float8",
        "R4-source",
        "R4-workspaces",
        "R4-workspaces-push",
        "R4-expert-workspaces",
    ],
)
def test_a_gpu_computes_the_same_layout_as_the_host(shape: Shape) -> None:
    if not _native.has_cuda:
        pytest.skip("CPU-only build: the protocol headers were NOT compared on a GPU")
    num_mismatches = _native.cuda_protocol_mismatches(shape.config())
    if num_mismatches == -1:
        pytest.skip("no GPU: the protocol headers were NOT compared on one")
    assert num_mismatches == 0
