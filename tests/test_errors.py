"""What goes wrong outside the protocol: arguments, settings, missing and dead ranks, full memory.

Every error reaches every rank that would otherwise wait, and says what to change.
"""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch

from ep_backend import (
    EPBackendError,
    Group,
    LowLatencyBuffer,
    PeerTimeout,
    RendezvousError,
    SettingsMismatch,
    virtual_world,
)
from ep_backend.memory import shm
from tests.conftest import shm_segments
from tests.support.processes import Answer, Rank, RankProcesses
from tests.support.programs import PROGRAMS, Interpreter
from tests.support.scenario import Scenario, mixed_scenario
from tests.support.shapes import Shape

# --- tensors ---------------------------------------------------------------------------------

SHAPE = Shape(2, num_max_tokens_per_rank=4, hidden=6, num_experts=5, top_k=3)


@dataclass(frozen=True)
class BadDispatch:
    """One argument of a good dispatch of 4 tokens, replaced."""

    id: str
    argument: str
    replace: Callable[[torch.Tensor], torch.Tensor | None]
    message: str


def with_expert(token: int, k: int, expert: int) -> Callable[[torch.Tensor], torch.Tensor]:
    def replace(idx: torch.Tensor) -> torch.Tensor:
        idx = idx.clone()
        idx[token, k] = expert
        return idx

    return replace


BAD_DISPATCHES = [
    BadDispatch("hidden", "x", lambda x: x[:, :5].contiguous(), r"x has shape \[4, 5\].*<=4, 6\]"),
    BadDispatch(
        "tokens",
        "x",
        lambda x: torch.cat([x, x]),
        r"x has shape \[8, 6\], expected \[<=4, 6\].*num_max_tokens_per_rank",
    ),
    BadDispatch("dim", "x", lambda x: x[0], r"x has shape \[6\]"),
    BadDispatch(
        "dtype", "x", lambda x: x.float(), r"x has dtype torch.float32, expected torch.bfloat16\."
    ),
    BadDispatch("strides", "x", lambda x: x.t().contiguous().t(), r"strides.*x\.contiguous\(\)"),
    BadDispatch("device", "x", lambda x: x.to("meta"), "x is on meta, expected cpu"),
    BadDispatch("idx_k", "topk_idx", lambda i: i[:, :2].contiguous(), r"shape \[4, 2\].*\[4, 3\]"),
    BadDispatch("idx_tokens", "topk_idx", lambda i: i[:3], r"topk_idx has shape \[3, 3\]"),
    BadDispatch("idx_dtype", "topk_idx", lambda i: i.short(), "topk_idx has dtype torch.int16"),
    BadDispatch("idx_strides", "topk_idx", lambda i: i.t().contiguous().t(), "topk_idx.*strides"),
    BadDispatch("idx_device", "topk_idx", lambda i: i.to("meta"), "topk_idx is on meta"),
    BadDispatch("weights_dtype", "topk_weights", lambda w: w.double(), "dtype torch.float64"),
    BadDispatch("weights_missing", "topk_weights", lambda _: None, "was not given to dispatch, wh"),
    BadDispatch("weights_shape", "topk_weights", lambda w: w[:2], r"shape \[2, 3\]"),
    BadDispatch(
        "expert_5_of_5",
        "topk_idx",
        with_expert(2, 1, 5),
        r"topk_idx\[2, 1\] is 5, expected -1 .*0\.\.4.*Nothing was sent",
    ),
    BadDispatch("expert_minus_2", "topk_idx", with_expert(3, 0, -2), r"topk_idx\[3, 0\] is -2"),
    BadDispatch("expert_2_pow_32", "topk_idx", with_expert(0, 2, 1 << 32), "is 4294967296"),
    BadDispatch(
        "expert_int32", "topk_idx", lambda i: with_expert(1, 1, 99)(i.int()), r"\[1, 1\] is 99"
    ),
]


