"""Where everything lies for the normal kernels on GPUs: nothing overlaps, all is aligned, and the
budget decides how many rows there is room for."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from itertools import pairwise, product

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from ep_backend import _native
from ep_backend.normal_cuda_settings import CudaNormalSettings

PHASES = (_native.Phase.DISPATCH, _native.Phase.COMBINE)
BANKS = range(_native.NUM_ROUND_BANKS)
REGION_ALIGN = 128
FLOAT8 = torch.float8_e4m3fn
DEFAULT = CudaNormalSettings(
    hidden=128,
    num_experts=8,
    top_k=3,
    dtype=torch.bfloat16,
    dispatch_dtype=torch.bfloat16,
    scale_format="float32",
    num_bytes=1 << 20,
)

settings_of_buffers = st.builds(
    CudaNormalSettings,
    hidden=st.integers(1, 40).map(lambda n: 16 * n),
    num_experts=st.integers(1, 20),
    top_k=st.integers(1, 64),
    dtype=st.just(torch.bfloat16),
    dispatch_dtype=st.sampled_from([torch.bfloat16, FLOAT8]),
    scale_format=st.just("float32"),
    num_bytes=st.integers(1 << 17, 1 << 20),
).map(lambda s: replace(s, scale_format="ue8m0") if s.dispatch_dtype == FLOAT8 else s)

Part = tuple[int, int, str]
"""First byte, bytes, name."""


def parts_of(
    layout: _native.NormalDeviceLayout, settings: CudaNormalSettings, num_ranks: int, num_rows: int
) -> Iterator[Part]:
    ranks = range(num_ranks)
    for phase, rank in product(PHASES, ranks):
        yield layout.ready(phase, rank), 8, f"ready {phase} {rank}"
        yield layout.round_credit(phase, rank), 8, f"round credit {phase} {rank}"
        for bank in BANKS:
            yield layout.round_signal(phase, bank, rank), 8, f"signal {phase} {bank} {rank}"
    num_experts = layout.partition.num_local_experts(0)
    for rank in ranks:
        yield layout.done(rank), 8, f"done {rank}"
        yield layout.credit(rank), 8, f"credit {rank}"
        yield layout.counts(rank), 16, f"counts {rank}"
        yield layout.rank_counts(rank), 4 * num_ranks, f"rank counts {rank}"
        yield layout.expert_counts(rank), 4 * num_experts, f"expert counts {rank}"
    row_bytes = settings.hidden * settings.dispatch_dtype.itemsize
    for row in range(num_rows):
        yield layout.row(row), row_bytes, f"row {row}"
        yield layout.scales(row), 4 * layout.num_scale_words, f"scales {row}"
        yield layout.topk_idx(row), 4 * settings.top_k, f"experts {row}"
        yield layout.topk_weights(row), 4 * settings.top_k, f"weights {row}"
        yield layout.src_token(row), 4, f"token {row}"
        yield layout.combine_row(row), settings.hidden * settings.dtype.itemsize, f"home {row}"
        yield layout.combine_weights(row), 4 * settings.top_k, f"home weights {row}"


@given(settings_of_buffers, st.integers(1, 9))
def test_nothing_overlaps_and_all_fits(settings: CudaNormalSettings, num_ranks: int) -> None:
    config = settings.config(num_ranks)
    if config.num_rows < 2 * num_ranks:
        with pytest.raises(ValueError, match="num_bytes is"):
            settings.check(num_ranks)
        return
    settings.check(num_ranks)
    layout = _native.NormalDeviceLayout(config)
    parts = sorted(parts_of(layout, settings, num_ranks, config.num_rows))
    for (first, num_bytes, name), (second, _, next_name) in pairwise(parts):
        assert first + num_bytes <= second, f"{name} and {next_name}"
    first, num_bytes, name = parts[-1]
    assert first + num_bytes <= layout.num_bytes <= settings.num_bytes, name


@given(settings_of_buffers, st.integers(1, 9))
def test_vectors_reach_every_row_and_words_are_aligned(
    settings: CudaNormalSettings, num_ranks: int
) -> None:
    layout = _native.NormalDeviceLayout(settings.config(num_ranks))
    for region in (layout.row, layout.scales, layout.topk_idx, layout.topk_weights):
        assert region(0) % REGION_ALIGN == 0
    for row in range(3):
        assert layout.row(row) % 16 == 0
        assert layout.combine_row(row) % 16 == 0
    for rank in range(num_ranks):
        assert layout.counts(rank) % REGION_ALIGN == 0
        assert layout.done(rank) % 8 == layout.credit(rank) % 8 == 0


@given(st.integers(1, 64), st.integers(0, 200))
def test_a_budget_finds_room_for_what_it_was_asked_for(num_ranks: int, num_more: int) -> None:
    config = DEFAULT.config(num_ranks)
    config.num_rows = 2 * num_ranks + num_more
    budget = _native.NormalDeviceLayout.budget_for(config)
    assert _native.NormalDeviceLayout.num_rows_that_fit(config, budget) >= config.num_rows


def test_rounds_have_slots_for_every_source_twice() -> None:
    config = DEFAULT.config(3)
    config.num_rows = 37
    layout = _native.NormalDeviceLayout(config)
    assert layout.num_tokens_per_round == 6
    slots = [
        layout.staged_row(*place)
        for place in product(BANKS, range(3), range(layout.num_tokens_per_round))
    ]
    assert slots == list(range(36))


@pytest.mark.parametrize(
    ("changed", "num_ranks", "message"),
    [
        ({"hidden": 20}, 2, "hidden is 20, so rows of torch.bfloat16 have 40 bytes"),
        ({"dispatch_dtype": FLOAT8, "hidden": 136}, 2, "rows of torch.float8_e4m3fn have 136"),
        ({"num_bytes": 4096}, 2, "num_bytes is 4096, .*one token of each rank at a time"),
        ({}, 65, r"num_ranks is 65, expected an integer in 1\.\.64"),
        ({"num_experts": 5000}, 2, r"num_experts is 5000, expected an integer in 1\.\.4096"),
        ({"top_k": 65}, 2, r"top_k is 65, expected an integer in 1\.\.64"),
        ({"scale_format": "ue8m0"}, 2, "rows of torch.bfloat16 have no scales"),
    ],
)
def test_what_no_kernel_could_serve_is_refused(
    changed: dict[str, object], num_ranks: int, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        replace(DEFAULT, **changed).check(num_ranks)
