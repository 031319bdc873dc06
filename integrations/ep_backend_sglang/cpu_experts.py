"""Unquantised SwiGLU experts in plain PyTorch, for both formats of SGLang's DeepEP dispatcher, and
for that of its own exchange.

T rows received, H hidden, K top_k, L experts of this rank, S rows an expert can receive.
SGLang's weights: `w13_weight` `[L, 2I, H]`, gate before up; `w2_weight` `[L, H, I]`.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from sglang.srt.layers.moe.token_dispatcher import (
    DispatchOutputChecker,
    StandardCombineInput,
    StandardDispatchOutput,
)
from sglang.srt.layers.moe.token_dispatcher.deepep import (
    DeepEPLLCombineInput,
    DeepEPNormalCombineInput,
)

PLAIN = {
    "activation": "silu",
    "is_gated": True,
    "apply_router_weight_on_input": False,
    "gemm1_alpha": None,
    "gemm1_clamp_limit": None,
    "swiglu_limit": None,
}
"""What SGLang says of experts that are SwiGLU and nothing else."""
PLAIN_STANDARD = {"no_combine": False, "routed_scaling_factor": None}
"""What else kernels of SGLang's own exchange would have to do."""


def run_experts(layer: Any, dispatch_output: Any) -> Any:
    """What `DeepEPMoE.run_moe_core` returns, or `FusedMoE.run_moe_core` for the standard format.

    Raises:
        NotImplementedError: the layer's experts are not plain SwiGLU.
    """
    _check(layer, PLAIN)
    if DispatchOutputChecker.format_is_standard(dispatch_output):
        if isinstance(dispatch_output, StandardDispatchOutput):  # with ours the model scales
            _check(layer, PLAIN_STANDARD)
        topk = dispatch_output.topk_output
        return StandardCombineInput(
            _weigh_and_add(layer, dispatch_output.hidden_states, topk.topk_ids, topk.topk_weights)
        )
    is_normal = DispatchOutputChecker.format_is_deepep_normal(dispatch_output)
    run, combine_input = (
        (_run_normal, DeepEPNormalCombineInput)
        if is_normal
        else (_run_low_latency, DeepEPLLCombineInput)
    )
    rows = run(layer, dispatch_output)
    return combine_input(rows, dispatch_output.topk_ids, dispatch_output.topk_weights)


def _check(layer: Any, expected: dict[str, Any]) -> None:
    for name, plain in expected.items():
        value = getattr(layer.moe_runner_config, name)
        if value != plain:
            raise NotImplementedError(
                f"experts have {name} {value!r}, but on a CPU only {plain!r} can be served."
            )
    if hasattr(layer, "w13_weight_bias") or hasattr(layer, "w2_weight_bias"):
        raise NotImplementedError("experts have a bias, but on a CPU none can be served.")


def _run_normal(layer: Any, dispatch_output: Any) -> torch.Tensor:
    return _weigh_and_add(
        layer,
        dispatch_output.hidden_states,
        dispatch_output.topk_ids,
        dispatch_output.topk_weights,
    )


def _weigh_and_add(
    layer: Any, x: torch.Tensor, topk_ids: torch.Tensor, topk_weights: torch.Tensor
) -> torch.Tensor:
    """`[T, H]`: the weighted sum of a row's local experts; combine only adds.

    Args:
        topk_ids: `[T, K]` as this rank numbers its experts, -1 for those of other ranks.
    """
    total = torch.zeros_like(x)
    for expert in range(layer.w13_weight.shape[0]):
        rows, slots = (topk_ids == expert).nonzero(as_tuple=True)
        if len(rows) > 0:
            weights = topk_weights[rows, slots, None]
            outputs = _swiglu(layer, expert, x[rows]) * weights.to(x.dtype)
            total.index_add_(0, rows, outputs)
    return total


def _run_low_latency(layer: Any, dispatch_output: Any) -> torch.Tensor:
    """`[L, S, H]`, not weighted: combine does that. Rows behind the counts are left as they are."""
    x = dispatch_output.hidden_states
    outputs = torch.empty_like(x)
    for expert, num_rows in enumerate(dispatch_output.masked_m.tolist()):
        if num_rows > 0:
            outputs[expert, :num_rows] = _swiglu(layer, expert, x[expert, :num_rows])
    return outputs


def _swiglu(layer: Any, expert: int, rows: torch.Tensor) -> torch.Tensor:
    gate, up = F.linear(rows, layer.w13_weight[expert]).chunk(2, dim=-1)
    return F.linear(F.silu(gate) * up, layer.w2_weight[expert])
