"""Around a defect of SGLang 0.5.19, of which 0.5.20 is rid (SGLang's pull request 39899).

With data-parallel attention, a language model head of each rank's own, and CUDA graphs for prefill,
a rank without a request becomes one with a request of no tokens, and looks for its last token: the
server ends with an IndexError at the first prompt (seen on two H200s). It has nothing to do with
how tokens travel; the pull request reports it of SGLang's own `deepep`.
"""

from __future__ import annotations

import functools
import inspect
from typing import Any

from ep_backend_sglang.patching import require, require_parameters

PLACE = "sglang.srt.layers.logits_processor.LogitsMetadata.from_forward_batch"
MODE_BEFORE = "_original_forward_mode"


def check() -> None:
    from sglang.srt.layers.logits_processor import LogitsMetadata
    from sglang.srt.model_executor.forward_batch_info import ForwardBatch, ForwardMode

    if not has_defect():
        return
    require_parameters(LogitsMetadata.from_forward_batch, PLACE, "forward_batch")
    place = f"{ForwardBatch.__module__}.ForwardBatch"
    require(MODE_BEFORE in ForwardBatch.__annotations__, place, f"lacks {MODE_BEFORE!r}")
    require(hasattr(ForwardMode, "IDLE"), f"{ForwardMode.__module__}.ForwardMode", "lacks 'IDLE'")


def install() -> None:
    """A rank that was idle looks for no token."""
    from sglang.srt.layers.logits_processor import LogitsMetadata
    from sglang.srt.model_executor.forward_batch_info import ForwardMode

    if not has_defect():
        return
    original = LogitsMetadata.from_forward_batch

    @functools.wraps(original)
    def from_forward_batch(forward_batch: Any) -> Any:
        mode = forward_batch.forward_mode
        if getattr(forward_batch, MODE_BEFORE) == ForwardMode.IDLE:
            forward_batch.forward_mode = ForwardMode.IDLE
        try:
            return original(forward_batch)
        finally:
            forward_batch.forward_mode = mode

    LogitsMetadata.from_forward_batch = staticmethod(from_forward_batch)


def has_defect() -> bool:
    """Whether logits are looked for in a rank that was idle before it got a request of nothing."""
    from sglang.srt.layers.logits_processor import LogitsMetadata

    function = inspect.unwrap(LogitsMetadata.from_forward_batch)
    return MODE_BEFORE not in function.__code__.co_names
