"""Programs of a GPU's kernels and the CPU's, compiled for a CPU by gpu_on_cpu/.

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
NUM_SEEDS_FOR_A_BUG = 400  # until one finds it; of the rarest bug two in a hundred do

Edit = tuple[str, str, str]
"""A file of csrc, a text that is there, and what becomes of it."""


@dataclass(frozen=True)
class Program:
    """stress_NAME.cpp, with these kernels. What stands in for CUDA cannot do what `edits` change:
    blocks of many threads in time, and shared memory whose size the launch gives. Rows are cut into
    smaller pieces, so that they have several."""

    name: str
    kernels: tuple[str, ...]
    edits: tuple[Edit, ...]


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


def build(
    program: Program, objects_of_cpu: list[Path], directory: Path, bug: SeededBug | None = None
) -> Path:
    """Of an edited copy of the sources."""
    csrc = directory / "csrc"
    shutil.copytree(CSRC, csrc)
    if bug is not None:
        text = (csrc / bug.file).read_text()
        assert text.count(bug.line) == 1, f"{bug.file} has no line to seed {bug.id} into any more"
        (csrc / bug.file).write_text(text.replace(bug.line, bug.becomes))
    for file, line, becomes in program.edits:
        text = (csrc / file).read_text()
        assert line in text, f"{file} has no {line!r} any more"
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
