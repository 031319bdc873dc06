"""How many bytes a dispatch and a combine must move through memory, whoever implements them.

With T tokens of a rank and n rows handed to the experts, dispatch reads x once and writes n rows
(and their scales); combine reads n rows and writes T. Expert-major, n counts every (token, expert);
rank-major, every (token, rank). Staging between ranks, headers and counts come on top.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from ep_backend.reference import CHANNELS_PER_SCALE, experts_of_rank

BF16_BYTES = 2


@dataclass(frozen=True)
class PairBytes:
    """Of all virtual ranks together: they share one GPU's memory."""

    num_messages: int
    """(token, rank) pairs, a rank's own included."""
    num_rows: int
    """Handed to the experts."""
    dispatch_bytes: int
    combine_bytes: int
    staging_bytes: int
    """A write and a read of every message and of every partial row, between x and the experts'
    rows; not in the two above."""

    @property
    def pair_bytes(self) -> int:
        return self.dispatch_bytes + self.combine_bytes


def travelling_row_bytes(dtype: torch.dtype, hidden: int) -> int:
    """Of a row, with its float32 scales."""
    row_bytes = hidden * dtype.itemsize
    if dtype == torch.float8_e4m3fn:
        row_bytes += 4 * -(-hidden // CHANNELS_PER_SCALE)
    return row_bytes


def count_bytes(
    topk_idx: list[torch.Tensor],
    *,
    num_experts: int,
    hidden: int,
    dispatch_dtype: torch.dtype,
    combine_dtype: torch.dtype,
    output_layout: str,
) -> PairBytes:
    """From every rank's `[T, K]`, -1 = not routed, experts of a token distinct."""
    num_ranks = len(topk_idx)
    all_idx = torch.cat(topk_idx)
    num_messages = 0
    for rank in range(num_ranks):
        own = experts_of_rank(num_experts, num_ranks, rank)
        num_messages += int(((all_idx >= own.start) & (all_idx < own.stop)).any(1).sum())
    num_rows = num_messages if output_layout == "rank_major" else int((all_idx >= 0).sum())
    combine_row_bytes = hidden * BF16_BYTES
    row_bytes = travelling_row_bytes(dispatch_dtype, hidden)
    partial_row_bytes = travelling_row_bytes(combine_dtype, hidden)
    token_bytes = len(all_idx) * hidden * BF16_BYTES
    return PairBytes(
        num_messages=num_messages,
        num_rows=num_rows,
        dispatch_bytes=token_bytes + num_rows * row_bytes,
        combine_bytes=num_rows * combine_row_bytes + token_bytes,
        staging_bytes=2 * num_messages * (row_bytes + partial_row_bytes),
    )
