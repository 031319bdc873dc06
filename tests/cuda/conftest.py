"""GPU tests skip, and say so, where there is no GPU."""

from __future__ import annotations

import pytest
import torch

from ep_backend import _native


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
