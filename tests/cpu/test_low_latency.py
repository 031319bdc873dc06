"""The low-latency kernels equal the reference, bit for bit, on shapes that nobody listed."""

from __future__ import annotations

from dataclasses import replace
from itertools import chain

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from ep_backend import Group, virtual_world
from tests.support.programs import PROGRAMS, Interpreter
from tests.support.scenario import (
    Scenario,
    check_combined,
    check_received,
    mixed_scenario,
    run_experts,
    same_bits,
    variant_of,
)
from tests.support.shapes import Shape
from tests.support.strategies import DTYPES, REDUCTIONS, scenarios, shapes


def run_on_threads(scenario: Scenario, program: str, num_ops: int) -> None:
    def rank_main(group: Group) -> None:
        with scenario.shape.buffer(group, timeout_secs=10.0) as buffer:
            Interpreter(buffer, scenario).run(PROGRAMS[program](num_ops, buffer.num_banks))

    virtual_world(scenario.shape.num_ranks).run(rank_main)


@settings(max_examples=300)
@given(
    scenarios(), st.sampled_from(["plain_loop", "late_hooks", "two_micro_batches", "fused_loop"])
)
def test_drawn_shapes_equal_the_reference(scenario: Scenario, program: str) -> None:
    run_on_threads(scenario, program, num_ops=8)


@settings(max_examples=60)
@given(scenarios(max_ranks=9))
def test_up_to_nine_ranks_equal_the_reference(scenario: Scenario) -> None:
    run_on_threads(scenario, "plain_loop", num_ops=4)


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("combine_dtype", [None, torch.float8_e4m3fn], ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("hidden", "num_tokens"),
    [(8192, 8), (8192, 9), (12_345, 9), (60_000, 9), (60_001, 9), (3, 9)],
)
def test_rows_that_are_written_past_the_caches_equal_the_reference(
    dtype: torch.dtype,
    hidden: int,
    num_tokens: int,
    combine_dtype: torch.dtype | None,
    reduction: str,
) -> None:
    """The kernels switch to streaming stores at some number of bytes, and need aligned rows."""
    shape = Shape(
        3,
        num_max_tokens_per_rank=num_tokens,
        hidden=hidden,
        num_experts=5,
        top_k=4,
        dtype=dtype,
        num_banks=4,
        combine_dtype=combine_dtype,
        reduction=reduction,
    )
    scenario = Scenario(shape)
    for seed, routing in enumerate(["uniform", "one_hot_expert", "repeated"]):
        scenario.add(routing, [num_tokens, num_tokens - seed, 0 if seed == 1 else 1], seed)
    run_on_threads(scenario, "two_micro_batches", num_ops=6)


@settings(max_examples=60)
@given(shapes(max_ranks=4), st.data())
@example(Shape(3, num_experts=2, top_k=6), None)
@example(Shape(3, num_experts=2, top_k=6, output_layout="rank_major"), None)
@example(Shape(3, num_experts=2, top_k=6, reduction="source"), None)
def test_any_table_of_experts_equals_the_reference(
    shape: Shape, data: st.DataObject | None
) -> None:
    """Every entry drawn by itself: mixtures that no routing generator makes."""
    n, k = shape.num_max_tokens_per_rank, shape.top_k
    scenario = Scenario(shape).add("uniform", [n] * shape.num_ranks, seed=0)
    if data is not None:
        variant = scenario.variants[0]
        entry = st.integers(-1, shape.num_experts - 1)
        table = st.lists(entry, min_size=n * k, max_size=n * k)
        idx = [torch.tensor(data.draw(table)).view(n, k) for _ in range(shape.num_ranks)]
        scenario = Scenario(shape, [variant_of(shape, variant.x, idx, variant.topk_weights)])
    run_on_threads(scenario, "plain_loop", num_ops=1)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_full_float_range_survives_dispatch_and_rounds_like_torch(dtype: torch.dtype) -> None:
    """Random bit patterns, denormals, infinities and negative zeros, not only small integers."""
    shape = Shape(2, hidden=512, num_experts=4, top_k=4, dtype=dtype)
    generator = torch.Generator().manual_seed(3)
    as_int = torch.int32 if dtype == torch.float32 else torch.int16
    info = torch.iinfo(as_int)
    base = Scenario(shape).add("uniform", [6, 6], seed=3).variants[0]
    x = []
    for _ in range(2):
        bits = torch.randint(info.min, info.max, (6, 512), generator=generator, dtype=as_int)
        values = bits.view(dtype)
        # A NaN's sign and payload are not defined by arithmetic; NaN has its own test.
        x.append(torch.where(values.isnan(), torch.tensor(-0.0, dtype=dtype), values))
        x[-1][0, :3] = torch.tensor([float("inf"), -0.0, 1e-40], dtype=dtype)
    # One positive weight a token: no sum can make a NaN, and -0 must survive.
    idx = [i.clone() for i in base.topk_idx]
    for i in idx:
        i[:, 1:] = -1
    weights = [w.abs() + 0.1 for w in base.topk_weights]
    variant = variant_of(shape, x, idx, weights, expert=lambda _, rows: rows)

    buffers = shape.virtual_buffers()
    sent = [b.dispatch(x[r], idx[r], weights[r]) for r, b in enumerate(buffers)]
    back = []
    for rank, (result, hook) in enumerate(sent):
        hook()
        check_received(result, variant, shape, rank)
        back.append(buffers[rank].combine(result.recv_x, result.handle))
    for rank, (out, hook) in enumerate(back):
        hook()
        check_combined(out, variant, rank)


