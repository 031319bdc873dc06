"""Long runs: thousands of operations with ranks that drift apart, a million replays of one graph.

Results are compared on the GPU, and the host looks at the number of mismatches at the end: nothing
but the kernels themselves keeps the ranks together.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import pytest
import torch

from ep_backend import DispatchResult, LowLatencyBuffer, RecvHook, reference
from ep_backend.bench.op_cuda_graph import capture
from tests.support.scenario import Scenario, mixed_scenario, sum_of_experts, variant_of
from tests.support.shapes import Shape

SHAPE = Shape(3, num_max_tokens_per_rank=24, hidden=256, num_experts=12, top_k=4, device="cuda")
FORMS = {
    "tagged": {"num_max_tagged_tokens": 24},
    "both": {"num_max_tagged_tokens": 12},
    "pull": {"num_max_tagged_tokens": 0},
    "push": {"num_max_tagged_tokens": 0, "transfer": "push"},
    "pull_push": {"num_max_tagged_tokens": 0, "transfer": "pull_push"},
    "workspaces": {"output_layout": "rank_major", "num_workspaces": 2, "num_max_tagged_tokens": 0},
    "tagged_workspaces": {
        "output_layout": "rank_major",
        "num_workspaces": 2,
        "num_max_tagged_tokens": 12,
        "transfer": "pull_push",
    },
    "expert_workspaces": {"reduction": "source", "num_workspaces": 2},
}
with_forms = pytest.mark.parametrize("form", FORMS.values(), ids=FORMS.keys())
NUM_PAIRS = 800  # a form: two operations a pair, eight forms, more than 10,000 in all
NUM_REPLAYED_PAIRS = 1_000_000
PAIRS_PER_GRAPH = 50


def same(expert: int, rows: torch.Tensor) -> torch.Tensor:
    """Experts that return what they get."""
    return rows


@dataclass
class Expected:
    """One variant of a rank on the GPU: what goes in, what its experts receive (by expert, or by
    source), what comes out."""

    inputs: list[torch.Tensor]
    received: list[torch.Tensor]
    combined: torch.Tensor
    most_tokens: int
    """Of a rank."""

    @classmethod
    def of(cls, scenario: Scenario, variant_idx: int, rank: int) -> Expected:
        shape, given = scenario.shape, scenario.variants[variant_idx]
        variant = variant_of(shape, given.x, given.topk_idx, given.topk_weights, same)
        owned = reference.experts_of_rank(shape.num_experts, shape.num_ranks, rank)
        by_expert = [variant.received[e].rows for e in owned]
        received = [r.rows for r in variant.by_source[rank]] if shape.is_rank_major else by_expert
        return cls(
            [t.cuda() for t in variant.inputs(rank)],
            [r.cuda() for r in received],
            variant.combined[rank].cuda(),
            max(len(x) for x in variant.x),
        )


def dispatch_arguments(buffer: LowLatencyBuffer, expected: Expected, op: int) -> dict[str, Any]:
    x, topk_idx, topk_weights = expected.inputs
    weights = topk_weights if buffer.reduction == "rank" else None
    place = {}
    if buffer.num_workspaces > 0:
        most = buffer.num_max_tokens_per_rank
        num_slots = most if op % 3 == 0 else max(1, expected.most_tokens)
        place = {"workspace": op % buffer.num_workspaces, "num_slots": num_slots}
    return {"x": x, "topk_idx": topk_idx, "topk_weights": weights, **place}


def combine_arguments(
    buffer: LowLatencyBuffer, expected: Expected, result: DispatchResult
) -> dict[str, Any]:
    """After the experts: in a workspace, what they make must lie there."""
    rows = result.recv_x
    if result.recv_topk_idx is not None and result.recv_topk_weights is not None:
        experts = range(buffer.num_local_experts)
        idx, weights = result.recv_topk_idx.flatten(0, 1), result.recv_topk_weights.flatten(0, 1)
        rows = sum_of_experts(rows.flatten(0, 1), idx, weights, experts, same).view_as(rows)
    if buffer.num_workspaces > 0:
        handle = result.handle
        rows = buffer.combine_input(handle.workspace, handle.num_slots).copy_(rows)
    weights = expected.inputs[2] if buffer.reduction == "source" else None
    return {"expert_out": rows, "handle": result.handle, "topk_weights": weights}


class DriftingRank:
    """One rank on a stream of its own, that now and then sleeps there before a launch."""

    def __init__(self, buffer: LowLatencyBuffer, scenario: Scenario) -> None:
        self.buffer = buffer
        rank = buffer.group.self_rank
        num_variants = len(scenario.variants)
        self._variants = [Expected.of(scenario, v, rank) for v in range(num_variants)]
        self._rng = random.Random(rank)
        self._stream = torch.cuda.Stream()
        self.num_wrong = torch.zeros((), dtype=torch.int64, device="cuda")

    @contextmanager
    def drifting(self) -> Iterator[None]:
        with torch.cuda.stream(self._stream):
            if self._rng.random() < 0.1:
                torch.cuda._sleep(self._rng.randint(1_000, 100_000))  # cycles
            yield

    def send_dispatch(self, op: int) -> tuple[DispatchResult, RecvHook]:
        with self.drifting():
            return self.buffer.dispatch(**dispatch_arguments(self.buffer, self._expected(op), op))

    def dispatch(self, op: int) -> DispatchResult:
        with self.drifting():
            arguments = dispatch_arguments(self.buffer, self._expected(op), op)
            return self.buffer.dispatch_and_receive(**arguments)

    def send_combine(self, op: int, result: DispatchResult) -> tuple[torch.Tensor, RecvHook]:
        with self.drifting():
            arguments = combine_arguments(self.buffer, self._expected(op), result)
            return self.buffer.combine(**arguments)

    def combine(self, op: int, result: DispatchResult) -> torch.Tensor:
        with self.drifting():
            arguments = combine_arguments(self.buffer, self._expected(op), result)
            return self.buffer.combine_and_receive(**arguments)

    def receive(self, recv_hook: RecvHook) -> None:
        with self.drifting():
            recv_hook()

    def check_received(self, op: int, result: DispatchResult) -> None:
        with self.drifting():
            for i, rows in enumerate(self._expected(op).received):
                if len(rows) > 0:
                    self.num_wrong += (result.recv_x[i, : len(rows)] != rows).sum()

    def check_combined(self, op: int, out: torch.Tensor) -> None:
        with self.drifting():
            self.num_wrong += (out != self._expected(op).combined).sum()

    def _expected(self, op: int) -> Expected:
        return self._variants[op % len(self._variants)]


def pair_in_one_kernel_each(ranks: list[DriftingRank], op: int) -> None:
    results = [rank.dispatch(op) for rank in ranks]
    for rank, result in zip(ranks, results, strict=True):
        rank.check_received(op, result)
    outs = [rank.combine(op, result) for rank, result in zip(ranks, results, strict=True)]
    for rank, out in zip(ranks, outs, strict=True):
        rank.check_combined(op, out)


def pair_with_hooks(ranks: list[DriftingRank], op: int) -> None:
    dispatched = [rank.send_dispatch(op) for rank in ranks]
    for rank, (result, recv_hook) in zip(ranks, dispatched, strict=True):
        rank.receive(recv_hook)
        rank.check_received(op, result)
    combined = [rank.send_combine(op, r) for rank, (r, _) in zip(ranks, dispatched, strict=True)]
    for rank, (out, recv_hook) in zip(ranks, combined, strict=True):
        rank.receive(recv_hook)
        rank.check_combined(op, out)


@with_forms
def test_operations_of_ranks_that_drift_apart(form: dict[str, Any]) -> None:
    scenario = mixed_scenario(replace(SHAPE, **form), num_variants=13)
    buffers = scenario.shape.virtual_buffers(timeout_secs=10.0)
    ranks = [DriftingRank(buffer, scenario) for buffer in buffers]
    torch.cuda._sleep(1)  # loads it: later that would wait for kernels that wait for each other
    torch.cuda.synchronize()
    for op in range(NUM_PAIRS):
        pair = pair_in_one_kernel_each if op // 7 % 2 == 0 else pair_with_hooks
        pair(ranks, op)
        if op % 50 == 0:
            torch.cuda.synchronize()  # the host is not to run far ahead
    torch.cuda.synchronize()
    for buffer in buffers:
        buffer.raise_if_failed()
    assert [rank.num_wrong.item() for rank in ranks] == [0] * len(ranks)


@pytest.mark.parametrize("num_ranks", [1, 3])
@with_forms
def test_many_replays_of_one_graph(form: dict[str, Any], num_ranks: int) -> None:
    scenario = mixed_scenario(replace(SHAPE, num_ranks=num_ranks, **form), num_variants=1)
    buffers = scenario.shape.virtual_buffers(timeout_secs=10.0)
    expected = [Expected.of(scenario, 0, rank) for rank in range(num_ranks)]
    outs = [torch.empty_like(e.combined) for e in expected]
    num_wrong = torch.zeros(num_ranks, dtype=torch.int64, device="cuda")

    def chain(rank: int) -> None:
        for op in range(PAIRS_PER_GRAPH):
            outs[rank].fill_(torch.nan)
            arguments = dispatch_arguments(buffers[rank], expected[rank], op)
            result = buffers[rank].dispatch_and_receive(**arguments)
            arguments = combine_arguments(buffers[rank], expected[rank], result)
            buffers[rank].combine_and_receive(**arguments, out=outs[rank])
            num_wrong[rank] += (outs[rank] != expected[rank].combined).sum()

    torch.cuda.synchronize()
    graph = capture([partial(chain, rank) for rank in range(num_ranks)])
    # One rank alone runs fastest and has most of the million; a form of three has a tenth of that.
    num_pairs = NUM_REPLAYED_PAIRS // (4 if num_ranks == 1 else 40)
    if scenario.shape.is_rank_major:
        num_pairs //= 10  # there, experts are many kernels
    for replay in range(num_pairs // PAIRS_PER_GRAPH):
        graph.replay()
        if replay % 100 == 0:
            torch.cuda.synchronize()
    torch.cuda.synchronize()
    for buffer in buffers:
        buffer.raise_if_failed()
    assert num_wrong.tolist() == [0] * num_ranks
