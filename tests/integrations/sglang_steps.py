"""What goes through SGLang's dispatcher in tests: inputs of all ranks in its types, and what must
come out, by the reference."""

from __future__ import annotations

from dataclasses import dataclass
from types import SimpleNamespace
from typing import Protocol

import torch
from ep_backend_sglang import sums
from ep_backend_sglang.standard_exchange import Received
from sglang.srt.layers.moe.token_dispatcher import DispatchOutputChecker
from sglang.srt.layers.moe.token_dispatcher.deepep import (
    DeepEPLLCombineInput,
    DeepEPLLDispatchOutput,
    DeepEPNormalCombineInput,
    DeepEPNormalDispatchOutput,
)
from sglang.srt.layers.moe.topk import StandardTopKOutput

from ep_backend import DispatchResult
from ep_backend.handles import count_rows_per_expert
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
        self, output: DeepEPLLDispatchOutput | DeepEPNormalDispatchOutput | Received, rank: int
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

    def run_experts(
        self, output: DeepEPLLDispatchOutput | Received, rank: int
    ) -> DeepEPLLCombineInput:
        if isinstance(output, Received):
            return self._run_experts_by_token(output, rank)
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

    def _run_experts_by_token(self, output: Received, rank: int) -> DeepEPLLCombineInput:
        assert DispatchOutputChecker.format_is_standard(output)
        weights, ids, _ = output.topk_output
        x, weights, ids = (
            part.unflatten(0, (self.shape.num_ranks, -1))
            for part in (output.hidden_states, weights, ids)
        )
        result = DispatchResult(
            SimpleNamespace(num_messages=(ids >= 0).any(2).sum(1)),  # type: ignore[arg-type]
            *(x, None, ids, weights),
            count_rows_per_expert(ids, self.shape.num_experts // self.shape.num_ranks),
        )
        check_received(result, self.variant, self.shape, rank)
        with sums.into(output.combine_input) as target:
            rows = target.rows_or(run_experts(result, self.shape, rank).flatten(0, 1))
        combine_input = output.to_combine(rows)
        assert isinstance(combine_input, DeepEPLLCombineInput)
        return combine_input

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
        self, output: DeepEPNormalDispatchOutput | Received, rank: int
    ) -> DeepEPNormalCombineInput:
        if isinstance(output, Received):
            return self._run_experts_in_standard_format(output, rank)
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

    def _run_experts_in_standard_format(
        self, output: Received, rank: int
    ) -> DeepEPNormalCombineInput:
        assert DispatchOutputChecker.format_is_standard(output)
        expected, (weights, ids, _) = self.case.received[rank], output.topk_output
        assert same_bits(output.hidden_states, expected.rows)
        assert ids.dtype == torch.int32
        assert torch.equal(ids, expected.topk_idx)
        assert same_bits(weights, expected.topk_weights)
        combine_input = output.to_combine(rows_for_home(output.hidden_states, rank))
        assert isinstance(combine_input, DeepEPNormalCombineInput)
        return combine_input

    def check_combined(self, out: torch.Tensor, rank: int) -> None:
        normal.check_combined(out, self.case, rank)


def _topk(weights: torch.Tensor, ids: torch.Tensor) -> StandardTopKOutput:
    # SGLang's routers make int32.
    return StandardTopKOutput(weights, ids.int(), router_logits=torch.empty(0))
