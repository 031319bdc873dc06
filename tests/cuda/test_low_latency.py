"""The CUDA kernels equal the reference, and so the CPU kernels, bit for bit. Virtual ranks on one
GPU: a thread drives them all on one stream, so that no kernel waits for one behind it."""

from __future__ import annotations

import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ep_backend import Group, LowLatencyBuffer, PeerTimeout, virtual_world
from tests.support.programs import PROGRAMS, Interpreter
from tests.support.routing import ROUTINGS
from tests.support.scenario import Scenario, mixed_scenario
from tests.support.shapes import Shape

DTYPES = (torch.float32, torch.bfloat16)


def drive(scenario: Scenario, program: str, num_ops: int) -> None:
    """Runs a program on all ranks, step by step."""
    buffers = scenario.shape.virtual_buffers(timeout_secs=10.0)
    ranks = [Interpreter(buffer, scenario) for buffer in buffers]
    for step in PROGRAMS[program](num_ops, scenario.shape.num_banks):
        for rank in ranks:
            rank.step(*step)
    torch.cuda.synchronize()
    for buffer in buffers:
        buffer.raise_if_failed()
        buffer.close()


@st.composite
def scenarios(draw: st.DrawFn) -> Scenario:
    shape = Shape(
        num_ranks=draw(st.integers(1, 9)),
        num_max_tokens_per_rank=draw(st.sampled_from([1, 3, 9, 40])),
        hidden=draw(st.one_of(st.integers(1, 70), st.sampled_from([256, 600, 2048, 7168]))),
        num_experts=draw(st.integers(1, 40)),
        top_k=draw(st.integers(1, 32)),
        dtype=draw(st.sampled_from(DTYPES)),
        num_banks=draw(st.integers(2, 4)),
        device="cuda",
    )
    scenario = Scenario(shape)
    tokens = st.integers(0, shape.num_max_tokens_per_rank)
    for _ in range(draw(st.integers(1, 3))):
        scenario.add(
            draw(st.sampled_from(ROUTINGS)),
            draw(st.lists(tokens, min_size=shape.num_ranks, max_size=shape.num_ranks)),
            seed=draw(st.integers(0, 1000)),
            idx_dtype=draw(st.sampled_from([torch.int32, torch.int64])),
        )
    return scenario


@settings(max_examples=100)
@given(scenarios(), st.sampled_from(["plain_loop", "late_hooks", "two_micro_batches"]))
def test_drawn_shapes_equal_the_reference(scenario: Scenario, program: str) -> None:
    drive(scenario, program, num_ops=6)


@pytest.mark.parametrize("program", PROGRAMS)
def test_banks_are_reused_over_many_operations(program: str) -> None:
    drive(mixed_scenario(Shape(num_ranks=4, device="cuda")), program, num_ops=200)


def test_more_tokens_than_threads_of_a_block() -> None:
    shape = Shape(2, num_max_tokens_per_rank=700, hidden=16, num_experts=5, device="cuda")
    drive(Scenario(shape).add("skewed", [700, 650], seed=1), "plain_loop", num_ops=2)


@pytest.mark.parametrize("num_ranks", [2, 8])
def test_ranks_on_streams_of_their_own_wait_for_each_other(num_ranks: int) -> None:
    """Graphs of all ranks replay at the same time, without the host in between: kernels spin until
    their peers' have run."""
    shape = Shape(num_ranks, num_max_tokens_per_rank=16, hidden=512, num_experts=24, device="cuda")
    buffers = shape.virtual_buffers(timeout_secs=20.0)
    pairs = [Pair(buffer, num_tokens=1 + 15 * (rank % 2)) for rank, buffer in enumerate(buffers)]
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


@pytest.mark.parametrize("num_tokens", [1, 16])
def test_captured_graphs_replay_and_interleave(num_tokens: int) -> None:
    """Epochs live on the device: graphs of two batch sizes replay in any order."""
    shape = Shape(1, num_max_tokens_per_rank=32, hidden=256, num_experts=4, device="cuda")
    (buffer,) = shape.virtual_buffers()
    graphs = [Pair(buffer, n) for n in (num_tokens, 32)]
    for i in range(50):
        graph = graphs[(i * i) % 2]
        graph.x.copy_(torch.randn_like(graph.x))
        graph.graph.replay()
        torch.cuda.synchronize()
        buffer.raise_if_failed()
        assert torch.equal(graph.out, graph.expected())


class Pair:
    """A captured dispatch, identity experts, combine."""

    def __init__(self, buffer: LowLatencyBuffer, num_tokens: int) -> None:
        self.x = torch.randn(num_tokens, buffer.hidden, device="cuda").to(buffer.dtype)
        self.topk_idx = torch.full((num_tokens, buffer.top_k), -1, device="cuda")
        spread = 5 * torch.arange(num_tokens, device="cuda") + 7 * buffer.group.self_rank
        self.topk_idx[:, 0] = spread % buffer.num_experts
        self.weights = torch.rand(num_tokens, buffer.top_k, device="cuda")
        self.graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.graph):
            result, hook = buffer.dispatch(self.x, self.topk_idx, self.weights)
            hook()
            self.out, hook = buffer.combine(result.recv_x, result.handle)
            hook()

    def expected(self) -> torch.Tensor:
        return (self.weights[:, :1] * self.x.float()).to(self.x.dtype)


def test_a_silent_peer_is_named_and_the_context_stays_usable() -> None:
    shape = Shape(2, device="cuda")
    buffers = shape.virtual_buffers(timeout_secs=0.5)
    scenario = mixed_scenario(shape)
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
    shape = Shape(2, device="cuda")
    scenario = mixed_scenario(shape)
    ranks = [Interpreter(buffer, scenario) for buffer in shape.virtual_buffers()]
    with ThreadPoolExecutor(1) as pool:
        for op in range(10):
            for what in ("d", "h", "c", "hc"):
                for rank in ranks:
                    if what in ("h", "hc"):
                        pool.submit(rank.step, what, op).result()
                    else:
                        rank.step(what, op)


def test_few_sms_are_enough() -> None:
    shape = Shape(2, num_max_tokens_per_rank=64, hidden=512, device="cuda")
    scenario = mixed_scenario(shape, num_variants=3)

    def with_four_sms(group: Group) -> LowLatencyBuffer:
        return LowLatencyBuffer(
            group,
            num_max_tokens_per_rank=shape.num_max_tokens_per_rank,
            hidden=shape.hidden,
            num_experts=shape.num_experts,
            top_k=shape.top_k,
            dtype=shape.dtype,
            device="cuda",
            num_sms=4,
        )

    ranks = [Interpreter(b, scenario) for b in virtual_world(2).run(with_four_sms)]
    for step in PROGRAMS["plain_loop"](6, 2):
        for rank in ranks:
            rank.step(*step)


def test_tensors_of_another_device_are_refused() -> None:
    (buffer,) = replace(Shape(1), device="cuda").virtual_buffers()
    x = torch.ones(1, 20, dtype=buffer.dtype)
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
