"""Experts that take SGLang's standard format, which its Triton kernels do: a row a token, with the
local experts and weights beside it, in place of the formats of DeepEP, which only DeepGEMM's take.

Such layers keep SGLang's dispatcher for DeepEP, its stages and two-batch overlap; within it
`LowLatency` and `Normal` (`standard_exchange`) send and receive. On the GPUs of one host,
low-latency rows arrive where the experts read them, and the experts' sums are left where the
sources fetch them (`sums`).

A received row lies by the slots of its source, of which every rank must assume as many: so with
data-parallel attention SGLang is told to keep the counts of all ranks, as it does for FlashInfer's
exchange. Its graphs then pad to the same size on every rank, also those of prefill, which for a few
tokens can hold the exchange and the experts.
"""

from __future__ import annotations

import functools
import logging
import os
from dataclasses import replace
from typing import Any

from ep_backend_sglang import choice, cpu_only, small_prefill, sums
from ep_backend_sglang.patching import (
    rebind_everywhere,
    require,
    require_global,
    require_parameters,
    uses_global,
)

logger = logging.getLogger(__name__)

FORMAT_VARIABLE = "EP_BACKEND_SGLANG_FORMAT"
FORMATS = ("standard", "deepep")
LAYER = f"{cpu_only.MOE}.ep_moe.layer.DeepEPMoE"
RUNNER = f"{cpu_only.MOE}.moe_runner"
COMMON = "sglang.srt.utils.common"
OVERLAP = "sglang.srt.batch_overlap.operations"

_has_layers = False
"""Whether this process has a layer whose experts take the standard format."""


def check() -> None:
    from sglang.srt.batch_overlap import operations
    from sglang.srt.layers import dp_attention
    from sglang.srt.layers.moe.ep_moe.layer import DeepEPMoE
    from sglang.srt.layers.moe.moe_runner import base
    from sglang.srt.layers.moe.moe_runner.runner import MoeRunner
    from sglang.srt.utils import common

    require_parameters(DeepEPMoE.forward, f"{LAYER}.forward", "hidden_states", "topk_output")
    require_global(DeepEPMoE.forward, f"{LAYER}.forward", "is_in_breakable_cuda_graph")
    for name in ("__init__", "forward_impl", "run_moe_core"):
        require(name in vars(DeepEPMoE), LAYER, f"lacks {name!r}")
    has_flag = uses_global(DeepEPMoE.run_moe_core, "deprecate_flag")  # an attribute, of layers
    require(has_flag, f"{LAYER}.run_moe_core", "does not ask for 'deprecate_flag'")
    require_global(MoeRunner.__init__, f"{RUNNER}.runner.MoeRunner.__init__", "FusedOpPool")
    place = f"{RUNNER}.base.FusedOpPool"
    require(hasattr(base, "FusedOpPool"), place, "does not exist")
    require(base.FusedOpPool.get_fused_func("none", "triton") is not None, place, "lacks Triton's")
    for name in ("get_dp_global_num_tokens", "is_dp_attention_enabled"):
        require(hasattr(dp_attention, name), dp_attention.__name__, f"lacks {name!r}")
    place = f"{OVERLAP}._StageExecutor.next"
    require_global(operations._StageExecutor.next, place, "set_dp_buffer_len")
    place = f"{COMMON}.require_mlp_tp_gather"
    require(hasattr(common, "require_mlp_tp_gather"), place, "does not exist")
    sums.check()


def install() -> None:
    from sglang.srt.batch_overlap import operations
    from sglang.srt.layers.moe.ep_moe.layer import DeepEPMoE
    from sglang.srt.layers.moe.moe_runner.base import FusedOpPool
    from sglang.srt.utils.common import require_mlp_tp_gather

    from ep_backend_sglang.standard_exchange import keep_sizes_of_whole

    if FusedOpPool.get_fused_func(choice.BUILT_IN, "triton") is None:
        run = FusedOpPool.get_fused_func("none", "triton")
        FusedOpPool.register_fused_func(choice.BUILT_IN, "triton", run)
    sums.install()
    _convert_layers(DeepEPMoE)
    _keep_counts_of_all_ranks(require_mlp_tp_gather)
    operations.set_dp_buffer_len = keep_sizes_of_whole(operations.set_dp_buffer_len)


