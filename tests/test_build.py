"""Wheels: with and without CUDA, free of torch, loadable anywhere."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


def build_wheel(directory: Path, cuda: str) -> tuple[Path, str]:
    """Builds into `directory` and unpacks there; returns the package folder and pip's output."""
    command = [sys.executable, "-m", "pip", "wheel", "--no-deps", "-v", "-w", str(directory)]
    built = subprocess.run(
        [*command, "-C", f"build-dir={directory / 'build'}", str(ROOT)],
        env=os.environ | {"EP_BACKEND_CUDA": cuda},
        capture_output=True,
        text=True,
        check=False,
    )
    assert built.returncode == 0, built.stdout + built.stderr
    (wheel,) = directory.glob("ep_backend-*.whl")
    unpacked = directory / "unpacked"
    zipfile.ZipFile(wheel).extractall(unpacked)
    return unpacked, built.stdout + built.stderr


def shared_libraries(unpacked: Path) -> str:
    (native,) = (unpacked / "ep_backend").glob("_native*.so")
    return subprocess.run(["ldd", native], capture_output=True, text=True, check=True).stdout


def import_native(unpacked: Path, expression: str) -> str:
    """Evaluates an expression about the wheel's native module, without torch or ep_backend."""
    program = (
        "import importlib.util as u, glob; "
        f"path, = glob.glob({str(unpacked / 'ep_backend' / '_native*.so')!r}); "
        "spec = u.spec_from_file_location('ep_backend._native', path); "
        "native = u.module_from_spec(spec); spec.loader.exec_module(native); "
        f"print({expression})"
    )
    command = [sys.executable, "-c", program]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()


def test_cpu_wheel_says_that_it_is_cpu_only(tmp_path: Path) -> None:
    unpacked, output = build_wheel(tmp_path, "OFF")
    assert "ep_backend: CPU only" in output
    (entry_points,) = unpacked.glob("*.dist-info/entry_points.txt")
    for plugin in ("ep_backend_vllm", "ep_backend_sglang"):
        assert (unpacked / plugin / "__init__.py").exists()
        assert f"{plugin}:register" in entry_points.read_text()
    assert "torch" not in shared_libraries(unpacked)
    assert import_native(unpacked, "native.has_cuda") == "False"


@pytest.mark.skipif(shutil.which("nvcc") is None, reason="no nvcc: CUDA build not checked")
def test_cuda_wheel_loads_without_a_driver(tmp_path: Path) -> None:
    unpacked, output = build_wheel(tmp_path, "AUTO")
    assert "ep_backend: CPU and CUDA" in output
    libraries = shared_libraries(unpacked)
    assert "cuda" not in libraries, "the CUDA runtime is linked statically"
    assert "torch" not in libraries
    assert import_native(unpacked, "native.has_cuda") == "True"


def test_a_missing_native_module_says_what_to_do() -> None:
    program = "import sys; sys.modules['ep_backend._native'] = None; import ep_backend"
    failed = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert failed.returncode != 0
    assert "Run `pip install .` in the repository" in failed.stderr
