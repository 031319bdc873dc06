"""Whole model forwards beside our operations, so that a trace and the metrics can say which share
of a step is exchange.

Only where a trace (`EP_BACKEND_TRACE`) or, on a CPU, metrics are asked for; otherwise vLLM is left
alone. On a GPU a forward returns before its kernels have run: its span in a trace is the host's,
and there is no metric.
"""

from __future__ import annotations

import atexit
import functools
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ep_backend.observe import metrics
from ep_backend.observe.counts import ProcessCounts
from ep_backend.observe.trace import TRACE_VARIABLE, TraceWriter, write_if_done
from ep_backend_vllm.patching import rebind_everywhere, require, require_parameters

PLACE = "vllm.forward_context.set_forward_context"
KILL_SECS = 10.0
"""That a killed worker may take to give its memory back."""


def check() -> None:
    if directory := os.environ.get(metrics.DIRECTORY_VARIABLE):
        Path(directory).mkdir(parents=True, exist_ok=True)  # vLLM fails where it does not exist
    if not _is_wanted():
        return
    from vllm import forward_context

    require(hasattr(forward_context, "set_forward_context"), PLACE, "does not exist")
    require_parameters(forward_context.set_forward_context, PLACE, "num_tokens")


def install() -> None:
    if not _is_wanted():
        return
    from vllm import forward_context

    original = forward_context.set_forward_context
    counts = ProcessCounts.get() if _are_metrics_wanted() else None
    directory = os.environ.get(TRACE_VARIABLE)
    if directory:
        # vLLM kills its workers, which therefore cannot: the API server does, which ends last.
        atexit.register(write_if_done, Path(directory), wait_secs=KILL_SECS)

    @functools.wraps(original)
    @contextmanager
    def set_forward_context(*args: Any, **kwargs: Any) -> Iterator[None]:
        num_tokens = kwargs.get("num_tokens") or 0
        with original(*args, **kwargs):
            if num_tokens == 0:
                yield
                return
            trace = TraceWriter.from_env("engine")
            begin_ns = time.monotonic_ns()
            yield
            duration_ns = time.monotonic_ns() - begin_ns
            if trace is not None:
                trace.add("forward", num_tokens, begin_ns, duration_ns)
            if counts is not None:
                counts.count_forward(duration_ns)

    rebind_everywhere(original, set_forward_context)


def _is_wanted() -> bool:
    return bool(os.environ.get(TRACE_VARIABLE)) or _are_metrics_wanted()


def _are_metrics_wanted() -> bool:
    from vllm.platforms import current_platform

    return metrics.are_wanted() and current_platform.is_cpu()
