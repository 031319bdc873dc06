"""Where a result comes from."""

from __future__ import annotations

import subprocess
from pathlib import Path


def commit() -> str | None:
    """Of the checkout that this package runs from, with `+` where files differ from it; None where
    it is installed or git is not there."""
    directory = Path(__file__).parent
    try:
        top = _git(directory, "rev-parse", "--show-toplevel")
        if not (Path(top) / "ep_backend" / "bench").samefile(directory):
            return None  # installed below somebody else's checkout
        changes = _git(directory, "status", "--porcelain", "--untracked-files=no")
        return _git(directory, "rev-parse", "--short=10", "HEAD") + ("+" if changes else "")
    except (OSError, subprocess.SubprocessError):
        return None


def _git(directory: Path, *arguments: str) -> str:
    command = ["git", "-C", str(directory), *arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=20)
    return done.stdout.strip()
