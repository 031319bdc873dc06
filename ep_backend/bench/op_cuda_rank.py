"""One virtual rank of the CUDA benchmark: its tensors, its operations, and whether they are right.

T tokens of this rank, H hidden, K top_k, R ranks, M num_max_tokens_per_rank, L local experts,
S = R * M rows an expert has room for.

The experts only scale: expert e multiplies by `1 + e % 4`, so that a row of the wrong expert shows.
Their output is made once, from the rows of the first dispatch; inputs never change, so it stays
right. All terms of a sum have the sign of x: nothing cancels, and errors are relative.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import TypeVar

import torch

from ep_backend import DispatchHandle, DispatchResult, LowLatencyBuffer, RecvHook
from ep_backend.bench.routing import Inputs
from ep_backend.reference import CHANNELS_PER_SCALE

# Roundings to bfloat16, 2^-8 each: expert's row, partial row, sum; and what they compound.
BF16_TOLERANCE = 4 * 2.0**-8
# Half a step of e4m3; below its smallest normal number, 2^-10 times the scale, amax / 448.
FP8_TOLERANCE = 2.0**-4
FP8_SUBNORMAL = 2.0**-10 / 448


T = TypeVar("T")


class CheckFailed(RuntimeError):
    """A result is wrong; no time of its case is reported."""


class RankOps:
    """The operations of one rank in one case, on tensors that stay where they are."""

    def __init__(self, buffer: LowLatencyBuffer, inputs: Inputs, form: str) -> None:
        self.buffer = buffer
        self._is_fused = form == "fused"
        self._x = inputs.x.to(buffer.device)
        self._topk_idx = inputs.topk_idx.to(buffer.device)
        self._topk_weights = inputs.topk_weights.to(buffer.device)
        self._combine_weights = self._topk_weights if buffer.reduction == "source" else None
        # All ranks have as many tokens.
        self._num_slots = len(self._x) if buffer.num_workspaces > 0 else None
        self._out = torch.empty_like(self._x)
        self._expert_out = torch.empty(0)

    def dispatch(self) -> DispatchResult:
        """A whole dispatch, in the case's form."""
        if self._is_fused:
            return self.buffer.dispatch_and_receive(
                self._x, self._topk_idx, self._topk_weights, num_slots=self._num_slots
            )
        result, recv_hook = self.send_dispatch()
        recv_hook()
        return result

    def pair(self) -> DispatchResult:
        """A whole dispatch and its combine."""
        result = self.dispatch()
        if self._is_fused:
            self.buffer.combine_and_receive(
                self._expert_out, result.handle, self._out, self._combine_weights
            )
        else:
            self.send_combine(result.handle)()
        return result

    def send_dispatch(self) -> tuple[DispatchResult, RecvHook]:
        return self.buffer.dispatch(
            self._x, self._topk_idx, self._topk_weights, num_slots=self._num_slots
        )

    def send_combine(self, handle: DispatchHandle) -> RecvHook:
        _, recv_hook = self.buffer.combine(
            self._expert_out, handle, self._out, self._combine_weights
        )
        return recv_hook

    def make_expert_out(self, result: DispatchResult) -> None:
        """From the rows of a received dispatch. What combine must not read is NaN."""
        if self.buffer.num_workspaces > 0:
            self._expert_out = self.buffer.combine_input(num_slots=self._num_slots).fill_(torch.nan)
        else:
            self._expert_out = torch.full(
                result.recv_x.shape, torch.nan, dtype=torch.bfloat16, device=self.buffer.device
            )
        used, rows = self._scaled_rows(result)
        self._expert_out[used] = rows

    def poison(self, result: DispatchResult) -> None:
        """Overwrites with NaN what a pair with this result will write."""
        self._out.fill_(torch.nan)
        result.recv_x.view(torch.uint8).fill_(0xFF)
        if result.recv_scales is not None:
            result.recv_scales.fill_(torch.nan)

    def check(self, what: str, result: DispatchResult) -> float:
        """Of a finished pair; returns its error, relative to the result (of all elements).

        Raises:
            CheckFailed: the experts' rows are not those of the first dispatch, or sums are wrong.
        """
        rank = self.buffer.group.self_rank
        used, rows = self._scaled_rows(result)
        if not torch.equal(self._expert_out[used], rows):
            raise CheckFailed(f"{what}: rows that rank {rank} received differ from its first ones")
        return check_combined(
            f"{what}: rank {rank}'s combine",
            self._out,
            self._x,
            self._topk_idx,
            self._topk_weights,
            (self.buffer.dispatch_dtype, self.buffer.combine_dtype),
        )

    def _scaled_rows(self, result: DispatchResult) -> tuple[tuple[torch.Tensor, ...], torch.Tensor]:
        """What the experts make of the rows received.

        Returns:
            The index of the N rows in use (into the first two dimensions of `recv_x`), and
            `[N, H]` bfloat16: scaled, rank-major also weighted and summed over the local experts.
        """
        is_expert_major = result.recv_topk_idx is None
        counts = (
            result.num_recv_tokens_per_expert
            if is_expert_major
            else result.num_recv_tokens_per_rank
        )
        slots = torch.arange(result.recv_x.shape[1], device=self.buffer.device)
        used = torch.nonzero(slots < counts[:, None], as_tuple=True)
        # As bytes: not every version of PyTorch indexes float8.
        raw = result.recv_x.view(torch.uint8)[used]
        values = raw.view(self.buffer.dispatch_dtype).float()
        if result.recv_scales is not None:
            scales = result.recv_scales[used].repeat_interleave(CHANNELS_PER_SCALE, dim=1)
            values *= scales[:, : self.buffer.hidden]
        if result.recv_topk_idx is None or result.recv_topk_weights is None:
            factors = expert_factor(self.buffer.first_expert + used[0])
        else:
            local_idx = result.recv_topk_idx[used]
            weights = torch.where(local_idx >= 0, result.recv_topk_weights[used], 0)
            factors = (weights * expert_factor(self.buffer.first_expert + local_idx)).sum(1)
        return used, (values * factors[:, None]).to(torch.bfloat16)


