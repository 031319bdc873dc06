"""Copies between GPUs beside the multi-GPU benchmark's normal kernels: every rank copies as many
bytes as an operation sends over the link to the next rank, all at once."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import torch

from ep_backend import _native
from ep_backend.bench.multi_gpu_world import Queue, RankedSpread, Replayed, World, time_chain
from ep_backend.bench.op_cuda_normal_case import NormalSizes


@dataclass(frozen=True)
class CopyTimes:
    """Of so many bytes."""

    num_bytes: int
    num_sms: int
    engine: RankedSpread
    """By the copy engines, on no SM."""
    push: RankedSpread
    """By so many SMs, which load at home and store to the peer."""
    pull: RankedSpread
    """By SMs that load from the peer and store at home."""

    def to_json(self) -> dict[str, Any]:
        times = {name: getattr(self, name) for name in ("engine", "push", "pull")}
        gbs = {
            f"{name}_gbs": self.num_bytes / ranked.spread.median_us / 1e3
            for name, ranked in times.items()
        }
        spreads = {name: asdict(ranked.spread) for name, ranked in times.items()}
        return {"num_bytes": self.num_bytes, "num_sms": self.num_sms} | spreads | gbs


def time_copies(
    world: World,
    sizes: NormalSizes,
    all_num_sms: tuple[int, ...],
    num_bytes: int,
    lead_in: Replayed,
) -> dict[int, CopyTimes]:
    """By number of SMs. Collective.

    Args:
        lead_in: an operation in which ranks wait for each other.
    """
    num_bytes = -(-num_bytes // 16) * 16
    rank, num_ranks = world.group.self_rank, world.group.num_ranks
    device = torch.device("cuda", torch.cuda.current_device())
    memory = world.step(lambda: world.group.allocate(2 * num_bytes, device))
    own, peer = memory.bases[rank], memory.bases[(rank + 1) % num_ranks]

    def on_stream(copy: Callable[..., None], *args: int) -> None:
        copy(*args, torch.cuda.current_stream().cuda_stream)

    def time(copy: Callable[..., None], *args: int) -> RankedSpread:
        return time_chain(
            world,
            lead_in,
            Queue(partial(on_stream, copy, *args), sizes.chain),
            num_ops=sizes.chain,
            num_repeats=sizes.num_repeats,
            raise_if_failed=lambda: None,
        )

    push, pull = (peer + num_bytes, own, num_bytes), (own + num_bytes, peer, num_bytes)
    try:
        engine = time(_native.cuda_copy_by_engine, *push)
        return {
            num_sms: CopyTimes(
                num_bytes,
                num_sms,
                engine,
                time(_native.cuda_copy_on_sms, *push, num_sms),
                time(_native.cuda_copy_on_sms, *pull, num_sms),
            )
            for num_sms in all_num_sms
        }
    finally:
        world.gather(None)  # no peer may still reach what is unmapped now
        memory.close()
