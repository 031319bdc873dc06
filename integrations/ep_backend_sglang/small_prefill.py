"""Prefill steps of few tokens through low-latency kernels, with `--deepep-mode auto`.

SGLang prefills with normal kernels, for whose counts the host waits in every layer, and the host is
what such a step waits for. Where no rank has more tokens than a low-latency dispatch takes, a
prefill goes the way of a decode step.

Every rank must choose the same. When SGLang schedules a step, ranks exchange how many tokens each
has; that is kept here until the step runs. Steps of which it is not known stay with normal kernels,
and those of speculative decoding, where a rank has more tokens than it said.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from ep_backend_sglang import cpu_only, dispatcher, tracing
from ep_backend_sglang.patching import require, require_global, require_parameters

SCHEDULER = "sglang.srt.managers.scheduler_components.dp_attn"
GRAPHS = "sglang.srt.model_executor.runner.PrefillCudaGraphRunner"
MOST_TOKENS = "ep_backend_most_tokens"
"""Of batches: of all ranks' the largest number of tokens, or None."""

_most_rows: int | None = None
"""Of a rank in the step that runs, with what graphs pad; None where that is not known."""


def check() -> None:
    from sglang.srt.managers.scheduler_components import dp_attn
    from sglang.srt.model_executor.forward_batch_info import ForwardBatch
    from sglang.srt.model_executor.model_runner import ModelRunner
    from sglang.srt.model_executor.runner import PrefillCudaGraphRunner

    place = f"{SCHEDULER}.prepare_mlp_sync_batch_raw"
    require(hasattr(dp_attn, "prepare_mlp_sync_batch_raw"), place, "does not exist")
    require_global(dp_attn.prepare_mlp_sync_batch_raw, place, "_update_gather_batch")
    place = f"{SCHEDULER}._update_gather_batch"
    require_parameters(dp_attn._update_gather_batch, place, "batch", "mlp_sync_info")
    has_counts = "global_num_tokens" in dp_attn.MLPSyncBatchInfo.__annotations__
    require(has_counts, f"{SCHEDULER}.MLPSyncBatchInfo", "lacks 'global_num_tokens'")
    place = f"{cpu_only.BATCH}.ForwardBatch.init_new"
    require_parameters(ForwardBatch.init_new, place, "batch")
    require_parameters(ModelRunner.forward, f"{tracing.RUNNER}.forward", "forward_batch")
    require_global(PrefillCudaGraphRunner.__init__, f"{GRAPHS}.__init__", "capture_num_tokens")
    _check_dispatcher()


def _check_dispatcher() -> None:
    from sglang.srt.layers import dp_attention
    from sglang.srt.layers.moe.token_dispatcher import deepep
    from sglang.srt.layers.moe.utils import DeepEPMode

    for name in ("get_is_extend_in_batch", "set_is_extend_in_batch"):
        require(hasattr(dp_attention, name), dp_attention.__name__, f"lacks {name!r}")
    # That they are there at all, `dispatcher` has checked.
    place, cls = tracing.DISPATCHER, deepep.DeepEPDispatcher
    require_parameters(cls.combine, f"{place}.combine", "combine_input")
    require_global(cls._get_impl, f"{place}._get_impl", "get_is_extend_in_batch")
    has_input = hasattr(deepep, "DeepEPLLCombineInput")
    require(has_input, dispatcher.PLACE, "lacks 'DeepEPLLCombineInput'")
    require(hasattr(DeepEPMode, "is_auto"), DeepEPMode.__qualname__, "lacks 'is_auto'")


def install() -> None:
    from sglang.srt.layers.moe.token_dispatcher.deepep import DeepEPDispatcher
    from sglang.srt.managers.scheduler_components import dp_attn
    from sglang.srt.model_executor.forward_batch_info import ForwardBatch
    from sglang.srt.model_executor.model_runner import ModelRunner

    _note_when_scheduled(dp_attn)
    _hand_on_to_the_forward_pass(ForwardBatch)
    _know_while_it_runs(ModelRunner)
    _choose_by_size(DeepEPDispatcher)


def _note_when_scheduled(dp_attn: Any) -> None:
    original = dp_attn._update_gather_batch

    @functools.wraps(original)
    def update(batch: Any, mlp_sync_info: Any, *args: Any, **kwargs: Any) -> None:
        original(batch, mlp_sync_info, *args, **kwargs)
        of_each_rank = mlp_sync_info.global_num_tokens
        algorithm = batch.spec_algorithm
        is_known = of_each_rank is not None and (algorithm is None or algorithm.is_none())
        setattr(batch, MOST_TOKENS, max(of_each_rank) if is_known else None)

    dp_attn._update_gather_batch = update


def _hand_on_to_the_forward_pass(forward_batch: Any) -> None:
    original = forward_batch.init_new

    @functools.wraps(original)
    def init_new(batch: Any, *args: Any, **kwargs: Any) -> Any:
        new = original(batch, *args, **kwargs)
        setattr(new, MOST_TOKENS, getattr(batch, MOST_TOKENS, None))
        return new

    forward_batch.init_new = staticmethod(init_new)


def _know_while_it_runs(model_runner: Any) -> None:
    original = model_runner.forward

    @functools.wraps(original)
    def forward(self: Any, forward_batch: Any, *args: Any, **kwargs: Any) -> Any:
        global _most_rows
        before = _most_rows
        _most_rows = _padded(self, getattr(forward_batch, MOST_TOKENS, None))
        try:
            return original(self, forward_batch, *args, **kwargs)
        finally:
            _most_rows = before

    model_runner.forward = forward


def _padded(model_runner: Any, num_tokens: int | None) -> int | None:
    """With the rows that a CUDA graph of prefill adds, if one takes so many tokens."""
    if num_tokens is None:
        return None
    graphs = getattr(model_runner, "prefill_cuda_graph_runner", None)
    sizes = getattr(graphs, "capture_num_tokens", ())
    return min((size for size in sizes if size >= num_tokens), default=num_tokens)


def _choose_by_size(cls: Any) -> None:
    from sglang.srt.layers import dp_attention
    from sglang.srt.layers.moe.token_dispatcher.deepep import DeepEPLLCombineInput

    dispatch, combine = cls.dispatch, cls.combine

    @functools.wraps(dispatch)
    def dispatch_by_size(self: Any, *args: Any, **kwargs: Any) -> Any:
        with like_decode(dp_attention, _most_rows is not None and fits(self, _most_rows)):
            return dispatch(self, *args, **kwargs)

    @functools.wraps(combine)
    def combine_as_dispatched(self: Any, combine_input: Any, **kwargs: Any) -> Any:
        with like_decode(dp_attention, isinstance(combine_input, DeepEPLLCombineInput)):
            return combine(self, combine_input, **kwargs)

    cls.dispatch = dispatch_by_size
    cls.combine = combine_as_dispatched


def fits(of_layer: Any, num_rows: int) -> bool:
    """Whether low-latency kernels can take a prefill step of so many rows a rank."""
    if not of_layer.deepep_mode.is_auto():
        return False
    most: int = of_layer._low_latency_dispatcher.num_max_dispatch_tokens_per_rank
    return num_rows <= most


@contextmanager
def like_decode(dp_attention: Any, is_so: bool = True) -> Iterator[None]:
    """Meanwhile SGLang's dispatcher chooses as for a step that only decodes."""
    is_extend = dp_attention.get_is_extend_in_batch()
    dp_attention.set_is_extend_in_batch(is_extend and not is_so)
    try:
        yield
    finally:
        dp_attention.set_is_extend_in_batch(is_extend)
