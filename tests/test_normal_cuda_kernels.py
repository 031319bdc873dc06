"""Making a normal buffer on CUDA, whose kernels are a stand-in. Without a GPU."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from ep_backend import Group, NormalBuffer, SettingsMismatch, virtual_world
from ep_backend.tuning import Tuned


def test_a_rank_without_kernels_is_told_everywhere(monkeypatch: pytest.MonkeyPatch) -> None:
    """And nobody's memory stays with a buffer that does not exist."""
    closed: list[int] = []

    class Memory:
        def __init__(self, rank: int) -> None:
            self.bases, self._rank = [0, 0], rank

        def close(self, **_: Any) -> None:
            closed.append(self._rank)

    def kernels(_: object, self_rank: int, *rest: object) -> object:
        if self_rank == 1:
            raise RuntimeError("no room for counters")
        return object()

    module = "ep_backend.normal_cuda"
    monkeypatch.setattr(f"{module}.usable_device", lambda _: torch.device("cpu"))
    monkeypatch.setattr(f"{module}.num_available_sms", lambda *_: 132)
    monkeypatch.setattr(f"{module}.look_up", lambda *_: Tuned())
    monkeypatch.setattr(f"{module}.SymmetricRows", lambda *_: None)
    monkeypatch.setattr(f"{module}.CudaNormalKernels", kernels)
    monkeypatch.setattr(Group, "allocate", lambda group, *_: Memory(group.self_rank))

    def rank_main(group: Group) -> None:
        shape: Any = {"hidden": 32, "num_experts": 6, "top_k": 2, "dtype": torch.bfloat16}
        with pytest.raises((RuntimeError, SettingsMismatch), match="no room for counters"):
            NormalBuffer(group, device="cuda", **shape)

    virtual_world(2).run(rank_main)
    assert sorted(closed) == [0, 1]


@pytest.mark.parametrize("expert_ids", ["global", "other"])
def test_a_cpu_lists_experts_by_local_numbers_only(expert_ids: str) -> None:
    def rank_main(group: Group) -> None:
        shape: Any = {"hidden": 32, "num_experts": 6, "top_k": 2, "dtype": torch.bfloat16}
        with pytest.raises(ValueError, match=f"expert_ids is '{expert_ids}', which only kernels"):
            NormalBuffer(group, expert_ids=expert_ids, **shape)

    virtual_world(1).run(rank_main)
