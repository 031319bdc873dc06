"""What a check says, and where the checks look: files of the kernel and the driver, limits of the
process, distributions that are installed."""

from __future__ import annotations

import os
import resource
from collections.abc import Callable
from dataclasses import dataclass, field
from enum import Enum
from importlib import metadata
from pathlib import Path


class Level(str, Enum):
    OK = "ok"
    NOTE = "note"
    """Works; could be better, or is only good to know."""
    MISSING = "missing"
    """What needs it cannot run."""


@dataclass(frozen=True)
class Check:
    """One line."""

    name: str
    level: Level
    found: str
    remedy: str = ""
    """What to do, where something is missing."""


def version_of(distribution: str) -> str | None:
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return None


@dataclass(frozen=True)
class Machine:
    """This machine as checks see it; tests give them another."""

    root: Path = Path("/")
    environ: dict[str, str] = field(default_factory=lambda: dict(os.environ))
    version_of: Callable[[str], str | None] = version_of
    limit_of: Callable[[int], int] = lambda what: resource.getrlimit(what)[0]

    def path(self, absolute: str) -> Path:
        return self.root / absolute.lstrip("/")

    def read(self, absolute: str) -> str | None:
        """A file's text without the white space around it; None: there is none to read."""
        try:
            return self.path(absolute).read_text().strip()
        except OSError:
            return None

    def names_in(self, absolute: str) -> list[str]:
        try:
            return sorted(entry.name for entry in self.path(absolute).iterdir())
        except OSError:
            return []

    def free_bytes(self, absolute: str) -> int | None:
        try:
            status = os.statvfs(self.path(absolute))
        except OSError:
            return None
        return status.f_bavail * status.f_frsize


def gib(num_bytes: int) -> str:
    return f"{num_bytes / 2**30:.1f} GiB"
