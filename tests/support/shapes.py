"""The shape of one MoE exchange, as the tests pass it around."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from ep_backend import Group, LowLatencyBuffer, _native, virtual_world
from ep_backend.settings import DTYPES


@dataclass(frozen=True)
class Shape:
    num_ranks: int
    num_max_tokens_per_rank: int = 6
    hidden: int = 20
    num_experts: int = 8
    top_k: int = 3
    dtype: torch.dtype = torch.bfloat16
    num_banks: int = 2
    device: str = "cpu"

    def config(self) -> _native.LowLatencyConfig:
        return _native.LowLatencyConfig(
            num_ranks=self.num_ranks,
            num_experts=self.num_experts,
            num_max_tokens_per_rank=self.num_max_tokens_per_rank,
            hidden=self.hidden,
            top_k=self.top_k,
            num_banks=self.num_banks,
            dtype=DTYPES[self.dtype],
        )

    def layout(self) -> _native.LowLatencyLayout:
        return _native.LowLatencyLayout(self.config())

    def buffer(
        self, group: Group, timeout_secs: float = 30.0, spin_us: float | None = None
    ) -> LowLatencyBuffer:
        return LowLatencyBuffer(
            group,
            num_max_tokens_per_rank=self.num_max_tokens_per_rank,
            hidden=self.hidden,
            num_experts=self.num_experts,
            top_k=self.top_k,
            dtype=self.dtype,
            num_banks=self.num_banks,
            timeout_secs=timeout_secs,
            device=self.device,
            spin_us=spin_us,
        )

    def virtual_buffers(self, timeout_secs: float = 30.0) -> list[LowLatencyBuffer]:
        """One buffer a rank. One thread may drive them all, as long as no call has to wait: that
        makes an interleaving of ranks deterministic."""
        world = virtual_world(self.num_ranks)
        return world.run(lambda group: self.buffer(group, timeout_secs, spin_us=0))
