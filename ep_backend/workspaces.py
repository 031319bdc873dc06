"""Workspaces of a LowLatencyBuffer: tensors in symmetric memory, in which exchanges take place.
Peers write what is received, and read what combine takes.

R ranks, M num_max_tokens_per_rank, S slots of a source in an exchange, L local experts, H hidden,
K top_k.
"""

from __future__ import annotations

from dataclasses import replace

import torch

from ep_backend import _native
from ep_backend.checks import check_int
from ep_backend.errors import OrderError
from ep_backend.handles import DispatchHandle, DispatchResult, address_of
from ep_backend.memory import cuda
from ep_backend.outputs import OutputShape
from ep_backend.settings import OUTPUT_LAYOUTS


class Workspace:
    """The tensors of one, as they lie when each source has S slots: `recv_x` and the others as of a
    `DispatchResult`, S in place of M, and `combine_input`: `[R, S, H]`, expert-major `[L, R * S,
    H]`."""

    def __init__(
        self,
        idx: int,
        base: int,
        layout: _native.LowLatencyLayout,
        shape: OutputShape,
        num_slots: int,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        shape = replace(shape, num_max_tokens_per_rank=num_slots)
        first, second = shape.rows

        def tensor(offset: int, size: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
            return cuda.tensor_at(base + offset, size, dtype, device)

        self._idx = idx
        self._shape = shape
        self._device = device
        rows = layout.workspace_row(idx, 0)
        self.recv_x = tensor(rows, (first, second, shape.hidden), shape.dispatch_dtype)
        self.recv_scales: torch.Tensor | None = None
        if shape.num_scales > 0:
            num_words, word = shape.scale_words
            scales = layout.workspace_scales(idx, 0)
            if shape.is_rank_major:
                self.recv_scales = tensor(scales, (first, second, num_words), word)
            else:
                self.recv_scales = tensor(scales, (first, num_words, second), word).transpose(1, 2)
        self.recv_topk_idx: torch.Tensor | None = None
        self.recv_topk_weights: torch.Tensor | None = None
        if shape.is_rank_major:
            listed = (first, second, shape.top_k)
            idx_at, weights_at = layout.workspace_topk_idx, layout.workspace_topk_weights
            self.recv_topk_idx = tensor(idx_at(idx, 0), listed, torch.int32)
            self.recv_topk_weights = tensor(weights_at(idx, 0), listed, torch.float32)
        combine_input = layout.combine_input(idx, 0)
        self.combine_input = tensor(combine_input, (first, second, shape.hidden), dtype)

    def result(self, handle: DispatchHandle) -> DispatchResult:
        """Of a dispatch into this workspace."""
        counts: torch.Tensor | None = None
        if not self._shape.is_rank_major:
            size = self._shape.num_local_experts
            counts = torch.empty(size, dtype=torch.int32, device=self._device)
        tensors = (self.recv_x, self.recv_scales, self.recv_topk_idx, self.recv_topk_weights)
        return DispatchResult.over(handle, *tensors, counts)

    def arguments(self, result: DispatchResult) -> tuple[_native.OutputLayout | int, ...]:
        """Of the native dispatch_recv."""
        _, _, *received = result.handle.pointers()
        counts = 0 if self._shape.is_rank_major else address_of(result.num_recv_tokens_per_expert)
        output = OUTPUT_LAYOUTS[self._shape.output_layout]
        num_slots = result.handle.num_slots
        return (output, 0, 0, counts, 0, 0, *received, self._idx, num_slots)


class Workspaces:
    """All of one rank.

    Args:
        base: address of the rank's symmetric memory.
        dtype: of combine's rows.
    """

    def __init__(
        self,
        num_workspaces: int,
        base: int,
        layout: _native.LowLatencyLayout,
        shape: OutputShape,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        self._base = base
        self._layout = layout
        self._shape = shape
        self._dtype = dtype
        self._device = device
        self._views: dict[tuple[int, int], Workspace] = {}
        self._last_epochs = [0] * num_workspaces

    def __len__(self) -> int:
        return len(self._last_epochs)

    def place(self, num_tokens: int, idx: int, num_slots: int | None) -> tuple[int, int]:
        """Workspace and slots of a dispatch of `num_tokens`; -1 and 0 where there are none.

        Raises:
            ValueError: there is no such workspace, or it has too few or too many slots.
        """
        check_int("workspace", idx, 0, max(0, len(self) - 1))
        if len(self) == 0:
            if num_slots is not None:
                raise ValueError(
                    f"num_slots is {num_slots}, but this buffer has no workspaces. Leave it out."
                )
            return -1, 0
        most = self._shape.num_max_tokens_per_rank
        if num_slots is None:
            return idx, most
        check_int("num_slots", num_slots, max(1, num_tokens), most, f"x has {num_tokens} tokens.")
        return idx, num_slots

    def at(self, idx: int, num_slots: int) -> Workspace:
        """Its tensors, with so many slots."""
        key = idx, num_slots
        if key not in self._views:
            check_int("workspace", idx, 0, len(self) - 1)
            check_int("num_slots", num_slots, 1, self._shape.num_max_tokens_per_rank)
            self._views[key] = Workspace(
                idx, self._base, self._layout, self._shape, num_slots, self._dtype, self._device
            )
        return self._views[key]

    def of(self, handle: DispatchHandle) -> Workspace:
        """Where that dispatch, which has got its epoch, arrives."""
        self._last_epochs[handle.workspace] = handle.epoch
        return self.at(handle.workspace, handle.num_slots)

    def check(self, expert_out: torch.Tensor, handle: DispatchHandle) -> None:
        """Raises for a combine that peers would read wrong.

        Raises:
            ValueError: `expert_out` is not the workspace's combine input.
            OrderError: another dispatch went to the workspace since.
        """
        idx = handle.workspace
        if expert_out.data_ptr() != self.at(idx, handle.num_slots).combine_input.data_ptr():
            raise ValueError(
                f"expert_out is not combine_input({idx}), but the handle's dispatch went to "
                f"workspace {idx}, and peers look for rows there. Have the experts write to that "
                "tensor, or copy their output to it."
            )
        if handle.epoch != self._last_epochs[idx]:
            raise OrderError(
                f"combine was called with the handle of dispatch {handle.epoch}, but dispatch "
                f"{self._last_epochs[idx]} has gone to the same workspace, {idx}, since. Combine "
                "before that, or use more workspaces."
            )
