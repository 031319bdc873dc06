"""Spans of whole model forwards beside ours, so that a trace can say which share is exchange.

Only where a trace is asked for (`EP_BACKEND_TRACE_DIR`); otherwise vLLM is left alone.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from ep_backend.observe.trace import TRACE_DIR_VARIABLE, TraceWriter
from ep_backend_vllm.patching import rebind_everywhere, require, require_parameters

PLACE = "vllm.forward_context.set_forward_context"


def check() -> None:
    if not os.environ.get(TRACE_DIR_VARIABLE):
        return
    from vllm import forward_context

    require(hasattr(forward_context, "set_forward_context"), PLACE, "does not exist")
    require_parameters(forward_context.set_forward_context, PLACE, "num_tokens")


def install() -> None:
    if not os.environ.get(TRACE_DIR_VARIABLE):
        return
    from vllm import forward_context

    original = forward_context.set_forward_context

    @functools.wraps(original)
    @contextmanager
    def set_forward_context(*args: Any, **kwargs: Any) -> Iterator[None]:
        num_tokens = kwargs.get("num_tokens") or 0
        trace = TraceWriter.from_env("engine") if num_tokens > 0 else None
        with original(*args, **kwargs):
            if trace is None:
                yield
            else:
                with trace.span("forward", num_tokens):
                    yield

    rebind_everywhere(original, set_forward_context)
