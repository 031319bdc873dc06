"""Counters of the normal CUDA kernels without a GPU, whose reader is played. tests/cuda has real
ones."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from ep_backend import _native
from ep_backend.normal_cuda_counters import CudaNormalCounters
from ep_backend.observe import metrics


def test_counters_are_read_with_the_buffers_device_current(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever the thread's is: on another CUDA would take hundreds of MiB for this process."""
    device, current = torch.device("cuda", 3), [torch.device("cuda", 0)]

    @contextmanager
    def with_device(wanted: torch.device) -> Iterator[None]:
        current.append(wanted)
        yield
        current.pop()

    class Reader:
        def read(self, address: int, count: int) -> list[int]:
            assert current[-1] == device
            return list(range(count))

    monkeypatch.setattr(torch.cuda, "device", with_device)
    monkeypatch.setattr(_native, "CudaCounterReader", Reader, raising=False)
    monkeypatch.setattr(metrics, "are_wanted", lambda: False)
    buffer: Any = SimpleNamespace(
        group=SimpleNamespace(num_ranks=2, self_rank=0),
        num_local_experts=1,
        hidden=8,
        dtype=torch.bfloat16,
        device=device,
    )
    counters = CudaNormalCounters(buffer, epochs=0, dispatch_row_bytes=16)
    assert counters.statistics().num_ops["normal_combine"] == 1
    assert current == [torch.device("cuda", 0)]
