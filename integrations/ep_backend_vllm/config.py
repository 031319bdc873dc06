"""The command-line choice, and vLLM's decisions that go by the backend's name."""

from __future__ import annotations

import dataclasses
from typing import Any, Literal, get_args

from ep_backend_vllm.backends import BACKENDS, LOW_LATENCY
from ep_backend_vllm.patching import require

FIELD = "all2all_backend"
PLACE = "vllm.config.parallel.ParallelConfig"


def install() -> None:
    from vllm.config.parallel import ParallelConfig
    from vllm.model_executor.layers.fused_moe.config import FusedMoEParallelConfig

    _add_choices(ParallelConfig)
    _extend_property(ParallelConfig, "use_sequence_parallel_moe", _needs_sequence_parallel)
    _extend_property(ParallelConfig, "use_batched_dp_moe", _needs_small_batches)
    _extend_property(FusedMoEParallelConfig, "use_batched_activation_format", _is_batched)


def _add_choices(parallel_config: type) -> None:
    """Extends the Literal that both the parser and pydantic read."""
    from pydantic.dataclasses import rebuild_dataclass
    from vllm.engine import arg_utils

    fields = {field.name: field for field in dataclasses.fields(parallel_config)}
    require(FIELD in fields, PLACE, f"has no field {FIELD!r}")
    choices = get_args(fields[FIELD].type)
    require(
        "allgather_reducescatter" in choices, f"{PLACE}.{FIELD}", f"is not a Literal: {choices}"
    )
    require(hasattr(parallel_config, "__pydantic_fields__"), PLACE, "is not a pydantic dataclass")
    require(
        hasattr(getattr(arg_utils, "_compute_kwargs", None), "cache_clear"),
        "vllm.engine.arg_utils._compute_kwargs",
        "is not a cached function",
    )
    extended: Any = Literal[choices + BACKENDS]
    parallel_config.__annotations__[FIELD] = extended
    fields[FIELD].type = extended
    parallel_config.__pydantic_fields__[FIELD].annotation = extended  # type: ignore[attr-defined]
    rebuild_dataclass(parallel_config, force=True)
    arg_utils._compute_kwargs.cache_clear()


def _extend_property(cls: type, name: str, also: Any) -> None:
    original = cls.__dict__.get(name)
    require(isinstance(original, property), f"{cls.__module__}.{cls.__name__}", f"lacks {name!r}")
    assert isinstance(original, property)
    getter = original.fget
    assert getter is not None
    setattr(cls, name, property(lambda self: getter(self) or also(self), doc=original.__doc__))


def _needs_sequence_parallel(config: Any) -> bool:
    """With tensor parallelism every rank holds all tokens: each should dispatch only its share."""
    return (
        config.all2all_backend in BACKENDS
        and config.enable_expert_parallel
        and config.tensor_parallel_size > 1
        and config.data_parallel_size > 1
    )


def _needs_small_batches(config: Any) -> bool:
    """The batched format is sized by max_num_batched_tokens: vLLM then lowers its default."""
    return (
        config.all2all_backend == LOW_LATENCY
        and config.enable_expert_parallel
        and config.data_parallel_size > 1
    )


def _is_batched(config: Any) -> bool:
    return config.use_all2all_kernels and config.all2all_backend == LOW_LATENCY
