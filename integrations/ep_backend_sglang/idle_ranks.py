"""Around a defect of SGLang 0.5.19, of which 0.5.20 is rid (SGLang's pull request 39899).

With data-parallel attention, a language model head and dense layers of each rank's own, and CUDA
graphs for prefill, a rank without a request becomes one with a request of no tokens, and looks for
its last token: the server ends with an IndexError at the first prompt (seen on two H200s). It has
nothing to do with how tokens travel; the pull request reports it of SGLang's own `deepep`.
"""

from __future__ import annotations

import inspect
import logging
from typing import Any

logger = logging.getLogger(__name__)
DISABLED = "disabled"
CHOICES = ("cuda_graph_backend_prefill", "cuda_graph_config")
"""Of a command line that decides on prefill's graphs itself."""
FIELDS = (*CHOICES, "enable_dp_attention", "enable_dp_lm_head", "moe_dense_tp_size")
"""Of the arguments, that are read here."""


def avoid_crash(record: Any) -> None:
    """Prefills without graphs where this SGLang would end; what the user has chosen stays.

    Args:
        record: unresolved arguments.
    """
    shares_nothing = (
        record.enable_dp_attention and record.enable_dp_lm_head and record.moe_dense_tp_size == 1
    )
    if not shares_nothing or any(getattr(record, name) is not None for name in CHOICES):
        return
    if not has_defect():
        return
    record.cuda_graph_backend_prefill = DISABLED
    logger.warning(
        "This SGLang ends with an IndexError when a rank has no request while another one "
        "prefills through a CUDA graph: ep_backend has set --cuda-graph-backend-prefill %s. "
        "SGLang 0.5.20 and newer need not.",
        DISABLED,
    )


def has_defect() -> bool:
    """Whether logits are looked for in a rank that was idle before it got a request of nothing."""
    from sglang.srt.layers.logits_processor import LogitsMetadata

    function = inspect.unwrap(LogitsMetadata.from_forward_batch)
    return "_original_forward_mode" not in function.__code__.co_names
