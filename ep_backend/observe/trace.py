"""A ring of timed spans in a file that other processes may read while it is written.

With `EP_BACKEND_TRACE=DIR` every process of a service records there: the buffers their sends and
hooks, an engine's adapter its own spans. The last process that is done with its buffers, or ends,
makes `DIR/trace.json` of all rings, for ui.perfetto.dev (see `perfetto`). Processes that were
killed leave their rings: `ep-backend trace merge DIR` does the same. Without the variable nothing
is recorded.
"""

from __future__ import annotations

import atexit
import contextlib
import fcntl
import multiprocessing.util
import os
import threading
import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, NamedTuple

import numpy as np

TRACE_VARIABLE = "EP_BACKEND_TRACE"
POLL_SECS = 0.05
CAPACITY = 1 << 16
"""Spans kept; older ones are overwritten."""

HEADER = np.dtype([("num_written", "<u8"), ("pid", "<u8"), ("is_done", "<u8")])
RECORD = np.dtype(
    [
        ("kind", "S24"),
        ("num_tokens", "<u8"),
        ("begin_ns", "<u8"),  # CLOCK_MONOTONIC, the same for all processes of a host
        ("duration_ns", "<u8"),
        ("wait_ns", "<u8"),
        ("epoch", "<u8"),  # 0: no operation of a buffer
        ("rank", "<u4"),
        ("buffer", "<u4"),
        ("thread", "<u4"),
        ("on_gpu", "<u4"),
    ]
)


class Operation(NamedTuple):
    """Which operation of its kind a span is. Those of other ranks with the same buffer and epoch
    belong to it."""

    rank: int
    buffer: int
    """The how manieth of its rank in this process."""
    epoch: int
    """Counted from 1."""


NO_OPERATION = Operation(0, 0, 0)


@dataclass
class Span:
    """A span being recorded; whoever measures the wait for peers fills it in."""

    wait_ns: int = 0


class TraceWriter:
    """Writes spans of one process. Threads may share it."""

    _writers: ClassVar[dict[Path, TraceWriter]] = {}
    _lock = threading.Lock()

    def __init__(self, path: Path) -> None:
        """Creates `path`, which must not exist."""
        with path.open("xb") as file:
            file.truncate(HEADER.itemsize + CAPACITY * RECORD.itemsize)
        self._directory = path.parent
        self._header = np.memmap(path, dtype=HEADER, mode="r+", shape=(1,))
        self._header["pid"] = os.getpid()
        self._ring = np.memmap(
            path, dtype=RECORD, mode="r+", offset=HEADER.itemsize, shape=(CAPACITY,)
        )
        self._num_buffers: dict[int, int] = defaultdict(int)  # by rank, closed ones included
        self._num_open = 0

    @classmethod
    def from_env(cls, name: str) -> TraceWriter | None:
        """The process's writer, or None where no trace is asked for.

        Args:
            name: of the file, beside the process id; the first caller's counts.
        """
        directory = os.environ.get(TRACE_VARIABLE)
        if not directory:
            return None
        with cls._lock:
            key = Path(directory, str(os.getpid()))
            if key not in cls._writers:
                Path(directory).mkdir(parents=True, exist_ok=True)
                writer = cls(Path(directory, f"{name}-{os.getpid()}.trace"))
                cls._writers[key] = writer
                # Children of multiprocessing may end without the one, other processes the other.
                atexit.register(writer.finish)
                multiprocessing.util.Finalize(None, writer.finish, exitpriority=0)
            return cls._writers[key]

    def open_buffer(self, rank: int) -> int:
        """A buffer of this rank begins to record; returns its number."""
        with self._lock:
            self._num_open += 1
            self._header["is_done"] = 0
            self._num_buffers[rank] += 1
            return self._num_buffers[rank]

    def close_buffer(self) -> None:
        """With the last one, this process is done, until it opens another."""
        with self._lock:
            self._num_open -= 1
            is_last = self._num_open == 0
        if is_last:
            self.finish()

    def finish(self) -> None:
        """This process is done; the last of the directory makes the JSON. Idempotent."""
        if self._header["is_done"][0] or self._header["pid"][0] != os.getpid():
            return
        self._header["is_done"] = 1
        write_if_done(self._directory)

    @contextmanager
    def span(self, kind: str, num_tokens: int) -> Iterator[Span]:
        """Records the time its body takes; nothing when the body raises."""
        span = Span()
        begin_ns = time.monotonic_ns()
        yield span
        self.add(kind, num_tokens, begin_ns, time.monotonic_ns() - begin_ns, span.wait_ns)

    def add(
        self,
        kind: str,
        num_tokens: int,
        begin_ns: int,
        duration_ns: int,
        wait_ns: int = 0,
        operation: Operation = NO_OPERATION,
        on_gpu: bool = False,
    ) -> None:
        """Records a span that the caller has timed."""
        rank, buffer, epoch = operation
        thread = threading.get_native_id()
        with self._lock:
            written = int(self._header["num_written"][0])
            self._ring[written % CAPACITY] = (
                kind,
                num_tokens,
                begin_ns,
                duration_ns,
                wait_ns,
                epoch,
                rank,
                buffer,
                thread,
                on_gpu,
            )
            self._header["num_written"] = written + 1


def write_if_done(directory: Path, wait_secs: float = 0.0) -> None:
    """Makes the JSON of what was recorded in `directory`, unless some process still records.

    Args:
        wait_secs: for processes that are being killed.
    """
    from ep_backend.observe.perfetto import write_json

    deadline = time.monotonic() + wait_secs
    while any(_is_recording(path) for path in directory.glob("*.trace")):
        if time.monotonic() >= deadline:
            return
        time.sleep(POLL_SECS)
    # Not there any more, or nobody has recorded: nothing to do.
    with contextlib.suppress(FileNotFoundError), _locked(directory):
        write_json(directory)


def read_trace(path: Path) -> np.ndarray:
    """The spans in a file, oldest first, as a structured array of `RECORD`."""
    num_written = int(_read_header(path)["num_written"])
    ring = np.fromfile(path, dtype=RECORD, offset=HEADER.itemsize)
    if num_written <= CAPACITY:
        return ring[:num_written]
    return np.roll(ring, -(num_written % CAPACITY))


def trace_pid(path: Path) -> int:
    """The process that has written a file."""
    return int(_read_header(path)["pid"])


def _read_header(path: Path) -> np.void:
    return np.fromfile(path, dtype=HEADER, count=1)[0]


def _is_recording(path: Path) -> bool:
    """Its process lives, and is not done."""
    header = _read_header(path)
    if header["is_done"]:
        return False
    try:
        status = Path(f"/proc/{header['pid']}/stat").read_text()
    except OSError:
        return False
    # pid (name) state: killed ones wait for their parent as Z.
    return status.rpartition(")")[2].split()[0] not in ("Z", "X")


@contextmanager
def _locked(directory: Path) -> Iterator[None]:
    """One process of the directory at a time."""
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)
