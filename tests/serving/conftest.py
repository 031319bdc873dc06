"""Servers are slow to start: each is started once for all tests of this folder."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

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
from ep_backend.bench.demo_engines import ENGINES, SGLANG
from ep_backend.faults import Fault

FORMAT_VARIABLE = "EP_BACKEND_SGLANG_FORMAT"
DROP = Fault.DROP_REMOTE_CONTRIBUTIONS.value
session_fixture = pytest_asyncio.fixture(scope="session", loop_scope="session")


@pytest.fixture(scope="session")
def output(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("serving")


async def _served(output: Path, reference: Run, **settings: Any) -> DemoResult:
    of_demo = DemoSettings(output, **settings)
    return DemoResult(of_demo, reference, await serve_ours(of_demo, Progress()))


@session_fixture
async def reference(output: Path) -> Run:
    """The same prompts on one rank, with vLLM's own experts."""
    return await serve_reference(DemoSettings(output), Progress())


@session_fixture
async def two_ranks(output: Path, reference: Run) -> DemoResult:
    return await _served(output, reference)


@session_fixture
async def four_ranks(output: Path, reference: Run) -> DemoResult:
    return await _served(output, reference, ranks=4)


@session_fixture
async def high_throughput(output: Path, reference: Run) -> DemoResult:
    return await _served(output, reference, mode="high-throughput")


@session_fixture
async def broken(output: Path, reference: Run) -> DemoResult:
    """Two ranks that answer each other's tokens with zeros."""
    return await _served(output, reference, fault=DROP)


@session_fixture
async def broken_high_throughput(output: Path, reference: Run) -> DemoResult:
    return await _served(output, reference, mode="high-throughput", fault=DROP)


@pytest.fixture(scope="session")
def sglang_segments() -> Callable[[], set[str]]:
    """What SGLang has in /dev/shm now, without what was there before the first server of ours."""

    def names() -> set[str]:
        return {name for name in os.listdir("/dev/shm") if name.startswith(("sgl_", "sglang_"))}

    before = names()
    return lambda: names() - before


@session_fixture
async def sglang_reference(output: Path, sglang_segments: Callable[[], set[str]]) -> Run:
    """The same prompts on one rank, with SGLang's own experts."""
    return await serve_reference(DemoSettings(output, "sglang"), Progress())


@contextmanager
def sglang_with(*arguments: str) -> Iterator[None]:
    """Meanwhile servers get these, too."""

    def command(*args: Any, **kwargs: Any) -> list[str]:
        return [*SGLANG.command(*args, **kwargs), *arguments]

    with mock.patch.dict(ENGINES, sglang=replace(SGLANG, command=command)):
        yield


@session_fixture
async def sglang_low_latency(output: Path, sglang_reference: Run) -> DemoResult:
    return await _served(output, sglang_reference, engine_name="sglang")


@session_fixture
async def sglang_normal(output: Path, sglang_reference: Run) -> DemoResult:
    return await _served(output, sglang_reference, engine_name="sglang", mode="normal")


@session_fixture
async def sglang_auto(output: Path, sglang_reference: Run) -> DemoResult:
    return await _served(output, sglang_reference, engine_name="sglang", mode="auto")


@session_fixture
async def sglang_auto_by_expert(output: Path, sglang_reference: Run) -> DemoResult:
    """With the formats that DeepEP's experts take."""
    with mock.patch.dict(os.environ, {FORMAT_VARIABLE: "deepep"}):
        return await _served(output, sglang_reference, engine_name="sglang", mode="auto")


@session_fixture
async def sglang_in_halves(output: Path, sglang_reference: Run) -> DemoResult:
    """With two-batch overlap."""
    with sglang_with("--enable-two-batch-overlap"):
        return await _served(output, sglang_reference, engine_name="sglang", mode="auto")


@session_fixture
async def sglang_rebalanced(output: Path, sglang_reference: Run) -> DemoResult:
    """Some experts are there twice, and all are moved every 40 steps."""
    often = ("--eplb-rebalance-num-iterations", "40")
    recorded = ("--expert-distribution-recorder-buffer-size", "40")
    with sglang_with("--enable-eplb", "--ep-num-redundant-experts", "4", *often, *recorded):
        return await _served(output, sglang_reference, engine_name="sglang")


@session_fixture
async def sglang_broken(output: Path, sglang_reference: Run) -> DemoResult:
    return await _served(output, sglang_reference, engine_name="sglang", fault=DROP)


@session_fixture
async def sglang_broken_normal(output: Path, sglang_reference: Run) -> DemoResult:
    return await _served(output, sglang_reference, engine_name="sglang", mode="normal", fault=DROP)
