"""Our buffer behind SGLang's `DeepEPDispatcher`.

The dispatcher stays SGLang's: its two-batch overlap, graph capture and expert statistics with it.
Only the names that its module imports from `deep_ep` are replaced, in that module; the package
`deep_ep`, installed or not, is left alone.

And low-latency dispatches are given the weights that SGLang keeps for combine: so one row a rank
goes home, not one for each expert.
"""

from __future__ import annotations

import functools
from typing import Any

from ep_backend_sglang.patching import require, require_global, require_parameters

PLACE = "sglang.srt.layers.moe.token_dispatcher.deepep"


def check() -> None:
    from sglang.srt.distributed.parallel_state import GroupCoordinator, get_tp_group
    from sglang.srt.layers.moe import utils
    from sglang.srt.layers.moe.token_dispatcher import deepep

    users = (
        ("DeepEPBuffer", "get_deepep_buffer", "Buffer"),
        ("DeepEPConfig", "__init__", "Buffer"),
        ("DeepEPConfig", "__init__", "Config"),
        ("_DeepEPDispatcherImplBase", "__init__", "use_deepep"),
        ("_DeepEPDispatcherImplNormal", "dispatch_a", "Buffer"),
        ("_DeepEPDispatcherImplNormal", "_dispatch_core", "get_dispatch_layout"),
        ("_DeepEPDispatcherImplNormal", "_combine_core", "combine"),
        ("_DeepEPDispatcherImplLowLatency", "_dispatch_core", "low_latency_dispatch"),
        ("_DeepEPDispatcherImplLowLatency", "_combine_core", "low_latency_combine"),
    )
    for cls, function, name in users:
        place = f"{PLACE}.{cls}.{function}"
        user = getattr(getattr(deepep, cls, None), function, None)
        require(user is not None, place, "does not exist")
        require_global(user, place, name)
    low_latency = deepep._DeepEPDispatcherImplLowLatency
    place = f"{PLACE}._DeepEPDispatcherImplLowLatency"
    require_parameters(
        low_latency._dispatch_core,
        f"{place}._dispatch_core",
        *("self", "hidden_states", "topk_ids", "topk_weights"),
    )
    require(hasattr(low_latency, "_get_buffer"), place, "has no _get_buffer")
    require_parameters(
        deepep.DeepEPBuffer.get_deepep_buffer,
        f"{PLACE}.DeepEPBuffer.get_deepep_buffer",
        "group",
        "num_max_dispatch_tokens_per_rank",
    )
    require(hasattr(utils, "get_deepep_mode"), utils.__name__, "lacks 'get_deepep_mode'")
    has_mode = hasattr(getattr(utils, "DeepEPMode", None), "enable_normal")
    require(has_mode, f"{utils.__name__}.DeepEPMode", "lacks 'enable_normal'")
    place = f"{GroupCoordinator.__module__}.GroupCoordinator"
    for name in ("cpu_group", "device_group"):
        require(name in GroupCoordinator.__annotations__, place, f"lacks {name!r}")
    require(callable(get_tp_group), place, "has no get_tp_group beside it")


def install() -> None:
    from sglang.srt.layers.moe.token_dispatcher import deepep

    from ep_backend import deep_ep
    from ep_backend_sglang.buffer import Buffer

    deepep.Buffer = Buffer
    deepep.Config = deep_ep.Config
    deepep.use_deepep = True
    _send_weights_with_tokens(deepep._DeepEPDispatcherImplLowLatency)


def _send_weights_with_tokens(low_latency: Any) -> None:
    original = low_latency._dispatch_core

    @functools.wraps(original)
    def dispatch_core(self: Any, hidden_states: Any, topk_ids: Any, topk_weights: Any) -> Any:
        with self._get_buffer().weights_at_dispatch(topk_weights):
            return original(self, hidden_states, topk_ids, topk_weights)

    low_latency._dispatch_core = dispatch_core
