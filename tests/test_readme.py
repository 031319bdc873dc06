"""The README names only what exists."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from typer.testing import CliRunner

from ep_backend.cli import app

ROOT = Path(__file__).parent.parent
ROOMS = "csrc|ep_backend|integrations|serving_configs|tests"
README = (ROOT / "README.md").read_text()
RESULTS = ROOT / "ep_backend" / "bench" / "results"
PAGES = README + (RESULTS / "NUMBERS.md").read_text()
"""Where numbers are."""


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
    return json.loads((RESULTS / name).read_text())


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
        ) in PAGES


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
        ) in PAGES


def test_precision_numbers_are_those_of_the_results() -> None:
    cases = results("precision-cpu.json")["cases"]
    errors = {(c["distribution"], c["reduction"], c["combine_dtype"]): c["errors"] for c in cases}
    assert len(errors) == 20
    for distribution, reduction, combine_dtype in errors:
        if combine_dtype == "bf16":
            of_both = [errors[distribution, reduction, dtype] for dtype in ("bf16", "fp8")]
            cells = [f"{100 * e:.2f}" for of_dtype in of_both for e in of_dtype.values()]
            row = [distribution.replace("_", " "), reduction, *cells]
            assert f"| {' | '.join(row)} |" in PAGES


def test_prefill_numbers_are_those_of_the_results() -> None:
    measured = results("op-cuda-normal-h100.json")
    assert len(measured["cases"]) == 12
    for case in measured["cases"]:
        assert (
            f"| {case['num_tokens']} | {case['dispatch_dtype']} | {case['num_sms']} "
            f"| {case['dispatch']['median_us']:.0f} | {case['dispatch_gbs']:.0f} "
            f"| {case['dispatch_copy_fraction']:.2f} | {case['dispatch_written_fraction']:.2f} "
            f"| {case['combine']['median_us']:.0f} | {case['combine_gbs']:.0f} "
            f"| {case['combine_copy_fraction']:.2f} |"
        ) in PAGES
    on_8 = measured["yardsticks"][0]
    assert f"({on_8['copy_gbs']:.0f} GB/s on 8)" in PAGES
    assert f"({on_8['fill_gbs']:.0f} GB/s on 8)" in PAGES
    bound = {
        y["num_sms"]: y["fill_gbs"] / y["copy_gbs"] * _moved_by_written(measured["cases"][0])
        for y in measured["yardsticks"]
    }
    assert (round(bound[8], 2), round(bound[24], 2)) == (0.75, 0.69)
    gemms = measured["gemm_beside_dispatch"]
    assert "{:.2f}, {:.2f} and {:.2f} times".format(*(g["ratio"] for g in gemms)) in PAGES
    assert "{:.2f}, {:.2f} and {:.2f} beside".format(*(g["copy_ratio"] for g in gemms)) in PAGES


def _moved_by_written(case: dict) -> float:
    """Of a dispatch: bytes read and written by those written."""
    return case["num_bytes"]["dispatch_bytes"] / case["num_row_bytes"]


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
        ) in PAGES
    assert [gate["good"] for gate in measured["gates"]] == [True, True]
    assert [gate["good"] for gate in results("serve-vllm-2-h200-fault.json")["gates"]] == [
        True,
        False,
    ]


@pytest.mark.parametrize("engine", ["vllm", "sglang"])
def test_numbers_served_on_a_cpu_are_those_of_the_results(engine: str) -> None:
    measured = results(f"serve-{engine}-cpu-2-ranks.json")
    assert measured["settings"]["engine"] == engine
    runs = {(run["concurrency"], run["backend"]): run for run in measured["summary"]}
    for concurrency in (1, 4):
        pair = [runs[concurrency, b] for b in measured["settings"]["backends"]]
        tpot = [run["tpot_mean_ms"] for run in pair]
        times = [f"{ms['median']:.2f} ({ms['min']:.2f}-{ms['max']:.2f})" for ms in tpot]
        shares = [f"{run['exchange_share_of_forward']['median']:.0%}" for run in pair]
        assert (
            f"| {concurrency} | {times[0]} | {times[1]} "
            f"| {tpot[1]['median'] / tpot[0]['median']:.2f} | {shares[0]} | {shares[1]} |"
        ) in PAGES
    assert f"load {measured['load_average_before']:.0f} at the start" in PAGES
    assert [gate["good"] for gate in measured["gates"]] == [True] * 4


def test_what_metrics_cost_is_that_of_the_results() -> None:
    (measured,) = results("observe-cpu.json")["cases"]
    assert measured["share"] < 0.01
    flowing = " ".join(PAGES.split())
    assert f"took {measured['share'] * 100:.2f} % of the shortest operation" in flowing
    assert f"(1 rank, 1 token, {measured['pair_us'] / 4:.1f} us;" in flowing


def test_numbers_are_those_of_the_results() -> None:
    names = [f"op-cpu-{num_ranks}-ranks.json" for num_ranks in (2, 4, 8)]
    names += [f"op-cpu-normal-{num_ranks}-ranks.json" for num_ranks in (2, 4)]
    for name in names:
        measured = results(name)
        num_ranks = measured["settings"]["num_ranks"]
        for case in measured["cases"]:
            gloo_us = min(case[way]["p50_us"] for way in ("gloo_all_to_all", "gloo_all_gather"))
            row = (
                f"| {num_ranks} | {case['num_tokens']} | {case['ours']['p50_us']:.0f} "
                f"| {gloo_us:.0f} | {case['speedup']:.1f}x | {case['roofline_fraction']:.2f} |"
            )
            assert row in PAGES
