"""Settings of the whole suite."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator

import pytest
import torch
from hypothesis import settings

from ep_backend import _native
from ep_backend.memory import shm
from ep_backend.tuning import TUNING_VARIABLE
from tests.support.processes import started_pids

# Derandomised: a run says the same thing every time. No deadline: machines differ.
settings.register_profile("fixed", derandomize=True, deadline=None, print_blob=True)
settings.load_profile("fixed")
# A shell's background job begins with it ignored, and so would the ranks that tests interrupt.
signal.signal(signal.SIGINT, signal.default_int_handler)
# What this machine was tuned to is no test's business; processes of tests inherit it.
os.environ[TUNING_VARIABLE] = "off"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    num_gpus = torch.cuda.device_count() if _native.has_cuda else 0
    for item in items:
        marker = item.get_closest_marker("gpus")
        if marker is None:
            continue
        item.add_marker(pytest.mark.gpu)
        if num_gpus < marker.args[0]:
            reason = f"needs {marker.args[0]} GPUs, {num_gpus} here: NOT run"
            item.add_marker(pytest.mark.skip(reason=reason))


@pytest.fixture(autouse=True, scope="session")
def _few_torch_threads() -> None:
    torch.set_num_threads(1)  # virtual ranks are threads already


def shm_segments() -> set[str]:
    """Names in /dev/shm that belong to this test run; others may use the library meanwhile."""
    names = (path.name for path in shm.SHM_DIR.glob(f"{shm.SEGMENT_PREFIX}*"))
    return {
        name
        for name in names
        if int(name.removeprefix(shm.SEGMENT_PREFIX).split("-")[0]) in started_pids
    }


@pytest.fixture(autouse=True)
def no_segment_is_left() -> Iterator[None]:
    """Whatever a test does to its ranks, no name stays in /dev/shm."""
    before = shm_segments()
    yield
    assert shm_segments() <= before
