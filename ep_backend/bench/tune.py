"""`ep-backend tune`: searches settings for a shape on this machine, and stores them in the table
that buffers look in (`ep_backend.tuning`).

Low latency on CUDA: pull or push, up to which batch rows are tagged, SMs; what is fastest over the
batches. Normal on CUDA: the fewest SMs within a few percent of the best, and then the least memory.
On a CPU: how long a wait polls, and memory. Layout and dtypes are the caller's choice: each has an
entry of its own. Every candidate's results are checked; what was found is timed once more in turns
with the defaults, which are kept where it does not gain.
"""

from __future__ import annotations

import gc
import json
import os
import shlex
import sys
import tempfile
from dataclasses import asdict
from datetime import datetime, timezone
from functools import partial
from pathlib import Path
from typing import Any

import torch

from ep_backend import EPBackendError, _native
from ep_backend.bench.multi_gpu_world import StepFailed
from ep_backend.bench.op_cuda_rank import CheckFailed
from ep_backend.bench.op_cuda_report import machine, reason
from ep_backend.bench.op_processes import RankFailed, run_ranks
from ep_backend.bench.options import without_output
from ep_backend.bench.provenance import commit, installed_versions, this_machine
from ep_backend.bench.tune_rank import ShapeResult, num_ops_of, rank_main, search
from ep_backend.bench.tune_ranks import VirtualRanks
from ep_backend.bench.tune_report import print_found, print_table_file
from ep_backend.bench.tune_settings import PROGRAM, Request, TuneSettings, parse_arguments
from ep_backend.tuning import TUNING_VARIABLE, Table, merge_into, table_path
from ep_backend.tuning.table import OFF


def main(arguments: list[str] | None = None) -> int:
    """Returns the exit status, 1 where a search failed; those before it are in the table."""
    arguments = sys.argv[1:] if arguments is None else arguments
    request = parse_arguments(arguments)
    path = request.table or table_path()
    if path is None:
        why = f"{TUNING_VARIABLE} is off, or there is no home directory"
        print(f"{PROGRAM}: {why}; name a table with --table", file=sys.stderr)
        return 2
    if request.shows:
        return print_table_file(path)
    # So that no two streams share one of the GPU's queues; read when CUDA starts.
    os.environ.setdefault("CUDA_DEVICE_MAX_CONNECTIONS", "32")
    missing = _missing(request.settings)
    if missing:
        print(f"{PROGRAM}: {missing}", file=sys.stderr)
        return 1
    try:
        _try_to_write_beside(path)
    except OSError as e:  # now, not after a search of minutes
        print(
            f"{PROGRAM}: {path} cannot be written ({e}); name another with --table", file=sys.stderr
        )
        return 1
    # What was found before must not change what is measured now.
    os.environ[TUNING_VARIABLE] = OFF
    begin = datetime.now(timezone.utc)
    about = {
        "date": begin.isoformat(timespec="seconds"),
        "command": shlex.join([*PROGRAM.split(), *without_output(arguments, "--table")]),
    }
    results: list[ShapeResult] = []
    error = None
    try:
        for num_ranks in request.settings.num_ranks:
            run = _search_virtual if request.settings.is_virtual else _search_processes
            run(request.settings, num_ranks, partial(_take, path, about, results))
    except (RankFailed, StepFailed, CheckFailed, EPBackendError, RuntimeError, ValueError) as e:
        error = str(e) if isinstance(e, RankFailed) else reason(e)
        print(f"{PROGRAM} failed: {error}", file=sys.stderr)
    if results:
        print(f"table: {path}")
    if request.output is not None:
        _write(request, about, results, error)
    return int(error is not None)


def _missing(settings: TuneSettings) -> str:
    """Why nothing can be measured here; empty where it can."""
    if settings.device == "cpu":
        return ""
    if not _native.has_cuda or not torch.cuda.is_available():
        return "--device cuda needs a GPU and a build with CUDA"
    if not settings.is_virtual and max(settings.num_ranks) > torch.cuda.device_count():
        return (
            f"{max(settings.num_ranks)} ranks need as many GPUs, and there are "
            f"{torch.cuda.device_count()}; --virtual has all ranks on one"
        )
    return ""


def _try_to_write_beside(path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryFile(dir=path.parent):
        pass


def _take(
    path: Path, about: dict[str, Any], results: list[ShapeResult], result: ShapeResult
) -> None:
    """Stores and prints what was found for a shape: a later search may fail."""
    results.append(result)
    moved = merge_into(path, [result.entry(about)])
    if moved is not None:
        print(f"{path} was no table of this version; it is {moved} now", file=sys.stderr)
    print_found(result)


def _search_virtual(settings: TuneSettings, num_ranks: int, take: Any) -> None:
    for shape in settings.shapes_of(num_ranks):
        print(f"searching: {shape}", file=sys.stderr)
        ranks = VirtualRanks(num_ranks, num_ops_of(settings, shape), settings.num_repeats)
        take(search(ranks, settings, shape, partial(print, file=sys.stderr)))
        gc.collect()
        torch.cuda.empty_cache()  # so that the next buffers find room


def _search_processes(settings: TuneSettings, num_ranks: int, take: Any) -> None:
    def on_reports(reports: list[tuple[str, Any]]) -> None:
        what, value = reports[0]
        if what == "found":
            take(value)
        else:
            print(value, file=sys.stderr)

    run_ranks(rank_main, num_ranks, (settings, num_ranks), on_reports)


def _write(
    request: Request, about: dict[str, Any], results: list[ShapeResult], error: str | None
) -> None:
    assert request.output is not None
    is_cuda = request.settings.device == "cuda"
    document = {
        "bench": "tune",
        "device": request.settings.device,
        **about,
        "commit": commit(),
        "machine": machine() if is_cuda else this_machine() | installed_versions(),
        "settings": asdict(request.settings),
        "cases": [case for result in results for case in result.cases()],
        "tried": [line for result in results for line in result.tried()],
        "table": Table(tuple(result.entry(about) for result in results)).to_json(),
    }
    if error is not None:
        document["error"] = error
    request.output.parent.mkdir(parents=True, exist_ok=True)
    request.output.write_text(json.dumps(document, indent=2) + "\n")


if __name__ == "__main__":
    sys.exit(main())
