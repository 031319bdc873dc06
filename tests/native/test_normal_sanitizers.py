"""The normal kernels under ThreadSanitizer and under AddressSanitizer with
UndefinedBehaviorSanitizer, in a program of their own (stress_normal.cpp)."""

from __future__ import annotations

import functools
from pathlib import Path

import pytest

from tests.native.test_sanitizers import (
    CSRC,
    SANITIZERS,
    Run,
    SeededBug,
    compile_with,
    kernels_with,
    run_program,
    skip_without,
)

STRESS = Path(__file__).parent / "stress_normal.cpp"


def sources(csrc: Path) -> list[Path]:
    kernels = (csrc / "cpu").glob("normal*.cpp")
    shared = [csrc / "cpu" / f"{name}.cpp" for name in ("network", "rows", "wait")]
    return [STRESS, *sorted(kernels), *shared]


@pytest.fixture(scope="session", params=SANITIZERS, ids=lambda name: f"{name}_sanitizer")
def stress(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """The compiled program, as a function of its arguments."""
    directory = tmp_path_factory.mktemp(request.param)
    skip_without(request.param, directory)
    compile_with(SANITIZERS[request.param], sources(CSRC), directory / "stress")
    return functools.partial(run_program, directory / "stress")


@pytest.mark.parametrize(
    ("num_ranks", "num_ops", "hidden", "dtype", "tokens_per_round"),
    [
        (3, 300, 37, "bfloat16", 4),
        (3, 200, 150, "bfloat16/float8", 4),
        (2, 300, 1, "float32", 1),
        (9, 60, 37, "float32", 3),  # more ranks than experts
        (1, 300, 37, "bfloat16", 5),
        (3, 6, 30_001, "float32", 7),  # rows that are written past the caches
    ],
)
def test_hundreds_of_operations_without_a_report(
    stress: Run, num_ranks: int, num_ops: int, hidden: int, dtype: str, tokens_per_round: int
) -> None:
    done = stress(num_ranks, num_ops, hidden, dtype, tokens_per_round)
    assert (done.returncode, done.stdout) == (0, "stress: ok\n"), done.stderr


def test_the_program_notices_one_wrong_row(stress: Run) -> None:
    done = stress(3, 50, 37, "float32", 4, "damage")
    assert done.returncode == 1
    assert "operation 6: wrong result (token, column)" in done.stderr


SEEDED_BUGS = [
    SeededBug(
        "no_wait_for_credit",
        "cpu/normal_op.h",
        "is_bank_new ? 0 : epoch - protocol::kNumRoundBanks",
        "0",
    ),
    SeededBug(
        "credit_before_the_reads",
        "cpu/normal_op.h",
        "if (!receive(step - kAhead)) return false;",
        "publish_credits(step - kAhead); if (!receive(step - kAhead)) return false;",
    ),
    SeededBug(
        "combine_is_not_quiet_at_its_start",
        "cpu/normal_combine.cpp",
        "if (!op.ok() || !op.wait_until_emptied()) return op.result();",
        "if (!op.ok()) return op.result();",
    ),
    SeededBug(
        "counts_are_not_quiet_at_their_start",
        "cpu/normal_dispatch.cpp",
        "if (!op.wait_until_emptied() || !send_counts(op, params.routes.num_tokens))",
        "if (!send_counts(op, params.routes.num_tokens))",
    ),
]


@pytest.mark.parametrize("bug", SEEDED_BUGS, ids=lambda bug: bug.id)
def test_the_program_finds_a_bug_seeded_into_the_kernels(bug: SeededBug, tmp_path: Path) -> None:
    skip_without("thread", tmp_path)
    csrc = kernels_with(bug, tmp_path)
    compile_with("thread", sources(csrc), tmp_path / "stress", include=csrc)
    done = run_program(tmp_path / "stress", 3, 300, 37, "float32", 4)
    assert done.returncode != 0
    # A race, or the kernels' own detection of an overwritten bank (status 4 or 5), or a wrong row.
    assert "data race" in done.stderr or "stress: rank" in done.stderr
