"""The ranks of the multi-GPU benchmark kept in step, and their replays timed together."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Protocol, TypeVar

import torch

from ep_backend import Group, RendezvousError
from ep_backend.bench.op_cuda_graph import Spread, close_gate
from ep_backend.bench.op_cuda_report import reason

T = TypeVar("T")

NUM_WARMUP_REPLAYS = 5


class Replayed(Protocol):
    """What is timed: a CUDA graph, or what is queued anew every time."""

    def replay(self) -> None: ...


@dataclass(frozen=True)
class Queue:
    """Operations that a host queues one by one."""

    act: Callable[[], object]
    num_ops: int

    def replay(self) -> None:
        for _ in range(self.num_ops):
            self.act()


class StepFailed(RuntimeError):
    """Some rank's step failed; raised on every rank at the same meeting."""


class WorldLost(RuntimeError):
    """A rank did not come to a meeting: nothing can be agreed on any more."""


class World:
    """Meets only in one way, so that a rank that fails between two meetings of the others brings
    its error to whichever they come to next, and all give up the step together."""

    def __init__(self, group: Group) -> None:
        self.group = group

    def gather(self, value: T) -> list[T]:
        """Of every rank. Collective."""
        try:
            return self.group.all_gather(value)
        except RendezvousError as e:
            raise WorldLost(str(e)) from e

    def meet(self, error: str | None = None) -> None:
        """A barrier that raises `StepFailed` on every rank where any rank brings an error."""
        errors = self.gather(error)
        failed = [f"rank {rank}: {e}" for rank, e in enumerate(errors) if isinstance(e, str)]
        if failed:
            raise StepFailed("; ".join(failed))

    def step(self, run: Callable[[], T]) -> T:
        """Runs a part of the work on every rank; all go on, or none. Collective."""
        try:
            value = run()
        except (StepFailed, WorldLost):  # the others know
            raise
        except Exception as e:
            self.meet(reason(e))
            raise
        self.meet()
        return value


@dataclass(frozen=True)
class RankedSpread:
    """Of an operation that all ranks run at the same time."""

    spread: Spread
    """A replay counts as long as on its slowest rank."""
    rank_difference_us: float
    """Between the slowest and the fastest rank, median over replays; divided as the times are."""

    @classmethod
    def of(cls, replay_us: list[list[float]], num_ops: int) -> RankedSpread:
        """From each rank's replays of `num_ops` operations."""
        replays = list(zip(*replay_us, strict=True))
        differences = [(max(ranks) - min(ranks)) / num_ops for ranks in replays]
        return cls(
            Spread.of([max(ranks) for ranks in replays], num_ops), statistics.median(differences)
        )


def time_chain(
    world: World,
    lead_in: Replayed,
    chain: Replayed,
    *,
    num_ops: int,
    num_repeats: int,
    raise_if_failed: Callable[[], None],
) -> RankedSpread:
    """Times replays of `chain`, `num_ops` operations. Collective.

    Args:
        lead_in: an operation in which ranks wait for each other; queued before the first
            event, so that the chain starts on all ranks within microseconds, however far apart
            their hosts launch it.
        raise_if_failed: called after each replay.
    """
    run = partial(_replay_us, world, lead_in, chain, num_repeats, raise_if_failed)
    return RankedSpread.of(world.gather(world.step(run)), num_ops)


def _replay_us(
    world: World,
    lead_in: Replayed,
    chain: Replayed,
    num_repeats: int,
    raise_if_failed: Callable[[], None],
) -> list[float]:
    """Microseconds of each replay on this rank."""
    launch_secs = []
    for _ in range(NUM_WARMUP_REPLAYS):
        begin_secs = time.perf_counter()
        lead_in.replay()
        chain.replay()
        launch_secs.append(time.perf_counter() - begin_secs)
        torch.cuda.synchronize()
        raise_if_failed()
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    times_us = []
    for _ in range(num_repeats):
        world.meet()
        close_gate(statistics.median(launch_secs))
        lead_in.replay()
        begin.record()
        chain.replay()
        end.record()
        torch.cuda.synchronize()
        raise_if_failed()
        times_us.append(begin.elapsed_time(end) * 1e3)
    return times_us
