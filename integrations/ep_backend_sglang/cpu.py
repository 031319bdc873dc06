"""What SGLang lacks on a CPU to run its DeepEP dispatcher. Does nothing where there is a GPU."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch

from ep_backend_sglang.patching import require, require_global

PLACE = "sglang.srt.layers.moe.token_dispatcher.deepep.DeepEPBuffer.get_deepep_buffer"


def check() -> None:
    if torch.cuda.is_available():
        return
    from sglang.srt.layers.moe.token_dispatcher import deepep

    require(hasattr(deepep.DeepEPBuffer, "get_deepep_buffer"), PLACE, "does not exist")
    require_global(deepep.DeepEPBuffer.get_deepep_buffer, PLACE, "get_device_properties")


def install() -> None:
    if torch.cuda.is_available():
        return
    _describe_a_device()


def _describe_a_device() -> None:
    """Before it makes a buffer, the dispatcher asks for the number of SMs, to warn users of the
    normal kernels."""

    def get_device_properties(device: Any = None) -> Any:
        return SimpleNamespace(multi_processor_count=1)

    torch.cuda.get_device_properties = get_device_properties
