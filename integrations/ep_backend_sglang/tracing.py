"""Spans of SGLang's forward passes, and of a layer's exchange as its dispatcher sees it, beside
those of our buffer.

Only where a trace is asked for (`EP_BACKEND_TRACE`); otherwise SGLang is left alone.
"""

from __future__ import annotations

import functools
import os
import time
from collections.abc import Callable
from typing import Any

from ep_backend.observe.trace import TRACE_VARIABLE, TraceWriter
from ep_backend_sglang.patching import require, require_parameters

RUNNER = "sglang.srt.model_executor.model_runner.ModelRunner"
DISPATCHER = "sglang.srt.layers.moe.token_dispatcher.deepep.DeepEPDispatcher"


def check() -> None:
    if not os.environ.get(TRACE_VARIABLE):
        return
    from sglang.srt.layers.moe.token_dispatcher.deepep import DeepEPDispatcher
    from sglang.srt.model_executor.model_runner import ModelRunner

    for cls, place, name, parameter in (
        (ModelRunner, RUNNER, "forward", "forward_batch"),
        (DeepEPDispatcher, DISPATCHER, "dispatch", "hidden_states"),
        (DeepEPDispatcher, DISPATCHER, "combine", "combine_input"),
    ):
        require(name in vars(cls), place, f"lacks {name!r}")
        require_parameters(getattr(cls, name), f"{place}.{name}", parameter)


def install() -> None:
    if not os.environ.get(TRACE_VARIABLE):
        return
    from sglang.srt.layers.moe.token_dispatcher.deepep import DeepEPDispatcher
    from sglang.srt.model_executor.model_runner import ModelRunner

    record(ModelRunner, "forward", "forward", lambda batch: len(batch.input_ids))
    record(DeepEPDispatcher, "dispatch", "prepare", lambda hidden_states: len(hidden_states))
    record(DeepEPDispatcher, "combine", "finalize", lambda rows: len(rows.topk_ids))


def record(cls: Any, name: str, kind: str, num_tokens_of: Callable[[Any], int]) -> None:
    """Records every call of a method as a span.

    Args:
        cls: or a module, for a function whose first argument is passed by position.
        num_tokens_of: this rank's tokens, from the method's first argument.
    """
    original = getattr(cls, name)

    @functools.wraps(original)
    def recorded(self: Any, *args: Any, **kwargs: Any) -> Any:
        num_tokens = num_tokens_of(args[0] if args else next(iter(kwargs.values())))
        begin_ns = time.monotonic_ns()
        result = original(self, *args, **kwargs)
        # Only now: the first dispatch makes our buffer, which names the file by its rank.
        trace = TraceWriter.from_env("engine")
        if trace is not None:
            trace.add(kind, num_tokens, begin_ns, time.monotonic_ns() - begin_ns)
        return result

    setattr(cls, name, recorded)
