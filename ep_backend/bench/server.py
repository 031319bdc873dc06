"""Inference servers as child processes: started, watched, and ended with all their children."""

from __future__ import annotations

import asyncio
import contextlib
import os
import random
import secrets
import signal
import socket
import subprocess
import threading
import time
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import httpx

RUN_VARIABLE = "EP_BACKEND_RUN_ID"
"""Marks the processes of a server that leave its session."""
SHM_DIR = Path("/dev/shm")
PORTS = range(20_000, 32_000)
"""Below those that Linux gives to connections: SGLang listens at its port + 233, too, and a
connection of its own could have that."""
START_TIMEOUT_SECS = 300.0
STOP_TIMEOUT_SECS = 20.0
LOG_TAIL_LINES = 40


class ServerFailed(RuntimeError):
    """A server ended, or did not get ready; the text holds the end of its log."""


def end_by_signals() -> None:
    """Lets Ctrl-C and SIGTERM raise KeyboardInterrupt in this process, which then ends its servers;
    a shell's background job begins with Ctrl-C ignored."""
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGTERM, lambda *_: signal.raise_signal(signal.SIGINT))


@dataclass(frozen=True)
class Server:
    """A server that answers."""

    base_url: str
    log: Path | None
    """None: it was not started here."""
    start_secs: float


@contextlib.asynccontextmanager
async def running_server(
    command: Sequence[str],
    log: Path,
    *,
    environment: dict[str, str],
    on_wait: Callable[[float], None] = lambda seconds: None,
    start_timeout_secs: float = START_TIMEOUT_SECS,
) -> AsyncIterator[Server]:
    """Starts `command` on a free port of the loopback interface, waits until it is healthy, and at
    the end of the block ends it and everything it has started, also on Ctrl-C or an error.

    Args:
        command: a server that takes `--host` and `--port` and answers `/health`.
        log: receives its output.
        on_wait: called about twice a second with the seconds waited.

    Raises:
        ServerFailed: it ended before it was healthy, or took longer than `start_timeout_secs`.
    """
    port = _free_port()
    run_id = secrets.token_hex(8)
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("wb") as output:
        process = subprocess.Popen(
            [*command, "--host", "127.0.0.1", "--port", str(port)],
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            env=os.environ | environment | {RUN_VARIABLE: run_id},
            start_new_session=True,  # Ctrl-C comes to us alone: we end it in order
        )
    try:
        base_url = f"http://127.0.0.1:{port}"
        start_secs = await _wait_healthy(process, base_url, log, on_wait, start_timeout_secs)
        yield Server(base_url, log, start_secs)
        if process.poll() is not None:
            raise ServerFailed(f"the server ended by itself ({process.returncode}).{_tail(log)}")
    finally:
        _stop(process, run_id)


@contextlib.asynccontextmanager
async def attached_server(url: str, timeout_secs: float) -> AsyncIterator[Server]:
    """A server that runs already, as soon as it is healthy; it is left running.

    Raises:
        ServerFailed: it was not healthy within `timeout_secs`.
    """
    base_url = url.rstrip("/")
    start_secs = await _wait_healthy(None, base_url, None, lambda seconds: None, timeout_secs)
    yield Server(base_url, None, start_secs)


async def _wait_healthy(
    process: subprocess.Popen | None,
    base_url: str,
    log: Path | None,
    on_wait: Callable[[float], None],
    timeout_secs: float,
) -> float:
    begin = time.monotonic()
    async with httpx.AsyncClient(base_url=base_url, timeout=5.0, trust_env=False) as client:
        while (seconds := time.monotonic() - begin) < timeout_secs:
            if process is not None and process.poll() is not None:
                raise ServerFailed(
                    f"the server ended at start-up with code {process.returncode}.{_tail(log)}"
                )
            with contextlib.suppress(httpx.TransportError):
                if (await client.get("/health")).status_code == 200:
                    return seconds
            on_wait(seconds)
            await asyncio.sleep(0.5)
    where = base_url if process is None else "the server"
    raise ServerFailed(f"{where} was not healthy after {timeout_secs:.0f} s.{_tail(log)}")


def _stop(process: subprocess.Popen, run_id: str) -> None:
    """Ends the server and all its children. Another Ctrl-C meanwhile does not interrupt that."""
    if threading.current_thread() is not threading.main_thread():
        _end_processes(process, run_id)
        return
    handler = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        _end_processes(process, run_id)
    finally:
        signal.signal(signal.SIGINT, handler)


def _end_processes(process: subprocess.Popen, run_id: str) -> None:
    """SIGTERM, then SIGKILL to whatever of the run is left."""
    segments = _mapped_segments(_processes_of_run(run_id, process.pid))
    if process.poll() is None:
        process.terminate()
    deadline = time.monotonic() + STOP_TIMEOUT_SECS
    while (pids := _processes_of_run(run_id, process.pid)) and time.monotonic() < deadline:
        segments |= _mapped_segments(pids)
        process.poll()
        time.sleep(0.1)
    for pid in pids:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    process.wait()
    # vLLM leaves message queues and semaphores behind when it is ended during start-up, SGLang
    # always.
    for path in SHM_DIR.iterdir():
        with contextlib.suppress(FileNotFoundError):
            if path.stat().st_ino in segments:
                path.unlink()


def _mapped_segments(pids: Sequence[int]) -> set[int]:
    """Inodes in /dev/shm that these processes have mapped. Not names: glibc maps a semaphore under
    a temporary one."""
    inodes = set()
    for pid in pids:
        with contextlib.suppress(OSError):
            for line in Path(f"/proc/{pid}/maps").read_text().splitlines():
                _range, _mode, _offset, _device, inode, *path = line.split(maxsplit=5)
                if path and path[0].startswith(f"{SHM_DIR}/"):
                    inodes.add(int(inode))
    return inodes


def _processes_of_run(run_id: str, session: int) -> list[int]:
    """Ids of the living processes of a run. Two signs, since a process may leave the session, and
    one that changes its title, as SGLang's do, may write it over its environment."""
    mark = f"{RUN_VARIABLE}={run_id}".encode()
    pids = []
    for directory in Path("/proc").iterdir():
        if not directory.name.isdigit():
            continue
        # Gone in between, or not ours: not a process of this run.
        with contextlib.suppress(OSError):
            # "pid (name) state parent group session ...": a name may hold anything.
            state, _, _, its_session = (
                (directory / "stat").read_text().rpartition(")")[2].split()[:4]
            )
            if state == "Z":
                continue
            environment = (directory / "environ").read_bytes().split(b"\0")
            if int(its_session) == session or mark in environment:
                pids.append(int(directory.name))
    return pids


def _free_port() -> int:
    for port in random.sample(PORTS, 100):
        with contextlib.suppress(OSError), socket.socket() as probe:
            probe.bind(("127.0.0.1", port))
            return port
    raise OSError(f"of 100 ports between {PORTS.start} and {PORTS.stop} none is free on this host.")


def _tail(log: Path | None) -> str:
    if log is None:
        return ""
    lines = log.read_text(errors="replace").splitlines()[-LOG_TAIL_LINES:]
    return f" The end of {log}:\n" + "\n".join(lines)
