"""The configurations for CPUs, run as they stand: the check, the model and the server, with the
words and the variables of the compose file, only without its container."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import httpx
import pytest

from ep_backend.bench.server import running_server
from tests.serving_configs.configs import CONFIGS, services

pytestmark = pytest.mark.engine


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
    # The only addition is a free port.
    async with running_server(
        server.words, tmp_path / "log", environment=server.environment
    ) as running:
        request = {"model": "model", "prompt": "deploy", "max_tokens": 8, "ignore_eos": True}
        async with httpx.AsyncClient(
            base_url=running.base_url, timeout=60, trust_env=False
        ) as client:
            answer = (await client.post("/v1/completions", json=request)).json()
            assert answer["usage"]["completion_tokens"] == 8, answer
            assert (await client.get("/metrics")).text.startswith("# HELP")
    log = (tmp_path / "log").read_text()
    assert "ep_backend" in log
