"""The README names only what exists."""

from __future__ import annotations

import fnmatch
import json
import re
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from ep_backend import NetworkConfig, _native
from ep_backend.cli import app
from ep_backend.settings import BufferSettings, tagged_tokens_in_workspaces

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


def test_every_result_is_explained() -> None:
    named = re.findall(r"`([\w*-]+\.json)`", (RESULTS / "README.md").read_text())
    patterns = {name.replace("-N-", "-*-") for name in named}
    files = {path.name for path in RESULTS.glob("*.json")}
    assert files == {file for pattern in patterns for file in fnmatch.filter(files, pattern)}
    assert all(fnmatch.filter(files, pattern) for pattern in patterns)


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


def test_numbers_of_nvshmem_are_those_of_the_results() -> None:
    columns = [
        {
            (case["num_tokens"], case["output_layout"]): case["pair"]["median_us"]
            for case in results(f"multi-gpu-2-h100-{name}.json")["cases"]
        }
        for name in ("push", "nvshmem", "nvshmem-puts", "hook")
    ]
    assert len(columns[0]) == 8
    for num_tokens, layout in columns[0]:
        times = " | ".join(f"{column[num_tokens, layout]:.1f}" for column in columns)
        assert f"| {num_tokens} | {layout.replace('_', '-')} | {times} |" in PAGES


def test_prefill_numbers_over_nvlink_are_those_of_the_results() -> None:
    measured = results("multi-gpu-2-h100-normal.json")
    normal, nccl = measured["normal"], measured["nccl"]
    nccl_us = {(r["num_tokens"], r["dtype"]): r["all_to_all"]["median_us"] for r in nccl["normal"]}
    assert len(normal["cases"]) == 12
    for case in normal["cases"]:
        num_tokens, dtype = case["num_tokens"], case["dispatch_dtype"]
        cells = [str(num_tokens), dtype, str(case["num_sms"])]
        cells.append(f"{case['dispatch']['median_us']:.0f}")
        for name, of_rows in (("cached_dispatch", dtype), ("combine", "bf16")):
            cells += [f"{case[name]['median_us']:.0f}", f"{case[f'{name}_gbs']:.0f}"]
            cells += [f"{case[f'{name}_{of}copy_fraction']:.2f}" for of in ("", "sms_")]
            cells.append(f"{nccl_us[num_tokens, of_rows]:.0f}")
        assert f"| {' | '.join(cells)} |" in PAGES
    flowing = " ".join(PAGES.split())
    engine_gbs = [copy["engine_gbs"] for copy in normal["copies"]]
    assert f"({min(engine_gbs):.0f} to {max(engine_gbs):.0f} GB/s)" in flowing
    largest = [copy for copy in normal["copies"] if round(copy["num_bytes"] / 1e6) == 117]
    for way, told in (("push", "GB/s pushed on 8, 16 and 24 SMs"), ("pull", "pulled")):
        gbs = [copy[f"{way}_gbs"] for copy in largest]
        assert "{:.0f}, {:.0f} and {:.0f} ".format(*gbs) + told in flowing


def test_numbers_of_flashinfer_are_those_of_the_results() -> None:
    measured = results("op-cuda-flashinfer-h100.json")
    sizes = ("num_ranks", "num_tokens", "dispatch_dtype")
    ours_us = {tuple(c[s] for s in sizes): c["pair"]["median_us"] for c in measured["cases"]}
    theirs: dict[tuple, list[tuple[float, int]]] = {key: [] for key in ours_us}
    for row in measured["flashinfer"]:
        timed = (row["pair"]["median_us"], row["combine_block_size"])
        theirs[tuple(row[s] for s in sizes)].append(timed)
    ratios = {key: min(rows)[0] / ours_us[key] for key, rows in theirs.items()}
    assert len(ratios) == 24
    for num_ranks, num_tokens in {key[:2] for key in ratios}:
        cells = [str(num_ranks), str(num_tokens)]
        for dtype in ("bf16", "fp8"):
            key = (num_ranks, num_tokens, dtype)
            us, block_size = min(theirs[key])
            cells += [f"{us:.1f} ({block_size})", f"{ours_us[key]:.1f}", f"{ratios[key]:.2f}"]
        assert f"| {' | '.join(cells)} |" in PAGES
    flowing = " ".join(PAGES.split())
    assert f"{min(ratios.values()):.2f} to {max(ratios.values()):.2f} times as long" in flowing
    assert f"faster in {sum(ratio < 1 for ratio in ratios.values())} cases of 24" in flowing
    more = [dict(map(reversed, rows)) for rows in theirs.values() if len(rows) == 2]
    more_us = [by_block[256] - by_block[512] for by_block in more]
    assert f"takes {min(more_us):.1f} to {max(more_us):.1f} us more where 512 fit" in flowing


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


