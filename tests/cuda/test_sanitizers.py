"""NVIDIA's compute-sanitizer over kernels of ranks that wait for each other."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
DEADLINE_SECS = 300


def run_under(tool: str, *options: str, arguments: tuple[str, ...] = ()) -> str:
    """What the tool says about `tests.cuda.sanitized`, whose own checks must pass too."""
    if shutil.which("compute-sanitizer") is None:
        pytest.skip("no compute-sanitizer on PATH: the CUDA kernels were NOT run under it")
    program = [sys.executable, "-m", "tests.cuda.sanitized", *arguments]
    done = subprocess.run(
        ["compute-sanitizer", "--tool", tool, *options, *program],
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=DEADLINE_SECS,
    )
    output = done.stdout + done.stderr
    assert done.returncode == 0, output[-4000:]
    assert "exchanges checked" in output
    return output


@pytest.mark.parametrize("tool", ["memcheck", "racecheck", "synccheck"])
def test_the_kernels_are_clean(tool: str) -> None:
    # Our kernels alone: PyTorch's would take most of the time.
    names = ("dispatch_kernel", "combine_kernel", "unpack_kernel")
    ours = [f"--kernel-name=regex={name}" for name in names]
    # It counts barriers by the instructions that initialise them; one of ours does many.
    barriers = ["--num-cuda-barriers=4096"] if tool == "synccheck" else []
    run_under(tool, "--error-exitcode=3", *barriers, *ours)


def test_the_kernels_read_nothing_that_nobody_has_written() -> None:
    """All kernels are watched, to see who writes what ours read. The tests' own may read more:
    experts here compute on rows behind the counts."""
    options = ("--show-backtrace=no", "--print-limit=1000000")
    # The tool runs one kernel after the other.
    output = run_under("initcheck", *options, arguments=("--one-stream",))
    ours = [line for line in output.splitlines() if " at " in line and "ep::cuda" in line]
    assert not ours, "\n".join(ours[:20])
