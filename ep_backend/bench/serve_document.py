"""The document that a sweep grows: begun, written, and taken up again."""

from __future__ import annotations

import dataclasses
import json
import os
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from ep_backend.bench.provenance import commit
from ep_backend.bench.serve_engine import inherited_environment, machine, versions
from ep_backend.bench.serve_engines import ENGINES
from ep_backend.bench.serve_gate import Probe
from ep_backend.bench.serve_report import summarise
from ep_backend.bench.serve_settings import Options, Visit

Document = dict[str, Any]
# What may differ between the parts of a resumed sweep.
FREE_SETTINGS = ("command", "output", "limit_secs", "resume")
# Two machines, or two versions, are no comparison.
MUST_MATCH = ("settings", "machine", "versions")


class CannotResume(ValueError):
    """The document does not go on under these settings."""


def new_document(options: Options) -> Document:
    return {
        "bench": "serve",
        "command": options.command,
        "date": _today(),
        "commit": commit(),
        "versions": versions(ENGINES[options.engine].package),
        "machine": machine(),
        "load_average_before": round(os.getloadavg()[0], 2),
        "inherited_environment": inherited_environment(),
        "settings": settings_of(options),
        "running": "start",
        "servers": [],
        "gates": [],
        "cells": [],
        "profiles": [],
        "summary": [],
    }


def settings_of(options: Options) -> dict[str, Any]:
    """All that decides what is measured, as JSON has it."""
    settings = dataclasses.asdict(options)
    for name in FREE_SETTINGS:
        del settings[name]
    return json.loads(json.dumps(settings, default=str))


def resumed_document(options: Options) -> Document:
    """What `options.output` holds, without its failures, or a new document where there is none.

    Raises:
        CannotResume: it was measured otherwise, or is not a document of this benchmark.
    """
    if not options.output.exists():
        return new_document(options)
    try:
        document = json.loads(options.output.read_text())
    except ValueError as e:
        raise CannotResume(f"{options.output} is not JSON: {e}") from e
    if not isinstance(document, dict) or document.get("bench") != "serve":
        raise CannotResume(f"{options.output} was not written by this benchmark's --output")
    fresh = new_document(options)
    for part in MUST_MATCH:
        names = sorted({*document[part], *fresh[part]})
        for name in names:
            was, now = document[part].get(name), fresh[part].get(name)
            if was != now:
                raise CannotResume(
                    f"{options.output} was measured with {name} {was!r}, now it is {now!r}; "
                    "measure with the same, or into another --output"
                )
    if _was_checked(document) and not reference_path(options).exists():
        raise CannotResume(
            f"{reference_path(options)} is gone, with which the other servers' results are "
            "compared; start anew, without --resume"
        )
    document.pop("error", None)
    document["cells"] = [cell for cell in document["cells"] if "metrics" in cell]
    document.setdefault("resumed", []).append(_today())
    return document


def missing_cells(document: Document, visit: Visit, options: Options) -> list[tuple[int, int]]:
    """`(repeat, concurrency)` of this server that are not measured yet, in order."""
    measured = {
        (cell["repeat"], cell["concurrency"])
        for cell in document["cells"]
        if cell["backend"] == visit.backend and "metrics" in cell
    }
    wanted = [(r, c) for r in visit.repeats for c in options.concurrency]
    return [cell for cell in wanted if cell not in measured]


def lacks_profiles(document: Document, visit: Visit, options: Options) -> bool:
    """Whether some of those that this server is to make are not there."""
    made = {
        profile["concurrency"]
        for profile in document.get("profiles", [])
        if profile["server"] == visit.name and "ranks" in profile
    }
    return options.is_profiled(visit) and not made.issuperset(options.profile)


def _was_checked(document: Document) -> bool:
    """Whether some server's answers were kept, to compare with."""
    return any("error" not in gate for gate in document["gates"])


def forget_server(document: Document, visit: Visit) -> None:
    """Before it is started again: what its earlier start and check gave."""
    document["servers"] = [s for s in document["servers"] if s["name"] != visit.name]
    for part in ("gates", "profiles"):
        document[part] = [p for p in document.get(part, []) if p["server"] != visit.name]


def reference_path(options: Options) -> Path:
    return options.beside("reference.json")


def write_reference(options: Options, name: str, found: Probe) -> None:
    """The first server's answers: a resumed sweep compares with them, too."""
    _replace(reference_path(options), {"server": name} | dataclasses.asdict(found))


def read_reference(document: Document, options: Options) -> tuple[str, Probe] | None:
    """None: no server has been checked; what lies there is of another sweep."""
    if not _was_checked(document):
        return None
    found = json.loads(reference_path(options).read_text())
    return found["server"], Probe(found["logprobs"], found["first_tokens"])


def write_document(document: Document, options: Options) -> None:
    document["summary"] = summarise(document)
    _replace(options.output, document)


def _replace(path: Path, content: Document) -> None:
    """At once: whoever is interrupted leaves the old file or the new one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    new = path.with_name(path.name + ".new")
    new.write_text(json.dumps(content, indent=2) + "\n")
    os.replace(new, path)


def _today() -> str:
    return datetime.now(timezone.utc).strftime("%Y-%m-%d")
