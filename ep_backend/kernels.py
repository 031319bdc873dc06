"""The native kernels of one rank behind one interface, whatever device they run on."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

import torch

from ep_backend import _native
from ep_backend.errors import EPBackendError, RendezvousError
from ep_backend.handles import KernelStatistics, OpCounters
from ep_backend.memory import SymmetricMemory, nvshmem
from ep_backend.memory.nvshmem import NetworkMemory

if TYPE_CHECKING:
    from ep_backend.group import Group

Kernel = Callable[..., _native.OpResult]
Kernels = TypeVar("Kernels")
# By phase, then half, as the native modules count them.
KERNEL_NAMES = ("dispatch_send", "dispatch_recv", "combine_send", "combine_recv")


class RankKernels(Protocol):
    """Kernels take addresses and sizes; csrc/bindings.h says which."""

    @property
    def dispatch_send(self) -> Kernel: ...

    @property
    def dispatch_recv(self) -> Kernel: ...

    @property
    def combine_send(self) -> Kernel: ...

    @property
    def combine_recv(self) -> Kernel: ...

    @property
    def dispatch(self) -> Kernel | None:
        """Send and receive in one kernel, with the arguments of both; None where there is none."""

    @property
    def combine(self) -> Kernel | None:
        """The same for combine."""

    def counters(self) -> dict[str, OpCounters]: ...

    def statistics(self) -> KernelStatistics: ...

    def report(self) -> _native.OpResult:
        """What has failed since, where kernels run asynchronously; else OK."""


def default_spin_us(num_ranks: int) -> float:
    """With a core for every rank, polling saves the two context switches of a sleep; with fewer, it
    would hold the core that the peer needs."""
    return 50.0 if num_ranks <= (os.cpu_count() or 1) else 0.0


# As Triton's launches ask, where this PyTorch has it: to make a torch.cuda.Stream takes longer than
# to launch a kernel.
_raw_stream: Callable[[int], int] | None = getattr(torch._C, "_cuda_getCurrentRawStream", None)


def stream_of(device: torch.device) -> int:
    """The device's current stream, as CUDA knows it."""
    if _raw_stream is not None:
        return int(_raw_stream(device.index))
    return torch.cuda.current_stream(device).cuda_stream


def check_current(device: torch.device) -> None:
    """Raises `EPBackendError` where the thread's current device is another one."""
    if torch.cuda.current_device() != device.index:
        raise EPBackendError(
            f"the current device is cuda:{torch.cuda.current_device()}, the buffer's is {device}. "
            f"Call torch.cuda.set_device({device.index}) in this thread."
        )


def current_stream(device: torch.device) -> int:
    """`stream_of`, for a launch; `check_current`."""
    check_current(device)
    return stream_of(device)


def follow_stream(earlier: int, device: torch.device) -> None:
    """What comes next on the thread's current stream waits for what `earlier`, which may be the
    same, has been given so far. Raises as `check_current`."""
    if current_stream(device) != earlier:
        stream = torch.cuda.default_stream(device)  # which CUDA knows as 0
        if earlier != 0:
            stream = torch.cuda.ExternalStream(earlier, device=device)
        torch.cuda.current_stream(device).wait_stream(stream)


class CpuKernels:
    """They run in the calling thread and wait there, without the interpreter lock.

    Args:
        spin_us: see `LowLatencyBuffer`.
    """

    def __init__(
        self, rank: _native.LowLatencyRank | _native.MultiNodeRank, spin_us: float
    ) -> None:
        self.spin_us = spin_us
        self._rank = rank
        # The two calls are as good as one.
        self.dispatch = None
        self.combine = None
        self.dispatch_send = rank.dispatch_send
        self.dispatch_recv = rank.dispatch_recv
        self.combine_send = rank.combine_send
        self.combine_recv = rank.combine_recv

    def counters(self) -> dict[str, OpCounters]:
        return self.statistics().counters

    def statistics(self) -> KernelStatistics:
        return KernelStatistics.of_cpu(KERNEL_NAMES, self._rank.statistics())

    def report(self) -> _native.OpResult:
        return _native.OpResult()


class _GpuKernels:
    """They are launched on the calling thread's current stream."""

    def __init__(self, rank: Any, num_sms: int, device: torch.device) -> None:
        self._rank = rank
        self.num_sms = num_sms
        self._device = device

    def _stream(self) -> int:
        return current_stream(self._device)

    def dispatch_send(self, *args: int) -> _native.OpResult:
        return self._rank.dispatch_send(*args, self._stream())

    def dispatch_recv(self, *args: _native.OutputLayout | int) -> _native.OpResult:
        return self._rank.dispatch_recv(*args, self._stream())

    def combine_send(self, *args: int) -> _native.OpResult:
        return self._rank.combine_send(*args, self._stream())

    def combine_recv(self, *args: int) -> _native.OpResult:
        return self._rank.combine_recv(*args, self._stream())

    def counters(self) -> dict[str, OpCounters]:
        raise EPBackendError("kernels on a GPU keep no such counters. Call statistics().")

    def statistics(self) -> KernelStatistics:
        """As counted so far; waits for no kernel."""
        with torch.cuda.device(self._device):
            counted = self._rank.statistics()
        num_ranks = len(counted.wait_ns) // len(KERNEL_NAMES)
        return KernelStatistics(
            num_ops=dict(zip(KERNEL_NAMES, counted.num_ops, strict=True)),
            wait_ns={
                name: counted.wait_ns[i * num_ranks : (i + 1) * num_ranks]
                for i, name in enumerate(KERNEL_NAMES)
            },
            num_expert_rows=counted.num_expert_rows,
            counters={},
            sent_bytes={},
            num_in_bucket={},
        )

    def report(self) -> _native.OpResult:
        return self._rank.report()


