"""The command-line choice, and vLLM's decisions that go by the backend's name."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, Literal, get_args

from ep_backend_vllm.backends import BACKENDS, LOW_LATENCY, uses_batched_format
from ep_backend_vllm.patching import require

FIELD = "all2all_backend"
PLACE = "vllm.config.parallel.ParallelConfig"


def check() -> None:
    from vllm.config.parallel import ParallelConfig
    from vllm.engine import arg_utils
    from vllm.model_executor.layers.fused_moe.config import FusedMoEParallelConfig

    fields = {field.name: field for field in dataclasses.fields(ParallelConfig)}
    require(FIELD in fields, PLACE, f"has no field {FIELD!r}")
    choices = get_args(fields[FIELD].type)
    require(
        "allgather_reducescatter" in choices, f"{PLACE}.{FIELD}", f"is not a Literal: {choices}"
    )
    require(hasattr(ParallelConfig, "__pydantic_fields__"), PLACE, "is not a pydantic dataclass")
    require(
        hasattr(getattr(arg_utils, "_compute_kwargs", None), "cache_clear"),
        "vllm.engine.arg_utils._compute_kwargs",
        "is not a cached function",
    )
    for cls, name in (
        (ParallelConfig, "use_sequence_parallel_moe"),
        (ParallelConfig, "use_batched_dp_moe"),
        (FusedMoEParallelConfig, "use_batched_activation_format"),
    ):
        is_property = isinstance(getattr(cls, name, None), property)
        require(is_property, f"{cls.__module__}.{cls.__name__}", f"lacks the property {name!r}")


def install() -> None:
    from vllm.config.parallel import ParallelConfig
    from vllm.model_executor.layers.fused_moe.config import FusedMoEParallelConfig

    _add_choices(ParallelConfig)
    _extend_property(ParallelConfig, "use_sequence_parallel_moe", _needs_sequence_parallel)
    _extend_property(ParallelConfig, "use_batched_dp_moe", _needs_small_batches)
    _extend_property(FusedMoEParallelConfig, "use_batched_activation_format", _is_batched)


def _add_choices(parallel_config: Any) -> None:
    """Extends the Literal that both the parser and pydantic read."""
    from pydantic.dataclasses import rebuild_dataclass
    from vllm.engine import arg_utils

    field = parallel_config.__dataclass_fields__[FIELD]
    extended: Any = Literal[get_args(field.type) + BACKENDS]
    field.type = extended
    parallel_config.__annotations__[FIELD] = extended
    parallel_config.__pydantic_fields__[FIELD].annotation = extended
    rebuild_dataclass(parallel_config, force=True)
    arg_utils._compute_kwargs.cache_clear()


def _extend_property(cls: Any, name: str, also: Callable[[Any], bool]) -> None:
    original = getattr(cls, name)
    setattr(cls, name, property(lambda self: original.fget(self) or also(self)))


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
        and uses_batched_format()
    )


def _is_batched(config: Any) -> bool:
    is_ours = config.use_all2all_kernels and config.all2all_backend == LOW_LATENCY
    return is_ours and uses_batched_format()
