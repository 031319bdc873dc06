"""Each protocol header compiles alone, for the CPU and for CUDA devices."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

CSRC = Path(__file__).parents[2] / "csrc"
HEADERS = sorted(path.name for path in (CSRC / "protocol").glob("*.h"))


def compile_alone(header: str, command: list[str], source: Path) -> None:
    # Twice: the include guard is part of what is tested.
    source.write_text(f'#include "protocol/{header}"\n#include "protocol/{header}"\n')
    done = subprocess.run([*command, f"-I{CSRC}", str(source)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("header", HEADERS)
def test_header_compiles_alone_with_gcc(header: str, tmp_path: Path) -> None:
    gcc = shutil.which("g++")
    if gcc is None:
        pytest.skip("no g++ on PATH: protocol headers were NOT compiled")
    command = [gcc, "-std=c++17", "-Wall", "-Wextra", "-Wpedantic", "-Werror", "-fsyntax-only"]
    compile_alone(header, command, tmp_path / "alone.cpp")


@pytest.mark.parametrize("header", HEADERS)
def test_header_compiles_alone_with_nvcc(header: str, tmp_path: Path) -> None:
    nvcc = shutil.which("nvcc")
    if nvcc is None:
        pytest.skip("no nvcc on PATH: protocol headers were NOT compiled for CUDA")
    flags = ["-std=c++17", "-Werror=all-warnings", "-Xcompiler=-Wall,-Wextra,-Werror"]
    command = [nvcc, *flags, "--ptx", "-o", str(tmp_path / "alone.ptx")]
    compile_alone(header, command, tmp_path / "alone.cu")


@pytest.mark.parametrize("header", HEADERS)
def test_header_includes_only_its_own_room(header: str) -> None:
    """No I/O, no allocation, no torch: only the integer types from outside."""
    text = (CSRC / "protocol" / header).read_text()
    includes = [line.split()[1] for line in text.splitlines() if line.startswith("#include")]
    outside = {name for name in includes if not name.startswith('"protocol/')}
    assert outside <= {"<cstddef>", "<cstdint>"}


def test_the_headers_are_found() -> None:
    assert {"layout.h", "signals.h", "message.h", "tagged.h", "float8.h"} <= set(HEADERS)
