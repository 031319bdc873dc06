"""Ranks as real processes that take orders from a test.

    with RankProcesses(3) as ranks:
        results = ranks.run(check_something, arguments)   # check_something(rank: Rank, arguments)

A rank answers with the value of its function or with a description of the exception, so a failure
of one rank never hides those of the others; every wait of the test has a deadline.
"""

from __future__ import annotations

import io
import multiprocessing
import os
import signal
import tempfile
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from ep_backend import Group

# A server that has imported torch forks the ranks: a start costs milliseconds instead of seconds.
_context = multiprocessing.get_context("forkserver")
_context.set_forkserver_preload(["tests.support.processes"])


def to_bytes(value: Any) -> bytes:
    """Not `pickle` alone: it cannot do float8 tensors. Nor `Connection.send`: torch would pass
    tensors through files in /dev/shm."""
    file = io.BytesIO()
    torch.save(value, file)
    return file.getvalue()


def from_bytes(data: bytes) -> Any:
    return torch.load(io.BytesIO(data), weights_only=False)


@dataclass
class Answer:
    """What one rank's function came to."""

    value: Any = None
    error_type: str | None = None
    error: str = ""
    record: dict[str, Any] | None = None
    """Of a PeerTimeout."""
    secs: float = 0.0
    details: str = ""

    @classmethod
    def of_error(cls, error: BaseException, secs: float = 0.0) -> Answer:
        return cls(
            error_type=type(error).__name__,
            error=str(error),
            record=getattr(error, "record", None),
            secs=secs,
            details="".join(traceback.format_exception(error)),
        )


@dataclass
class Rank:
    """What a function that runs in a rank's process gets."""

    group: Group
    _pipe: Connection

    def tell(self, value: Any) -> None:
        """To the test, while the function runs."""
        self._pipe.send_bytes(to_bytes(value))

    def ask(self) -> Any:
        """Waits for the test's `RankProcesses.tell`."""
        return from_bytes(self._pipe.recv_bytes())


started_pids = {os.getpid()}
"""Of every rank that this test run has started: whose segments in /dev/shm are ours."""


class RankProcesses:
    """`num_ranks` processes with a gloo world. Ends them when it is left."""

    def __init__(self, num_ranks: int, rendezvous_secs: float = 60.0) -> None:
        self.num_ranks = num_ranks
        self._store = tempfile.TemporaryDirectory()
        self._pipes: list[Connection] = []
        self._processes = []
        for rank in range(num_ranks):
            ours, theirs = _context.Pipe()
            store = Path(self._store.name, "store")
            process = _context.Process(
                target=_serve, args=(rank, num_ranks, store, rendezvous_secs, theirs), daemon=True
            )
            process.start()
            assert process.pid is not None
            started_pids.add(process.pid)
            theirs.close()
            self._pipes.append(ours)
            self._processes.append(process)

    def __enter__(self) -> RankProcesses:
        return self

    def __exit__(self, *exc_info: object) -> None:
        for rank, process in enumerate(self._processes):
            if process.is_alive():
                self.kill(rank)
            self._pipes[rank].close()
        self._store.cleanup()

    def run(
        self, function: Callable[..., Any], *args: Any, deadline_secs: float = 60.0
    ) -> list[Any]:
        """`function(rank, *args)` on every rank; the values, in rank order.

        Raises:
            AssertionError: with the traceback of every rank that raised.
        """
        self.start(function, *args)
        answers = self.answers(deadline_secs=deadline_secs)
        failed = [(rank, a) for rank, a in enumerate(answers) if a.error_type is not None]
        if failed:
            raise AssertionError("\n".join(f"rank {rank}:\n{a.details}" for rank, a in failed))
        return [answer.value for answer in answers]

    def start(self, function: Callable[..., Any], *args: Any, ranks: Any = None) -> None:
        for rank in range(self.num_ranks) if ranks is None else ranks:
            self.tell(rank, (function, args))

    def tell(self, rank: int, value: Any) -> None:
        self._pipes[rank].send_bytes(to_bytes(value))

    def next_from(self, rank: int, deadline_secs: float = 60.0) -> Any:
        """What the rank told; or, when its function has ended, its Answer."""
        assert self._pipes[rank].poll(deadline_secs), f"rank {rank}: silent for {deadline_secs} s"
        return from_bytes(self._pipes[rank].recv_bytes())

    def answers(self, ranks: Any = None, deadline_secs: float = 60.0) -> list[Answer]:
        end = time.monotonic() + deadline_secs
        answers = []
        for rank in range(self.num_ranks) if ranks is None else ranks:
            answer = self.next_from(rank, max(0.0, end - time.monotonic()))
            assert isinstance(answer, Answer), f"rank {rank} told {answer!r}, its answer was due"
            answers.append(answer)
        return answers

    def pid(self, rank: int) -> int:
        pid = self._processes[rank].pid
        assert pid is not None
        return pid

    def interrupt(self, rank: int) -> None:
        os.kill(self.pid(rank), signal.SIGINT)

    def kill(self, rank: int) -> None:
        os.kill(self.pid(rank), signal.SIGKILL)
        self._processes[rank].join(10)


def _serve(
    rank: int, num_ranks: int, store: Path, rendezvous_secs: float, pipe: Connection
) -> None:
    torch.set_num_threads(1)  # ranks outnumber cores
    dist.init_process_group(
        "gloo",
        init_method=f"file://{store}",
        rank=rank,
        world_size=num_ranks,
        timeout=timedelta(seconds=rendezvous_secs),
    )
    context = Rank(Group.from_process_group(timeout_secs=rendezvous_secs), pipe)
    while True:
        try:
            function, args = from_bytes(pipe.recv_bytes())
        except EOFError:  # the test has ended
            return
        begin = time.monotonic()
        try:
            answer = Answer(value=function(context, *args))
        except BaseException as e:
            answer = Answer.of_error(e)
        answer.secs = time.monotonic() - begin
        pipe.send_bytes(to_bytes(answer))
