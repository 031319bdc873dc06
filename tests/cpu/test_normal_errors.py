"""What goes wrong with a normal buffer: arguments, settings, silent peers, damaged memory. Every
error says what to change, and nobody waits without bound."""

from __future__ import annotations

import ctypes
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch

from ep_backend import (
    EPBackendError,
    Group,
    NormalBuffer,
    NormalDispatchResult,
    OrderError,
    PeerTimeout,
    ProtocolError,
    SettingsMismatch,
    _native,
    virtual_world,
)
from tests.support.normal import NormalCase, NormalShape, make_case
from tests.support.processes import Answer, Rank, RankProcesses

SHAPE = NormalShape(2, hidden=6, num_experts=5, top_k=3, num_tokens_per_round=2)


def on_threads(
    rank_main: Callable[[NormalBuffer], Any], shape: NormalShape = SHAPE, timeout_secs: float = 5.0
) -> list[Answer]:
    """What `rank_main(buffer)` comes to on every rank; no rank's failure ends another."""

    def guarded(group: Group) -> Answer:
        buffer = shape.buffer(group, timeout_secs)
        try:
            return Answer(value=rank_main(buffer))
        except Exception as e:
            return Answer.of_error(e)

    return virtual_world(shape.num_ranks).run(guarded)


# --- arguments -------------------------------------------------------------------------------


@dataclass(frozen=True)
class BadDispatch:
    """Arguments of a good dispatch of 4 tokens, one of them replaced."""

    id: str
    argument: str
    replace: Callable[[Any], Any]
    message: str


def with_expert(token: int, k: int, expert: int) -> Callable[[torch.Tensor], torch.Tensor]:
    def replace(idx: torch.Tensor) -> torch.Tensor:
        idx = idx.clone()
        idx[token, k] = expert
        return idx

    return replace


BAD_DISPATCHES = [
    BadDispatch("hidden", "x", lambda x: x[:, :5].contiguous(), r"x has shape \[4, 5\].*, 6\]"),
    BadDispatch("x_dtype", "x", lambda x: x.float(), "float32, expected torch.bfloat16"),
    BadDispatch("x_strides", "x", lambda x: x.t().contiguous().t(), r"x\.contiguous\(\)"),
    BadDispatch("x_device", "x", lambda x: x.to("meta"), "x is on meta, expected cpu"),
    BadDispatch("scales", "x_scales", lambda _: torch.ones(4, 1), "but this buffer sends torch.bf"),
    BadDispatch("idx_shape", "topk_idx", lambda i: i[:3], r"\[3, 3\], expected \[4, 3\]"),
    BadDispatch("idx_dtype", "topk_idx", lambda i: i.short(), "topk_idx has dtype torch.int16"),
    BadDispatch("idx_missing", "topk_idx", lambda _: None, "topk_idx was not given. Pass topk_idx"),
    BadDispatch("weights_dtype", "topk_weights", lambda w: w.double(), "dtype torch.float64"),
    BadDispatch("weights_missing", "topk_weights", lambda _: None, "topk_weights was not given"),
    BadDispatch("alignment", "expert_alignment", lambda _: 0, "expert_alignment is 0, expected"),
    BadDispatch("worst", "num_worst_tokens", lambda _: -1, "num_worst_tokens is -1, expected"),
    BadDispatch(
        "expert_5_of_5",
        "topk_idx",
        with_expert(2, 1, 5),
        r"topk_idx\[2, 1\] is 5, expected -1 .*0\.\.4.*Nothing was sent",
    ),
    BadDispatch("expert_minus_2", "topk_idx", with_expert(3, 0, -2), r"topk_idx\[3, 0\] is -2"),
    BadDispatch("expert_2_pow_32", "topk_idx", with_expert(0, 2, 1 << 32), "is 4294967296"),
]


@pytest.mark.parametrize("bad", BAD_DISPATCHES, ids=lambda bad: bad.id)
def test_a_bad_dispatch_names_the_argument_and_sends_nothing(bad: BadDispatch) -> None:
    case = make_case(SHAPE, "uniform", [4, 4], seed=1)

    def rank_main(buffer: NormalBuffer) -> None:
        rank = buffer.group.self_rank
        x, topk_idx, topk_weights = case.inputs(rank)
        good = dict(x=x, topk_idx=topk_idx, topk_weights=topk_weights, x_scales=None)
        good |= dict(num_worst_tokens=0, expert_alignment=1)
        for _ in range(2):
            if rank == 1:
                with pytest.raises(ValueError, match=bad.message):
                    buffer.dispatch(**good | {bad.argument: bad.replace(good[bad.argument])})
            case.run(buffer)  # as if nothing had happened

    for answer in on_threads(rank_main):
        assert answer.error_type is None, answer.details


