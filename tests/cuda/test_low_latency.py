"""The CUDA kernels equal the reference, and so the CPU kernels, bit for bit. Virtual ranks on one
GPU: a thread drives them all on one stream, so that no kernel waits for one behind it."""

from __future__ import annotations

import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ep_backend import (
    DispatchResult,
    LowLatencyBuffer,
    OrderError,
    PeerTimeout,
    ProtocolError,
    reference,
)
from ep_backend.bench.op_cuda_case import Chain, check_lockstep, inputs_of, open_buffers
from ep_backend.bench.op_cuda_rank import RankOps
from ep_backend.bench.op_cuda_settings import FORMS, OUTPUT_LAYOUTS, CudaBenchSettings
from ep_backend.kernels import current_stream
from tests.cuda.streams import exchange
from tests.support.programs import STEPWISE_PROGRAMS, Interpreter
from tests.support.scenario import Scenario, mixed_scenario
from tests.support.shapes import Shape
from tests.support.strategies import scenarios

CUDA_SHAPE = Shape(2, hidden=64, device="cuda")
UNPACKED = {"dispatch_dtype": torch.float8_e4m3fn}
FLOAT8 = UNPACKED | {"scale_format": "ue8m0"}
FLOAT8_BACK = {"combine_dtype": torch.float8_e4m3fn}
RANK_MAJOR = {"output_layout": "rank_major"}
SOURCE = {"reduction": "source"}
SETTINGS: dict[str, dict[str, Any]] = {
    "pull": {"num_max_tagged_tokens": 0},
    "push": {"transfer": "push", "num_max_tagged_tokens": 0},
    "pull_push": {"transfer": "pull_push", "num_max_tagged_tokens": 0},
    "tagged": {"num_max_tagged_tokens": 6},
    "tagged_or_push": {"transfer": "push", "num_max_tagged_tokens": 3},
    "float8": FLOAT8,
    "float8_unpacked": UNPACKED | {"num_max_tagged_tokens": 3},
    "rank_major": RANK_MAJOR,
    "float8_rank_major": FLOAT8 | RANK_MAJOR,
    "source": SOURCE | {"transfer": "push", "num_max_tagged_tokens": 0},
    "source_pull": SOURCE | {"num_max_tagged_tokens": 0},
    "source_tagged": SOURCE | {"num_max_tagged_tokens": 3},
    "float8_back_pull": FLOAT8_BACK | {"num_max_tagged_tokens": 0},
    "float8_back_push": FLOAT8_BACK | {"transfer": "push", "num_max_tagged_tokens": 0},
    "float8_back_pull_push": FLOAT8_BACK | {"transfer": "pull_push", "num_max_tagged_tokens": 0},
    "float8_back_tagged": FLOAT8_BACK | {"num_max_tagged_tokens": 6},
    "float8_back_tagged_or_push": FLOAT8_BACK | {"transfer": "push", "num_max_tagged_tokens": 3},
    "float8_both_ways": FLOAT8 | FLOAT8_BACK | {"num_max_tagged_tokens": 3},
    "float8_back_rank_major": FLOAT8_BACK | RANK_MAJOR,
    "float8_back_source": FLOAT8_BACK | SOURCE | {"num_max_tagged_tokens": 0},
    "float8_back_source_tagged": FLOAT8_BACK | SOURCE | {"num_max_tagged_tokens": 3},
    "workspaces": RANK_MAJOR | {"num_workspaces": 5, "num_max_tagged_tokens": 0},
    "tagged_workspaces": RANK_MAJOR | {"num_workspaces": 5, "num_max_tagged_tokens": 5},
    "tagged_workspaces_push": RANK_MAJOR
    | {"num_workspaces": 5, "num_max_tagged_tokens": 5, "transfer": "pull_push"},
    "float8_unpacked_workspaces": UNPACKED | RANK_MAJOR | {"num_workspaces": 5},
    "float8_workspaces": FLOAT8
    | RANK_MAJOR
    | {"num_workspaces": 5, "expert_ids": "global", "transfer": "pull_push"},
}
# Their sends wait for their peers', if they are not tagged: not for ranks that share a stream.
EXPERT_WORKSPACES: dict[str, dict[str, Any]] = {
    "expert_workspaces": SOURCE | {"num_workspaces": 5, "num_max_tagged_tokens": 0},
    "float8_expert_workspaces": FLOAT8 | SOURCE | {"num_workspaces": 5, "num_max_tagged_tokens": 0},
    "tagged_expert_workspaces": UNPACKED
    | SOURCE
    | {"num_workspaces": 5, "num_max_tagged_tokens": 5},
    "float8_tagged_expert_workspaces": FLOAT8 | SOURCE | {"num_workspaces": 5},
}
ON_STREAMS = SETTINGS | EXPERT_WORKSPACES
with_settings = pytest.mark.parametrize("settings_of", SETTINGS.values(), ids=SETTINGS.keys())
with_settings_on_streams = pytest.mark.parametrize(
    "settings_of", ON_STREAMS.values(), ids=ON_STREAMS.keys()
)


