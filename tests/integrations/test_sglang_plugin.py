"""The plugin against SGLang's real classes: the flag, the guards, the real `DeepEPDispatcher`."""

from __future__ import annotations

import argparse
import itertools
import os
import subprocess
import sys
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch

pytest.importorskip("sglang", reason="SGLang is not installed")

import ep_backend_sglang
from ep_backend_sglang import arguments, buffer, choice, cpu, dispatcher
from ep_backend_sglang.patching import UnsupportedSGLang
from sglang.srt.layers.moe.token_dispatcher import deepep
from sglang.srt.server_args import ServerArgs

from ep_backend import Group, deep_ep, virtual_world
from tests.integrations import sglang_ranks
from tests.support.processes import RankProcesses
from tests.support.scenario import Scenario
from tests.support.shapes import Shape

FLOAT8 = torch.float8_e4m3fn


@pytest.fixture(scope="module", autouse=True)
def _registered() -> None:
    ep_backend_sglang.register()
    ep_backend_sglang.register()  # idempotent


@pytest.fixture(autouse=True)
def _not_chosen_yet(monkeypatch: pytest.MonkeyPatch) -> None:
    """Choosing lasts as long as a process; here it ends with each test."""
    monkeypatch.delenv(choice.VARIABLE, raising=False)
    for name in ("Buffer", "Config", "use_deepep"):
        monkeypatch.setattr(deepep, name, None, raising=False)
    monkeypatch.setattr(torch.cuda, "get_device_properties", torch.cuda.get_device_properties)


def arguments_of(**fields: Any) -> Any:
    return ServerArgs(
        model_path="dummy",
        **({"moe_a2a_backend": choice.NAME, "deepep_mode": "low_latency"} | fields),
    )


def test_flag_is_a_choice_of_the_real_parser() -> None:
    parsers = [argparse.ArgumentParser() for _ in range(2)]
    for parser in parsers:
        ServerArgs.add_cli_args(parser)
    command = ["--model-path", "dummy"]
    for parser in parsers:
        for flag in ("--moe-a2a-backend", "--speculative-moe-a2a-backend"):
            for backend in (choice.NAME, choice.BUILT_IN):
                parsed = parser.parse_args([*command, flag, backend])
                assert getattr(parsed, flag[2:].replace("-", "_")) == backend
            with pytest.raises(SystemExit):
                parser.parse_args([*command, flag, "ep_backend_typo"])
    choices = [
        next(a.choices for a in parser._actions if a.dest == "speculative_moe_a2a_backend")
        for parser in parsers
    ]
    assert choices[0] == choices[1], "the second parser got the name once, too"


def test_the_command_line_resolves_to_deepep_with_our_buffer() -> None:
    parser = argparse.ArgumentParser()
    ServerArgs.add_cli_args(parser)
    command = "--model-path dummy --moe-a2a-backend ep_backend --deepep-mode low_latency"
    record = ServerArgs.from_cli_args(parser.parse_args(command.split()))
    record.resolve_once()
    assert record.moe_a2a_backend == choice.BUILT_IN
    assert deepep.Buffer is buffer.Buffer
    assert deepep.use_deepep is True
    assert choice.is_ours(), "the processes that this one starts are told"
    record.resolve_once()  # children do so with what they were given


def test_with_another_backend_nothing_is_replaced() -> None:
    for backend in ("none", choice.BUILT_IN):
        arguments_of(moe_a2a_backend=backend, deepep_mode="auto").resolve_once()
    assert deepep.Buffer is None
    assert not choice.is_ours()


