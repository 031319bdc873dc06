"""`ep-backend bench op --device cuda`: dispatch + combine between virtual ranks on one GPU.

One CUDA graph holds a chain of pairs (dispatch, combine of an expert output made before) of every
rank, each rank on a branch of its own. Events before and behind a replay give its time; a pair's is
the median over replays, divided by the chain. Every case is checked before and after. Data stay in
the L2 cache as far as they fit; `--cold` also times single pairs behind 256 MiB of writes.

Virtual ranks share one GPU's SMs and memory and have no link between them: these numbers tell what
launches, waits and copies cost, and nothing about NVLink or a network.
"""

from __future__ import annotations

import gc
import json
import os
import shlex
import sys
from collections.abc import Callable
from dataclasses import asdict, replace
from datetime import datetime, timezone
from functools import partial
from typing import Any, TypeVar

import torch

from ep_backend import EPBackendError, _native
from ep_backend.bench.op_cuda_case import measure
from ep_backend.bench.op_cuda_floors import (
    copy_gbs,
    gemm_beside_dispatch,
    one_element_kernel_us,
)
from ep_backend.bench.op_cuda_report import (
    CaseRow,
    Floors,
    GemmRow,
    driver_and_versions,
    flashinfer_table,
    machine,
    peers,
    print_table,
    reason,
    table_rows,
)
from ep_backend.bench.op_cuda_settings import (
    PROGRAM,
    CudaBenchSettings,
    parse_arguments,
)
from ep_backend.bench.options import without_output
from ep_backend.bench.peer_flashinfer import FlashInferTimes, time_flashinfer
from ep_backend.bench.provenance import commit
from ep_backend.tuning import untuned_unless_asked

T = TypeVar("T")

FLASHINFER_CAPTION = (
    "Same run, inputs, graphs and timing, in a process of its own. block: threads of its combine, "
    "256 by default. ours: rank-major, dispatch and combine one kernel each."
)
CAPTION = (
    "All ranks at once. pair us: median of a chain's replays / its length; dispatch: the same of "
    "dispatches alone; combine: their difference. MB: what a pair must read and write; roofline: "
    "time of a copy of that / pair. One rank has received when it has sent: its hooks do nothing."
)


def main(arguments: list[str] | None = None) -> int:
    """Runs the benchmark; returns the exit status, 1 where a case failed."""
    arguments = sys.argv[1:] if arguments is None else arguments
    settings, output = parse_arguments(arguments)
    if not _native.has_cuda or not torch.cuda.is_available():
        print("bench op --device cuda: needs a GPU and a build with CUDA", file=sys.stderr)
        return 1
    # So that no two ranks' streams share one of the GPU's queues; read when CUDA starts.
    os.environ.setdefault("CUDA_DEVICE_MAX_CONNECTIONS", "32")
    untuned_unless_asked()
    begin = datetime.now(timezone.utc)
    floors = measure_floors(settings) if settings.with_floors else None
    rows = measure_rows(settings)
    gemms = measure_gemms(settings) if settings.with_gemm else []
    gpu = machine()
    flashinfer = time_flashinfer(settings, gpu["num_sms"])
    print_results(settings, gpu, rows, floors, gemms)
    print_flashinfer(flashinfer, rows)
    if output is not None:
        document = {
            "bench": "op",
            "device": "cuda",
            "date": begin.isoformat(timespec="seconds"),
            "command": shlex.join([*PROGRAM.split(), *without_output(arguments)]),
            "commit": commit(),
            "machine": gpu,
            "settings": asdict(settings),
            "floors": asdict(floors) if floors is not None else None,
            "gemm_beside_dispatch": [gemm.to_json() for gemm in gemms],
            "peers": peers(flashinfer),
            "flashinfer": [row.to_json() for row in flashinfer.rows],
            "cases": [row.to_json(floors.copy_gbs if floors else None) for row in rows],
        }
        output.parent.mkdir(parents=True, exist_ok=True)
        output.write_text(json.dumps(document, indent=2) + "\n")
    return int(any(row.error for row in rows) or any(gemm.error for gemm in gemms))


def measure_floors(settings: CudaBenchSettings) -> Floors:
    kernel_us = {
        n: one_element_kernel_us(n, settings.chain, settings.num_repeats).median_us
        for n in settings.num_ranks
    }
    floors = Floors(kernel_us, copy_gbs())
    give_memory_back()
    return floors


def measure_rows(settings: CudaBenchSettings) -> list[CaseRow]:
    gpu = torch.cuda.get_device_properties(torch.cuda.current_device())
    rows = []
    cases = list(settings.cases())
    for case in cases:
        times, error = _attempt(partial(measure, settings, case))
        # What the buffer takes where it is not told.
        num_sms = case.num_sms or max(1, gpu.multi_processor_count // case.num_ranks)
        rows.append(CaseRow(replace(case, num_sms=num_sms), times, error))
        outcome = error if times is None else f"{times.pair.median_us:.1f} us"
        print(f"{len(rows)} of {len(cases)}: {rows[-1].case}: {outcome}", file=sys.stderr)
    return rows


def measure_gemms(settings: CudaBenchSettings) -> list[GemmRow]:
    """For every number of ranks, with most tokens and the first of everything else."""
    rows = []
    for num_ranks in settings.num_ranks:
        case = next(settings.cases())
        case = replace(case, num_ranks=num_ranks, num_tokens=max(settings.num_tokens), form="hook")
        rows.append(GemmRow(case, *_attempt(partial(gemm_beside_dispatch, settings, case))))
    return rows


def _attempt(run: Callable[[], T]) -> tuple[T | None, str | None]:
    """The result, or what went wrong: a case that fails is reported as that, the others go on."""
    try:
        return run(), None
    except (EPBackendError, RuntimeError, ValueError) as e:
        return None, reason(e)
    finally:
        give_memory_back()


def give_memory_back() -> None:
    """So that the next buffers, which PyTorch does not allocate, find room."""
    gc.collect()
    torch.cuda.empty_cache()


def print_results(
    settings: CudaBenchSettings,
    gpu: dict[str, Any],
    rows: list[CaseRow],
    floors: Floors | None,
    gemms: list[GemmRow],
) -> None:
    shared, heads, cells = table_rows(rows, floors.copy_gbs if floors else None)
    title = (
        f"dispatch + combine, virtual ranks on one {gpu['gpu']} | hidden {settings.hidden}, "
        f"{settings.num_experts} experts, top-{settings.top_k} | "
        f"{driver_and_versions(gpu)}\n{shared}"
    )
    print_table(title, heads, cells, CAPTION)
    for row in rows:
        if row.error is not None:
            print(f"failed: {row.case}: {row.error}")
    if floors is not None:
        print(floors)
    for gemm in gemms:
        print(gemm)


def print_flashinfer(flashinfer: FlashInferTimes, rows: list[CaseRow]) -> None:
    if flashinfer.rows:
        title = (
            f"FlashInfer {flashinfer.version}, one-sided all-to-all, rank-major\n"
            "its float8 rows were quantised before, which is not timed; ours quantises"
        )
        print_table(title, *flashinfer_table(flashinfer.rows, rows), FLASHINFER_CAPTION)
    for row in flashinfer.rows:
        if row.error is not None:
            print(f"failed: {row.case}: {row.error}")
    for peer, state in peers(flashinfer).items():
        print(f"{peer}: {state}")


if __name__ == "__main__":
    sys.exit(main())
