"""Our buffer behind SGLang's `DeepEPDispatcher`.

The dispatcher stays SGLang's: its two-batch overlap, graph capture and expert statistics with it.
Only the names that its module imports from `deep_ep` are replaced, in that module; the package
`deep_ep`, installed or not, is left alone.

Two things are done otherwise. Low-latency dispatches are given the weights that SGLang keeps for
combine: so one row a rank goes home, not one for each expert. And what SGLang waits for as soon as
it is sent, which it does without two-batch overlap, is done at once: in low latency by one kernel
(by expert, a pair takes 10.2 us so for one token, 25.6 for 128, and 13.1 and 30.4 with hooks; two
H200s, hidden 7168, float8), with normal kernels on the current stream, which need not meet another.
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
    normal, low_latency = (
        deepep._DeepEPDispatcherImplNormal,
        deepep._DeepEPDispatcherImplLowLatency,
    )
    place = f"{PLACE}._DeepEPDispatcherImplLowLatency"
    require_parameters(
        low_latency._dispatch_core,
        f"{place}._dispatch_core",
        *("self", "hidden_states", "topk_ids", "topk_weights"),
    )
    for cls in (normal, low_latency):
        require(hasattr(cls, "_get_buffer"), f"{PLACE}.{cls.__name__}", "has no _get_buffer")
    place = f"{PLACE}.DeepEPDispatcher"
    for name in ("_get_impl", "dispatch", "combine"):
        require(hasattr(deepep.DeepEPDispatcher, name), place, f"has no {name}")
    require_global(deepep.DeepEPDispatcher.dispatch, f"{place}.dispatch", "_deepep_dispatch_hooks")
    place = f"{PLACE}.DeepEPPDispatchHooks"
    require(hasattr(deepep.DeepEPPDispatchHooks(), "hook_dict"), place, "has no hook_dict")
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
    for name in ("dispatch", "combine"):
        _do_at_once(deepep.DeepEPDispatcher, name)


def _send_weights_with_tokens(low_latency: Any) -> None:
    original = low_latency._dispatch_core

    @functools.wraps(original)
    def dispatch_core(self: Any, hidden_states: Any, topk_ids: Any, topk_weights: Any) -> Any:
        with self._get_buffer().weights_at_dispatch(topk_weights):
            return original(self, hidden_states, topk_ids, topk_weights)

    low_latency._dispatch_core = dispatch_core


def _do_at_once(dispatcher: Any, name: str) -> None:
    original = getattr(dispatcher, name)

    @functools.wraps(original)
    def at_once(self: Any, *args: Any, **kwargs: Any) -> Any:
        # What others have SGLang do between a dispatch and its hook is to overlap.
        if name == "dispatch" and self._deepep_dispatch_hooks.hook_dict:
            return original(self, *args, **kwargs)
        with self._get_impl()._get_buffer().at_once():
            return original(self, *args, **kwargs)

    setattr(dispatcher, name, at_once)
