"""The engines that the serving benchmark knows, and their command lines and environment."""

from __future__ import annotations

from pathlib import Path

from ep_backend.bench.serve_engine import ServedEngine, common_environment
from ep_backend.bench.serve_settings import Options
from ep_backend.bench.serve_sglang import SGLANG
from ep_backend.bench.serve_vllm import VLLM

ENGINES: dict[str, ServedEngine] = {"vllm": VLLM, "sglang": SGLANG}


def server_command(options: Options, model: Path, backend: str) -> list[str]:
    """Without host and port."""
    return ENGINES[options.engine].server_command(options, model, backend)


def server_environment(options: Options, backend: str) -> dict[str, str]:
    """What is set beside the inherited variables; those of `--env` come last."""
    engine = ENGINES[options.engine]
    of_engine = engine.server_environment(options, backend)
    return common_environment() | of_engine | options.environment
