"""csrc/nvshmem/build.cmake, as far as it comes without compilers: which NVSHMEM is linked."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
# What needs a compiler does nothing here.
PROJECT = """
cmake_minimum_required(VERSION 3.24)
project(trial LANGUAGES NONE)
set(build_cuda ON)
set(EP_BACKEND_NVSHMEM ON)
set(NVSHMEM_ROOT "$ENV{NVSHMEM_ROOT}")
foreach(name pybind11_add_module target_include_directories target_compile_options
    set_target_properties target_link_options install)
  function(${name})
  endfunction()
endforeach()
function(target_link_libraries)
  message(STATUS "linked: ${ARGN}")
endfunction()
include(%s)
"""


def make_nvshmem(root: Path, version: str) -> Path:
    for name in ("libnvshmem_host.so.3", "libnvshmem_device.a"):
        (root / "lib").mkdir(parents=True, exist_ok=True)
        (root / "lib" / name).touch()
    header = root / "include/non_abi/nvshmem_version.h"
    header.parent.mkdir(parents=True)
    numbers = zip(("MAJOR", "MINOR", "PATCH"), version.split("."), strict=True)
    header.write_text("".join(f"#define NVSHMEM_VENDOR_{n}_VERSION {v}\n" for n, v in numbers))
    return root


@pytest.mark.skipif(shutil.which("cmake") is None, reason="no cmake on PATH")
def test_a_build_folder_is_used_again_with_another_nvshmem(tmp_path: Path) -> None:
    (tmp_path / "CMakeLists.txt").write_text(PROJECT % (ROOT / "csrc/nvshmem/build.cmake"))
    for version in ("3.4.5", "3.8.0"):
        root = make_nvshmem(tmp_path / version, version)
        done = subprocess.run(
            ["cmake", "-S", str(tmp_path), "-B", str(tmp_path / "build")],
            env=os.environ | {"NVSHMEM_ROOT": str(root)},
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, done.stderr
        linked = re.search(r"linked: (.*)", done.stdout)
        assert linked is not None
        assert f"{root}/lib/libnvshmem_host.so.3" in linked[1]
        assert f"{root}/lib/libnvshmem_device.a" in linked[1]
        note = tmp_path / "build/_nvshmem_version.txt"
        assert note.read_text() == f"{version}\n"