@pytest.mark.parametrize("bad", BAD_DISPATCHES, ids=lambda bad: bad.id)
def test_a_bad_dispatch_names_the_argument_and_sends_nothing(bad: BadDispatch) -> None:
    scenario = Scenario(SHAPE).add("uniform", [4, 4], seed=1)
    ranks = [Interpreter(b, scenario) for b in SHAPE.virtual_buffers(timeout_secs=2.0)]
    v = scenario.variants[0]
    good = {"x": v.x[0], "topk_idx": v.topk_idx[0], "topk_weights": v.topk_weights[0]}
    with pytest.raises(ValueError, match=bad.message):
        ranks[0].buffer.dispatch(**good | {bad.argument: bad.replace(good[bad.argument])})
    # Also when the banks are in use: the refusal comes before any wait or write.
    for op in range(3):
        for what in ("d", "h", "c", "hc"):
            for rank in ranks:
                rank.step(what, op)
        with pytest.raises(ValueError, match=bad.message):
            ranks[1].buffer.dispatch(**good | {bad.argument: bad.replace(good[bad.argument])})


FLOAT8_X = torch.zeros(4, 6).to(torch.float8_e4m3fn)


@pytest.mark.parametrize(
    ("dispatch_dtype", "x", "x_scales", "message"),
    [
        (None, torch.zeros(4, 6).bfloat16(), torch.ones(4, 1), "x_scales was given, but this buf"),
        (None, FLOAT8_X, torch.ones(4, 1), "x has dtype torch.float8_e4m3fn, expected torch.bfl"),
        (FLOAT8_X.dtype, FLOAT8_X, None, "float8_e4m3fn, but x_scales was not given. Pass the"),
        (FLOAT8_X.dtype, torch.zeros(4, 6).bfloat16(), torch.ones(4, 1), "quantises itself"),
        (FLOAT8_X.dtype, FLOAT8_X, torch.ones(4, 2), r"x_scales has shape \[4, 2\].*\[4, 1\]"),
        (FLOAT8_X.dtype, FLOAT8_X, torch.ones(4, 1).int(), "x_scales has dtype torch.int32"),
        (FLOAT8_X.dtype, torch.zeros(4, 6), None, "expected torch.bfloat16 or torch.float8_e4m3"),
    ],
    ids=["no_float8", "no_float8_x", "no_scales", "x_not_float8", "shape", "dtype", "x_dtype"],
)
def test_scales_without_float8_and_float8_without_scales_are_refused(
    dispatch_dtype: torch.dtype | None,
    x: torch.Tensor,
    x_scales: torch.Tensor | None,
    message: str,
) -> None:
    buffer, _ = replace(SHAPE, dispatch_dtype=dispatch_dtype).virtual_buffers()
    idx, weights = torch.zeros((4, 3), dtype=torch.int64), torch.ones(4, 3)
    for call in (buffer.dispatch, buffer.dispatch_and_receive):
        with pytest.raises(ValueError, match=message):
            call(x, idx, weights, x_scales)


def test_the_rank_major_layout_wants_a_row_a_message() -> None:
    scenario = Scenario(replace(SHAPE, output_layout="rank_major")).add("uniform", [4, 4], seed=1)
    ranks = [Interpreter(b, scenario) for b in scenario.shape.virtual_buffers(timeout_secs=2.0)]
    for what in ("d", "h"):
        for rank in ranks:
            rank.step(what, 0)
    handle = ranks[0].dispatched[0][0].handle
    with pytest.raises(ValueError, match=r"expert_out has shape \[3, 8, 6\], expected \[2, 4, 6\]"):
        ranks[0].buffer.combine(torch.zeros(3, 8, 6).bfloat16(), handle)


