"""DeepEP's normal calls on CUDA tensors, between processes: on GPUs of their own where there are
enough, else sharing one."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch

from ep_backend import deep_ep
from tests.deep_ep.test_normal import Events, check_rows, combine, run_pair, x_of
from tests.deep_ep.test_normal_as_deep_ep_tests import Shape, check_all
from tests.support.normal import NormalCase, NormalShape, make_case
from tests.support.processes import Rank, RankProcesses

FLOAT8 = torch.float8_e4m3fn
ALL_EVENTS = [Events(), Events(True, False), Events(False, True), Events(True, True)]
ROOM, NO_ROOM = 1 << 24, 1
"""Of memory for all rows; or as little as there can be, so that they travel in rounds."""


@pytest.fixture(scope="module")
def ranks() -> Iterator[dict[int, RankProcesses]]:
    """By their number."""
    with RankProcesses(2) as two, RankProcesses(3) as three:
        yield {2: two, 3: three}


def buffer_of(rank: Rank, num_nvl_bytes: int) -> deep_ep.Buffer:
    torch.cuda.set_device(rank.group.self_rank % torch.cuda.device_count())
    return deep_ep.Buffer(rank.group, num_nvl_bytes, timeout_secs=30.0)


def close(rank: Rank, buffer: deep_ep.Buffer) -> None:
    torch.cuda.synchronize()
    for normal in buffer._buffers.values():
        normal.raise_if_failed()
    rank.group.all_gather(None)  # nobody's memory goes while a peer still reads it
    buffer.destroy()


def run_as_deep_ep_tests(rank: Rank, shape: Shape) -> int:
    torch.cuda.set_device(rank.group.self_rank % torch.cuda.device_count())
    return check_all(rank, shape, device="cuda")


@pytest.mark.parametrize(
    "shape",
    [Shape(), Shape(num_tokens=33, hidden=208, num_experts=11, top_k=7)],
    ids=["deep_ep", "any"],
)
@pytest.mark.parametrize("num_ranks", [2, 3])
def test_processes_pass_what_deep_ep_tests(
    ranks: dict[int, RankProcesses], num_ranks: int, shape: Shape
) -> None:
    done = ranks[num_ranks].run(run_as_deep_ep_tests, shape, deadline_secs=120)
    assert done == [24] * num_ranks


def run_cases(rank: Rank, cases: list[NormalCase], num_nvl_bytes: int) -> None:
    buffer = buffer_of(rank, num_nvl_bytes)
    assert buffer.get_comm_stream() not in (None, torch.cuda.current_stream())
    for case in cases:
        for i, events in enumerate(ALL_EVENTS):
            options: dict[str, Any] = dict(expert_alignment=1 + 3 * i)
            if i % 2:
                options["num_worst_tokens"] = sum(map(len, case.x)) + i
            if i > 1:
                options["config"] = deep_ep.Config(num_sms=3)
            run_pair(buffer, case, "cuda", events, **options)
    close(rank, buffer)


@pytest.mark.parametrize("num_nvl_bytes", [ROOM, NO_ROOM], ids=["direct", "rounds"])
@pytest.mark.parametrize("num_ranks", [2, 3])
def test_calls_equal_the_reference_with_all_events(
    ranks: dict[int, RankProcesses], num_ranks: int, num_nvl_bytes: int
) -> None:
    num_tokens = [23, 9, 0][:num_ranks]
    cases = []
    for seed, kind in enumerate(
        (
            {},
            dict(dtype=torch.float32),
            dict(dispatch_dtype=FLOAT8),
            dict(dispatch_dtype=FLOAT8, scale_format="ue8m0"),
        )
    ):
        shape = NormalShape(num_ranks, hidden=272, num_experts=7, top_k=4, **kind)
        cases.append(
            make_case(
                shape,
                ("uniform", "masked", "skewed", "repeated")[seed],
                num_tokens,
                seed,
                num_biases=seed % 3,
                with_weights=seed % 2 == 0,
                is_quantized=shape.is_float8,
            )
        )
    ranks[num_ranks].run(run_cases, cases, num_nvl_bytes, deadline_secs=120)


def use_a_handle_for_any_dtype(rank: Rank, first: NormalCase, others: list[NormalCase]) -> None:
    buffer = buffer_of(rank, ROOM)
    for worst, events in ((0, Events()), (40, Events(True, True))):
        handle = run_pair(buffer, first, "cuda", num_worst_tokens=worst)
        for case in others:
            x = x_of(case, buffer.rank, "cuda")
            received, *nothing, event = buffer.dispatch(x, handle=handle, **events.options())
            assert nothing == [None] * 4
            event.current_stream_wait()
            check_rows(received, case, buffer.rank)
            num_rows = len(received[0] if isinstance(received, tuple) else received)
            assert num_rows == worst or worst == 0
            weights = torch.zeros((num_rows, case.shape.top_k), device="cuda")
            expected = case.received[buffer.rank].topk_weights
            weights[: len(expected)] = expected.cuda()
            combine(buffer, case, received, weights, handle, events)
    close(rank, buffer)


def test_a_handle_serves_rows_of_any_dtype(ranks: dict[int, RankProcesses]) -> None:
    def case_of_kind(**kind: Any) -> NormalCase:
        shape = NormalShape(2, **(dict(hidden=272, num_experts=7, top_k=3) | kind))
        with_weights = shape.dtype == torch.float32
        is_quantized = shape.is_float8
        return make_case(
            shape, "masked", [11, 7], 2, with_weights=with_weights, is_quantized=is_quantized
        )

    first = case_of_kind(dispatch_dtype=FLOAT8)
    others = [case_of_kind(), case_of_kind(hidden=8, dtype=torch.float32), first, case_of_kind()]
    ranks[2].run(use_a_handle_for_any_dtype, first, others, deadline_secs=60)


def look_at_the_handle(
    rank: Rank, case: NormalCase, num_nvl_bytes: int, *, knows_all: bool = True
) -> int:
    """Returns how many channels it has.

    Args:
        knows_all: ranks know each other's counts.
    """
    buffer, num_ranks = buffer_of(rank, num_nvl_bytes), rank.group.num_ranks
    handle = run_pair(buffer, case, "cuda")
    prefix, sent_until, came_before, src_idx, is_token_in_rank, send_head = (
        part.cpu() for part in handle
    )
    for dst in range(num_ranks):
        sources = [src for src, _ in case.received[dst].origins]
        ends = [sum(r <= src for r in sources) for src in range(num_ranks)]
        is_known = knows_all or dst == buffer.rank
        assert prefix[:, dst].tolist() == (ends if is_known else [-1] * num_ranks)
    origins = case.received[buffer.rank].origins
    assert src_idx.tolist() == [token for _, token in origins]
    topk_idx = case.topk_idx[buffer.rank].cuda()
    layout = buffer.get_dispatch_layout(topk_idx, case.shape.num_experts)
    assert torch.equal(is_token_in_rank, layout[3].cpu())
    assert torch.equal(sent_until[:, -1], layout[0].cpu())
    assert {part.dtype for part in (prefix, sent_until, came_before, send_head)} == {torch.int32}
    (normal,) = buffer._buffers.values()
    num_channels = sent_until.shape[1]
    size = normal.num_tokens_per_round if num_channels > 1 else 1 << 20
    assert came_before.shape == sent_until.shape == (num_ranks, num_channels)
    for src in range(num_ranks):
        tokens = [token for r, token in origins if r == src]
        expected = [sum(token < size * i for token in tokens) for i in range(num_channels)]
        assert came_before[src].tolist() == expected
    for dst in range(num_ranks):
        for token, place in enumerate(send_head[:, dst].tolist()):
            sent = is_token_in_rank[:, dst]
            in_round = int(sent[token // size * size : token].sum())
            assert place == (in_round if sent[token] else -1)
    close(rank, buffer)
    return num_channels


def test_the_handle_is_deep_eps_tuple(ranks: dict[int, RankProcesses]) -> None:
    shape = NormalShape(3, hidden=16, num_experts=7, top_k=3)
    case = make_case(shape, "masked", [40, 0, 21], seed=4)
    assert ranks[3].run(look_at_the_handle, case, ROOM) == [1] * 3
    num_channels = ranks[3].run(look_at_the_handle, case, NO_ROOM)
    assert len(set(num_channels)) == 1
    assert num_channels[0] > 10


def overlap_two_batches(rank: Rank, cases: list[NormalCase]) -> None:
    """As SGLang does in prefill: two halves of a batch, each with a dispatch or a combine that the
    other's experts run beside; both are in flight on one buffer."""
    buffer, self_rank = buffer_of(rank, ROOM), rank.group.self_rank
    for _ in range(3):
        sent = []
        for case in cases:
            x = x_of(case, self_rank, "cuda")
            idx, weights = case.topk_idx[self_rank].cuda(), case.topk_weights[self_rank].cuda()
            layout = buffer.get_dispatch_layout(
                idx,
                case.shape.num_experts,
                previous_event=buffer.capture(),
                async_finish=True,
                allocate_on_comm_stream=True,
            )
            sent.append(
                buffer.dispatch(
                    x,
                    num_tokens_per_rank=layout[0],
                    is_token_in_rank=layout[3],
                    num_tokens_per_expert=layout[2],
                    topk_idx=idx,
                    topk_weights=weights,
                    previous_event=layout[4],
                    async_finish=True,
                    allocate_on_comm_stream=True,
                )
            )
            del x, idx, weights, layout  # nobody else keeps them
        for case, (received, _, recv_weights, _, handle, event) in zip(cases, sent, strict=True):
            event.current_stream_wait()
            check_rows(received, case, self_rank)
            combine(buffer, case, received, recv_weights, handle, Events(True, True))
    close(rank, buffer)


