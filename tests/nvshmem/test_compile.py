"""Every kernel over NVSHMEM compiles and links with its device library, where nvcc and that are; no
GPU, no network card."""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SOURCES = re.findall(r"csrc/\S+\.cu\b", (ROOT / "csrc/nvshmem/build.cmake").read_text())


def nvshmem_root() -> Path | None:
    """As csrc/nvshmem/build.cmake finds it."""
    if "NVSHMEM_ROOT" in os.environ:
        return Path(os.environ["NVSHMEM_ROOT"])
    try:
        spec = importlib.util.find_spec("nvidia.nvshmem")
    except ModuleNotFoundError:
        return None
    places = [] if spec is None else list(spec.submodule_search_locations or [])
    return Path(places[0]) if places else None


def test_all_sources_are_built() -> None:
    folder = {str(path.relative_to(ROOT)) for path in (ROOT / "csrc/nvshmem").glob("*.cu")}
    assert folder < set(SOURCES)


def test_kernels_compile_and_link(tmp_path: Path) -> None:
    nvcc, nvshmem = shutil.which("nvcc"), nvshmem_root()
    if nvcc is None:
        pytest.skip("no nvcc on PATH: the kernels over NVSHMEM were NOT compiled")
    if nvshmem is None:
        pytest.skip("no nvidia-nvshmem wheel: the kernels over NVSHMEM were NOT compiled")
    options = ["-std=c++17", "-arch=sm_90a", "-rdc=true", "-maxrregcount=128", "-Xcompiler=-fPIC"]
    includes = [f"-I{ROOT / 'csrc'}", f"-I{nvshmem / 'include'}"]

    def compile_one(source: str) -> str:
        made = str(tmp_path / source.replace("/", "-")) + ".o"
        run([nvcc, *options, *includes, "-c", str(ROOT / source), "-o", made])
        return made

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        objects = list(pool.map(compile_one, SOURCES))
    library = [f"-L{nvshmem / 'lib'}", "-lnvshmem_device"]
    linked = str(tmp_path / "linked.o")
    run([nvcc, "-arch=sm_90a", "-Xcompiler=-fPIC", "-dlink", *objects, *library, "-o", linked])


def run(command: list[str]) -> None:
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
