"""Kernels that send and receive at once: each waits for its peers', so every rank has a stream."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

import torch

from tests.support.programs import Interpreter

T = TypeVar("T")


def exchange_in_one_kernel_each(ranks: list[Interpreter], op: int) -> None:
    """A dispatch and its combine of all ranks, checked. Nothing but launches happens between those
    of the ranks: a copy or an allocation could wait for the kernels that spin."""
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
    received = on_streams(lambda r: ranks[r].buffer.dispatch_and_receive(*inputs[r], **place))
    for rank, result in zip(ranks, received, strict=True):
        rank.take_received(op, result)
    combined = on_streams(
        lambda r: ranks[r].buffer.combine_and_receive(
            ranks[r].expert_out[op], received[r].handle, topk_weights=weights[r]
        )
    )
    for rank, out in zip(ranks, combined, strict=True):
        rank.check_combined(op, out)