def test_a_nan_stays_with_its_token() -> None:
    shape = Shape(2, hidden=8, num_experts=2, top_k=2)
    base = Scenario(shape).add("uniform", [2, 2], seed=0).variants[0]
    x = [t.clone() for t in base.x]
    x[1][0, 3] = float("nan")

    def rank_main(group: Group) -> torch.Tensor:
        with shape.buffer(group) as buffer:
            result, hook = buffer.dispatch(
                x[group.self_rank], base.topk_idx[group.self_rank], torch.ones(2, 2)
            )
            hook()
            out, hook = buffer.combine(result.recv_x, result.handle)
            hook()
            return out

    outs = virtual_world(2).run(rank_main)
    assert not outs[0].isnan().any()
    assert outs[1].isnan().nonzero().tolist() == [[0, 3]]


def test_worked_example_of_the_dispatch_kernel() -> None:
    """Numbers of the first comment of csrc/cpu/low_latency_dispatch.cpp and _combine.cpp."""
    shape = Shape(
        2, num_max_tokens_per_rank=2, hidden=1, num_experts=4, top_k=2, dtype=torch.float32
    )
    a, b, c, p, q = 1.0, 2.0, 4.0, 0.5, 0.25
    x = [torch.tensor([[a], [b]]), torch.tensor([[c]])]
    idx = [torch.tensor([[0, 2], [3, 2]]), torch.tensor([[2, 0]])]
    weights = [torch.tensor([[1.0, 1.0], [p, q]]), torch.tensor([[1.0, 1.0]])]
    buffers = shape.virtual_buffers(timeout_secs=1.0)
    sent = [buffers[r].dispatch(x[r], idx[r], weights[r]) for r in range(2)]
    for _, hook in sent:
        hook()
    (_, _), (on_rank_1, _) = sent
    assert on_rank_1.num_recv_tokens_per_expert.tolist() == [3, 1]
    assert on_rank_1.recv_x[0, :3].flatten().tolist() == [a, b, c]
    assert on_rank_1.recv_x[1, :1].flatten().tolist() == [b]

    # Experts that add their number, so that both terms of b's partial row show.
    outs = []
    for rank, (result, _) in enumerate(sent):
        factor = torch.arange(buffers[rank].first_expert, 4)[:2].float()[:, None, None]
        outs.append(buffers[rank].combine(result.recv_x + factor, result.handle))
    for _, hook in outs:
        hook()
    assert outs[0][0].flatten().tolist() == [a + (a + 2), p * (b + 3) + q * (b + 2)]
    assert outs[1][0].flatten().tolist() == [(c + 2) + c]
    # Tokens a and c are answered by both ranks, b by rank 1 alone.
    assert sent[0][0].handle.num_partials.tolist() == [2, 1]
    assert sent[1][0].handle.num_partials.tolist() == [2]