class CudaKernels(_GpuKernels):
    """Over peer pointers.

    Args:
        num_sms: blocks a kernel has at most.
        shares_gpu: all ranks are on the same GPU, in this process.
    """

    def __init__(
        self,
        config: _native.LowLatencyConfig,
        self_rank: int,
        bases: list[int],
        timeout_secs: float,
        num_sms: int,
        shares_gpu: bool,
        device: torch.device,
    ) -> None:
        with torch.cuda.device(device):
            rank = _native.CudaLowLatencyRank(
                config,
                self_rank,
                bases,
                timeout_ns=int(timeout_secs * 1e9),
                num_sms=num_sms,
                shares_gpu=shares_gpu,
            )
        super().__init__(rank, num_sms, device)

    def dispatch(self, *args: _native.OutputLayout | int) -> _native.OpResult:
        return self._rank.dispatch(*args, self._stream())

    def combine(self, *args: int) -> _native.OpResult:
        return self._rank.combine(*args, self._stream())


class NetworkKernels(_GpuKernels):
    """Over peer pointers where there are some, and NVSHMEM where not.

    Args:
        config: of a hierarchical buffer that of its nodes.
        num_sms: blocks a kernel has at most.
    """

    def __init__(
        self,
        config: _native.LowLatencyConfig | _native.MultiNodeConfig,
        self_rank: int,
        memory: NetworkMemory,
        timeout_secs: float,
        num_sms: int,
        device: torch.device,
    ) -> None:
        native = nvshmem.extension()
        is_hierarchical = isinstance(config, _native.MultiNodeConfig)
        make = native.HierarchicalRank if is_hierarchical else native.NetworkRank
        with torch.cuda.device(device):
            rank = make(
                config,
                self_rank,
                memory.bases,
                memory.pes,
                timeout_ns=int(timeout_secs * 1e9),
                num_sms=num_sms,
            )
        super().__init__(rank, num_sms, device)
        # Always in halves.
        self.dispatch = None
        self.combine = None


def make_kernels(
    config: _native.LowLatencyConfig,
    multi_node: _native.MultiNodeConfig | None,
    group: Group,
    memory: SymmetricMemory,
    device: torch.device,
    timeout_secs: float,
    spin_us: float | None,
    num_sms: int | None,
    tuned_num_sms: int | None,
) -> RankKernels:
    """The kernels for `device` and that memory; arguments that they do not know are ignored.

    Args:
        multi_node: where the kernels are those of several nodes.
        spin_us: see `LowLatencyBuffer`.
        tuned_num_sms: of the tuning table: in place of `num_sms`, if there are as many.
    """
    bases = memory.bases
    if device.type == "cpu":
        if spin_us is None:
            spin_us = default_spin_us(config.num_ranks)
        timeout_ns, spin_ns = int(timeout_secs * 1e9), int(spin_us * 1e3)
        rank = group.self_rank
        if multi_node is None:
            return CpuKernels(
                _native.LowLatencyRank(config, rank, bases, timeout_ns=timeout_ns, spin_ns=spin_ns),
                spin_us,
            )
        assert group.network is not None
        return CpuKernels(
            _native.MultiNodeRank(
                multi_node,
                rank,
                bases,
                group.network.native,
                timeout_ns=timeout_ns,
                spin_ns=spin_ns,
            ),
            spin_us,
        )
    if num_sms is None:
        num_sms = torch.cuda.get_device_properties(device).multi_processor_count
        if group.is_virtual:
            num_sms = max(1, num_sms // group.num_ranks)
        if tuned_num_sms is not None:
            num_sms = min(num_sms, tuned_num_sms)
    if isinstance(memory, NetworkMemory):
        of = config if multi_node is None else multi_node
        return NetworkKernels(of, group.self_rank, memory, timeout_secs, num_sms, device)
    shares_gpu = group.is_virtual and group.num_ranks > 1
    return CudaKernels(config, group.self_rank, bases, timeout_secs, num_sms, shares_gpu, device)


def agreed_kernels(
    what: str, group: Group, memory: SymmetricMemory, make: Callable[[], Kernels]
) -> Kernels:
    """Of a rank whose peers have theirs, too: nobody sends to one that has none. Gives the memory
    back where they have not. Collective.

    Args:
        what: whose kernels they are, for the messages.

    Raises:
        RuntimeError, ValueError: this rank's are not to be had.
        SettingsMismatch: another rank's are not.
        RendezvousError: a rank is missing.
    """
    kernels: Kernels | None = None
    error: Exception | None = None
    try:
        kernels = make()
    except (RuntimeError, ValueError) as e:
        error = e
    try:
        group.agree(f"kernels of a {what}", {}, error)
    except Exception as e:
        is_missing = isinstance(e, RendezvousError)  # whoever it is may have gone on
        memory.close(has_failed=lambda: is_missing)
        raise
    assert kernels is not None
    return kernels
