"""The normal kernels equal their reference, bit for bit, on shapes that nobody listed and with
budgets that need many rounds."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ep_backend import Group, LowLatencyBuffer, NormalBuffer, reference_normal, virtual_world
from tests.support.normal import (
    NormalCase,
    NormalShape,
    case_of,
    check_combined,
    check_received,
    make_case,
    rows_for_home,
)
from tests.support.processes import Rank, RankProcesses
from tests.support.routing import ROUTINGS
from tests.support.scenario import same_bits

DTYPES = (torch.float32, torch.bfloat16)
FLOAT8 = torch.float8_e4m3fn
SCALE_FORMATS = ("float32", "power_of_two", "ue8m0")


@st.composite
def shapes(draw: st.DrawFn, max_ranks: int) -> NormalShape:
    is_float8 = draw(st.booleans())
    return NormalShape(
        num_ranks=draw(st.integers(1, max_ranks)),
        hidden=draw(st.one_of(st.integers(1, 70), st.sampled_from([127, 128, 129, 600]))),
        num_experts=draw(st.integers(1, 13)),
        top_k=draw(st.integers(1, 64)),
        dtype=draw(st.sampled_from(DTYPES)),
        num_tokens_per_round=draw(st.integers(1, 9)),
        dispatch_dtype=FLOAT8 if is_float8 else None,
        scale_format=draw(st.sampled_from(SCALE_FORMATS)) if is_float8 else "float32",
    )


@st.composite
def cases(
    draw: st.DrawFn, max_ranks: int = 5, is_deep_ep: bool = False
) -> tuple[NormalShape, list[NormalCase]]:
    """
    Args:
        is_deep_ep: the caller quantises float8 rows, and what it makes of them is bfloat16.
    """
    shape = draw(shapes(max_ranks))
    if is_deep_ep and shape.is_float8:
        shape = replace(shape, dtype=torch.bfloat16)
    num_tokens = st.lists(st.integers(0, 40), min_size=shape.num_ranks, max_size=shape.num_ranks)
    return shape, [
        make_case(
            shape,
            draw(st.sampled_from(ROUTINGS)),
            draw(num_tokens),
            seed=draw(st.integers(0, 1000)),
            idx_dtype=draw(st.sampled_from([torch.int32, torch.int64])),
            num_biases=draw(st.integers(0, 2)),
            with_weights=draw(st.booleans()),
            is_quantized=shape.is_float8 and (is_deep_ep or draw(st.booleans())),
        )
        for _ in range(draw(st.integers(1, 3)))
    ]


def run_on_threads(shape: NormalShape, cases: list[NormalCase], num_ops: int) -> None:
    def rank_main(group: Group) -> None:
        with shape.buffer(group, timeout_secs=10.0) as buffer:
            for op in range(num_ops):
                cases[op % len(cases)].run(buffer)

    virtual_world(shape.num_ranks).run(rank_main)


@settings(max_examples=200)
@given(cases())
def test_drawn_shapes_equal_the_reference(drawn: tuple[NormalShape, list[NormalCase]]) -> None:
    run_on_threads(*drawn, num_ops=4)


@settings(max_examples=40)
@given(cases(max_ranks=9))
def test_up_to_nine_ranks_equal_the_reference(
    drawn: tuple[NormalShape, list[NormalCase]],
) -> None:
    run_on_threads(*drawn, num_ops=2)


@pytest.mark.parametrize("num_tokens_per_round", [1, 7, 32_767])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("dispatch_dtype", [None, FLOAT8], ids=["as_dtype", "float8"])
def test_any_budget_gives_the_same_bits(
    dispatch_dtype: torch.dtype | None, dtype: torch.dtype, num_tokens_per_round: int
) -> None:
    shape = NormalShape(3, hidden=133, num_experts=7, top_k=4, dtype=dtype)
    shape = replace(shape, num_tokens_per_round=num_tokens_per_round, dispatch_dtype=dispatch_dtype)
    case = make_case(shape, "uniform", [200, 0, 61], seed=1, num_biases=2, with_weights=True)
    run_on_threads(shape, [case], num_ops=2)


@pytest.mark.parametrize("scale_format", SCALE_FORMATS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_float8_rows_have_the_bits_of_the_low_latency_kernels(
    dtype: torch.dtype, scale_format: str
) -> None:
    """Random bits: NaN, infinities and denormals among them."""
    generator = torch.Generator().manual_seed(7)
    as_int = torch.int32 if dtype == torch.float32 else torch.int16
    info = torch.iinfo(as_int)
    bits = torch.randint(info.min, info.max, (40, 650), generator=generator, dtype=as_int)
    x, idx, weights = bits.view(dtype), torch.zeros((40, 1), dtype=torch.int64), torch.ones(40, 1)
    x[20:] = torch.randn((20, 650), generator=generator)
    settings = dict(hidden=650, num_experts=1, top_k=1, dtype=dtype)
    settings |= dict(dispatch_dtype=FLOAT8, scale_format=scale_format)
    group = virtual_world(1).groups[0]
    with (
        NormalBuffer(group, num_bytes=1 << 20, **settings) as normal,
        LowLatencyBuffer(
            group, num_max_tokens_per_rank=40, output_layout="rank_major", **settings
        ) as low_latency,
    ):
        ours = normal.dispatch(x, idx, weights)
        theirs = low_latency.dispatch_and_receive(x, idx, weights)
        assert ours.recv_scales is not None
        assert theirs.recv_scales is not None
        assert same_bits(ours.recv_x, theirs.recv_x[0])
        assert ours.recv_scales.dtype == theirs.recv_scales.dtype
        assert same_bits(ours.recv_scales, theirs.recv_scales[0])


def test_a_bias_may_be_where_the_result_goes() -> None:
    shape = NormalShape(2, num_experts=2, top_k=1, num_tokens_per_round=2)
    case = make_case(shape, "masked", [9, 5], seed=1, num_biases=2)

    def rank_main(group: Group) -> None:
        rank = group.self_rank
        with shape.buffer(group) as buffer:
            result = buffer.dispatch(*case.inputs(rank))
            bias = tuple(b.clone() for b in case.biases[rank])
            x = rows_for_home(result.recv_x, rank)
            check_combined(buffer.combine(x, result.handle, out=bias[1], bias=bias), case, rank)

    virtual_world(2).run(rank_main)


def test_a_batch_beyond_the_count_of_a_signal() -> None:
    """A signal counts to 32767: the counts of a batch must not."""
    shape = NormalShape(2, hidden=1, num_experts=2, top_k=1, num_tokens_per_round=32_767)
    n = 40_000
    x = [torch.full((n, 1), rank).bfloat16() for rank in range(2)]
    idx = [torch.ones((n, 1), dtype=torch.int64)] * 2
    received = reference_normal.dispatch(x, idx, [torch.ones(n, 1)] * 2, num_experts=2)

    def rank_main(group: Group) -> tuple[list[int], torch.Tensor, torch.Tensor]:
        with shape.buffer(group) as buffer:
            result = buffer.dispatch(x[group.self_rank], idx[0], torch.ones(n, 1))
            out = buffer.combine(result.recv_x, result.handle)
            return result.num_recv_tokens_per_expert, result.recv_x, out

    for rank, (counts, recv_x, out) in enumerate(virtual_world(2).run(rank_main)):
        assert counts == received[rank].num_tokens_per_expert == [2 * n * rank]
        assert torch.equal(recv_x, received[rank].rows)
        assert torch.equal(out, x[rank])


@pytest.mark.parametrize("hidden", [8192, 60_001])
def test_rows_that_are_written_past_the_caches_equal_the_reference(hidden: int) -> None:
    shape = NormalShape(2, hidden=hidden, num_experts=5, top_k=4, num_tokens_per_round=30)
    run_on_threads(shape, [make_case(shape, "uniform", [70, 65], seed=3)], num_ops=2)


def test_full_float_range_survives_and_negative_zero_too() -> None:
    shape = NormalShape(2, hidden=512, num_experts=2, top_k=1, dtype=torch.float32)
    generator = torch.Generator().manual_seed(3)
    info = torch.iinfo(torch.int32)
    bits = torch.randint(info.min, info.max, (6, 512), generator=generator, dtype=torch.int32)
    values = bits.view(torch.float32)
    x = torch.where(values.isnan(), torch.tensor(-0.0), values)
    idx = torch.tensor([[0], [1], [-1], [1], [0], [0]])

    def rank_main(group: Group) -> None:
        with shape.buffer(group) as buffer:
            result = buffer.dispatch(x, idx, torch.ones(6, 1))
            out = buffer.combine(result.recv_x, result.handle).view(torch.int32)
            expected = torch.where(idx >= 0, x, 0.0).view(torch.int32)
            assert torch.equal(out, expected)

    virtual_world(2).run(rank_main)


@settings(max_examples=60)
@given(cases(max_ranks=4), st.integers(1, 9))
def test_a_cached_handle_routes_other_rows_alike(
    drawn: tuple[NormalShape, list[NormalCase]], alignment: int
) -> None:
    shape, (first, *_) = drawn
    x = [-1 - t.to(shape.dtype) for t in first.x]
    again = case_of(shape, x, first.topk_idx, first.topk_weights, num_biases=1, with_weights=True)

    def rank_main(group: Group) -> None:
        rank = group.self_rank
        with shape.buffer(group, timeout_secs=10.0) as buffer:
            handle = first.run(buffer)
            for case in (again, first):
                result = buffer.dispatch(
                    **case.rows(rank), handle=handle, expert_alignment=alignment
                )
                check_received(result, case, rank)
                counts = case.received[rank].num_tokens_per_expert
                aligned = [-(-n // alignment) * alignment for n in counts]
                assert result.num_recv_tokens_per_expert == aligned
                case.combine(buffer, result)
            first.run(buffer)

    virtual_world(shape.num_ranks).run(rank_main)


@settings(max_examples=60)
@given(cases(max_ranks=4), st.integers(0, 5))
def test_worst_tokens_leave_unused_rows_without_experts(
    drawn: tuple[NormalShape, list[NormalCase]], num_unused: int
) -> None:
    shape, (case, *_) = drawn
    num_worst = max(1, sum(len(x) for x in case.x) + num_unused)

    def rank_main(group: Group) -> None:
        rank = group.self_rank
        with shape.buffer(group, timeout_secs=10.0) as buffer:
            result = buffer.dispatch(*case.inputs(rank), num_worst_tokens=num_worst)
            check_received(result, case, rank)
            assert result.recv_x.shape == (num_worst, shape.hidden)
            counts = result.num_recv_tokens_per_expert
            assert isinstance(counts, torch.Tensor)
            assert counts.dtype == torch.int32
            assert counts.tolist() == case.received[rank].num_tokens_per_expert
            case.combine(buffer, result)  # nobody reads rows behind N, which are NaN

    virtual_world(shape.num_ranks).run(rank_main)


def test_combine_may_write_where_it_reads() -> None:
    """vLLM's experts and its output share memory where N equals T."""
    shape = NormalShape(2, num_experts=2, top_k=1, num_tokens_per_round=1)
    idx = [torch.tensor([[0], [1]] * 5), torch.tensor([[1], [0]] * 5)]
    x = [torch.arange(200.0).view(10, 20).bfloat16() + rank for rank in range(2)]
    case = case_of(shape, x, idx, [torch.ones(10, 1)] * 2)

    def rank_main(group: Group) -> None:
        with shape.buffer(group) as buffer:
            result = buffer.dispatch(*case.inputs(group.self_rank))
            y = rows_for_home(result.recv_x, group.self_rank)
            assert buffer.combine(y, result.handle, out=y) is y
            check_combined(y, case, group.self_rank)

    virtual_world(2).run(rank_main)


def run_checked(rank: Rank, shape: NormalShape, cases: list[NormalCase], num_ops: int) -> None:
    with shape.buffer(rank.group) as buffer:
        for op in range(num_ops):
            cases[op % len(cases)].run(buffer)


@pytest.mark.parametrize("num_ranks", [2, 5])
def test_processes_equal_the_reference(num_ranks: int) -> None:
    shape = NormalShape(num_ranks, hidden=130, num_experts=7, top_k=4)
    num_tokens = [(37 * r + 25) % 90 for r in range(num_ranks)]
    cases = [make_case(shape, routing, num_tokens, seed) for seed, routing in enumerate(ROUTINGS)]
    with RankProcesses(num_ranks) as ranks:
        ranks.run(run_checked, shape, cases, 2 * len(cases))
