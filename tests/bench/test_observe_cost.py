"""`ep-backend bench observe` measures what it says; how much is for the reader."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from ep_backend.bench import observe_cost
from ep_backend.bench.observe_cost import Cost
from ep_backend.cli import app

pytest.importorskip("prometheus_client")


def test_the_command_prints_and_writes_a_measurement(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(observe_cost, "BLOCK_SECS", 0.05)
    path = tmp_path / "cost.json"
    result = CliRunner().invoke(app, ["bench", "observe", "--seconds", "0.5", "--json", str(path)])
    assert result.exit_code == 0, result.output
    (measured,) = json.loads(path.read_text())["cases"]
    assert measured["num_blocks"] == 10
    for name in ("counting_ns", "reading_us", "pair_us", "pair_read_us", "share"):
        assert measured[name] > 0
    assert f"{measured['share']:.3%}" in result.output
    assert f"{measured['reading_us']:.0f} us" in result.output


def test_the_share_is_of_one_of_four_operations() -> None:
    cost = Cost(counting_ns=20.0, reading_us=500.0, pair_us=40.0, pair_read_us=40.0, num_blocks=1)
    assert cost.share == pytest.approx(20.0 / 10_000 + 0.0005)