@pytest.mark.parametrize(
    ("argument", "replace", "message"),
    [
        ("expert_out", lambda y: y[:, :-1].contiguous(), "expert_out has shape"),
        ("expert_out", lambda y: y.float(), "expert_out has dtype torch.float32"),
        ("expert_out", lambda y: y.transpose(0, 1).contiguous().transpose(0, 1), "strides"),
        ("expert_out", lambda y: y.to("meta"), "expert_out is on meta"),
        ("out", lambda y: torch.empty(3, 6, dtype=y.dtype), r"out has shape \[3, 6\].*\[4, 6\]"),
        ("out", lambda y: torch.empty(4, 6), "out has dtype torch.float32"),
    ],
    ids=["rows", "dtype", "strides", "device", "out_shape", "out_dtype"],
)
def test_a_bad_combine_names_the_argument_and_sends_nothing(
    argument: str, replace: Callable[[torch.Tensor], torch.Tensor], message: str
) -> None:
    scenario = Scenario(SHAPE).add("uniform", [4, 4], seed=1)
    ranks = [Interpreter(b, scenario) for b in SHAPE.virtual_buffers(timeout_secs=2.0)]
    for what in ("d", "h"):
        for rank in ranks:
            rank.step(what, 0)
    expert_out = ranks[0].expert_out[0]
    arguments: dict[str, Any] = {"expert_out": expert_out, argument: replace(expert_out)}
    with pytest.raises(ValueError, match=message):
        ranks[0].buffer.combine(handle=ranks[0].dispatched[0][0].handle, **arguments)
    for what in ("c", "hc"):
        for rank in ranks:
            rank.step(what, 0)


WEIGHTS = torch.ones(4, 3)


@pytest.mark.parametrize(
    ("reduction", "topk_weights", "message"),
    [
        (
            "rank",
            WEIGHTS,
            "given to combine, but with reduction 'rank' they were given at dispatch",
        ),
        ("source", None, "not given to combine, which needs them with reduction 'source'. Pass fl"),
        ("source", WEIGHTS.double(), "topk_weights has dtype torch.float64, expected torch.float3"),
        ("source", WEIGHTS[:3], r"topk_weights has shape \[3, 3\], expected \[4, 3\]"),
        ("source", torch.ones(3, 4).t(), "topk_weights of shape .* has strides"),
        ("source", WEIGHTS.to("meta"), "topk_weights is on meta"),
    ],
    ids=["rank", "missing", "dtype", "shape", "strides", "device"],
)
def test_weights_are_given_once_where_they_are_applied(
    reduction: str, topk_weights: torch.Tensor | None, message: str
) -> None:
    scenario = Scenario(replace(SHAPE, reduction=reduction)).add("uniform", [4, 4], seed=1)
    ranks = [Interpreter(b, scenario) for b in scenario.shape.virtual_buffers(timeout_secs=2.0)]
    for what in ("d", "h"):
        for rank in ranks:
            rank.step(what, 0)
    arguments = ranks[0].expert_out[0], ranks[0].dispatched[0][0].handle
    for call in (ranks[0].buffer.combine, ranks[0].buffer.combine_and_receive):
        with pytest.raises(ValueError, match=message):
            call(*arguments, topk_weights=topk_weights)
    for what in ("c", "hc"):
        for rank in ranks:
            rank.step(what, 0)


# --- settings --------------------------------------------------------------------------------

GOOD_SETTINGS: dict[str, Any] = dict(
    num_max_tokens_per_rank=4, hidden=6, num_experts=5, top_k=3, dtype=torch.bfloat16
)


def create(rank: Rank, settings_of_rank: list[dict[str, Any]]) -> int:
    settings = GOOD_SETTINGS | settings_of_rank[rank.group.self_rank]
    with LowLatencyBuffer(rank.group, **settings) as buffer:
        return buffer.num_symmetric_bytes


def create_on_threads(settings_of_rank: list[dict[str, Any]]) -> list[Answer]:
    def rank_main(group: Group) -> Answer:
        try:
            return Answer(value=create(Rank(group, None), settings_of_rank))  # type: ignore[arg-type]
        except Exception as e:
            return Answer.of_error(e)

    return virtual_world(len(settings_of_rank), timeout_secs=5.0).run(rank_main)


@pytest.mark.parametrize(
    ("setting", "value", "theirs"),
    [
        ("num_max_tokens_per_rank", 5, 4),
        ("hidden", 7, 6),
        ("num_experts", 6, 5),
        ("top_k", 2, 3),
        ("dtype", torch.float32, torch.bfloat16),
        ("num_banks", 3, 2),
        ("dispatch_dtype", torch.float8_e4m3fn, torch.bfloat16),
        ("combine_dtype", torch.float8_e4m3fn, torch.bfloat16),
        ("output_layout", "rank_major", "expert_major"),
        ("reduction", "source", "rank"),
        ("transfer", "push", "pull"),
        ("num_max_tagged_tokens", 3, None),
    ],
)
def test_a_differing_setting_is_a_mismatch_on_every_rank(
    setting: str, value: Any, theirs: Any
) -> None:
    answers = create_on_threads([{}, {setting: value}, {}])
    for answer in answers:
        assert answer.error_type == SettingsMismatch.__name__
        assert f"{setting} differs between ranks" in answer.error
        assert f"rank 0: {theirs!r}, rank 1: {value!r}, rank 2: {theirs!r}" in answer.error


