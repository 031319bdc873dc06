"""Where a result comes from."""

from __future__ import annotations

import os
import platform
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch

from ep_backend import __version__
from ep_backend.bench.options import without_output
from ep_backend.tuning.site import cpu_name


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


def command() -> str:
    """This process's command line, without where results go."""
    return shlex.join(["ep-backend", *without_output(sys.argv[1:])])


def this_machine() -> dict[str, Any]:
    return {
        "cpu": cpu_name(),
        "num_cpus": len(os.sched_getaffinity(0)),
        "kernel": platform.release(),
    }


def installed_versions() -> dict[str, str]:
    return {
        "ep_backend": __version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
    }


def _git(directory: Path, *arguments: str) -> str:
    command = ["git", "-C", str(directory), *arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=20)
    return done.stdout.strip()
