"""The normal kernels' operations on CUDA buffers: the same cases, on tensors of the GPU."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from types import SimpleNamespace
from typing import Any

import torch

from ep_backend import Group, NormalBuffer, NormalDispatchResult, _native, virtual_world
from ep_backend.bench.op_cuda_graph import capture
from ep_backend.events import EventHandle, EventOverlap
from ep_backend.normal_cuda import CudaNormalBuffer
from ep_backend.normal_cuda_settings import CudaNormalSettings
from tests.support.normal import (
    NormalCase,
    NormalShape,
    check_combined,
    check_received,
    received_values,
    rows_for_home,
    weights_for_home,
)
from tests.support.scenario import same_bits


@dataclass(frozen=True)
class CudaNormalShape:
    """Arguments of a CUDA `NormalBuffer`."""

    shape: NormalShape
    num_rows: int = 1024
    """P; decides on `num_bytes`: the least that gives so many."""
    num_sms: int | None = None
    expert_ids: str = "local"

    def num_bytes(self) -> int:
        settings = CudaNormalSettings(**self.shape.settings_arguments(1 << 40))
        config = settings.config(self.shape.num_ranks)
        config.num_rows = self.num_rows
        return _native.NormalDeviceLayout.budget_for(config)

    def buffer(self, group: Group, timeout_secs: float = 20.0) -> CudaNormalBuffer:
        buffer = NormalBuffer(
            group,
            **self.shape.arguments(self.num_bytes()),
            timeout_secs=timeout_secs,
            device="cuda",
            num_sms=self.num_sms,
            expert_ids=self.expert_ids,
        )
        assert isinstance(buffer, CudaNormalBuffer)
        assert self.num_rows <= buffer.num_rows <= self.num_rows + 16
        return buffer


def on_gpu(tensors: tuple[torch.Tensor, ...]) -> list[torch.Tensor]:
    return [t.cuda() for t in tensors]


def on_cpu(result: NormalDispatchResult) -> NormalDispatchResult:
    """With as much of its handle as the checks look at."""
    handle: Any = SimpleNamespace(
        buffer=result.handle.buffer,
        recv_src_tokens=result.handle.recv_src_tokens.cpu(),
        num_recv_tokens_per_rank=result.handle.num_recv_tokens_per_rank.cpu(),
    )
    counts = result.num_recv_tokens_per_expert
    return NormalDispatchResult(
        result.recv_x.cpu(),
        None if result.recv_scales is None else result.recv_scales.cpu(),
        result.recv_topk_idx.cpu(),
        result.recv_topk_weights.cpu(),
        counts.cpu() if isinstance(counts, torch.Tensor) else counts,
        handle,
    )


@dataclass(frozen=True)
class How:
    """What the checks leave open about an operation."""

    num_worst_tokens: int = 0
    copy: bool = False
    in_place: bool = False
    """Combine's rows are put where it finds them."""
    num_sms: dict[str, int] = field(default_factory=dict)
    has_previous: bool = False
    """It is ordered by an event, on the buffer's stream."""
    is_async: bool = False
    """It is waited for by its own event, so too."""

    def options(self) -> dict[str, Any]:
        """Of a call, when all that it is given has been made."""
        return self.num_sms | dict(
            previous_event=EventOverlap(EventHandle()) if self.has_previous else None,
            async_finish=self.is_async,
            allocate_on_comm_stream=self.has_previous and self.is_async,
        )