BAD_SETTINGS: list[tuple[str, Any, str]] = [
    ("num_experts", 0, "num_experts is 0, expected an integer in 1..65536"),
    ("num_experts", (1 << 16) + 1, "num_experts is 65537"),
    ("num_max_tokens_per_rank", 0, "1..32767. A signal counts messages in 15 bits"),
    ("num_max_tokens_per_rank", 1 << 15, "num_max_tokens_per_rank is 32768"),
    ("hidden", 0, "hidden is 0"),
    ("hidden", 6.0, "hidden is 6.0, expected an integer"),
    ("top_k", 65, "top_k is 65, expected an integer in 1..64"),
    ("num_banks", 1, "num_banks is 1, expected an integer in 2..64"),
    ("dtype", torch.float16, "dtype is torch.float16, expected torch.float32 or torch.bfloat16"),
    (
        "dispatch_dtype",
        torch.float32,
        "dispatch_dtype is torch.float32, expected torch.bfloat16, which is the dtype, or torch."
        "float8_e4m3fn",
    ),
    (
        "combine_dtype",
        torch.float8_e5m2,
        "combine_dtype is torch.float8_e5m2, expected torch.bfloat16, which is the dtype, or torch."
        "float8_e4m3fn",
    ),
    ("scale_format", "float8", "scale_format is 'float8', expected 'float32' or 'power_of_two' or"),
    ("scale_format", "ue8m0", "rows of torch.bfloat16 have no scales. Leave it out, or pass disp"),
    ("output_layout", "token", "output_layout is 'token', expected 'expert_major' or 'rank_major'"),
    ("reduction", "home", "reduction is 'home', expected 'rank' or 'source'"),
    ("transfer", 3, "transfer is 3, expected 'push' or 'pull'"),
    ("num_max_tagged_tokens", -1, "num_max_tagged_tokens is -1, expected an integer in 0..4"),
    ("num_max_tagged_tokens", 5, "No batch is larger than num_max_tokens_per_rank"),
    ("device", "meta", "device is 'meta', expected 'cpu' or a CUDA device"),
    ("device", "no such device", "no such device"),
    ("timeout_secs", 0, "timeout_secs is 0, expected more than 0"),
    ("timeout_secs", float("inf"), "timeout_secs is inf, expected more than 0, at most 1000000"),
    ("timeout_secs", None, "timeout_secs is None, expected more than 0"),
    ("spin_us", 1e6, "spin_us is 1000000.0, expected 0 to 100000"),
    ("spin_us", "3", "spin_us is '3', expected 0 to 100000"),
]


@pytest.mark.parametrize(("setting", "value", "message"), BAD_SETTINGS)
def test_a_bad_setting_on_one_rank_is_told_to_all(setting: str, value: Any, message: str) -> None:
    """The rank itself gets the plain ValueError, the others who refused what; nobody waits."""
    begin = time.monotonic()
    answers = create_on_threads([{}, {setting: value}])
    assert answers[1].error_type == "ValueError"
    assert message in answers[1].error
    assert answers[0].error_type == SettingsMismatch.__name__
    assert "rank 1 refused its settings" in answers[0].error
    assert message in answers[0].error
    assert time.monotonic() - begin < 4.0


def test_every_limit_of_the_wire_words_can_be_used() -> None:
    """Settings at their upper limits, one at a time."""
    for setting, value in [("num_experts", 1 << 16), ("top_k", 64), ("num_banks", 64)]:
        answers = create_on_threads([{setting: value, "num_max_tokens_per_rank": 1, "hidden": 1}])
        assert answers[0].error_type is None, answers[0].error


