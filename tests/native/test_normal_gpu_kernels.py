"""The normal kernels that GPUs run between nodes, compiled for a CPU (gpu_on_cpu/), have the bits
of the CPU's, over a network that delivers in any order; and bugs of order that are seeded into them
are found. No GPU, no CUDA."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.native import gpu_programs
from tests.native.test_sanitizers import SeededBug, run_program

KERNELS = ["nvshmem/normal_counts", "nvshmem/normal_dispatch", "nvshmem/normal_combine"]
EDITS = [
    ("nvshmem/normal_launch.cuh", "kNodeThreads = 512;", "kNodeThreads = 64;"),
    (
        "nvshmem/normal_counts.cu",
        "extern __shared__ uint32_t num_listed[];",
        "__shared__ uint32_t num_listed[4096];",
    ),
]


def build(directory: Path, bug: SeededBug | None = None) -> Path:
    return gpu_programs.build("stress_normal_gpu", KERNELS, EDITS, directory, bug)


def test_the_bits_are_those_of_the_cpus_kernels(tmp_path: Path) -> None:
    done = run_program(build(tmp_path), 1, 8)
    assert (done.returncode, done.stdout) == (0, "stress_normal_gpu: ok\n"), done.stderr


SEEDED_BUGS = [
    SeededBug(
        "messages_are_read_when_their_signal_is_there",
        "nvshmem/normal_op.cuh",
        "if (seen >= count) return seen;",
        "return count;",
    ),
    SeededBug(
        "no_wait_for_credit",
        "nvshmem/normal_op.cuh",
        "if (!op.wait_for_bank(step)) return false;",
        "",
    ),
    SeededBug(
        "a_node_is_added_up_before_its_rows_are_there",
        "nvshmem/normal_combine.cu",
        "ok = wait_for_rows(round, r, round_count(round, r));",
        "ok = r == op_.view().neighbour(thread);",
    ),
]


@pytest.mark.parametrize("bug", SEEDED_BUGS, ids=lambda bug: bug.id)
def test_a_bug_seeded_into_the_kernels_is_found(bug: SeededBug, tmp_path: Path) -> None:
    done = run_program(build(tmp_path, bug), 1, 40)
    assert done.returncode == 1
    # Wrong data, or words that contradict each other.
    assert "stress: rank" in done.stderr
