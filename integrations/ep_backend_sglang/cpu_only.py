"""What SGLang lacks to serve through its DeepEP dispatcher on a CPU. Does nothing where there is an
accelerator, and is not loaded where another backend was chosen.

SGLang has an engine of its own for CPUs, without expert parallelism. Told `--device cpu` without
it, the engine for GPUs runs in plain PyTorch, up to the places below.
"""

from __future__ import annotations

import functools
from types import SimpleNamespace
from typing import Any

import torch

from ep_backend_sglang.patching import require, require_global

MOE = "sglang.srt.layers.moe"
DISPATCHER = f"{MOE}.token_dispatcher.deepep"
BATCH = "sglang.srt.model_executor.forward_batch_info"
LOADS = "sglang.srt.eplb.expert_distribution"
ATTENTION = "sglang.srt.layers.attention.torch_native_backend.TorchNativeAttnBackend"


def is_active() -> bool:
    return not torch.accelerator.is_available()


def check() -> None:
    if not is_active():
        return
    from sglang.srt.eplb import expert_distribution
    from sglang.srt.layers.moe.ep_moe.layer import DeepEPMoE
    from sglang.srt.layers.moe.token_dispatcher import deepep

    place = f"{DISPATCHER}.DeepEPBuffer.get_deepep_buffer"
    require(hasattr(deepep.DeepEPBuffer, "get_deepep_buffer"), place, "does not exist")
    require_global(deepep.DeepEPBuffer.get_deepep_buffer, place, "get_device_properties")
    normal = getattr(deepep, "_DeepEPDispatcherImplNormal", object)
    place = f"{DISPATCHER}._DeepEPDispatcherImplNormal.combine_a"
    require("combine_a" in vars(normal), place, "does not exist")
    place = f"{MOE}.ep_moe.layer.DeepEPMoE.run_moe_core"
    require("run_moe_core" in vars(DeepEPMoE), place, "does not exist")
    place = f"{LOADS}.get_device"
    require(hasattr(expert_distribution, "get_device"), place, "does not exist")
    check_padding()


def check_padding() -> None:
    from sglang.srt.layers.attention.torch_native_backend import TorchNativeAttnBackend
    from sglang.srt.model_executor.forward_batch_info import ForwardBatch

    place = f"{BATCH}.ForwardBatch.prepare_mlp_sync_batch"
    require(hasattr(ForwardBatch, "prepare_mlp_sync_batch"), place, "does not exist")
    require_global(ForwardBatch.prepare_mlp_sync_batch, place, "_is_cpu")
    name = "get_cuda_graph_seq_len_fill_value"
    require(hasattr(TorchNativeAttnBackend, name), ATTENTION, f"lacks {name!r}")


def install() -> None:
    if not is_active():
        return
    from sglang.srt.layers.moe.ep_moe.layer import DeepEPMoE

    _describe_a_device()
    _rebalance_without_a_gpu()
    compute_experts_in_torch(DeepEPMoE)
    pad_batches_without_a_gpu()
    _combine_without_deep_gemm()


def _describe_a_device() -> None:
    """Before it makes a buffer, the dispatcher asks for the number of SMs, to warn users of the
    normal kernels."""

    def get_device_properties(device: Any = None) -> Any:
        return SimpleNamespace(multi_processor_count=1)

    torch.cuda.get_device_properties = get_device_properties


def _rebalance_without_a_gpu() -> None:
    """Who counts the experts' loads asks which accelerator there is; who moves experts empties its
    cache."""
    from sglang.srt.eplb import expert_distribution

    expert_distribution.get_device = lambda *args: "cpu"
    torch.cpu.empty_cache = lambda: None  # type: ignore[attr-defined]


def compute_experts_in_torch(moe: Any) -> None:
    """Of a class of MoE layers: for what an exchange brings, SGLang has kernels for GPUs only."""
    original = moe.run_moe_core

    @functools.wraps(original)
    def run_moe_core(self: Any, dispatch_output: Any) -> Any:
        if self.quant_config is not None:
            return original(self, dispatch_output)
        from ep_backend_sglang.cpu_experts import run_experts

        return run_experts(self, dispatch_output)

    moe.run_moe_core = run_moe_core


def pad_batches_without_a_gpu() -> None:
    """Ranks of data-parallel attention pad their batches to one size, in pinned memory and with
    sequences as long as a graph for the GPU wants them."""
    from sglang.srt.layers.attention.torch_native_backend import TorchNativeAttnBackend
    from sglang.srt.model_executor import forward_batch_info

    forward_batch_info._is_cpu = True
    TorchNativeAttnBackend.get_cpu_graph_seq_len_fill_value = lambda self: 1


def _combine_without_deep_gemm() -> None:
    """The normal combine goes on only where DeepGEMM has computed the experts."""
    from sglang.srt.layers.moe.token_dispatcher import deepep

    def combine_a(self: Any, hidden_states: Any, topk_ids: Any, topk_weights: Any) -> Any:
        return hidden_states, deepep.Buffer.capture() if self.async_finish else None

    deepep._DeepEPDispatcherImplNormal.combine_a = combine_a
