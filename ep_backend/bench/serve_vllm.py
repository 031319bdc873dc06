"""vLLM in the serving benchmark: `vllm serve`, `vllm bench serve`, prompt log-probabilities."""

from __future__ import annotations

import sys
from collections.abc import Callable
from importlib import util
from pathlib import Path
from typing import Any

from ep_backend.bench.demo_engines import VLLM as ON_CPU
from ep_backend.bench.demo_engines import core_binding, vllm_command
from ep_backend.bench.serve_engine import (
    CPU_BATCHED_TOKENS,
    GRAPH_SIZES,
    MAX_MODEL_TOKENS,
    NUM_MAX_SEQS,
    PERCENTILES,
    ServedEngine,
    Target,
)
from ep_backend.bench.serve_settings import DEFAULT, SINGLE, Options, Round

# As a module: the `vllm` script is not there where vLLM is only on PYTHONPATH.
PROGRAM = (sys.executable, "-m", "vllm.entrypoints.cli.main")
# What vLLM takes when it is not told, which the demo's command line spells out.
CPU_DEFAULT = "allgather_reducescatter"
METRICS = {
    **{f"{name}_mean_ms": f"mean_{name}_ms" for name in ("tpot", "itl")},
    **{f"{n}_p{p}_ms": f"p{p}_{n}_ms" for n in ("tpot", "itl", "ttft") for p in PERCENTILES},
    "output_tokens_per_sec": "output_throughput",
    "duration_secs": "duration",
}


def server_command(options: Options, model: Path, backend: str) -> list[str]:
    if options.device == "cpu":
        command = vllm_command(
            model,
            num_ranks=1 if backend == SINGLE else options.num_ranks,
            backend=CPU_DEFAULT if backend == DEFAULT else backend,
            max_num_batched_tokens=options.max_num_batched_tokens or CPU_BATCHED_TOKENS,
        )
        return [*PROGRAM, *command[1:], *options.server_arguments]
    command = [
        *(*PROGRAM, "serve", str(model)),
        *("--max-model-len", str(MAX_MODEL_TOKENS)),
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
    environment = {"VLLM_NO_USAGE_STATS": "1"}
    if util.find_spec("flashinfer") is None:
        environment["VLLM_USE_FLASHINFER_SAMPLER"] = "0"  # else vLLM imports it, and ends
    if options.device == "cpu":
        environment |= ON_CPU.environment
        environment[ON_CPU.binding_variable] = core_binding(
            1 if backend == SINGLE else options.num_ranks
        )
        if backend == DEFAULT:
            environment["EP_BACKEND_VLLM_CPU_DEFAULT"] = "1"
    return environment


def bench_arguments(options: Options, target: Target, of_round: Round) -> list[str]:
    return [
        *("--backend", "vllm", "--base-url", target.base_url, "--model", str(target.model)),
        *(
            ("--served-model-name", target.served_name)
            if target.served_name != str(target.model)
            else ()
        ),
        *("--dataset-name", "random"),
        *("--random-input-len", str(options.num_input_tokens)),
        *("--random-output-len", str(of_round.num_output_tokens)),
        *("--random-range-ratio", "0"),
        *("--num-prompts", str(of_round.num_prompts)),
        *("--max-concurrency", str(of_round.concurrency)),
        # Greedy answers of a random model fall into cycles, which few experts serve.
        *("--temperature", "1", "--ignore-eos"),
        *("--seed", str(of_round.seed)),
        *("--percentile-metrics", "ttft,tpot,itl"),
        *("--metric-percentiles", ",".join(map(str, PERCENTILES))),
        "--disable-tqdm",
    ]


def load_client() -> Callable[[list[str]], dict[str, Any]]:
    from vllm.benchmarks import serve
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    parser = FlexibleArgumentParser()
    serve.add_cli_args(parser)
    return lambda arguments: serve.main(parser.parse_args(arguments))


def question(target: Target, prompt: list[int]) -> tuple[str, dict[str, Any]]:
    return "/v1/completions", {
        "model": target.served_name,
        "prompt": prompt,
        "max_tokens": 1,
        "temperature": 0.0,
        "ignore_eos": True,
        "prompt_logprobs": 1,
        "return_token_ids": True,
    }


def read_answer(answer: dict[str, Any], prompt: list[int]) -> tuple[list[float], int]:
    choice = answer["choices"][0]
    entries = choice.get("prompt_logprobs") or []
    if len(entries) != len(prompt):
        raise RuntimeError(f"{len(entries)} prompt log-probabilities for {len(prompt)} tokens")
    try:
        pairs = zip(entries[1:], prompt[1:], strict=True)
        logprobs = [entry[str(token)]["logprob"] for entry, token in pairs]
        return logprobs, choice["token_ids"][0]
    except (KeyError, IndexError, TypeError) as e:
        raise RuntimeError(f"an answer lacks a log-probability or its token: {e!r}") from e


def profiler_arguments(trace_dir: Path) -> list[str]:
    """Nothing is recorded before the server is told to."""
    return [
        *("--profiler-config.profiler", "torch"),
        *("--profiler-config.torch_profiler_dir", str(trace_dir)),
        "--profiler-config.torch_profiler_with_stack=false",
    ]


VLLM = ServedEngine(
    title="vLLM",
    package="vllm",
    server_command=server_command,
    server_environment=server_environment,
    client_name="vllm bench serve",
    bench_arguments=bench_arguments,
    load_client=load_client,
    metrics=METRICS,
    question=question,
    read_answer=read_answer,
    profiler_arguments=profiler_arguments,
    profiler_request=lambda trace_dir: None,
    cpu_default_note=(
        "default, on a CPU: vLLM's allgather_reducescatter with its own experts. Alone, vLLM fails "
        "there at the first request; ep_backend's plug-in supplies gathers of uneven sizes over "
        "gloo, and local expert ids. ep_backend_low_latency runs with other experts, of the "
        "batched format."
    ),
)
