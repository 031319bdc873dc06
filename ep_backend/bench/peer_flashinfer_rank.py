"""The process that `peer_flashinfer` starts: virtual ranks on one GPU through FlashInfer's calls,
checked and timed as ours are.

It reads a JSON object from stdin, `settings`, `cases`, and `output`, a file to which it adds a line
of JSON for each case. Without cases it only builds FlashInfer's kernels.

T tokens of a rank, H hidden, K top_k, R ranks.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Sequence
from functools import partial
from importlib import import_module
from typing import Any

import torch

from ep_backend.bench.op_cuda_case import inputs_of, single_and_cold
from ep_backend.bench.op_cuda_graph import Spread, capture, time_replays
from ep_backend.bench.op_cuda_rank import check_combined, expert_factor
from ep_backend.bench.op_cuda_report import reason
from ep_backend.bench.op_cuda_settings import TRAVELLING_DTYPES, CudaBenchSettings
from ep_backend.bench.peer_flashinfer import FlashInferCase, FlashInferRow
from ep_backend.bench.routing import Inputs
from ep_backend.reference import dequantize, experts_of_rank, quantize


class FlashInferRank:
    """The operations of one rank, on tensors that stay where they are."""

    def __init__(
        self,
        comm: Any,
        workspace: torch.Tensor,
        rank: int,
        inputs: Inputs,
        payloads: list[torch.Tensor],
        num_experts: int,
        dispatch_dtype: torch.dtype,
    ) -> None:
        """
        Args:
            comm: the module `flashinfer.comm`.
            workspace: `[R, bytes]` uint8, of all ranks.
            payloads: what `payloads_of` made of `inputs`.
        """
        device = workspace.device
        self._comm = comm
        self._workspace = workspace
        self._rank = rank
        self._num_experts = num_experts
        self._dispatch_dtype = dispatch_dtype
        self._x = inputs.x.to(device)
        self._topk_idx = inputs.topk_idx.to(device)
        self._topk_weights = inputs.topk_weights.to(device)
        self._payloads = payloads
        self._out = torch.empty_like(self._x)
        self._received: list[torch.Tensor] = []
        self._combine_offset = 0
        self._experts = experts_of_rank(num_experts, len(workspace), rank)
        self._metainfo = comm.moe_a2a_initialize(workspace, rank, len(workspace), len(self._x))

    def dispatch(self) -> None:
        self._received, self._combine_offset, _ = self._comm.moe_a2a_dispatch(
            self._payloads[-2],
            self._payloads,
            self._workspace,
            self._metainfo,
            len(self._x),
            self._rank,
            len(self._workspace),
            self._topk_idx.shape[1],
            self._num_experts,
        )

    def run_experts(self) -> None:
        """The experts of op_cuda_rank.py: from what has come, to where combine reads. What it must
        not read is NaN."""
        x, *scales, ids, weights = self._received
        # Slots that no token has come to keep the experts of older ones.
        self._comm.moe_a2a_sanitize_expert_ids(ids, self._workspace, self._metainfo, self._rank, -1)
        rows = x.view(self._dispatch_dtype)
        values = dequantize(rows, scales[0]) if scales else rows.float()
        is_local = (ids >= self._experts.start) & (ids < self._experts.stop)
        factors = torch.where(is_local, weights * expert_factor(ids), 0).sum(-1)
        factors.masked_fill_(~is_local.any(-1), torch.nan)
        self._expert_out().copy_(values * factors[..., None])

    def combine(self) -> None:
        self._comm.moe_a2a_combine(
            self._expert_out(),
            len(self._x),
            self._workspace,
            self._metainfo,
            len(self._x),
            self._rank,
            len(self._workspace),
            self._topk_idx.shape[1],
            self._combine_offset,
            payload_in_workspace=True,
            output=self._out,
        )

    def _expert_out(self) -> torch.Tensor:
        """`[R, T, H]` in the workspace, for all pairs: like ours, combine copies nothing."""
        num_ranks, (num_tokens, hidden) = len(self._workspace), self._x.shape
        num_bytes = num_ranks * num_tokens * hidden * self._x.itemsize
        rows = self._workspace[self._rank, self._combine_offset :][:num_bytes]
        return rows.view(self._x.dtype).view(num_ranks, num_tokens, hidden)

    def poison(self) -> None:
        """Overwrites with NaN what a pair will write."""
        self._out.fill_(torch.nan)
        for payload in self._received:
            payload.view(torch.uint8).fill_(0xFF)

    def check(self) -> float:
        """Of a pair with experts; returns its error.

        Raises:
            CheckFailed: sums are wrong.
        """
        return check_combined(
            f"FlashInfer: rank {self._rank}'s combine",
            self._out,
            self._x,
            self._topk_idx,
            self._topk_weights,
            (self._dispatch_dtype,),
        )


def payloads_of(
    inputs: Inputs, dispatch_dtype: torch.dtype, device: torch.device
) -> list[torch.Tensor]:
    """What a rank dispatches: rows `[T, H]`, their scales where they are float8, experts `[T, K]`
    int32, weights `[T, K]` float32. Float8 goes as bytes, which any exchange of tensors knows."""
    rows = [inputs.x]
    if dispatch_dtype == torch.float8_e4m3fn:
        float8, scales = quantize(inputs.x)
        rows = [float8.view(torch.uint8), scales.contiguous()]
    return [t.to(device) for t in (*rows, inputs.topk_idx.int(), inputs.topk_weights)]


def make_ranks(
    comm: Any, settings: CudaBenchSettings, case: FlashInferCase, device: torch.device
) -> list[FlashInferRank]:
    """All ranks, in one workspace."""
    inputs = inputs_of(settings, case.num_ranks, case.num_tokens)
    dtype = TRAVELLING_DTYPES[case.dispatch_dtype]
    payloads = [payloads_of(i, dtype, device) for i in inputs]
    workspace_bytes = comm.moe_a2a_get_workspace_size_per_rank(
        case.num_ranks,
        case.num_tokens,
        sum(payload[0].nbytes for payload in payloads[0]),
        inputs[0].x[0].nbytes,
    )
    workspace = torch.zeros((case.num_ranks, workspace_bytes), dtype=torch.uint8, device=device)
    return [
        FlashInferRank(comm, workspace, rank, i, p, settings.num_experts, dtype)
        for rank, (i, p) in enumerate(zip(inputs, payloads, strict=True))
    ]


def measure(
    comm: Any, settings: CudaBenchSettings, case: FlashInferCase, device: torch.device
) -> FlashInferRow:
    """Checks a case, times it, and checks it again.

    FlashInfer gives a slot to whichever token comes first, so rows may lie elsewhere in every pair:
    the pairs that are checked have the experts in their graph, those that are timed do not.

    Raises:
        CheckFailed: a result is wrong.
    """
    ranks = make_ranks(comm, settings, case, device)

    def graph_of(operations: Sequence[Callable[[FlashInferRank], None]]) -> torch.cuda.CUDAGraph:
        def branch(rank: FlashInferRank) -> None:
            for operation in operations:
                operation(rank)

        return capture([partial(branch, rank) for rank in ranks])

    pair = [FlashInferRank.dispatch, FlashInferRank.combine]
    checked = graph_of([pair[0], FlashInferRank.run_experts, pair[1]])

    def check() -> float:
        for rank in ranks:
            rank.poison()
        checked.replay()
        return max(rank.check() for rank in ranks)

    check()
    pair_us = time_replays(graph_of(pair * settings.chain), settings.num_repeats)
    single, cold = single_and_cold(settings, graph_of(pair)) if settings.is_cold else (None, None)
    return FlashInferRow(case, Spread.of(pair_us, settings.chain), single, cold, check())


def settings_from_json(values: dict[str, Any]) -> CudaBenchSettings:
    """JSON has lists in place of tuples."""
    changed: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in values.items()}
    return CudaBenchSettings(**changed)


def main() -> int:
    request = json.load(sys.stdin)
    settings = settings_from_json(request["settings"])
    comm = import_module("flashinfer.comm")
    comm.moe_a2a_get_workspace_size_per_rank(1, 1, 16, 16)  # builds and loads its kernels
    for case in (FlashInferCase(**values) for values in request["cases"]):
        try:
            row = measure(comm, settings, case, torch.device("cuda"))
        except (RuntimeError, ValueError, TypeError) as e:
            row = FlashInferRow(case, error=reason(e))
        with open(request["output"], "a") as output:
            output.write(json.dumps(row.to_json()) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
