"""What is said of one GPU, of CPUs and of formulas is what the benchmarks have written."""

from __future__ import annotations

import pytest

from tests.readme.pages import FLOWING, PAGES, from_to, results


def test_numbers_of_flashinfer_are_those_of_the_results() -> None:
    measured = results("op-cuda-flashinfer-h200.json")
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
    assert min(ratios.values()) > 1
    assert "faster in none of 24 cases" in FLOWING
    more = [dict(map(reversed, rows)) for rows in theirs.values() if len(rows) == 2]
    more_us = [by_block[256] - by_block[512] for by_block in more]
    assert f"takes {min(more_us):.1f} to {max(more_us):.1f} us more where 512 fit" in FLOWING


def test_one_gpu_numbers_are_those_of_the_results() -> None:
    measured = results("op-cuda-h200.json")

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
    by_sms = {
        (case["output_layout"], case["num_sms"]): case["pair"]["median_us"]
        for case in results("op-cuda-h200-sms.json")["cases"]
    }
    slower = [
        by_sms[layout, 16] / by_sms[layout, 132]
        for layout in ("expert_major", "expert_workspace", "rank_major")
    ]
    told = "take {:.1f} times as long, in a workspace {:.1f}, rank-major {:.1f}"
    assert told.format(*slower) in FLOWING


@pytest.mark.parametrize(("where", "num_cases"), [("h200", 18), ("2-h100", 7)])
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
    measured = results("op-cuda-normal-h200.json")
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
    assert f"would be at {bound[8]:.2f} of a copy on 8 SMs and {bound[24]:.2f} on 24" in FLOWING
    gemms = measured["gemm_beside_dispatch"]
    assert "{:.2f}, {:.2f} and {:.2f} times".format(*(g["ratio"] for g in gemms)) in FLOWING
    assert "{:.2f}, {:.2f} and {:.2f} beside".format(*(g["copy_ratio"] for g in gemms)) in FLOWING


def test_tuned_numbers_are_those_of_the_results() -> None:
    measured = results("tuning-h200.json")
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
