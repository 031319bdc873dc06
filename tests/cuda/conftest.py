"""GPU tests skip, and say so, where there is no GPU."""

from __future__ import annotations

import os

import pytest
import torch

from ep_backend import _native

# Kernels of many ranks wait for each other, so no two of their streams may share one of the GPU's
# queues, of which CUDA takes eight unless it is told before it starts.
os.environ.setdefault("CUDA_DEVICE_MAX_CONNECTIONS", "32")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    reason = None
    if not _native.has_cuda:
        reason = "CPU-only build: the CUDA kernels were NOT run"
    elif not torch.cuda.is_available():
        reason = "no GPU: the CUDA kernels were NOT run"
    for item in items:
        if "tests/cuda/" in str(item.path):
            item.add_marker(pytest.mark.gpu)
            if reason is not None:
                item.add_marker(pytest.mark.skip(reason=reason))
