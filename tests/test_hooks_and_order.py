"""Receive hooks: in which order they may be called, from where, and how often."""

from __future__ import annotations

import ctypes
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any

import pytest
import torch

from ep_backend import (
    EPBackendError,
    Group,
    LowLatencyBuffer,
    OrderError,
    _native,
    virtual_world,
)
from ep_backend.order import PhaseOrder
from tests.support.processes import Rank, RankProcesses
from tests.support.programs import PROGRAMS, Interpreter
from tests.support.scenario import Scenario, check_received, mixed_scenario, same_bits
from tests.support.shapes import Shape


@pytest.fixture(params=[2, 3], ids=lambda n: f"B{n}")
def scenario(request: pytest.FixtureRequest) -> Scenario:
    return mixed_scenario(Shape(2, num_banks=request.param), seed=6)


@pytest.fixture
def ranks(scenario: Scenario) -> list[Interpreter]:
    """Both ranks, driven by this thread."""
    return [Interpreter(b, scenario) for b in scenario.shape.virtual_buffers(timeout_secs=5.0)]


def step_all(ranks: list[Interpreter], what: str, op: int) -> None:
    for rank in ranks:
        rank.step(what, op)


def still_works(ranks: list[Interpreter], op: int) -> None:
    """The refused call had no effect: the next operation is right on every rank."""
    for what in ("d", "h", "c", "hc"):
        step_all(ranks, what, op)


def test_a_hook_called_twice_is_refused_by_name(ranks: list[Interpreter]) -> None:
    step_all(ranks, "d", 0)
    step_all(ranks, "h", 0)
    with pytest.raises(OrderError, match="hook of dispatch 1 was called twice"):
        ranks[0].dispatched[0][1]()
    step_all(ranks, "c", 0)
    hook = ranks[0].combined[0][1]
    step_all(ranks, "hc", 0)
    with pytest.raises(OrderError, match="hook of combine 1 was called twice"):
        hook()
    still_works(ranks, 1)


def test_hooks_out_of_order_are_refused_and_may_be_called_in_order_then(
    ranks: list[Interpreter],
) -> None:
    step_all(ranks, "d", 0)
    step_all(ranks, "d", 1)
    with pytest.raises(OrderError, match="dispatch 2 was called before the hook of dispatch 1"):
        ranks[0].step("h", 1)
    for op in range(2):
        step_all(ranks, "h", op)
        step_all(ranks, "c", op)
    with pytest.raises(OrderError, match="combine 2 was called before the hook of combine 1"):
        ranks[1].combined[1][1]()
    step_all(ranks, "hc", 0)
    step_all(ranks, "hc", 1)
    still_works(ranks, 2)


def test_a_send_over_a_bank_whose_hook_never_ran_is_refused(
    ranks: list[Interpreter], scenario: Scenario
) -> None:
    num_banks = scenario.shape.num_banks
    for op in range(num_banks):
        step_all(ranks, "d", op)
    message = f"dispatch {num_banks + 1} needs the bank of dispatch 1, .*num_banks = {num_banks}"
    with pytest.raises(OrderError, match=message):
        ranks[0].step("d", num_banks)
    step_all(ranks, "h", 0)
    step_all(ranks, "d", num_banks)  # now it may
    for op in range(1, num_banks + 1):
        step_all(ranks, "h", op)

    for op in range(num_banks):
        step_all(ranks, "c", op)
    message = f"combine {num_banks + 1} needs the bank of combine 1"
    with pytest.raises(OrderError, match=message):
        ranks[0].step("c", num_banks)


def test_combine_before_its_dispatch_hook_is_refused(ranks: list[Interpreter]) -> None:
    step_all(ranks, "d", 0)
    result, _ = ranks[0].dispatched[0]
    with pytest.raises(OrderError, match="handle of dispatch 1, whose hook has not been called"):
        ranks[0].buffer.combine(torch.zeros_like(result.recv_x), result.handle)
    for what in ("h", "c", "hc"):
        step_all(ranks, what, 0)


def test_a_handle_of_another_buffer_is_refused(
    ranks: list[Interpreter], scenario: Scenario
) -> None:
    others = [Interpreter(b, scenario) for b in scenario.shape.virtual_buffers(5.0)]
    for world in (ranks, others):
        step_all(world, "d", 0)
        step_all(world, "h", 0)
    with pytest.raises(ValueError, match="handle is of another buffer"):
        ranks[0].buffer.combine(others[0].expert_out[0], others[0].dispatched[0][0].handle)
    for world in (ranks, others):
        step_all(world, "c", 0)
        step_all(world, "hc", 0)


