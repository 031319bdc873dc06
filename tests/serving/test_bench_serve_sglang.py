"""`ep-backend bench serve --engine sglang` on a CPU, to its end: two backends that both serve, and
one that computes something else."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from ep_backend.faults import FAULT_VARIABLE, Fault
from ep_backend.observe.trace import read_trace
from tests.bench.pages import check_self_contained

pytest.importorskip("sglang", reason="SGLang is not installed")
pytestmark = pytest.mark.engine

SIZES = (
    "--concurrency 2 --repeats 1 --prompts-per-slot 1 --input-tokens 16 --output-tokens 8 "
    # More than those prompts, and fewer than those that are asked for log-probabilities.
    "--env SGLANG_DEEPEP_NUM_MAX_DISPATCH_TOKENS_PER_RANK=24"
)
NUM_LAYERS = 2


def sweep(
    output: Path, *more: str, **environment: str
) -> tuple[subprocess.CompletedProcess[str], Any]:
    command = [sys.executable, "-m", "ep_backend.cli", "bench", "serve", "--engine", "sglang"]
    command += ["--device", "cpu", "--ranks", "2", *SIZES.split(), "--json", str(output), *more]
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=900, env=os.environ | environment
    )
    return done, json.loads(output.read_text())


def spans_of(trace_dir: Path) -> list[dict[str, int]]:
    """How many of each kind, of every process that has stepped."""
    counts = []
    for path in sorted(trace_dir.glob("*.trace")):
        kinds, numbers = np.unique(read_trace(path)["kind"], return_counts=True)
        found = {k.decode(): int(n) for k, n in zip(kinds, numbers, strict=True)}
        if "forward" in found:
            counts.append(found)
    return counts


def test_a_sweep_compares_two_backends_that_both_served(tmp_path: Path) -> None:
    output = tmp_path / "r.json"
    done, document = sweep(output)
    assert done.returncode == 0, done.stdout + done.stderr

    cells = {cell["backend"]: cell["metrics"] for cell in document["cells"]}
    assert list(cells) == ["default", "ep_backend"]
    for metrics in cells.values():
        assert metrics["num_tokens"] == 8 * 8
        assert 0 < metrics["tpot_p50_ms"] <= metrics["tpot_p95_ms"] <= metrics["tpot_p99_ms"]
        assert 0 < metrics["exchange_share_of_forward"] < 1
    # Both exchanges are exact, in float32: no more than rounding lies between them.
    own, other = document["gates"]
    assert own["good"]
    assert other["good"]
    assert (other["versus"], other["max"] < 1e-3) == ("default-0", True)
    # Every layer of every step went through the exchange that was asked for, on both ranks.
    default, ours = (spans_of(tmp_path / f"r-{b}-0-trace") for b in cells)
    assert len(default) == len(ours) == 2
    for spans in (*default, *ours):
        assert spans["prepare"] == spans["finalize"] == NUM_LAYERS * spans["forward"]
    assert all("dispatch_send" in spans and "normal_dispatch" in spans for spans in ours)
    assert not any("dispatch_send" in spans for spans in default)

    page = check_self_contained((tmp_path / "r.html").read_text())
    assert len(page.figures) == 5
    assert "Alone, SGLang fails there in its first forward pass" in page.text
    assert len(list(tmp_path.glob("*.png"))) == 5
    assert "python -m sglang.bench_serving" in document["cells"][0]["client"]

    # As if the second server had not been measured; and now its combine is broken.
    document["cells"].pop()
    output.write_text(json.dumps(document))
    fault = {FAULT_VARIABLE: Fault.DROP_REMOTE_CONTRIBUTIONS.value}
    done, resumed = sweep(output, "--resume", **fault)
    assert done.returncode == 1, done.stdout + done.stderr
    assert [cell["backend"] for cell in resumed["cells"]] == list(cells)
    assert [gate["good"] for gate in resumed["gates"]] == [True, False]
    assert resumed["gates"][1]["mean"] > 0.1
    assert "DIFFERENT RESULTS: ep_backend-0" in done.stdout
