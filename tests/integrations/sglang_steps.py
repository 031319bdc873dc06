"""What goes through SGLang's dispatcher in tests: inputs of all ranks in its types, and what must
come out, by the reference."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from sglang.srt.layers.moe.token_dispatcher import DispatchOutputChecker
from sglang.srt.layers.moe.token_dispatcher.deepep import (
    DeepEPLLCombineInput,
    DeepEPLLDispatchOutput,
    DeepEPNormalCombineInput,
    DeepEPNormalDispatchOutput,
)
from sglang.srt.layers.moe.topk import StandardTopKOutput

from ep_backend import DispatchResult
from tests.support import normal, scenario
from tests.support.normal import NormalCase, rows_for_home
from tests.support.scenario import Variant, check_received, run_experts, same_bits
from tests.support.shapes import Shape


class Step(Protocol):
    """One dispatch and its combine, on all ranks."""

    is_extend: bool
    """Whether SGLang calls this batch a prefill: in mode `auto` that decides on the kernels."""

    def x(self, rank: int) -> torch.Tensor: ...

    def topk(self, rank: int) -> StandardTopKOutput: ...

    def run_experts(
        self, output: DeepEPLLDispatchOutput | DeepEPNormalDispatchOutput, rank: int
    ) -> DeepEPLLCombineInput | DeepEPNormalCombineInput:
        """Checks what a rank received, and computes."""

    def check_combined(self, out: torch.Tensor, rank: int) -> None: ...


@dataclass
class LowLatencyStep:
    shape: Shape
    variant: Variant
    is_extend: bool = False

    def x(self, rank: int) -> torch.Tensor:
        return self.variant.x[rank]

    def topk(self, rank: int) -> StandardTopKOutput:
        return _topk(self.variant.topk_weights[rank], self.variant.topk_idx[rank])

    def run_experts(self, output: DeepEPLLDispatchOutput, rank: int) -> DeepEPLLCombineInput:
        assert DispatchOutputChecker.format_is_deepep_ll(output)
        assert not self.shape.is_float8 or output.hidden_states_scale is not None
        result = DispatchResult(
            None,  # type: ignore[arg-type]  # the dispatcher keeps it
            output.hidden_states,
            output.hidden_states_scale,
            None,
            None,
            output.masked_m,
        )
        check_received(result, self.variant, self.shape, rank)
        rows = run_experts(result, self.shape, rank)
        return DeepEPLLCombineInput(rows, output.topk_ids, output.topk_weights)

    def check_combined(self, out: torch.Tensor, rank: int) -> None:
        scenario.check_combined(out, self.variant, rank)


@dataclass
class NormalStep:
    case: NormalCase
    is_extend: bool = True

    def x(self, rank: int) -> torch.Tensor:
        return self.case.x[rank]

    def topk(self, rank: int) -> StandardTopKOutput:
        return _topk(self.case.topk_weights[rank], self.case.topk_idx[rank])

    def run_experts(
        self, output: DeepEPNormalDispatchOutput, rank: int
    ) -> DeepEPNormalCombineInput:
        assert DispatchOutputChecker.format_is_deepep_normal(output)
        expected = self.case.received[rank]
        assert output.hidden_states_scale is None
        assert same_bits(output.hidden_states, expected.rows)
        assert output.topk_ids.dtype == torch.int64
        assert torch.equal(output.topk_ids, expected.topk_idx.long())
        assert same_bits(output.topk_weights, expected.topk_weights)
        assert output.num_recv_tokens_per_expert == expected.num_tokens_per_expert
        rows = rows_for_home(output.hidden_states, rank)
        return DeepEPNormalCombineInput(rows, output.topk_ids, output.topk_weights)

    def check_combined(self, out: torch.Tensor, rank: int) -> None:
        normal.check_combined(out, self.case, rank)


def _topk(weights: torch.Tensor, ids: torch.Tensor) -> StandardTopKOutput:
    # SGLang's routers make int32.
    return StandardTopKOutput(weights, ids.int(), router_logits=torch.empty(0))