def test_the_largest_batch_that_a_signal_can_count() -> None:
    shape = Shape(1, num_max_tokens_per_rank=32767, hidden=1, num_experts=1, top_k=1)
    (buffer,) = shape.virtual_buffers()
    x = (torch.arange(32767) % 251)[:, None].to(shape.dtype)
    result, hook = buffer.dispatch(
        x, torch.zeros(32767, 1, dtype=torch.int32), torch.full((32767, 1), 2.0)
    )
    hook()
    assert result.num_recv_tokens_per_expert.tolist() == [32767]
    assert torch.equal(result.recv_x[0], x)
    out, hook = buffer.combine(result.recv_x, result.handle)
    hook()
    assert torch.equal(out, 2 * x)


# --- processes: settings, memory, missing and dead ranks ---------------------------------------


def answers_of(
    num_ranks: int, function: Callable[..., Any], *args: Any, rendezvous_secs: float = 30.0
) -> list[Answer]:
    with RankProcesses(num_ranks, rendezvous_secs) as ranks:
        ranks.start(function, *args)
        return ranks.answers()


def test_processes_learn_of_a_mismatch_and_can_try_again() -> None:
    with RankProcesses(3) as ranks:
        ranks.start(create, [{}, {}, {"hidden": 7}])
        for answer in ranks.answers():
            assert answer.error_type == SettingsMismatch.__name__, answer.details
            assert "hidden differs between ranks (rank 0: 6, rank 1: 6, rank 2: 7)" in answer.error
        ranks.start(create, [{}, {"top_k": 0}, {}])
        kinds = [answer.error_type for answer in ranks.answers()]
        assert kinds == ["SettingsMismatch", "ValueError", "SettingsMismatch"]
        assert len(set(ranks.run(create, [{}, {}, {}]))) == 1


def test_a_rank_that_never_comes_is_named() -> None:
    """Rank 2 exists but does not create the buffer."""
    with RankProcesses(3, rendezvous_secs=2.0) as ranks:
        ranks.start(create, [{}, {}, {}], ranks=[0, 1])
        answers = ranks.answers(ranks=[0, 1])
        for answer in answers:
            assert answer.error_type == RendezvousError.__name__, answer.details
            assert answer.secs < 10.0
        assert "rank 0: the ranks could not meet" in answers[0].error
        assert "2" in answers[0].error.split("could not meet")[1]


def test_too_little_shared_memory_is_told_to_every_rank_with_the_remedy() -> None:
    """More than the whole of /dev/shm: the kernel refuses at once and fills nothing."""
    size = os.statvfs(shm.SHM_DIR).f_blocks * os.statvfs(shm.SHM_DIR).f_frsize
    too_much = dict(num_max_tokens_per_rank=32767, hidden=1 << 20, dtype=torch.float32)
    layout = Shape(2, num_experts=5, **too_much).layout()  # type: ignore[arg-type]
    if layout.num_bytes < size:
        pytest.skip("/dev/shm holds more than the largest buffer of two ranks")
    for answer in answers_of(2, create, [too_much, too_much]):
        assert answer.error_type == RendezvousError.__name__, answer.details
        assert f"cannot create {layout.num_bytes} bytes in /dev/shm" in answer.error
        assert "bytes are free there. Enlarge it (docker: --shm-size" in answer.error


def fail_to_allocate_on_rank_1(rank: Rank) -> None:
    if rank.group.self_rank == 1:
        os.posix_fallocate = raise_no_space
    create(rank, [{}] * rank.group.num_ranks)


def raise_no_space(fd: int, offset: int, num_bytes: int) -> None:
    raise OSError(28, "No space left on device")


def test_one_rank_without_room_is_named_on_every_rank() -> None:
    for answer in answers_of(3, fail_to_allocate_on_rank_1):
        assert answer.error_type == RendezvousError.__name__, answer.details
        assert answer.error.startswith("rank 1: cannot create")


TIMEOUT_SECS = 2.0


