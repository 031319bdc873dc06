"""Workspaces, which are a GPU's, played by a buffer on a CPU."""

from __future__ import annotations

from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import torch

from ep_backend import Group, LowLatencyBuffer


@dataclass
class PlayedWorkspaces:
    """A CPU buffer, rank-major, with the calls and the tensors of one that has workspaces."""

    inner: LowLatencyBuffer
    expert_ids: str = "global"
    inputs: dict[tuple[int, int], torch.Tensor] = field(default_factory=dict)

    @property
    def group(self) -> Group:
        return self.inner.group

    @property
    def num_max_tokens_per_rank(self) -> int:
        return self.inner.num_max_tokens_per_rank

    def dispatch_and_receive(self, *args: Any, **place: int) -> Any:
        result, hook = self.dispatch(*args, **place)
        hook()
        return result

    def dispatch(self, *args: Any, workspace: int, num_slots: int) -> Any:
        result, inner_hook = self.inner.dispatch(*args)
        first = self.inner.first_expert
        foreign = self.inner.num_experts - 1 if first == 0 else 0
        received = SimpleNamespace(
            handle=SimpleNamespace(
                inner=result.handle,
                workspace=workspace,
                num_slots=num_slots,
                num_tokens=result.handle.num_tokens,
            ),
            recv_scales=None,
        )
        names = ["recv_x", "recv_topk_idx", "recv_topk_weights"]
        names += ["recv_scales"] if result.recv_scales is not None else []
        for name in names:
            setattr(received, name, torch.empty_like(getattr(result, name)[:, :num_slots]))

        def hook() -> None:
            inner_hook()
            for name in names:
                getattr(received, name).copy_(getattr(result, name)[:, :num_slots])
            idx = received.recv_topk_idx
            if self.expert_ids == "global":
                idx.copy_(torch.where(idx < 0, foreign, idx + first))

        return received, hook

    def combine_input(self, workspace: int, num_slots: int) -> torch.Tensor:
        size = (self.group.num_ranks, num_slots, self.inner.hidden)
        fresh = torch.empty(size, dtype=self.inner.dtype)
        return self.inputs.setdefault((workspace, num_slots), fresh)

    def combine_and_receive(
        self, rows: torch.Tensor, handle: Any, out: torch.Tensor | None = None
    ) -> torch.Tensor:
        combined, hook = self.combine(rows, handle, out)
        hook()
        return combined

    def combine(self, rows: torch.Tensor, handle: Any, out: torch.Tensor | None = None) -> Any:
        assert rows is self.combine_input(handle.workspace, handle.num_slots)
        inner = self.inner
        shape = (self.group.num_ranks, inner.num_max_tokens_per_rank, inner.hidden)
        full = torch.zeros(shape, dtype=inner.dtype)
        full[:, : handle.num_slots] = rows
        return self.inner.combine(full, handle.inner, out)
