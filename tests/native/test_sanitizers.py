"""The CPU kernels under ThreadSanitizer and under AddressSanitizer with UndefinedBehaviorSanitizer.

The sanitizers watch only what they compiled, so the kernels are linked into a program of their own
(stress.cpp) instead of the Python module.
"""

from __future__ import annotations

import functools
import os
import shutil
import subprocess
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest

CSRC = Path(__file__).parents[2] / "csrc"
STRESS = Path(__file__).parent / "stress.cpp"
SANITIZERS = {"thread": "thread", "address": "address,undefined"}

Run = Callable[..., subprocess.CompletedProcess[str]]


def compile_with(sanitizers: str, sources: list[Path], program: Path, include: Path = CSRC) -> None:
    gcc = shutil.which("g++")
    if gcc is None:
        pytest.skip("no g++ on PATH: the kernels did NOT run under a sanitizer")
    flags = ["-std=c++17", "-O1", "-g", "-ffp-contract=off", "-Wall", "-Wextra", "-pthread"]
    flags += ["-Wno-missing-field-initializers", "-fno-sanitize-recover=all"]
    command = [gcc, *flags, f"-fsanitize={sanitizers}", f"-I{include}", *map(str, sources)]
    done = subprocess.run([*command, "-o", str(program)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def run_program(program: Path, *arguments: object) -> subprocess.CompletedProcess[str]:
    command = [str(program), *map(str, arguments)]
    # Random addresses of newer kernels collide with ThreadSanitizer's shadow memory.
    if setarch := shutil.which("setarch"):
        command = [setarch, "-R", *command]
    environment = {**os.environ, "TSAN_OPTIONS": "halt_on_error=1", "ASAN_OPTIONS": ""}
    return subprocess.run(command, capture_output=True, text=True, timeout=120, env=environment)


def skip_without(sanitizer: str, directory: Path) -> None:
    """Skips where the compiler has no runtime of that sanitizer."""
    probe = directory / "probe.cpp"
    probe.write_text("int main() {}\n")
    try:
        compile_with(SANITIZERS[sanitizer], [probe], directory / "probe")
    except AssertionError as e:
        pytest.skip(f"no {sanitizer} sanitizer here, the kernels did NOT run under it: {e}")


@pytest.fixture(scope="session", params=SANITIZERS, ids=lambda name: f"{name}_sanitizer")
def stress(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """The compiled program, as a function of its arguments."""
    directory = tmp_path_factory.mktemp(request.param)
    skip_without(request.param, directory)
    sources = [STRESS, *sorted((CSRC / "cpu").glob("*.cpp"))]
    compile_with(SANITIZERS[request.param], sources, directory / "stress")
    return functools.partial(run_program, directory / "stress")


@pytest.mark.parametrize(
    ("mode", "num_ranks", "num_banks", "num_ops", "hidden", "dtype", "output"),
    [
        ("loop", 3, 2, 2000, 37, "bfloat16", "expert_major"),
        ("steady", 3, 2, 3000, 37, "float32", "expert_major"),
        ("split", 3, 2, 2000, 37, "bfloat16", "rank_major"),
        ("split", 2, 4, 2000, 1, "float32", "expert_major"),
        ("loop", 9, 3, 300, 37, "float32", "expert_major"),  # more ranks than experts
        ("steady", 1, 2, 300, 37, "bfloat16", "expert_major"),
        ("loop", 3, 2, 1000, 200, "float8", "expert_major"),
        ("split", 9, 3, 200, 129, "float8", "rank_major"),
        ("split", 3, 2, 2000, 37, "bfloat16", "source"),
        ("split", 3, 2, 1000, 200, "float8_both", "expert_major"),
        ("loop", 3, 2, 500, 129, "float8_both", "source"),
        # rows that are written past the caches
        ("split", 3, 2, 12, 30_000, "float32", "expert_major"),
        ("loop", 3, 4, 12, 60_001, "bfloat16", "rank_major"),
        ("loop", 3, 2, 12, 30_001, "float32", "source"),
        ("loop", 3, 2, 12, 60_001, "float8_both", "rank_major"),
    ],
)
def test_thousands_of_operations_without_a_report(
    stress: Run,
    mode: str,
    num_ranks: int,
    num_banks: int,
    num_ops: int,
    hidden: int,
    dtype: str,
    output: str,
) -> None:
    done = stress(mode, num_ranks, num_banks, num_ops, hidden, dtype, output)
    assert (done.returncode, done.stdout) == (0, "stress: ok\n"), done.stderr


@pytest.mark.parametrize("mode", ["loop", "steady", "split"])
@pytest.mark.parametrize("output", ["expert_major", "rank_major"])
def test_the_program_notices_one_changed_byte(stress: Run, mode: str, output: str) -> None:
    done = stress(mode, 3, 2, 50, 37, "float32", output, "damage")
    assert done.returncode == 1
    assert "rank 0, operation 6: wrong row (src rank, token): 0, " in done.stderr


RACE = """
#include <thread>
int x = 0;
int main() {
  std::thread t([] { x = 1; });
  x = 2;
  t.join();
}
"""
OVERRUN = """
#include <cstdlib>
int main(int argc, char**) {
  volatile char* p = static_cast<char*>(std::malloc(8));
  p[7 + argc] = 1;
  std::free(const_cast<char*>(p));
}
"""


@pytest.mark.parametrize(
    ("sanitizer", "source", "report"),
    [
        ("thread", RACE, "data race"),
        ("address", OVERRUN, "heap-buffer-overflow"),
    ],
    ids=["thread", "address"],
)
def test_the_sanitizers_of_this_machine_report_a_seeded_bug(
    tmp_path: Path, sanitizer: str, source: str, report: str
) -> None:
    """Otherwise their silence above would mean nothing."""
    skip_without(sanitizer, tmp_path)
    (tmp_path / "bug.cpp").write_text(source)
    compile_with(sanitizer, [tmp_path / "bug.cpp"], tmp_path / "bug")
    done = run_program(tmp_path / "bug")
    assert done.returncode != 0
    assert report in done.stderr


@dataclass(frozen=True)
class SeededBug:
    """An edit of a copy of the kernels. `line` must be there: after a refactoring, seed it anew."""

    id: str
    file: str
    line: str
    becomes: str
    mode: str = ""
    """Of the program, where it has several."""


def kernels_with(bug: SeededBug, tmp_path: Path) -> Path:
    """The copy, where `csrc` has its rooms."""
    csrc = tmp_path / "csrc"
    for room in ("protocol", "cpu"):
        shutil.copytree(CSRC / room, csrc / room)
    text = (csrc / bug.file).read_text()
    assert text.count(bug.line) == 1, f"{bug.file} has no line to seed {bug.id} into any more"
    (csrc / bug.file).write_text(text.replace(bug.line, bug.becomes))
    return csrc


SEEDED_BUGS = [
    SeededBug(
        "signal_without_release",
        "cpu/atomics.h",
        "__atomic_store_n(word, value, __ATOMIC_SEQ_CST);",
        "__atomic_store_n(word, value, __ATOMIC_RELAXED);",
        "loop",
    ),
    SeededBug(
        "wait_without_acquire",
        "cpu/atomics.h",
        "return __atomic_load_n(word, __ATOMIC_ACQUIRE);",
        "return __atomic_load_n(word, __ATOMIC_RELAXED);",
        "loop",
    ),
    SeededBug(
        "no_wait_for_credit",
        "cpu/low_latency_op.cpp",
        "if (epoch_ <= num_banks) return true;",
        "if (epoch_ > 0) return true;",
        "steady",
    ),
    SeededBug(
        "credit_one_operation_early",
        "cpu/low_latency_op.cpp",
        "const uint64_t expected = epoch_ - num_banks;",
        "const uint64_t expected = epoch_ - num_banks - 1;",
        "steady",
    ),
    SeededBug(
        "dispatch_credit_before_the_reads",
        "cpu/low_latency_dispatch.cpp",
        "std::fill(next_row_.begin(), next_row_.end(), 0);",
        "std::fill(next_row_.begin(), next_row_.end(), 0); op.publish_credits();",
        "steady",
    ),
]


@pytest.mark.parametrize("bug", SEEDED_BUGS, ids=lambda bug: bug.id)
def test_the_program_finds_a_bug_seeded_into_the_kernels(bug: SeededBug, tmp_path: Path) -> None:
    skip_without("thread", tmp_path)
    csrc = kernels_with(bug, tmp_path)
    sources = [STRESS, *sorted((csrc / "cpu").glob("*.cpp"))]
    compile_with("thread", sources, tmp_path / "stress", include=csrc)
    done = run_program(tmp_path / "stress", bug.mode, 3, 2, 2000, 37, "float32", "expert_major")
    assert done.returncode != 0
    # A race, or the kernels' own detection of an overwritten bank (status 4 or 5), or a wrong row.
    assert "data race" in done.stderr or "stress: rank" in done.stderr
