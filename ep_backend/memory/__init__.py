"""Symmetric memory: the same number of zeroed bytes on every rank, mapped by every rank.

`shm` (processes of one host, and threads of one process) is here; `cuda` (peer pointers) and
`nvshmem` (RDMA) belong here too. A provider gives `bases`, one address per rank, valid in this
process until `close()`.
"""

from __future__ import annotations

from typing import Protocol


class SymmetricMemory(Protocol):
    """What a provider gives to the kernels."""

    @property
    def bases(self) -> list[int]:
        """Address of each rank's memory in this process."""

    def close(self) -> None:
        """Unmaps everything. Peers that still use their own mappings are not disturbed."""
