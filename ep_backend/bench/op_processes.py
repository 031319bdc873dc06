"""One process a rank, for benchmarks: all come to an end, whatever happens to one of them."""

from __future__ import annotations

import contextlib
import multiprocessing as mp
import os
import signal
import tempfile
import threading
import time
import traceback
from collections.abc import Callable
from datetime import timedelta
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import torch.distributed as dist

# A rank that waits for a lost one must give up before its parent gives up on all of them.
RANK_TIMEOUT_SECS = 120.0
STALL_SECS = 2 * RANK_TIMEOUT_SECS
_GRACE_SECS = 2.0

Report = Callable[[Any], None]
RankMain = Callable[[int, Any, Report], None]


class RankFailed(RuntimeError):
    """A rank raised or died; the text says which, and shows what it raised."""


def run_ranks(
    rank_main: RankMain, num_ranks: int, argument: Any, on_reports: Callable[[list[Any]], None]
) -> None:
    """Calls `rank_main(rank, argument, report)` in `num_ranks` new processes, which have a
    torch.distributed world over gloo.

    Args:
        rank_main: a function of a module; it runs with torch.distributed initialised. Every rank
            must report equally often.
        on_reports: called here with the n-th report of every rank, in rank order, as soon as all
            have made it.

    Raises:
        RankFailed: a rank failed, or none reported anything for `STALL_SECS`. As on Ctrl-C, every
            process has ended by then.
    """
    context = mp.get_context("spawn")
    processes: list[BaseProcess] = []
    pipes: list[Connection] = []
    with tempfile.TemporaryDirectory(prefix="ep_backend-bench-") as folder:
        try:
            for rank in range(num_ranks):
                pipe, child_pipe = context.Pipe(duplex=False)
                process = context.Process(
                    target=_rank_process,
                    args=(rank_main, rank, num_ranks, argument, Path(folder) / "world", child_pipe),
                    name=f"rank {rank}",
                    daemon=True,
                )
                process.start()
                child_pipe.close()  # so that the end of the process is the end of the pipe
                processes.append(process)
                pipes.append(pipe)
            _collect(processes, pipes, on_reports)
        finally:
            _end(processes)


def _collect(
    processes: list[BaseProcess],
    pipes: list[Connection],
    on_reports: Callable[[list[Any]], None],
) -> None:
    reports: list[list[Any]] = [[] for _ in pipes]
    open_pipes = set(range(len(pipes)))
    num_handed_on = 0
    while open_pipes:
        ready = wait([pipes[rank] for rank in open_pipes], timeout=STALL_SECS)
        if not ready:
            raise RankFailed(f"no rank has reported anything for {STALL_SECS:.0f} s")
        for rank in sorted(open_pipes):
            if pipes[rank] not in ready:
                continue
            try:
                error, report = pipes[rank].recv()
            except EOFError:
                processes[rank].join(_GRACE_SECS)
                if processes[rank].exitcode != 0:
                    raise RankFailed(
                        f"rank {rank} died with exit code {processes[rank].exitcode}"
                    ) from None
                open_pipes.remove(rank)
                continue
            if error is not None:
                raise RankFailed(
                    f"rank {rank} failed:\n{error}{_other_failures(processes, pipes, rank)}"
                )
            reports[rank].append(report)
        while all(len(mine) > num_handed_on for mine in reports):
            on_reports([mine[num_handed_on] for mine in reports])
            num_handed_on += 1


def _other_failures(processes: list[BaseProcess], pipes: list[Connection], first_rank: int) -> str:
    """Failures that come with the first: one of them may be its cause."""
    time.sleep(0.2)
    text = ""
    for rank, (process, pipe) in enumerate(zip(processes, pipes, strict=True)):
        with contextlib.suppress(EOFError, OSError):
            while rank != first_rank and pipe.poll():
                error, _ = pipe.recv()
                if error is not None:
                    text += f"\nrank {rank} failed:\n{error}"
        if (process.exitcode or 0) < 0:
            text += f"\nrank {rank} was killed by signal {-(process.exitcode or 0)}"
    return text


def _end(processes: list[BaseProcess]) -> None:
    for process in processes:
        process.terminate()  # does nothing to one that has ended
    for process in processes:
        process.join(_GRACE_SECS)
        if process.is_alive():
            process.kill()
            process.join()


def _rank_process(
    rank_main: RankMain,
    rank: int,
    num_ranks: int,
    argument: Any,
    rendezvous: Path,
    pipe: Connection,
) -> None:
    # A terminal sends Ctrl-C to all of us; the parent handles it and ends its ranks.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_exit_with_parent, daemon=True).start()
    # All ranks are on this host; its name may resolve to an address that does not work.
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    try:
        dist.init_process_group(
            "gloo",
            init_method=rendezvous.as_uri(),
            rank=rank,
            world_size=num_ranks,
            timeout=timedelta(seconds=RANK_TIMEOUT_SECS),
        )
        rank_main(rank, argument, lambda report: pipe.send((None, report)))
        dist.barrier()  # nobody leaves while another still needs its connection
        dist.destroy_process_group()
    except Exception:
        pipe.send((traceback.format_exc(), None))
        # Without the destructors of gloo, which may wait for peers that are gone.
        os._exit(1)


def _exit_with_parent() -> None:
    parent = mp.parent_process()
    assert parent is not None
    wait([parent.sentinel])
    os._exit(1)
