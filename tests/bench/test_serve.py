"""`python -m ep_backend.bench.serve`: what it asks for, starts, compares and writes. Servers
themselves are not started here."""

from __future__ import annotations

import json
import math
import shlex
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from tokenizers import Tokenizer

from ep_backend.bench import serve_engine, serve_vllm
from ep_backend.bench.serve_client import ClientFailed, read_metrics, running_client
from ep_backend.bench.serve_engine import PERCENTILES, Target, model_directory
from ep_backend.bench.serve_engines import ENGINES, server_command, server_environment
from ep_backend.bench.serve_gate import (
    NUM_PROMPT_TOKENS,
    NUM_PROMPTS,
    compare,
    fixed_prompts,
    vocab_size_of,
)
from ep_backend.bench.serve_model import RandomMoE, make_random_model
from ep_backend.bench.serve_settings import OURS, Options, Round, parse_arguments
from tests.bench.fake_engine import logprobs_of, values_of

MODEL = Path("/models/m")
TARGET = Target("http://h:1", MODEL, str(MODEL))
ROUND = Round(concurrency=4, num_prompts=16, num_output_tokens=128, seed=4000)
SMALL = RandomMoE(
    num_layers=2,
    hidden=128,
    num_experts=4,
    top_k=2,
    moe_intermediate=32,
    num_heads=4,
    num_kv_heads=2,
    head_dim=16,
    vocab_size=512,
)


# Settings


def test_defaults_go_by_the_device() -> None:
    options = parse_arguments([])
    assert (options.device, options.num_ranks, options.repeats) == ("cuda", 2, 3)
    assert options.backends == ("default", OURS)
    assert options.concurrency == (1, 8, 32, 64, 128)
    cpu = parse_arguments(["--device", "cpu", "--output", "here.json"])
    assert cpu.backends == ("default", OURS)
    assert (cpu.concurrency, cpu.repeats) == ((1, 4), 2)
    assert (options.trace, cpu.trace) == (False, True)
    assert shlex.split(cpu.command)[3:] == ["--device", "cpu"]
    assert parse_arguments(["--engine", "sglang"]).backends == ("default", "ep_backend")


