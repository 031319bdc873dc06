"""Every command line is read by the parser of the program that will get it, with our plugin
loaded; and every variable is one that somebody reads."""

from __future__ import annotations

import argparse
import functools
import importlib.util
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from ep_backend.cli import app
from tests.serving_configs.configs import ROOT, Process, all_processes, servers_of
from tests.support.engine_parsers import parse, sglang_parser, vllm_parser

VLLM_SERVERS, SGLANG_SERVERS = servers_of("vllm"), servers_of("sglang")
origin = lambda process: process.origin  # noqa: E731


def test_there_are_commands() -> None:
    assert len(VLLM_SERVERS) == 8, "six services, two containers of pods"
    assert len(SGLANG_SERVERS) == 6


def misspelt(words: list[str]) -> Iterator[list[str]]:
    """Each flag in turn: without its last letter, with one too many, with two swapped."""
    for i, word in enumerate(words):
        if not word.startswith("--"):
            continue
        name, equals, value = word.partition("=")
        swapped = name[:3] + name[4] + name[3] + name[5:]
        for wrong in {name[:-1], name + "s", swapped} - {name}:
            yield [*words[:i], wrong + equals + value, *words[i + 1 :]]


def assert_typos_are_noticed(parser: argparse.ArgumentParser, words: list[str]) -> None:
    count = 0
    for wrong in misspelt(words):
        with pytest.raises(SystemExit):
            parse(parser, wrong)
        count += 1
    assert count >= 2 * sum(word.startswith("--") for word in words)


@pytest.mark.parametrize("server", VLLM_SERVERS, ids=origin)
def test_vllm_takes_it(server: Process) -> None:
    from_words = parse(vllm_parser(), server.words[2:])

    from vllm.distributed.kv_transfer.kv_connector.factory import KVConnectorFactory
    from vllm.engine.arg_utils import AsyncEngineArgs

    arguments = AsyncEngineArgs.from_cli_args(from_words)
    assert arguments.all2all_backend.startswith("ep_backend_")
    assert arguments.enable_expert_parallel
    assert from_words.model_tag in ("/model", "model")
    if arguments.kv_transfer_config is not None:
        assert arguments.kv_transfer_config.kv_connector in KVConnectorFactory._registry


@pytest.mark.parametrize("server", VLLM_SERVERS, ids=origin)
def test_vllm_refuses_typos(server: Process, capsys: pytest.CaptureFixture[str]) -> None:
    assert_typos_are_noticed(vllm_parser(), server.words[2:])


