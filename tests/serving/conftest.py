"""Servers are slow to start: each is started once for all tests of this folder."""

from __future__ import annotations

from pathlib import Path

import pytest
import pytest_asyncio

from ep_backend.bench.demo import (
    DemoResult,
    DemoSettings,
    Progress,
    Run,
    serve_ours,
    serve_reference,
)
from ep_backend.faults import Fault


@pytest.fixture(scope="session")
def output(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("serving")


@pytest_asyncio.fixture(scope="session", loop_scope="session")
async def reference(output: Path) -> Run:
    """The same prompts on one rank, with vLLM's own experts."""
    return await serve_reference(DemoSettings(output), Progress())


@pytest_asyncio.fixture(scope="session", loop_scope="session")
async def two_ranks(output: Path, reference: Run) -> DemoResult:
    settings = DemoSettings(output, ranks=2)
    return DemoResult(settings, reference, await serve_ours(settings, Progress()))


@pytest_asyncio.fixture(scope="session", loop_scope="session")
async def four_ranks(output: Path, reference: Run) -> DemoResult:
    settings = DemoSettings(output, ranks=4)
    return DemoResult(settings, reference, await serve_ours(settings, Progress()))


@pytest_asyncio.fixture(scope="session", loop_scope="session")
async def high_throughput(output: Path, reference: Run) -> DemoResult:
    settings = DemoSettings(output, ranks=2, mode="high-throughput")
    return DemoResult(settings, reference, await serve_ours(settings, Progress()))


@pytest_asyncio.fixture(scope="session", loop_scope="session")
async def broken_high_throughput(output: Path, reference: Run) -> DemoResult:
    settings = DemoSettings(
        output, ranks=2, mode="high-throughput", fault=Fault.DROP_REMOTE_CONTRIBUTIONS.value
    )
    return DemoResult(settings, reference, await serve_ours(settings, Progress()))


@pytest_asyncio.fixture(scope="session", loop_scope="session")
async def broken(output: Path, reference: Run) -> DemoResult:
    """Two ranks that answer each other's tokens with zeros."""
    settings = DemoSettings(output, ranks=2, fault=Fault.DROP_REMOTE_CONTRIBUTIONS.value)
    return DemoResult(settings, reference, await serve_ours(settings, Progress()))
