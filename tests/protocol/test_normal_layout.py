"""Where everything lies for the normal kernels: nothing overlaps, all is aligned, and the budget
decides how many tokens a round has."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from itertools import pairwise, product

import torch
from hypothesis import given
from hypothesis import strategies as st

from ep_backend import _native
from tests.support.normal import NormalShape

PHASES = (_native.Phase.DISPATCH, _native.Phase.COMBINE)
SLOT_ALIGN, HEADER_ALIGN, SCALES_ALIGN = 128, 64, 16

shapes = st.builds(
    NormalShape,
    num_ranks=st.integers(1, 9),
    hidden=st.integers(1, 300),
    num_experts=st.integers(1, 20),
    top_k=st.integers(1, 64),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
    dispatch_dtype=st.sampled_from([None, torch.float8_e4m3fn]),
    num_tokens_per_round=st.integers(1, 5),
)

Part = tuple[int, int, str]
"""First byte, bytes, name."""


def words_of(shape: NormalShape) -> Iterator[Part]:
    layout, ranks = shape.layout(), range(shape.num_ranks)
    for bank, phase, rank in product(range(_native.NUM_ROUND_BANKS), PHASES, ranks):
        yield layout.signal(bank, phase, rank), 8, f"signal {bank} {phase} {rank}"
    for phase, rank in product(PHASES, ranks):
        yield layout.credit(phase, rank), 8, f"credit {phase} {rank}"
        yield layout.signal_sleepers(phase, rank), 4, f"signal sleepers {phase} {rank}"
        yield layout.credit_sleepers(phase, rank), 4, f"credit sleepers {phase} {rank}"
    for rank in ranks:
        yield layout.counts(rank), 24, f"counts {rank}"
        num_experts = layout.partition.num_local_experts(0)
        yield layout.expert_counts(rank), 8 * num_experts, f"expert counts {rank}"


def messages_of(shape: NormalShape, phase: str) -> Iterator[Part]:
    layout = shape.layout()
    dtype = shape.dispatch_dtype or shape.dtype if phase == "dispatch" else shape.dtype
    slots = range(shape.num_tokens_per_round)
    for place in product(range(_native.NUM_ROUND_BANKS), range(shape.num_ranks), slots):
        yield layout.message(*place), 4 * shape.top_k, f"experts {place}"
        yield layout.weights(*place), 4 * shape.top_k, f"weights {place}"
        yield layout.token(*place), 4, f"token {place}"
        yield layout.row(*place), shape.hidden * dtype.itemsize, f"row {place}"
        if dtype.itemsize == 1:
            yield layout.scales(*place), 4 * layout.num_scales, f"scales {place}"


@given(shapes)
def test_nothing_overlaps_and_the_size_is_the_end_of_the_last_part(shape: NormalShape) -> None:
    ends = []
    for phase in ("dispatch", "combine"):
        parts = sorted((*words_of(shape), *messages_of(shape, phase)))
        assert parts[0][0] == 0
        for (begin, num_bytes, name), (next_begin, _, next_name) in pairwise(parts):
            assert begin + num_bytes <= next_begin, f"{name} reaches into {next_name}"
        ends.append(parts[-1][0] + parts[-1][1])
    assert max(ends) <= shape.layout().num_bytes < max(ends) + SLOT_ALIGN


@given(shapes)
def test_words_messages_and_rows_are_aligned(shape: NormalShape) -> None:
    for begin, num_bytes, name in words_of(shape):
        assert begin % min(num_bytes, 8) == 0, name
    layout = shape.layout()
    for rank in range(shape.num_ranks):
        assert layout.counts(rank) % SLOT_ALIGN == 0
        for slot in range(shape.num_tokens_per_round):
            assert layout.message(0, rank, slot) % SLOT_ALIGN == 0
            assert layout.row(1, rank, slot) % HEADER_ALIGN == 0
            assert layout.scales(1, rank, slot) % SCALES_ALIGN == 0


@given(shapes, st.integers(0, 1 << 20))
def test_a_budget_gives_the_most_tokens_a_round_that_fit(shape: NormalShape, excess: int) -> None:
    settings = shape.settings(shape.layout().num_bytes + excess)
    config = settings.config(shape.num_ranks)
    assert config.num_tokens_per_round >= shape.num_tokens_per_round
    assert _native.NormalLayout(config).num_bytes <= settings.num_bytes
    config.num_tokens_per_round += 1
    assert _native.NormalLayout(config).num_bytes > settings.num_bytes


def test_a_round_never_has_more_tokens_than_a_signal_counts() -> None:
    shape = NormalShape(1, hidden=1, num_experts=1, top_k=1, dtype=torch.float32)
    config = shape.settings(1 << 40).config(num_ranks=1)
    assert config.num_tokens_per_round == _native.MAX_TOKENS_PER_RANK


def test_a_small_layout_byte_by_byte() -> None:
    """R = 2, E = 3, so L = 2, K = 3, H = 20 bfloat16, C = 4: as README.md beside it draws it."""
    layout = NormalShape(2, num_experts=3).layout()
    dispatch, combine = PHASES
    assert [layout.signal(b, p, r) for b, p, r in product((0, 1), PHASES, (0, 1))] == list(
        range(0, 64, 8)
    )
    assert [layout.credit(p, r) for p, r in product(PHASES, (0, 1))] == [128, 136, 144, 152]
    assert [layout.signal_sleepers(p, r) for p, r in product(PHASES, (0, 1))] == [
        256,
        260,
        264,
        268,
    ]
    assert layout.credit_sleepers(dispatch, 0) == 272
    assert layout.credit_sleepers(combine, 1) == 284
    assert (layout.counts(0), layout.expert_counts(0), layout.counts(1)) == (384, 408, 512)
    # Experts and weights, 24 bytes, the token, then the row at 64: 104 bytes in all.
    assert (layout.message(0, 0, 0), layout.weights(0, 0, 0), layout.row(0, 0, 0)) == (
        640,
        652,
        704,
    )
    assert layout.token(0, 0, 0) == 664
    assert layout.message(0, 1, 0) == 640 + 4 * 128
    assert layout.message(1, 0, 0) == 640 + 8 * 128
    assert layout.num_bytes == 640 + 16 * 128


def test_scales_lie_behind_float8_rows_and_combine_uses_their_place_too() -> None:
    """H = 300: dispatch has 300 bytes and 3 scales behind them, combine 600 bytes."""
    shape = NormalShape(1, hidden=300, dispatch_dtype=torch.float8_e4m3fn)
    layout = shape.layout()
    row = layout.row(0, 0, 0)
    assert layout.num_scales == 3
    assert layout.scales(0, 0, 0) == row + 304
    assert layout.message(0, 0, 1) - layout.message(0, 0, 0) == 64 + 600 + 104  # to 128
    ue8m0 = replace(shape, scale_format="ue8m0").layout()
    assert (ue8m0.num_scales, ue8m0.num_scale_words) == (3, 1)
    assert ue8m0.num_bytes == layout.num_bytes


def test_rounds_are_those_of_the_largest_batch() -> None:
    layout = NormalShape(2).layout()  # 4 tokens a round
    assert [layout.num_rounds(n) for n in (0, 1, 4, 5, 1 << 40)] == [0, 1, 1, 2, 1 << 38]


def test_a_token_goes_to_at_most_so_many_ranks() -> None:
    assert NormalShape(2, top_k=3).layout().num_max_messages_per_token == 2
    assert NormalShape(5, top_k=3).layout().num_max_messages_per_token == 3
