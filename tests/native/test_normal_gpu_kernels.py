"""The normal kernels that GPUs run between nodes, compiled for a CPU (gpu_on_cpu/), have the bits
of the CPU's, over a network that delivers in any order; and bugs of order that are seeded into them
are found. No GPU, no CUDA."""

from __future__ import annotations

import os
import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from tests.native.test_sanitizers import CSRC, SeededBug, run_program

HERE = Path(__file__).parent
KERNELS = ("normal_counts", "normal_dispatch", "normal_combine")
# What stands in for CUDA cannot do: blocks of many threads in time, and shared memory whose size
# the launch gives.
EDITS = [
    ("nvshmem/normal_launch.cuh", "kNodeThreads = 512;", "kNodeThreads = 64;"),
    (
        "nvshmem/normal_counts.cu",
        "extern __shared__ uint32_t num_listed[];",
        "__shared__ uint32_t num_listed[4096];",
    ),
]


def build(directory: Path, bug: SeededBug | None = None) -> Path:
    """The program `stress_normal_gpu`, of an edited copy of the sources."""
    gcc = shutil.which("g++")
    if gcc is None:
        pytest.skip("no g++ on PATH: the GPU's kernels were NOT run on a CPU")
    csrc = directory / "csrc"
    shutil.copytree(CSRC, csrc)
    for file, line, becomes in EDITS + ([] if bug is None else [(bug.file, bug.line, bug.becomes)]):
        text = (csrc / file).read_text()
        assert text.count(line) == 1, f"{file} has no {line!r} any more"
        (csrc / file).write_text(text.replace(line, becomes))
    flags = ["-std=c++17", "-O1", "-ffp-contract=off", "-pthread", "-Wno-unknown-pragmas"]
    includes = [f"-I{HERE / 'gpu_on_cpu'}", f"-I{csrc}"]
    sources = [HERE / "stress_normal_gpu.cpp", *sorted((csrc / "cpu").glob("*.cpp"))]
    sources += [csrc / f"nvshmem/{kernel}.cu" for kernel in KERNELS]

    def compile_one(source: Path) -> str:
        made = str(directory / source.name) + ".o"
        run([gcc, *flags, *includes, "-x", "c++", "-c", str(source), "-o", made])
        return made

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        objects = list(pool.map(compile_one, sources))
    program = directory / "stress_normal_gpu"
    run([gcc, "-pthread", *objects, "-o", str(program)])
    return program


def run(command: list[str]) -> None:
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


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