def test_a_cached_dispatch_or_a_combine_that_does_not_fit_its_handle_is_refused() -> None:
    case = make_case(SHAPE, "uniform", [4, 4], seed=1)

    def rank_main(buffer: NormalBuffer) -> None:
        x, topk_idx, topk_weights = case.inputs(buffer.group.self_rank)
        result = buffer.dispatch(x, topk_idx, topk_weights)
        handle, recv_x = result.handle, result.recv_x
        with pytest.raises(ValueError, match="together with a handle, whose routing"):
            buffer.dispatch(x, topk_idx, handle=handle)
        with pytest.raises(ValueError, match="num_worst_tokens is 9, but the handle's dispatch"):
            buffer.dispatch(x, handle=handle, num_worst_tokens=9)
        with pytest.raises(ValueError, match="x has 3 tokens, but the handle's dispatch had 4"):
            buffer.dispatch(x[:3], handle=handle)
        with pytest.raises(ValueError, match=r"x has shape .*It has a row for each row of recv_x"):
            buffer.combine(recv_x[1:], handle)
        with pytest.raises(ValueError, match=r"x has dtype torch\.float32"):
            buffer.combine(recv_x.float(), handle)
        with pytest.raises(ValueError, match=r"out has shape \[3, 6\], expected \[4, 6\]"):
            buffer.combine(recv_x, handle, out=torch.empty(3, 6).bfloat16())
        weights = result.recv_topk_weights
        with pytest.raises(
            ValueError, match=r"topk_weights has shape \[\d+, 2\], expected .*, 3\]"
        ):
            buffer.combine(recv_x, handle, topk_weights=weights[:, :2].contiguous())
        with pytest.raises(ValueError, match=r"topk_weights has dtype torch\.float64"):
            buffer.combine(recv_x, handle, topk_weights=weights.double())
        with pytest.raises(ValueError, match=r"bias has shape \[3, 6\], expected \[4, 6\]"):
            buffer.combine(recv_x, handle, bias=(x, x[:3]))
        with pytest.raises(ValueError, match="bias has 3 tensors, expected one, or a pair"):
            buffer.combine(recv_x, handle, bias=(x, x, x))
        handle.buffer = None  # type: ignore[assignment]
        with pytest.raises(ValueError, match="the handle comes from another buffer"):
            buffer.combine(recv_x, handle)
        case.run(buffer)

    for answer in on_threads(rank_main):
        assert answer.error_type is None, answer.details


def test_float8_rows_need_their_scales_and_a_buffer_that_sends_float8() -> None:
    shape = replace(SHAPE, dispatch_dtype=torch.float8_e4m3fn)
    case = make_case(shape, "uniform", [4, 4], seed=1, is_quantized=True)

    def rank_main(buffer: NormalBuffer) -> None:
        x, topk_idx, topk_weights, scales = case.inputs(buffer.group.self_rank)
        with pytest.raises(ValueError, match="float8_e4m3fn, but x_scales was not given"):
            buffer.dispatch(x, topk_idx, topk_weights)
        with pytest.raises(ValueError, match="which the buffer quantises itself"):
            buffer.dispatch(x.bfloat16(), topk_idx, topk_weights, scales)
        with pytest.raises(ValueError, match=r"x_scales has shape \[4, 2\], expected \[4, 1\]"):
            buffer.dispatch(x, topk_idx, topk_weights, scales.expand(4, 2).contiguous())
        case.run(buffer)

    for answer in on_threads(rank_main, shape):
        assert answer.error_type is None, answer.details


def test_weights_that_only_some_ranks_send_home_are_noticed() -> None:
    case = make_case(SHAPE, "uniform", [4, 4], seed=1)

    def rank_main(buffer: NormalBuffer) -> None:
        result = buffer.dispatch(*case.inputs(buffer.group.self_rank))
        weights = result.recv_topk_weights if buffer.group.self_rank == 1 else None
        buffer.combine(result.recv_x, result.handle, topk_weights=weights)

    for answer in on_threads(rank_main):
        assert answer.error_type == ProtocolError.__name__, answer.details
        assert "The ranks have issued different operations" in answer.error


