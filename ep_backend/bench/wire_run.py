"""Counts what the low-latency kernels of virtual ranks send between and within nodes."""

from __future__ import annotations

import torch

from ep_backend import DispatchResult, Group, LowLatencyBuffer, virtual_world
from ep_backend.bench.wire_formula import PHASES, WireShape
from ep_backend.virtual_network import Traffic

ALGORITHMS = {"per_rank": False, "per_node": True}
"""Schemes that run here, and whether that is hierarchical."""


def count(
    shape: WireShape, hierarchical: bool, topk_idx: list[torch.Tensor], network_seed: int = 0
) -> dict[str, dict[str, Traffic]]:
    """By phase, then link, what all ranks send in one dispatch or combine, its hook included.

    Args:
        topk_idx: of each rank, `[T_r, K]`, at most `shape.num_tokens` rows.
    """
    world = virtual_world(
        shape.num_ranks, ranks_per_node=shape.ranks_per_node, network_seed=network_seed
    )
    assert world.network is not None

    def create(group: Group) -> LowLatencyBuffer:
        return LowLatencyBuffer(
            group,
            num_max_tokens_per_rank=shape.num_tokens,
            hidden=shape.hidden,
            num_experts=shape.num_experts,
            top_k=shape.top_k,
            dtype=shape.dtype,
            dispatch_dtype=shape.dispatch_dtype,
            combine_dtype=shape.combine_dtype,
            reduction=shape.reduction,
            hierarchical=hierarchical,
        )

    buffers = world.run(create)
    results: list[DispatchResult | None] = [None] * shape.num_ranks

    def dispatch(group: Group) -> None:
        idx = topk_idx[group.self_rank]
        x = torch.ones((idx.shape[0], shape.hidden), dtype=shape.dtype)
        buffer = buffers[group.self_rank]
        results[group.self_rank] = buffer.dispatch_and_receive(x, idx, torch.ones(idx.shape))

    def combine(group: Group) -> None:
        buffer, result = buffers[group.self_rank], results[group.self_rank]
        assert result is not None
        rows = torch.zeros(result.recv_x.shape, dtype=shape.dtype)
        weights = torch.ones(topk_idx[group.self_rank].shape)
        home = weights if shape.reduction == "source" else None
        buffer.combine_and_receive(rows, result.handle, topk_weights=home)

    counted, before = {}, world.network.totals()
    for phase, run in zip(PHASES, (dispatch, combine), strict=True):
        world.run(run)
        after = world.network.totals()
        counted[phase] = {link: after[link] - before[link] for link in after}
        before = after
    world.run(lambda group: buffers[group.self_rank].close())
    return counted