@pytest.mark.parametrize(
    "word",
    [
        "--all2all-backend=ep_backend_low_latenzy",
        '--kv-transfer-config={"kv_conector":"NixlConnector","kv_role":"kv_both"}',
        '--compilation-config={"cudagraph_mode":"FULL_DECODE"}',
        "--max-num-seqs=many",
    ],
)
def test_vllm_refuses_wrong_values(word: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises((SystemExit, KeyError)):  # KeyError: of vLLM's names of graph modes
        parse(vllm_parser(), ["/model", word])


@pytest.mark.parametrize("server", SGLANG_SERVERS, ids=origin)
def test_sglang_takes_it(server: Process) -> None:
    arguments = parse(sglang_parser(), server.words[2:])
    assert arguments.moe_a2a_backend == "ep_backend"
    assert arguments.model_path in ("/model", "model")


@pytest.mark.parametrize("server", SGLANG_SERVERS, ids=origin)
def test_sglang_refuses_typos(server: Process, capsys: pytest.CaptureFixture[str]) -> None:
    assert_typos_are_noticed(sglang_parser(), server.words[2:])


@pytest.mark.parametrize("server", SGLANG_SERVERS, ids=origin)
def test_steps_of_sglang_fit_the_buffer(server: Process) -> None:
    """Of all ranks together in the options, of one in the variable; with normal kernels for
    prefill, only decode must fit."""
    options = server.options()
    most = int(server.environment.get("SGLANG_DEEPEP_NUM_MAX_DISPATCH_TOKENS_PER_RANK", 128))
    num_ranks = int(options["--dp-size"])
    is_prefill, is_decode = (
        options.get("--disaggregation-mode") == m for m in ("prefill", "decode")
    )
    if not is_prefill:
        assert int(options["--max-running-requests"]) <= most * num_ranks
    if options["--deepep-mode"] == "low_latency" and not is_decode:
        assert int(options["--chunked-prefill-size"]) <= most * num_ranks


ROUTERS = [p for p in all_processes() if any("router" in word for word in p.words[:3])]


def router_parser(process: Process) -> argparse.ArgumentParser:
    module = "vllm_router" if process.words[0] == "vllm-router" else "sglang_router"
    pytest.importorskip(module, reason=f"{module} is not installed: its command was not parsed")
    arguments: Any = importlib.import_module(f"{module}.router_args")
    parser = argparse.ArgumentParser()
    arguments.RouterArgs.add_cli_args(parser, use_router_prefix=False)
    return parser


@pytest.mark.parametrize("router", ROUTERS, ids=origin)
def test_a_router_takes_it_and_refuses_typos(
    router: Process, capsys: pytest.CaptureFixture[str]
) -> None:
    parser = router_parser(router)
    words = [word for word in router.words[1:] if word not in ("-m", "sglang_router.launch_router")]
    parse(parser, words)
    assert_typos_are_noticed(parser, words)


@pytest.mark.parametrize(
    "process", [p for p in all_processes() if p.words[0] == "ep-backend"], ids=origin
)
def test_our_own_commands_exist(process: Process) -> None:
    """With `--help` in the end they are parsed, but not run."""
    result = CliRunner().invoke(app, [*process.words[1:], "--help"])
    assert result.exit_code == 0, result.output


def python_sources(package: str) -> str:
    spec = importlib.util.find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        return ""
    (folder,) = spec.submodule_search_locations
    return "\n".join(path.read_text(errors="replace") for path in Path(folder).rglob("*.py"))


@functools.cache
def readers_of(prefix: str) -> str:
    """Python sources of those who read variables of this prefix."""
    if prefix == "EP_BACKEND":
        folders = [ROOT / "ep_backend", ROOT / "integrations"]
        return "\n".join(path.read_text() for f in folders for path in f.rglob("*.py"))
    packages = {
        "VLLM": ["vllm"],
        "SGLANG": ["sglang"],
        "HF": ["huggingface_hub"],
        "GLOO": ["torch"],
        "NCCL": ["torch"],
        "OMP": ["vllm", "sglang"],
        "PROMETHEUS": ["prometheus_client"],
        "UCX": ["vllm", "sglang"],
    }[prefix]
    return "\n".join(python_sources(package) for package in packages)


def variables_of(prefix: str) -> set[str]:
    names = {name for process in all_processes() for name in process.environment}
    return {name for name in names if name.split("_")[0] == prefix or name.startswith(prefix + "_")}


def test_every_variable_belongs_to_somebody() -> None:
    names = {name for process in all_processes() for name in process.environment}
    prefixes = ("EP_BACKEND", "VLLM", "SGLANG", "HF", "GLOO", "NCCL", "OMP", "PROMETHEUS", "UCX")
    assert set().union(*(variables_of(prefix) for prefix in prefixes)) == names


@pytest.mark.parametrize(
    "prefix", ["EP_BACKEND", "VLLM", "SGLANG", "HF", "GLOO", "NCCL", "OMP", "PROMETHEUS", "UCX"]
)
def test_every_variable_is_read(prefix: str) -> None:
    sources = readers_of(prefix)
    if not sources:
        pytest.skip(f"nobody is installed who reads {prefix}_*: they were not checked")
    unread = {n for n in variables_of(prefix) if re.search(rf"\b{n}\b", sources) is None}
    assert not unread