def test_running_servers_are_the_backends_and_are_not_traced(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    line = f"--model {tmp_path} --device cpu --url default=http://a:1 --url x=http://b:2"
    options = parse_arguments(shlex.split(line))
    assert options.backends == ("default", "x")
    assert options.urls == {"default": "http://a:1", "x": "http://b:2"}
    assert not options.trace


def test_everything_can_be_chosen(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    line = (
        f"--engine vllm --ranks 4 --model {tmp_path} --backends default,x_y --concurrency 2,3 "
        "--repeats 5 --prompts-per-slot 7 --limit 60 --output o.json --env A=1=2 --env B= "
        "--server-arguments '--block-size 64' --max-num-batched-tokens 512 --resume --trace"
    )
    options = parse_arguments(shlex.split(line))
    assert (options.num_ranks, options.model, options.repeats) == (4, tmp_path, 5)
    assert (options.backends, options.concurrency) == (("default", "x_y"), (2, 3))
    assert options.environment == {"A": "1=2", "B": ""}
    assert options.server_arguments == ("--block-size", "64")
    assert (options.limit_secs, options.output) == (60.0, Path("o.json"))
    assert (options.resume, options.trace, options.alternate) == (True, True, True)
    assert parse_arguments(["--json", "o.json", "--no-alternate"]).output == Path("o.json")
    assert [options.num_prompts(c) for c in (1, 2)] == [8, 14]
    assert options.log("default-0") == Path("o-default-0.log")


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("--backends a,../b", "'../b' is not a backend's name"),
        ("--backends a,a", "names one twice"),
        ("--concurrency 1,x", "expected numbers"),
        ("--concurrency 0", "--concurrency must be at least 1"),
        ("--ranks 1", "--ranks must be at least 2"),
        ("--repeats 0", "--repeats must be at least 1"),
        ("--output-tokens 1", "--output-tokens must be at least 2"),
        ("--env A", "expected NAME=VALUE"),
        ("--engine vlm", "invalid choice"),
        ("--model /nowhere", "has no config.json"),
        ("--url default", "expected NAME=VALUE"),
        ("--url default=http://h:1", "--url needs --model"),
        ("--model {model} --url a=http://h:1 --backends b", "for a, not among --backends"),
        ("--engine sglang --device cpu --ranks 4", "2 key heads"),
    ],
)
def test_wrong_arguments_end_the_program(
    line: str, expected: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(SystemExit) as end:
        parse_arguments(shlex.split(line.format(model=tmp_path)))
    assert end.value.code == 2
    assert expected in capsys.readouterr().err


def test_servers_alternate_unless_each_is_to_be_started_once() -> None:
    options = Options("", backends=("a", "b"), repeats=2, alternate=False)
    assert [(v.name, v.repeats) for v in options.visits()] == [("a-0", (0, 1)), ("b-0", (0, 1))]
    visits = replace(options, alternate=True).visits()
    assert [(v.name, v.repeats) for v in visits] == [
        ("a-0", (0,)),
        ("b-0", (0,)),
        ("a-1", (1,)),
        ("b-1", (1,)),
    ]


# Command lines


def test_servers_differ_in_their_backend_alone() -> None:
    options = parse_arguments(["--server-arguments", "--block-size 64"])
    default, ours, single = (server_command(options, MODEL, b) for b in ("default", OURS, "single"))
    assert ours[:5] == [sys.executable, "-m", "vllm.entrypoints.cli.main", "serve", str(MODEL)]
    assert values_of(ours, "--all2all-backend") == [OURS]
    assert "--all2all-backend" not in default
    assert [word for word in ours if word not in ("--all2all-backend", OURS)] == default
    asked = parse_arguments(["--max-num-batched-tokens", "512"])
    for backend in ("default", OURS):
        command = server_command(asked, MODEL, backend)
        assert values_of(command, "--max-num-batched-tokens") == ["512"]
    for command in (default, ours):
        assert values_of(command, "--data-parallel-size") == ["2"]
        assert "--enable-expert-parallel" in command
    assert "--data-parallel-size" not in single
    assert "--enable-expert-parallel" not in single
    for command in (default, ours, single):
        assert values_of(command, "--cudagraph-capture-sizes")[-1] == "128"
        assert command[-2:] == ["--block-size", "64"]


def test_a_cpu_serves_as_in_the_demo() -> None:
    options = parse_arguments(["--device", "cpu"])
    ours = server_command(options, MODEL, OURS)
    assert "--enforce-eager" in ours
    assert values_of(ours, "--all2all-backend") == [OURS]
    default = server_command(options, MODEL, "default")
    assert values_of(default, "--all2all-backend") == ["allgather_reducescatter"]
    assert [word for word in default if word != "allgather_reducescatter"] == [
        word for word in ours if word != OURS
    ]
    needs_help = "EP_BACKEND_VLLM_CPU_DEFAULT"
    assert server_environment(options, "default")[needs_help] == "1"
    assert needs_help not in server_environment(options, OURS)
    assert "--data-parallel-size" not in server_command(options, MODEL, "single")
    binding = server_environment(options, OURS)["VLLM_CPU_OMP_THREADS_BIND"]
    assert binding.count("|") == 1


def test_given_variables_come_last_and_flashinfer_is_left_out_where_it_is_not(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    options = Options("", environment={"HF_HUB_OFFLINE": "0", "A": "1"})
    found: Any = None
    monkeypatch.setattr(serve_vllm.util, "find_spec", lambda name: found)
    environment = server_environment(options, "default")
    assert environment["VLLM_USE_FLASHINFER_SAMPLER"] == "0"
    assert (environment["HF_HUB_OFFLINE"], environment["A"]) == ("0", "1")
    found = object()
    assert "VLLM_USE_FLASHINFER_SAMPLER" not in server_environment(options, "default")


def test_no_secret_is_written_down(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VLLM_API_KEY", "hidden")
    monkeypatch.setenv("VLLM_LOGGING_LEVEL", "INFO")
    inherited = serve_engine.inherited_environment()
    assert inherited["VLLM_LOGGING_LEVEL"] == "INFO"
    assert "VLLM_API_KEY" not in inherited


@pytest.mark.parametrize("engine", ENGINES)
def test_backends_get_the_same_prompts_and_measurements_others(engine: str) -> None:
    options = parse_arguments(["--prompts-per-slot", "3", "--engine", engine])

    def arguments(concurrency: int, repeat: int | None) -> list[str]:
        of_round = options.round(concurrency, repeat)
        return ENGINES[engine].bench_arguments(options, TARGET, of_round)

    cell = arguments(32, 1)
    assert values_of(cell, "--num-prompts") == ["96"]
    assert values_of(cell, "--max-concurrency") == ["32"]
    assert values_of(cell, "--random-output-len") == ["128"]
    assert values_of(cell, "--temperature") == ["1"]
    assert cell == arguments(32, 1)
    rounds = [arguments(c, r) for c in (1, 32) for r in (0, 1, None)]
    assert len({values_of(r, "--seed")[0] for r in rounds}) == len(rounds)
    assert values_of(arguments(32, None), "--num-prompts") == ["32"]


def test_a_running_servers_name_for_the_model_is_told_to_vllms_client() -> None:
    named = replace(TARGET, served_name="x")
    arguments = [serve_vllm.bench_arguments(Options(""), t, ROUND) for t in (TARGET, named)]
    assert "--served-model-name" not in arguments[0]
    assert values_of(arguments[1], "--served-model-name") == ["x"]
    assert serve_vllm.question(named, [1, 2])[1]["model"] == "x"


def test_vllm_takes_these_arguments() -> None:
    pytest.importorskip("vllm")
    from vllm.benchmarks.serve import add_cli_args
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    parser = FlexibleArgumentParser()
    add_cli_args(parser)
    options = parse_arguments([])
    given = serve_vllm.bench_arguments(options, TARGET, options.round(4, 0))
    parsed = parser.parse_args(given)
    assert (parsed.num_prompts, parsed.random_input_len, parsed.ignore_eos) == (16, 64, True)
    assert parsed.metric_percentiles == "50,95,99"


# The client's process


@pytest.mark.parametrize("engine", ENGINES)
def test_metrics_need_every_answer(engine: str) -> None:
    served = ENGINES[engine]
    result = {theirs: float(i) for i, theirs in enumerate(served.metrics.values())}
    result |= {"completed": 4, "total_output_tokens": 512}
    metrics = read_metrics(served, result, 4)
    assert metrics["tpot_mean_ms"] == result["mean_tpot_ms"]
    assert metrics["itl_p99_ms"] == result["p99_itl_ms"]
    assert (metrics["num_requests"], metrics["num_tokens"]) == (4, 512)
    needed = {f"{n}_p{p}_ms" for n in ("tpot", "itl", "ttft") for p in PERCENTILES}
    assert needed <= set(metrics)
    failed: dict[str, Any] = result | {"completed": 3, "errors": ["", "Trace\nConnection refused"]}
    with pytest.raises(ClientFailed, match=r"3 of 4 .* answered: Connection refused"):
        read_metrics(served, failed, 4)


CLIENT = """
import json, sys
print("loaded", file=sys.stderr, flush=True)
for line in sys.stdin:
    arguments = json.loads(line)
    if arguments == ["die"]:
        sys.exit("no vLLM")
    answer = {"error": "bad"} if arguments == ["bad"] else {"result": {"got": arguments}}
    print(json.dumps(answer), flush=True)
"""


async def test_one_process_runs_many_measurements_and_its_end_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "fake_client.py").write_text(CLIENT)
    environment = {"PYTHONPATH": str(tmp_path)}
    log = tmp_path / "logs" / "client.log"
    async with running_client("vllm", log, environment, module="fake_client") as client:
        assert await client.run(["a", "b"]) == {"got": ["a", "b"]}
        with pytest.raises(ClientFailed, match="bad"):
            await client.run(["bad"])
        assert await client.run(["c"]) == {"got": ["c"]}
        with pytest.raises(ClientFailed, match=r"(?s)ended by itself.*no vLLM"):
            await client.run(["die"])


# The correctness check


@pytest.mark.parametrize(
    ("change", "outlier", "is_good"),
    [(0.0, 0.0, True), (0.009, 0.05, True), (0.011, 0.0, False), (0.001, 0.07, False)],
)
def test_mean_and_largest_difference_are_limited(
    change: float, outlier: float, is_good: bool
) -> None:
    other = logprobs_of(-9.0 + change)
    other.logprobs[0] = [-9.0 - outlier, *other.logprobs[0][1:]] if outlier else other.logprobs[0]
    difference = compare(logprobs_of(-9.0), other)
    assert difference.is_good == is_good
    assert difference.num_logprobs == 16 * 99
    assert difference.max == pytest.approx(max(change, outlier))


def test_a_nan_is_not_good_and_first_tokens_are_counted() -> None:
    other = logprobs_of(-9.0)
    other.logprobs[3] = [*other.logprobs[3][:-1], math.nan]
    other.first_tokens[2] = 8
    difference = compare(logprobs_of(-9.0), other)
    assert not difference.is_good
    assert difference.num_first_tokens_equal == NUM_PROMPTS - 1


def test_an_answer_is_read_by_the_prompts_tokens() -> None:
    read = lambda choice, prompt: serve_vllm.read_answer({"choices": [choice]}, prompt)  # noqa: E731
    choice: dict[str, Any] = {
        "prompt_logprobs": [
            None,
            {"5": {"logprob": -1.5}, "9": {"logprob": -0.1}},
            {"6": {"logprob": -2.5}},
        ],
        "token_ids": [11],
    }
    assert read(choice, [4, 5, 6]) == ([-1.5, -2.5], 11)
    with pytest.raises(RuntimeError, match="lacks"):
        read(choice, [4, 5, 7])
    with pytest.raises(RuntimeError, match="3 prompt log-probabilities for 4"):
        read(choice, [4, 5, 6, 7])
    with pytest.raises(RuntimeError, match="lacks"):
        read(choice | {"token_ids": None}, [4, 5, 6])


def test_prompts_are_the_same_in_every_run_and_do_not_end() -> None:
    prompts = fixed_prompts(512)
    assert prompts == fixed_prompts(512)
    assert (len(prompts), {len(p) for p in prompts}) == (NUM_PROMPTS, {NUM_PROMPT_TOKENS})
    assert max(max(p) for p in prompts) < 511


# The model


def test_the_random_model_is_whole_and_reproducible(tmp_path: Path) -> None:
    model = make_random_model(tmp_path / "m", SMALL)
    config = json.loads((model / "config.json").read_text())
    assert (config["num_experts"], config["moe_intermediate_size"]) == (4, 32)
    assert (config["head_dim"], config["torch_dtype"]) == (16, "bfloat16")
    index = json.loads((model / "model.safetensors.index.json").read_text())
    weights: dict[str, torch.Tensor] = {}
    for file in sorted(set(index["weight_map"].values())):
        found = load_file(model / file)
        assert all(index["weight_map"][name] == file for name in found)
        weights |= found
    assert set(weights) == set(index["weight_map"])
    assert sum(w.nbytes for w in weights.values()) == SMALL.num_bytes
    for name, weight in weights.items():
        assert weight.dtype == torch.bfloat16
        if "norm" in name:
            assert torch.equal(weight, torch.ones_like(weight))
        else:
            assert 0.015 < weight.float().std().item() < 0.025, name
    gate = "model.layers.{}.mlp.gate.weight"
    assert not torch.equal(weights[gate.format(0)], weights[gate.format(1)])
    again = make_random_model(tmp_path / "again", SMALL)
    for path in model.iterdir():
        assert (again / path.name).read_bytes() == path.read_bytes()


def test_random_tokens_survive_being_text(tmp_path: Path) -> None:
    model = make_random_model(tmp_path, replace(SMALL, num_layers=1))
    tokenizer = Tokenizer.from_file(str(model / "tokenizer.json"))
    prompt = fixed_prompts(SMALL.vocab_size)[0]
    assert tokenizer.encode(tokenizer.decode(prompt)).ids == prompt


def test_a_model_that_does_not_say_how_many_tokens_it_knows_is_told(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"text_config": {"vocab_size": 512}}')
    with pytest.raises(RuntimeError, match=r"config\.json has no vocab_size"):
        vocab_size_of(tmp_path)


def test_the_default_model_has_30_gb() -> None:
    assert RandomMoE().num_bytes == pytest.approx(30e9, rel=0.03)


def test_a_written_model_is_removed_and_a_given_one_is_not(tmp_path: Path) -> None:
    options = Options("", device="cpu")
    with model_directory(options) as written:
        assert (written / "config.json").exists()
    assert not written.exists()
    with model_directory(replace(options, model=tmp_path)) as given:
        assert given == tmp_path
    assert tmp_path.exists()
