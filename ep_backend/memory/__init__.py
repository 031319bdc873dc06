"""Symmetric memory: the same number of zeroed bytes on every rank, mapped by every rank.

`shm` (processes of one host, and threads of one process), `cuda` (peer pointers of one host) and
`nvshmem` (also where only a network reaches) are here. A provider gives `bases`, one address per
rank, valid in this process until `close()`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

from ep_backend.errors import RendezvousError


class SymmetricMemory(Protocol):
    """What a provider gives to the kernels."""

    @property
    def bases(self) -> list[int]:
        """Address of each rank's memory in this process; 0: there is none."""

    def close(self, *, has_failed: Callable[[], bool] = lambda: False) -> None:
        """Unmaps everything. Peers that still use their own mappings are not disturbed.

        Args:
            has_failed: whether the buffer has, so that peers may still write; asked again after its
                last kernels have ended.
        """


def raise_first(errors: list[str | None]) -> None:
    """Raises the first rank's error, on every rank alike, after all have exchanged theirs."""
    for rank, error in enumerate(errors):
        if error is not None:
            raise RendezvousError(f"rank {rank}: {error}")
