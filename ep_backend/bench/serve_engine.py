"""What the benchmark asks of an engine, and what servers of any run on."""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

from ep_backend.bench.model import TinyMoE, make_model
from ep_backend.bench.serve_model import RandomMoE
from ep_backend.bench.serve_settings import Options, Round
from ep_backend.bench.server import SHM_DIR
from ep_backend.tuning.site import cpu_name

GRAPH_SIZES = (1, 2, 4, 8, 16, 24, 32, 48, 64, 96, 128)
NUM_MAX_SEQS = GRAPH_SIZES[-1]
MAX_MODEL_TOKENS = 2048
CPU_BATCHED_TOKENS = 256
RECORDED_PREFIXES = (
    *("VLLM_", "SGLANG_", "NCCL_", "GLOO_", "TP_", "CUDA_", "TORCH_"),
    *("EP_BACKEND_", "OMP_"),
)
SECRET_WORDS = ("KEY", "TOKEN", "SECRET", "PASSWORD")
PERCENTILES = (50, 95, 99)


@dataclass(frozen=True)
class Target:
    """Whom a client asks."""

    base_url: str
    model: Path
    """The checkpoint: its tokenizer, and the size of its vocabulary."""
    served_name: str
    """What the server calls the model."""


@dataclass(frozen=True)
class ServedEngine:
    """How an engine is served, measured by its own benchmark, and asked for log-probabilities."""

    title: str
    package: str
    """Which must be importable."""
    server_command: Callable[[Options, Path, str], list[str]]
    """Of the checkpoint and a backend; without host and port."""
    server_environment: Callable[[Options, str], dict[str, str]]
    """Of a backend; what only this engine needs."""
    client_name: str
    """Of its benchmark, as it is typed."""
    bench_arguments: Callable[[Options, Target, Round], list[str]]
    load_client: Callable[[], Callable[[list[str]], dict[str, Any]]]
    """Imports its benchmark, which takes long, and returns what runs one measurement."""
    metrics: dict[str, str]
    """Our names, with the unit last, for those of its results."""
    question: Callable[[Target, list[int]], tuple[str, dict[str, Any]]]
    """Path and body of a request for the log-probabilities of a prompt's tokens."""
    read_answer: Callable[[dict[str, Any], list[int]], tuple[list[float], int]]
    """Those of `prompt[1:]`, and the greedy token that follows. Raises RuntimeError where one is
    missing."""
    profiler_arguments: Callable[[Path], list[str]]
    """Of a server that will be told to record its kernels there."""
    profiler_request: Callable[[Path], dict[str, Any] | None]
    """What it is told then."""
    cpu_default_note: str
    """What a report says of the engine's own exchange on a CPU."""


def common_environment() -> dict[str, str]:
    """What is set beside the inherited variables, for servers of any engine and their clients."""
    return {
        "HF_HUB_OFFLINE": "1",
        "TRANSFORMERS_OFFLINE": "1",
        # The client would ask a proxy for this machine.
        "NO_PROXY": "127.0.0.1,localhost",
        "no_proxy": "127.0.0.1,localhost",
    }


@contextmanager
def model_directory(options: Options) -> Iterator[Path]:
    """The given checkpoint, or a random one that is removed in the end: in memory if it fits.

    Raises:
        RuntimeError: it could not be written.
    """
    if options.model is not None:
        yield options.model.resolve()
        return
    num_bytes = RandomMoE().num_bytes if options.device == "cuda" else 0
    fits = SHM_DIR.is_dir() and shutil.disk_usage(SHM_DIR).free > 1.1 * num_bytes
    parent = SHM_DIR if fits else None
    with tempfile.TemporaryDirectory(prefix="ep-backend-serve-", dir=parent) as name:
        directory = Path(name) / "model"
        if options.device == "cpu":
            make_model(directory, TinyMoE())
        else:
            _write_random_model(directory, options.limit_secs)
        yield directory


def _write_random_model(directory: Path, limit_secs: float) -> None:
    """In a process of its own: ours must not hold memory of a GPU beside the servers."""
    program = [sys.executable, "-m", "ep_backend.bench.serve_model", str(directory)]
    try:
        subprocess.run(program, capture_output=True, text=True, check=True, timeout=limit_secs)
    except subprocess.CalledProcessError as e:
        raise RuntimeError(f"the random model was not written: {e.stderr.strip()}") from e
    except subprocess.TimeoutExpired as e:
        raise RuntimeError(f"the random model was not written within {limit_secs:g} s") from e


def versions(*engines: str) -> dict[str, str]:
    """Of what decides how an engine runs; `engines`: packages."""
    names = (*engines, "torch", "transformers", "ep_backend", "nvidia-nccl-cu13", "triton")
    found = {name: _version(name) for name in names}
    return {"python": platform.python_version()} | {k: v for k, v in found.items() if v}


def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def machine() -> dict[str, Any]:
    """Asked of nvidia-smi: asking torch would take memory on a GPU."""
    query = ["nvidia-smi", "--query-gpu=name,driver_version", "--format=csv,noheader"]
    try:
        lines = subprocess.run(query, capture_output=True, text=True, check=True, timeout=20).stdout
        gpus = [line.split(", ") for line in lines.splitlines()]
    except (OSError, subprocess.SubprocessError):
        gpus = []
    return {
        "gpus": [name for name, _ in gpus],
        "driver": gpus[0][1] if gpus else None,
        "cpu": cpu_name(),
        "num_cpus": len(os.sched_getaffinity(0)),
    }


def inherited_environment() -> dict[str, str]:
    """Variables that change what an engine does; nothing that looks like a secret."""
    return {
        name: value
        for name, value in sorted(os.environ.items())
        if name.startswith(RECORDED_PREFIXES) and not any(word in name for word in SECRET_WORDS)
    }
