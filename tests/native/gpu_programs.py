"""Programs of a GPU's kernels and the CPU's, compiled for a CPU by gpu_on_cpu/."""

from __future__ import annotations

import os
import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from tests.native.test_sanitizers import CSRC, SeededBug

HERE = Path(__file__).parent
Edit = tuple[str, str, str]
"""Of a file of csrc: what a line has, and what it becomes. Blocks of many threads take too long on
a CPU, and shared memory has no size that the launch gives."""


def build(
    name: str, kernels: list[str], edits: list[Edit], directory: Path, bug: SeededBug | None = None
) -> Path:
    """The program `name`, of an edited copy of the sources.

    Args:
        kernels: files of csrc, without their ending.
    """
    gcc = shutil.which("g++")
    if gcc is None:
        pytest.skip("no g++ on PATH: the GPU's kernels were NOT run on a CPU")
    csrc = directory / "csrc"
    shutil.copytree(CSRC, csrc)
    for file, line, becomes in edits:
        text = (csrc / file).read_text()
        assert line in text, f"{file} has no {line!r} any more"
        (csrc / file).write_text(text.replace(line, becomes))
    if bug is not None:
        text = (csrc / bug.file).read_text()
        assert text.count(bug.line) == 1, f"{bug.file} has no line to seed {bug.id} into any more"
        (csrc / bug.file).write_text(text.replace(bug.line, bug.becomes))
    flags = ["-std=c++17", "-O1", "-ffp-contract=off", "-pthread", "-Wno-unknown-pragmas"]
    includes = [f"-I{HERE / 'gpu_on_cpu'}", f"-I{csrc}"]
    sources = [HERE / f"{name}.cpp", *sorted((csrc / "cpu").glob("*.cpp"))]
    sources += [csrc / f"{kernel}.cu" for kernel in kernels]

    def compile_one(source: Path) -> str:
        made = str(directory / source.name) + ".o"
        run([gcc, *flags, *includes, "-x", "c++", "-c", str(source), "-o", made])
        return made

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        objects = list(pool.map(compile_one, sources))
    program = directory / name
    run([gcc, "-pthread", *objects, "-o", str(program)])
    return program


def run(command: list[str]) -> None:
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
