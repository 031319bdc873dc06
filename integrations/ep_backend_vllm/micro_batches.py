"""vLLM's dual-batch overlap, `--enable-dbo`, with the low-latency backend.

vLLM splits a step in two micro-batches and runs one's experts while the other's rows travel. It
lets only backends do so that it knows by name; and two things of it that DeepEP's users hardly meet
end a server that has other experts or attention. Nothing here changes a server without
`--enable-dbo`, or with another backend.
"""

from __future__ import annotations

import functools
import inspect
from typing import Any

from ep_backend_vllm.backends import LOW_LATENCY
from ep_backend_vllm.kernels import modular_kernel
from ep_backend_vllm.patching import require, require_parameters

ALLOWED = "deepep_low_latency"
"""A name that vLLM lets overlap, of a backend that hands hooks over as ours does."""
BUILDERS = "vllm.v1.worker.utils.AttentionGroup.create_metadata_builders"
BUFFERS = "vllm.model_executor.layers.fused_moe.modular_kernel._allocate_buffers"
WORKSPACE = "vllm.v1.worker.workspace"


def check() -> None:
    from vllm.config import ParallelConfig, VllmConfig
    from vllm.v1.worker import ubatching, utils, workspace

    place = f"{VllmConfig.__module__}.VllmConfig"
    require(hasattr(VllmConfig, "__post_init__"), place, "lacks __post_init__")
    place = f"{ParallelConfig.__module__}.ParallelConfig"
    require(hasattr(ParallelConfig, "enable_dbo"), place, "lacks enable_dbo")
    group: Any = getattr(utils, "AttentionGroup", None)
    require(hasattr(group, "create_metadata_builders"), BUILDERS, "does not exist")
    require_parameters(group.create_metadata_builders, BUILDERS, "self", "vllm_config")
    require(hasattr(modular_kernel(), "_allocate_buffers"), BUFFERS, "does not exist")
    require_parameters(modular_kernel()._allocate_buffers, BUFFERS, "M_chunk", "M_full")
    manager = getattr(workspace, "WorkspaceManager", None)
    require(hasattr(manager, "is_locked"), WORKSPACE, "lacks WorkspaceManager.is_locked")
    require(
        hasattr(workspace, "current_workspace_manager"),
        WORKSPACE,
        "lacks current_workspace_manager",
    )
    for name in ("dbo_enabled", "dbo_current_ubatch_id"):
        require(hasattr(ubatching, name), ubatching.__name__, f"lacks {name}")


def install() -> None:
    from vllm.config import VllmConfig
    from vllm.v1.worker.utils import AttentionGroup

    _pass_for_an_allowed_backend(VllmConfig)
    _build_metadata_of_each_micro_batch(AttentionGroup)
    _reserve_for_whole_batches(modular_kernel())


def overlaps(parallel_config: Any) -> bool:
    return parallel_config.enable_dbo and parallel_config.all2all_backend == LOW_LATENCY


def _pass_for_an_allowed_backend(vllm_config: Any) -> None:
    """The check is in the midst of a function that settles all the rest, which has more to do where
    micro-batches are wanted: while it runs, our backend bears the other's name."""
    original = vllm_config.__post_init__

    @functools.wraps(original)
    def post_init(self: Any) -> None:
        parallel_config = self.parallel_config
        if not overlaps(parallel_config):
            return original(self)
        parallel_config.all2all_backend = ALLOWED
        try:
            original(self)
        finally:
            parallel_config.all2all_backend = LOW_LATENCY

    vllm_config.__post_init__ = post_init


def _build_metadata_of_each_micro_batch(group: Any) -> None:
    """Attention's metadata is built once for all groups of layers that are alike, and the others
    get a copy with their block table; vLLM 0.26 to 0.33 give such a copy of the first micro-batch's
    to the second, too, whose requests are others (vllm-project/vllm#48659). Builders that cannot
    make copies build for each."""
    original = group.create_metadata_builders

    @functools.wraps(original)
    def create(self: Any, vllm_config: Any, *args: Any, **kwargs: Any) -> None:
        original(self, vllm_config, *args, **kwargs)
        if overlaps(vllm_config.parallel_config):
            for builder in self.metadata_builders:
                builder.supports_update_block_table = False

    group.create_metadata_builders = create


def _reserve_for_whole_batches(kernel: Any) -> None:
    """Experts' scratch memory is as large as the largest step needs that vLLM has tried before it
    serves, and that is split. A step that is not, because another rank has too little to do, takes
    the first micro-batch's: its share is made large enough meanwhile."""
    # Not in what runs in every layer of every step.
    from vllm.v1.worker import ubatching, workspace

    from ep_backend_vllm.workspace import WorkspacePrepareAndFinalize

    original = kernel._allocate_buffers
    signature = inspect.signature(original)

    def is_first_of_two() -> bool:
        return ubatching.dbo_enabled() and ubatching.dbo_current_ubatch_id() == 0

    @functools.wraps(original)
    def allocate(self: Any, *args: Any, **kwargs: Any) -> Any:
        adapter = self.prepare_finalize
        # Of other formats it does not depend on the step.
        is_by_step = isinstance(adapter, WorkspacePrepareAndFinalize)
        if (
            is_by_step
            and is_first_of_two()
            and not workspace.current_workspace_manager().is_locked()
        ):
            num_rows = adapter.num_dispatchers() * adapter.buffer.num_max_tokens_per_rank
            whole = signature.bind(self, *args, **kwargs)
            whole.arguments |= {"M_chunk": num_rows, "M_full": num_rows}
            original(*whole.args, **whole.kwargs)
        return original(self, *args, **kwargs)

    kernel._allocate_buffers = allocate
