"""What sends and receives in SGLang's dispatcher, for experts that take its standard format.

T tokens of this rank, R ranks, S slots of each, K top_k, H hidden.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from sglang.srt.eplb.expert_distribution import get_global_expert_distribution_recorder
from sglang.srt.layers.dp_attention import get_dp_global_num_tokens, is_dp_attention_enabled
from sglang.srt.layers.moe.token_dispatcher import deepep
from sglang.srt.layers.moe.token_dispatcher.base import DispatchOutputFormat
from sglang.srt.layers.moe.token_dispatcher.deepep import (
    DeepEPLLCombineInput,
    DeepEPNormalCombineInput,
)
from sglang.srt.layers.moe.topk import StandardTopKOutput
from sglang.srt.layers.moe.utils import is_tbo_enabled
from sglang.srt.runtime_context import get_exec, get_parallel

from ep_backend import DispatchResult, LowLatencyBuffer
from ep_backend_sglang.buffer import has_workspaces, require_room

MOST_SMALL_TOKENS = 2048
"""Of a rank, that low-latency kernels take in workspaces, if SGLang does not say more. With normal
ones a prefill step waits for the host in each layer, and no graph holds its exchange: first tokens
come later, as `NUMBERS.md` says of 512."""

WORKSPACE_BYTES = 256 << 20
"""Of rows and of their sums, in the workspace of as many tokens at most: of 8 ranks with rows of
7168 bfloat16 1152."""

_sizes_of_whole: tuple[int, ...] = ()
"""In two-batch overlap: tokens of each rank, of the batch whose halves run."""

CombineInput = type[DeepEPLLCombineInput] | type[DeepEPNormalCombineInput]


@dataclass
class Received:
    """SGLang's `StandardDispatchOutput`, and what belongs to it here."""

    hidden_states: torch.Tensor
    """`[N, H]`; N is R * S in low latency."""
    topk_output: StandardTopKOutput
    """`[N, K]`: weights, and local experts, -1 elsewhere."""
    own_topk: StandardTopKOutput
    """`[T, K]`, of this rank's tokens."""
    combine_input_type: CombineInput
    """By which SGLang knows which kernels a combine is for."""
    combine_input: torch.Tensor | None = None
    """`[N, H]`, where the experts are to leave their sums; None: anywhere."""
    hidden_states_scale: None = None
    hidden_states_pre_quant: None = None

    @property
    def format(self) -> DispatchOutputFormat:
        return DispatchOutputFormat.STANDARD

    def to_combine(self, rows: torch.Tensor) -> DeepEPLLCombineInput | DeepEPNormalCombineInput:
        """Of `rows` `[N, H]`, weighted and summed over k."""
        weights, ids, *_ = self.own_topk
        return self.combine_input_type(rows, ids, weights)


class _InFlight(NamedTuple):
    buffer: LowLatencyBuffer
    result: DispatchResult
    combine_input: torch.Tensor | None


