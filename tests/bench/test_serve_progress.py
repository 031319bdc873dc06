"""The time left of a sweep, by a clock of our own."""

from __future__ import annotations

import pytest

from ep_backend.bench.serve import stages
from ep_backend.bench.serve_progress import Display, Plan, Stage
from ep_backend.bench.serve_settings import Visit, parse_arguments

OPTIONS = parse_arguments([])
STAGES = [
    stage
    for number in (0, 1)
    for backend in ("a", "b")
    for stage in stages(Visit(backend, number, (number,)), [(number, 1), (number, 4)], OPTIONS)
]


class Clock:
    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


def plan_and_clock() -> tuple[Plan, Clock]:
    clock = Clock()
    return Plan(STAGES, clock), clock


def test_stages_are_named_for_their_server() -> None:
    assert [stage.name for stage in STAGES[:5]] == [
        "a-0, start-up",
        "a-0, warm-up",
        "a-0, correctness",
        "a-0, 1 in flight, repeat 0",
        "a-0, 4 in flight, repeat 0",
    ]
    assert len({stage.name for stage in STAGES}) == len(STAGES) == 20
    assert STAGES[0].variant == STAGES[10].variant != STAGES[5].variant


def test_what_is_left_takes_as_long_as_what_is_alike_took() -> None:
    plan, clock = plan_and_clock()
    plan.begin("a-0, start-up")
    assert plan.left_secs() is None
    assert plan.left_text() == "time left not known yet"
    for next_stage, secs in zip(STAGES[1:6], (40, 10, 5, 20, 30), strict=True):
        clock.now += secs
        plan.begin(next_stage.name)
    assert plan.num_done == 5
    # b's are taken to be like a's, and its cells to be like the mean of both of a's.
    server = 40 + 10 + 5 + 20 + 30
    assert plan.left_secs() == pytest.approx(3 * server)
    clock.now += 15
    assert plan.left_secs() == pytest.approx(3 * server - 15)
    assert plan.left_text() == "about 5 min left"
    clock.now += 100  # longer than expected: what comes after it is left
    assert plan.left_secs() == pytest.approx(3 * server - 40)


def test_stages_of_a_failed_server_are_passed_over() -> None:
    plan, clock = plan_and_clock()
    plan.begin("a-0, start-up")
    clock.now += 40
    plan.begin("a-0, warm-up")
    clock.now += 500  # it fails
    plan.begin("b-0, start-up")
    assert plan.num_done == 5
    assert plan.left_secs() == pytest.approx(15 * 40)  # the failure's time tells nothing
    for stage in STAGES[6:]:
        plan.begin(stage.name)
    clock.now += 100
    assert plan.left_secs() == 0.0


def test_without_a_terminal_lines_tell_the_time_left(capsys: pytest.CaptureFixture[str]) -> None:
    display = Display(Plan([Stage("one", "k", "v"), Stage("two", "k", "v")]))
    with display.shown():
        display.begin("one", " (log: x)")
        display.begin("two")
        display.say("[said]")
    assert capsys.readouterr().out.splitlines() == [
        "one (log: x); time left not known yet",
        "two; about 0 s left",
        "[said]",
    ]


def test_on_a_terminal_a_bar_is_drawn(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("rich")
    monkeypatch.setattr("sys.stdout.isatty", lambda: True, raising=False)
    monkeypatch.setenv("TERM", "xterm")
    display = Display(Plan([Stage("one", "k", "v"), Stage("two", "k", "v")]))
    with display.shown():
        display.begin("one")
        display.begin("two")
        display.say("[said]")
    printed = capsys.readouterr().out
    assert "[said]" in printed
    assert "1/2" in printed
    assert "about 0 s left" in printed