def drive(scenario: Scenario, program: str, num_ops: int) -> None:
    """Runs a program on all ranks, step by step."""
    buffers = scenario.shape.virtual_buffers(timeout_secs=10.0)
    ranks = [Interpreter(buffer, scenario) for buffer in buffers]
    for step in STEPWISE_PROGRAMS[program](num_ops, scenario.shape.num_banks):
        for rank in ranks:
            rank.step(*step)
    torch.cuda.synchronize()
    for buffer in buffers:
        buffer.raise_if_failed()
        buffer.close()


@settings(max_examples=40)
@given(
    scenarios(max_ranks=9, device="cuda"),
    st.sampled_from(["plain_loop", "late_hooks", "two_micro_batches"]),
)
def test_drawn_shapes_equal_the_reference(scenario: Scenario, program: str) -> None:
    drive(scenario, program, num_ops=6)


@with_settings
@pytest.mark.parametrize("program", ["plain_loop", "two_micro_batches"])
def test_settings_over_many_operations(program: str, settings_of: dict[str, Any]) -> None:
    shape = replace(CUDA_SHAPE, num_ranks=3, **settings_of)
    drive(mixed_scenario(shape, num_variants=7), program, num_ops=20)


@pytest.mark.parametrize("program", STEPWISE_PROGRAMS)
@pytest.mark.parametrize("num_banks", [2, 3])
def test_banks_are_reused_over_many_operations(program: str, num_banks: int) -> None:
    shape = replace(CUDA_SHAPE, num_ranks=4, num_banks=num_banks, num_max_tagged_tokens=3)
    drive(mixed_scenario(shape), program, num_ops=40)


def drive_on_streams(scenario: Scenario, num_ops: int) -> None:
    """Exchanges in one kernel each and in halves, by turns."""
    buffers = scenario.shape.virtual_buffers(timeout_secs=10.0)
    ranks = [Interpreter(b, scenario) for b in buffers]
    for op in range(num_ops):
        exchange(ranks, op, is_fused=op % 2 == 0)
    for buffer in buffers:
        buffer.close()


@with_settings_on_streams
def test_both_halves_in_one_kernel_equal_the_reference(settings_of: dict[str, Any]) -> None:
    shape = replace(CUDA_SHAPE, num_ranks=3, **settings_of)
    drive_on_streams(mixed_scenario(shape, num_variants=7), num_ops=20)


@settings(max_examples=30)
@given(scenarios(max_ranks=9, device="cuda", in_expert_workspaces=True))
def test_drawn_shapes_in_expert_workspaces_equal_the_reference(scenario: Scenario) -> None:
    drive_on_streams(scenario, num_ops=4)


