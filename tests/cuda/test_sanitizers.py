"""NVIDIA's compute-sanitizer over kernels of ranks that wait for each other."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
TOOLS = ("memcheck", "racecheck", "synccheck", "initcheck")
DEADLINE_SECS = 300


def run_under(tool: str) -> str:
    """What the tool says about `tests.cuda.sanitized`, whose own checks must pass too."""
    command = ["compute-sanitizer", "--tool", tool, "--error-exitcode", "3"]
    program = [sys.executable, "-m", "tests.cuda.sanitized"]
    if tool == "initcheck":
        # It must see who writes what our kernels read; and it runs one kernel after the other.
        program.append("--one-stream")
    else:
        # Our kernels alone: PyTorch's would take most of the time.
        for kernel in ("dispatch_kernel", "combine_kernel"):
            command += ["--kernel-name", f"regex={kernel}"]
    done = subprocess.run(
        [*command, *program],
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=DEADLINE_SECS,
    )
    output = done.stdout + done.stderr
    assert done.returncode == 0, output[-4000:]
    return output


@pytest.mark.parametrize("tool", TOOLS)
def test_the_kernels_are_clean(tool: str) -> None:
    if shutil.which("compute-sanitizer") is None:
        pytest.skip("no compute-sanitizer on PATH: the CUDA kernels were NOT run under it")
    assert "exchanges checked" in run_under(tool)
