"""The tensors that a dispatch's hook fills: a set a bank, allocated at first use and kept, because
fresh pages for each dispatch would cost more than the exchange.

R ranks, M num_max_tokens_per_rank, L local experts, S = R * M rows an expert can receive, H hidden,
K top_k.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from ep_backend import _native
from ep_backend.group import Group
from ep_backend.handles import DispatchHandle, DispatchResult, address_of
from ep_backend.settings import OUTPUT_LAYOUTS, BufferSettings


@dataclass(frozen=True)
class OutputShape:
    """What the received tensors look like."""

    output_layout: str
    num_ranks: int
    num_max_tokens_per_rank: int
    num_local_experts: int
    hidden: int
    top_k: int
    dispatch_dtype: torch.dtype
    num_scales: int
    """Of a row, 0 where it has none."""
    is_ue8m0: bool

    @classmethod
    def of(
        cls, settings: BufferSettings, layout: _native.LowLatencyLayout, group: Group
    ) -> OutputShape:
        return cls(
            output_layout=settings.output_layout,
            num_ranks=group.num_ranks,
            num_max_tokens_per_rank=settings.num_max_tokens_per_rank,
            num_local_experts=layout.partition.num_local_experts(group.self_rank),
            hidden=settings.hidden,
            top_k=settings.top_k,
            dispatch_dtype=settings.dispatch_dtype,
            num_scales=layout.num_scales,
            is_ue8m0=settings.scale_format == "ue8m0",
        )

    @property
    def is_rank_major(self) -> bool:
        return self.output_layout == "rank_major"

    @property
    def scale_words(self) -> tuple[int, torch.dtype]:
        """Of a row of `recv_scales`: how many, and what they are."""
        if self.is_ue8m0:
            return -(-self.num_scales // 4), torch.int32
        return self.num_scales, torch.float32

    @property
    def rows(self) -> tuple[int, int]:
        """`recv_x` and `expert_out` without H: `(L, S)`, or rank-major `(R, M)`."""
        if self.is_rank_major:
            return self.num_ranks, self.num_max_tokens_per_rank
        return self.num_local_experts, self.num_ranks * self.num_max_tokens_per_rank


class RecvBank:
    """One bank of `recv_x`, `recv_scales`, `recv_topk_idx` and `recv_topk_weights`; what they hold
    is said at `DispatchResult`."""

    def __init__(self, shape: OutputShape, device: torch.device) -> None:
        self._device = device
        self._layout = OUTPUT_LAYOUTS[shape.output_layout]
        self._num_local_experts = shape.num_local_experts
        self.recv_x = torch.empty(
            (*shape.rows, shape.hidden), dtype=shape.dispatch_dtype, device=device
        )
        self.recv_scales = _empty_scales(shape, device) if shape.num_scales > 0 else None
        self.recv_topk_idx: torch.Tensor | None = None
        self.recv_topk_weights: torch.Tensor | None = None
        if shape.is_rank_major:
            size = (*shape.rows, shape.top_k)
            self.recv_topk_idx = torch.empty(size, dtype=torch.int32, device=device)
            self.recv_topk_weights = torch.empty(size, dtype=torch.float32, device=device)

    @property
    def _tensors(
        self,
    ) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None, torch.Tensor | None]:
        return self.recv_x, self.recv_scales, self.recv_topk_idx, self.recv_topk_weights

    def result(self, handle: DispatchHandle) -> DispatchResult:
        """Of a dispatch that will fill this bank."""
        counts = torch.empty(self._num_local_experts, dtype=torch.int32, device=self._device)
        return DispatchResult.over(handle, *self._tensors, counts)

    def arguments(self, result: DispatchResult) -> tuple[_native.OutputLayout | int, ...]:
        """Of the native dispatch_recv, for a result of this bank."""
        # Looked up each time: share_memory_(), as by a queue to another process, moves a tensor.
        recv_x, recv_scales, recv_topk_idx, recv_topk_weights = map(address_of, self._tensors)
        counts = result.num_recv_tokens_per_expert.data_ptr()
        _, _, *received = result.handle.pointers()
        return (
            self._layout,
            recv_x,
            recv_scales,
            counts,
            recv_topk_idx,
            recv_topk_weights,
            *received,
            -1,
            0,
        )


def _empty_scales(shape: OutputShape, device: torch.device) -> torch.Tensor:
    num_words, dtype = shape.scale_words
    first, second = shape.rows
    if shape.is_rank_major:
        return torch.empty((first, second, num_words), dtype=dtype, device=device)
    return torch.empty((first, num_words, second), dtype=dtype, device=device).transpose(1, 2)


class RecvBanks:
    """All banks of a buffer."""

    def __init__(self, shape: OutputShape, num_banks: int, device: torch.device) -> None:
        self._shape = shape
        self._device = device
        self._banks: list[RecvBank | None] = [None] * num_banks

    def of(self, epoch: int) -> RecvBank:
        """The bank that dispatch `epoch` fills."""
        idx = epoch % len(self._banks)
        bank = self._banks[idx]
        if bank is None:
            # Not an inference tensor, also where the first dispatch is in inference mode.
            with torch.inference_mode(False):
                bank = self._banks[idx] = RecvBank(self._shape, self._device)
        return bank
