"""The names users pass to `--all2all-backend`."""

from __future__ import annotations

import os

LOW_LATENCY = "ep_backend_low_latency"
HIGH_THROUGHPUT = "ep_backend_high_throughput"
BACKENDS = (LOW_LATENCY, HIGH_THROUGHPUT)

FORMAT_VARIABLE = "EP_BACKEND_VLLM_FORMAT"
FORMATS = ("batched", "standard")


def uses_batched_format() -> bool:
    """Of the low-latency backend: whether experts get rows packed by expert, and counts (vLLM's
    "batched experts"), or a row a token, and ids (its "standard" format): that on CUDA, where more
    experts take it.

    Raises:
        ValueError: `EP_BACKEND_VLLM_FORMAT` is neither.
    """
    from vllm.platforms import current_platform

    chosen = os.environ.get(FORMAT_VARIABLE) or (
        "batched" if current_platform.is_cpu() else "standard"
    )
    if chosen not in FORMATS:
        raise ValueError(f"{FORMAT_VARIABLE} is {chosen!r}, expected {' or '.join(FORMATS)}.")
    return chosen == "batched"