def wait_for_the_dead(rank: Rank, scenario: Scenario, last_step: str, victim: int) -> None:
    """All ranks run two operations; the victim is killed before the send that the others then
    wait for."""
    buffer = scenario.shape.buffer(rank.group, TIMEOUT_SECS)
    me = Interpreter(buffer, scenario)
    me.run(PROGRAMS["plain_loop"](2, buffer.num_banks))
    steps = {"h": ["d", "h"], "hc": ["d", "h", "c", "hc"]}[last_step]
    for what in steps[:-2]:
        me.step(what, 2)
    rank.tell("ready")
    if rank.group.self_rank == victim:
        rank.ask()  # for ever
    me.step(steps[-2], 2)
    begin = time.monotonic()
    with pytest.raises(PeerTimeout) as first:
        me.step(steps[-1], 2)
    waited_secs = time.monotonic() - begin
    for again in (lambda: me.step(steps[-1], 2), lambda: me.send_dispatch(3)):
        begin = time.monotonic()
        with pytest.raises(PeerTimeout) as second:
            again()
        assert str(second.value) == str(first.value)
        assert time.monotonic() - begin < 0.5
    assert TIMEOUT_SECS <= waited_secs < TIMEOUT_SECS + 1.5
    buffer.close()
    raise first.value


@pytest.mark.parametrize(
    ("last_step", "phase"), [("h", "dispatch"), ("hc", "combine")], ids=["dispatch", "combine"]
)
@pytest.mark.parametrize("victim", [0, 2])
def test_a_killed_rank_is_named_by_every_living_one(
    last_step: str, phase: str, victim: int
) -> None:
    scenario = mixed_scenario(Shape(3), seed=21)
    living = [rank for rank in range(3) if rank != victim]
    with RankProcesses(3) as ranks:
        ranks.start(wait_for_the_dead, scenario, last_step, victim)
        for rank in range(3):
            assert ranks.next_from(rank) == "ready"
        ranks.kill(victim)
        for rank, answer in zip(living, ranks.answers(living, deadline_secs=20.0), strict=True):
            assert answer.error_type == PeerTimeout.__name__, answer.details
            assert f"{phase} recv 3 on rank {rank}: the data of rank {victim} " in answer.error
            assert answer.record is not None
            waited_secs = answer.record.pop("waited_secs")
            assert TIMEOUT_SECS <= waited_secs < TIMEOUT_SECS + 1.5
            assert answer.record == {
                "self_rank": rank,
                "peer_rank": victim,
                "phase": phase,
                "half": "recv",
                "epoch": 3,
                "expected": 3,
                "seen": 1,  # the bank's last epoch
            }


def be_late(rank: Rank, scenario: Scenario) -> float:
    """Rank 1 sleeps for a second at every kind of step; nobody minds."""
    with scenario.shape.buffer(rank.group, timeout_secs=20.0) as buffer:
        me = Interpreter(buffer, scenario)
        for i, step in enumerate(PROGRAMS["plain_loop"](4, buffer.num_banks)):
            if rank.group.self_rank == 1 and i % 5 == 1:
                time.sleep(1.0)
            me.step(*step)
        return sum(c.wait_ns for c in buffer.counters().values()) / 1e9


def test_a_rank_that_is_late_by_a_second_is_no_error_and_shows_in_the_counters() -> None:
    with RankProcesses(3) as ranks:
        waited_secs = ranks.run(be_late, mixed_scenario(Shape(3), seed=22))
    assert waited_secs[0] > 2.0
    assert waited_secs[2] > 2.0


def hold_a_buffer(rank: Rank) -> None:
    buffer = SHAPE.buffer(rank.group)
    rank.tell(len(buffer._memory.bases))
    rank.ask()


def test_nothing_is_left_when_the_whole_run_is_killed() -> None:
    before = shm_segments()
    with RankProcesses(SHAPE.num_ranks) as ranks:
        ranks.start(hold_a_buffer)
        for rank in range(SHAPE.num_ranks):
            assert ranks.next_from(rank) == SHAPE.num_ranks
        assert shm_segments() == before  # no name even while the memory is in use
        for rank in range(SHAPE.num_ranks):
            os.kill(ranks.pid(rank), signal.SIGKILL)
    assert shm_segments() == before


def test_every_failure_can_be_caught_as_one_type() -> None:
    """Wrong arguments are ValueErrors; everything else derives from EPBackendError."""
    for failure in (PeerTimeout, RendezvousError):
        assert issubclass(failure, EPBackendError)
    assert issubclass(SettingsMismatch, ValueError)
