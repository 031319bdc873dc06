"""The pages that have numbers, and the results that those are compared with."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from pathlib import Path

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text()
RESULTS = ROOT / "ep_backend" / "bench" / "results"
PAGES = README + (RESULTS / "NUMBERS.md").read_text()
"""Where numbers are."""
FLOWING = " ".join(PAGES.split())
README_FLOWING = " ".join(README.split())


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


def median(run: dict, metric: str) -> float:
    return run[metric]["median"]


def medians(runs: Sequence[dict], *metrics: str) -> list[list[float]]:
    """Of each metric, of each run."""
    return [[median(run, metric) for run in runs] for metric in metrics]


def runs_of(measured: dict) -> dict[int, list[dict]]:
    """By concurrency; of each backend, in their order."""
    backends = measured["settings"]["backends"]
    runs = {(run["concurrency"], run["backend"]): run for run in measured["summary"]}
    return {c: [runs[c, b] for b in backends] for c in measured["settings"]["concurrency"]}
