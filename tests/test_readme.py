"""The README names only what exists."""

from __future__ import annotations

import json
import re
from pathlib import Path

from typer.testing import CliRunner

from ep_backend.cli import app

ROOT = Path(__file__).parent.parent
ROOMS = "csrc|ep_backend|integrations|serving_configs|tests"
README = (ROOT / "README.md").read_text()


def test_every_path_exists() -> None:
    in_backticks = re.findall(rf"`((?:{ROOMS})/[^`\s]*)`", README)
    in_map = re.findall(rf"^((?:{ROOMS})/\S*)", README, re.M)
    below_package = [f"ep_backend/{p}" for p in re.findall(r"^  (\w+(?:/|\.py)) ", README, re.M)]
    paths = in_backticks + in_map + below_package
    assert len(paths) >= 10
    missing = [path for path in paths if not (ROOT / path).exists()]
    assert not missing


def test_every_command_exists() -> None:
    commands = {line.split("[")[0].strip() for line in re.findall(r"ep-backend ([a-z -]+)", README)}
    assert commands
    for command in commands:
        words = [word for word in command.split() if not word.startswith("-")]
        result = CliRunner().invoke(app, [*words[:2], "--help"])
        assert result.exit_code == 0, command


def test_every_variable_is_read_somewhere() -> None:
    sources = (
        "".join(
            path.read_text()
            for folder in ("ep_backend", "integrations")
            for path in (ROOT / folder).rglob("*.py")
        )
        + (ROOT / "CMakeLists.txt").read_text()
    )
    variables = set(re.findall(r"`(EP_BACKEND_\w+)`", README))
    assert variables
    assert all(variable in sources for variable in variables)


def results(name: str) -> dict:
    return json.loads((ROOT / "ep_backend" / "bench" / "results" / name).read_text())


def test_gpu_numbers_are_those_of_the_results() -> None:
    measured = results("multi-gpu-2-h100.json")
    nccl_us = {p["num_tokens"]: p["pair"]["median_us"] for p in measured["nccl"]["pairs"]}
    assert len(measured["cases"]) == 6
    for case in measured["cases"]:
        num_tokens, pair_us = case["num_tokens"], case["pair"]["median_us"]
        row = (
            f"| {num_tokens} | {case['output_layout'].replace('_', '-')} | {pair_us:.1f} "
            f"| {case['dispatch']['median_us']:.1f} | {nccl_us[num_tokens]:.1f} "
            f"| {nccl_us[num_tokens] / pair_us:.1f}x |"
        )
        assert row in README
    rows = {
        f"| {case['num_tokens']} | {case['output_layout'].replace('_', '-')} "
        f"| {32 if tagged is None else tagged or 'none'} | {case['num_sms'] or 'all'} "
        f"| {case['pair']['median_us']:.1f} |"
        for case in results("multi-gpu-2-h100-tagged.json")["cases"]
        for tagged in (case["num_max_tagged_tokens"],)
    }
    shown = re.findall(r"^\| \d+ \| (?:expert|rank)-major \| (?:\d+|none) \| .* \|$", README, re.M)
    shown = [row for row in shown if row.count("|") == 6]
    assert len(shown) == 6
    assert set(shown) <= rows


def test_numbers_are_those_of_the_results() -> None:
    for num_ranks in (2, 4, 8):
        for case in results(f"op-cpu-{num_ranks}-ranks.json")["cases"]:
            gloo_us = min(case[way]["p50_us"] for way in ("gloo_all_to_all", "gloo_all_gather"))
            row = (
                f"| {num_ranks} | {case['num_tokens']} | {case['ours']['p50_us']:.0f} "
                f"| {gloo_us:.0f} | {case['speedup']:.1f}x | {case['roofline_fraction']:.2f} |"
            )
            assert row in README
