"""How engines are told to serve a tiny model on a CPU in float32, alone or through ep_backend."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Engine:
    """An engine that the demo can serve with."""

    title: str
    program: str
    """What users call it by, for messages."""
    modes: dict[str, str]
    """Modes of the demo, and what the engine is told for each."""
    command: Callable[[Path, int, str, int], list[str]]
    """Of the model, the number of ranks (1: no expert parallelism), an entry of `modes`, and the
    tokens of a rank's step at most; without host and port."""
    environment: dict[str, str]
    binding_variable: str
    """Which takes a core for each rank, `0|1`."""
    num_tokens_variable: str | None = None
    """Which takes the tokens of a rank's low-latency step at most, where no command line does."""
    metrics_path: str | None = None
    """Where it shows the metrics of its processes, ours among them."""
    shares_kv_heads: bool = False
    """On a CPU, ranks must divide the model's key heads, although each computes all of them."""

    def environment_of(self, num_ranks: int, max_num_low_latency_tokens: int) -> dict[str, str]:
        environment = dict(self.environment)
        if num_ranks > 1:
            environment[self.binding_variable] = core_binding(num_ranks)
            if self.num_tokens_variable is not None:
                environment[self.num_tokens_variable] = str(max_num_low_latency_tokens)
        return environment


def core_binding(num_ranks: int) -> str:
    """A core for each rank, in turn. Left to themselves, engines bind the ranks of a host with one
    NUMA node to the same core, or refuse to start them."""
    cores = sorted(os.sched_getaffinity(0))
    return "|".join(str(cores[rank % len(cores)]) for rank in range(num_ranks))


def vllm_command(
    model: Path, num_ranks: int, backend: str, max_num_batched_tokens: int
) -> list[str]:
    """One rank, or data-parallel ranks that share the experts through `backend`."""
    command = [
        str(Path(sys.executable).parent / "vllm"),
        "serve",
        str(model),
        *("--dtype", "float32"),
        *("--max-model-len", "512"),
        *("--max-num-seqs", "16"),
        *("--max-num-batched-tokens", str(max_num_batched_tokens)),
        "--enforce-eager",
        "--no-enable-prefix-caching",
        *("--api-server-count", "1"),
    ]
    if num_ranks > 1:
        command += ["--data-parallel-size", str(num_ranks)]
        command += ["--enable-expert-parallel", "--all2all-backend", backend]
    return command


SGLANG_BACKEND = "ep_backend"


def sglang_command(
    model: Path,
    num_ranks: int,
    deepep_mode: str,
    max_num_batched_tokens: int,
    backend: str = SGLANG_BACKEND,
) -> list[str]:
    """One rank, or data-parallel attention with experts shared through `backend`.

    It is SGLang's engine for GPUs, run in plain PyTorch: its engine for CPUs has no expert
    parallelism.
    """
    command = [
        str(Path(sys.executable).parent / "sglang"),
        "serve",
        *("--model-path", str(model)),
        *("--device", "cpu"),
        *("--dtype", "float32"),
        *("--context-length", "512"),
        *("--max-running-requests", "16"),
        *("--max-total-tokens", "4096"),
        *("--mem-fraction-static", "0.1"),
        # Shared by the ranks of data-parallel attention.
        *("--chunked-prefill-size", str(max_num_batched_tokens * num_ranks)),
        *("--attention-backend", "torch_native"),
        *("--sampling-backend", "pytorch"),
        "--disable-cuda-graph",
        "--disable-overlap-schedule",
        "--disable-radix-cache",
    ]
    if num_ranks > 1:
        command += sglang_ranks(num_ranks, backend)
    if num_ranks > 1 and backend == SGLANG_BACKEND:
        command += ["--deepep-mode", deepep_mode]
        command += ["--deepep-dispatcher-output-dtype", "bf16"]  # not float8: rows as they are
    return command


def sglang_ranks(num_ranks: int, backend: str) -> list[str]:
    """Data-parallel attention; each rank has its part of the experts, whole ones."""
    return [
        *("--tp-size", str(num_ranks), "--dp-size", str(num_ranks), "--ep-size", str(num_ranks)),
        *("--enable-dp-attention", "--enable-dp-lm-head", "--moe-dense-tp-size", "1"),
        *("--moe-a2a-backend", backend),
    ]


VLLM = Engine(
    title="vLLM",
    program="vllm serve",
    modes={
        "low-latency": "ep_backend_low_latency",
        "high-throughput": "ep_backend_high_throughput",
    },
    command=vllm_command,
    environment={
        "VLLM_CPU_KVCACHE_SPACE": "1",  # GiB; the default takes half of the machine for each rank
        "HF_HUB_OFFLINE": "1",
        "VLLM_NO_USAGE_STATS": "1",
        # Two cores for at least four processes. Left to poll without a pause, they hold back the
        # thread that sends tokens: whole answers came in one burst, up to a second late. With 50 us
        # polling itself takes a core; 200 us cost 0.3 ms a step of one rank.
        "EP_BACKEND_VLLM_POLL_US": "200",
    },
    binding_variable="VLLM_CPU_OMP_THREADS_BIND",
    metrics_path="/metrics",
)
SGLANG = Engine(
    title="SGLang",
    program="sglang serve",
    modes={"auto": "auto", "normal": "normal", "low-latency": "low_latency"},
    command=sglang_command,
    environment={
        "HF_HUB_OFFLINE": "1",
        # Of one rank, too: with a thread for every core of the machine, ranks wait for each other.
        "OMP_NUM_THREADS": "1",
    },
    binding_variable="SGLANG_CPU_OMP_THREADS_BIND",
    shares_kv_heads=True,
    num_tokens_variable="SGLANG_DEEPEP_NUM_MAX_DISPATCH_TOKENS_PER_RANK",
)
ENGINES = {"vllm": VLLM, "sglang": SGLANG}