@pytest.mark.parametrize("num_max_tagged_tokens", [0, 3])
@pytest.mark.parametrize("num_tokens", [0, 3])
def test_many_experts_and_ranks_in_expert_workspaces(
    num_tokens: int, num_max_tagged_tokens: int
) -> None:
    """More experts than a block has threads, more ranks than are looked at together."""
    shape = Shape(
        11, num_tokens + 1, 32, num_experts=700, top_k=40, device="cuda", reduction="source",
        num_workspaces=1, num_max_tagged_tokens=min(num_max_tagged_tokens, num_tokens + 1),
    )  # fmt: skip
    drive_on_streams(Scenario(shape).add("uniform", [num_tokens] * 11, seed=1), num_ops=2)


@pytest.mark.parametrize("num_max_tagged_tokens", [0, 3])
@pytest.mark.parametrize(
    "layout",
    [{}, *(RANK_MAJOR | {"num_workspaces": 1, "transfer": t} for t in ("pull", "pull_push"))],
    ids=["by_expert", "rank", "rank_push"],
)
@pytest.mark.parametrize(("num_ranks", "top_k"), [(18, 3), (2, 40)])
def test_more_ranks_or_experts_a_token_than_usual(
    num_ranks: int, top_k: int, layout: dict[str, Any], num_max_tagged_tokens: int
) -> None:
    """Which have kernels of their own."""
    shape = Shape(
        num_ranks, 3, 32, num_experts=45, top_k=top_k, device="cuda",
        num_max_tagged_tokens=num_max_tagged_tokens, **layout,
    )  # fmt: skip
    scenario = mixed_scenario(shape, num_variants=3)
    drive_on_streams(scenario, num_ops=4)


@pytest.mark.parametrize("reduction", ["rank", "source"])
@pytest.mark.parametrize("num_max_tagged_tokens", [0, 9])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_float8_combines_of_one_rank_and_of_many_rows(
    dtype: torch.dtype, num_max_tagged_tokens: int, reduction: str
) -> None:
    """One rank, whose rows never leave it; and more rows to add than are on their way together, of
    several parts of which the last is not full."""
    for num_ranks, top_k in ((1, 1), (1, 9), (9, 20)):
        shape = Shape(
            num_ranks, 9, 2192, num_experts=27, top_k=top_k, dtype=dtype, device="cuda",
            num_max_tagged_tokens=num_max_tagged_tokens, reduction=reduction, **FLOAT8_BACK,
        )  # fmt: skip
        scenario = mixed_scenario(shape, num_variants=3)
        drive(scenario, "plain_loop", num_ops=3)
        drive_on_streams(scenario, num_ops=3)


def test_more_tokens_than_threads_of_a_block() -> None:
    shape = Shape(2, num_max_tokens_per_rank=700, hidden=16, num_experts=5, device="cuda")
    drive(Scenario(shape).add("skewed", [700, 650], seed=1), "plain_loop", num_ops=2)


@with_settings_on_streams
@pytest.mark.parametrize("is_fused", [False, True], ids=["halves", "fused"])
@pytest.mark.parametrize("num_ranks", [2, 8])
def test_ranks_on_streams_of_their_own_wait_for_each_other(
    num_ranks: int, is_fused: bool, settings_of: dict[str, Any]
) -> None:
    """Graphs of all ranks replay at the same time, without the host in between: kernels spin until
    their peers' have run."""
    shape = Shape(
        num_ranks,
        num_max_tokens_per_rank=16,
        hidden=512,
        num_experts=24,
        device="cuda",
        **settings_of,
    )
    buffers = shape.virtual_buffers(timeout_secs=20.0)
    pairs = [
        Pair(buffer, num_tokens=1 + 15 * (rank % 2), is_fused=is_fused)
        for rank, buffer in enumerate(buffers)
    ]
    streams = [torch.cuda.Stream() for _ in buffers]
    torch.cuda.synchronize()
    for _ in range(200):
        for pair, stream in zip(pairs, streams, strict=True):
            with torch.cuda.stream(stream):
                pair.x += 1
                pair.graph.replay()
    torch.cuda.synchronize()
    for pair, buffer in zip(pairs, buffers, strict=True):
        buffer.raise_if_failed()
        assert torch.equal(pair.out, pair.expected())


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("layout", OUTPUT_LAYOUTS)
@pytest.mark.parametrize("num_tokens", [8, 24])
def test_kernels_of_all_ranks_find_room_in_chains(num_tokens: int, layout: str, form: str) -> None:
    """Of ranks that share a GPU nobody's next kernel takes the room of a kernel that others wait
    for, also where each has two blocks an SM."""
    sizes = CudaBenchSettings(
        num_ranks=(8,),
        num_tokens=(num_tokens,),
        dispatch_dtypes=("fp8",),
        output_layouts=(layout,),
        forms=(form,),
        num_max_tokens_per_rank=num_tokens,
        num_max_tagged_tokens=(num_tokens,),
    )
    (case,) = sizes.cases()
    with open_buffers(sizes, case) as buffers:
        ranks = [
            RankOps(buffer, inputs, form)
            for buffer, inputs in zip(buffers, inputs_of(sizes, 8, num_tokens), strict=True)
        ]
        check_lockstep(ranks, is_first=True)
        Chain(ranks, RankOps.pair, num_ops=20).check()


