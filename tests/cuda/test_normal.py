"""The normal kernels on a GPU equal the reference, and so the CPU's, bit for bit. Virtual ranks on
one GPU, each a thread and a stream."""

from __future__ import annotations

import time
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ep_backend import PeerTimeout, normal_autograd, virtual_world
from ep_backend.bench.op_cuda_graph import capture
from tests.support.normal import NormalCase, NormalShape, case_of, make_case
from tests.support.normal_cuda import (
    CudaNormalRank,
    CudaNormalShape,
    How,
    on_cpu,
    on_gpu,
    on_ranks,
    with_rows,
)
from tests.support.routing import ROUTINGS

FLOAT8 = torch.float8_e4m3fn
SHAPE = CudaNormalShape(NormalShape(2, hidden=64, num_experts=6, top_k=3))


@st.composite
def shapes(draw: st.DrawFn, max_ranks: int) -> CudaNormalShape:
    is_float8 = draw(st.booleans())
    shape = NormalShape(
        num_ranks=draw(st.integers(1, max_ranks)),
        hidden=16 * draw(st.sampled_from([1, 3, 8, 9, 33, 70, 225, 450, 1000])),
        num_experts=draw(st.integers(1, 13)),
        top_k=draw(st.sampled_from([1, 2, 3, 8, 33, 64])),
        dtype=draw(st.sampled_from([torch.float32, torch.bfloat16])),
        dispatch_dtype=FLOAT8 if is_float8 else None,
        scale_format=draw(st.sampled_from(["float32", "ue8m0"])) if is_float8 else "float32",
    )
    num_rows = draw(st.sampled_from([2 * shape.num_ranks, 30, 500]))
    num_sms = draw(st.sampled_from([1, 2, 5]))
    return with_rows(CudaNormalShape(shape, num_sms=num_sms), num_rows)


@st.composite
def operations(
    draw: st.DrawFn, max_ranks: int = 4
) -> tuple[CudaNormalShape, list[tuple[NormalCase, How]]]:
    shape = draw(shapes(max_ranks))
    num_ranks = shape.shape.num_ranks
    drawn = []
    for _ in range(draw(st.integers(1, 3))):
        tokens = st.lists(st.integers(0, 60), min_size=num_ranks, max_size=num_ranks)
        case = make_case(
            shape.shape,
            draw(st.sampled_from(ROUTINGS)),
            draw(tokens),
            seed=draw(st.integers(0, 1000)),
            idx_dtype=draw(st.sampled_from([torch.int32, torch.int64])),
            num_biases=draw(st.integers(0, 2)),
            with_weights=draw(st.booleans()),
            is_quantized=shape.shape.is_float8 and draw(st.booleans()),
        )
        num_all = sum(len(x) for x in case.x)
        worst = draw(st.sampled_from([0, max(1, num_all), num_all + 600]))
        how = How(
            worst,
            copy=draw(st.booleans()),
            in_place=draw(st.booleans()),
            has_previous=draw(st.booleans()),
            is_async=draw(st.booleans()),
        )
        drawn.append((case, how))
    return shape, drawn


@settings(max_examples=60)
@given(operations())
def test_drawn_shapes_equal_the_reference(
    drawn: tuple[CudaNormalShape, list[tuple[NormalCase, How]]],
) -> None:
    shape, cases = drawn

    def act(rank: CudaNormalRank) -> None:
        for case, how in cases:
            first = rank.run(case, how)
            x = [-1 - t for t in case.x] if not shape.shape.is_float8 else case.x
            again = case
            if not shape.shape.is_float8:
                again = case_of(shape.shape, x, case.topk_idx, case.topk_weights)
            rank.run_again(again, first, how)

    on_ranks(shape, act)


@pytest.mark.parametrize("num_rows", [64, 200, 4000], ids=["many rounds", "rounds", "direct"])
@pytest.mark.parametrize("dispatch_dtype", [None, FLOAT8], ids=["bf16", "fp8"])
@pytest.mark.parametrize("how", [How(), How(3000), How(copy=True, in_place=True)], ids=str)
def test_prefill_rows_equal_the_reference(
    how: How, dispatch_dtype: torch.dtype | None, num_rows: int
) -> None:
    shape = NormalShape(8, hidden=7168, num_experts=64, top_k=8, dispatch_dtype=dispatch_dtype)
    cases = [
        make_case(shape, "uniform", [40, 0, 13, 70, 1, 64, 33, 5], seed, num_biases=seed)
        for seed in range(2)
    ]

    def act(rank: CudaNormalRank) -> None:
        for case in cases:
            rank.run(case, how)

    on_ranks(CudaNormalShape(shape, num_rows, num_sms=3), act)


