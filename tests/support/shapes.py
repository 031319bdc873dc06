"""The shape of one MoE exchange, as the tests pass it around."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from ep_backend import (
    Group,
    LowLatencyBuffer,
    NetworkConfig,
    VirtualWorld,
    _native,
    virtual_world,
)
from ep_backend.settings import BufferSettings


@dataclass(frozen=True)
class Shape:
    """Arguments of a `LowLatencyBuffer`, and how many ranks have one."""

    num_ranks: int
    num_max_tokens_per_rank: int = 6
    hidden: int = 20
    num_experts: int = 8
    top_k: int = 3
    dtype: torch.dtype = torch.bfloat16
    num_banks: int = 2
    device: str = "cpu"
    dispatch_dtype: torch.dtype | None = None
    combine_dtype: torch.dtype | None = None
    scale_format: str = "float32"
    output_layout: str = "expert_major"
    reduction: str = "rank"
    transfer: str = "pull"
    num_max_tagged_tokens: int | None = None
    num_workspaces: int = 0
    expert_ids: str = "local"
    num_sms: int | None = None
    network: NetworkConfig | None = None
    ranks_per_node: int | None = None
    hierarchical: bool = False
    with_hooks: bool = True

    @property
    def is_float8(self) -> bool:
        return self.dispatch_dtype == torch.float8_e4m3fn

    @property
    def is_reduced_at_source(self) -> bool:
        return self.reduction == "source"

    @property
    def is_rank_major(self) -> bool:
        return self.output_layout == "rank_major"

    def settings(self) -> BufferSettings:
        return BufferSettings(
            num_max_tokens_per_rank=self.num_max_tokens_per_rank,
            hidden=self.hidden,
            num_experts=self.num_experts,
            top_k=self.top_k,
            dtype=self.dtype,
            dispatch_dtype=self.dispatch_dtype or self.dtype,
            combine_dtype=self.combine_dtype or self.dtype,
            scale_format=self.scale_format,
            output_layout=self.output_layout,
            reduction=self.reduction,
            transfer=self.transfer,
            num_max_tagged_tokens=self.num_max_tagged_tokens,
            num_workspaces=self.num_workspaces,
            expert_ids=self.expert_ids,
            num_banks=self.num_banks,
            device=self.device,
            network=self.network,
            hierarchical=self.hierarchical,
            with_hooks=self.with_hooks,
        )

    def config(self) -> _native.LowLatencyConfig:
        return self.settings().config(self.num_ranks)

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
            dispatch_dtype=self.dispatch_dtype,
            combine_dtype=self.combine_dtype,
            scale_format=self.scale_format,
            output_layout=self.output_layout,
            reduction=self.reduction,
            transfer=self.transfer,
            num_max_tagged_tokens=self.num_max_tagged_tokens,
            num_workspaces=self.num_workspaces,
            expert_ids=self.expert_ids,
            num_banks=self.num_banks,
            timeout_secs=timeout_secs,
            device=self.device,
            spin_us=spin_us,
            num_sms=self.num_sms,
            network=self.network,
            hierarchical=self.hierarchical,
            with_hooks=self.with_hooks,
        )

    @property
    def ranks_added_up(self) -> int | None:
        """On each node, before rows go home: `ranks_per_node` of `reference.combine`."""
        is_several = self.ranks_per_node is not None and self.ranks_per_node < self.num_ranks
        return self.ranks_per_node if self.hierarchical and is_several else None

    def multi_node_layout(self) -> _native.MultiNodeLayout:
        assert self.ranks_per_node is not None
        config = self.settings().multi_node_config(self.num_ranks, self.ranks_per_node)
        return _native.MultiNodeLayout(config)

    def world(self, network_seed: int = 0) -> VirtualWorld:
        return virtual_world(
            self.num_ranks, ranks_per_node=self.ranks_per_node, network_seed=network_seed
        )

    def virtual_buffers(self, timeout_secs: float = 30.0) -> list[LowLatencyBuffer]:
        """One buffer a rank. One thread may drive them all, as long as no call has to wait: that
        makes an interleaving of ranks deterministic."""
        return self.world().run(lambda group: self.buffer(group, timeout_secs, spin_us=0))
