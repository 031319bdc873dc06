"""Kernels that wait for their peers' of the same step, so that every rank has a stream: those that
send and receive at once, and sends into expert-major workspaces."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

import torch

from tests.support.programs import Interpreter

T = TypeVar("T")


def exchange(ranks: list[Interpreter], op: int, is_fused: bool) -> None:
    """A dispatch and its combine of all ranks, checked; in one kernel each, or in halves. Nothing
    but launches happens between those of the ranks: a copy or an allocation could wait for the
    kernels that spin."""
    streams = [torch.cuda.Stream() for _ in ranks]

    def on_streams(launch: Callable[[int], T]) -> list[T]:
        torch.cuda.synchronize()
        results = []
        for r, stream in enumerate(streams):
            with torch.cuda.stream(stream):
                results.append(launch(r))
        torch.cuda.synchronize()
        for rank in ranks:
            rank.buffer.raise_if_failed()
        return results

    inputs = [rank.inputs(op) for rank in ranks]
    weights = [rank.combine_weights(op) for rank in ranks]
    place = ranks[0].place(op)
    if is_fused:
        received = on_streams(lambda r: ranks[r].buffer.dispatch_and_receive(*inputs[r], **place))
    else:
        sent = on_streams(lambda r: ranks[r].buffer.dispatch(*inputs[r], **place))
        on_streams(lambda r: sent[r][1]())
        received = [result for result, _ in sent]
    for rank, result in zip(ranks, received, strict=True):
        rank.take_received(op, result)
    expert_out = [rank.expert_out.pop(op) for rank in ranks]
    handles = [result.handle for result in received]
    if is_fused:
        combined = on_streams(
            lambda r: ranks[r].buffer.combine_and_receive(
                expert_out[r], handles[r], topk_weights=weights[r]
            )
        )
    else:
        answered = on_streams(
            lambda r: ranks[r].buffer.combine(expert_out[r], handles[r], topk_weights=weights[r])
        )
        on_streams(lambda r: answered[r][1]())
        combined = [out for out, _ in answered]
    for rank, out in zip(ranks, combined, strict=True):
        rank.check_combined(op, out)