def is_chosen() -> bool:
    """Whether experts that take the standard format get it.

    Raises:
        ValueError: `EP_BACKEND_SGLANG_FORMAT` is neither.
    """
    chosen = os.environ.get(FORMAT_VARIABLE) or FORMATS[0]
    if chosen not in FORMATS:
        raise ValueError(f"{FORMAT_VARIABLE} is {chosen!r}, expected {' or '.join(FORMATS)}.")
    return chosen == "standard"


def _convert_layers(moe: Any) -> None:
    from sglang.srt.layers import dp_attention
    from sglang.srt.layers.moe.ep_moe import layer

    from ep_backend_sglang.standard_exchange import LowLatency, Received

    init, run_moe_core, forward = moe.__init__, moe.run_moe_core, moe.forward

    @functools.wraps(init)
    def init_and_convert(self: Any, *args: Any, **kwargs: Any) -> None:
        init(self, *args, **kwargs)
        runner = getattr(self.quant_method, "runner", None)
        if is_chosen() and runner is not None and runner.runner_backend.is_triton():
            _convert(self, runner)

    @functools.wraps(run_moe_core)
    def run_experts(self: Any, dispatch_output: Any) -> Any:
        if not isinstance(dispatch_output, Received):
            return run_moe_core(self, dispatch_output)
        with sums.into(dispatch_output.combine_input) as target:
            rows = dispatch_output.hidden_states
            if len(rows) > 0:
                rows = run_moe_core(self, dispatch_output).hidden_states
        return dispatch_output.to_combine(target.rows_or(rows))

    @functools.wraps(forward)
    def forward_in_graph(self: Any, hidden_states: Any, topk_output: Any) -> Any:
        if layer.is_in_breakable_cuda_graph():
            inner = self.dispatcher._inners[0]
            is_ours = isinstance(getattr(inner, "_low_latency_dispatcher", None), LowLatency)
            if is_ours and small_prefill.fits(inner, len(hidden_states)):
                with small_prefill.like_decode(dp_attention):
                    return self.forward_impl(hidden_states, topk_output)
        return forward(self, hidden_states, topk_output)

    moe.__init__, moe.run_moe_core, moe.forward = init_and_convert, run_experts, forward_in_graph


def _convert(layer: Any, runner: Any) -> None:
    global _has_layers
    if not _has_layers:
        logger.info("ep_backend: experts get rows in SGLang's standard format.")
    _has_layers = True
    # As SGLang marks layers whose experts are run by what their runner registered.
    layer.deprecate_flag = True
    # Models scale what such a layer returns.
    runner.config = replace(runner.config, routed_scaling_factor=None)
    convert_dispatcher(layer.dispatcher)


def convert_dispatcher(dispatcher: Any) -> None:
    """Of SGLang's `MaybeTboDeepEPDispatcher`, which has one for each half of a batch."""
    from ep_backend_sglang.standard_exchange import LowLatency, Normal

    for idx, inner in enumerate(dispatcher._inners):
        for name, cls in (("_low_latency_dispatcher", LowLatency), ("_normal_dispatcher", Normal)):
            if hasattr(inner, name):
                setattr(inner, name, cls.like(getattr(inner, name), idx))


def _keep_counts_of_all_ranks(original: Any) -> None:
    from sglang.srt.layers.dp_attention import is_dp_attention_enabled

    @functools.wraps(original)
    def require_mlp_tp_gather(*args: Any, **kwargs: Any) -> bool:
        return original(*args, **kwargs) or (_has_layers and is_dp_attention_enabled())

    rebind_everywhere(original, require_mlp_tp_gather)
