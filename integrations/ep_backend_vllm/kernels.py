"""vLLM's prepare/finalize factory answers for our backends."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

from ep_backend_vllm import graphs
from ep_backend_vllm.backends import BACKENDS, HIGH_THROUGHPUT, uses_batched_format
from ep_backend_vllm.patching import rebind_everywhere, require, require_parameters

MODULAR_KERNEL = "FusedMoEKernelModularImpl"
PLACE = "vllm.model_executor.layers.fused_moe.all2all_utils.maybe_make_prepare_finalize"

DEEP_EP_HIGH_THROUGHPUT = "deepep_high_throughput"
EXPERTS = "vllm.model_executor.layers.fused_moe.modular_kernel.FusedMoEExperts.is_supported_config"


def check() -> None:
    from vllm.model_executor.layers.fused_moe import all2all_utils

    require(hasattr(all2all_utils, "maybe_make_prepare_finalize"), PLACE, "does not exist")
    require_parameters(all2all_utils.maybe_make_prepare_finalize, PLACE, "moe", "quant_config")
    kernel = modular_kernel()
    place = f"{kernel.__module__}.{MODULAR_KERNEL}._allocate_buffers"
    require(hasattr(kernel, "_allocate_buffers"), place, "does not exist")
    require_parameters(_experts().is_supported_config, EXPERTS, "cls", "moe_config")
    require(hasattr(_experts(), "_supports_parallel_config"), EXPERTS, "cannot ask the experts")
    graphs.check()


def install() -> None:
    from vllm.model_executor.layers.fused_moe import all2all_utils

    original = all2all_utils.maybe_make_prepare_finalize

    @functools.wraps(original)
    def maybe_make_prepare_finalize(moe: Any, *args: Any, **kwargs: Any) -> Any:
        parallel = moe.moe_parallel_config
        if not (parallel.use_all2all_kernels and parallel.all2all_backend in BACKENDS):
            return original(moe, *args, **kwargs)
        quant_config = args[0] if args else kwargs.get("quant_config")
        if parallel.all2all_backend == HIGH_THROUGHPUT:
            return _make_high_throughput(moe, quant_config)
        return _make_low_latency(moe, quant_config)

    rebind_everywhere(original, maybe_make_prepare_finalize)
    _let_experts_write_to_workspaces(modular_kernel())
    _refuse_experts_without_counts(_experts())


def modular_kernel() -> Any:
    from vllm.model_executor.layers.fused_moe import modular_kernel

    place = f"{modular_kernel.__name__}.{MODULAR_KERNEL}"
    require(hasattr(modular_kernel, MODULAR_KERNEL), place, "does not exist")
    return getattr(modular_kernel, MODULAR_KERNEL)


def _experts() -> Any:
    from vllm.model_executor.layers.fused_moe.modular_kernel import FusedMoEExperts

    return FusedMoEExperts


def _refuse_experts_without_counts(experts: Any) -> None:
    """On a GPU our high-throughput backend hands rows over as DeepEP's does, with the rows of each
    expert. Experts that cannot take those, as CUTLASS's, say so of DeepEP by name."""
    import torch

    original = experts.is_supported_config

    @functools.wraps(original)
    def is_supported_config(cls: Any, moe_config: Any, *args: Any, **kwargs: Any) -> Any:
        parallel = moe_config.moe_parallel_config
        is_ours = parallel.use_all2all_kernels and parallel.all2all_backend == HIGH_THROUGHPUT
        if is_ours and torch.device(moe_config.device).type != "cpu":
            as_deep_ep = dataclasses.replace(parallel, all2all_backend=DEEP_EP_HIGH_THROUGHPUT)
            if not cls._supports_parallel_config(as_deep_ep):
                return False, f"kernel does not support what {HIGH_THROUGHPUT} hands over"
        return original(cls, moe_config, *args, **kwargs)

    experts.is_supported_config = staticmethod(is_supported_config)


def _let_experts_write_to_workspaces(kernel: Any) -> None:
    """Experts are given a tensor for their output: of ours, the one that peers read. Newer versions
    ask for it."""
    from vllm.model_executor.layers.fused_moe import modular_kernel

    if hasattr(modular_kernel.FusedMoEPrepareAndFinalizeModular, "allocate_fused_expert_output"):
        return
    original = kernel._allocate_buffers

    @functools.wraps(original)
    def allocate(self: Any, *args: Any, **kwargs: Any) -> Any:
        workspace13, workspace2, output = original(self, *args, **kwargs)
        ask = getattr(self.prepare_finalize, "allocate_fused_expert_output", None)
        in_place = None if ask is None else ask(output.shape, output.dtype, output.device)
        return workspace13, workspace2, output if in_place is None else in_place

    kernel._allocate_buffers = allocate


