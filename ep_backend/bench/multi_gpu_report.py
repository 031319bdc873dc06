"""The multi-GPU benchmark's document, printed."""

from __future__ import annotations

from typing import Any

from ep_backend.bench.multi_gpu_normal_report import print_normal
from ep_backend.bench.op_cuda_report import driver_and_versions, print_table

CAPTION = (
    "pair us: median of a chain's replays on the slowest rank / its length; dispatch: the same of "
    "dispatches alone; combine: their difference; NCCL: two all-to-alls of as many rows to each "
    "rank; ranks: slowest minus fastest."
)
SETTING_HEADS = ("tokens", "dtype", "combine dtype", "layout", "form", "transfer", "SMs", "tagged")
TIME_HEADS = ("pair us", "p10", "p90", "dispatch", "combine", "NCCL", "ranks")
# What may crash without taking the cases' results with it.
SIDE_MEASUREMENTS = ("copy", "nccl")


def note_crash(document: dict[str, Any], crash: str) -> None:
    """Writes down that the ranks ended early, where it belongs."""
    running = document["running"]
    if running in SIDE_MEASUREMENTS:
        document.setdefault(running, {})["error"] = crash
    elif running is None:
        document["note"] = f"after the last measurement: {crash}"
    else:
        document["error"] = f"in {running}: {crash}"


def has_failed(document: dict[str, Any]) -> bool:
    cases = document["cases"] + document.get("normal", {}).get("cases", [])
    parts = [document, document.get("tests", {}), *cases]
    return any("error" in part for part in parts)


def table_cells(document: dict[str, Any]) -> list[list[str]]:
    """A line a case, under `SETTING_HEADS` and `TIME_HEADS`."""
    nccl_us = {
        _nccl_key(row): row["pair"]["median_us"]
        for row in document.get("nccl", {}).get("pairs", [])
    }
    return [_line(case, nccl_us) for case in document["cases"]]


def _nccl_key(row: dict[str, Any]) -> tuple[Any, ...]:
    return row["num_tokens"], row["dispatch_dtype"], row["combine_dtype"]


def _line(case: dict[str, Any], nccl_us: dict[tuple[Any, ...], float]) -> list[str]:
    num_sms, tagged = case["num_sms"], case["num_max_tagged_tokens"]
    line = [
        str(case["num_tokens"]),
        case["dispatch_dtype"],
        case["combine_dtype"],
        case["output_layout"].removesuffix("_major"),
        case["form"],
        case["transfer"],
        "all" if num_sms is None else str(num_sms),
        "default" if tagged is None else "off" if tagged == 0 else str(tagged),
    ]
    if "error" in case:
        return [*line, "failed", *[""] * (len(TIME_HEADS) - 1)]
    pair = case["pair"]
    times = [pair["median_us"], pair["p10_us"], pair["p90_us"], case["dispatch"]["median_us"]]
    times.append(case["combine_us"])
    line += [f"{us:.2f}" for us in times]
    nccl = nccl_us.get(_nccl_key(case))
    return [*line, "" if nccl is None else f"{nccl:.2f}", f"{case['pair_rank_difference_us']:.2f}"]


def print_results(document: dict[str, Any]) -> None:
    if document["cases"]:
        gpu, settings = document["machine"], document["settings"]
        title = (
            f"dispatch + combine, {len(document['cards'])} x {gpu['gpu']}, a process each | hidden "
            f"{settings['hidden']}, {settings['num_experts']} experts, top-{settings['top_k']} | "
            f"{driver_and_versions(gpu)}"
        )
        print_table(title, [*SETTING_HEADS, *TIME_HEADS], table_cells(document), CAPTION)
    for case in document["cases"]:
        if "error" in case:
            name = " ".join(_line(case, {})[: len(SETTING_HEADS)])
            print(f"failed: {name}: {case['error']}")
    print_normal(document)
    copy = document.get("copy", {})
    if "gbs" in copy:
        print(f"copy of {copy['num_bytes'] >> 20} MiB, GPU 0 to 1: {copy['gbs']:.0f} GB/s")
    for name in SIDE_MEASUREMENTS:
        if "error" in document.get(name, {}):
            print(f"{name}: {document[name]['error']}")
    tests = document.get("tests")
    if tests is not None:
        print(f"tests of several GPUs: {tests.get('error', tests.get('summary'))}")
    for name in ("note", "error"):
        if name in document:
            print(f"{name}: {document[name]}")
