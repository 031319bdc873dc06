"""vLLM's prepare/finalize factory answers for our backends."""

from __future__ import annotations

import functools
from typing import Any

from ep_backend_vllm.backends import LOW_LATENCY
from ep_backend_vllm.patching import rebind_everywhere, require, require_parameters

PLACE = "vllm.model_executor.layers.fused_moe.all2all_utils.maybe_make_prepare_finalize"


def check() -> None:
    from vllm.model_executor.layers.fused_moe import all2all_utils

    require(hasattr(all2all_utils, "maybe_make_prepare_finalize"), PLACE, "does not exist")
    require_parameters(all2all_utils.maybe_make_prepare_finalize, PLACE, "moe", "quant_config")


def install() -> None:
    from vllm.model_executor.layers.fused_moe import all2all_utils

    original = all2all_utils.maybe_make_prepare_finalize

    @functools.wraps(original)
    def maybe_make_prepare_finalize(moe: Any, *args: Any, **kwargs: Any) -> Any:
        parallel = moe.moe_parallel_config
        if parallel.use_all2all_kernels and parallel.all2all_backend == LOW_LATENCY:
            quant_config = args[0] if args else kwargs.get("quant_config")
            return _make_low_latency(moe, quant_config)
        return original(moe, *args, **kwargs)

    rebind_everywhere(original, maybe_make_prepare_finalize)


def _make_low_latency(moe: Any, quant_config: Any) -> Any:
    import torch
    from vllm.distributed import get_ep_group

    from ep_backend_vllm.low_latency import LowLatencyPrepareAndFinalize, dispatch_dtype_for

    communicator = get_ep_group().device_communicator
    buffer = communicator.all2all_manager.get_handle(
        {
            "num_max_tokens_per_rank": moe.max_num_tokens,
            "hidden": moe.hidden_dim,
            "num_experts": moe.num_experts,
            "top_k": moe.experts_per_token,
            "dtype": moe.in_dtype,
            "dispatch_dtype": dispatch_dtype_for(quant_config, moe.in_dtype),
            "device": torch.device(moe.device).type,
        }
    )
    return LowLatencyPrepareAndFinalize(buffer)
