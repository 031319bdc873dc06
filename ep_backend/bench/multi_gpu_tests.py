"""The tests of several GPUs, run ahead of the benchmark: numbers of wrong kernels are none."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from importlib.util import find_spec
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
TESTS = Path("tests", "cuda")
"""In a checkout; an installed package has none."""
MARKER = "gpus"
NOTHING_SELECTED = 5
"""Of pytest's exit codes."""


def are_here() -> bool:
    return (ROOT / TESTS).is_dir() and find_spec("pytest") is not None


def run_tests(limit_secs: float) -> dict[str, Any]:
    """What pytest said, for the document. Never raises for what a test does.

    Args:
        limit_secs: after so long they are ended, which counts as a failure.
    """
    command = ["-m", "pytest", "-q", "-p", "no:cacheprovider", "-m", MARKER, str(TESTS)]
    found: dict[str, Any] = {"command": " ".join(["python", *command])}
    begin = time.monotonic()
    pipe = subprocess.PIPE
    with subprocess.Popen(
        [sys.executable, *command],
        cwd=ROOT,
        stdout=pipe,
        stderr=pipe,
        text=True,
        start_new_session=True,
    ) as tests:
        try:
            output, errors = tests.communicate(timeout=limit_secs)
        except BaseException as e:
            # And the ranks that it has started, which would keep the GPUs.
            with contextlib.suppress(ProcessLookupError):
                os.killpg(tests.pid, signal.SIGKILL)
            if not isinstance(e, subprocess.TimeoutExpired):
                raise
            return found | {"error": f"not done after {limit_secs:g} s"}
    lines = (output or errors).strip().splitlines() or ["pytest said nothing"]
    found |= {"summary": lines[-1].strip("= "), "secs": round(time.monotonic() - begin, 1)}
    if tests.returncode not in (0, NOTHING_SELECTED):
        found["error"] = "\n".join(line for line in lines if line.startswith("FAILED")) or lines[-1]
    return found
