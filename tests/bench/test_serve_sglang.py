"""SGLang in the serving benchmark: command lines as its parsers read them, and its answers."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest

from ep_backend.bench import serve_sglang
from ep_backend.bench.serve_engine import Target
from ep_backend.bench.serve_engines import server_command, server_environment
from ep_backend.bench.serve_settings import parse_arguments
from tests.bench.fake_engine import values_of
from tests.support.engine_parsers import parse, sglang_parser

MODEL = Path("/models/m")
TARGET = Target("http://h:1", MODEL, str(MODEL))


@pytest.mark.parametrize("device", ["cpu", "cuda"])
@pytest.mark.parametrize("backend", ["default", "ep_backend", "single"])
def test_sglang_reads_its_servers_flags(device: str, backend: str) -> None:
    options = parse_arguments(["--engine", "sglang", "--device", device])
    command = server_command(options, MODEL, backend)
    assert command[1:3] == ["-m", "sglang.launch_server"]
    parsed = parse(sglang_parser(), command[3:])
    assert parsed.tp_size == parsed.ep_size == (1 if backend == "single" else 2)
    exchange = {"default": "none", "ep_backend": "ep_backend", "single": "none"}[backend]
    assert (parsed.moe_a2a_backend, parsed.disable_radix_cache) == (exchange, True)


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_sglangs_servers_differ_in_their_exchange_alone(device: str) -> None:
    options = parse_arguments(["--engine", "sglang", "--device", device, "--ranks", "2"])
    default, ours = (server_command(options, MODEL, b) for b in ("default", "ep_backend"))
    of_ours = {"--deepep-mode", "--deepep-dispatcher-output-dtype", "--moe-runner-backend"}
    added = {word for word in ours if word.startswith("--")} - set(default)
    assert added <= of_ours
    for flag in (word for word in default if word.startswith("--")):
        if flag != "--moe-a2a-backend":
            assert values_of(ours, flag) == values_of(default, flag)
    needs_help = "EP_BACKEND_SGLANG_CPU_DEFAULT"
    assert (needs_help in server_environment(options, "default")) == (device == "cpu")
    environment = server_environment(options, "ep_backend")
    assert needs_help not in environment
    # What goes through a rank's low-latency buffer must fit it: on a GPU decode steps alone.
    num_most = int(environment["SGLANG_DEEPEP_NUM_MAX_DISPATCH_TOKENS_PER_RANK"])
    of_both = "--max-running-requests" if device == "cuda" else "--chunked-prefill-size"
    assert int(values_of(ours, of_both)[0]) == 2 * num_most
    if device == "cuda":
        assert max(map(int, values_of(ours, "--cuda-graph-bs-decode"))) <= num_most


def test_sglang_takes_these_arguments_and_its_result_is_read(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Through `sglang.bench_serving`'s command line, without a server."""
    serving = pytest.importorskip("sglang.benchmark.serving")
    asked = []

    def run_benchmark(arguments: Any) -> None:
        asked.append(arguments)
        assert arguments.output_details, "which errors are part of"
        Path(arguments.output_file).write_text(json.dumps({"completed": len(asked)}) + "\n")

    monkeypatch.setattr(serving, "run_benchmark", run_benchmark)
    monkeypatch.setattr(sys, "argv", sys.argv)
    options = parse_arguments(["--engine", "sglang"])
    given = serve_sglang.bench_arguments(options, TARGET, options.round(4, 0))
    run = serve_sglang.load_client()
    with pytest.warns(FutureWarning, match="sglang.benchmark.serving"):
        assert [run(given)["completed"], run(given)["completed"]] == [1, 2]
    assert (asked[0].num_prompts, asked[0].random_input_len, asked[0].temperature) == (16, 64, 1.0)
    assert (asked[0].tokenize_prompt, asked[0].disable_ignore_eos) == (True, False)
    assert (asked[0].base_url, asked[0].warmup_requests) == ("http://h:1", 0)


def test_an_answer_of_sglang_is_read_by_the_prompts_tokens() -> None:
    entries = [[None, 4, None], [-1.5, 5, None], [-2.5, 6, None]]
    answer: dict[str, Any] = {"output_ids": [11], "meta_info": {"input_token_logprobs": entries}}
    read = serve_sglang.read_answer
    assert read(answer, [4, 5, 6]) == ([-1.5, -2.5], 11)
    for wrong in ([4, 5, 7], [4, 5, 6, 7]):
        with pytest.raises(RuntimeError, match="3 prompt log-probabilities, not of the prompt's"):
            read(answer, wrong)
    with pytest.raises(RuntimeError, match="lacks"):
        read(answer | {"output_ids": []}, [4, 5, 6])
    entries[1][0] = None
    with pytest.raises(RuntimeError, match="lacks"):
        read(answer, [4, 5, 6])
    with pytest.raises(RuntimeError, match="0 prompt log-probabilities"):
        read({"output_ids": [11], "meta_info": {}}, [4, 5, 6])
