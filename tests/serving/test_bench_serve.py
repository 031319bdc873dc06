"""`ep-backend bench serve` on a CPU, to its end: two backends that both serve."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.bench.pages import check_self_contained

pytest.importorskip("vllm", reason="vLLM is not installed")
pytestmark = pytest.mark.engine


def test_a_sweep_compares_two_backends_that_both_served(tmp_path: Path) -> None:
    output = tmp_path / "r.json"
    sizes = "--concurrency 2 --repeats 1 --prompts-per-slot 1 --input-tokens 16 --output-tokens 8"
    command = [sys.executable, "-m", "ep_backend.cli", "bench", "serve", "--engine", "vllm"]
    command += ["--device", "cpu", "--ranks", "2", *sizes.split(), "--json", str(output)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stdout + done.stderr
    document = json.loads(output.read_text())

    cells = {cell["backend"]: cell["metrics"] for cell in document["cells"]}
    assert list(cells) == ["default", "ep_backend_low_latency"]
    for metrics in cells.values():
        assert metrics["num_tokens"] == 8 * 8
        assert 0 < metrics["tpot_p50_ms"] <= metrics["tpot_p95_ms"] <= metrics["tpot_p99_ms"]
        assert 0 < metrics["exchange_share_of_forward"] < 1
    commands = {server["backend"]: server["command"] for server in document["servers"]}
    assert "allgather_reducescatter" in commands["default"]
    # Both exchanges are exact, in float32: no more than rounding lies between them.
    own, other = document["gates"]
    assert own["good"]
    assert other["good"]
    assert (other["versus"], other["max"] < 1e-3) == ("default-0", True)
    assert "allgather_reducescatter all2all manager" in (tmp_path / "r-default-0.log").read_text()
    ours = (tmp_path / "r-ep_backend_low_latency-0.log").read_text()
    assert "ep_backend: ep_backend_low_latency on rank 1 of 2" in ours

    assert len(check_self_contained((tmp_path / "r.html").read_text()).figures) == 5
    assert len(list(tmp_path.glob("*.png"))) == 5
    assert "left" in done.stdout
