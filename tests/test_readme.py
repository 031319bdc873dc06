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


def test_numbers_are_those_of_the_results() -> None:
    for num_ranks in (2, 4, 8):
        path = ROOT / "ep_backend" / "bench" / "results" / f"op-cpu-{num_ranks}-ranks.json"
        for case in json.loads(path.read_text())["cases"]:
            gloo_us = min(case[way]["p50_us"] for way in ("gloo_all_to_all", "gloo_all_gather"))
            row = (
                f"| {num_ranks} | {case['num_tokens']} | {case['ours']['p50_us']:.0f} "
                f"| {gloo_us:.0f} | {case['speedup']:.1f}x | {case['roofline_fraction']:.2f} |"
            )
            assert row in README
