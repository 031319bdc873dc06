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


def test_nvlink_numbers_are_those_of_the_results() -> None:
    measured = results("multi-gpu-2-h200.json")
    nccl_us = {p["num_tokens"]: p["pair"]["median_us"] for p in measured["nccl"]["pairs"]}
    cases = [case for case in measured["cases"] if case["num_max_tagged_tokens"] is None]
    assert len(cases) == 12
    for case in cases:
        num_tokens, pair_us = case["num_tokens"], case["pair"]["median_us"]
        assert (
            f"| {num_tokens} | {case['output_layout'].replace('_', '-')} | {pair_us:.1f} "
            f"| {case['dispatch']['median_us']:.1f} | {nccl_us[num_tokens]:.1f} "
            f"| {nccl_us[num_tokens] / pair_us:.1f}x |"
        ) in README


def test_one_gpu_numbers_are_those_of_the_results() -> None:
    cases = results("op-cuda-h100.json")["cases"]
    by_form = {
        form: {
            (case["num_ranks"], case["num_tokens"], case["output_layout"]): case
            for case in cases
            if case["form"] == form
        }
        for form in ("fused", "hook")
    }
    assert len(by_form["fused"]) == 18
    for key, fused in by_form["fused"].items():
        num_ranks, num_tokens, layout = key
        hook_us = by_form["hook"][key]["pair"]["median_us"]
        assert (
            f"| {num_ranks} | {num_tokens} | {layout.replace('_', '-')} "
            f"| {fused['pair']['median_us']:.1f} | {hook_us:.1f} "
            f"| {fused['roofline_fraction']:.2f} |"
        ) in README


def test_served_numbers_are_those_of_the_results() -> None:
    def tpot(run: dict) -> str:
        ms = run["tpot_mean_ms"]
        return f"{ms['median']:.2f} ({ms['min']:.2f}-{ms['max']:.2f})"

    def ratio(ours: dict, theirs: dict, metric: str) -> str:
        return f"{ours[metric]['median'] / theirs[metric]['median']:.2f}"

    measured = results("serve-vllm-2-h200.json")
    runs = {(run["concurrency"], run["backend"]): run for run in measured["summary"]}
    for concurrency in (1, 8, 32, 64, 128):
        theirs, ours = (runs[concurrency, b] for b in ("default", "ep_backend_low_latency"))
        rates = [run["output_tokens_per_sec"]["median"] for run in (theirs, ours)]
        assert (
            f"| {concurrency} | {tpot(theirs)} | {tpot(ours)} "
            f"| {ratio(ours, theirs, 'tpot_mean_ms')} | {rates[0]:.0f} | {rates[1]:.0f} "
            f"| {ratio(ours, theirs, 'output_tokens_per_sec')} |"
        ) in README
    assert [gate["good"] for gate in measured["gates"]] == [True, True]
    assert [gate["good"] for gate in results("serve-vllm-2-h200-fault.json")["gates"]] == [
        True,
        False,
    ]


def test_what_metrics_cost_is_that_of_the_results() -> None:
    measured = results("observe-cpu.json")
    assert measured["share"] < 0.01
    flowing = " ".join(README.split())
    assert f"took {measured['share'] * 100:.2f} % of the shortest operation" in flowing
    assert f"(1 rank, 1 token, {measured['pair_us'] / 4:.1f} us;" in flowing


def test_numbers_are_those_of_the_results() -> None:
    for num_ranks in (2, 4, 8):
        for case in results(f"op-cpu-{num_ranks}-ranks.json")["cases"]:
            gloo_us = min(case[way]["p50_us"] for way in ("gloo_all_to_all", "gloo_all_gather"))
            row = (
                f"| {num_ranks} | {case['num_tokens']} | {case['ours']['p50_us']:.0f} "
                f"| {gloo_us:.0f} | {case['speedup']:.1f}x | {case['roofline_fraction']:.2f} |"
            )
            assert row in README
