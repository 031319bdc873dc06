"""The all-to-all manager of an expert-parallel group: it owns our buffers."""

from __future__ import annotations

import functools
from typing import Any

from ep_backend import Group, LowLatencyBuffer, NormalBuffer, plugins
from ep_backend.memory import nvshmem
from ep_backend_vllm import cpu
from ep_backend_vllm.backends import BACKENDS, FORMAT_VARIABLE, LOW_LATENCY, uses_batched_format
from ep_backend_vllm.patching import require, require_parameters

Buffer = LowLatencyBuffer | NormalBuffer

PLACE = "vllm.distributed.device_communicators.base_device_communicator.DeviceCommunicatorBase"


def check() -> None:
    from vllm.distributed.device_communicators import base_device_communicator as base

    require_parameters(base.DeviceCommunicatorBase.__init__, PLACE, "cpu_group", "unique_name")
    require(hasattr(base, "All2AllManagerBase"), base.__name__, "lacks All2AllManagerBase")


def install() -> None:
    from vllm.distributed.device_communicators import base_device_communicator as base

    _decline_stock_managers(base.DeviceCommunicatorBase)
    for communicator in _device_communicators():
        _attach_our_manager(communicator)


def _device_communicators() -> list[type]:
    """The communicators our kernels can serve, as far as this vLLM can import them."""
    from vllm.distributed.device_communicators.cpu_communicator import CpuCommunicator
    from vllm.platforms import current_platform

    if not current_platform.is_cuda():
        return [CpuCommunicator]
    from vllm.distributed.device_communicators.cuda_communicator import CudaCommunicator

    return [CpuCommunicator, CudaCommunicator]


def _decline_stock_managers(base: Any) -> None:
    """Device communicators build a manager for `use_all2all`, and refuse names they do not know.
    For our names they are told that there is nothing to build."""
    original = base.__init__

    @functools.wraps(original)
    def init(self: Any, *args: Any, **kwargs: Any) -> None:
        original(self, *args, **kwargs)
        require(
            hasattr(self, "use_all2all") and hasattr(self, "all2all_backend"),
            PLACE,
            "does not set use_all2all and all2all_backend",
        )
        self._wants_ep_backend = self.use_all2all and self.all2all_backend in BACKENDS
        if self._wants_ep_backend:
            self.use_all2all = False

    base.__init__ = init


def _attach_our_manager(communicator: Any) -> None:
    original = communicator.__init__

    @functools.wraps(original)
    def init(self: Any, *args: Any, **kwargs: Any) -> None:
        original(self, *args, **kwargs)
        if self._wants_ep_backend:
            self.use_all2all = True
            self.all2all_manager = make_manager(self.cpu_group, self.all2all_backend)

    communicator.__init__ = init


def _require_reachable(group: Group, backend: str) -> None:
    """Over a network only kernels on GPUs reach; their buffers find out by themselves that there is
    one."""
    from vllm.platforms import current_platform

    if max(group.hosts()) == 0:
        return
    if not current_platform.is_cuda():
        group.require_one_host()
    error: Exception | None = None
    try:
        nvshmem.extension()
        if backend == LOW_LATENCY and not uses_batched_format():
            error = ValueError(
                f"ranks are on {max(group.hosts()) + 1} hosts, but the standard format is for "
                f"those of one, whose GPUs see each other's memory. Set {FORMAT_VARIABLE}=batched "
                "on all hosts."
            )
    except (ImportError, ValueError) as e:
        error = e
    group.agree(backend, {}, error)


def make_manager(cpu_group: Any, backend: str) -> Any:
    """The manager that vLLM asks for buffers; `cpu_group` is the group's gloo process group.
    Collective.

    Raises:
        RendezvousError: a rank is on another host, and this backend does not reach it.
        ValueError, ImportError, SettingsMismatch: it might, but for the format, or for the build.
        UnsupportedVLLM: this vLLM cannot exchange rows on a CPU.
    """
    from vllm.distributed.device_communicators.base_device_communicator import All2AllManagerBase
    from vllm.logger import init_logger
    from vllm.platforms import current_platform

    # Now, not after a model was loaded.
    if current_platform.is_cpu():
        cpu.require_router()
    logger = init_logger("vllm.ep_backend")
    group = Group.from_process_group(cpu_group)
    _require_reachable(group, backend)

    class EPBackendManager(All2AllManagerBase):
        def __init__(self) -> None:
            super().__init__(cpu_group)
            self.group = group
            self.buffers: dict[tuple, Buffer] = {}
            logger.info(
                "ep_backend: %s on rank %d of %d",
                backend,
                self.group.self_rank,
                self.group.num_ranks,
            )

        def get_handle(self, kwargs: dict[str, Any]) -> LowLatencyBuffer:
            """The buffer for these shapes, shared by all layers that have them. Collective."""
            return self._get(LowLatencyBuffer, kwargs)

        def get_normal_buffer(self, kwargs: dict[str, Any]) -> NormalBuffer:
            """The same for normal kernels."""
            return self._get(NormalBuffer, kwargs)

        def _get(self, buffer_class: Any, kwargs: dict[str, Any]) -> Any:
            shape = tuple(sorted(kwargs.items(), key=lambda item: item[0]))
            key = buffer_class, *shape
            if key not in self.buffers:
                timeout = plugins.timeout_secs()
                buffer = buffer_class(self.group, timeout_secs=timeout, **kwargs)
                self.buffers[key] = buffer
                logger.info(
                    "ep_backend: buffer for %s, %.1f MiB a rank",
                    ", ".join(f"{name}={value}" for name, value in shape),
                    buffer.num_symmetric_bytes / 2**20,
                )
            return self.buffers[key]

        def max_sms_used(self) -> int | None:
            """That experts must leave free while the other micro-batch's rows travel. With hooks
            none: our kernels are on the experts' stream. None: all that there are."""
            return 0 if current_platform.is_cpu() or backend == LOW_LATENCY else None

        def destroy(self) -> None:
            while self.buffers:
                self.buffers.popitem()[1].close()

    return EPBackendManager()
