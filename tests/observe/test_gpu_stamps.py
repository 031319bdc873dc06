"""The arithmetic of GPU stamps, with events that a test has set; tests/cuda has real ones."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from ep_backend.observe import gpu_stamps
from ep_backend.observe.gpu_stamps import GpuStamps
from ep_backend.observe.trace import Operation, TraceWriter, read_trace


class FakeGpu:
    """A GPU whose clock a test moves; events happen when they are recorded."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        gpu = self
        self.now_ms = 500.0
        self.is_capturing = False

        class Event:
            def __init__(self, enable_timing: bool) -> None:
                assert enable_timing

            def record(self, stream: object = None) -> None:
                assert not gpu.is_capturing
                self.ms = gpu.now_ms

            def synchronize(self) -> None: ...

            def query(self) -> bool:
                return True

            def elapsed_time(self, end: Event) -> float:
                return end.ms - self.ms

        monkeypatch.setattr(torch.cuda, "Event", Event)
        monkeypatch.setattr(torch.cuda, "synchronize", lambda *_: None)
        monkeypatch.setattr(torch.cuda, "current_stream", lambda *_: None)
        monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: self.is_capturing)
        monkeypatch.setattr(gpu_stamps.time, "monotonic_ns", lambda: 7_000_000)


def test_kernels_are_on_the_clock_of_the_host(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    gpu = FakeGpu(monkeypatch)
    monkeypatch.setattr(gpu_stamps, "NUM_PENDING", 1)
    path = tmp_path / "rank0-1.trace"
    stamps = GpuStamps(TraceWriter(path), torch.device("cuda", 0))
    for epoch in (1, 2, 3):
        gpu.now_ms += 1.0
        with stamps.stamped("dispatch_send", 4, Operation(0, 1, epoch)):
            gpu.now_ms += 0.25
    assert len(read_trace(path)) == 2, "the latest may still run"
    stamps.close()
    spans = read_trace(path)
    assert spans["begin_ns"].tolist() == [8_000_000, 9_250_000, 10_500_000]
    assert spans["duration_ns"].tolist() == [250_000] * 3
    assert spans["on_gpu"].tolist() == [1] * 3
    assert spans["epoch"].tolist() == [1, 2, 3]


def test_captured_kernels_have_no_stamps(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    gpu = FakeGpu(monkeypatch)
    path = tmp_path / "rank0-1.trace"
    stamps = GpuStamps(TraceWriter(path), torch.device("cuda", 0))
    gpu.is_capturing = True
    with stamps.stamped("dispatch_send", 4, Operation(0, 1, 1)):
        pass
    gpu.is_capturing = False
    stamps.close()
    assert len(read_trace(path)) == 0