@pytest.mark.parametrize("scale_format", ["float32", "ue8m0"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("is_quantized", [False, True], ids=["by us", "before"])
def test_scales_of_rows_in_several_chunks(
    is_quantized: bool, dtype: torch.dtype, scale_format: str
) -> None:
    shape = NormalShape(
        2, hidden=15_136, dtype=dtype, dispatch_dtype=FLOAT8, scale_format=scale_format
    )
    case = make_case(shape, "uniform", [9, 4], seed=1, is_quantized=is_quantized)

    def act(rank: CudaNormalRank) -> None:
        rank.run(case, How())

    on_ranks(CudaNormalShape(shape, num_sms=2), act)


def test_any_number_of_sms_gives_the_same_bits() -> None:
    shape = NormalShape(2, hidden=512, num_experts=16, top_k=4)
    case = make_case(shape, "uniform", [700, 300], seed=5)

    def act(rank: CudaNormalRank) -> None:
        for num_sms in (1, 3, 16, 40):
            rank.run(case, How(num_sms={"num_sms": num_sms}))

    on_ranks(CudaNormalShape(shape, 2000), act)


@pytest.mark.parametrize("num_rows", [1024, 100], ids=["direct", "rounds"])
def test_a_graph_of_worst_sizes_is_replayed_with_other_tokens(num_rows: int) -> None:
    shape = replace(SHAPE, num_rows=num_rows)
    cases = [make_case(shape.shape, "uniform", [50, 40], seed) for seed in range(4)]
    world = virtual_world(2)
    buffers = world.run(lambda group: shape.buffer(group))
    inputs = [on_gpu(cases[0].inputs(rank)) for rank in range(2)]
    results = {}

    def pair(rank: int) -> None:
        # The experts do nothing: rows go home as they came.
        result = buffers[rank].dispatch(*inputs[rank], num_worst_tokens=500)
        results[rank] = result, buffers[rank].combine(result.recv_x, result.handle)

    graph = capture([lambda: pair(0), lambda: pair(1)])
    for case in cases:
        for rank in range(2):
            for to, new in zip(inputs[rank], case.inputs(rank), strict=True):
                to.copy_(new)
        graph.replay()
        torch.cuda.synchronize()
        for rank, (result, out) in results.items():
            buffers[rank].raise_if_failed()
            CudaNormalRank(buffers[rank]).check(case, result)
            num_ranks = [len({int(e) // 3 for e in idx if e >= 0}) for idx in case.topk_idx[rank]]
            expected = case.x[rank].float() * torch.tensor(num_ranks)[:, None]
            assert torch.equal(out.cpu(), expected.bfloat16())


@pytest.mark.parametrize("num_rows", [1024, 100], ids=["direct", "rounds"])
@pytest.mark.parametrize("num_worst_tokens", [0, 200], ids=["exact", "worst"])
def test_experts_are_listed_by_global_numbers(num_rows: int, num_worst_tokens: int) -> None:
    case = make_case(SHAPE.shape, "uniform", [50, 40], seed=5)

    results = {}

    def act(rank: CudaNormalRank) -> None:
        inputs = on_gpu(case.inputs(rank.rank))
        rank.meet()
        result = rank.buffer.dispatch(*inputs, num_worst_tokens=num_worst_tokens)
        torch.cuda.current_stream().synchronize()
        rank.buffer.raise_if_failed()
        of_rank = result.recv_topk_idx.cpu(), result.recv_topk_weights.cpu()
        results[rank.rank, rank.buffer.expert_ids] = of_rank

    for expert_ids in ("local", "global"):
        on_ranks(replace(SHAPE, num_rows=num_rows, expert_ids=expert_ids), act)
    for rank, own in enumerate(torch.arange(case.shape.num_experts).chunk(2)):
        (local, weights), (listed, same_weights) = results[rank, "local"], results[rank, "global"]
        is_own = local >= 0
        assert is_own.any()
        assert not is_own.all()
        assert torch.equal(listed[is_own], local[is_own] + own[0])
        assert not torch.isin(listed[~is_own], own).any()
        assert ((listed >= 0) & (listed < case.shape.num_experts)).all()
        assert torch.equal(same_weights, weights)
        assert (weights[~is_own] == 0).all()


def test_received_rows_go_home_in_place() -> None:
    case = make_case(SHAPE.shape, "uniform", [30, 17], seed=2)

    def act(rank: CudaNormalRank) -> None:
        inputs = on_gpu(case.inputs(rank.rank))
        rank.meet()
        result = rank.buffer.dispatch(*inputs)
        out = rank.buffer.combine(result.recv_x, result.handle)
        rank.check(case, result)
        num_ranks = [len({int(e) // 3 for e in idx if e >= 0}) for idx in case.topk_idx[rank.rank]]
        expected = case.x[rank.rank].float() * torch.tensor(num_ranks)[:, None]
        assert torch.equal(out.cpu(), expected.bfloat16())

    on_ranks(SHAPE, act)


def test_a_silent_peer_is_named_and_the_context_stays_usable() -> None:
    buffers = virtual_world(2).run(lambda group: SHAPE.buffer(group, timeout_secs=0.5))
    case = make_case(SHAPE.shape, "uniform", [5, 5], seed=0)
    inputs = on_gpu(case.inputs(0))
    begin = time.monotonic()
    with pytest.raises(PeerTimeout, match="rank 1") as caught:
        buffers[0].dispatch(*inputs)
    assert time.monotonic() - begin < 5.0
    assert caught.value.record["peer_rank"] == 1
    assert caught.value.record["phase"] == "dispatch"
    with pytest.raises(PeerTimeout, match="rank 1"):
        buffers[0].dispatch(*inputs)
    assert torch.ones(3, device="cuda").sum().item() == 3.0


def test_a_peer_that_does_not_combine_is_named() -> None:
    case = make_case(SHAPE.shape, "uniform", [5, 5], seed=0)

    def act(rank: CudaNormalRank) -> None:
        result = rank.buffer.dispatch(*on_gpu(case.inputs(rank.rank)))
        rank.check(case, result)
        if rank.rank == 0:
            rank.buffer.combine(result.recv_x, result.handle)
            torch.cuda.synchronize()
            with pytest.raises(PeerTimeout, match="rank 1") as caught:
                rank.buffer.raise_if_failed()
            assert caught.value.record["phase"] == "combine"

    on_ranks(SHAPE, act, timeout_secs=5.0)  # the first dispatch also makes the buffer ready


def one_rank() -> CudaNormalRank:
    shape = CudaNormalShape(NormalShape(1, hidden=8, num_experts=4, top_k=2))
    (buffer,) = virtual_world(1).run(lambda group: shape.buffer(group))
    return CudaNormalRank(buffer)


def inputs_of(*experts: list[int]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    x = torch.ones(len(experts), 8, dtype=torch.bfloat16, device="cuda")
    return x, torch.tensor(experts, device="cuda"), torch.ones(len(experts), 2, device="cuda")


def test_an_expert_that_does_not_exist_is_named() -> None:
    with pytest.raises(ValueError, match=r"topk_idx\[1, 1\] is 4, .*0\.\.3.*stays failed"):
        one_rank().buffer.dispatch(*inputs_of([0, 1], [3, 4]))


def test_more_rows_than_promised_are_named() -> None:
    buffer = one_rank().buffer
    inputs = inputs_of([0, 1], [3, 2])

    def dispatch_and_look() -> None:
        buffer.dispatch(*inputs, num_worst_tokens=1)  # may have seen it already
        torch.cuda.synchronize()
        buffer.raise_if_failed()

    with pytest.raises(ValueError, match="rank 0 receives 2 rows, but num_worst_tokens is 1"):
        dispatch_and_look()


@pytest.mark.parametrize("num_worst_tokens", [0, 10])
def test_gradients_flow_through_dispatch_and_combine(num_worst_tokens: int) -> None:
    """One rank: PyTorch runs the backward of all ranks of a process in one thread."""
    buffer = one_rank().buffer
    x, idx, weights = inputs_of([0, 1], [3, -1], [-1, -1])
    x = (x * torch.arange(1, 4, device="cuda")[:, None]).requires_grad_()
    weights = (weights * torch.tensor([0.5, 2.0], device="cuda")).requires_grad_()
    recv_x, recv_weights, result = normal_autograd.dispatch(
        buffer, x, idx, weights, num_worst_tokens=num_worst_tokens
    )
    used = result.handle.recv_src_tokens[:, None] >= 0
    rows = torch.where(used, recv_x.float() * recv_weights.sum(1, keepdim=True), 0.0)
    out = normal_autograd.combine(buffer, rows.bfloat16(), result.handle)
    out.float().sum().backward()
    torch.cuda.synchronize()
    buffer.raise_if_failed()
    is_routed = (idx >= 0).float()
    of_rows = (weights.detach() * is_routed).sum(1, keepdim=True)
    assert torch.equal(x.grad, of_rows.expand(3, 8).bfloat16())
    of_weights = is_routed * x.detach().float().sum(1, keepdim=True)
    assert torch.equal(weights.grad, of_weights)


def test_what_cannot_work_is_refused_before_anything_is_launched() -> None:
    shape = NormalShape(2, hidden=20)
    with pytest.raises(ValueError, match=r"hidden is 20, so rows of .* have 40 bytes"):
        virtual_world(2).run(CudaNormalShape(shape).buffer)
    too_small = replace(SHAPE, num_rows=3)
    with pytest.raises(ValueError, match=r"num_bytes is .* one token of each rank"):
        virtual_world(2).run(too_small.buffer)
    with pytest.raises(ValueError, match=r"num_sms is 1000, expected an integer in 1\.\."):
        virtual_world(2).run(replace(SHAPE, num_sms=1000).buffer)
    buffer = one_rank().buffer
    result = buffer.dispatch(*inputs_of([0, 1]))
    rows = buffer.combine_input(result.handle)
    with pytest.raises(ValueError, match="out is in the buffer's symmetric memory"):
        buffer.combine(rows, result.handle, out=rows)
    inputs = inputs_of([0, 1])
    with pytest.raises(ValueError, match="exact sizes was captured"):
        capture([lambda: buffer.dispatch(*inputs)])
    assert torch.equal(on_cpu(buffer.dispatch(*inputs)).recv_x, inputs[0].cpu())