def test_worked_example_of_the_rank_major_layout() -> None:
    """Numbers of the first comment of csrc/cpu/low_latency_dispatch.cpp, and a token that lists an
    expert twice."""
    shape = Shape(
        2,
        num_max_tokens_per_rank=2,
        hidden=1,
        num_experts=4,
        top_k=2,
        dtype=torch.float32,
        output_layout="rank_major",
    )
    a, b, c, d, p, q = 1.0, 2.0, 4.0, 8.0, 0.5, 0.25
    x = [torch.tensor([[a], [b]]), torch.tensor([[c], [d]])]
    idx = [torch.tensor([[0, 2], [3, 2]]), torch.tensor([[2, 0], [1, 1]])]
    weights = [torch.tensor([[1.0, 1.0], [p, q]]), torch.tensor([[1.0, 1.0], [p, q]])]
    buffers = shape.virtual_buffers(timeout_secs=1.0)
    sent = [buffers[r].dispatch(x[r], idx[r], weights[r]) for r in range(2)]
    for _, hook in sent:
        hook()
    (on_rank_0, _), (on_rank_1, _) = sent
    for result in (on_rank_0, on_rank_1):
        assert result.recv_topk_idx is not None
        assert result.recv_topk_weights is not None
    assert on_rank_1.recv_x.shape == (2, 2, 1)
    assert on_rank_1.num_recv_tokens_per_rank.tolist() == [2, 1]
    assert on_rank_1.num_recv_tokens_per_expert.tolist() == [3, 1]
    assert on_rank_1.recv_x[0].flatten().tolist() == [a, b]
    assert on_rank_1.recv_x[1, 0].item() == c
    assert on_rank_1.recv_topk_idx.tolist() == [[[0, -1], [1, 0]], [[0, -1], [-1, -1]]]
    assert on_rank_1.recv_topk_weights[0].tolist() == [[1.0, 0.0], [p, q]]
    # d lists expert 1 twice: one row, both entries.
    assert on_rank_0.num_recv_tokens_per_expert.tolist() == [2, 1]
    assert on_rank_0.recv_topk_idx.tolist() == [[[0, -1], [-1, -1]], [[0, -1], [1, 1]]]
    assert on_rank_0.recv_topk_weights[1].tolist() == [[1.0, 0.0], [p, q]]

    # Rows of combine are sums already: what comes home is theirs, by rank.
    outs = []
    for rank, (result, _) in enumerate(sent):
        outs.append(buffers[rank].combine(result.recv_x * 10**rank, result.handle))
    for _, hook in outs:
        hook()
    assert outs[0][0].flatten().tolist() == [a + 10 * a, 10 * b]
    assert outs[1][0].flatten().tolist() == [c + 10 * c, d]


def test_both_layouts_give_the_same_sums() -> None:
    """Where the caller's experts add up in k order, as combine does."""
    expert_major = mixed_scenario(Shape(3, hidden=33), seed=9)
    rank_major = mixed_scenario(replace(expert_major.shape, output_layout="rank_major"), seed=9)
    for one, other in zip(expert_major.variants, rank_major.variants, strict=True):
        assert all(map(same_bits, one.combined, other.combined))
    run_on_threads(rank_major, "plain_loop", num_ops=17)


def test_rows_that_go_home_as_they_are_round_once_and_take_their_weights_there() -> None:
    """The worked example again. Weights given at dispatch count for nothing, and each combine of a
    handle has its own."""
    shape = Shape(2, 2, 1, num_experts=4, top_k=2, dtype=torch.float32, reduction="source")
    a, b, c = 1.0, 2.0, 4.0
    x = [torch.tensor([[a], [b]]), torch.tensor([[c]])]
    idx = [torch.tensor([[0, 2], [3, 3]]), torch.tensor([[2, -1]])]
    buffers = shape.virtual_buffers(timeout_secs=1.0)
    ignored = [None, torch.full((1, 2), torch.nan)]
    sent = [buffers[r].dispatch(x[r], idx[r], ignored[r]) for r in range(2)]
    for _, hook in sent:
        hook()
    assert [result.handle.num_partials.tolist() for result, _ in sent] == [[2, 2], [1]]
    for p, q in ((0.5, 0.25), (3.0, -1.0)):
        weights = [torch.tensor([[1.0, 2.0], [p, q]]), torch.tensor([[p, torch.nan]])]
        outs = []
        for rank, (result, _) in enumerate(sent):
            number = torch.arange(buffers[rank].first_expert, 4)[:2].float()[:, None, None]
            rows = result.recv_x + number
            outs.append(buffers[rank].combine(rows, result.handle, topk_weights=weights[rank]))
        for _, hook in outs:
            hook()
        assert outs[0][0].flatten().tolist() == [a + 2 * (a + 2), p * (b + 3) + q * (b + 3)]
        assert outs[1][0].flatten().tolist() == [p * (c + 2)]


