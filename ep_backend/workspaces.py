"""Workspaces of a LowLatencyBuffer: tensors in symmetric memory, in which rank-major exchanges take
place. Peers write what is received, and read what combine takes.

R ranks, M num_max_tokens_per_rank, S slots of a source in an exchange, H hidden, K top_k.
"""

from __future__ import annotations

import torch

from ep_backend import _native
from ep_backend.checks import check_int
from ep_backend.errors import OrderError
from ep_backend.handles import DispatchHandle, DispatchResult
from ep_backend.memory import cuda
from ep_backend.outputs import OutputShape


class Workspace:
    """The tensors of one, as they lie when each source has S slots: `recv_x` and the others as of a
    rank-major `DispatchResult`, S in place of M, and `combine_input` `[R, S, H]`."""

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
        def tensor(offset: int, last: int, dtype: torch.dtype) -> torch.Tensor:
            size = (shape.num_ranks, num_slots, last)
            return cuda.tensor_at(base + offset, size, dtype, device)

        self._idx = idx
        self.recv_x = tensor(layout.workspace_row(idx, 0), shape.hidden, shape.dispatch_dtype)
        self.recv_scales: torch.Tensor | None = None
        if shape.num_scales > 0:
            self.recv_scales = tensor(layout.workspace_scales(idx, 0), *shape.scale_words)
        self.recv_topk_idx = tensor(layout.workspace_topk_idx(idx, 0), shape.top_k, torch.int32)
        self.recv_topk_weights = tensor(
            layout.workspace_topk_weights(idx, 0), shape.top_k, torch.float32
        )
        self.combine_input = tensor(layout.combine_input(idx, 0), shape.hidden, dtype)

    def result(self, handle: DispatchHandle) -> DispatchResult:
        """Of a dispatch into this workspace."""
        return DispatchResult(
            handle,
            self.recv_x,
            self.recv_scales,
            self.recv_topk_idx,
            self.recv_topk_weights,
            None,
        )

    def arguments(self, result: DispatchResult) -> tuple[_native.OutputLayout | int, ...]:
        """Of the native dispatch_recv."""
        _, _, *received = result.handle.pointers()
        num_slots = result.handle.num_slots
        return (_native.OutputLayout.RANK_MAJOR, 0, 0, 0, 0, 0, *received, self._idx, num_slots)


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
