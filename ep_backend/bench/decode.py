"""`ep-backend bench decode`: the MoE layers of a decode step, without an engine.

Dispatch, the experts' GEMMs (plain PyTorch, on a GPU Triton), combine; in bfloat16. With one micro-
batch, whose dispatch and combine are one call each, and with two, which overlap through receive
hooks on one stream. Timed are a step, a step without experts, and a step without the exchange: how
much of the exchange passes beside the experts is the difference.

With `--gpu-per-rank` every rank has a GPU of its own. Else all ranks of a virtual world share one:
experts take as long as on a GPU that does the work of all ranks, and nothing is said about a link.
"""

from __future__ import annotations

import json
import os
import shlex
import sys
from collections.abc import Callable
from dataclasses import asdict
from datetime import datetime, timezone
from typing import Any

import rich.box
import torch
from rich.console import Console
from rich.table import Table

from ep_backend import EPBackendError, _native
from ep_backend.bench import decode_cpu, decode_cuda, decode_gpus
from ep_backend.bench.decode_rank import CheckFailed
from ep_backend.bench.decode_settings import PROGRAM, Case, DecodeSettings, parse_arguments
from ep_backend.bench.decode_times import CaseRow, Times
from ep_backend.bench.op_cuda_report import machine as gpu_machine
from ep_backend.bench.op_processes import RankFailed
from ep_backend.bench.options import without_output
from ep_backend.bench.provenance import commit, installed_versions, this_machine
from ep_backend.tuning import untuned_unless_asked


def main(arguments: list[str] | None = None) -> int:
    """Runs the benchmark; returns the exit status."""
    arguments = sys.argv[1:] if arguments is None else arguments
    settings, output = parse_arguments(arguments)
    if settings.device == "cuda" and not (_native.has_cuda and torch.cuda.is_available()):
        print(
            f"{PROGRAM} --device cuda: needs a GPU and a build with CUDA. Pass --device cpu.",
            file=sys.stderr,
        )
        return 1
    if settings.gpu_per_rank and max(settings.num_ranks) > torch.cuda.device_count():
        print(
            f"{PROGRAM} --gpu-per-rank: {max(settings.num_ranks)} ranks, this host has "
            f"{torch.cuda.device_count()} GPUs. Ask for fewer ranks, or leave the option out.",
            file=sys.stderr,
        )
        return 1
    untuned_unless_asked()
    begin = datetime.now(timezone.utc)
    rows: list[CaseRow] = []

    def on_times(case: Case, times: Times) -> None:
        rows.append(CaseRow(case, times, settings.shape.num_layers))
        print(f"{len(rows)} of {len(settings.cases())}: {case}: {times.step:.3f} ms a layer")

    try:
        measure(settings, on_times)
    except (CheckFailed, EPBackendError, RankFailed) as e:
        print(f"{PROGRAM}: {e}", file=sys.stderr)
        return 1
    where = machine(settings)
    print_table(settings, where, rows)
    if output is not None:
        document = {
            "bench": "decode",
            "date": begin.isoformat(timespec="seconds"),
            "commit": commit(),
            "command": shlex.join([*PROGRAM.split(), *without_output(arguments)]),
            "machine": where,
            "settings": asdict(settings) | {"shape": asdict(settings.shape)},
            "cases": [row.to_json() for row in rows],
        }
        output.parent.mkdir(parents=True, exist_ok=True)
        output.write_text(json.dumps(document, indent=2, default=str) + "\n")
    return 0


def measure(settings: DecodeSettings, on_times: Callable[[Case, Times], None]) -> None:
    """
    Raises:
        CheckFailed, EPBackendError, RankFailed: a result is wrong, or a rank failed.
    """
    if settings.device == "cuda" and not settings.gpu_per_rank:
        for case in settings.cases():
            on_times(case, decode_cuda.measure(settings, case))
            torch.cuda.empty_cache()
        return
    processes = decode_gpus if settings.gpu_per_rank else decode_cpu
    for num_ranks in settings.num_ranks:
        processes.measure_all(settings, num_ranks, on_times)


def machine(settings: DecodeSettings) -> dict[str, Any]:
    if settings.device == "cuda":
        return gpu_machine()
    return this_machine() | installed_versions() | {"load_average": os.getloadavg()[0]}


def print_table(settings: DecodeSettings, where: dict[str, Any], rows: list[CaseRow]) -> None:
    shape = settings.shape
    title = (
        f"MoE layers of a decode step, {settings.model} | hidden {shape.hidden}, "
        f"{shape.num_experts} experts of {shape.intermediate}, top-{shape.top_k}, bfloat16"
        f"{', a GPU a rank' if settings.gpu_per_rank else ''} | "
        + ", ".join(f"{v}" for v in where.values())
    )
    caption = (
        "Milliseconds of a layer on the slowest rank, medians: a step, its exchange alone, its "
        f"experts alone. share: of a step, what the exchange adds. hidden: of the exchange, what "
        f"passes beside the experts. ms/token: {shape.num_layers} such layers."
    )
    table = Table(title=title, caption=caption, box=rich.box.SIMPLE)
    for name in ("ranks", "tokens", "batches", "step", "exchange", "experts"):
        table.add_column(name, justify="right")
    for name in ("share", "hidden", "ms/token"):
        table.add_column(name, justify="right")
    for row in rows:
        case, times = row.case, row.times
        table.add_row(
            str(case.num_ranks),
            str(case.num_tokens),
            str(case.num_micro_batches),
            f"{times.step:.3f}",
            f"{times.exchange:.3f}",
            f"{times.experts:.3f}",
            f"{times.exchange_share:.0%}",
            f"{times.hidden:.0%}" if case.num_micro_batches > 1 else "",
            f"{row.ms_per_token:.2f}",
        )
    Console(width=max(100, Console().width)).print(table)


if __name__ == "__main__":
    raise SystemExit(main())
