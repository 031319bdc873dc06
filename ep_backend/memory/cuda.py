"""Symmetric memory on GPUs: peer pointers through CUDA IPC between processes of one host, plain
pointers between virtual ranks of one process.

Processes may each have a GPU of their own, joined by NVLink or PCIe, or share one (for tests: ranks
that wait for each other on one GPU take turns in slices of milliseconds).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING

import torch

from ep_backend import _native
from ep_backend.memory import raise_first

if TYPE_CHECKING:
    from ep_backend.group import Group


class PeerPointers:
    """Own memory and peers' mappings, in rank order."""

    def __init__(self, memories: list[_native.DeviceMemory | _native.PeerMemory]) -> None:
        self._memories = memories

    @property
    def bases(self) -> list[int]:
        return [memory.address for memory in self._memories]

    def close(self, *, has_failed: Callable[[], bool] = lambda: False) -> None:
        self._memories.clear()


class _ArrayInterface:
    """Memory that torch takes over as it is, see numba's CUDA array interface."""

    def __init__(self, address: int, num_bytes: int) -> None:
        self.__cuda_array_interface__ = {
            "shape": (num_bytes,),
            "typestr": "|u1",
            "data": (address, False),
            "version": 3,
        }


def tensor_at(
    address: int, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device
) -> torch.Tensor:
    """A tensor on memory of `device` that somebody else keeps."""
    num_bytes = math.prod(shape) * dtype.itemsize
    memory = torch.as_tensor(_ArrayInterface(address, num_bytes), device=device)
    return memory.view(dtype).view(shape)


def allocate(group: Group, num_bytes: int, device: torch.device) -> PeerPointers:
    """Zeroed memory of every rank on its `device`. Collective.

    Raises:
        RendezvousError: on every rank, when any rank cannot allocate or map, or virtual ranks are
            on different GPUs: their kernels order what they write for one.
    """
    own: _native.DeviceMemory | None = None
    error = None
    with torch.cuda.device(device):
        try:
            own = _native.DeviceMemory(num_bytes)
        except RuntimeError as e:
            error = f"cannot allocate {num_bytes} bytes on {device}: {e}"
        if group.is_virtual:
            shared = group.all_gather((own, error, device))
            raise_first([e for _, e, _ in shared])
            first = shared[0][2]
            elsewhere = f", rank 0 on {first}; threads share a GPU. Start a process for each GPU."
            raise_first([None if d == first else f"is on {d}{elsewhere}" for _, _, d in shared])
            return PeerPointers([memory for memory, *_ in shared if memory is not None])

        handles = group.all_gather((own.ipc_handle() if own is not None else b"", error))
        raise_first([e for _, e in handles])
        memories: list[_native.DeviceMemory | _native.PeerMemory] = []
        try:
            for rank, (handle, _) in enumerate(handles):
                is_own = rank == group.self_rank and own is not None
                memories.append(own if is_own and own is not None else _native.PeerMemory(handle))
        except RuntimeError as e:
            error = (
                f"cannot map the memory of rank {rank}: {e}. Its GPU must be reachable from "
                f"{device} (nvidia-smi topo -p2p r), and its process on this host."
            )
        raise_first(group.all_gather(error))
    return PeerPointers(memories)