def _make_high_throughput(moe: Any, quant_config: Any) -> Any:
    import torch
    from vllm.distributed import get_ep_group

    from ep_backend_vllm.adapter import dispatch_dtype_for
    from ep_backend_vllm.by_size import BySizePrepareAndFinalize, most_small_tokens
    from ep_backend_vllm.high_throughput import (
        NormalPrepareAndFinalize,
        most_tokens_without_wait,
        num_bytes_for,
    )
    from ep_backend_vllm.workspace import WorkspacePrepareAndFinalize

    manager = get_ep_group().device_communicator.all2all_manager
    device = torch.device(moe.device).type
    is_cpu = device == "cpu"
    is_cuda_host = not is_cpu and max(manager.group.hosts()) == 0
    buffer = manager.get_normal_buffer(
        {
            "hidden": moe.hidden_dim,
            "num_experts": moe.num_experts,
            "top_k": moe.experts_per_token,
            "dtype": moe.in_dtype,
            # On a CPU, whose experts take no float8, it is refused.
            "dispatch_dtype": moe.in_dtype
            if is_cpu
            else dispatch_dtype_for(quant_config, moe.in_dtype),
            "num_bytes": num_bytes_for(moe, manager.group.num_ranks, device),
            "device": device,
            "expert_ids": "global" if is_cuda_host else "local",
        }
    )
    if is_cpu:
        return NormalPrepareAndFinalize(buffer)
    num_graph_tokens = graphs.most_tokens()
    if num_graph_tokens > 0:
        graphs.let_scratch_memory_grow()
    num_max_tokens = -(-moe.max_num_tokens // moe.sp_size)
    normal = NormalPrepareAndFinalize(
        buffer, True, most_tokens_without_wait(buffer, num_graph_tokens, num_max_tokens)
    )
    num_small_tokens = most_small_tokens(num_graph_tokens, manager.group.hosts())
    if num_small_tokens == 0:
        return normal
    workspace = _workspaces(manager, _low_latency_shape(moe, quant_config, num_small_tokens), 1)
    return BySizePrepareAndFinalize(WorkspacePrepareAndFinalize(workspace, is_async=False), normal)


def _low_latency_shape(moe: Any, quant_config: Any, num_max_tokens: int) -> dict[str, Any]:
    import torch

    from ep_backend_vllm.adapter import dispatch_dtype_for

    return {
        "num_max_tokens_per_rank": num_max_tokens,
        "hidden": moe.hidden_dim,
        "num_experts": moe.num_experts,
        "top_k": moe.experts_per_token,
        "dtype": moe.in_dtype,
        "dispatch_dtype": dispatch_dtype_for(quant_config, moe.in_dtype),
        "device": torch.device(moe.device).type,
    }


def _workspaces(manager: Any, shape: dict[str, Any], num_workspaces: int) -> Any:
    """Of vLLM's standard format; more than one for micro-batches, whose rows hooks receive."""
    in_workspaces = {
        "output_layout": "rank_major",
        "expert_ids": "global",
        "num_workspaces": num_workspaces,
        "with_hooks": num_workspaces > 1,
    }
    return manager.get_handle(shape | in_workspaces)


def _make_low_latency(moe: Any, quant_config: Any) -> Any:
    from vllm.config import get_current_vllm_config_or_none
    from vllm.distributed import get_ep_group

    from ep_backend_vllm.low_latency import LowLatencyPrepareAndFinalize

    manager = get_ep_group().device_communicator.all2all_manager
    shape = _low_latency_shape(moe, quant_config, moe.max_num_tokens)
    if uses_batched_format():
        return LowLatencyPrepareAndFinalize(manager.get_handle(shape))

    from ep_backend_vllm.workspace import NUM_WORKSPACES, WorkspacePrepareAndFinalize

    config = get_current_vllm_config_or_none()
    has_micro_batches = config is not None and config.parallel_config.enable_dbo
    buffer = _workspaces(manager, shape, NUM_WORKSPACES if has_micro_batches else 1)
    return WorkspacePrepareAndFinalize(buffer, is_async=has_micro_batches)