def test_more_rows_than_worst_tokens_fail_the_buffer_and_name_both_numbers() -> None:
    case = make_case(SHAPE, "one_hot_expert", [4, 3], seed=1)  # all 7 go to rank 1

    def rank_main(buffer: NormalBuffer) -> None:
        num_worst_tokens = 6 if buffer.group.self_rank == 1 else 7
        try:
            buffer.dispatch(*case.inputs(buffer.group.self_rank), num_worst_tokens=num_worst_tokens)
        finally:
            with pytest.raises((ValueError, PeerTimeout)):
                case.run(buffer)

    peer, failed = on_threads(rank_main, timeout_secs=0.5)
    assert failed.error_type == "ValueError"
    assert "num_worst_tokens is 6, but rank 1 receives 7 rows" in failed.error
    assert peer.error_type == "PeerTimeout"
    assert peer.record is not None
    assert peer.record["peer_rank"] == 1


# --- settings --------------------------------------------------------------------------------

GOOD_SETTINGS: dict[str, Any] = dict(
    hidden=6, num_experts=5, top_k=3, dtype=torch.bfloat16, num_bytes=1 << 20
)
LEAST = NormalShape(2, 6, 5, 3, num_tokens_per_round=1).layout().num_bytes


def create_on_threads(settings_of_rank: list[dict[str, Any]]) -> list[Answer]:
    def rank_main(group: Group) -> Answer:
        try:
            with NormalBuffer(group, **GOOD_SETTINGS | settings_of_rank[group.self_rank]) as buffer:
                return Answer(value=buffer.num_symmetric_bytes)
        except Exception as e:
            return Answer.of_error(e)

    return virtual_world(len(settings_of_rank), timeout_secs=5.0).run(rank_main)


@pytest.mark.parametrize(
    ("setting", "value", "message"),
    [
        ("num_bytes", LEAST - 1, f"num_bytes is {LEAST - 1}, expected an integer in {LEAST}.."),
        ("num_bytes", 1e6, "num_bytes is 1000000.0, expected an integer"),
        ("num_experts", 0, "num_experts is 0, expected an integer in 1..65536"),
        ("hidden", 0, "hidden is 0, expected"),
        ("top_k", 65, "top_k is 65, expected an integer in 1..64"),
        ("dtype", torch.float16, "dtype is torch.float16, expected torch.float32 or torch.bfloat1"),
        ("dispatch_dtype", torch.float32, "dispatch_dtype is torch.float32, expected torch.bfloat"),
        ("scale_format", "ue8m0", "scale_format is 'ue8m0', but rows of torch.bfloat16 have no"),
        ("scale_format", "fp4", "scale_format is 'fp4', expected 'float32' or 'power_of_two' or"),
        ("device", "meta", "device is 'meta', expected 'cpu' or a CUDA device"),
        ("timeout_secs", 0, "timeout_secs is 0, expected more than 0"),
        (
            "timeout_secs",
            float("inf"),
            "timeout_secs is inf, expected more than 0, at most 1000000",
        ),
        ("spin_us", 1e6, "spin_us is 1000000.0, expected 0 to 100000"),
    ],
)
def test_a_bad_setting_on_one_rank_is_told_to_all(setting: str, value: Any, message: str) -> None:
    other, bad = create_on_threads([{}, {setting: value}])
    assert bad.error_type == "ValueError"
    assert message in bad.error
    assert other.error_type == SettingsMismatch.__name__
    assert "rank 1 refused its settings" in other.error


def test_the_least_budget_that_the_error_names_is_enough() -> None:
    (least,) = {answer.value for answer in create_on_threads([{"num_bytes": LEAST}] * 2)}
    assert least == LEAST


@pytest.mark.parametrize(
    ("setting", "value"),
    [
        ("hidden", 7),
        ("num_experts", 6),
        ("top_k", 2),
        ("dtype", torch.float32),
        ("dispatch_dtype", torch.float8_e4m3fn),
        ("num_bytes", 9e5),
    ],
)
def test_a_differing_setting_is_a_mismatch_on_every_rank(setting: str, value: Any) -> None:
    value = int(value) if setting == "num_bytes" else value
    for answer in create_on_threads([{}, {setting: value}, {}]):
        assert answer.error_type == SettingsMismatch.__name__
        assert f"{setting} differs between ranks" in answer.error


# --- peers -----------------------------------------------------------------------------------


def fail_alone(rank: Rank, case: NormalCase, operation: str, timeout_secs: float) -> None:
    """All ranks run a pair; then all but the last start `operation`, which it never does."""
    buffer = SHAPE_OF_3.buffer(rank.group, timeout_secs)
    handle = case.run(buffer)
    if rank.group.self_rank == 2:
        rank.ask()
    x = case.x[rank.group.self_rank]
    if operation == "combine":
        buffer.combine(torch.zeros((handle.num_rows, 6)).bfloat16(), handle)
    elif operation == "cached":
        buffer.dispatch(x, handle=handle)
    else:
        buffer.dispatch(*case.inputs(rank.group.self_rank))


