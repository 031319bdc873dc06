"""`python -m ep_backend.bench.multi_gpu`: dispatch + combine between GPUs of one host.

A process a GPU; gloo only sets up and keeps the ranks in step between replays. Every rank captures
a CUDA graph with a chain of pairs (dispatch, combine of an expert output made before). Before each
replay the ranks meet on the host, then run one pair ahead of the first event: it ends on all GPUs
within a few microseconds, where hosts launch 20-50 us apart. What is left of that difference is
divided by the chain, and told as the ranks' difference. A replay counts as long as on its slowest
rank; median, p10 and p90 over replays. Every case is checked eagerly and through the graph, before
and after. Data stay in the L2 cache as far as they fit.

In a checkout the tests of several GPUs are run first.

The normal kernels' operations (exact sizes, cached, copied first, ..) are chains of their own.

Beside them in the same run: NCCL's all-to-alls of the same bytes, and copies between the GPUs.
"""

from __future__ import annotations

import json
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from torch.multiprocessing.spawn import ProcessException, spawn

from ep_backend import _native
from ep_backend.bench import multi_gpu_tests
from ep_backend.bench.multi_gpu_rank import DOCUMENT, rank_main
from ep_backend.bench.multi_gpu_report import has_failed, note_crash, print_results
from ep_backend.bench.multi_gpu_settings import Options, parse_arguments
from ep_backend.tuning import untuned_unless_asked


def main(arguments: list[str] | None = None) -> int:
    """Returns the exit status, 1 where a case or a rank failed; with fewer than two GPUs, ends the
    program with status 2."""
    arguments = sys.argv[1:] if arguments is None else arguments
    num_visible = torch.cuda.device_count() if _native.has_cuda else 0
    options = parse_arguments(arguments, num_visible)
    untuned_unless_asked()
    begin = time.monotonic()
    tests = None
    if options.with_tests and multi_gpu_tests.are_here():
        print("tests of several GPUs ...", flush=True)
        tests = multi_gpu_tests.run_tests(options.limit_secs)
    limit_secs = options.limit_secs - (time.monotonic() - begin)
    with tempfile.TemporaryDirectory(prefix="ep-backend-bench-") as directory:
        crash = run_ranks(options, Path(directory), limit_secs)
        document = read_document(Path(directory) / DOCUMENT)
    if crash is not None:
        note_crash(document, crash)
    if tests is not None:
        document["tests"] = tests
    print_results(document)
    if options.output is not None:
        options.output.parent.mkdir(parents=True, exist_ok=True)
        options.output.write_text(json.dumps(document, indent=2) + "\n")
    return int(has_failed(document))


def run_ranks(options: Options, directory: Path, limit_secs: float) -> str | None:
    """Returns what ended a rank early, and with it the others; None: nothing did."""
    context = spawn(rank_main, args=(options, directory), nprocs=options.num_gpus, join=False)
    deadline = time.monotonic() + limit_secs
    try:
        while not context.join(timeout=1.0):
            if time.monotonic() > deadline:
                return f"not done within {options.limit_secs:g} s"
    except ProcessException as e:
        return str(e).strip()
    finally:
        for process in context.processes:
            if process.is_alive():
                process.kill()
    return None


def read_document(path: Path) -> dict[str, Any]:
    """What rank 0 has written, however far it came."""
    return json.loads(path.read_text()) if path.exists() else {"running": "start", "cases": []}


if __name__ == "__main__":
    sys.exit(main())
