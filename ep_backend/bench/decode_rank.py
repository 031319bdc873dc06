"""One rank of the decode benchmark: its experts, its micro-batches, and a step's layers.

T tokens of a micro-batch, H hidden, I intermediate, K top_k, L experts of this rank, R ranks,
S = R * T rows an expert has room for.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch.nn import functional

from ep_backend import DispatchHandle, DispatchResult, Group, LowLatencyBuffer, RecvHook
from ep_backend.bench.decode_settings import Case, DecodeSettings, MoEShape
from ep_backend.bench.routing import Inputs, make_inputs

TIMEOUT_SECS = 20.0
NUM_CHECKED_TOKENS = 2
# Relative to the norm: roundings to bfloat16 of inputs, of two GEMMs, and of what travels.
TOLERANCE = 0.05
PARTS = ("step", "exchange", "experts")
"""What is timed: all of it, only dispatches and combines, only the experts."""


class CheckFailed(RuntimeError):
    """A result is wrong; no time of its case is reported."""


class Experts:
    """SwiGLU experts of one rank. An expert's weights depend on the seed and its number only, so
    that any rank can make them.

    Args:
        experts: global numbers of this rank's.
    """

    def __init__(
        self, shape: MoEShape, experts: range, seed: int, dtype: torch.dtype, device: torch.device
    ) -> None:
        self._shape, self._seed = shape, seed
        hidden, inner, size = shape.hidden, shape.intermediate, len(experts)
        self.up = torch.empty(size, hidden, 2 * inner, dtype=dtype, device=device)
        self.down = torch.empty(size, inner, hidden, dtype=dtype, device=device)
        for i, expert in enumerate(experts):
            self._fill(expert, self.up[i], self.down[i])

    def __call__(
        self, rows: torch.Tensor, counts: torch.Tensor, out: torch.Tensor | None = None
    ) -> torch.Tensor:
        """`[L, S, H]` -> `[L, S, H]`, rows in use alone.

        Args:
            counts: `[L]` int32, rows in use of each expert. On a GPU nobody waits for them.
            out: default: a new tensor.
        """
        if rows.is_cuda:
            from ep_backend.bench.decode_gemm import masked_mlp  # needs Triton

            return masked_mlp(rows, self.up, self.down, counts, out)
        out = torch.empty_like(rows) if out is None else out
        for i, n in enumerate(counts.tolist()):
            if n > 0:
                out[i, :n] = self._mlp(rows[i, :n], self.up[i], self.down[i])
        return out

    def of_token(self, x: torch.Tensor, expert: int) -> torch.Tensor:
        """`[H]` -> `[H]`, by an expert of any rank."""
        up, down = torch.empty_like(self.up[0]), torch.empty_like(self.down[0])
        self._fill(expert, up, down)
        return self._mlp(x[None], up, down)[0]

    def _fill(self, expert: int, up: torch.Tensor, down: torch.Tensor) -> None:
        generator = torch.Generator(up.device).manual_seed(self._seed * 100_003 + expert)
        up.normal_(0, self._shape.hidden**-0.5, generator=generator)
        down.normal_(0, self._shape.intermediate**-0.5, generator=generator)

    @staticmethod
    def _mlp(x: torch.Tensor, up: torch.Tensor, down: torch.Tensor) -> torch.Tensor:
        gate, value = (x @ up).chunk(2, dim=-1)
        return (functional.silu(gate) * value) @ down


@dataclass(eq=False)
class MicroBatch:
    """Tensors that stay where they are, for all layers of all steps."""

    x: torch.Tensor
    topk_idx: torch.Tensor
    topk_weights: torch.Tensor
    out: torch.Tensor
    workspace: int
    result: DispatchResult | None = None
    """Of the last dispatch."""
    expert_out: torch.Tensor | None = None


class DecodeRank:
    """A step's layers on one rank."""

    def __init__(
        self, settings: DecodeSettings, case: Case, group: Group, device: torch.device
    ) -> None:
        shape, num_batches = settings.shape, case.num_micro_batches
        self._settings = settings
        self._num_layers, self._hidden = settings.num_layers, shape.hidden
        in_workspace = settings.layout == "expert_workspace"
        sizes = [
            case.num_tokens * (i + 1) // num_batches - case.num_tokens * i // num_batches
            for i in range(num_batches)
        ]
        self.buffer = LowLatencyBuffer(
            group,
            num_max_tokens_per_rank=max(sizes),
            hidden=shape.hidden,
            num_experts=shape.num_experts,
            top_k=shape.top_k,
            dtype=settings.dtype,
            reduction="source" if in_workspace else "rank",
            num_workspaces=num_batches if in_workspace else 0,
            timeout_secs=TIMEOUT_SECS,
            device=device,
        )
        first = self.buffer.first_expert
        own = range(first, first + self.buffer.num_local_experts)
        self._experts = Experts(shape, own, settings.seed, settings.dtype, device)
        given = inputs_of(settings, group.self_rank, case.num_tokens)
        self.batches: list[MicroBatch] = []
        for i, size in enumerate(sizes):
            some = slice(sum(sizes[:i]), sum(sizes[:i]) + size)
            x = given.x[some].to(device)
            idx, weights = given.topk_idx[some].to(device), given.topk_weights[some].to(device)
            self.batches.append(MicroBatch(x, idx, weights, torch.empty_like(x), i))

    def run(self, part: str) -> None:
        """A step, or a part of it, of `PARTS`. Parts need that a step was run before."""
        with_exchange, with_experts = part != "experts", part != "exchange"
        for _ in range(self._num_layers):
            if not with_exchange:
                for batch in self.batches:
                    self._compute(batch)
            elif len(self.batches) == 1:
                self._layer(self.batches[0], with_experts)
        if with_exchange and len(self.batches) == 2:
            first, second = self.batches
            self._overlapped(first, second, with_experts)

    def check(self) -> float:
        """The error of some tokens of the last step, relative to their norm.

        Raises:
            CheckFailed: it is too large.
        """
        worst = 0.0
        for batch in self.batches:
            for token in range(min(NUM_CHECKED_TOKENS, len(batch.x))):
                x = batch.x[token]
                expected = torch.zeros_like(x, dtype=torch.float32)
                for k, expert in enumerate(batch.topk_idx[token].tolist()):
                    weight = batch.topk_weights[token, k]
                    expected += weight * self._experts.of_token(x, expert).float()
                error = (batch.out[token].float() - expected).norm() / expected.norm()
                worst = max(worst, float(error))
        if not worst <= TOLERANCE:
            rank = self.buffer.group.self_rank
            raise CheckFailed(f"a token of rank {rank} is wrong by {worst:.2g} of its norm")
        return worst

    def warm_up(self) -> None:
        """Has Triton compile what experts run, which it could not while a graph is captured.

        The kernels depend on whether S is small; so this takes what a dispatch gives them."""
        num_rows = self.buffer.group.num_ranks * self.buffer.num_max_tokens_per_rank
        rows = self.batches[0].x.new_zeros(self.buffer.num_local_experts, num_rows, self._hidden)
        self._experts(rows, torch.zeros(len(rows), dtype=torch.int32, device=rows.device))

    def forget(self) -> None:
        """What a step must write anew."""
        for batch in self.batches:
            batch.out.fill_(torch.nan)

    def _layer(self, batch: MicroBatch, with_experts: bool) -> None:
        x, idx, weights, place = self._dispatch_arguments(batch)
        batch.result = self.buffer.dispatch_and_receive(x, idx, weights, workspace=place)
        if with_experts:
            self._compute(batch)
        rows, handle, weights = self._combine_arguments(batch)
        self.buffer.combine_and_receive(rows, handle, batch.out, weights)

    def _overlapped(self, a: MicroBatch, b: MicroBatch, with_experts: bool) -> None:
        """While one micro-batch computes, the other's rows fly.

        a:  send  . . .  hook experts send  . . . . . . .  hook | send
        b:        send  . . . . . . . .  hook experts send  . . . . . hook | send
        """
        hook_a = self._send(a)
        for layer in range(self._num_layers):
            hook_b = self._send(b)
            hook_a()
            home_a = self._answer(a, with_experts)
            hook_b()
            home_b = self._answer(b, with_experts)
            home_a()
            if layer + 1 < self._num_layers:
                hook_a = self._send(a)
            home_b()

    def _send(self, batch: MicroBatch) -> RecvHook:
        x, idx, weights, place = self._dispatch_arguments(batch)
        batch.result, recv_hook = self.buffer.dispatch(x, idx, weights, workspace=place)
        return recv_hook

    def _answer(self, batch: MicroBatch, with_experts: bool) -> RecvHook:
        if with_experts:
            self._compute(batch)
        rows, handle, weights = self._combine_arguments(batch)
        return self.buffer.combine(rows, handle, batch.out, weights)[1]

    def _compute(self, batch: MicroBatch) -> None:
        result = batch.result
        assert result is not None
        out = None
        if self.buffer.num_workspaces > 0:
            out = self.buffer.combine_input(batch.workspace)
        batch.expert_out = self._experts(result.recv_x, result.num_recv_tokens_per_expert, out)

    def _dispatch_arguments(
        self, batch: MicroBatch
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None, int]:
        weights = batch.topk_weights if self.buffer.reduction == "rank" else None
        place = batch.workspace if self.buffer.num_workspaces > 0 else 0
        return batch.x, batch.topk_idx, weights, place

    def _combine_arguments(
        self, batch: MicroBatch
    ) -> tuple[torch.Tensor, DispatchHandle, torch.Tensor | None]:
        assert batch.result is not None
        assert batch.expert_out is not None
        weights = batch.topk_weights if self.buffer.reduction == "source" else None
        return batch.expert_out, batch.result.handle, weights


def inputs_of(settings: DecodeSettings, rank: int, num_tokens: int) -> Inputs:
    shape = settings.shape
    return make_inputs(
        settings.seed,
        rank,
        num_tokens=num_tokens,
        hidden=shape.hidden,
        num_experts=shape.num_experts,
        top_k=shape.top_k,
        dtype=settings.dtype,
    )