def test_a_draft_model_may_be_the_only_one_that_exchanges() -> None:
    record = arguments_of(moe_a2a_backend="none", speculative_moe_a2a_backend=choice.NAME)
    record.resolve_once()
    assert record.moe_a2a_backend == "none"
    assert record.speculative_moe_a2a_backend == choice.BUILT_IN
    assert deepep.Buffer is buffer.Buffer


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"deepep_mode": "auto"}, "'auto', which needs normal kernels .* --deepep-mode low_lat"),
        ({"deepep_mode": "normal"}, "'normal', which needs normal kernels"),
        ({"deepep_config": "{}"}, "--deepep-config tunes normal kernels"),
        ({"enable_single_batch_overlap": True}, "--enable-single-batch-overlap .* Leave it out"),
        ({"speculative_moe_a2a_backend": choice.BUILT_IN}, "one buffer for both"),
    ],
)
def test_what_is_missing_stops_the_server(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        arguments_of(**fields).resolve_once()
    assert not choice.is_ours()


def test_deepep_after_ours_in_one_process_is_refused() -> None:
    arguments_of().resolve_once()
    with pytest.raises(ValueError, match="start the other in a new process"):
        arguments_of(moe_a2a_backend=choice.BUILT_IN).resolve_once()


@pytest.mark.parametrize(
    ("part", "target"),
    [
        (arguments, "sglang.srt.server_args.ServerArgs.resolve_once"),
        (arguments, "sglang.srt.server_args.ServerArgs.add_cli_args"),
        (dispatcher, f"{dispatcher.PLACE}.DeepEPBuffer.get_deepep_buffer"),
        (dispatcher, f"{dispatcher.PLACE}.DeepEPConfig.__init__"),
        (dispatcher, f"{dispatcher.PLACE}._DeepEPDispatcherImplBase.__init__"),
        (dispatcher, f"{dispatcher.PLACE}._DeepEPDispatcherImplLowLatency"),
        (cpu, f"{dispatcher.PLACE}.DeepEPBuffer.get_deepep_buffer"),
    ],
    ids=lambda value: value if isinstance(value, str) else value.__name__,
)
def test_a_vanished_target_stops_the_plugin_with_the_supported_versions(
    part: Any, target: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delattr(target)
    with pytest.raises(UnsupportedSGLang, match=r"Supported: SGLang 0\.5\.19 to 0\.5\.23") as e:
        part.check()
    assert target.rsplit(".", 1)[1] in str(e.value)


def test_a_dispatcher_that_takes_its_buffer_elsewhere_is_noticed(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def get_deepep_buffer(group: Any, num_max_dispatch_tokens_per_rank: int) -> None: ...

    monkeypatch.setattr(deepep.DeepEPBuffer, "get_deepep_buffer", get_deepep_buffer)
    with pytest.raises(UnsupportedSGLang, match="does not use the global 'Buffer'"):
        arguments_of().resolve_once()
    assert not choice.is_ours()


LOAD_PLUGINS = "from sglang.srt.plugins import load_plugins; load_plugins(); "


def run_python(program: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-W", "ignore", "-c", program],
        env=os.environ | environment,
        capture_output=True,
        text=True,
        check=False,
    )


def test_an_error_of_the_plugin_ends_the_process() -> None:
    """SGLang swallows exceptions of plugins: here is the real loader."""
    program = "from sglang.srt.server_args import ServerArgs; del ServerArgs.resolve_once; "
    ended = run_python(program + LOAD_PLUGINS + "print('goes on')")
    assert ended.returncode == 1
    assert "goes on" not in ended.stdout
    assert "ep_backend's plugin stops this process" in ended.stderr
    assert "lacks 'resolve_once'. Supported: SGLang" in ended.stderr


def test_a_child_of_a_server_has_our_buffer() -> None:
    program = (
        "from sglang.srt.layers.moe.token_dispatcher import deepep; "
        "print(deepep.Buffer.__module__, deepep.use_deepep)"
    )
    child = run_python(LOAD_PLUGINS + program, **{choice.VARIABLE: "1"})
    assert child.stdout.split() == ["ep_backend_sglang.buffer", "True"], child.stderr


def test_on_a_gpu_the_cpu_module_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    before = torch.cuda.get_device_properties
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    cpu.check()
    cpu.install()
    assert torch.cuda.get_device_properties is before


def test_a_group_of_gpus_meets_through_its_gloo_group(monkeypatch: pytest.MonkeyPatch) -> None:
    from sglang.srt.distributed import parallel_state

    nccl, gloo, other = (SimpleNamespace(name=name) for name in ("nccl", "gloo", "nccl"))
    pair = SimpleNamespace(device_group=nccl, cpu_group=gloo)
    monkeypatch.setattr(buffer.dist, "get_backend", lambda group: group.name)
    monkeypatch.setattr(parallel_state, "get_tp_group", lambda: pair)
    assert buffer.gloo_group_of(nccl) is gloo
    assert buffer.gloo_group_of(gloo) is gloo
    with pytest.raises(ValueError, match="ranks need one to meet"):
        buffer.gloo_group_of(other)


def test_what_sglang_knows_beside_deepep_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(buffer, "gloo_group_of", lambda group: group)

    def rank_main(group: Group) -> None:
        ours = buffer.Buffer(group, low_latency_mode=True, allow_mnnvl=True, use_fabric=True)
        assert isinstance(ours, deep_ep.Buffer)
        x, idx = torch.zeros(2, 16), torch.zeros(2, 1, dtype=torch.int64)
        with pytest.raises(NotImplementedError, match="--deepep-dispatcher-output-dtype bf16"):
            ours.low_latency_dispatch(x, idx, 2, 2, use_fp8=False, use_nvfp4=True)

    virtual_world(1).run(rank_main)
    with pytest.raises(NotImplementedError, match="normal kernels"):
        buffer.Config(num_sms=20)


SHAPES = {
    "bf16": Shape(2, reduction="source"),
    "float32": Shape(2, dtype=torch.float32, hidden=33, reduction="source"),
    "fp8": Shape(2, hidden=256, dispatch_dtype=FLOAT8, reduction="source"),
}


def scenario_of(shape: Shape) -> Scenario:
    """Every rank has tokens, then the last has none, then some slots are masked."""
    most = shape.num_max_tokens_per_rank
    return (
        Scenario(shape)
        .add("uniform", [most, most - 2], seed=0)
        .add("skewed", [most - 1, 0], seed=1)
        .add("masked", [1, most], seed=2)
    )


@pytest.fixture(scope="module")
def ranks() -> Iterator[RankProcesses]:
    with RankProcesses(2) as processes:
        yield processes


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES.keys())
def test_real_dispatcher_equals_the_reference(ranks: RankProcesses, shape: Shape) -> None:
    buffers = ranks.run(sglang_ranks.exchange, scenario_of(shape))
    assert buffers == ["ep_backend_sglang.buffer.Buffer"] * 2


def test_a_step_with_too_many_tokens_says_what_to_set(ranks: RankProcesses) -> None:
    ranks.start(sglang_ranks.too_many_tokens, scenario_of(SHAPES["bf16"]))
    for answer in ranks.answers():
        assert answer.error_type == "ValueError"
        assert "a step has 12 tokens on this rank, but dispatch takes at most 6" in answer.error
        assert "--chunked-prefill-size" in answer.error


def most_in_flight(log: list[str], operation: str) -> int:
    sends = [f"{operation}_a" in line for line in log if operation in line]
    return max(itertools.accumulate(1 if is_send else -1 for is_send in sends))


@pytest.mark.parametrize(("is_decode", "most"), [(False, 2), (True, 1)], ids=["prefill", "decode"])
def test_two_batch_overlap_in_the_order_of_sglang(
    ranks: RankProcesses, is_decode: bool, most: int
) -> None:
    logs = ranks.run(sglang_ranks.overlap_two_batches, scenario_of(SHAPES["bf16"]), is_decode)
    assert logs[0] == logs[1]
    for operation in ("dispatch", "combine"):
        assert most_in_flight(logs[0], operation) == most
        for half in "ab":
            parts = [line for line in logs[0] if operation in line and line.endswith(half)]
            assert parts == [f"{operation}_a {half}", f"{operation}_b {half}"] * 2, "two layers"
