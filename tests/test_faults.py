"""A deliberate fault makes results wrong: proof that comparing them with the reference can fail."""

from __future__ import annotations

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from ep_backend import Group, virtual_world
from ep_backend.faults import FAULT_VARIABLE, drop_remote_rows
from tests.support.programs import PROGRAMS, Interpreter
from tests.support.scenario import Scenario
from tests.support.shapes import Shape


def run(num_ranks: int, **settings: str) -> None:
    shape = Shape(num_ranks, **settings)  # type: ignore[arg-type]
    scenario = Scenario(shape).add("uniform", [6] * num_ranks, seed=1)

    def rank_main(group: Group) -> None:
        with shape.buffer(group) as buffer:
            Interpreter(buffer, scenario).run(PROGRAMS["plain_loop"](1, 2))

    virtual_world(num_ranks).run(rank_main)


@pytest.mark.parametrize(
    "settings", [{}, {"reduction": "source"}, {"output_layout": "rank_major"}], ids=str
)
def test_dropped_remote_contributions_are_noticed(
    settings: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(FAULT_VARIABLE, "drop-remote-contributions")
    with (
        pytest.warns(UserWarning, match="results are wrong on purpose"),
        pytest.raises(AssertionError, match=r"rank [012], token \d+ of experts"),
    ):
        run(3, **settings)
    with pytest.warns(UserWarning, match="wrong on purpose"):
        run(1, **settings)  # no remote rank, nothing to drop


def test_without_the_variable_results_are_right(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(FAULT_VARIABLE, raising=False)
    run(3)


def test_an_unknown_fault_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(FAULT_VARIABLE, "drop-everything")
    with pytest.raises(ValueError, match="'drop-everything', expected one of: drop-remote"):
        run(1)


def test_rows_are_dropped_without_a_look_at_their_counts() -> None:
    """As where a graph holds a combine: a tensor without values refuses to be read."""
    x = torch.ones(7, 2)
    kept = drop_remote_rows(x, torch.tensor([1, 3, 2]), self_rank=1)  # and a row without a token
    assert kept[:, 0].tolist() == [0, 1, 1, 1, 0, 0, 0]
    assert x.min() == 1
    with FakeTensorMode():
        counts = torch.empty(3, dtype=torch.int32)
        assert drop_remote_rows(torch.empty(7, 2), counts, self_rank=1).shape == (7, 2)