@pytest.mark.parametrize(("where", "num_cases"), [("h100", 18), ("2-h100", 7)])
def test_decode_numbers_are_those_of_the_results(where: str, num_cases: int) -> None:
    names = (f"decode-deepseek-v3-{where}.json", f"decode-deepseek-v3-{where}-workspace.json")
    packed, in_workspace = (results(name)["cases"] for name in names)
    assert len(packed) == num_cases
    unit = " GPUs" if "2-" in where else ""
    for case, other in zip(packed, in_workspace, strict=True):
        ms = case["ms_per_layer"]
        assert (
            f"| {case['num_ranks']}{unit} | {case['num_tokens']} | {case['num_micro_batches']} "
            f"| {ms['step']:.3f} | {ms['experts']:.3f} | {1e3 * ms['exchange']:.0f} "
            f"| {1e3 * other['ms_per_layer']['exchange']:.0f} | {case['exchange_share']:.1%} "
            f"| {case['ms_per_token']:.0f} |"
        ) in PAGES


def test_numbers_between_nodes_are_those_of_the_results() -> None:
    for num_nodes in (2, 4):
        measured = results(f"wire-{num_nodes}-nodes.json")
        assert (measured["settings"]["num_nodes"], measured["settings"]["ranks_per_node"]) == (
            num_nodes,
            8,
        )
        assert len(measured["cases"]) == 6
        for case in measured["cases"]:
            assert (
                f"| {num_nodes} | {case['phase']} | {case['scheme'].replace('_', ' ')} "
                f"| {case['copies_per_token']:.2f} | {case['num_bytes'] / 1024:.0f} "
                f"| {case['num_messages']:.0f} | {case['floor_us']:.1f} |"
            ) in PAGES
        assert len(measured["counted"]) == 8
        assert all(case["counted"] == case["formula"] for case in measured["counted"])


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


def test_tuned_numbers_are_those_of_the_results() -> None:
    measured = results("tuning-h100.json")
    assert measured["command"] in PAGES.replace("\n", " ")
    assert len(measured["cases"]) == 18
    for case in measured["cases"]:
        is_normal = case["kernels"] == "normal"
        layout = "normal" if is_normal else case["output_layout"].replace("_", "-")
        assert (
            f"| {case['num_ranks']} | {layout} | {case['num_tokens']} | {case['default_us']:.1f} "
            f"| {case['tuned_us']:.1f} | {case['tuned']} |"
        ) in PAGES
    on_one_rank = {
        line["settings"]: f"{line['pair_us']:.1f}"
        for line in measured["tried"]
        if line["num_ranks"] == 1 and line["step"] == "num_sms" and line["kernels"] == "normal"
    }
    by_sms = {name.split(",")[0]: us for name, us in on_one_rank.items()}
    assert f"gives {by_sms['num_sms 16']} us on the 16 SMs" in PAGES
    assert f"and {by_sms['num_sms 64']} on 64" in PAGES


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


def test_profiled_numbers_are_those_of_the_results() -> None:
    names = ("serve-vllm-2-h100.json", "serve-vllm-2-h100-ours.json")
    profiles = [profile for name in names for profile in results(name)["profiles"]]
    assert len(profiles) == 4
    for profile in profiles:
        for rank, row in enumerate(profile["ranks"]):
            percent = {kind: 100 * share for kind, share in row["shares"].items()}
            assert (
                f"| {profile['concurrency']} "
                f"| {'vLLM' if profile['backend'] == 'default' else 'ours'} | {rank} "
                f"| {row['dispatch_shortest_us']:.1f} | {row['combine_shortest_us']:.1f} "
                f"| {row['dispatch_us']:.1f} | {row['combine_us']:.1f} "
                f"| {percent['dispatch'] + percent['combine']:.1f} | {percent['experts']:.1f} "
                f"| {percent['attention']:.1f} | {percent['other']:.1f} | {percent['idle']:.1f} |"
            ) in PAGES


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


def test_copies_between_nodes_are_those_of_the_results() -> None:
    copies = {
        case["scheme"]: case["copies_per_token"]
        for case in results("wire-4-nodes.json")["cases"]
        if case["phase"] == "dispatch"
    }
    told = (
        f"{copies['per_node']:.1f} copies cross the network, not {copies['per_rank']:.1f} "
        f"({copies['per_expert']:.0f}, if each expert got one)"
    )
    assert told in " ".join(README.split())


def test_sizes_are_those_of_the_code() -> None:
    flowing = " ".join(README.split())
    most = [tagged_tokens_in_workspaces(row_bytes, 8) for row_bytes in (7168, 2 * 2048)]
    assert "up to {} tokens of 7168 channels in float8 or {} of 2048".format(*most) in flowing
    at_home, on_ranks = (num_bytes_over_network(r) >> 20 for r in ("source", "rank"))
    assert f"{at_home} MiB instead of {on_ranks}" in flowing


def num_bytes_over_network(reduction: str) -> int:
    """Of 16 ranks on hosts of their own, 128 tokens each."""
    settings = BufferSettings(
        num_max_tokens_per_rank=128,
        hidden=7168,
        num_experts=256,
        top_k=8,
        dtype=torch.bfloat16,
        dispatch_dtype=torch.float8_e4m3fn,
        combine_dtype=torch.bfloat16,
        scale_format="float32",
        output_layout="expert_major",
        reduction=reduction,
        transfer="push",
        num_max_tagged_tokens=None,
        num_workspaces=0,
        expert_ids="local",
        hierarchical=False,
        num_banks=2,
        device="cuda",
        network=NetworkConfig(),
    )
    layout = _native.LowLatencyLayout(settings.config(16))
    return settings.num_symmetric_bytes(layout, None)


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
