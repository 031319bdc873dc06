"""Symmetric memory over POSIX shared memory, for processes of one host; and over anonymous memory,
for ranks that are threads of one process.

A segment has a name in /dev/shm only until every rank has mapped it, so a killed run leaves nothing
behind. All its pages are allocated at creation: a full /dev/shm is an error here, not a SIGBUS
later.
"""

from __future__ import annotations

import ctypes
import errno
import mmap
import os
import secrets
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from ep_backend import _native
from ep_backend.memory import raise_first

if TYPE_CHECKING:
    from ep_backend.group import Group

SHM_DIR = Path("/dev/shm")
SEGMENT_PREFIX = "ep_backend-"


class MappedMemory:
    """One mapping a rank, in rank order."""

    def __init__(self, mappings: list[mmap.mmap]) -> None:
        self._mappings = mappings
        # Each view pins its mapping: close() drops the views first.
        self._views = [ctypes.c_char.from_buffer(mapping) for mapping in mappings]

    @property
    def bases(self) -> list[int]:
        return [ctypes.addressof(view) for view in self._views]

    def close(self, *, has_failed: Callable[[], bool] = lambda: False) -> None:
        self._views.clear()
        self._mappings.clear()  # unmapped when the last rank that shares a mapping lets go


class NetworkedMemory(MappedMemory):
    """That of virtual ranks on several nodes: what this rank has posted to the network is delivered
    before it lets go of the memory."""

    def __init__(self, mappings: list[mmap.mmap], network: _native.Network, rank: int) -> None:
        self._network = network
        self._rank = rank
        super().__init__(mappings)

    def close(self, *, has_failed: Callable[[], bool] = lambda: False) -> None:
        self._network.flush(self._rank)
        super().close(has_failed=has_failed)

    def __del__(self) -> None:
        self.close()


def allocate_in_process(group: Group, num_bytes: int) -> MappedMemory:
    """Symmetric memory for virtual ranks. Collective."""
    mappings = group.all_gather(mmap.mmap(-1, num_bytes))
    if group.network is None:
        return MappedMemory(mappings)
    return NetworkedMemory(mappings, group.network.native, group.self_rank)


def allocate_shared(group: Group, num_bytes: int) -> MappedMemory:
    """Symmetric memory for processes. Collective.

    Raises:
        RendezvousError: on every rank, when any rank cannot create or map a segment.
    """
    path = SHM_DIR / f"{SEGMENT_PREFIX}{os.getpid()}-{secrets.token_hex(8)}"
    try:
        own, error = _create(path, num_bytes)
        created = group.all_gather((str(path), error))
        raise_first([error for _, error in created])
        mappings, error = _map_all([Path(name) for name, _ in created], num_bytes, own, group)
        # Also the barrier after which the names may go.
        raise_first(group.all_gather(error))
    finally:
        path.unlink(missing_ok=True)
    return MappedMemory(mappings)


def _create(path: Path, num_bytes: int) -> tuple[mmap.mmap | None, str | None]:
    try:
        fd = os.open(path, os.O_CREAT | os.O_EXCL | os.O_RDWR, 0o600)
        try:
            os.posix_fallocate(fd, 0, num_bytes)
            return mmap.mmap(fd, num_bytes), None
        finally:
            os.close(fd)
    except OSError as e:
        remedy = ""
        if e.errno == errno.ENOSPC:
            free = os.statvfs(SHM_DIR).f_bavail * os.statvfs(SHM_DIR).f_frsize
            remedy = (
                f" {free} bytes are free there. Enlarge it (docker: --shm-size or --ipc=host) or "
                "lower num_max_tokens_per_rank (normal kernels: num_bytes)."
            )
        return None, f"cannot create {num_bytes} bytes in {SHM_DIR}: {e}.{remedy}"


def _map_all(
    paths: list[Path], num_bytes: int, own: mmap.mmap | None, group: Group
) -> tuple[list[mmap.mmap], str | None]:
    assert own is not None  # raise_first has seen to it
    mappings = []
    for rank, path in enumerate(paths):
        if rank == group.self_rank:
            mappings.append(own)
            continue
        try:
            fd = os.open(path, os.O_RDWR)
        except OSError as e:
            return [], (
                f"cannot open the segment of rank {rank}: {e}. Ranks must share one /dev/shm and "
                "one user (docker: --ipc=host, or one container)."
            )
        try:
            mappings.append(mmap.mmap(fd, num_bytes))
        finally:
            os.close(fd)
    return mappings, None