def test_both_halves_at_once_are_refused_while_a_hook_is_outstanding(
    ranks: list[Interpreter],
) -> None:
    """Nothing is sent: the outstanding operations go on."""
    step_all(ranks, "d", 0)
    with pytest.raises(OrderError, match="dispatch_and_receive was called while dispatch 1 waits"):
        ranks[0].exchange_dispatch(1)
    for what in ("h", "c"):
        step_all(ranks, what, 0)
    step_all(ranks, "d", 1)
    step_all(ranks, "h", 1)
    with pytest.raises(OrderError, match="combine_and_receive was called while combine 1 waits"):
        ranks[0].exchange_combine(1)
    step_all(ranks, "hc", 0)
    for what in ("c", "hc"):
        step_all(ranks, what, 1)
    still_works(ranks, 2)


def test_both_halves_at_once_may_be_mixed_with_halves(scenario: Scenario) -> None:
    """One rank sends and receives at once, the other in two calls; then the other way round."""

    def rank_main(group: Group) -> None:
        with scenario.shape.buffer(group) as buffer:
            rank = Interpreter(buffer, scenario)
            for op in range(10):
                at_once = (op + group.self_rank) % 2 == 0
                for what in ("x", "xc") if at_once else ("d", "h", "c", "hc"):
                    rank.step(what, op)

    virtual_world(2).run(rank_main)


def test_kernels_that_do_both_halves_get_the_arguments_of_both(scenario: Scenario) -> None:
    """As on CUDA: here two calls of the CPU's kernels stand for one."""

    def rank_main(group: Group) -> None:
        with scenario.shape.buffer(group) as buffer:
            kernels: Any = buffer._kernels
            num_done = 0

            def run(send: Callable, recv: Callable, num_sent: int, *args: Any) -> _native.OpResult:
                nonlocal num_done
                num_done += 1
                sent = send(*args[:num_sent])
                return recv(*args[num_sent:]) if sent.ok else sent

            kernels.dispatch = partial(run, kernels.dispatch_send, kernels.dispatch_recv, 11)
            kernels.combine = partial(run, kernels.combine_send, kernels.combine_recv, 6)
            Interpreter(buffer, scenario).run(PROGRAMS["fused_loop"](10, buffer.num_banks))
            assert num_done == 20

    virtual_world(2).run(rank_main)