def expert_factor(expert: torch.Tensor) -> torch.Tensor:
    return 1.0 + expert % 4


def check_combined(
    what: str,
    out: torch.Tensor,
    x: torch.Tensor,
    topk_idx: torch.Tensor,
    topk_weights: torch.Tensor,
    travelling_dtypes: Iterable[torch.dtype],
) -> float:
    """Of what combine gave, `[T, H]`, for the experts above; returns its error, relative to the
    result (of all elements).

    Args:
        travelling_dtypes: of the rows of dispatch and combine.

    Raises:
        CheckFailed: an element is off by more than its roundings.
    """
    expected = x.float() * (topk_weights * expert_factor(topk_idx)).sum(1, keepdim=True)
    tolerance = expected.abs() * BF16_TOLERANCE
    row_amax = expected.abs().amax(1, keepdim=True)  # not below that of any channel group
    for dtype in travelling_dtypes:
        if dtype == torch.float8_e4m3fn:
            # Of what has its error already.
            tolerance += (expected.abs() + tolerance) * FP8_TOLERANCE + row_amax * FP8_SUBNORMAL
    error = out.float() - expected
    is_right = error.abs() <= tolerance  # NaN is not
    if not bool(is_right.all()):
        raise CheckFailed(f"{what}: {int((~is_right).sum())} elements are wrong")
    return float(error.norm() / expected.norm())


def run_lockstep(ranks: list[RankOps], *, is_first: bool) -> list[DispatchResult]:
    """One pair of every rank, step by step. The first makes the experts' output."""
    dispatched = _on_all(ranks, RankOps.send_dispatch)
    _on_all(ranks, lambda rank: dispatched[rank][1]())
    results = {rank: result for rank, (result, _) in dispatched.items()}
    if is_first:
        for rank, result in results.items():
            rank.make_expert_out(result)
    hooks = _on_all(ranks, lambda rank: rank.send_combine(results[rank].handle))
    _on_all(ranks, lambda rank: hooks[rank]())
    return list(results.values())


def _on_all(ranks: list[RankOps], step: Callable[[RankOps], T]) -> dict[RankOps, T]:
    """A step of every rank; each on a stream of its own, because one may wait for another."""
    if ranks[0].buffer.device.type == "cpu":
        return {rank: step(rank) for rank in ranks}
    torch.cuda.synchronize()
    outcomes = {}
    for rank in ranks:
        with torch.cuda.stream(torch.cuda.Stream()):
            outcomes[rank] = step(rank)
    torch.cuda.synchronize()
    return outcomes
