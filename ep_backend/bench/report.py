"""`ep-backend report`: the results of all benchmarks on one page, which needs only itself."""

from __future__ import annotations

import json
from collections.abc import Sequence
from importlib import resources
from pathlib import Path
from typing import Any

from ep_backend.bench import report_cases, report_demo, serve_page
from ep_backend.bench.page import Section, page

TITLE = "ep_backend: results"


class NoResult(ValueError):
    """A file that is not the result of a benchmark."""


def bundled_results() -> list[Path]:
    """Those that come with the package."""
    directory = Path(str(resources.files("ep_backend.bench") / "results"))
    return sorted(directory.glob("*.json"))


def section_of_file(path: Path) -> Section:
    """A section for the result of any benchmark, by what it holds.

    Raises:
        NoResult: the file cannot be read, or holds no measurement.
    """
    try:
        document: Any = json.loads(path.read_text())
    except (OSError, ValueError) as e:
        raise NoResult(f"{path} cannot be read: {e}") from e
    try:
        if not isinstance(document, dict):
            raise NoResult(f"{path} holds a {type(document).__name__}, expected a benchmark's JSON")
        if {"cells", "gates", "servers"} <= document.keys():
            return serve_page.section_of(document, path.name)
        if {"engine", "runs", "exchange"} <= document.keys():
            return report_demo.section_of(document, path.name)
        if report_cases.has_cases(document):
            return report_cases.section_of(document, path.name)
    except NoResult:
        raise
    except (KeyError, TypeError, AttributeError, ValueError) as e:
        raise NoResult(f"{path} lacks what its benchmark writes: {e!r}") from e
    raise NoResult(f"{path} holds no measurement that this version knows")


def write_report(output: Path, results: Sequence[Path]) -> list[Section]:
    """Writes the page, in the order of `results`, and returns its sections.

    Raises:
        NoResult: one of the files is none; nothing is written.
    """
    sections = [section_of_file(path) for path in results]
    output.parent.mkdir(parents=True, exist_ok=True)
    output.write_text(page(TITLE, sections))
    return sections
