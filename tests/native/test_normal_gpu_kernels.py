"""The normal kernels that GPUs run, of one node and between nodes, compiled for a CPU
(gpu_on_cpu/), have the bits of the CPU's, with a copy engine that is early or late and over a
network that delivers in any order; and bugs that are seeded into them are found. No GPU, no CUDA.

Of a program's many seeds a few are run: `EP_BACKEND_STRESS_SEEDS=500 pytest FILE` runs more."""

from __future__ import annotations

import os
import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.native.test_sanitizers import CSRC, SeededBug

HERE = Path(__file__).parent
FLAGS = ["-std=c++17", "-O1", "-ffp-contract=off", "-pthread", "-Wno-unknown-pragmas"]
NUM_SEEDS = int(os.environ.get("EP_BACKEND_STRESS_SEEDS", "10"))
NUM_SEEDS_FOR_A_BUG = 40

Edit = tuple[str, str, str]
"""A file of csrc, a text that is there once, and what becomes of it."""


@dataclass(frozen=True)
class Program:
    """stress_NAME.cpp, with these kernels. What stands in for CUDA cannot do what `edits` change:
    blocks of many threads in time, and shared memory whose size the launch gives. Rows are cut into
    smaller pieces, so that they have several."""

    name: str
    kernels: tuple[str, ...]
    edits: tuple[Edit, ...]


BUFFERS = "extern __shared__ __align__(128) std::byte buffers[];"
FIXED_BUFFERS = "__align__(128) static std::byte buffers[1 << 18];"
LINKS = Program(
    "normal_links",
    ("cuda/normal_dispatch.cu", "cuda/normal_combine.cu"),
    (
        ("cuda/normal_dispatch.cu", BUFFERS, FIXED_BUFFERS),
        ("cuda/normal_combine.cu", BUFFERS, FIXED_BUFFERS),
        ("cuda/normal_route.cuh", "kSendWarps = 16;", "kSendWarps = 2;"),
        ("cuda/normal_send.cuh", "<14336, 0, 14336 / 128, 14>", "<2048, 0, 2048 / 128, 2>"),
        (
            "cuda/normal_send.cuh",
            "<8192, 8192 / sizeof(T), 8192 / sizeof(T) / 128, kSendWarps>",
            "<4096, 4096 / sizeof(T), 4096 / sizeof(T) / 128, kSendWarps>",
        ),
        ("cuda/normal_send.cuh", "kNumLinkSMs = 9;", "kNumLinkSMs = 1;"),
        ("cuda/normal_send.cuh", "kNumOwnSMs = 8;", "kNumOwnSMs = 1;"),
        ("cuda/normal_pull.cuh", "kPullWarps = 12;", "kPullWarps = 2;"),
        ("cuda/normal_pull.cuh", "kPieceBytes = 7168;", "kPieceBytes = 1024;"),
    ),
)
NODES = Program(
    "normal_nodes",
    ("nvshmem/normal_counts.cu", "nvshmem/normal_dispatch.cu", "nvshmem/normal_combine.cu"),
    (
        ("nvshmem/normal_launch.cuh", "kNodeThreads = 512;", "kNodeThreads = 64;"),
        (
            "nvshmem/normal_counts.cu",
            "extern __shared__ uint32_t num_listed[];",
            "__shared__ uint32_t num_listed[4096];",
        ),
    ),
)
PROGRAMS = (LINKS, NODES)


def compile_all(sources: list[Path], csrc: Path, directory: Path) -> list[Path]:
    gcc = shutil.which("g++")
    if gcc is None:
        pytest.skip("no g++ on PATH: the GPU's kernels were NOT run on a CPU")
    directory.mkdir()

    def compile_one(source: Path) -> Path:
        made = directory / f"{source.name}.o"
        includes = [f"-I{HERE / 'gpu_on_cpu'}", f"-I{HERE}", f"-I{csrc}"]
        run([gcc, *FLAGS, *includes, "-x", "c++", "-c", str(source), "-o", str(made)])
        return made

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        return list(pool.map(compile_one, sources))