@pytest.mark.parametrize("is_fused", [False, True], ids=["halves", "fused"])
@pytest.mark.parametrize("num_tokens", [1, 16])
def test_captured_graphs_replay_and_interleave(num_tokens: int, is_fused: bool) -> None:
    """Epochs live on the device: graphs of two batch sizes, of which one is tagged, replay in any
    order."""
    shape = Shape(1, 48, 256, num_experts=4, device="cuda", num_max_tagged_tokens=16)
    (buffer,) = shape.virtual_buffers()
    graphs = [Pair(buffer, n, is_fused) for n in (num_tokens, 48)]
    for i in range(50):
        graph = graphs[(i * i) % 2]
        graph.x.copy_(torch.randn_like(graph.x))
        graph.graph.replay()
        torch.cuda.synchronize()
        buffer.raise_if_failed()
        assert torch.equal(graph.out, graph.expected())


class Pair:
    """A captured dispatch, identity experts, combine."""

    def __init__(self, buffer: LowLatencyBuffer, num_tokens: int, is_fused: bool) -> None:
        self._buffer = buffer
        self.x = torch.randn(num_tokens, buffer.hidden, device="cuda").to(buffer.dtype)
        self.topk_idx = torch.full((num_tokens, buffer.top_k), -1, device="cuda")
        spread = 5 * torch.arange(num_tokens, device="cuda") + 7 * buffer.group.self_rank
        self.topk_idx[:, 0] = spread % buffer.num_experts
        self.weights = torch.rand(num_tokens, buffer.top_k, device="cuda")
        self.graph = torch.cuda.CUDAGraph()
        is_source = buffer.reduction == "source"
        inputs = (self.x, self.topk_idx, None if is_source else self.weights)
        weights = self.weights if is_source else None
        with torch.cuda.graph(self.graph):
            if is_fused:
                result = buffer.dispatch_and_receive(*inputs)
                self.out = buffer.combine_and_receive(
                    self.experts(result), result.handle, topk_weights=weights
                )
            else:
                result, hook = buffer.dispatch(*inputs)
                hook()
                self.out, hook = buffer.combine(
                    self.experts(result), result.handle, topk_weights=weights
                )
                hook()

    def experts(self, result: DispatchResult) -> torch.Tensor:
        """Rows as they came, times the weight where combine does not know it."""
        rows = result.recv_x
        if result.recv_scales is not None:
            scales = result.recv_scales
            if self._buffer.scale_format == "ue8m0":
                scales = reference.unpack_ue8m0(scales, self._buffer.num_scales)
            rows = reference.dequantize(rows, scales).to(self._buffer.dtype)
        if result.recv_topk_weights is not None:
            rows = (result.recv_topk_weights[..., :1] * rows.float()).to(self._buffer.dtype)
        if self._buffer.num_workspaces > 0:
            rows = self._buffer.combine_input().copy_(rows)
        return rows

    def expected(self) -> torch.Tensor:
        x = self.x
        if self._buffer.num_scales > 0:
            quantized = reference.quantize(x.cpu(), self._buffer.scale_format)
            x = reference.dequantize(*quantized).to(x.dtype).cuda()
        x, weights = x.float().cpu(), self.weights[:, :1].cpu()
        dtype, combine_dtype = self._buffer.dtype, self._buffer.combine_dtype
        if self._buffer.reduction == "source":
            out = weights * reference.travelled(x, combine_dtype)
        else:
            rows = weights * x
            if self._buffer.output_layout == "rank_major":
                rows = rows.to(dtype).float()
            out = reference.travelled(rows, combine_dtype)
        return out.to(dtype).cuda()


