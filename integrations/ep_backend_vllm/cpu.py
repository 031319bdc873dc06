"""What vLLM lacks on a CPU to serve the low-latency format. Does nothing on other platforms.

vLLM's own CPU experts take token-major input only, so a small class for the batched format is added
to the classes that vLLM chooses from; its own filter then picks by format.
"""

from __future__ import annotations

import functools
import importlib.util
import os
import time
from typing import Any

from ep_backend_vllm.backends import BACKENDS
from ep_backend_vllm.patching import rebind_everywhere, require

ORACLE = "vllm.model_executor.layers.fused_moe.oracle.unquantized"
ROUTER = "vllm.model_executor.layers.fused_moe.router.cpu_router"
QUEUES = "vllm.distributed.device_communicators.shm_broadcast"
POLL_VARIABLE = "EP_BACKEND_VLLM_POLL_US"
RUNNER = "vllm.model_executor.layers.fused_moe.runner.moe_runner.MoERunner"


def check() -> None:
    from vllm.model_executor.layers.fused_moe.oracle import unquantized
    from vllm.model_executor.layers.fused_moe.runner import moe_runner
    from vllm.platforms import current_platform

    if not current_platform.is_cpu():
        return
    require(hasattr(unquantized, "backend_to_kernel_cls"), ORACLE, "lacks backend_to_kernel_cls")
    backends = getattr(unquantized, "UnquantizedMoeBackend", None)
    require(hasattr(backends, "CPU"), ORACLE, "lacks UnquantizedMoeBackend.CPU")
    runner = getattr(moe_runner, "MoERunner", None)
    require(hasattr(runner, "_select_forward"), RUNNER, "lacks _select_forward")
    if POLL_VARIABLE in os.environ:
        from vllm.distributed.device_communicators import shm_broadcast

        require(hasattr(shm_broadcast, "sched_yield"), QUEUES, "lacks sched_yield")


def require_router() -> None:
    """A CPU's own. Before there was one, experts on a CPU took no rows of others (vLLM 0.26, 0.27)
    or had a GPU's router called (0.28, 0.29).

    Raises:
        UnsupportedVLLM: this vLLM has none.
    """
    has_router = importlib.util.find_spec(ROUTER) is not None
    require(has_router, ROUTER, "does not exist: 0.30 is the first to exchange rows on a CPU")


def install() -> None:
    from vllm.platforms import current_platform

    if not current_platform.is_cpu():
        return
    _add_batched_experts()
    _keep_exchange_out_of_graphs()
    if POLL_VARIABLE in os.environ:
        _pause_between_polls(float(os.environ[POLL_VARIABLE]))


def _add_batched_experts() -> None:
    from vllm.model_executor.layers.fused_moe.oracle import unquantized

    original = unquantized.backend_to_kernel_cls

    @functools.wraps(original)
    def backend_to_kernel_cls(backend: Any) -> list[type]:
        classes = original(backend)
        if backend == unquantized.UnquantizedMoeBackend.CPU:
            from ep_backend_vllm.cpu_experts import BatchedCPUExperts

            return [*classes, BatchedCPUExperts]
        return classes

    rebind_everywhere(original, backend_to_kernel_cls)


def _keep_exchange_out_of_graphs() -> None:
    """On a CPU, vLLM lets torch.compile trace into the MoE layer; an exchange with other processes
    cannot be traced. For our backends the layer stays an opaque custom op, as it is on GPUs."""
    import torch
    from vllm.model_executor.layers.fused_moe.runner.moe_runner import MoERunner

    original = MoERunner._select_forward

    @functools.wraps(original)
    def select_forward(self: Any) -> Any:
        parallel = self.moe_config.moe_parallel_config
        if not (parallel.use_all2all_kernels and parallel.all2all_backend in BACKENDS):
            return original(self)
        if self._shared_experts is None:
            return torch.ops.vllm.moe_forward
        return torch.ops.vllm.moe_forward_shared

    MoERunner._select_forward = select_forward


def _pause_between_polls(microseconds: float) -> None:
    """Engine cores and workers poll their message queues, yielding the core between two polls. On
    few cores that starves the thread that sends tokens out: the poller gives the interpreter lock
    away and takes it back before that thread has been scheduled. A short sleep lets it through."""
    from vllm.distributed.device_communicators import shm_broadcast

    shm_broadcast.sched_yield = lambda: time.sleep(microseconds * 1e-6)
