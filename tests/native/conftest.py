from __future__ import annotations

from pathlib import Path

import pytest

from tests.native.gpu_programs import compile_all
from tests.native.test_sanitizers import CSRC


@pytest.fixture(scope="session")
def objects_of_cpu(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """The CPU's kernels, for programs that run a GPU's beside them."""
    directory = tmp_path_factory.mktemp("cpu") / "objects"
    return compile_all(sorted((CSRC / "cpu").glob("*.cpp")), CSRC, directory)