def test_kernels_are_launched_on_the_current_stream() -> None:
    device = torch.device("cuda", torch.cuda.current_device())
    for stream in (torch.cuda.default_stream(), torch.cuda.Stream()):
        with torch.cuda.stream(stream):
            assert current_stream(device) == stream.cuda_stream


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("kind", ["source_tagged", "tagged_workspaces_push"])
def test_rows_of_all_ones_come_home(kind: str, dtype: torch.dtype) -> None:
    """NaN whose bits, inverted, would be a blank: nobody would ever see it come."""
    shape = replace(CUDA_SHAPE, dtype=dtype, **SETTINGS[kind])
    buffers = shape.virtual_buffers(timeout_secs=10.0)
    variant = Scenario(shape).add("uniform", [2, 2], seed=0).variant(0)
    inputs = [[t.cuda() for t in variant.inputs(rank)] for rank in range(2)]
    weights = [i.pop() if shape.reduction == "source" else None for i in inputs]
    in_place = {"num_slots": 2} if shape.num_workspaces > 0 else {}
    for _ in range(2 * shape.num_banks):
        dispatches = [b.dispatch(*i, **in_place) for b, i in zip(buffers, inputs, strict=True)]
        for _, hook in dispatches:
            hook()
        combines = []
        for buffer, (result, _), weight in zip(buffers, dispatches, weights, strict=True):
            rows = torch.empty_like(result.recv_x)
            if in_place:
                rows = buffer.combine_input(**in_place)
            rows.view(torch.uint8).fill_(0xFF)
            combines.append(buffer.combine(rows, result.handle, topk_weights=weight))
        for _, hook in combines:
            hook()
        for out, _ in combines:
            assert out.isnan().all()
    for buffer in buffers:
        buffer.close()


@pytest.mark.parametrize("kind", ["workspaces", "tagged_workspaces", "tagged_workspaces_push"])
def test_ranks_that_were_told_of_other_slots_are_noticed(kind: str) -> None:
    shape = replace(CUDA_SHAPE, **SETTINGS[kind])
    buffers = shape.virtual_buffers()
    variant = Scenario(shape).add("uniform", [2, 2], seed=0).variant(0)
    hooks, results = [], []
    for rank, buffer in enumerate(buffers):
        inputs = [t.cuda() for t in variant.inputs(rank)]
        result, hook = buffer.dispatch(*inputs, num_slots=4 + rank)
        results.append(result)
        hooks.append(hook)
    for hook in hooks:
        hook()
    hooks = []
    for rank, (buffer, result) in enumerate(zip(buffers, results, strict=True)):
        rows = buffer.combine_input(num_slots=4 + rank).zero_()
        hooks.append(buffer.combine(rows, result.handle)[1])
    for hook in hooks:
        hook()
    torch.cuda.synchronize()
    for buffer in buffers:
        with pytest.raises(ProtocolError):
            buffer.raise_if_failed()


