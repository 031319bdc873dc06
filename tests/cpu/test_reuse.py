"""Banks used again and again, by ranks and threads that drift apart. Every byte of every operation
is checked; batch sizes and routings change from one operation to the next.
"""

from __future__ import annotations

import time
from concurrent.futures import ThreadPoolExecutor
from queue import SimpleQueue

import pytest
import torch

from ep_backend import Group, virtual_world
from tests.support.programs import PROGRAMS, Delays, Interpreter
from tests.support.scenario import Scenario, mixed_scenario
from tests.support.shapes import Shape


def run(scenario: Scenario, program: str, num_ops: int, delays: Delays | None = None) -> None:
    def rank_main(group: Group) -> None:
        with scenario.shape.buffer(group) as buffer:
            steps = PROGRAMS[program](num_ops, buffer.num_banks)
            Interpreter(buffer, scenario).run(steps, delays)
            assert buffer.counters()["dispatch_recv"].num_ops == num_ops

    virtual_world(scenario.shape.num_ranks).run(rank_main)


@pytest.mark.parametrize("program", PROGRAMS)
def test_three_thousand_operations_without_one_stale_byte(program: str) -> None:
    run(mixed_scenario(Shape(2), seed=1), program, 3000)


@pytest.mark.parametrize("num_banks", [2, 3, 4])
@pytest.mark.parametrize("program", ["steady", "three_combines", "two_micro_batches"])
def test_ranks_that_drift_apart(program: str, num_banks: int) -> None:
    shape = Shape(3, num_banks=num_banks, dtype=torch.float32)
    run(mixed_scenario(shape, seed=num_banks), program, 600, Delays(seed=num_banks))


def test_more_ranks_than_cores() -> None:
    run(mixed_scenario(Shape(9, num_experts=5), seed=9), "steady", 300)


@pytest.mark.parametrize("num_banks", [2, 3])
def test_sends_and_hooks_on_two_threads_of_each_rank(num_banks: int) -> None:
    """The sender runs ahead as far as the order rules allow; hooks follow in the other thread."""
    shape = Shape(3, num_banks=num_banks)
    scenario = mixed_scenario(shape, seed=11)
    num_ops = 600

    def rank_main(group: Group) -> None:
        with shape.buffer(group) as buffer:
            interpreter = Interpreter(buffer, scenario)
            maybe_sleep = Delays(seed=11, max_secs=0.001).of_rank(group.self_rank)
            sent: SimpleQueue[int | None] = SimpleQueue()
            banks: SimpleQueue[None] = SimpleQueue()  # one entry a bank with no send outstanding
            for _ in range(num_banks):
                banks.put(None)

            def run_hooks() -> None:
                while (op := sent.get(timeout=30)) is not None:
                    interpreter.hook_dispatch(op)
                    banks.put(None)
                    maybe_sleep()

            with ThreadPoolExecutor(1) as pool:
                hooks = pool.submit(run_hooks)
                for op in range(num_ops):
                    if hooks.done():
                        break  # it has failed; result() says how
                    banks.get(timeout=30)
                    interpreter.send_dispatch(op)
                    sent.put(op)
                sent.put(None)
                hooks.result()

    virtual_world(shape.num_ranks).run(rank_main)


def test_dispatch_and_combine_run_in_different_threads_of_a_rank() -> None:
    shape = Shape(2, num_banks=2)
    scenario = mixed_scenario(shape, seed=12)
    num_ops = 600

    def rank_main(group: Group) -> None:
        with shape.buffer(group) as buffer:
            interpreter = Interpreter(buffer, scenario)
            received: SimpleQueue[int | None] = SimpleQueue()

            def run_combines() -> None:
                while (op := received.get(timeout=30)) is not None:
                    interpreter.send_combine(op)
                    interpreter.hook_combine(op)

            with ThreadPoolExecutor(1) as pool:
                combines = pool.submit(run_combines)
                for op in range(num_ops):
                    interpreter.send_dispatch(op)
                    interpreter.hook_dispatch(op)
                    received.put(op)
                received.put(None)
                combines.result()

    virtual_world(shape.num_ranks).run(rank_main)


def test_a_sleeping_waiter_is_woken() -> None:
    """A lost wake-up would cost a sleep slice of 0.1 s each time; the bound is half of that."""
    shape = Shape(2)
    num_ops = 100

    def rank_main(group: Group) -> float:
        x = torch.empty(0, shape.hidden, dtype=shape.dtype)
        idx, weights = torch.empty(0, shape.top_k, dtype=torch.int64), torch.empty(0, shape.top_k)
        with shape.buffer(group, spin_us=0) as buffer:
            begin = time.monotonic()
            for op in range(num_ops):
                if op % 2 == group.self_rank:
                    time.sleep(0.002)  # the other rank is asleep by now
                _, hook = buffer.dispatch(x, idx, weights)
                hook()
            return time.monotonic() - begin

    assert max(virtual_world(2).run(rank_main)) < num_ops * 0.05
