"""`ep-backend bench precision`: its errors are those of combine, and its rows have the tails."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from ep_backend import faults
from ep_backend.bench.precision import Errors, PrecisionSettings, measure
from ep_backend.bench.precision_rows import DISTRIBUTIONS
from ep_backend.bench.provenance import commit, this_machine
from ep_backend.cli import app

SMALL = PrecisionSettings(num_ranks=3, num_tokens=5, hidden=300, num_experts=7, top_k=3, seed=1)


def test_errors_are_norms_of_all_of_the_worst_token_and_of_the_worst_channel() -> None:
    exact = torch.tensor([[3.0, 4.0], [6.0, 8.0]], dtype=torch.float64)
    result = torch.tensor([[3.0, 5.0], [6.0, 8.0]], dtype=torch.bfloat16)
    errors = Errors.of(result, exact)
    assert errors.overall == pytest.approx(1 / 125**0.5)
    assert errors.worst_token == pytest.approx(1 / 5)
    assert errors.worst_channel == pytest.approx(1 / 80**0.5)


def test_every_way_is_measured_on_every_distribution(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "precision.json"
    sizes = "--ranks 3 --tokens 5 --hidden 300 --experts 7 --top-k 3 --seed 1"
    arguments = ["bench", "precision", *sizes.split(), "--json", str(path)]
    monkeypatch.setattr(sys, "argv", ["ep-backend", *arguments])
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 0, result.output
    assert "student_t_2" in result.output
    document = json.loads(path.read_text())
    assert document["settings"]["hidden"] == 300
    assert (document["commit"], document["machine"]) == (commit(), this_machine())
    assert document["command"] == f"ep-backend bench precision {sizes}"
    errors = {
        (case["distribution"], case["reduction"], case["combine_dtype"]): case["errors"]
        for case in document["cases"]
    }
    assert len(errors) == len(document["cases"]) == len(DISTRIBUTIONS) * 2 * 2
    for distribution in DISTRIBUTIONS:
        for reduction in ("rank", "source"):
            bf16, fp8 = (errors[distribution, reduction, d] for d in ("bf16", "fp8"))
            # Half a step of each rounding, more where large terms cancel.
            assert 0 < bf16["overall"] <= bf16["worst_token"] < 0.02
            assert bf16["worst_token"] < fp8["worst_token"] < 0.2
            assert fp8["overall"] <= fp8["worst_token"]
    assert errors["normal", "rank", "fp8"]["overall"] > 0.02
    again = {case.distribution: case.errors for case in measure(SMALL)}
    assert again["massive"].overall == errors["massive", "source", "fp8"]["overall"]


def test_a_wrong_combine_has_a_large_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(faults.FAULT_VARIABLE, faults.Fault.DROP_REMOTE_CONTRIBUTIONS.value)
    assert all(case.errors.worst_token > 0.1 for case in measure(SMALL))


def test_the_rows_have_the_tails_that_they_are_named_after() -> None:
    def draw(name: str) -> torch.Tensor:
        return DISTRIBUTIONS[name](64, 4000, torch.Generator().manual_seed(0))

    # Quantiles of 97.5 %.
    for name, expected in (("normal", 1.960), ("student_t_3", 3.182), ("student_t_2", 4.303)):
        quantile = draw(name).flatten().kthvalue(int(0.975 * 64 * 4000)).values
        assert quantile == pytest.approx(expected, rel=0.02)
    channel_norms = draw("outlier_channels").norm(dim=0)
    assert (channel_norms > 50 * channel_norms.median()).sum() == 4
    row_amax = draw("massive").abs().amax(1)
    assert (row_amax > 100).sum() == 4
    assert row_amax[1:16].max() < 10


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (
            ["--experts", "4", "--ranks", "5", "--top-k", "2"],
            "4, expected at least 5, the number of",
        ),
        (["--top-k", "65"], "64, expected at least 65, the number of"),
        (["--tokens", "0"], "num_tokens is 0"),
    ],
)
def test_impossible_settings_are_refused(arguments: list[str], expected: str) -> None:
    result = CliRunner().invoke(app, ["bench", "precision", *arguments], env={"COLUMNS": "200"})
    assert result.exit_code == 2
    assert expected in result.output