def test_two_batches_in_flight_as_sglang_has_them(ranks: dict[int, RankProcesses]) -> None:
    shape = NormalShape(2, hidden=512, num_experts=8, top_k=3)
    cases = [make_case(shape, "uniform", [60 - seed, 41], seed) for seed in range(2)]
    ranks[2].run(overlap_two_batches, cases, deadline_secs=60)


def dispatch_to_ranks(rank: Rank, case: NormalCase) -> list[list[int]]:
    """Without experts; returns the counts of exact sizes and of worst ones."""
    buffer, expected = buffer_of(rank, ROOM), case.received[rank.group.self_rank]
    idx = case.topk_idx[buffer.rank].cuda()
    layout = buffer.get_dispatch_layout(idx, case.shape.num_experts)
    counts_of = []
    for worst in (0, 100):
        received, recv_idx, weights, counts, handle, _ = buffer.dispatch(
            case.x[buffer.rank].cuda(),
            num_tokens_per_rank=layout[0],
            is_token_in_rank=layout[3],
            num_tokens_per_expert=layout[2],
            num_worst_tokens=worst,
        )
        assert recv_idx is weights is None
        check_rows(received, case, buffer.rank)
        combine(buffer, case, received, torch.zeros(len(received), 1, device="cuda"), handle)
        counts_of.append(counts)
    assert counts_of[0] == expected.num_tokens_per_expert
    close(rank, buffer)
    return counts_of[1:]


def test_rows_may_go_to_ranks_without_experts_being_told(ranks: dict[int, RankProcesses]) -> None:
    shape = NormalShape(2, hidden=24, num_experts=7, top_k=3)
    case = make_case(shape, "masked", [5, 8], seed=4)
    assert ranks[2].run(dispatch_to_ranks, case) == [[[]]] * 2
