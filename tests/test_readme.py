"""The README names only what exists."""

from __future__ import annotations

import fnmatch
import json
import math
import re
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from ep_backend import NetworkConfig, _native
from ep_backend.cli import app
from ep_backend.settings import BufferSettings, tagged_tokens_in_workspaces
from tests.support.shapes import Shape

ROOT = Path(__file__).parent.parent
ROOMS = "csrc|ep_backend|integrations|serving_configs|tests"
README = (ROOT / "README.md").read_text()
RESULTS = ROOT / "ep_backend" / "bench" / "results"
PAGES = README + (RESULTS / "NUMBERS.md").read_text()
"""Where numbers are."""
FLOWING = " ".join(PAGES.split())
README_FLOWING = " ".join(README.split())


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


def in_words(numbers: Iterable[float], digits: int) -> str:
    """As in `1.0, 2.0 and 3.0`."""
    *first, last = (f"{number:.{digits}f}" for number in numbers)
    return f"{', '.join(first)} and {last}"


def from_to(numbers: Iterable[float], digits: int) -> str:
    least, *_, most = sorted(numbers)
    return f"{least:.{digits}f} to {most:.{digits}f}"


def pairs_us(name: str) -> dict[tuple[int, str], float]:
    """By tokens and layout."""
    cases = results(name)["cases"]
    return {(c["num_tokens"], c["output_layout"]): c["pair"]["median_us"] for c in cases}


def test_nvlink_numbers_are_those_of_the_results() -> None:
    columns: dict[tuple[int, str], list[str]] = {}
    for num_gpus in (2, 4):
        measured = results(f"multi-gpu-{num_gpus}-h200.json")
        assert len(measured["cards"]) == num_gpus
        nccl_us = {p["num_tokens"]: p["pair"]["median_us"] for p in measured["nccl"]["pairs"]}
        cases = [case for case in measured["cases"] if case["num_max_tagged_tokens"] is None]
        assert len(cases) == 12
        for case in cases:
            num_tokens, pair_us = case["num_tokens"], case["pair"]["median_us"]
            columns.setdefault((num_tokens, case["output_layout"]), []).extend(
                [
                    f"{pair_us:.1f}",
                    f"{case['dispatch']['median_us']:.1f}",
                    f"{nccl_us[num_tokens]:.1f}",
                    f"{nccl_us[num_tokens] / pair_us:.1f}x",
                ]
            )
    for (num_tokens, layout), cells in columns.items():
        assert f"| {num_tokens} | {layout.replace('_', '-')} | {' | '.join(cells)} |" in README
    for num_gpus, between in ((2, "two"), (4, "four")):
        hooks = pairs_us(f"multi-gpu-{num_gpus}-h200-hook.json")
        by_tokens = [hooks[num_tokens, "rank_major"] for num_tokens in (1, 16, 64, 128)]
        told = in_words(by_tokens, 1) + (" us" if num_gpus == 2 else "") + f" between {between}"
        assert told in FLOWING


def test_where_workspaces_by_expert_lose_is_as_measured() -> None:
    """From 16 tokens on between two GPUs, from 64 on between four, and at 128 to NCCL."""
    for num_gpus, first in ((2, 16), (4, 64)):
        measured = results(f"multi-gpu-{num_gpus}-h200.json")
        cases = {
            (case["num_tokens"], case["output_layout"]): case["pair"]["median_us"]
            for case in measured["cases"]
            if case["num_max_tagged_tokens"] is None
        }
        nccl_us = {p["num_tokens"]: p["pair"]["median_us"] for p in measured["nccl"]["pairs"]}
        for num_tokens in (1, 16, 64, 128):
            in_workspace = cases[num_tokens, "expert_workspace"]
            is_slower = in_workspace > cases[num_tokens, "expert_major"]
            assert is_slower == (num_tokens >= first)
            assert (in_workspace > nccl_us[num_tokens]) == (num_tokens == 128)