SHAPE_OF_3 = NormalShape(3, hidden=6, num_experts=5, top_k=3, num_tokens_per_round=2)


@pytest.mark.parametrize("operation", ["dispatch", "cached", "combine"])
def test_a_silent_peer_is_named_within_the_timeout(operation: str) -> None:
    case = make_case(SHAPE_OF_3, "uniform", [4, 9, 6], seed=1)
    with RankProcesses(3) as ranks:
        ranks.start(fail_alone, case, operation, 0.5)
        answers = ranks.answers(ranks=[0, 1], deadline_secs=20)
    for rank, answer in enumerate(answers):
        assert answer.error_type == PeerTimeout.__name__, answer.details
        assert "the data of rank 2 did not come within 0.5 s" in answer.error
        record = answer.record
        assert record is not None
        phase = "combine" if operation == "combine" else "dispatch"
        assert (record["self_rank"], record["peer_rank"]) == (rank, 2)
        assert (record["phase"], record["half"]) == (phase, "recv")
        assert record["seen"] < record["expected"] == record["epoch"]
        assert 0.5 <= record["waited_secs"] < 2.0


def test_a_failed_buffer_stays_failed_and_a_closed_one_closed() -> None:
    case = make_case(SHAPE, "uniform", [4, 4], seed=1)

    def rank_main(buffer: NormalBuffer) -> None:
        if buffer.group.self_rank == 1:
            buffer.close()
            buffer.close()
            with pytest.raises(EPBackendError, match="normal_counts was called on a closed buffer"):
                case.run(buffer)
            return
        with pytest.raises(PeerTimeout) as first:
            case.run(buffer)
        begin = time.monotonic()
        with pytest.raises(PeerTimeout) as second:
            case.run(buffer)
        assert second.value is first.value
        assert time.monotonic() - begin < 0.1

    for answer in on_threads(rank_main, timeout_secs=0.2):
        assert answer.error_type is None, answer.details


def test_two_threads_may_not_use_a_buffer_at_once() -> None:
    case = make_case(SHAPE, "uniform", [4, 4], seed=1)

    def rank_main(buffer: NormalBuffer) -> None:
        if buffer.group.self_rank == 1:
            time.sleep(0.5)
            case.run(buffer)
            return
        first = threading.Thread(target=case.run, args=(buffer,))
        first.start()
        time.sleep(0.2)  # it waits for rank 1
        with pytest.raises(OrderError, match="dispatch was called while another operation"):
            buffer.dispatch(*case.inputs(0))
        first.join()

    for answer in on_threads(rank_main):
        assert answer.error_type is None, answer.details


def wait_for_nobody(rank: Rank, case: NormalCase) -> str:
    buffer = SHAPE.buffer(rank.group, timeout_secs=30.0)
    if rank.group.self_rank == 1:
        return str(rank.ask())
    rank.tell("waiting")
    try:
        case.run(buffer)
    except KeyboardInterrupt:
        with pytest.raises(EPBackendError, match="another operation has just failed this buffer"):
            case.run(buffer)
        return "interrupted"
    return "not interrupted"


def test_ctrl_c_ends_a_wait_at_once_and_fails_the_buffer() -> None:
    case = make_case(SHAPE, "uniform", [4, 4], seed=1)
    with RankProcesses(2) as ranks:
        ranks.start(wait_for_nobody, case)
        assert ranks.next_from(0) == "waiting"
        time.sleep(0.3)
        ranks.interrupt(0)
        (answer,) = ranks.answers(ranks=[0], deadline_secs=5)
    assert answer.value == "interrupted", answer.details


# --- damaged memory --------------------------------------------------------------------------

DISPATCH, COMBINE = _native.Phase.DISPATCH, _native.Phase.COMBINE
pack = _native.pack_signal


