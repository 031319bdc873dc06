"""The serving benchmark's document: medians, the verdict, and the printed table."""

from __future__ import annotations

import statistics
from typing import Any

from ep_backend.bench import serve_profile
from ep_backend.bench.op_cuda_report import print_table
from ep_backend.bench.serve_engines import ENGINES
from ep_backend.bench.serve_gate import MAX_LIMIT, MEAN_LIMIT, NUM_PROMPTS

# Times of a table's row, in ms, then what is printed with its range over the repeats.
TIMES = (
    *("tpot_p50_ms", "tpot_p95_ms", "tpot_p99_ms"),
    *("itl_p50_ms", "itl_p95_ms", "itl_p99_ms", "ttft_p50_ms"),
)
RANGED = ("tpot_mean_ms", "output_tokens_per_sec")
HEADS = (
    *("in flight", "backend", "TPOT ms", "range", "/ first", "p50", "p95", "p99"),
    *("ITL p50", "p95", "p99", "TTFT p50", "tok/s", "range", "/ first", "EP share", "runs"),
)
CAPTION = (
    "Medians over runs of each run's mean TPOT, percentiles (ms) and output tokens a second; "
    "range: smallest to largest run; / first: over the first backend's; EP share: of a forward "
    "pass, where workers were traced."
)


def summarise(document: dict[str, Any]) -> list[dict[str, Any]]:
    """For each concurrency and backend in the order asked for: `{metric: {median, min, max}}` over
    the repeats that were measured; `spread` is (max - min) / median."""
    rows = []
    for concurrency in document["settings"]["concurrency"]:
        for backend in document["settings"]["backends"]:
            metrics = [
                cell["metrics"]
                for cell in document["cells"]
                if (cell["concurrency"], cell["backend"]) == (concurrency, backend)
                and "metrics" in cell
            ]
            if metrics:
                rows.append(
                    {"concurrency": concurrency, "backend": backend, "num_runs": len(metrics)}
                    | {
                        name: _statistics([m[name] for m in metrics])
                        for name in metrics[0]
                        if all(name in m for m in metrics)
                    }
                )
    return rows


def _statistics(values: list[float]) -> dict[str, float]:
    median = statistics.median(values)
    return {
        "median": median,
        "min": min(values),
        "max": max(values),
        "spread": (max(values) - min(values)) / median if median else 0.0,
    }


def table_cells(document: dict[str, Any]) -> list[list[str]]:
    """A line a row of the summary, under `HEADS`."""
    rows = summarise(document)
    first_backend = document["settings"]["backends"][0]
    firsts = {row["concurrency"]: row for row in rows if row["backend"] == first_backend}
    lines = []
    for row in rows:
        first = firsts.get(row["concurrency"])
        tpot, tokens = (_ranged(row, first, name) for name in RANGED)
        times = [f"{row[name]['median']:.2f}" if name in row else "" for name in TIMES]
        share = row.get("exchange_share_of_forward")
        end = ["" if share is None else f"{share['median']:.0%}", str(row["num_runs"])]
        lines.append([str(row["concurrency"]), row["backend"], *tpot, *times, *tokens, *end])
    return lines


def _ranged(row: dict[str, Any], first: dict[str, Any] | None, name: str) -> list[str]:
    values = row[name]
    digits = 2 if name.endswith("_ms") else 0
    ratio = (
        "" if first is None or first is row else f"{values['median'] / first[name]['median']:.2f}"
    )
    value_range = f"{values['min']:.{digits}f}-{values['max']:.{digits}f}"
    return [f"{values['median']:.{digits}f}", value_range, ratio]


def gate_line(gate: dict[str, Any]) -> str:
    """What the correctness check of one server found."""
    if "error" in gate:
        return f"{gate['server']}: correctness not checked: {gate['error']}"
    parts = [_difference(gate["again"], "asked twice")]
    if "versus" in gate:
        parts.insert(0, _difference(gate, f"against {gate['versus']}"))
    verdict = "" if gate["good"] else "DIFFERENT RESULTS: "
    return f"{verdict}{gate['server']}: prompt log-probabilities, " + "; ".join(parts)


def _difference(difference: dict[str, Any], against: str) -> str:
    return (
        f"{against}: mean |d| {difference['mean']:.4f}, max {difference['max']:.4f} of "
        f"{difference['num_logprobs']}, first greedy tokens equal "
        f"{difference['num_first_tokens_equal']}/{NUM_PROMPTS}"
    )


def has_failed(document: dict[str, Any]) -> bool:
    """Something was not measured, or a backend computes something else than the first one."""
    kinds = ("servers", "cells", "gates", "profiles")
    parts = [part for kind in kinds for part in document.get(kind, [])]
    return (
        "error" in document
        or any("error" in part for part in parts)
        or not all(gate.get("good", False) for gate in document["gates"])
    )


def failures(document: dict[str, Any]) -> list[str]:
    """A line for everything that was not measured, or is wrong; a server's log is not repeated."""
    lines = [
        f"failed: {cell['server']}, {cell['concurrency']} in flight, repeat {cell['repeat']}: "
        f"{cell['error']}"
        for cell in document["cells"]
        if "error" in cell
    ]
    lines += [
        f"failed: {server['name']}: {server['error'].splitlines()[0]}"
        for server in document["servers"]
        if "error" in server
    ]
    lines += [
        f"failed: {profile['server']}, not profiled: {profile['error']}"
        for profile in document.get("profiles", [])
        if "error" in profile
    ]
    lines += [
        f"failed: {gate['server']}: "
        + ("correctness not checked" if "error" in gate else "different results")
        for gate in document["gates"]
        if not gate.get("good", False)
    ]
    return lines + ([f"error: {document['error']}"] if "error" in document else [])


def title(document: dict[str, Any]) -> str:
    machine, settings, versions = (document[k] for k in ("machine", "settings", "versions"))
    engine = ENGINES[settings["engine"]]
    gpus = machine["gpus"]
    where = (
        f"{len(gpus)} x {gpus[0]}, driver {machine['driver']}"
        if settings["device"] == "cuda" and gpus
        else f"{machine['cpu']}, {machine['num_cpus']} cores"
    )
    return (
        f"{engine.title} {versions.get(engine.package, '')}, {settings['num_ranks']} ranks, "
        f"{settings['num_input_tokens']} tokens in, {settings['num_output_tokens']} out | "
        f"{where} | {document['date']}"
    )


def print_results(document: dict[str, Any]) -> None:
    cells = table_cells(document)
    if cells:
        print_table(title(document), list(HEADS), cells, CAPTION)
    profiled = serve_profile.table_cells(document.get("profiles", []))
    if profiled:
        heads, caption = list(serve_profile.HEADS), serve_profile.CAPTION
        print_table("Kernels of a decode step", heads, profiled, caption)
    for gate in document["gates"]:
        print(gate_line(gate))
    if document["gates"]:
        print(f"(expected: mean |d| at most {MEAN_LIMIT}, max at most {MAX_LIMIT})")
    for failure in failures(document):
        print(failure)
