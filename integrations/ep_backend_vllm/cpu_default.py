"""What vLLM's own all-to-all lacks on a CPU, so that a benchmark has something to compare with.

`allgather_reducescatter` starts on a CPU and fails at the first request: the CPU communicator has
no gathers of uneven sizes, and vLLM's CPU experts read global expert ids as local ones. With
`EP_BACKEND_VLLM_CPU_DEFAULT=1` both are supplied; all else, the manager included, is vLLM's.
"""

from __future__ import annotations

import math
import os
import time
from collections.abc import Sequence
from typing import Any, cast

from ep_backend.observe.trace import TraceWriter
from ep_backend.plugins import reduce_scatter_rows
from ep_backend_vllm.patching import rebind_everywhere, require, require_parameters

VARIABLE = "EP_BACKEND_VLLM_CPU_DEFAULT"
BACKEND = "allgather_reducescatter"
COMMUNICATOR = "vllm.distributed.device_communicators.cpu_communicator.CpuCommunicator"
PREPARE_FINALIZE = "vllm.model_executor.layers.fused_moe.prepare_finalize.naive_dp_ep"
MODULAR = "MoEPrepareAndFinalizeNaiveDPEPModular"


def is_wanted() -> bool:
    from vllm.platforms import current_platform

    return os.environ.get(VARIABLE) == "1" and current_platform.is_cpu()


def check() -> None:
    if not is_wanted():
        return
    from vllm.distributed.device_communicators.cpu_communicator import CpuCommunicator
    from vllm.model_executor.layers.fused_moe.prepare_finalize import naive_dp_ep

    for name in ("all_gatherv", "reduce_scatterv"):
        gather = getattr(CpuCommunicator, name, None)
        require(callable(gather), COMMUNICATOR, f"lacks {name}")
        require_parameters(cast(Any, gather), f"{COMMUNICATOR}.{name}", "input_", "dim", "sizes")
    require(hasattr(naive_dp_ep, MODULAR), PREPARE_FINALIZE, f"lacks {MODULAR}")


def install() -> None:
    if not is_wanted():
        return
    from vllm.distributed.device_communicators.cpu_communicator import CpuCommunicator

    CpuCommunicator.all_gatherv = all_gatherv
    CpuCommunicator.reduce_scatterv = reduce_scatterv
    _give_experts_local_ids()


def all_gatherv(self: Any, input_: Any, dim: int = 0, sizes: Sequence[int] | None = None) -> Any:
    """Rows of all ranks, one rank's behind another's.

    Args:
        input_: a tensor `[T, ..]` or a list of them with the same T, which travel together.
        sizes: T of every rank; None: the same everywhere.

    As an all-to-all: gloo's takes uneven sizes, its all-gather would need padding.
    """
    import torch

    tensors = [input_] if isinstance(input_, torch.Tensor) else list(input_)
    num_rows = tensors[0].shape[0]
    sizes = list(sizes) if sizes is not None else [num_rows] * self.world_size
    _check(dim, sizes[self.rank_in_group] == num_rows, f"{num_rows} rows, sizes {sizes}")
    row_bytes = [math.prod(t.shape[1:]) * t.element_size() for t in tensors]
    packed = torch.cat(
        [
            _copy(t).view(torch.uint8).reshape(num_rows, num_bytes)
            for t, num_bytes in zip(tensors, row_bytes, strict=True)
        ],
        dim=1,
    )
    gathered = packed.new_empty(sum(sizes), packed.shape[1])
    torch.distributed.all_to_all_single(
        gathered,
        packed.repeat(self.world_size, 1),
        output_split_sizes=sizes,
        input_split_sizes=[num_rows] * self.world_size,
        group=self.device_group,
    )
    results = [
        _copy(part).view(t.dtype).reshape(len(gathered), *t.shape[1:])
        for part, t in zip(gathered.split(row_bytes, dim=1), tensors, strict=True)
    ]
    return results[0] if isinstance(input_, torch.Tensor) else results


def reduce_scatterv(
    self: Any, input_: Any, dim: int = -1, sizes: Sequence[int] | None = None
) -> Any:
    """This rank's rows of the sum of all ranks' `input_` `[sum(sizes), ..]`, added in the order of
    ranks."""
    world_size = self.world_size
    if sizes is None:
        _check(dim, len(input_) % world_size == 0, f"{len(input_)} rows, {world_size} ranks")
        sizes = [len(input_) // world_size] * world_size
    sizes = list(sizes)
    _check(dim, sum(sizes) == len(input_), f"{len(input_)} rows, sizes {sizes}")
    return reduce_scatter_rows(input_, sizes, self.device_group)


def _copy(tensor: Any) -> Any:
    """Whose bytes may be viewed as another type: `contiguous()` leaves a single row as it is, with
    its strides and at its place, which may not be a multiple of an element."""
    import torch

    return tensor.clone(memory_format=torch.contiguous_format)


def _check(dim: int, fits: bool, what: str) -> None:
    if dim != 0:
        raise NotImplementedError(f"dim is {dim}: only rows (dim 0) are gathered and scattered.")
    if not fits:
        raise ValueError(f"sizes do not fit the rows: {what}.")


def local_ids(topk_ids: Any, topk_weights: Any, expert_map: Any) -> tuple[Any, Any]:
    """Ids `[N, K]` as this rank numbers its experts, and their weights: expert 0 with weight 0
    where an expert is another rank's."""
    local = expert_map[topk_ids.long()]
    weights = topk_weights.masked_fill(local < 0, 0.0)
    return local.clamp(min=0).to(topk_ids.dtype), weights


def _give_experts_local_ids() -> None:
    from vllm.model_executor.layers.fused_moe import all2all_utils
    from vllm.model_executor.layers.fused_moe.prepare_finalize import naive_dp_ep

    modular: Any = getattr(naive_dp_ep, MODULAR)

    class LocalIds(modular):
        """vLLM's class, timed, with ids as the CPU experts want them."""

        def __init__(self, is_sequence_parallel: bool, num_dispatchers: int) -> None:
            super().__init__(is_sequence_parallel, num_dispatchers)
            from vllm.distributed import get_ep_group

            self._trace = TraceWriter.from_env(f"rank{get_ep_group().rank_in_group}")

        def prepare(self, a1: Any, *args: Any, **kwargs: Any) -> Any:
            begin_ns = time.monotonic_ns()
            expert_map = kwargs["expert_map"] if "expert_map" in kwargs else args[3]
            x, scale, meta, ids, weights = super().prepare(a1, *args, **kwargs)
            ids, weights = local_ids(ids, weights, expert_map)
            self._record("prepare", a1.shape[0], begin_ns)
            return x, scale, meta, ids, weights

        def finalize(self, output: Any, *args: Any, **kwargs: Any) -> None:
            begin_ns = time.monotonic_ns()
            super().finalize(output, *args, **kwargs)
            self._record("finalize", output.shape[0], begin_ns)

        def _record(self, kind: str, num_tokens: int, begin_ns: int) -> None:
            if self._trace is not None:
                self._trace.add(kind, num_tokens, begin_ns, time.monotonic_ns() - begin_ns)

    original = all2all_utils.maybe_make_prepare_finalize

    def maybe_make_prepare_finalize(moe: Any, *args: Any, **kwargs: Any) -> Any:
        made = original(moe, *args, **kwargs)
        parallel = moe.moe_parallel_config
        if parallel.all2all_backend != BACKEND or not isinstance(made, modular):
            return made
        return LocalIds(made.is_sequence_parallel, made.num_dispatchers())

    rebind_everywhere(original, maybe_make_prepare_finalize)
