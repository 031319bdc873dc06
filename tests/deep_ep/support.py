"""`deep_ep.Buffer` driven as its users do, checked against the reference."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist

from ep_backend import DispatchResult, Group, deep_ep
from ep_backend.deep_ep_handle import LowLatencyHandle
from tests.support.scenario import Variant, check_combined, check_received, run_experts
from tests.support.shapes import Shape


def buffer_of(group: Group | dist.ProcessGroup, timeout_secs: float = 20.0) -> deep_ep.Buffer:
    return deep_ep.Buffer(group, low_latency_mode=True, timeout_secs=timeout_secs)


def format_of(shape: Shape) -> dict[str, bool]:
    """The arguments that choose how rows travel."""
    return dict(
        use_fp8=shape.is_float8,
        round_scale=shape.scale_format != "float32",
        use_ue8m0=shape.scale_format == "ue8m0",
    )


class Exchange:
    """One dispatch and its combine on one rank. What the shape calls reduction "rank" is weights at
    dispatch here."""

    def __init__(
        self,
        buffer: deep_ep.Buffer,
        shape: Shape,
        variant: Variant,
        is_hooked: bool = True,
        is_async: bool = False,
    ) -> None:
        self.buffer = buffer
        self.shape = shape
        self.variant = variant
        self.is_hooked = is_hooked
        self.is_async = is_async
        self.rank = buffer.rank
        self.x = variant.x[self.rank].to(shape.device)
        self.topk_idx = variant.topk_idx[self.rank].to(shape.device)
        self.topk_weights = variant.topk_weights[self.rank].to(shape.device)

    def dispatch(self, **options: Any) -> None:
        if self.shape.reduction == "rank":
            options["topk_weights"] = self.topk_weights
        received, self.recv_count, self.handle, self.event, self.hook = (
            self.buffer.low_latency_dispatch(
                self.x,
                self.topk_idx,
                self.shape.num_max_tokens_per_rank,
                self.shape.num_experts,
                return_recv_hook=self.is_hooked,
                async_finish=self.is_async,
                **format_of(self.shape),
                **options,
            )
        )
        self.recv_x, self.scales = received if self.shape.is_float8 else (received, None)

    @property
    def result(self) -> DispatchResult:
        handle = self.handle.dispatch_handle
        return DispatchResult(handle, self.recv_x, self.scales, None, None, self.recv_count)

    def receive(self) -> None:
        self.event.current_stream_wait()
        self.hook()
        check_received(self.result, self.variant, self.shape, self.rank)

    def combine(self, zero_copy: bool = False, out: torch.Tensor | None = None) -> None:
        rows = run_experts(self.result, self.shape, self.rank)
        if zero_copy:
            self.buffer.get_next_low_latency_combine_buffer(self.handle).copy_(rows)
            rows.fill_(float("nan"))  # nobody reads it
        self.combined, self.event, self.hook = self.buffer.low_latency_combine(
            rows,
            self.topk_idx,
            self.topk_weights,
            self.handle,
            zero_copy=zero_copy,
            return_recv_hook=self.is_hooked,
            async_finish=self.is_async,
            out=out,
        )

    def finish(self) -> None:
        self.event.current_stream_wait()
        self.hook()
        check_combined(self.combined, self.variant, self.rank)

    def run(self, zero_copy: bool = False) -> LowLatencyHandle:
        self.dispatch()
        self.receive()
        self.combine(zero_copy)
        self.finish()
        return self.handle
