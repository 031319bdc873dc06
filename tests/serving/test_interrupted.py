"""Ctrl-C while a server starts: nothing of it is left. Also where a shell began with it ignored, as
it does for background jobs."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

pytestmark = pytest.mark.engine

# What a log says when an engine has started processes of its own, so that there is something to
# leave behind.
IS_STARTING = {"vllm": "EngineCore", "sglang": "Load weight begin"}


@pytest.mark.parametrize("engine", IS_STARTING)
def test_ctrl_c_leaves_no_process_and_no_shared_memory(engine: str, tmp_path: Path) -> None:
    pytest.importorskip(engine, reason=f"{engine} is not installed")
    before = set(os.listdir("/dev/shm"))
    demo = subprocess.Popen(
        [
            *(sys.executable, "-m", "ep_backend.cli", "demo"),
            *("--engine", engine, "--output", str(tmp_path)),
        ],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_IGN),
    )
    log = tmp_path / f"{engine}-1-ranks.log"
    deadline = time.monotonic() + 120
    while not (log.exists() and IS_STARTING[engine] in log.read_text()):
        assert demo.poll() is None
        assert time.monotonic() < deadline, log.read_text()
        time.sleep(0.5)
    started = _descendants(demo.pid)
    assert len(started) > 1, "the server has processes of its own"
    demo.send_signal(signal.SIGINT)
    output, _ = demo.communicate(timeout=60)
    assert demo.returncode == 130, output
    assert started & _living() == set()
    assert set(os.listdir("/dev/shm")) <= before


Process = tuple[int, int]
"""Its id, and when it started: ids are used again."""


def _living() -> set[Process]:
    return {process for process, _parent in _processes()}


def _descendants(pid: int) -> set[Process]:
    found: set[Process] = set()
    pids = {pid}
    while new := {p for p, parent in _processes() if parent in pids and p not in found}:
        found |= new
        pids |= {p for p, _ in new}
    return found


def _processes() -> list[tuple[Process, int]]:
    """All that live, with their parents."""
    found = []
    for directory in Path("/proc").iterdir():
        if not directory.name.isdigit():
            continue
        with contextlib.suppress(OSError):  # gone in between
            # "pid (name) state parent ...": a name may hold anything. The start is field 22.
            fields = (directory / "stat").read_text().rpartition(")")[2].split()
            if fields[0] != "Z":
                found.append(((int(directory.name), int(fields[19])), int(fields[1])))
    return found