def test_numbers_of_nvshmem_are_those_of_the_results() -> None:
    of_two = ("2-h200-push", "2-h200-nvshmem", "2-h200-nvshmem-puts", "2-h200-hook")
    of_four = ("4-h200-push", "4-h200-nvshmem", "4-h200-hook")
    columns = [pairs_us(f"multi-gpu-{name}.json") for name in of_two + of_four]
    assert len(columns[0]) == 8
    for num_tokens, layout in columns[0]:
        times = " | ".join(f"{column[num_tokens, layout]:.1f}" for column in columns)
        assert f"| {num_tokens} | {layout.replace('_', '-')} | {times} |" in PAGES
    pushed, direct, _, _, pushed_of_four, direct_of_four, default_of_four = columns
    ratios = [direct[key] / pushed[key] for key in pushed]
    assert f"takes {from_to(ratios, 2)} times as long as the same rows pushed" in FLOWING
    ratios = [direct_of_four[key] / pushed_of_four[key] for key in pushed]
    assert f"between two, {from_to(ratios, 2)} times between four" in FLOWING
    faster = {key for key, us in pushed_of_four.items() if us < default_of_four[key]}
    assert faster == {(64, "expert_major"), (128, "expert_major")}


def test_numbers_of_transfers_are_those_of_the_results() -> None:
    gained = {}
    for name, gpus in (("2-h200", "2 H200"), ("4-h100", "4 H100")):
        cases = results(f"multi-gpu-{name}-transfers.json")["cases"]
        by_way = {(case["num_tokens"], case["transfer"]): case for case in cases}
        for num_tokens in {num_tokens for num_tokens, _ in by_way}:
            cells = [gpus, str(num_tokens)]
            for way in ("pull", "pull_push", "push"):
                case = by_way.get((num_tokens, way))
                for what in ("pair", "dispatch"):
                    cells.append("" if case is None else f"{case[what]['median_us']:.1f}")
            assert f"| {' | '.join(cells)} |".replace("|  |", "| |").replace("|  |", "| |") in PAGES
            pulled, pushed = (by_way[num_tokens, way] for way in ("pull", "push"))
            gained[gpus, num_tokens] = [
                pulled[what]["median_us"] - pushed[what]["median_us"]
                for what in ("pair", "dispatch")
            ]
    for num_tokens in (32, 64, 128):
        of_pair, of_dispatch = gained["4 H100", num_tokens]
        assert of_dispatch < of_pair / 4  # "most of it is combine's"
    of_eight = Shape(8, 128, 7168, 256, 8, dispatch_dtype=torch.float8_e4m3fn, device="cuda")
    sizes = [s.layout().num_bytes for s in (of_eight, replace(of_eight, transfer="push"))]
    assert f"{(sizes[1] - sizes[0]) / 2**20:.1f} MiB more" in FLOWING


