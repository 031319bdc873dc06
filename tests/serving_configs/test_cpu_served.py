"""The configurations for CPUs, run as they stand: the check, the model and the server, with the
words and the variables of the compose file, only without its container."""

from __future__ import annotations

import asyncio
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx
import pytest

from ep_backend.bench.server import running_server
from tests.serving_configs.configs import CONFIGS, Process, services

pytestmark = pytest.mark.engine


async def metrics_of(client: httpx.AsyncClient) -> str:
    """Once the ranks' counters have been copied to the engine's registry, which is each second."""
    for _ in range(20):
        text = (await client.get("/metrics")).text
        assert text.startswith("# HELP")
        if "ep_backend_" in text:
            return text
        await asyncio.sleep(0.5)
    return text


@contextmanager
def emptied(directory: str | None) -> Iterator[None]:
    """As a container starts with it; what an earlier server has counted must not be seen."""
    if directory is None:
        yield
        return
    shutil.rmtree(directory, ignore_errors=True)
    yield
    shutil.rmtree(directory)


@pytest.mark.parametrize("engine", ["vllm", "sglang"])
async def test_it_serves(engine: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip(engine, reason=f"{engine} is not installed: its CPU config was not run")
    configured = services(CONFIGS / engine / "cpu" / "compose.yaml")
    monkeypatch.chdir(tmp_path)  # for the working directory of the containers
    monkeypatch.setenv("PATH", f"{Path(sys.executable).parent}:{os.environ['PATH']}")
    for name in ("check", "model"):
        done = subprocess.run(configured[name].words, capture_output=True, text=True, timeout=120)
        assert done.returncode == 0, done.stderr
    server = configured["server"]
    with emptied(server.environment.get("PROMETHEUS_MULTIPROC_DIR")):
        await serve(server, tmp_path / "log")
    assert "ep_backend" in (tmp_path / "log").read_text()


async def serve(server: Process, log: Path) -> None:
    """The only addition is a free port."""
    async with running_server(server.words, log, environment=server.environment) as running:
        request = {"model": "model", "prompt": "deploy", "max_tokens": 8, "ignore_eos": True}
        async with httpx.AsyncClient(
            base_url=running.base_url, timeout=60, trust_env=False
        ) as client:
            answer = (await client.post("/v1/completions", json=request)).json()
            assert answer["usage"]["completion_tokens"] == 8, answer
            assert "ep_backend_operations_total" in await metrics_of(client)
