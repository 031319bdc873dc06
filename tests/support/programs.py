"""Orders in which a rank may issue its sends and hooks, and the interpreter that runs them.

A step is (what, operation): `d` dispatch send, `h` its hook, `c` combine send, `hc` its hook; `x`
dispatch and receive in one call, `xc` the same for combine.
Operations are numbered from 0; operation i works on variant i of the scenario.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field

import torch

from ep_backend import DispatchResult, LowLatencyBuffer, RecvHook
from tests.support.scenario import Scenario, check_combined, check_received, run_experts

Step = tuple[str, int]


def plain_loop(num_ops: int, num_banks: int) -> Iterator[Step]:
    for i in range(num_ops):
        yield from (("d", i), ("h", i), ("c", i), ("hc", i))


def dispatch_only(num_ops: int, num_banks: int) -> Iterator[Step]:
    for i in range(num_ops):
        yield from (("d", i), ("h", i))


def steady(num_ops: int, num_banks: int) -> Iterator[Step]:
    """`num_banks` dispatches outstanding all the time: only credit keeps a fast rank from writing
    into a bank that a slow one has not read."""
    for i in range(num_ops + num_banks):
        if i >= num_banks:
            yield "h", i - num_banks
        if i < num_ops:
            yield "d", i


def three_combines(num_ops: int, num_banks: int) -> Iterator[Step]:
    """(d h) x (B + 1), then one combine more than there are banks, its send as early as possible:
    what combine credit is for."""
    group = num_banks + 1
    for first in range(0, num_ops - group + 1, group):
        ops = range(first, first + group)
        for i in ops:
            yield from (("d", i), ("h", i))
        yield from (("c", i) for i in ops[:-1])
        yield "hc", first
        yield "c", ops[-1]
        yield from (("hc", i) for i in ops[1:])


def two_micro_batches(num_ops: int, num_banks: int) -> Iterator[Step]:
    for a in range(0, num_ops - 1, 2):
        b = a + 1
        yield from (("d", a), ("d", b), ("h", a), ("c", a), ("h", b), ("c", b))
        yield from (("hc", a), ("hc", b))


def late_hooks(num_ops: int, num_banks: int) -> Iterator[Step]:
    """All banks are filled before a hook runs."""
    for first in range(0, num_ops - num_banks + 1, num_banks):
        for what in ("d", "h", "c", "hc"):
            yield from ((what, i) for i in range(first, first + num_banks))


def fused_loop(num_ops: int, num_banks: int) -> Iterator[Step]:
    for i in range(num_ops):
        yield from (("x", i), ("xc", i))


Program = Callable[[int, int], Iterator[Step]]
STEPWISE_PROGRAMS: dict[str, Program] = {
    f.__name__: f
    for f in (plain_loop, dispatch_only, steady, three_combines, two_micro_batches, late_hooks)
}
"""Those that one thread can run for all ranks by turns: no step waits for a later one of a peer."""
PROGRAMS = STEPWISE_PROGRAMS | {fused_loop.__name__: fused_loop}


@dataclass
class Delays:
    """Sleeps before random steps on random ranks, so that ranks drift apart."""

    seed: int
    chance: float = 0.02
    max_secs: float = 0.003

    def of_rank(self, rank: int) -> Callable[[], None]:
        rng = random.Random(f"{self.seed} {rank}")

        def maybe_sleep() -> None:
            if rng.random() < self.chance:
                time.sleep(rng.random() * self.max_secs)

        return maybe_sleep


@dataclass
class Interpreter:
    """Runs steps on one rank's buffer and checks every byte that comes out."""

    buffer: LowLatencyBuffer
    scenario: Scenario
    dispatched: dict[int, tuple[DispatchResult, RecvHook | None]] = field(default_factory=dict)
    expert_out: dict[int, torch.Tensor] = field(default_factory=dict)
    combined: dict[int, tuple[torch.Tensor, RecvHook]] = field(default_factory=dict)

    def run(self, steps: Iterable[Step], delays: Delays | None = None) -> int:
        """Returns the number of steps.

        Wrong data is raised when the program has ended: a rank that stopped in the middle would
        make its peers wait for their timeout.
        """
        maybe_sleep = delays.of_rank(self.buffer.group.self_rank) if delays else lambda: None
        num_steps = 0
        first_mismatch: AssertionError | None = None
        for step in steps:
            maybe_sleep()
            try:
                self.step(*step)
            except AssertionError as e:
                first_mismatch = first_mismatch or e
            num_steps += 1
        if first_mismatch is not None:
            raise first_mismatch
        return num_steps

    def step(self, what: str, op: int) -> None:
        run = {
            "d": self.send_dispatch,
            "h": self.hook_dispatch,
            "c": self.send_combine,
            "hc": self.hook_combine,
            "x": self.exchange_dispatch,
            "xc": self.exchange_combine,
        }[what]
        run(op)

    def send_dispatch(self, op: int) -> None:
        self.dispatched[op] = self.buffer.dispatch(*self.inputs(op), **self.place(op))

    def hook_dispatch(self, op: int) -> None:
        result, hook = self.dispatched[op]
        assert hook is not None
        hook()
        self.take_received(op, result)

    def exchange_dispatch(self, op: int) -> None:
        result = self.buffer.dispatch_and_receive(*self.inputs(op), **self.place(op))
        self.dispatched[op] = result, None
        self.take_received(op, result)

    def send_combine(self, op: int) -> None:
        result, _ = self.dispatched[op]
        weights = self.combine_weights(op)
        self.combined[op] = self.buffer.combine(
            self.expert_out[op], result.handle, topk_weights=weights
        )
        del self.dispatched[op], self.expert_out[op]  # only now: a step that raised may be repeated

    def hook_combine(self, op: int) -> None:
        out, hook = self.combined[op]
        hook()
        del self.combined[op]
        self.check_combined(op, out)

    def exchange_combine(self, op: int) -> None:
        result, _ = self.dispatched[op]
        weights = self.combine_weights(op)
        out = self.buffer.combine_and_receive(
            self.expert_out[op], result.handle, topk_weights=weights
        )
        del self.dispatched[op], self.expert_out[op]
        self.check_combined(op, out)

    def inputs(self, op: int) -> list[torch.Tensor | None]:
        """Arguments of `dispatch`. Where combine is given the weights, dispatch is given none."""
        inputs = self.scenario.variant(op).inputs(self.buffer.group.self_rank)
        x, topk_idx, weights, *x_scales = (t.to(self.buffer.device) for t in inputs)
        is_needed = self.buffer.reduction == "rank"
        return [x, topk_idx, weights if is_needed else None, *x_scales]

    def combine_weights(self, op: int) -> torch.Tensor | None:
        """Argument of `combine`."""
        if self.buffer.reduction == "rank":
            return None
        weights = self.scenario.variant(op).topk_weights[self.buffer.group.self_rank]
        return weights.to(self.buffer.device)

    def take_received(self, op: int, result: DispatchResult) -> None:
        shape, rank = self.scenario.shape, self.buffer.group.self_rank
        # At once: the bank of recv_x is overwritten num_banks dispatches later.
        self.expert_out[op] = self.in_place(op, run_experts(result, shape, rank))
        try:
            check_received(result, self.scenario.variant(op), shape, rank)
        except AssertionError as e:
            raise AssertionError(f"operation {op}: {e}") from None

    def in_place(self, op: int, expert_out: torch.Tensor) -> torch.Tensor:
        """Moved to where peers read it, if the buffer has workspaces."""
        if self.buffer.num_workspaces == 0:
            return expert_out
        return self.buffer.combine_input(**self.place(op)).copy_(expert_out)

    def place(self, op: int) -> dict[str, int]:
        """Arguments of `dispatch`: a workspace for each operation that may not have been combined
        yet, with as many slots as there may be tokens, or as there are."""
        if self.buffer.num_workspaces == 0:
            return {}
        most = max(len(x) for x in self.scenario.variant(op).x)
        num_slots = max(1, most) if op % 3 == 1 else self.buffer.num_max_tokens_per_rank
        return {"workspace": op % self.buffer.num_workspaces, "num_slots": num_slots}

    def check_combined(self, op: int, out: torch.Tensor) -> None:
        try:
            check_combined(out, self.scenario.variant(op), self.buffer.group.self_rank)
        except AssertionError as e:
            raise AssertionError(f"operation {op}: {e}") from None