def test_the_hook_keeps_the_weights_that_it_will_read() -> None:
    """Nobody else holds them: other tensors would get their memory."""
    shape = Shape(1, 64, 1, num_experts=1, top_k=1, dtype=torch.float32, reduction="source")
    (buffer,) = shape.virtual_buffers()
    result = buffer.dispatch_and_receive(torch.ones(64, 1), torch.zeros((64, 1), dtype=torch.int32))
    out, hook = buffer.combine(result.recv_x, result.handle, topk_weights=torch.full((64, 1), 3.0))
    others = [torch.full((64, 1), 7.0) for _ in range(100)]
    hook()
    assert len(others) == 100
    assert torch.equal(out, torch.full((64, 1), 3.0))


def test_counters_count_tokens_messages_and_partial_rows() -> None:
    shape = Shape(2, num_experts=4, top_k=2, hidden=3)
    idx = [torch.tensor([[0, 1], [0, 2]]), torch.tensor([[3, -1], [-1, -1], [0, 3]])]
    buffers = shape.virtual_buffers()
    x = [torch.zeros(i.shape[0], 3, dtype=shape.dtype) for i in idx]
    sent = [b.dispatch(x[r], idx[r], torch.ones(idx[r].shape)) for r, b in enumerate(buffers)]
    for _, hook in sent:
        hook()
    back = [b.combine(s[0].recv_x, s[0].handle) for b, s in zip(buffers, sent, strict=True)]
    for _, hook in back:
        hook()
    rows = [{name: c.num_rows for name, c in b.counters().items()} for b in buffers]
    # Messages to rank 0: tokens 0 and 1 of rank 0, token 2 of rank 1; the other three to rank 1.
    assert rows[0] == dict(dispatch_send=2, dispatch_recv=3, combine_send=3, combine_recv=3)
    assert rows[1] == dict(dispatch_send=3, dispatch_recv=3, combine_send=3, combine_recv=3)
    counters = list(chain.from_iterable(b.counters().values() for b in buffers))
    assert all(c.num_ops == 1 and c.total_ns >= c.wait_ns for c in counters)


def test_inputs_may_change_as_soon_as_a_send_returns() -> None:
    shape = Shape(2)
    scenario = mixed_scenario(shape, seed=4)
    buffers = shape.virtual_buffers()
    variant = scenario.variants[1]
    sent = []
    for rank, buffer in enumerate(buffers):
        tensors = [t[rank].clone() for t in (variant.x, variant.topk_idx, variant.topk_weights)]
        sent.append(buffer.dispatch(*tensors))
        for tensor in tensors:
            tensor.fill_(7)
    back = []
    for rank, (result, hook) in enumerate(sent):
        hook()
        check_received(result, variant, shape, rank)
        y = run_experts(result, shape, rank)
        back.append(buffers[rank].combine(y, result.handle))
        y.fill_(7)
    for rank, (out, hook) in enumerate(back):
        hook()
        check_combined(out, variant, rank)


def test_combine_writes_into_the_tensor_it_is_given() -> None:
    shape = Shape(1)
    variant = mixed_scenario(shape).variants[0]
    (buffer,) = shape.virtual_buffers()
    result, hook = buffer.dispatch(variant.x[0], variant.topk_idx[0], variant.topk_weights[0])
    hook()
    given_out = torch.full_like(variant.combined[0], 7)
    out, hook = buffer.combine(run_experts(result, shape, 0), result.handle, out=given_out)
    hook()
    assert out is given_out
    check_combined(given_out, variant, 0)