def test_prefill_numbers_over_nvlink_are_those_of_the_results() -> None:
    for num_gpus, between in ((2, "two"), (4, "four")):
        measured = results(f"multi-gpu-{num_gpus}-h200-normal.json")
        normal, nccl = measured["normal"], measured["nccl"]
        rows = nccl["normal"]
        nccl_us = {(r["num_tokens"], r["dtype"]): r["all_to_all"]["median_us"] for r in rows}
        assert len(normal["cases"]) == 12
        for case in normal["cases"]:
            num_tokens, dtype = case["num_tokens"], case["dispatch_dtype"]
            cells = [str(num_gpus), str(num_tokens), dtype, str(case["num_sms"])]
            cells.append(f"{case['dispatch']['median_us']:.0f}")
            for name, of_rows in (("cached_dispatch", dtype), ("combine", "bf16")):
                cells += [f"{case[name]['median_us']:.0f}", f"{case[f'{name}_gbs']:.0f}"]
                cells += [f"{case[f'{name}_{of}copy_fraction']:.2f}" for of in ("", "sms_")]
                cells.append(f"{nccl_us[num_tokens, of_rows]:.0f}")
            assert f"| {' | '.join(cells)} |" in PAGES
        engine_gbs = from_to((copy["engine_gbs"] for copy in normal["copies"]), 0)
        assert f"{engine_gbs} {'GB/s ' if num_gpus == 2 else ''}between {between}" in FLOWING
        size = max(copy["num_bytes"] for copy in normal["copies"])
        assert f"{size / 1e6:.0f} MB" in FLOWING
        largest = [copy for copy in normal["copies"] if copy["num_bytes"] == size]
        for way in ("push", "pull"):
            assert f"{in_words((c[f'{way}_gbs'] for c in largest), 0)} " in FLOWING
        pull_gbs = {copy["num_sms"]: copy["pull_gbs"] for copy in largest}
        of_8192 = [case for case in normal["cases"] if case["num_tokens"] == 8192]
        by_kind = {(case["dispatch_dtype"], case["num_sms"]): case for case in of_8192}
        by_nccl = {
            key: case["dispatch"]["median_us"] / nccl_us[8192, key[0]]
            for key, case in by_kind.items()
        }
        if num_gpus == 2:
            on_8 = by_kind["fp8", 8]
            with_routes, without = (
                on_8[f"{name}_sms_copy_fraction"] for name in ("dispatch", "cached_dispatch")
            )
            told = f"{with_routes:.2f} of the SMs' copy with them, at {without:.2f} without"
            assert told in FLOWING
            told = f"(between two {by_nccl['bf16', 8]:.2f} and {by_nccl['fp8', 8]:.2f})"
            assert told in FLOWING
        else:
            by_pull = [case["combine_gbs"] / pull_gbs[case["num_sms"]] for case in of_8192]
            assert f"between four it reaches {from_to(by_pull, 2)} of that" in FLOWING
            case = by_kind["bf16", 24]
            stay = (case["num_rows"] - case["num_remote_rows"]) / 8192
            cross = case["num_remote_rows"] / 8192
            assert f"between four {stay:.1f} stay and {cross:.1f} cross" in FLOWING
            assert f"reach {case['cached_dispatch_copy_fraction']:.2f} of a peer copy" in FLOWING
            combine = case["combine"]["median_us"] / nccl_us[8192, "bf16"]
            assert (
                f"{by_nccl['bf16', 24]:.2f} times; in float8 {by_nccl['fp8', 24]:.2f} times, "
                f"combine {combine:.2f}."
            ) in FLOWING
            told = f"{by_nccl['bf16', 8]:.2f} times as long in bfloat16, {by_nccl['fp8', 8]:.2f}"
            assert told in FLOWING


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
    assert f"{min(ratios.values()):.2f} to {max(ratios.values()):.2f} times as long" in FLOWING
    assert f"faster in {sum(ratio < 1 for ratio in ratios.values())} cases of 24" in FLOWING
    more = [dict(map(reversed, rows)) for rows in theirs.values() if len(rows) == 2]
    more_us = [by_block[256] - by_block[512] for by_block in more]
    assert f"takes {min(more_us):.1f} to {max(more_us):.1f} us more where 512 fit" in FLOWING


def test_one_gpu_numbers_are_those_of_the_results() -> None:
    measured = results("op-cuda-h100.json")

    def cases_of(form: str, dtype: str) -> dict[tuple[int, int, str], dict]:
        return {
            (case["num_ranks"], case["num_tokens"], case["output_layout"]): case
            for case in measured["cases"]
            if (case["form"], case["dispatch_dtype"]) == (form, dtype)
        }

    by_form = {form: cases_of(form, "fp8") for form in ("fused", "hook")}
    assert len(by_form["fused"]) == 18
    for key, fused in by_form["fused"].items():
        num_ranks, num_tokens, layout = key
        hook_us = by_form["hook"][key]["pair"]["median_us"]
        assert (
            f"| {num_ranks} | {num_tokens} | {layout.replace('_', '-')} "
            f"| {fused['pair']['median_us']:.1f} | {hook_us:.1f} "
            f"| {fused['roofline_fraction']:.2f} |"
        ) in PAGES
    of_bf16 = cases_of("fused", "bf16")
    ratios = [
        of_bf16[key]["pair"]["median_us"] / case["pair"]["median_us"]
        for key, case in by_form["fused"].items()
    ]
    assert f"takes {from_to(ratios, 2)} times as long" in FLOWING
    gemms = {gemm["num_ranks"]: gemm["ratio"] for gemm in measured["gemm_beside_dispatch"]}
    assert f"{gemms[1]:.2f} times as long as alone with 1 rank, {gemms[8]:.2f} with 8" in FLOWING
    mib = [
        by_form["fused"][8, 128, layout]["num_symmetric_bytes"] / 2**20
        for layout in ("expert_major", "rank_major", "expert_workspace")
    ]
    assert (
        "{:.1f} MiB, rank-major in a workspace {:.1f} MiB, by expert in a workspace {:.0f} MiB"
    ).format(*mib) in FLOWING
    of_one = [by_form["fused"][1, 1, name] for name in ("rank_major", "expert_workspace")]
    told = "one rank {:.1f} us rank-major, {:.1f} us by expert in a workspace"
    assert told.format(*(case["pair"]["median_us"] for case in of_one)) in FLOWING
    since_tuned = by_form["fused"][1, 16, "rank_major"]["pair"]["median_us"]
    assert f"those 16 tokens {since_tuned:.1f} us by default" in FLOWING
    by_sms = {
        (case["output_layout"], case["num_sms"]): case["pair"]["median_us"]
        for case in results("op-cuda-h100-sms.json")["cases"]
    }
    slower = [
        by_sms[layout, 16] / by_sms[layout, 132]
        for layout in ("expert_major", "expert_workspace", "rank_major")
    ]
    told = "take {:.1f} times as long, in a workspace {:.1f}, rank-major {:.1f}"
    assert told.format(*slower) in FLOWING


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


