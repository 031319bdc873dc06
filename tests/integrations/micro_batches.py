"""A rank whose model runs as two micro-batches of vLLM's dual-batch overlap, on a CPU: vLLM's own
contexts and modular kernel, without its streams."""

from __future__ import annotations

import threading
from contextlib import nullcontext
from types import SimpleNamespace
from typing import Any

import torch
import vllm.model_executor.layers.fused_moe.modular_kernel as mk
from ep_backend_vllm import workspace
from ep_backend_vllm.cpu_experts import BatchedCPUExperts
from ep_backend_vllm.low_latency import LowLatencyPrepareAndFinalize
from vllm import forward_context
from vllm.model_executor.layers.fused_moe.config import FUSED_MOE_UNQUANTIZED_CONFIG
from vllm.v1.worker import ubatching

from ep_backend import Group
from tests.integrations.vllm_layer import (
    MAX_TOKENS,
    NUM_EXPERTS,
    LoopExperts,
    apply_layer,
    low_latency_buffer,
    moe_config_of,
)

STREAM = "the only one"
DEADLINE_SECS = 60.0
Batch = tuple[torch.Tensor, torch.Tensor, torch.Tensor]


class Event:
    """Of a GPU; here all has happened."""

    def record(self, _stream: object) -> None: ...

    def wait(self, _stream: object) -> None: ...


def play_streams() -> None:
    """For the whole process."""

    def update_stream(self: Any, stream: object) -> None:
        self.current_stream = stream

    ubatching.current_stream = lambda: STREAM
    ubatching.UBatchContext.update_stream = update_stream
    ubatching.torch = SimpleNamespace(Event=Event, cuda=torch.cuda)


def run_step(layers: list[Any], batches: list[Batch], num_slots: list[int]) -> list[torch.Tensor]:
    """All layers for both micro-batches, in vLLM's order; or for the only batch.

    Args:
        layers: `layer(batch)`, one after the other; each adds to its batch's `x`.
        num_slots: of each micro-batch, the most tokens of a rank.
    """
    if len(batches) == 1:
        with forward_context.override_forward_context(_forward_context(num_slots[0])):
            return [_run_layers(layers, batches[0])]
    ready = threading.Barrier(len(batches) + 1)
    contexts = ubatching.make_ubatch_contexts(
        num_micro_batches=len(batches),
        compute_stream=STREAM,  # type: ignore[arg-type]
        comm_stream=STREAM,  # type: ignore[arg-type]
        forward_contexts=[_forward_context(n) for n in num_slots],
        ready_barrier=ready,
    )
    outs: list[Any] = [None] * len(batches)

    def micro_batch(i: int) -> None:
        try:
            with contexts[i]:
                outs[i] = _run_layers(layers, batches[i])
        except BaseException as e:
            outs[i] = e
            contexts[i].cpu_signal_event.set()

    threads = [threading.Thread(target=micro_batch, args=(i,), daemon=True) for i in range(2)]
    for thread in threads:
        thread.start()
    ready.wait()
    contexts[0].cpu_wait_event.set()
    for thread in threads:
        thread.join(DEADLINE_SECS)
    for out in outs:
        if isinstance(out, BaseException):
            raise out
    return outs


def _run_layers(layers: list[Any], batch: Batch) -> torch.Tensor:
    x, ids, weights = batch
    for layer in layers:
        x = x + layer((x, ids, weights))
    return x


def _forward_context(num_slots: int) -> Any:
    metadata = SimpleNamespace(
        get_chunk_sizes_across_dp_rank=lambda: [num_slots],
        sp_local_sizes=lambda _: nullcontext(),
    )
    return SimpleNamespace(dp_metadata=metadata)


def batched_layers(group: Group, weights_of_layers: list[Any]) -> tuple[Any, list[Any]]:
    """The buffer that all layers share, and they."""
    buffer = low_latency_buffer(group, torch.float32)

    def layer(weights: Any) -> Any:
        experts = BatchedCPUExperts(
            moe_config=moe_config_of(group, buffer),
            quant_config=FUSED_MOE_UNQUANTIZED_CONFIG,
            max_num_tokens=MAX_TOKENS,
            num_dispatchers=group.num_ranks,
        )
        kernel = mk.FusedMoEKernel(LowLatencyPrepareAndFinalize(buffer), experts)
        return lambda batch: apply_layer(kernel, buffer, weights, batch)

    return buffer, [layer(weights) for weights in weights_of_layers]


def workspace_layers(
    group: Group, weights_of_layers: list[Any], buffer: Any
) -> tuple[Any, list[Any]]:
    """The same in the standard format, over a buffer that plays workspaces."""
    inner = buffer.inner
    owned = slice(inner.first_expert, inner.first_expert + inner.num_local_experts)
    expert_map = torch.full((NUM_EXPERTS,), -1, dtype=torch.int32)
    expert_map[owned] = torch.arange(inner.num_local_experts, dtype=torch.int32)

    def layer(weights: Any) -> Any:
        experts = LoopExperts(
            moe_config=moe_config_of(group, inner), quant_config=FUSED_MOE_UNQUANTIZED_CONFIG
        )
        adapter = workspace.WorkspacePrepareAndFinalize(buffer, is_async=True)
        kernel = mk.FusedMoEKernel(adapter, experts)
        return lambda batch: apply_layer(kernel, inner, weights, batch, expert_map)

    return buffer, [layer(weights) for weights in weights_of_layers]