class TestExchange:
    """`PhaseOrder.exchange`, which CUDA's fused kernels run under."""

    def test_it_counts_as_a_send_and_its_hook(self) -> None:
        order = PhaseOrder("dispatch", num_banks=2)
        assert [order.exchange(lambda epoch: epoch) for _ in range(3)] == [1, 2, 3]
        assert order.send(lambda epoch: epoch) == 4
        order.hook(4, lambda: None)

    def test_it_has_not_happened_if_it_raises(self) -> None:
        order = PhaseOrder("dispatch", num_banks=2)
        with pytest.raises(ZeroDivisionError):
            order.exchange(lambda epoch: 1 // 0)
        assert order.exchange(lambda epoch: epoch) == 1

    def test_it_waits_for_no_hook(self) -> None:
        order = PhaseOrder("combine", num_banks=2)
        order.send(lambda _: None)
        with pytest.raises(OrderError, match="combine_and_receive was called while combine 1"):
            order.exchange(lambda epoch: epoch)
        order.hook(1, lambda: None)
        assert order.exchange(lambda epoch: epoch) == 2

    @pytest.mark.parametrize("half", ["send", "hook"])
    def test_it_does_not_run_beside_a_send_or_a_hook(self, half: str) -> None:
        order = PhaseOrder("dispatch", num_banks=2)

        def exchange_within() -> None:
            with pytest.raises(OrderError, match=f"a dispatch {half} is running"):
                order.exchange(lambda epoch: epoch)

        order.send((lambda _: exchange_within()) if half == "send" else lambda _: None)
        order.hook(1, exchange_within if half == "hook" else lambda: None)


def test_a_handle_serves_two_combines(ranks: list[Interpreter], scenario: Scenario) -> None:
    """Also after num_banks later dispatches: it owns its memory."""
    step_all(ranks, "d", 0)
    step_all(ranks, "h", 0)
    kept = [(r.dispatched[0][0].handle, r.expert_out[0]) for r in ranks]
    for what in ("c", "hc"):
        step_all(ranks, what, 0)
    for op in range(1, scenario.shape.num_banks + 2):
        still_works(ranks, op)
    for rank, (handle, expert_out) in zip(ranks, kept, strict=True):
        rank.combined[0] = rank.buffer.combine(expert_out, handle)
    step_all(ranks, "hc", 0)  # compares with the reference


@pytest.mark.parametrize("num_banks", [2, 3])
def test_received_rows_stay_until_the_bank_comes_round_again(num_banks: int) -> None:
    shape = Shape(2, num_banks=num_banks)
    scenario = Scenario(shape)
    for op in range(num_banks + 1):
        scenario.add("uniform", [6, 6], seed=op)
    ranks = [Interpreter(b, scenario) for b in shape.virtual_buffers()]
    step_all(ranks, "d", 0)
    step_all(ranks, "h", 0)
    first = ranks[0].dispatched[0][0]
    for op in range(1, num_banks):
        step_all(ranks, "d", op)
        step_all(ranks, "h", op)
        assert ranks[0].dispatched[op][0].recv_x.data_ptr() != first.recv_x.data_ptr()
    step_all(ranks, "d", num_banks)  # a send alone does not touch it
    check_received(first, scenario.variants[0], shape, 0)
    step_all(ranks, "h", num_banks)
    with pytest.raises(AssertionError, match="row"):
        check_received(first, scenario.variants[0], shape, 0)


def test_the_result_of_combine_belongs_to_the_caller(
    ranks: list[Interpreter], scenario: Scenario
) -> None:
    for what in ("d", "h", "c"):
        step_all(ranks, what, 0)
    out = ranks[0].combined[0][0]
    step_all(ranks, "hc", 0)
    for op in range(1, 2 * scenario.shape.num_banks + 1):
        still_works(ranks, op)
    assert same_bits(out, scenario.variants[0].combined[0])


def test_a_hook_may_run_in_another_thread_while_this_one_sends(ranks: list[Interpreter]) -> None:
    ranks[0].step("d", 0)
    with ThreadPoolExecutor(1) as pool:
        hook = pool.submit(ranks[0].step, "h", 0)  # waits: rank 1 has sent nothing
        ranks[0].step("d", 1)
        assert not hook.done()
        ranks[1].step("d", 0)
        hook.result(timeout=5)
    ranks[1].step("d", 1)
    ranks[1].step("h", 0)
    step_all(ranks, "h", 1)


def test_a_hook_while_another_thread_runs_one_is_refused_not_queued(
    ranks: list[Interpreter],
) -> None:
    ranks[0].step("d", 0)
    ranks[0].step("d", 1)
    with ThreadPoolExecutor(1) as pool:
        running = pool.submit(ranks[0].step, "h", 0)
        while not ranks[0].buffer._dispatches._hook_lock.locked():
            time.sleep(0.001)
        for op in (0, 1):
            with pytest.raises(OrderError, match="a dispatch hook is running in another thread"):
                ranks[0].dispatched[op][1]()
        assert not running.done()
        ranks[1].step("d", 0)
        running.result(timeout=5)
    ranks[1].step("d", 1)
    ranks[1].step("h", 0)
    step_all(ranks, "h", 1)


def test_a_send_while_another_thread_waits_in_one_is_refused(
    ranks: list[Interpreter], scenario: Scenario
) -> None:
    num_banks = scenario.shape.num_banks
    for op in range(num_banks):
        step_all(ranks, "d", op)
    ranks[0].step("h", 0)
    with ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(ranks[0].step, "d", num_banks)  # for rank 1's credit
        while not ranks[0].buffer._dispatches._send_lock.locked():
            time.sleep(0.001)
        with pytest.raises(OrderError, match="a dispatch send is running in another thread"):
            ranks[0].step("d", num_banks)
        ranks[1].step("h", 0)
        waiting.result(timeout=5)


def test_a_closed_buffer_refuses_everything_and_keeps_its_results(
    ranks: list[Interpreter], scenario: Scenario
) -> None:
    step_all(ranks, "d", 0)
    step_all(ranks, "h", 0)
    step_all(ranks, "d", 1)
    result, _ = ranks[0].dispatched[0]
    buffer: LowLatencyBuffer = ranks[0].buffer
    buffer.close()
    buffer.close()
    for refused in (
        lambda: ranks[0].send_dispatch(2),
        ranks[0].dispatched[1][1],
        lambda: buffer.combine(ranks[0].expert_out[0], result.handle),
    ):
        with pytest.raises(EPBackendError, match="closed buffer"):
            refused()
    check_received(result, scenario.variants[0], scenario.shape, 0)
    ranks[1].step("h", 1)  # the peer keeps its own mapping


def test_a_buffer_is_a_context_manager(scenario: Scenario) -> None:
    buffers = scenario.shape.virtual_buffers()
    with buffers[0] as buffer:
        assert buffer is buffers[0]
    with pytest.raises(EPBackendError, match="closed buffer"):
        Interpreter(buffer, scenario).step("d", 0)


def test_the_kernels_refuse_by_themselves_what_python_would_have_refused() -> None:
    """A captured replay runs no Python."""
    shape = Shape(1)
    memory = bytearray(shape.layout().num_bytes + 128)
    base = ctypes.addressof(ctypes.c_char.from_buffer(memory))
    rank = _native.LowLatencyRank(
        shape.config(), 0, [(base + 127) // 128 * 128], timeout_ns=10**9, spin_ns=0
    )
    slots = shape.num_max_tokens_per_rank
    scratch = [torch.zeros(n, dtype=torch.int32) for n in (8, 1, slots * 4, slots * 3 * 2)]
    recv_x = torch.empty(8, slots, shape.hidden, dtype=shape.dtype)
    counts, *handle = [t.data_ptr() for t in scratch]
    received = (
        _native.OutputLayout.EXPERT_MAJOR,
        recv_x.data_ptr(),
        0,
        counts,
        0,
        0,
        *handle,
        -1,
        0,
    )

    def send_nothing() -> _native.OpResult:
        return rank.dispatch_send(0, False, 0, 0, True, 0, 0, 0, 0, -1, 0)

    out_of_order = _native.Status.OUT_OF_ORDER
    assert rank.dispatch_recv(*received).status == out_of_order
    assert rank.combine_recv(0, 0, 0, 0, 0, -1, 0).status == out_of_order
    for _ in range(shape.num_banks):
        assert send_nothing().status == _native.Status.OK
    refused = send_nothing()
    assert refused.status == out_of_order
    assert refused.record.epoch == shape.num_banks + 1
    assert rank.dispatch_recv(*received).status == _native.Status.OK
    assert send_nothing().status == _native.Status.OK


def wait_where_told(rank: Rank, scenario: Scenario, step: str) -> None:
    """Rank 0 comes to `step` and waits there, because rank 1 waits for the test's word."""
    with scenario.shape.buffer(rank.group, timeout_secs=30.0) as buffer:
        me = Interpreter(buffer, scenario)
        program = [("d", 0), ("h", 0), ("c", 0), ("hc", 0), ("d", 1), ("d", 2), ("h", 1), ("d", 3)]
        program += [("h", 2), ("h", 3)]
        blocked = {"h": ("h", 1), "hc": ("hc", 0), "d": ("d", 3)}[step]
        # Rank 1 stops before what rank 0 waits for.
        withheld = {"h": ("d", 1), "hc": ("c", 0), "d": ("h", 1)}[step]
        for next_step in program:
            if rank.group.self_rank == 1 and next_step == withheld:
                rank.ask()
            if rank.group.self_rank == 0 and next_step == blocked:
                try:
                    rank.tell("about to wait")
                    me.step(*next_step)
                    raise AssertionError("did not wait")
                except KeyboardInterrupt:
                    rank.tell("interrupted")
                rank.ask()
            me.step(*next_step)


@pytest.mark.parametrize("step", ["h", "hc", "d"], ids=["dispatch_hook", "combine_hook", "send"])
def test_ctrl_c_ends_a_wait_and_the_call_succeeds_later(step: str) -> None:
    scenario = mixed_scenario(Shape(2), seed=13)
    with RankProcesses(2) as ranks:
        ranks.start(wait_where_told, scenario, step)
        assert ranks.next_from(0) == "about to wait"
        time.sleep(0.3)
        begin = time.monotonic()
        ranks.interrupt(0)
        assert ranks.next_from(0) == "interrupted"
        assert time.monotonic() - begin < 1.0
        ranks.tell(1, "go on")
        ranks.tell(0, "call it again")
        for rank, answer in enumerate(ranks.answers()):
            assert answer.error_type is None, f"rank {rank}: {answer.details}"


def test_python_threads_run_while_a_hook_waits(ranks: list[Interpreter]) -> None:
    """The wait holds no GIL: this thread counts while the other sleeps in the kernel."""
    ranks[0].step("d", 0)
    thread = threading.Thread(target=ranks[0].step, args=("h", 0))
    thread.start()
    end = time.monotonic() + 0.3
    num_turns = 0
    while time.monotonic() < end:
        num_turns += 1
    assert thread.is_alive()
    assert num_turns > 1000
    ranks[1].step("d", 0)
    thread.join(5)
    assert not thread.is_alive()
