"""DeepEP's normal calls equal the reference, alone and beside low-latency ones."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from hypothesis import given, settings

from ep_backend import Group, deep_ep, virtual_world
from tests.cpu.test_normal import cases
from tests.deep_ep.support import Exchange
from tests.support.normal import (
    NormalCase,
    NormalShape,
    case_of,
    check_combined,
    make_case,
    rows_for_home,
    weights_for_home,
)
from tests.support.routing import ROUTINGS
from tests.support.scenario import Scenario, same_bits, values_of
from tests.support.shapes import Shape

FLOAT8 = torch.float8_e4m3fn


def run_on_ranks(num_ranks: int, rank_main: Callable[[deep_ep.Buffer], object]) -> None:
    def run(group: Group) -> None:
        buffer = deep_ep.Buffer(group, timeout_secs=20.0)
        rank_main(buffer)
        buffer.destroy()

    virtual_world(num_ranks).run(run)


def x_of(case: NormalCase, rank: int, device: str = "cpu") -> Any:
    """What DeepEP's users pass: rows, or a pair with scales."""
    x = case.x[rank].to(device)
    if case.x_scales is None:
        return x
    scales = case.x_scales[rank].to(device)
    if case.shape.scale_format == "ue8m0":
        scales = packed(scales)
    return x, scales


def packed(scales: torch.Tensor) -> torch.Tensor:
    """Four exponents a word, the lowest first, column by column as GEMMs want them."""
    exponents = torch.nn.functional.pad(scales.view(torch.int32) >> 23, (0, -scales.shape[1] % 4))
    shifts = torch.tensor([0, 8, 16, 24], device=scales.device)
    words = (exponents.unflatten(1, (-1, 4)) << shifts).sum(-1)
    return words.int().t().contiguous().t()


@dataclass(frozen=True)
class Events:
    """How the calls of a pair are ordered with the current stream."""

    has_previous: bool = False
    is_async: bool = False

    def options(self) -> dict[str, Any]:
        """When all that a call is given has been made."""
        previous = deep_ep.Buffer.capture() if self.has_previous else None
        allocates = self.has_previous and self.is_async
        return dict(
            previous_event=previous,
            async_finish=self.is_async,
            allocate_on_comm_stream=allocates,
        )


PLAIN = Events()