class ForgedPeer:
    """Rank 0 of two, alone: the words of rank 1 are the test's. Rank 0 has two tokens, one round;
    all of its experts are its own."""

    def __init__(self, timeout_secs: float = 2.0) -> None:
        self.buffer = virtual_world(2).run(lambda group: SHAPE.buffer(group, timeout_secs))[0]
        self.layout = SHAPE.layout()
        for phase in (DISPATCH, COMBINE):
            self.word(self.layout.credit(phase, 1)).value = 1 << 40

    def word(self, offset: int) -> ctypes.c_uint64:
        return ctypes.c_uint64.from_address(self.buffer._memory.bases[0] + offset)

    def signal(self, phase: _native.Phase, epoch: int, count: int) -> None:
        bank = _native.bank_of(epoch, _native.NUM_ROUND_BANKS)
        self.word(self.layout.signal(bank, phase, 1)).value = pack(epoch, count)

    def counts(self, epoch: int, num_tokens: int, num_rows: int) -> None:
        for i, value in enumerate((epoch, num_tokens, num_rows)):
            self.word(self.layout.counts(1) + 8 * i).value = value
        self.signal(DISPATCH, epoch, 0)

    def send_slowly(self, num_rounds: int, num_rows: int) -> threading.Thread:
        """`num_rows` in each round after the counts."""

        def run() -> None:
            for epoch in range(2, 2 + num_rounds):
                time.sleep(0.15)
                self.signal(DISPATCH, epoch, num_rows)

        thread = threading.Thread(target=run)
        thread.start()
        return thread

    def dispatch(self) -> NormalDispatchResult:
        idx = torch.tensor([[0, 1, -1], [2, -1, -1]])
        return self.buffer.dispatch(torch.ones(2, 6).bfloat16(), idx, torch.ones(2, 3))


@pytest.mark.parametrize(
    ("forge", "message"),
    [
        (lambda peer: peer.signal(DISPATCH, 99, 0), "NEWER_EPOCH: expected 1, saw 99"),
        # The signal of a round of a cached dispatch, which has no counts.
        (lambda peer: peer.signal(DISPATCH, 1, 0), "CORRUPT: expected 1, saw 0"),
        (lambda peer: peer.counts(1, 2, 3), "CORRUPT: expected 2, saw 3"),
        (lambda p: (p.counts(1, 2, 1), p.signal(DISPATCH, 2, 2)), "CORRUPT: expected 1, saw 2"),
        (lambda p: (p.counts(1, 2, 1), p.signal(DISPATCH, 2, 0)), "CORRUPT: expected 1, saw 0"),
    ],
    ids=["newer", "no_counts", "more_rows_than_tokens", "more_in_a_round", "fewer_in_the_last"],
)
def test_a_dispatch_notices_words_that_contradict_each_other(
    forge: Callable[[ForgedPeer], object], message: str
) -> None:
    peer = ForgedPeer()
    forge(peer)
    with pytest.raises(ProtocolError, match=f"memory written by rank 1 .*{message}"):
        peer.dispatch()
    with pytest.raises(ProtocolError):
        peer.dispatch()


@pytest.mark.parametrize(
    ("operation", "message"),
    [
        (
            lambda buffer, result: buffer.dispatch(
                torch.ones(2, 6).bfloat16(), handle=result.handle
            ),
            r"dispatch recv 3 .*by rank 1 .*CORRUPT: expected 1, saw 2",
        ),
        (
            lambda buffer, result: buffer.combine(result.recv_x, result.handle),
            r"combine recv 1 .*by rank 1 .*CORRUPT: expected 0, saw 1",
        ),
    ],
    ids=["cached", "combine"],
)
def test_a_cached_dispatch_and_a_combine_know_how_many_rows_must_come(
    operation: Callable[[NormalBuffer, NormalDispatchResult], object], message: str
) -> None:
    peer = ForgedPeer()
    peer.counts(1, 2, 1)
    peer.signal(DISPATCH, 2, 1)
    result = peer.dispatch()
    assert len(result.recv_x) == 3
    peer.signal(DISPATCH, 3, 2)
    peer.signal(COMBINE, 1, 1)
    with pytest.raises(ProtocolError, match=message):
        operation(peer.buffer, result)


def test_the_timeout_bounds_each_wait_and_not_the_call() -> None:
    """A large batch may take longer than that, as long as its rounds keep coming."""
    num_rounds = 6
    peer = ForgedPeer(timeout_secs=0.5)
    peer.counts(1, 2 * num_rounds, 2 * num_rounds)
    thread = peer.send_slowly(num_rounds, num_rows=2)
    begin = time.monotonic()
    assert len(peer.dispatch().recv_x) == 2 + 2 * num_rounds
    assert time.monotonic() - begin > 0.6
    thread.join()


def test_a_send_waits_for_credit_and_names_who_withholds_it() -> None:
    peer = ForgedPeer(timeout_secs=0.5)
    peer.counts(1, 8, 0)
    peer.word(peer.layout.credit(DISPATCH, 1)).value = 1  # counts, but no round
    thread = peer.send_slowly(num_rounds=2, num_rows=0)
    message = r"dispatch send 4 .* the credit of rank 1 .*expected epoch 2, saw 1"
    with pytest.raises(PeerTimeout, match=message):
        peer.dispatch()
    thread.join()
