"""`ep-backend bench op`: it runs, tells the truth in JSON, and refuses to report wrong results."""

from __future__ import annotations

import io
import json
from pathlib import Path

import pytest
import torch
from rich.console import Console
from typer.testing import CliRunner

from ep_backend import faults
from ep_backend.bench.op import run_op_bench
from ep_backend.bench.op_measure import BenchSettings
from ep_backend.bench.op_normal_rank import NormalBenchSettings, count_bytes
from ep_backend.bench.op_processes import RankFailed
from ep_backend.bench.op_rank import OpBenchSettings
from ep_backend.bench.routing import Inputs
from ep_backend.cli import app

SMALL = OpBenchSettings(
    num_ranks=2,
    num_tokens=(1, 3),
    num_max_tokens_per_rank=4,
    hidden=64,
    num_experts=6,
    top_k=2,
    dtype=torch.float32,
    num_iterations=5,
    num_warmup=1,
)


def test_every_way_is_measured_for_every_case(tmp_path: Path) -> None:
    path = tmp_path / "op.json"
    output = io.StringIO()
    cases = run_op_bench(SMALL, path, Console(file=output, width=80))
    document = json.loads(path.read_text())
    assert [case["num_tokens"] for case in document["cases"]] == [1, 3]
    for case in document["cases"]:
        for way in ("ours", "gloo_all_to_all", "gloo_all_gather"):
            assert 0 < case[way]["min_us"] <= case[way]["p50_us"] <= case[way]["p95_us"]
        slower = min(case[way]["p50_us"] for way in ("gloo_all_to_all", "gloo_all_gather"))
        assert case["speedup"] == pytest.approx(slower / case["ours"]["p50_us"])
    assert "…" not in output.getvalue(), "the table fits a terminal of 80 columns"
    # A token moves at most: x, a message to each rank, its experts' rows, partial rows, the result.
    row_bytes = 64 * 4
    assert 0 < cases[0].num_bytes <= 2 * row_bytes * (1 + 2 + 2 + 2 * SMALL.top_k)


SMALL_NORMAL = NormalBenchSettings(
    num_ranks=3,
    num_tokens=(3, 50),
    hidden=64,
    num_experts=7,
    top_k=2,
    num_iterations=5,
    num_warmup=1,
    num_bytes=1 << 15,
)


def test_normal_kernels_are_measured_beside_gloo_too(tmp_path: Path) -> None:
    path = tmp_path / "op.json"
    output = io.StringIO()
    cases = run_op_bench(SMALL_NORMAL, path, Console(file=output, width=80))
    document = json.loads(path.read_text())
    assert document["kind"] == "normal"
    assert document["settings"]["num_bytes"] == 1 << 15
    assert [case["num_tokens"] for case in document["cases"]] == [3, 50]
    for case in document["cases"]:
        for way in ("ours", "gloo_all_to_all", "gloo_all_gather"):
            assert 0 < case[way]["min_us"] <= case[way]["p50_us"] <= case[way]["p95_us"]
        assert case["memcpy_us"] > 0
    assert "normal dispatch + combine" in " ".join(output.getvalue().split())
    # A token moves at most: x, two messages written and read, their rows, rows home, the result.
    for case in cases:
        assert 0 < case.num_bytes <= case.num_tokens * 2 * 64 * (2 + 2 * 2 + 4 * 3)


def test_bytes_of_a_small_normal_exchange(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ranks own experts 0-1 and 2-3; token 0 of rank 0 stays there, token 1 goes to both, the
    tokens of rank 1 go to rank 0."""
    settings = NormalBenchSettings(num_ranks=2, hidden=10, num_experts=4, top_k=2)
    routing = [torch.tensor([[0, 1], [1, 2]]), torch.tensor([[0, 1], [1, 0]])]
    monkeypatch.setattr(
        NormalBenchSettings,
        "inputs",
        lambda _, rank, num_tokens: Inputs(torch.empty(0), routing[rank], torch.empty(0)),
    )
    row_bytes = 20
    # x and the result; 3 messages sent, 4 received: each is written, read, and goes home likewise.
    assert count_bytes(settings, 0, 2) == row_bytes * (2 * 2 + 2 * 3 + 4 * 4)
    assert count_bytes(settings, 1, 2) == row_bytes * (2 * 2 + 2 * 2 + 4 * 1)


@pytest.mark.parametrize("settings", [SMALL, SMALL_NORMAL], ids=lambda s: s.kind)
def test_wrong_results_are_not_timed(
    settings: BenchSettings, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv(faults.FAULT_VARIABLE, faults.Fault.DROP_REMOTE_CONTRIBUTIONS.value)
    path = tmp_path / "op.json"
    with pytest.raises(RankFailed):
        run_op_bench(settings, path, Console(file=io.StringIO()))
    assert not path.exists()


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["--dtype", "float16"], "float32 or bfloat16"),
        (["--tokens", "1,x"], "numbers such as"),
        (["--tokens", "8", "--num-max-tokens", "4"], "at least the largest"),
        (["--experts", "4", "--top-k", "5"], "at most 4 experts"),
        (["--kind", "high"], "expected low-latency or normal"),
        (["--kind", "high", "--device", "cuda"], "expected low-latency or normal"),
        (["--kind", "normal", "--dtype", "float16"], "float32 or bfloat16"),
        (["--kind", "normal", "--tokens", "0"], "expected positive numbers"),
        (["--kind", "normal", "--ranks", "3", "--experts", "2", "--top-k", "1"], "num_ranks, 3"),
    ],
)
def test_impossible_settings_are_refused_before_anything_starts(
    arguments: list[str], expected: str
) -> None:
    result = CliRunner().invoke(app, ["bench", "op", *arguments], env={"COLUMNS": "200"})
    assert result.exit_code == 2
    assert expected in result.output
