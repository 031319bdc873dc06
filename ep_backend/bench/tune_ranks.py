"""Ranks that `ep-backend tune` runs operations on: processes on a CPU, a process a GPU, or virtual
ranks on one GPU, behind one interface.

`Ranks` is what one process sees. Where ranks are processes, all of them call the same methods.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, Protocol, TypeVar

import torch

from ep_backend import Group, virtual_world
from ep_backend.bench.multi_gpu_world import World, time_chain
from ep_backend.bench.op_cuda_graph import capture, time_replays

T = TypeVar("T")
Act = Callable[[], object]
"""An operation of one rank."""


class Chain(Protocol):
    """An operation of every rank, a number of times."""

    def run(self) -> None:
        """Once; finished when it returns."""

    def time(self) -> list[float]:
        """Microseconds of one operation on the slowest rank; several samples."""


class Ranks(Protocol):
    device: torch.device
    num_open: int
    """Candidates that are compared in turns: on a GPU their memory sets the limit."""

    def make(self, create: Callable[[Group], T]) -> list[T]:
        """Of each rank of this process. Collective."""

    def step(self, run: Callable[[], T]) -> T:
        """A part of the work; where it fails on one rank, it fails on all. Collective."""

    def gather(self, values: Sequence[T]) -> list[T]:
        """Those of all ranks, from those of this process's. Collective."""

    def run(self, acts: Sequence[Act]) -> None:
        """An operation of each rank of this process; finished when it returns. Collective."""

    def chain(self, acts: Sequence[Act], raise_if_failed: Callable[[], None]) -> Chain:
        """Of an operation of each rank of this process. Collective."""


class CpuRank:
    """This process is one of the ranks."""

    num_open = 16

    def __init__(self, group: Group, num_ops: int, num_repeats: int) -> None:
        self.device = torch.device("cpu")
        self._group = group
        self._num_timed = num_ops * num_repeats

    def make(self, create: Callable[[Group], T]) -> list[T]:
        return [create(self._group)]

    def step(self, run: Callable[[], T]) -> T:
        return run()  # the parent process ends all ranks where one fails

    def gather(self, values: Sequence[T]) -> list[T]:
        (value,) = values
        return self._group.all_gather(value)

    def run(self, acts: Sequence[Act]) -> None:
        for act in acts:
            act()

    def chain(self, acts: Sequence[Act], raise_if_failed: Callable[[], None]) -> Chain:
        return _Loop(self, acts[0], self._num_timed)


class _Loop:
    def __init__(self, rank: CpuRank, act: Act, num_timed: int) -> None:
        self._rank = rank
        self._act = act
        self._num_timed = num_timed

    def run(self) -> None:
        self._act()

    def time(self) -> list[float]:
        self._rank.gather([None])
        self._act()  # ranks leave a meeting at different times
        times_us = []
        for _ in range(self._num_timed):
            begin_ns = time.perf_counter_ns()
            self._act()
            times_us.append((time.perf_counter_ns() - begin_ns) / 1e3)
        return list(map(max, zip(*self._rank.gather([times_us]), strict=True)))


class _Graph:
    """Operations in a CUDA graph."""

    def __init__(self, graph: torch.cuda.CUDAGraph, sample: Callable[[], list[float]]) -> None:
        self._graph = graph
        self.time = sample

    def run(self) -> None:
        self._graph.replay()
        torch.cuda.synchronize()


def _run_captured(acts: Sequence[Act]) -> None:
    graph = capture(acts)
    graph.replay()
    torch.cuda.synchronize()


def _repeated(act: Act, num_ops: int) -> None:
    for _ in range(num_ops):
        act()


class VirtualRanks:
    """All ranks are threads of this process, on the current GPU."""

    num_open = 2

    def __init__(self, num_ranks: int, num_ops: int, num_repeats: int) -> None:
        self.device = torch.device("cuda", torch.cuda.current_device())
        self._world = virtual_world(num_ranks)
        self._num_ops = num_ops
        self._num_repeats = num_repeats

    def make(self, create: Callable[[Group], T]) -> list[T]:
        return self._world.run(create)

    def step(self, run: Callable[[], T]) -> T:
        return run()

    def gather(self, values: Sequence[T]) -> list[T]:
        return list(values)

    def run(self, acts: Sequence[Act]) -> None:
        _run_captured(acts)

    def chain(self, acts: Sequence[Act], raise_if_failed: Callable[[], None]) -> Chain:
        graph = capture([partial(_repeated, act, self._num_ops) for act in acts])

        def sample() -> list[float]:
            times_us = time_replays(graph, self._num_repeats)
            raise_if_failed()
            return [us / self._num_ops for us in times_us]

        return _Graph(graph, sample)


class GpuRank:
    """This process is one of the ranks, on the current GPU."""

    num_open = 2

    def __init__(self, group: Group, num_ops: int, num_repeats: int) -> None:
        self.device = torch.device("cuda", torch.cuda.current_device())
        self._world = World(group)
        self._num_ops = num_ops
        self._num_repeats = num_repeats

    def make(self, create: Callable[[Group], T]) -> list[T]:
        return [self._world.step(partial(create, self._world.group))]

    def step(self, run: Callable[[], T]) -> T:
        return self._world.step(run)

    def gather(self, values: Sequence[Any]) -> list[Any]:
        (value,) = values
        return self._world.gather(value)

    def run(self, acts: Sequence[Act]) -> None:
        self._world.step(partial(_run_captured, acts))

    def chain(self, acts: Sequence[Act], raise_if_failed: Callable[[], None]) -> Chain:
        (act,) = acts
        lead_in = self._world.step(partial(capture, [act]))
        graph = self._world.step(partial(capture, [partial(_repeated, act, self._num_ops)]))

        def sample() -> list[float]:
            times = time_chain(
                self._world,
                lead_in,
                graph,
                num_ops=self._num_ops,
                num_repeats=self._num_repeats,
                raise_if_failed=raise_if_failed,
            )
            return [times.spread.median_us]

        return _Graph(graph, sample)
