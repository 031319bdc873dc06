"""Tests on GPUs skip, and say so, where there is none, or no build with NVSHMEM."""

from __future__ import annotations

import pytest
import torch

from ep_backend.memory import nvshmem


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    reason = None
    try:
        nvshmem.extension()
    except ImportError as e:
        reason = f"the kernels over NVSHMEM were NOT run: {e}"
    if not torch.cuda.is_available():
        reason = "no GPU: the kernels over NVSHMEM were NOT run"
    for item in items:
        if "tests/nvshmem/" in str(item.path) and item.get_closest_marker("gpu") and reason:
            item.add_marker(pytest.mark.skip(reason=reason))