class CudaNormalRank:
    """A rank that runs cases and checks all that comes out.

    Nothing but a launch lies between a barrier of the ranks and an operation: what the host does
    beside a kernel that waits for peers (loading another kernel, taking memory) may wait for it.
    """

    def __init__(self, buffer: CudaNormalBuffer) -> None:
        self.buffer = buffer
        self.rank = buffer.group.self_rank

    def run(self, case: NormalCase, how: How) -> NormalDispatchResult:
        inputs = on_gpu(case.inputs(self.rank))
        options = how.options()
        self.meet()
        result = self.buffer.dispatch(
            *inputs, num_worst_tokens=how.num_worst_tokens, copy=how.copy, **options
        )
        self.check(case, result)
        self.combine(case, result, how)
        return result

    def run_again(self, case: NormalCase, first: NormalDispatchResult, how: How) -> None:
        """With the routing of another operation's handle."""
        rows = {name: t.cuda() for name, t in case.rows(self.rank).items()}
        options = how.options()
        self.meet()
        result = self.buffer.dispatch(**rows, handle=first.handle, copy=how.copy, **options)
        self.check(case, result)
        self.combine(case, result, how)

    def replay(self, cases: list[NormalCase], num_worst_tokens: int) -> None:
        """One graph, with the tokens of each case in turn."""
        inputs = on_gpu(cases[0].inputs(self.rank))
        result = None

        def pair() -> None:
            nonlocal result
            result = self.buffer.dispatch(*inputs, num_worst_tokens=num_worst_tokens)
            self.buffer.combine(result.recv_x, result.handle)

        graph = capture([pair])
        for case in cases:
            for to, new in zip(inputs, case.inputs(self.rank), strict=True):
                to.copy_(new)
            self.meet()
            graph.replay()
            assert result is not None
            self.check(case, result)

    def check(self, case: NormalCase, result: NormalDispatchResult) -> None:
        result.event.current_stream_wait()
        torch.cuda.current_stream().synchronize()
        self.buffer.raise_if_failed()
        received = on_cpu(result)
        check_received(received, case, self.rank)
        counts = received.num_recv_tokens_per_expert
        if isinstance(counts, torch.Tensor):
            assert counts.dtype == torch.int32
            counts = counts.tolist()
        assert counts == case.received[self.rank].num_tokens_per_expert

    def combine(self, case: NormalCase, result: NormalDispatchResult, how: How) -> None:
        expected = case.received[self.rank]
        num_rows = len(result.recv_x)
        shape = (num_rows, case.shape.hidden)
        x = torch.full(shape, float("nan"), dtype=case.shape.dtype)  # nobody reads behind N
        values = received_values(on_cpu(result), case.shape)[: len(expected.rows)]
        x[: len(expected.rows)] = rows_for_home(values, self.rank)
        given = x.cuda()
        if how.in_place:
            place = self.buffer.combine_input(result.handle)
            place.copy_(given)
            given = place
        bias: Any = tuple(on_gpu(case.biases[self.rank]))
        if len(bias) < 2:
            bias = next(iter(bias), None)
        weights = None
        if case.with_weights:
            weights = torch.full((num_rows, case.shape.top_k), float("nan"))
            of_rows = result.recv_topk_weights.cpu()[: len(expected.rows)]
            weights[: len(expected.rows)] = weights_for_home(of_rows, self.rank)
            weights = weights.cuda()
        torch.cuda.current_stream().synchronize()
        options = how.options()
        self.meet()
        combined: Any = self.buffer.combine(
            given, result.handle, topk_weights=weights, bias=bias, **options
        )
        if how.is_async:
            *combined, event = combined
            event.current_stream_wait()
            combined = combined if case.with_weights else combined[0]
        torch.cuda.current_stream().synchronize()
        self.buffer.raise_if_failed()
        out, sums = combined if case.with_weights else (combined, None)
        check_combined(out.cpu(), case, self.rank)
        if sums is not None:
            assert same_bits(sums.cpu(), case.combined_weights[self.rank]), f"rank {self.rank}"

    def meet(self) -> None:
        self.buffer.group.all_gather(None)


def on_ranks(
    shape: CudaNormalShape, act: Callable[[CudaNormalRank], None], timeout_secs: float = 20.0
) -> None:
    """`act` on every virtual rank, each a thread with a stream of its own."""
    world = virtual_world(shape.shape.num_ranks)
    streams = [torch.cuda.Stream() for _ in world.groups]

    def rank_main(group: Group) -> None:
        stream = torch.cuda.stream(streams[group.self_rank])
        with stream, shape.buffer(group, timeout_secs) as buffer:
            act(CudaNormalRank(buffer))
            torch.cuda.current_stream().synchronize()
            group.all_gather(None)  # nobody's memory goes while a peer still reads it

    world.run(rank_main)


def with_rows(shape: CudaNormalShape, num_rows: int) -> CudaNormalShape:
    return replace(shape, num_rows=max(2 * shape.shape.num_ranks, num_rows))