def test_a_workspace_holds_one_dispatch_at_a_time() -> None:
    shape = Shape(1, hidden=64, device="cuda", output_layout="rank_major", num_workspaces=2)
    (buffer,) = shape.virtual_buffers()
    inputs = [t.cuda() for t in mixed_scenario(shape).variant(0).inputs(0)]
    num_tokens = len(inputs[0])
    with pytest.raises(ValueError, match=r"workspace is 2, expected an integer in 0\.\.1"):
        buffer.dispatch(*inputs, workspace=2)
    with pytest.raises(ValueError, match=f"expected an integer in {num_tokens}"):
        buffer.dispatch(*inputs, num_slots=num_tokens - 1)
    first = buffer.dispatch_and_receive(*inputs, workspace=1)
    with pytest.raises(ValueError, match=r"expert_out is not combine_input\(1\)"):
        buffer.combine(buffer.combine_input(0), first.handle)
    second = buffer.dispatch_and_receive(*inputs, workspace=1)
    with pytest.raises(OrderError, match="dispatch 2 has gone to the same workspace, 1"):
        buffer.combine(buffer.combine_input(1), first.handle)
    buffer.combine_and_receive(buffer.combine_input(1).zero_(), second.handle)
    torch.cuda.synchronize()
    buffer.raise_if_failed()


def test_a_silent_peer_is_named_and_the_context_stays_usable() -> None:
    buffers = CUDA_SHAPE.virtual_buffers(timeout_secs=0.5)
    scenario = mixed_scenario(CUDA_SHAPE)
    ranks = [Interpreter(buffer, scenario) for buffer in buffers]
    ranks[0].send_dispatch(0)
    _, hook = ranks[0].dispatched[0]
    begin = time.monotonic()
    hook()
    torch.cuda.synchronize()
    assert time.monotonic() - begin < 5.0
    with pytest.raises(PeerTimeout, match="rank 1") as caught:
        buffers[0].raise_if_failed()
    assert caught.value.record["peer_rank"] == 1
    assert caught.value.record["phase"] == "dispatch"
    assert caught.value.record["half"] == "recv"
    with pytest.raises(PeerTimeout):
        ranks[0].send_dispatch(1)
    assert torch.ones(3, device="cuda").sum().item() == 3.0


def test_rows_of_experts_are_counted_and_waits_have_a_name() -> None:
    scenario = mixed_scenario(CUDA_SHAPE, num_variants=3)
    buffers = CUDA_SHAPE.virtual_buffers()
    ranks = [Interpreter(buffer, scenario) for buffer in buffers]
    for step in STEPWISE_PROGRAMS["plain_loop"](3, CUDA_SHAPE.num_banks):
        for rank in ranks:
            rank.step(*step)
    counted = [rows for buffer in buffers for rows in buffer.statistics().num_expert_rows]
    received = [[len(e.origins) for e in variant.received] for variant in scenario.variants]
    assert counted == [sum(rows) for rows in zip(*received, strict=True)]
    waits = buffers[0].statistics().wait_ns
    assert set(waits) == {"dispatch_send", "dispatch_recv", "combine_send", "combine_recv"}
    assert all(len(of_ranks) == 2 for of_ranks in waits.values())


def test_an_expert_that_does_not_exist_is_named() -> None:
    (buffer,) = Shape(1, hidden=8, num_experts=4, top_k=2, device="cuda").virtual_buffers()
    idx = torch.tensor([[0, 1], [3, 4]], device="cuda")
    x = torch.ones(2, 8, dtype=buffer.dtype, device="cuda")
    weights = torch.ones(2, 2, device="cuda")
    torch.cuda.synchronize()

    def dispatch_and_look() -> None:
        buffer.dispatch(x, idx, weights)  # may have seen it already
        torch.cuda.synchronize()
        buffer.raise_if_failed()

    with pytest.raises(ValueError, match=r"topk_idx\[1, 1\] is 4, .*0\.\.3.*stays failed"):
        dispatch_and_look()


def test_hooks_of_another_thread() -> None:
    scenario = mixed_scenario(CUDA_SHAPE)
    ranks = [Interpreter(buffer, scenario) for buffer in CUDA_SHAPE.virtual_buffers()]
    with ThreadPoolExecutor(1) as pool:
        for op in range(10):
            for what in ("d", "h", "c", "hc"):
                for rank in ranks:
                    if what in ("h", "hc"):
                        pool.submit(rank.step, what, op).result()
                    else:
                        rank.step(what, op)


