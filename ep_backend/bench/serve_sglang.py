"""SGLang in the serving benchmark: `sglang serve`, `sglang.bench_serving`, input log-probabilities.

On GPUs SGLang 0.5.19 has served with the flags that are here, and some more, as its newest kernels
were not at hand (NUMBERS.md).
"""

from __future__ import annotations

import json
import runpy
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ep_backend.bench.demo_engines import SGLANG as ON_CPU
from ep_backend.bench.demo_engines import sglang_command, sglang_ranks
from ep_backend.bench.serve_engine import (
    CPU_BATCHED_TOKENS,
    GRAPH_SIZES,
    MAX_MODEL_TOKENS,
    NUM_MAX_SEQS,
    ServedEngine,
    Target,
)
from ep_backend.bench.serve_settings import DEFAULT, OURS_OF, SINGLE, Options, Round

# As a module: the `sglang` script is not there where SGLang is only on PYTHONPATH.
PROGRAM = (sys.executable, "-m", "sglang.launch_server")
CLIENT = "sglang.bench_serving"
OURS = OURS_OF["sglang"]
NO_EXCHANGE = "none"
"""What SGLang calls its own: all ranks' tokens go everywhere."""
GPU_BATCHED_TOKENS = 2048
"""Of a rank's prefill step."""
METRICS = {
    **{f"{name}_mean_ms": f"mean_{name}_ms" for name in ("tpot", "itl")},
    **{f"{name}_p50_ms": f"median_{name}_ms" for name in ("tpot", "itl", "ttft")},
    **{f"{n}_p{p}_ms": f"p{p}_{n}_ms" for n in ("tpot", "itl", "ttft") for p in (95, 99)},
    "output_tokens_per_sec": "output_throughput",
    "duration_secs": "duration",
}


def server_command(options: Options, model: Path, backend: str) -> list[str]:
    num_ranks = 1 if backend == SINGLE else options.num_ranks
    exchange = NO_EXCHANGE if backend == DEFAULT else backend
    if options.device == "cpu":
        command = sglang_command(
            model,
            num_ranks,
            "auto",
            options.max_num_batched_tokens or CPU_BATCHED_TOKENS,
            backend=exchange,
        )
        return [*PROGRAM, *command[2:], *options.server_arguments]
    num_batched_tokens = options.max_num_batched_tokens or GPU_BATCHED_TOKENS
    command = [
        *(*PROGRAM, "--model-path", str(model)),
        *("--context-length", str(MAX_MODEL_TOKENS)),
        *("--max-running-requests", str(NUM_MAX_SEQS * num_ranks)),
        *("--cuda-graph-bs-decode", *map(str, GRAPH_SIZES)),
        # Shared by the ranks of data-parallel attention.
        *("--chunked-prefill-size", str(num_batched_tokens * num_ranks)),
        "--disable-radix-cache",  # prompts are random, but a repeat's are not to be found
    ]
    if num_ranks > 1:
        command += sglang_ranks(num_ranks, exchange)
    if backend == OURS:
        command += ["--deepep-mode", "auto"]
    return command + list(options.server_arguments)


def server_environment(options: Options, backend: str) -> dict[str, str]:
    num_ranks = 1 if backend == SINGLE else options.num_ranks
    if options.device == "cpu":
        environment = ON_CPU.environment_of(
            num_ranks, options.max_num_batched_tokens or CPU_BATCHED_TOKENS
        )
        if backend == DEFAULT:
            environment["EP_BACKEND_SGLANG_CPU_DEFAULT"] = "1"
        return environment
    assert ON_CPU.num_tokens_variable is not None
    # Of a step through low-latency kernels: more are prefilled through normal ones.
    return {ON_CPU.num_tokens_variable: str(NUM_MAX_SEQS)} if backend == OURS else {}


def bench_arguments(options: Options, target: Target, of_round: Round) -> list[str]:
    return [
        *("--backend", "sglang", "--base-url", target.base_url, "--model", str(target.model)),
        # Token ids as they are: text would be other tokens when it is read again.
        *("--dataset-name", "random-ids", "--tokenize-prompt"),
        *("--random-input-len", str(options.num_input_tokens)),
        *("--random-output-len", str(of_round.num_output_tokens)),
        *("--random-range-ratio", "1"),  # all of the same length
        *("--num-prompts", str(of_round.num_prompts)),
        *("--max-concurrency", str(of_round.concurrency)),
        # Greedy answers of a random model fall into cycles, which few experts serve.
        *("--temperature", "1"),
        *("--seed", str(of_round.seed)),
        *("--warmup-requests", "0", "--ready-check-timeout-sec", "0"),  # we have done both
        "--disable-tqdm",
    ]


def load_client() -> Callable[[list[str]], dict[str, Any]]:
    import sglang.benchmark.serving  # noqa: F401, which `CLIENT` imports

    return run_client


def run_client(arguments: list[str]) -> dict[str, Any]:
    """`python -m sglang.bench_serving`, in this process; returns the line that it writes."""
    with tempfile.TemporaryDirectory() as directory:
        output = Path(directory) / "result.jsonl"
        sys.argv = [CLIENT, *arguments, "--output-file", str(output), "--output-details"]
        runpy.run_module(CLIENT, run_name="__main__")
        return json.loads(output.read_text())


def question(target: Target, prompt: list[int]) -> tuple[str, dict[str, Any]]:
    return "/generate", {
        "input_ids": prompt,
        "sampling_params": {"max_new_tokens": 1, "temperature": 0.0, "ignore_eos": True},
        "return_logprob": True,
        "logprob_start_len": 0,
    }


def read_answer(answer: dict[str, Any], prompt: list[int]) -> tuple[list[float], int]:
    entries = answer.get("meta_info", {}).get("input_token_logprobs") or []
    if [token for _, token, *_ in entries] != prompt:
        raise RuntimeError(f"{len(entries)} prompt log-probabilities, not of the prompt's tokens")
    logprobs = [logprob for logprob, *_ in entries[1:]]
    if None in logprobs or not answer.get("output_ids"):
        raise RuntimeError("an answer lacks a log-probability or its token")
    return logprobs, answer["output_ids"][0]


def profiler_request(trace_dir: Path) -> dict[str, Any]:
    return {
        "output_dir": str(trace_dir),
        "activities": ["CPU", "GPU"],
        "with_stack": False,
        "record_shapes": False,
    }


SGLANG = ServedEngine(
    title="SGLang",
    package="sglang",
    server_command=server_command,
    server_environment=server_environment,
    client_name=f"python -m {CLIENT}",
    bench_arguments=bench_arguments,
    load_client=load_client,
    metrics=METRICS,
    question=question,
    read_answer=read_answer,
    profiler_arguments=lambda trace_dir: [],
    profiler_request=profiler_request,
    cpu_default_note=(
        "default, on a CPU: SGLang's own exchange (--moe-a2a-backend none, as many parts of the "
        "experts as ranks): every rank gathers all ranks' tokens and gets the sums of its own by a "
        "reduce-scatter. Alone, SGLang fails there in its first forward pass; ep_backend's plug-in "
        "supplies copies, the reduce-scatter over gloo and experts in PyTorch. Experts of both "
        "backends are that PyTorch code."
    ),
)