class LowLatency(deepep._DeepEPDispatcherImplLowLatency):
    """A received row is at `source * S + slot`.

    Args:
        workspace: of the buffer, where it has several: one of each half of a batch.
    """

    num_max_dispatch_tokens_per_rank: int

    def __init__(self, workspace: int, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self._num_workspaces = 0
        if has_workspaces():
            self._num_workspaces = 2 if is_tbo_enabled() else 1  # one for each half of a batch
            self.num_max_dispatch_tokens_per_rank = max(
                self.num_max_dispatch_tokens_per_rank,
                most_small_tokens(self.group.size(), self.hidden_size * self.params_dtype.itemsize),
            )
        self._workspace = workspace
        self._in_flight: _InFlight | None = None

    @classmethod
    def like(cls, other: Any, idx: int) -> LowLatency:
        """For the half `idx` of a batch."""
        return cls(idx, return_recv_hook=other.return_recv_hook, **_common(other))

    def dispatch_a(self, hidden_states: torch.Tensor, topk_output: Any) -> tuple[Any, ...]:
        ours = self._get_buffer()
        topk_output = _routes_of_all(hidden_states, topk_output)
        weights, ids = topk_output.topk_weights, topk_output.topk_ids
        buffer = ours.low_latency_by_token(
            hidden_states,
            ids,
            self.num_max_dispatch_tokens_per_rank,
            self.num_experts,
            self._num_workspaces,
        )
        num_slots = self._slots_for(hidden_states, buffer.num_max_tokens_per_rank)
        require_room(num_slots, buffer.num_max_tokens_per_rank)
        place = {}
        if self._num_workspaces > 0:
            place = {"workspace": self._workspace, "num_slots": num_slots}
        call = (hidden_states.contiguous(), ids, weights)
        hook: Callable[[], None] = _do_nothing
        if ours.is_at_once:
            result = buffer.dispatch_and_receive(*call, **place)
        else:
            result, hook = buffer.dispatch(*call, **place)
        combine_input = buffer.combine_input(**place) if place else None
        self._in_flight = _InFlight(buffer, result, combine_input)
        return topk_output, hook

    def dispatch_b(self, topk_output: Any, hook: Callable[[], None]) -> Received:
        hook()
        assert self._in_flight is not None
        _, result, combine_input = self._in_flight
        assert result.recv_topk_idx is not None
        assert result.recv_topk_weights is not None
        ids = result.recv_topk_idx.flatten(0, 1)
        if get_exec().moe.expert_distribution_recorder_mode is not None:  # counting takes kernels
            recorder = get_global_expert_distribution_recorder()
            recorder.on_deepep_dispatch_low_latency(result.num_recv_tokens_per_expert)
        return Received(
            result.recv_x.flatten(0, 1),
            StandardTopKOutput(result.recv_topk_weights.flatten(0, 1), ids, None),
            topk_output,
            DeepEPLLCombineInput,
            None if combine_input is None else combine_input.flatten(0, 1),
        )

    def combine_a(self, hidden_states: torch.Tensor, **of_source: Any) -> tuple[Any, ...]:
        assert self._in_flight is not None
        buffer, result, combine_input = self._in_flight
        self._in_flight = None
        rows = combine_input
        if rows is None:
            rows = hidden_states.view_as(result.recv_x)
        if self._get_buffer().is_at_once:
            return buffer.combine_and_receive(rows, result.handle), _do_nothing
        return buffer.combine(rows, result.handle)

    def combine_b(self, hidden_states: torch.Tensor, hook: Callable[[], None]) -> torch.Tensor:
        hook()
        return hidden_states

    def _slots_for(self, hidden_states: torch.Tensor, most: int) -> int:
        """S, the same on all ranks. Ranks have as many tokens as they have said, of which each of
        those that share attention has its part; or as many as all others, those that a graph pads
        among them. How large the halves of a batch are, they do not say: no larger than it, and
        no larger than what a dispatch takes, `most`."""
        sizes = get_dp_global_num_tokens()
        is_half = not sizes
        sizes = sizes or _sizes_of_whole
        if len(sizes) <= 1:
            self._require_same_batch()
            return max(1, len(hidden_states))
        largest = -(-max(sizes) // get_parallel().attn_tp_size)
        return max(1, min(largest, most) if is_half else largest, len(hidden_states))

    def _require_same_batch(self) -> None:
        """Of all ranks, where they have not said how many tokens each has.

        Raises:
            RuntimeError: attention is data-parallel: they need not have as many.
        """
        if is_dp_attention_enabled() and self.group.size() > 1 and self._num_workspaces > 0:
            raise RuntimeError(
                "with data-parallel attention ranks must know how many tokens each has, but SGLang "
                "has not asked them. Leave SGLANG_SCHEDULER_SKIP_ALL_GATHER out; or, with experts "
                "that take DeepEP's formats, set EP_BACKEND_SGLANG_FORMAT=deepep."
            )


class Normal(deepep._DeepEPDispatcherImplNormal):
    """A row for each token that a source has for this rank, in the order of sources."""

    @classmethod
    def like(cls, other: Any, idx: int) -> Normal:
        return cls(async_finish=other.async_finish, **_common(other))

    def dispatch_a(self, hidden_states: torch.Tensor, topk_output: Any) -> tuple[Any, ...]:
        return hidden_states, _routes_of_all(hidden_states, topk_output), self._event()

    def dispatch_b(self, hidden_states: torch.Tensor, topk_output: Any, event: Any) -> Received:
        weights, ids = topk_output.topk_weights, topk_output.topk_ids
        received = super().dispatch_b(hidden_states, ids, weights, event)
        return Received(
            received.hidden_states,
            StandardTopKOutput(received.topk_weights, received.topk_ids, None),
            topk_output,
            DeepEPNormalCombineInput,
        )

    def combine_a(self, hidden_states: torch.Tensor, **of_source: Any) -> tuple[Any, ...]:
        return hidden_states, self._event()

    def _event(self) -> Any:
        return deepep.Buffer.capture() if self.async_finish else None


def keep_sizes_of_whole(set_dp_buffer_len: Callable[..., None]) -> Callable[..., None]:
    """That of SGLang's two-batch overlap, which forgets the batch's sizes: its halves have none."""

    @functools.wraps(set_dp_buffer_len)
    def keep_and_set(*args: Any, **kwargs: Any) -> None:
        global _sizes_of_whole
        _sizes_of_whole = tuple(get_dp_global_num_tokens() or _sizes_of_whole)
        set_dp_buffer_len(*args, **kwargs)

    return keep_and_set


def _routes_of_all(hidden_states: torch.Tensor, topk_output: Any) -> Any:
    """`[T, K]`. In two-batch overlap SGLang gives ranks without requests as many rows as the others
    have, but lists no experts for them: they have none."""
    weights, ids, *_ = topk_output
    if len(ids) == len(hidden_states):
        return topk_output
    shape = len(hidden_states), ids.shape[1]
    return StandardTopKOutput(weights.new_zeros(shape), ids.new_full(shape, -1), None)


def most_small_tokens(num_ranks: int, row_bytes: int) -> int:
    """Of a rank; see `MOST_SMALL_TOKENS`."""
    fitting = WORKSPACE_BYTES // (num_ranks * 2 * row_bytes)
    return min(MOST_SMALL_TOKENS, fitting // 64 * 64)


def _common(of: Any) -> dict[str, Any]:
    names = (
        *("group", "router_topk", "permute_fusion", "num_experts", "num_local_experts"),
        *("hidden_size", "params_dtype", "deepep_mode", "runner_backend"),
    )
    return {name: getattr(of, name) for name in names if hasattr(of, name)}


def _do_nothing() -> None:
    pass