def run_pair(
    buffer: deep_ep.Buffer,
    case: NormalCase,
    device: str = "cpu",
    events: Events = PLAIN,
    **options: Any,
) -> Any:
    """Layout, dispatch and combine of one rank, every result checked. Returns the handle."""
    rank, shape = buffer.rank, case.shape
    x = x_of(case, rank, device)
    topk_idx, topk_weights = case.topk_idx[rank].to(device), case.topk_weights[rank].to(device)
    layout = buffer.get_dispatch_layout(topk_idx, shape.num_experts, **events.options())
    per_rank, _, per_expert, is_token_in_rank, event = layout
    ordered = events.options()
    if events.is_async:  # as SGLang does: the layout's event orders the dispatch
        ordered |= dict(previous_event=event, allocate_on_comm_stream=True)
    received, recv_topk_idx, recv_topk_weights, counts, handle, event = buffer.dispatch(
        x,
        None,
        per_rank,
        None,
        is_token_in_rank,
        per_expert,
        topk_idx,
        topk_weights,
        **ordered,
        **options,
    )
    event.current_stream_wait()
    check_rows(received, case, rank)
    expected = case.received[rank]
    n = len(expected.rows)
    assert recv_topk_idx.dtype == topk_idx.dtype
    assert torch.equal(recv_topk_idx[:n].cpu(), expected.topk_idx.to(topk_idx.dtype))
    assert bool((recv_topk_idx[n:] == -1).all())
    assert same_bits(recv_topk_weights[:n].cpu(), expected.topk_weights)
    alignment = options.get("expert_alignment", 1)
    aligned = [-(-count // alignment) * alignment for count in expected.num_tokens_per_expert]
    assert counts == ([] if options.get("num_worst_tokens") else aligned)
    combine(buffer, case, received, recv_topk_weights, handle, events)
    return handle


def check_rows(received: Any, case: NormalCase, rank: int) -> None:
    expected = case.received[rank]
    n = len(expected.rows)
    assert isinstance(received, tuple) == (expected.scales is not None)
    if expected.scales is None:
        assert same_bits(received[:n].cpu(), expected.rows)
        return
    rows, scales = (part.cpu() for part in received)
    assert same_bits(rows[:n], expected.rows)
    if case.shape.scale_format == "ue8m0":
        assert same_bits(scales[:n], packed(expected.scales).contiguous())
    else:
        assert same_bits(scales[:n], expected.scales)


def combine(
    buffer: deep_ep.Buffer,
    case: NormalCase,
    received: Any,
    recv_topk_weights: torch.Tensor,
    handle: Any,
    events: Events = PLAIN,
) -> None:
    rank, expected = buffer.rank, case.received[buffer.rank]
    n, num_rows = len(expected.rows), len(recv_topk_weights)
    device = recv_topk_weights.device
    y = torch.full((num_rows, case.shape.hidden), float("nan"), dtype=case.shape.dtype)
    rows = values_of(expected.rows, expected.scales, case.shape.dtype)
    y[:n] = rows_for_home(rows, rank)
    weights = None
    if case.with_weights:
        weights = torch.full_like(recv_topk_weights, float("nan"))
        weights[:n] = weights_for_home(recv_topk_weights[:n].cpu(), rank).to(device)
    bias: Any = tuple(one.to(device) for one in case.biases[rank])
    if len(bias) < 2:
        bias = bias[0] if bias else None
    y = y.to(device)
    combined, sums, event = buffer.combine(y, handle, weights, bias, **events.options())
    event.current_stream_wait()
    check_combined(combined.cpu(), case, rank)
    assert (sums is None) == (weights is None)
    if sums is not None:
        assert same_bits(sums.cpu(), case.combined_weights[rank])


@settings(max_examples=100)
@given(cases(max_ranks=4, is_deep_ep=True))
def test_drawn_shapes_equal_the_reference(drawn: tuple[NormalShape, list[NormalCase]]) -> None:
    """Any hidden, any top_k to 64, experts that ranks do not divide; rows that are float8 are given
    so, as DeepEP wants them."""
    shape, some = drawn

    def rank_main(buffer: deep_ep.Buffer) -> None:
        for i, case in enumerate(some):
            num_worst = sum(map(len, case.x)) + 1 if i % 2 else 0
            run_pair(buffer, case, expert_alignment=1 + i * 4, num_worst_tokens=num_worst)

    run_on_ranks(shape.num_ranks, rank_main)


@pytest.mark.parametrize("routing", ROUTINGS)
def test_every_routing_equals_the_reference(routing: str) -> None:
    shape = NormalShape(3, hidden=140, num_experts=7, top_k=4)
    num_tokens = [13, 0, 20]
    case = make_case(shape, routing, num_tokens, seed=5, num_biases=2, with_weights=True)
    run_on_ranks(3, lambda buffer: run_pair(buffer, case))


@pytest.mark.parametrize("shape_of_scales", [(), (1,)], ids=["[T]", "[T, 1]"])
def test_a_row_may_have_one_scale(shape_of_scales: tuple[int, ...]) -> None:
    shape = NormalShape(2, hidden=300, num_experts=2, top_k=1, dispatch_dtype=FLOAT8)
    case = make_case(shape, "uniform", [9, 5], seed=1, is_quantized=True)

    def rank_main(buffer: deep_ep.Buffer) -> None:
        rank, n = buffer.rank, len(case.x[buffer.rank])
        scales = (torch.arange(float(n)) + 100 * rank).view(-1, *shape_of_scales)
        topk_idx = case.topk_idx[rank]
        *_, per_expert, _, _ = buffer.get_dispatch_layout(topk_idx, 2)
        (rows, recv_scales), *_, handle, _ = buffer.dispatch(
            (case.x[rank], scales),
            num_tokens_per_expert=per_expert,
            topk_idx=topk_idx,
            topk_weights=case.topk_weights[rank],
        )
        origins = case.received[rank].origins
        assert same_bits(rows, case.received[rank].rows)
        assert recv_scales.flatten().tolist() == [100.0 * r + token for r, token in origins]
        assert recv_scales.shape == (len(origins), *shape_of_scales)
        assert handle[3].tolist() == [token for _, token in origins]

    run_on_ranks(2, rank_main)


def test_a_handle_serves_rows_of_any_dtype() -> None:
    """Training dispatches float8 forward, and gradients of bfloat16 backward, with one handle."""
    float8 = NormalShape(3, hidden=260, num_experts=7, top_k=3, dispatch_dtype=FLOAT8)
    bf16 = NormalShape(3, hidden=260, num_experts=7, top_k=3)
    first = make_case(float8, "masked", [11, 7, 0], seed=2, is_quantized=True)
    gradient = make_case(bf16, "masked", [11, 7, 0], seed=2)
    wide = NormalShape(3, hidden=9, num_experts=7, top_k=3, dtype=torch.float32)
    other = make_case(wide, "masked", [11, 7, 0], seed=2, with_weights=True)

    def rank_main(buffer: deep_ep.Buffer) -> None:
        for worst in (0, 20):
            handle = run_pair(buffer, first, num_worst_tokens=worst)
            for case in (gradient, other, first, gradient):
                received, *nothing, _ = buffer.dispatch(x_of(case, buffer.rank), handle=handle)
                assert nothing == [None] * 4
                check_rows(received, case, buffer.rank)
                num_rows = len(received[0] if isinstance(received, tuple) else received)
                assert num_rows == worst or worst == 0
                weights = torch.zeros((num_rows, 3))
                n = len(case.received[buffer.rank].rows)
                weights[:n] = case.received[buffer.rank].topk_weights
                combine(buffer, case, received, weights, handle)

    run_on_ranks(3, rank_main)


def test_the_handle_keeps_its_routing_when_the_caller_changes_topk_idx() -> None:
    shape = NormalShape(2, hidden=16, num_experts=4, top_k=2)
    case = make_case(shape, "uniform", [6, 5], seed=2)
    x32 = NormalShape(2, hidden=16, num_experts=4, top_k=2, dtype=torch.float32)
    again = case_of(x32, [x.float() for x in case.x], case.topk_idx, case.topk_weights)

    def rank_main(buffer: deep_ep.Buffer) -> None:
        rank = buffer.rank
        changed = case_of(shape, case.x, [i.clone() for i in case.topk_idx], case.topk_weights)
        handle = run_pair(buffer, changed)
        changed.topk_idx[rank].fill_(-1)
        received, *_ = buffer.dispatch(again.x[rank], handle=handle)
        check_rows(received, again, rank)

    run_on_ranks(2, rank_main)


def test_the_handle_is_deep_eps_tuple() -> None:
    shape = NormalShape(3, hidden=16, num_experts=7, top_k=3)
    case = make_case(shape, "masked", [40, 0, 21], seed=4)
    # A token takes 2 banks x 3 ranks x 128 bytes: rounds of a few.
    num_bytes = NormalShape(3, hidden=16, num_experts=7, top_k=3, num_tokens_per_round=8)

    def run(group: Group) -> None:
        buffer = deep_ep.Buffer(group, num_nvl_bytes=num_bytes.layout().num_bytes)
        rank = buffer.rank
        handle = run_pair(buffer, case)
        prefix, sent_until, came_before, src_idx, is_token_in_rank, send_head = handle
        origins = case.received[rank].origins
        ends = [sum(r <= src for r, _ in origins) for src in range(3)]
        assert prefix[:, rank].tolist() == ends
        assert (prefix.shape, prefix.dtype) == ((3, 3), torch.int32)
        assert src_idx.tolist() == [token for _, token in origins]
        layout = buffer.get_dispatch_layout(case.topk_idx[rank], 7)
        assert torch.equal(is_token_in_rank, layout[3])
        assert torch.equal(sent_until[:, -1], layout[0])
        assert sent_until.shape == came_before.shape == (3, 5)
        for src in range(3):
            tokens = [token for r, token in origins if r == src]
            before = [sum(token < 8 * i for token in tokens) for i in range(5)]
            assert came_before[src].tolist() == before
        for dst in range(3):
            column, sent = send_head[:, dst].tolist(), is_token_in_rank[:, dst]
            for token, place in enumerate(column):
                in_round = int(sent[token // 8 * 8 : token].sum())
                assert place == (in_round if sent[token] else -1)
        assert len(handle) == 6
        assert handle[-1] is send_head
        assert handle[3:5] == (src_idx, is_token_in_rank)
        buffer.destroy()

    virtual_world(3).run(run)


@pytest.mark.parametrize("num_ranks", [1, 2, 5])
def test_rows_may_go_to_ranks_without_experts_being_told(num_ranks: int) -> None:
    shape = NormalShape(num_ranks, hidden=24, num_experts=7, top_k=3)
    case = make_case(shape, "masked", [5 + 3 * r for r in range(num_ranks)], seed=4)

    def rank_main(buffer: deep_ep.Buffer) -> None:
        rank, expected = buffer.rank, case.received[buffer.rank]
        layout = buffer.get_dispatch_layout(case.topk_idx[rank], 7)
        received, idx, weights, counts, handle, _ = buffer.dispatch(
            case.x[rank],
            num_tokens_per_rank=layout[0],
            is_token_in_rank=layout[3],
            num_tokens_per_expert=layout[2],
            expert_alignment=4,
        )
        assert idx is weights is None
        check_rows(received, case, rank)
        assert counts == [-(-n // 4) * 4 for n in expected.num_tokens_per_expert]
        combined, sums, _ = buffer.combine(rows_for_home(received, rank), handle)
        check_combined(combined, case, rank)
        assert sums is None

    run_on_ranks(num_ranks, rank_main)


def test_both_halves_take_turns_on_one_buffer() -> None:
    """As SGLang does: prefill with normal calls, decode with low-latency ones, also in flight."""
    low_latency = Shape(2, hidden=140, reduction="source")
    scenario = Scenario(low_latency)
    for seed in range(3):
        scenario.add("uniform", [4, 6], seed)
    shape = NormalShape(2, hidden=140)
    prefills = [make_case(shape, "masked", [50, 30 + seed], seed) for seed in range(3)]

    def run(group: Group) -> None:
        buffer = deep_ep.Buffer(group, 1 << 20, 1 << 20, low_latency_mode=True)
        for op in range(3):
            run_pair(buffer, prefills[op])
            buffer.clean_low_latency_buffer(6, 140, 8)
            exchange = Exchange(buffer, low_latency, scenario.variant(op))
            exchange.dispatch()
            run_pair(buffer, prefills[(op + 1) % 3])
            exchange.receive()
            exchange.combine()
            run_pair(buffer, prefills[op])
            exchange.finish()
        buffer.destroy()

    virtual_world(2).run(run)


def test_memory_is_bounded_and_follows_num_nvl_bytes() -> None:
    case = make_case(NormalShape(1, hidden=64), "uniform", [300], seed=0)

    def taken(num_nvl_bytes: int) -> int:
        buffer = deep_ep.Buffer(virtual_world(1).groups[0], num_nvl_bytes)
        run_pair(buffer, case)
        (normal,) = buffer._buffers.values()
        return normal.num_symmetric_bytes

    assert 1000 < taken(1) < 4096, "a token of every rank fits always"
    assert (1 << 16) - 4096 < taken(1 << 16) <= 1 << 16
    assert taken(0) <= 64 << 20
    assert taken(1 << 40) == taken(0)


def test_combine_adds_rows_and_weights_nothing() -> None:
    """Of a token that both ranks get, twice the row comes home."""
    x = torch.arange(6.0).view(2, 3)

    def rank_main(buffer: deep_ep.Buffer) -> None:
        topk_idx = torch.tensor([[0, 1], [1, -1]])
        _, _, per_expert, in_rank, _ = buffer.get_dispatch_layout(topk_idx, 2)
        recv_x, *_, handle, _ = buffer.dispatch(
            x,
            is_token_in_rank=in_rank,
            num_tokens_per_expert=per_expert,
            topk_idx=topk_idx,
            topk_weights=torch.full((2, 2), 0.25),
        )
        combined, _, _ = buffer.combine(recv_x, handle)
        assert combined.tolist() == [[0, 2, 4], [3, 4, 5]]

    run_on_ranks(2, rank_main)
