"""Command lines and environment of the servers, and what they run on."""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import metadata, util
from pathlib import Path
from typing import Any

from ep_backend.bench.demo_engines import VLLM as VLLM_ON_CPU
from ep_backend.bench.demo_engines import core_binding, vllm_command
from ep_backend.bench.model import TinyMoE, make_model
from ep_backend.bench.serve_model import RandomMoE
from ep_backend.bench.serve_settings import DEFAULT, SINGLE, Options
from ep_backend.bench.server import SHM_DIR
from ep_backend.tuning.site import cpu_name

# As a module: the `vllm` script is not there where vLLM is only on PYTHONPATH.
VLLM = (sys.executable, "-m", "vllm.entrypoints.cli.main")
GRAPH_SIZES = (1, 2, 4, 8, 16, 24, 32, 48, 64, 96, 128)
NUM_MAX_SEQS = GRAPH_SIZES[-1]
CPU_BATCHED_TOKENS = 256
# What vLLM takes when it is not told, which the demo's command line spells out.
CPU_DEFAULT = "allgather_reducescatter"
RECORDED_PREFIXES = ("VLLM_", "NCCL_", "GLOO_", "TP_", "CUDA_", "TORCH_", "EP_BACKEND_", "OMP_")
SECRET_WORDS = ("KEY", "TOKEN", "SECRET", "PASSWORD")


def server_command(options: Options, model: Path, backend: str) -> list[str]:
    """`vllm serve`, without host and port."""
    if options.device == "cpu":
        command = vllm_command(
            model,
            num_ranks=1 if backend == SINGLE else options.num_ranks,
            backend=CPU_DEFAULT if backend == DEFAULT else backend,
            max_num_batched_tokens=options.max_num_batched_tokens or CPU_BATCHED_TOKENS,
        )
        return [*VLLM, *command[1:], *options.server_arguments]
    command = [
        *(*VLLM, "serve", str(model)),
        *("--max-model-len", "2048"),
        *("--max-num-seqs", str(NUM_MAX_SEQS)),
        *("--cudagraph-capture-sizes", *map(str, GRAPH_SIZES)),
        "--no-enable-prefix-caching",  # prompts are random, but a repeat's are not to be found
    ]
    if backend != SINGLE:
        command += ["--data-parallel-size", str(options.num_ranks), "--enable-expert-parallel"]
    if backend not in (SINGLE, DEFAULT):
        command += ["--all2all-backend", backend]
    if options.max_num_batched_tokens is not None:
        command += ["--max-num-batched-tokens", str(options.max_num_batched_tokens)]
    return command + list(options.server_arguments)


def server_environment(options: Options, backend: str) -> dict[str, str]:
    """What is set beside the inherited variables; those of `--env` come last."""
    environment = {
        "HF_HUB_OFFLINE": "1",
        "TRANSFORMERS_OFFLINE": "1",
        "VLLM_NO_USAGE_STATS": "1",
        # The client would ask a proxy for this machine.
        "NO_PROXY": "127.0.0.1,localhost",
        "no_proxy": "127.0.0.1,localhost",
    }
    if util.find_spec("flashinfer") is None:
        environment["VLLM_USE_FLASHINFER_SAMPLER"] = "0"  # else vLLM imports it, and ends
    if options.device == "cpu":
        environment |= VLLM_ON_CPU.environment
        environment[VLLM_ON_CPU.binding_variable] = core_binding(
            1 if backend == SINGLE else options.num_ranks
        )
        if backend == DEFAULT:
            environment["EP_BACKEND_VLLM_CPU_DEFAULT"] = "1"
    return environment | options.environment


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


def versions() -> dict[str, str]:
    names = ("vllm", "torch", "transformers", "ep_backend", "nvidia-nccl-cu13", "triton")
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
