"""What is said of several GPUs of one host is what the benchmarks have written."""

from __future__ import annotations

from dataclasses import replace

import torch

from tests.readme.pages import FLOWING, PAGES, README, from_to, in_words, pairs_us, results
from tests.support.shapes import Shape


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
    """Everywhere, and at 128 tokens to NCCL."""
    for num_gpus in (2, 4):
        measured = results(f"multi-gpu-{num_gpus}-h200.json")
        cases = {
            (case["num_tokens"], case["output_layout"]): case["pair"]["median_us"]
            for case in measured["cases"]
            if case["num_max_tagged_tokens"] is None
        }
        nccl_us = {p["num_tokens"]: p["pair"]["median_us"] for p in measured["nccl"]["pairs"]}
        for num_tokens in (1, 16, 64, 128):
            in_workspace = cases[num_tokens, "expert_workspace"]
            assert in_workspace > cases[num_tokens, "expert_major"]
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
    for name, gpus in (("2-h200", "2 H200"), ("4-h200", "4 H200")):
        cases = results(f"multi-gpu-{name}-transfers.json")["cases"]
        by_way = {(case["num_tokens"], case["transfer"]): case for case in cases}
        for num_tokens in {num_tokens for num_tokens, _ in by_way}:
            cells = [gpus, str(num_tokens)]
            for way in ("pull", "pull_push", "push"):
                case = by_way.get((num_tokens, way))
                for what in ("pair", "dispatch"):
                    cells.append("" if case is None else f"{case[what]['median_us']:.1f}")
            assert f"| {' | '.join(cells)} |" in PAGES
            pulled, pushed = (by_way[num_tokens, way] for way in ("pull", "push"))
            gained[gpus, num_tokens] = [
                pulled[what]["median_us"] - pushed[what]["median_us"]
                for what in ("pair", "dispatch")
            ]
    for num_tokens in (32, 64, 128):
        of_pair, of_dispatch = gained["4 H200", num_tokens]
        assert of_dispatch < of_pair / 2  # "more than half is combine's"
    of_eight = Shape(8, 128, 7168, 256, 8, dispatch_dtype=torch.float8_e4m3fn, device="cuda")
    sizes = [s.layout().num_bytes for s in (of_eight, replace(of_eight, transfer="push"))]
    assert f"{(sizes[1] - sizes[0]) / 2**20:.1f} MiB more" in FLOWING


def test_what_order_costs_is_as_measured() -> None:
    ordered, unordered = (
        {
            case["num_tokens"]: case["dispatch"]["median_us"]
            for case in results(f"multi-gpu-2-h100-{name}.json")["cases"]
        }
        for name in ("ordered", "unordered")
    )
    assert list(ordered) == list(unordered) == [1, 16, 64, 128]
    told = "{:.1f}, {:.1f}, {:.1f} and {:.1f} us, and {:.1f}, {:.1f}, {:.1f} and {:.1f} in a build"
    assert told.format(*ordered.values(), *unordered.values()) in FLOWING
    most = max(us - unordered[num_tokens] for num_tokens, us in ordered.items())
    assert f"the order costs at most {most:.1f} us" in FLOWING


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
