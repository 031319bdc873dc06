"""Copies between GPUs beside the multi-GPU benchmark's normal kernels: every rank copies as many
bytes as an operation sends over the link to the next rank, all at once."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass
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


class Copies:
    """Times copies, each size once. The memory is taken before all else, and serves every size.

    Args:
        num_max_bytes: of a copy.
    """

    def __init__(
        self, world: World, sizes: NormalSizes, all_num_sms: tuple[int, ...], num_max_bytes: int
    ) -> None:
        self._world = world
        self._sizes = sizes
        self._all_num_sms = all_num_sms
        self._num_max_bytes = num_max_bytes
        self._times: dict[tuple[int, int], CopyTimes] = {}
        device = torch.device("cuda", torch.cuda.current_device())
        self._memory = world.step(lambda: world.group.allocate(2 * num_max_bytes, device))

    def close(self) -> None:
        self._world.gather(None)  # no peer may still reach what is unmapped now
        self._memory.close()

    def to_json(self) -> list[dict[str, Any]]:
        return [times.to_json() for times in self._times.values()]

    def of(self, num_bytes: int, lead_in: Replayed) -> dict[int, CopyTimes]:
        """By number of SMs. Collective.

        Args:
            lead_in: an operation in which ranks wait for each other.
        """
        num_bytes = -(-num_bytes // 16) * 16
        if (num_bytes, self._all_num_sms[0]) not in self._times:
            self._time(num_bytes, lead_in)
        return {num_sms: self._times[num_bytes, num_sms] for num_sms in self._all_num_sms}

    def _time(self, num_bytes: int, lead_in: Replayed) -> None:
        group = self._world.group
        own = self._memory.bases[group.self_rank]
        peer = self._memory.bases[(group.self_rank + 1) % group.num_ranks]
        push = (peer + self._num_max_bytes, own, num_bytes)
        pull = (own + self._num_max_bytes, peer, num_bytes)
        engine = self._time_chain(lead_in, _native.cuda_copy_by_engine, *push)
        for num_sms in self._all_num_sms:
            self._times[num_bytes, num_sms] = CopyTimes(
                num_bytes,
                num_sms,
                engine,
                self._time_chain(lead_in, _native.cuda_copy_on_sms, *push, num_sms),
                self._time_chain(lead_in, _native.cuda_copy_on_sms, *pull, num_sms),
            )

    def _time_chain(self, lead_in: Replayed, copy: Callable[..., None], *args: int) -> RankedSpread:
        def on_stream() -> None:
            copy(*args, torch.cuda.current_stream().cuda_stream)

        return time_chain(
            self._world,
            lead_in,
            Queue(on_stream, self._sizes.chain),
            num_ops=self._sizes.chain,
            num_repeats=self._sizes.num_repeats,
            raise_if_failed=lambda: None,
        )