@pytest.fixture(scope="module")
def objects_of_cpu(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """The CPU's kernels."""
    directory = tmp_path_factory.mktemp("cpu") / "objects"
    return compile_all(sorted((CSRC / "cpu").glob("*.cpp")), CSRC, directory)


def build(
    program: Program, objects_of_cpu: list[Path], directory: Path, bug: SeededBug | None = None
) -> Path:
    """Of an edited copy of the sources."""
    csrc = directory / "csrc"
    shutil.copytree(CSRC, csrc)
    bugs = [] if bug is None else [(bug.file, bug.line, bug.becomes)]
    for file, line, becomes in [*bugs, *program.edits]:
        text = (csrc / file).read_text()
        assert text.count(line) == 1, f"{file} has no {line!r} any more"
        (csrc / file).write_text(text.replace(line, becomes))
    sources = [HERE / f"stress_{program.name}.cpp", *(csrc / kernel for kernel in program.kernels)]
    objects = [*compile_all(sources, csrc, directory / "objects"), *objects_of_cpu]
    made = directory / program.name
    run(["g++", "-pthread", *map(str, objects), "-o", str(made)])
    return made


def run(command: list[str]) -> None:
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def stress(program: Path, num_seeds: int) -> subprocess.CompletedProcess[str]:
    command = [str(program), "1", str(num_seeds)]
    timeout_secs = 120 + 5 * num_seeds
    return subprocess.run(command, capture_output=True, text=True, timeout=timeout_secs)


@pytest.mark.parametrize("program", PROGRAMS, ids=lambda program: program.name)
def test_the_bits_are_those_of_the_cpus_kernels(
    program: Program, objects_of_cpu: list[Path], tmp_path: Path
) -> None:
    done = stress(build(program, objects_of_cpu, tmp_path), NUM_SEEDS)
    assert (done.returncode, done.stdout) == (0, f"stress_{program.name}: ok\n"), done.stderr


SEEDED_BUGS = [
    (
        LINKS,
        SeededBug(
            "a_last_group_of_few_channels_has_no_scale",
            "cuda/normal_send.cuh",
            "scale * kLanesPerScale < num_vectors",
            "first + lane % kCount * kWarp < num_vectors",
        ),
    ),
    (
        LINKS,
        SeededBug(
            "a_chunk_is_overwritten_while_it_leaves",
            "cuda/normal_send.cuh",
            "        ptx::bulk_wait_read();\n        load(token, first);",
            "        load(token, first);",
        ),
    ),
    (
        LINKS,
        SeededBug(
            "rows_are_published_while_they_leave",
            "cuda/normal_send.cuh",
            "    ptx::bulk_wait_written();\n",
            "    ptx::bulk_wait_read();\n",
        ),
    ),
    (
        NODES,
        SeededBug(
            "messages_are_read_when_their_signal_is_there",
            "nvshmem/normal_op.cuh",
            "if (seen >= count) return seen;",
            "return count;",
        ),
    ),
    (
        NODES,
        SeededBug(
            "no_wait_for_credit",
            "nvshmem/normal_op.cuh",
            "if (!op.wait_for_bank(step)) return false;",
            "",
        ),
    ),
    (
        NODES,
        SeededBug(
            "a_node_is_added_up_before_its_rows_are_there",
            "nvshmem/normal_combine.cu",
            "ok = wait_for_rows(round, r, round_count(round, r));",
            "ok = r == op_.view().neighbour(thread);",
        ),
    ),
]


@pytest.mark.parametrize(
    ("program", "bug"),
    SEEDED_BUGS,
    ids=[f"{program.name}-{bug.id}" for program, bug in SEEDED_BUGS],
)
def test_a_bug_seeded_into_the_kernels_is_found(
    program: Program, bug: SeededBug, objects_of_cpu: list[Path], tmp_path: Path
) -> None:
    done = stress(build(program, objects_of_cpu, tmp_path, bug), NUM_SEEDS_FOR_A_BUG)
    assert done.returncode == 1
    # Wrong data, or words that contradict each other.
    assert "stress: rank" in done.stderr