def test_decode_numbers_of_four_gpus_are_those_of_the_results() -> None:
    cases = results("decode-deepseek-v3-4-h200.json")["cases"]
    assert len(cases) == 7
    for case in cases:
        ms = case["ms_per_layer"]
        assert (
            f"| {case['num_ranks']} GPUs | {case['num_tokens']} | {case['num_micro_batches']} "
            f"| {ms['step']:.3f} | {ms['experts']:.3f} | {1e3 * ms['exchange']:.0f} "
            f"| {case['exchange_share']:.1%} | {case['ms_per_token']:.0f} |"
        ) in PAGES
    of_one = cases[0]["ms_per_layer"]
    assert of_one["step"] < of_one["experts"]


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
    assert f"would be at {bound[8]:.2f} of a copy on 8 SMs, and at {bound[24]:.2f} on 24" in FLOWING
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


def median(run: dict, metric: str) -> float:
    return run[metric]["median"]


def runs_of(measured: dict) -> dict[int, list[dict]]:
    """By concurrency; of each backend, in their order."""
    backends = measured["settings"]["backends"]
    runs = {(run["concurrency"], run["backend"]): run for run in measured["summary"]}
    return {c: [runs[c, b] for b in backends] for c in measured["settings"]["concurrency"]}


def test_served_numbers_are_those_of_the_results() -> None:
    def tpot(run: dict) -> str:
        ms = run["tpot_mean_ms"]
        return f"{ms['median']:.2f} ({ms['min']:.2f}-{ms['max']:.2f})"

    for num_gpus in (2, 4):
        measured = results(f"serve-vllm-{num_gpus}-h200.json")
        assert measured["settings"]["backends"] == ["default", "ep_backend_low_latency"]
        assert len(runs_of(measured)) == 5
        for concurrency, (theirs, ours) in runs_of(measured).items():
            ratios = [
                median(ours, metric) / median(theirs, metric)
                for metric in ("tpot_mean_ms", "output_tokens_per_sec")
            ]
            rates = [median(run, "output_tokens_per_sec") for run in (theirs, ours)]
            assert (
                f"| {concurrency} | {tpot(theirs)} | {tpot(ours)} | {ratios[0]:.2f} "
                f"| {rates[0]:.0f} | {rates[1]:.0f} | {ratios[1]:.2f} |"
            ) in README
        assert all(gate["good"] for gate in measured["gates"])
    of_two = results("serve-vllm-2-h200.json")["gates"]
    assert [gate["max"] for gate in of_two if "max" in gate] == [0.0]
    assert [gate["good"] for gate in results("serve-vllm-2-h200-fault.json")["gates"]] == [
        True,
        False,
    ]


