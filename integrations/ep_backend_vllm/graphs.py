"""vLLM's CUDA graphs with the high-throughput backend: of small steps; large ones have none."""

from __future__ import annotations

from typing import Any

from ep_backend_vllm.patching import require

MANAGER = "vllm.v1.worker.workspace.WorkspaceManager"


def check() -> None:
    from vllm.config import compilation
    from vllm.v1.worker import workspace

    fields = compilation.CompilationConfig.__dataclass_fields__
    place = "vllm.config.compilation"
    for name in ("cudagraph_mode", "max_cudagraph_capture_size"):
        require(name in fields, place, f"CompilationConfig lacks {name}")
    require(hasattr(compilation, "CUDAGraphMode"), place, "lacks CUDAGraphMode")
    manager = getattr(workspace, "WorkspaceManager", None)
    for name in ("lock", "unlock"):
        require(hasattr(manager, name), MANAGER, f"lacks {name}")
    for name in ("current_workspace_manager", "is_workspace_manager_initialized"):
        require(hasattr(workspace, name), workspace.__name__, f"lacks {name}")


def most_tokens() -> int:
    """Of a rank, in a step that vLLM replays from a graph; 0: it replays none."""
    from vllm.config import get_current_vllm_config_or_none
    from vllm.config.compilation import CUDAGraphMode

    config = get_current_vllm_config_or_none()
    if config is None:
        return 0
    compilation = config.compilation_config
    if compilation.cudagraph_mode in (None, CUDAGraphMode.NONE):
        return 0
    return compilation.max_cudagraph_capture_size or 0


def let_scratch_memory_grow() -> None:
    """When graphs have been captured, vLLM fixes its experts' scratch memory, at what the largest
    step needed until then: graphs have its address. A later step of exact sizes may bring more
    rows. So this worker's may grow still, and what graphs have stays as long as the worker. Newer
    versions also fix what some experts keep there, objects that replace their own tensors when
    they grow."""
    from vllm.v1.worker import workspace

    if not workspace.is_workspace_manager_initialized():
        return
    manager: Any = workspace.current_workspace_manager()
    if hasattr(manager, "of_graphs"):
        return
    require(hasattr(manager, "_current_workspaces"), MANAGER, "has no _current_workspaces")
    manager.of_graphs = []
    lock = manager.lock

    def lock_what_graphs_have() -> None:
        lock()
        manager.of_graphs += manager._current_workspaces
        for kept in getattr(manager, "_persistent_resources", ()):
            manager.of_graphs += [dict(vars(o)) for o in kept.values() if hasattr(o, "__dict__")]
        manager.unlock()

    manager.lock = lock_what_graphs_have
