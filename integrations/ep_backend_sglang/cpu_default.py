"""What SGLang's own exchange lacks on a CPU, so that a benchmark has something to compare with.

With data-parallel attention and `--moe-a2a-backend none` every rank gathers all ranks' tokens, and
gets its own back by a reduce-scatter. On a CPU such a server starts and fails in its first forward
pass: rows are copied by Triton, sums are scattered by NCCL, and experts are computed by kernels for
GPUs. With `EP_BACKEND_SGLANG_CPU_DEFAULT=1` gloo and PyTorch do that; what travels, and when, is
SGLang's.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

from ep_backend.observe.trace import TRACE_VARIABLE
from ep_backend.plugins import reduce_scatter_rows
from ep_backend_sglang import cpu_only, tracing
from ep_backend_sglang.patching import require, require_global, require_parameters

VARIABLE = "EP_BACKEND_SGLANG_CPU_DEFAULT"
DP_ATTENTION = "sglang.srt.layers.dp_attention"
GROUP = "sglang.srt.distributed.parallel_state.GroupCoordinator"
STANDARD = f"{cpu_only.MOE}.token_dispatcher.standard.StandardDispatcher.dispatch"
LAYER = f"{cpu_only.MOE}.fused_moe_triton.layer.FusedMoE"


def is_wanted() -> bool:
    return os.environ.get(VARIABLE) == "1" and cpu_only.is_active()


def check() -> None:
    from sglang.srt.distributed.parallel_state import GroupCoordinator
    from sglang.srt.layers import dp_attention
    from sglang.srt.layers.moe.fused_moe_triton.layer import FusedMoE
    from sglang.srt.layers.moe.token_dispatcher.standard import StandardDispatcher

    cpu_only.check_padding()
    tracing.check()
    for name in ("memcpy", "memcpy_cpu", "_dp_gather", "dp_gather_replicate"):
        require(hasattr(dp_attention, name), DP_ATTENTION, f"lacks {name!r}")
    require_global(dp_attention.memcpy, f"{DP_ATTENTION}.memcpy", "memcpy_func")
    gather = dp_attention.dp_gather_replicate
    require_global(gather, f"{DP_ATTENTION}.dp_gather_replicate", "_dp_gather")
    for name, parameters in (
        ("all_gather_into_tensor", ("output", "input")),
        ("_all_gather_into_tensor", ("output", "input")),
        ("reduce_scatter_tensor", ("output", "input")),
        ("reduce_scatterv", ("input_", "output", "sizes")),
    ):
        require(name in vars(GroupCoordinator), GROUP, f"lacks {name!r}")
        require_parameters(getattr(GroupCoordinator, name), f"{GROUP}.{name}", *parameters)
    require("device_group" in GroupCoordinator.__annotations__, GROUP, "lacks 'device_group'")
    require_global(StandardDispatcher.dispatch, STANDARD, "get_device")
    require("run_moe_core" in vars(FusedMoE), LAYER, "lacks 'run_moe_core'")


def install() -> None:
    from sglang.srt.distributed.parallel_state import GroupCoordinator
    from sglang.srt.layers import dp_attention
    from sglang.srt.layers.moe.fused_moe_triton.layer import FusedMoE
    from sglang.srt.layers.moe.token_dispatcher import standard

    cpu_only.pad_batches_without_a_gpu()
    cpu_only.compute_experts_in_torch(FusedMoE)
    dp_attention.memcpy_func = dp_attention.memcpy_cpu
    standard.get_device = lambda: "cpu"
    group: Any = GroupCoordinator
    # Without the custom operator around it, which is registered for GPUs alone.
    group.all_gather_into_tensor = group._all_gather_into_tensor
    group.reduce_scatter_tensor = reduce_scatter_tensor
    group.reduce_scatterv = reduce_scatterv
    if os.environ.get(TRACE_VARIABLE):
        _record_the_exchange(group, dp_attention)


def reduce_scatter_tensor(self: Any, output: Any, input: Any) -> None:
    """As `reduce_scatterv`, with as many rows for each rank."""
    output.copy_(reduce_scatterv(self, input))


def reduce_scatterv(
    self: Any, input_: Any, output: Any = None, sizes: Sequence[int] | None = None
) -> Any:
    """This rank's rows of the sum of all ranks' `input_` `[sum(sizes), ..]`, into `output` where it
    is given. `sizes` None: the same everywhere.

    Raises:
        ValueError: the sizes do not fit the rows; nothing was sent.
    """
    num_ranks = self.device_group.size()
    if sizes is None:
        sizes = [len(input_) // num_ranks] * num_ranks
    if len(sizes) != num_ranks or sum(sizes) != len(input_):
        raise ValueError(f"{len(input_)} rows are scattered as {list(sizes)}, {num_ranks} ranks.")
    rows = reduce_scatter_rows(input_, sizes, self.device_group)
    return rows if output is None else output.copy_(rows)


def _record_the_exchange(group: Any, dp_attention: Any) -> None:
    """Spans as those of our dispatcher. Layers scatter by one of these methods each."""
    from sglang.srt.model_executor.model_runner import ModelRunner

    tracing.record(ModelRunner, "forward", "forward", lambda batch: len(batch.input_ids))
    tracing.record(dp_attention, "_dp_gather", "prepare", len)
    for name in ("reduce_scatter_tensor", "reduce_scatterv"):
        tracing.record(group, name, "finalize", len)