@pytest.mark.parametrize("kind", ["pull", "workspaces", "expert_workspaces"])
def test_a_lone_rank_has_received_when_it_has_sent(kind: str) -> None:
    """Its hooks launch nothing, and make the streams that they are called on wait for the sends."""
    shape = replace(CUDA_SHAPE, num_ranks=1, **ON_STREAMS[kind])
    (buffer,) = shape.virtual_buffers()
    x, idx, *weights = (t.cuda() for t in mixed_scenario(shape).variants[0].inputs(0))
    of_combine = weights.pop() if shape.reduction == "source" else None
    hooks_stream = torch.cuda.Stream()

    def run(x: torch.Tensor, delay: int) -> torch.Tensor:
        """The sum of what `hooks_stream` sees, which is early, as it sees it."""
        torch.cuda._sleep(delay)
        result, hook = buffer.dispatch(x, idx, *weights)
        with torch.cuda.stream(hooks_stream):
            hook()
            rows = result.recv_x.nan_to_num()
        torch.cuda.current_stream().wait_stream(hooks_stream)
        expert_out = rows
        if shape.num_workspaces > 0:
            expert_out = buffer.combine_input().copy_(rows)
        torch.cuda._sleep(delay)
        out, hook = buffer.combine(expert_out, result.handle, topk_weights=of_combine)
        with torch.cuda.stream(hooks_stream):
            hook()
            out = out.clone()
        hooks_stream.synchronize()
        return out

    for values in (torch.zeros_like(x), -x):
        run(values, 0)
    out = run(x, 50_000_000)
    assert out.any()
    assert torch.equal(out, run(x, 0))
    buffer.dispatch(x, idx, *weights)
    torch.cuda.synchronize()
    num_ops = buffer.statistics().num_ops
    assert num_ops["dispatch_recv"] == num_ops["dispatch_send"] == 5


@with_settings
@pytest.mark.parametrize("num_sms", [1, 4])
def test_few_sms_are_enough(num_sms: int, settings_of: dict[str, Any]) -> None:
    shape = replace(
        CUDA_SHAPE, num_max_tokens_per_rank=64, hidden=512, num_sms=num_sms, **settings_of
    )
    drive(mixed_scenario(shape, num_variants=3), "plain_loop", num_ops=6)


def test_a_silent_peer_of_a_fused_kernel_is_named() -> None:
    buffer, _ = CUDA_SHAPE.virtual_buffers(timeout_secs=0.5)
    variant = mixed_scenario(CUDA_SHAPE).variants[0]
    buffer.dispatch_and_receive(*(t.cuda() for t in variant.inputs(0)))
    torch.cuda.synchronize()
    with pytest.raises(PeerTimeout, match="the data of rank 1 did not come") as caught:
        buffer.raise_if_failed()
    assert caught.value.record["phase"] == "dispatch"


def test_tensors_of_another_device_are_refused() -> None:
    (buffer,) = replace(CUDA_SHAPE, num_ranks=1).virtual_buffers()
    x = torch.ones(1, 64, dtype=buffer.dtype)
    with pytest.raises(ValueError, match="x is on cpu, expected cuda:0"):
        buffer.dispatch(x, torch.zeros((1, 3), dtype=torch.int64), torch.ones(1, 3))


def test_rows_that_vectors_cannot_reach_are_refused() -> None:
    """On the GPU a misaligned access would end the process's context."""
    shape = Shape(1, hidden=16, num_experts=4, top_k=1, device="cuda")
    (buffer,) = shape.virtual_buffers()
    storage = torch.ones(1 + 2 * 16, dtype=buffer.dtype, device="cuda")
    idx = torch.zeros((2, 1), dtype=torch.int64, device="cuda")
    with pytest.raises(ValueError, match=r"x starts 2 bytes behind a multiple of 16.*x\.clone"):
        buffer.dispatch(storage[1:].view(2, 16), idx, torch.ones(2, 1, device="cuda"))