def test_what_is_said_of_servers_on_four_gpus_is_as_measured() -> None:
    measured = results("serve-vllm-4-h200.json")
    runs = runs_of(measured)
    theirs, ours = runs[128]
    rates = theirs["output_tokens_per_sec"]
    assert 0.6 < rates["min"] / rates["max"] < 0.7  # "a third fewer"
    tpot = ours["tpot_mean_ms"]["max"] / theirs["tpot_mean_ms"]["min"]
    rate = ours["output_tokens_per_sec"]["min"] / rates["max"]
    itl = [median(run, "itl_p99_ms") for run in (ours, theirs)]
    told = f"{tpot:.2f} in TPOT and {rate:.2f} in tokens/s, and the 99th percentile of the time "
    assert told + "between two tokens was {:.0f} ms, vLLM's {:.0f}.".format(*itl) in FLOWING
    for metric, are_longer in (("ttft_p50_ms", [True] * 3), ("ttft_p99_ms", [False, True, False])):
        ttft = [[median(run, metric) for run in runs[c]] for c in (8, 32, 64)]
        assert [of_vllm < of_us for of_vllm, of_us in ttft] == are_longer
        of_vllm, of_us = zip(*ttft, strict=True)
        assert f"({in_words(of_us, 0)} ms, vLLM's {in_words(of_vllm, 0)})" in FLOWING
    own, gates = measured["gates"][0], measured["gates"][1::2]
    assert {gate["backend"] for gate in gates} == {"ep_backend_low_latency"}
    mean, most = (max(gate[name] for gate in gates) for name in ("mean", "max"))
    assert f"by {mean:.3f} in the mean and {most:.3f} at most" in FLOWING
    again = own["again"]
    assert f"differs from itself by {again['mean']:.3f} and {again['max']:.3f}." in FLOWING
    ranks_without = math.comb(96, 8) / math.comb(128, 8)
    assert f"{4 * (1 - ranks_without):.1f} of them if experts are as likely" in FLOWING


@pytest.mark.parametrize(
    ("name", "backends"),
    [
        ("h200-dbo", ["ep_backend_low_latency", "ep_backend_low_latency_dbo"]),
        ("h100-ht", ["default", "ep_backend_high_throughput"]),
    ],
)
def test_numbers_of_few_runs_are_those_of_the_results(name: str, backends: list[str]) -> None:
    measured = results(f"serve-vllm-2-{name}.json")
    assert measured["settings"]["backends"] == backends
    assert all(gate["good"] for gate in measured["gates"])
    ratios = []
    for concurrency, pair in runs_of(measured).items():
        tpot = [median(run, "tpot_mean_ms") for run in pair]
        is_single = all(run["tpot_mean_ms"]["min"] == run["tpot_mean_ms"]["max"] for run in pair)
        assert is_single == (name == "h200-dbo")
        ratios.append(tpot[1] / tpot[0])
        cells = [f"{ms:.1f}" for ms in tpot] + [f"{ratios[-1]:.1f}"]
        for metric in ("ttft_p50_ms", "output_tokens_per_sec"):
            cells += [f"{median(run, metric):.0f}" for run in pair]
        assert f"| {concurrency} | {' | '.join(cells)} |" in PAGES
    own, other = (gate["again"] for gate in measured["gates"][:2])
    versus = measured["gates"][1]
    told = f"by {versus['mean']:.3f} in the mean and {versus['max']:.3f} at most"
    assert told in FLOWING
    if name == "h200-dbo":
        assert own["max"] == 0.0
        assert f"differs from itself by {other['mean']:.3f} and {other['max']:.3f}," in FLOWING
        assert f"{max(ratios):.1f} times as slow there as without" in README
    else:
        assert own["max"] == 0.0
        assert max(gate["again"]["max"] for gate in measured["gates"]) == versus["max"]
        of_one = results("multi-gpu-2-h200-normal-small.json")["normal"]["cases"][0]
        dispatch, combine = (of_one[what]["median_us"] for what in ("dispatch", "combine"))
        told = f"one token a rank takes {dispatch:.1f} us and its combine {combine:.1f}"
        assert told in FLOWING


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
    assert told in README_FLOWING


def test_sizes_are_those_of_the_code() -> None:
    most = [tagged_tokens_in_workspaces(row_bytes, 8) for row_bytes in (7168, 2 * 2048)]
    told = "up to {} tokens of 7168 channels in float8 or {} of 2048".format(*most)
    assert told in README_FLOWING
    at_home, on_ranks = (num_bytes_over_network(r) >> 20 for r in ("source", "rank"))
    assert f"{at_home} MiB instead of {on_ranks}" in README_FLOWING


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
    assert f"took {measured['share'] * 100:.2f} % of the shortest operation" in FLOWING
    assert f"(1 rank, 1 token, {measured['pair_us'] / 4:.1f} us;" in FLOWING


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
