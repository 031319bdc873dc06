"""How far a sweep is, and about how long it will still take: a bar on a terminal, else lines."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import util
from typing import Any


@dataclass(frozen=True)
class Stage:
    """A step of a run. Those of the same `kind` and `variant` take about as long as each other."""

    name: str
    kind: str
    variant: str


class Plan:
    """Stages in the order in which they come, and how long the past ones took."""

    def __init__(self, stages: list[Stage], clock: Callable[[], float] = time.monotonic) -> None:
        self._stages = stages
        self._clock = clock
        self._took: list[tuple[Stage, float]] = []
        self._num_begun = 0
        self._begin = clock()

    @property
    def num_stages(self) -> int:
        return len(self._stages)

    @property
    def num_done(self) -> int:
        return max(self._num_begun - 1, 0)

    def begin(self, name: str) -> None:
        """The stage of this name begins, and the one before it has ended. Stages in between, of a
        server that failed, are passed over and tell nothing."""
        names = [stage.name for stage in self._stages]
        at = names.index(name, self._num_begun)
        if self._num_begun and at == self._num_begun:
            self._took.append((self._stages[at - 1], self._clock() - self._begin))
        self._num_begun, self._begin = at + 1, self._clock()

    def left_secs(self) -> float | None:
        """None: nothing is known yet."""
        if not self._took:
            return None
        current = self._stages[self._num_begun - 1]
        left = max(self._estimate(current) - (self._clock() - self._begin), 0.0)
        return left + sum(self._estimate(stage) for stage in self._stages[self._num_begun :])

    def _estimate(self, stage: Stage) -> float:
        """The mean of the most similar stages so far."""
        alike = [secs for past, secs in self._took if past.kind == stage.kind]
        same = [
            secs
            for past, secs in self._took
            if (past.kind, past.variant) == (stage.kind, stage.variant)
        ]
        known = same or alike or [secs for _, secs in self._took]
        return sum(known) / len(known)

    def left_text(self) -> str:
        secs = self.left_secs()
        if secs is None:
            return "time left not known yet"
        return f"about {secs:.0f} s left" if secs < 90 else f"about {secs / 60:.0f} min left"


class Display:
    """Says what happens; with `rich` and on a terminal, above a bar."""

    def __init__(self, plan: Plan) -> None:
        self._plan = plan
        self._bar: Any = None
        self._task: Any = None

    @contextmanager
    def shown(self) -> Iterator[None]:
        if not sys.stdout.isatty() or util.find_spec("rich") is None:
            yield
            return
        from rich.progress import (
            BarColumn,
            MofNCompleteColumn,
            Progress,
            ProgressColumn,
            TextColumn,
        )
        from rich.text import Text

        plan = self._plan

        class Left(ProgressColumn):
            def render(self, task: Any) -> Text:
                return Text(plan.left_text())

        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), Left())
        with Progress(*columns, transient=True) as self._bar:
            self._task = self._bar.add_task("", total=plan.num_stages)
            try:
                yield
            finally:
                self._bar = None

    def begin(self, stage: str, more: str = "") -> None:
        self._plan.begin(stage)
        if self._bar is None:
            self.say(f"{stage}{more}; {self._plan.left_text()}")
            return
        self._bar.update(self._task, description=stage, completed=self._plan.num_done)
        if more:
            self.say(f"{stage}{more}")

    def say(self, text: str) -> None:
        if self._bar is None:
            print(text, flush=True)
        else:
            self._bar.console.print(text, markup=False, highlight=False)
