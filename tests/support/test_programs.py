"""The programs obey the order rules for every number of banks, and are what their names say."""

from __future__ import annotations

import pytest

from tests.support.programs import PROGRAMS, three_combines, two_micro_batches

NUM_OPS = 60  # divisible by 2, 3, 4, 5 and 6: no program has a remainder


@pytest.mark.parametrize("num_banks", [2, 3, 4])
@pytest.mark.parametrize("name", PROGRAMS)
def test_every_program_is_legal_and_complete(name: str, num_banks: int) -> None:
    num_done = dict.fromkeys(("d", "h", "c", "hc"), 0)
    at_once = {"x": ("d", "h"), "xc": ("c", "hc")}
    steps = (
        (half, op)
        for what, op in PROGRAMS[name](NUM_OPS, num_banks)
        for half in at_once.get(what, (what,))
    )
    for what, op in steps:
        assert op == num_done[what], "operations of one kind come in order"
        num_done[what] += 1
        assert num_done["d"] - num_banks <= num_done["h"] <= num_done["d"]
        assert num_done["c"] <= num_done["h"]
        assert num_done["c"] - num_banks <= num_done["hc"] <= num_done["c"]
    assert num_done["d"] == num_done["h"] == NUM_OPS
    assert num_done["c"] == num_done["hc"]
    has_combines = name not in ("steady", "dispatch_only")
    assert num_done["c"] == (NUM_OPS if has_combines else 0)


def test_steady_keeps_every_bank_outstanding() -> None:
    num_sent = num_hooked = 0
    for what, _ in PROGRAMS["steady"](NUM_OPS, 3):
        num_sent += what == "d"
        num_hooked += what == "h"
        if 3 <= num_sent < NUM_OPS:
            assert num_sent - num_hooked >= 2  # 3, and 2 for the moment between a hook and a send
    assert num_sent == NUM_OPS


def spelled(steps: object) -> str:
    return " ".join(f"{what}{op + 1}" for what, op in steps)  # type: ignore[attr-defined]


def test_three_combines_with_two_banks_is_the_order_that_needs_combine_credit() -> None:
    expected = "d1 h1 d2 h2 d3 h3 c1 c2 hc1 c3 hc2 hc3"
    assert spelled(three_combines(3, 2)) == expected


def test_two_micro_batches_overlap_as_in_an_engine() -> None:
    assert spelled(two_micro_batches(2, 2)) == "d1 d2 h1 c1 h2 c2 hc1 hc2"
