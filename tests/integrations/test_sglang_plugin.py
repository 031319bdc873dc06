"""The plugin in SGLang: the flag, what it checks, what it replaces on a CPU."""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
from types import SimpleNamespace
from typing import Any
from unittest.mock import Mock

import pytest
import torch
import torch.nn.functional as F

pytest.importorskip("sglang", reason="SGLang is not installed")

import ep_backend_sglang
from ep_backend_sglang import (
    arguments,
    buffer,
    choice,
    cpu_default,
    cpu_experts,
    cpu_only,
    dispatcher,
    idle_ranks,
    small_prefill,
    standard,
    tracing,
)
from ep_backend_sglang.patching import UnsupportedSGLang
from ep_backend_sglang.standard_exchange import Received
from sglang.srt.layers.attention.torch_native_backend import TorchNativeAttnBackend
from sglang.srt.layers.logits_processor import LogitsMetadata
from sglang.srt.layers.moe import utils
from sglang.srt.layers.moe.ep_moe.layer import DeepEPMoE
from sglang.srt.layers.moe.moe_runner import MoeRunnerConfig
from sglang.srt.layers.moe.token_dispatcher import (
    StandardCombineInput,
    StandardDispatchOutput,
    deepep,
)
from sglang.srt.layers.moe.topk import StandardTopKOutput
from sglang.srt.managers.scheduler_components import dp_attn
from sglang.srt.model_executor import forward_batch_info
from sglang.srt.model_executor.forward_batch_info import ForwardMode
from sglang.srt.model_executor.model_runner import ModelRunner
from sglang.srt.server_args import ServerArgs

from ep_backend import Group, deep_ep, virtual_world
from ep_backend.observe.trace import TRACE_VARIABLE

REPLACED_ON_A_CPU = (
    (torch.cuda, "get_device_properties"),
    (DeepEPMoE, "run_moe_core"),
    (forward_batch_info, "_is_cpu"),
    (TorchNativeAttnBackend, "get_cpu_graph_seq_len_fill_value"),
    (deepep._DeepEPDispatcherImplNormal, "combine_a"),
)


@pytest.fixture(scope="module", autouse=True)
def _registered() -> None:
    ep_backend_sglang.register()
    ep_backend_sglang.register()  # idempotent


@pytest.fixture(autouse=True)
def _not_chosen_yet(monkeypatch: pytest.MonkeyPatch) -> None:
    """Choosing lasts as long as a process; here it ends with each test."""
    monkeypatch.setenv(choice.VARIABLE, "")  # so that it is taken back, whoever sets it
    monkeypatch.delenv(choice.VARIABLE)
    monkeypatch.setattr(choice, "_is_installed", False)
    for name in ("Buffer", "Config", "use_deepep"):
        monkeypatch.setattr(deepep, name, None, raising=False)
    for owner, name in REPLACED_ON_A_CPU:
        monkeypatch.setattr(owner, name, getattr(owner, name, None), raising=False)


def replaced_on_a_cpu() -> list[Any]:
    return [getattr(owner, name) for owner, name in REPLACED_ON_A_CPU]


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
    before = replaced_on_a_cpu()
    for backend in ("none", choice.BUILT_IN):
        arguments_of(moe_a2a_backend=backend, deepep_mode="auto").resolve_once()
    assert deepep.Buffer is None
    assert replaced_on_a_cpu() == before
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
        ({"enable_single_batch_overlap": True}, "--enable-single-batch-overlap .* Leave it out"),
        ({"speculative_moe_a2a_backend": choice.BUILT_IN}, "one buffer for both"),
    ],
)
def test_what_is_missing_stops_the_server(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        arguments_of(**fields).resolve_once()
    assert not choice.is_ours()


@pytest.mark.parametrize("has_gpu", [False, True], ids=["cpu", "gpu"])
@pytest.mark.parametrize("deepep_mode", ["auto", "normal", "low_latency"])
def test_the_experts_gemm_leaves_what_normal_kernels_take(
    deepep_mode: str, has_gpu: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    arguments_of(deepep_mode=deepep_mode).resolve_once()
    mode = utils.DeepEPMode(deepep_mode)
    monkeypatch.setattr(utils, "get_deepep_mode", lambda: mode)
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: has_gpu)
    monkeypatch.setattr(deep_ep.Buffer, "num_sms", 24)
    is_taken = has_gpu and deepep_mode != "low_latency"
    assert deepep.Buffer.num_sms == (24 if is_taken else 0)
    assert deepep.DeepEPConfig().num_sms == deepep.Buffer.num_sms


class Batch(SimpleNamespace):
    """What SGLang makes of a rank without a request where another prefills through a graph."""

    forward_mode = ForwardMode.EXTEND
    _original_forward_mode: ForwardMode | None = ForwardMode.IDLE


def forward_mode_of(forward_batch: Batch) -> ForwardMode:
    """A SGLang that does not ask who was idle, where it reads the logits' metadata."""
    return forward_batch.forward_mode


def test_a_rank_that_was_idle_looks_for_no_token(monkeypatch: pytest.MonkeyPatch) -> None:
    assert not idle_ranks.has_defect()
    monkeypatch.setattr(LogitsMetadata, "from_forward_batch", staticmethod(forward_mode_of))
    idle_ranks.check()
    idle_ranks.install()
    batch = Batch()
    assert LogitsMetadata.from_forward_batch(batch) == ForwardMode.IDLE
    assert batch.forward_mode == ForwardMode.EXTEND
    batch._original_forward_mode = ForwardMode.DECODE
    assert LogitsMetadata.from_forward_batch(batch) == ForwardMode.EXTEND


def test_a_sglang_that_asks_who_was_idle_is_left_alone() -> None:
    before = LogitsMetadata.from_forward_batch
    idle_ranks.install()
    assert LogitsMetadata.from_forward_batch == before


@pytest.mark.parametrize(
    ("tokens", "is_speculative", "sizes", "most_rows"),
    [
        ([3, 17, 0], False, None, 17),
        ([3, 17, 0], False, [8, 16, 24, 32], 24),
        ([3, 40, 0], False, [8, 16, 24, 32], 40),  # no graph takes so many
        ([3, 17, 0], True, [8, 16, 24, 32], None),
        (None, False, [8, 16, 24, 32], None),
    ],
)
def test_a_step_knows_the_most_tokens_of_any_rank(
    tokens: list[int] | None,
    is_speculative: bool,
    sizes: list[int] | None,
    most_rows: int | None,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    seen = []
    monkeypatch.setattr(
        forward_batch_info.ForwardBatch, "init_new", lambda batch: SimpleNamespace()
    )
    monkeypatch.setattr(
        ModelRunner, "forward", lambda self, forward_batch: seen.append(small_prefill._most_rows)
    )
    monkeypatch.setattr(dp_attn, "_update_gather_batch", dp_attn._update_gather_batch)
    small_prefill.install()
    batch = SimpleNamespace(spec_algorithm=SimpleNamespace(is_none=lambda: not is_speculative))
    info = Mock(num_tokens=3, global_num_tokens=tokens)
    dp_attn._update_gather_batch(batch, info, False, skip_global_metadata=True)
    assert batch.global_num_tokens == [3], "SGLang keeps this rank's alone"
    graphs = None if sizes is None else SimpleNamespace(capture_num_tokens=sizes)
    runner: Any = SimpleNamespace(prefill_cuda_graph_runner=graphs)
    ModelRunner.forward(runner, forward_batch_info.ForwardBatch.init_new(batch))
    assert seen == [most_rows]
    assert small_prefill._most_rows is None


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
        (small_prefill, f"{small_prefill.SCHEDULER}.prepare_mlp_sync_batch_raw"),
        (small_prefill, f"{dispatcher.PLACE}.DeepEPLLCombineInput"),
        (cpu_only, f"{dispatcher.PLACE}.DeepEPBuffer.get_deepep_buffer"),
        (cpu_only, f"{dispatcher.PLACE}._DeepEPDispatcherImplNormal.combine_a"),
        (cpu_only, f"{cpu_only.MOE}.ep_moe.layer.DeepEPMoE.run_moe_core"),
        (cpu_only, f"{cpu_only.BATCH}.ForwardBatch.prepare_mlp_sync_batch"),
        (cpu_default, f"{cpu_only.BATCH}.ForwardBatch.prepare_mlp_sync_batch"),
        (cpu_default, f"{cpu_default.DP_ATTENTION}.memcpy_cpu"),
        (cpu_default, f"{cpu_default.DP_ATTENTION}._dp_gather"),
        (cpu_default, f"{cpu_default.GROUP}.reduce_scatterv"),
        (cpu_default, f"{cpu_default.LAYER}.run_moe_core"),
        (cpu_default, f"{tracing.RUNNER}.forward"),
        (standard, f"{standard.LAYER}.forward_impl"),
        (standard, f"{standard.RUNNER}.base.FusedOpPool"),
        (standard, f"{standard.COMMON}.require_mlp_tp_gather"),
        (standard, "sglang.srt.layers.dp_attention.get_dp_global_num_tokens"),
        (tracing, f"{tracing.RUNNER}.forward"),
        (tracing, f"{tracing.DISPATCHER}.combine"),
    ],
    ids=lambda value: value if isinstance(value, str) else value.__name__,
)
def test_a_vanished_target_stops_the_plugin_with_the_supported_versions(
    part: Any, target: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(TRACE_VARIABLE, "anywhere")
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


@pytest.mark.parametrize("has_accelerator", [True, False])
def test_cpu_patches_are_for_cpus_alone(
    has_accelerator: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = replaced_on_a_cpu()
    monkeypatch.setattr(standard, "install", lambda: None)  # around `run_moe_core` anywhere
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: has_accelerator)
    arguments_of().resolve_once()
    are_same = [a is b for a, b in zip(before, replaced_on_a_cpu(), strict=True)]
    assert are_same == [has_accelerator] * len(before)


class Layer:
    """Three experts, as SGLang loads them."""

    quant_config = None
    moe_runner_config = MoeRunnerConfig()
    w13_weight = torch.randn(3, 16, 6, generator=torch.Generator().manual_seed(0))
    w2_weight = torch.randn(3, 6, 8, generator=torch.Generator().manual_seed(1))

    def expert(self, expert: int, row: torch.Tensor) -> torch.Tensor:
        gate, up = self.w13_weight[expert, :8] @ row, self.w13_weight[expert, 8:] @ row
        return self.w2_weight[expert] @ (F.silu(gate) * up)


def test_experts_on_a_cpu_weigh_and_add_what_combine_will_not() -> None:
    x = torch.randn(4, 6, generator=torch.Generator().manual_seed(2))
    ids = torch.tensor([[0, 2], [-1, 1], [-1, -1], [2, 0]])
    weights = torch.rand(4, 2, generator=torch.Generator().manual_seed(3))
    output = deepep.DeepEPNormalDispatchOutput(x, None, ids, weights, [2, 1, 2])
    result = cpu_experts.run_experts(Layer(), output)
    assert isinstance(result, deepep.DeepEPNormalCombineInput)
    for row in range(4):
        terms = [
            weights[row, k] * Layer().expert(int(ids[row, k]), x[row])
            for k in range(2)
            if ids[row, k] >= 0
        ]
        expected = sum(terms, torch.zeros(6))
        torch.testing.assert_close(result.hidden_states[row], expected)


def test_experts_on_a_cpu_weigh_and_add_for_sglangs_own_exchange() -> None:
    x = torch.randn(2, 6, generator=torch.Generator().manual_seed(2))
    ids, weights = torch.tensor([[0, 2], [-1, 1]]), torch.tensor([[0.5, 0.25], [1.0, 2.0]])
    output = StandardDispatchOutput(x, None, StandardTopKOutput(weights, ids, torch.empty(0)))
    result = cpu_experts.run_experts(Layer(), output)
    assert isinstance(result, StandardCombineInput)
    first = 0.5 * Layer().expert(0, x[0]) + 0.25 * Layer().expert(2, x[0])
    torch.testing.assert_close(result.hidden_states[0], first)
    torch.testing.assert_close(result.hidden_states[1], 2.0 * Layer().expert(1, x[1]))
    layer = Layer()
    layer.moe_runner_config = MoeRunnerConfig(routed_scaling_factor=2.5)
    with pytest.raises(NotImplementedError, match=r"routed_scaling_factor 2\.5, but on a CPU only"):
        cpu_experts.run_experts(layer, output)
    topk = output.topk_output
    by_ours = Received(x, topk, topk, deepep.DeepEPLLCombineInput)  # whose sums the model scales
    scaled_later = cpu_experts.run_experts(layer, by_ours)
    assert torch.equal(scaled_later.hidden_states, result.hidden_states)


def test_experts_on_a_cpu_leave_rows_that_did_not_arrive() -> None:
    x = torch.randn(3, 5, 6, generator=torch.Generator().manual_seed(2))
    counts = torch.tensor([5, 0, 1], dtype=torch.int32)
    output = deepep.DeepEPLLDispatchOutput(x, None, torch.empty(0), torch.empty(0), counts, 2)
    result = cpu_experts.run_experts(Layer(), output)
    assert isinstance(result, deepep.DeepEPLLCombineInput)
    for expert, num_rows in enumerate(counts.tolist()):
        for row in range(num_rows):
            expected = Layer().expert(expert, x[expert, row])
            torch.testing.assert_close(result.hidden_states[expert, row], expected)


def test_quantized_experts_on_a_cpu_stay_those_of_sglang() -> None:
    arguments_of().resolve_once()
    layer = SimpleNamespace(quant_config="fp8", deprecate_flag=False, use_w4afp8=False)
    output = deepep.DeepEPLLDispatchOutput(*(torch.empty(0),) * 5, 0)
    with pytest.raises(AssertionError, match="deprecated"):
        DeepEPMoE.run_moe_core(layer, output)


@pytest.mark.parametrize(
    ("config", "bias", "message"),
    [
        ({"activation": "gelu"}, {}, "activation 'gelu', but on a CPU only 'silu'"),
        ({"gemm1_alpha": 1.7}, {}, "gemm1_alpha 1.7, but on a CPU only None"),
        ({"apply_router_weight_on_input": True}, {}, "on_input True, but on a CPU only False"),
        ({}, {"w2_weight_bias": torch.zeros(3, 6)}, "a bias"),
    ],
)
def test_experts_on_a_cpu_that_are_not_plain_are_refused(
    config: dict[str, Any], bias: dict[str, torch.Tensor], message: str
) -> None:
    layer = SimpleNamespace(moe_runner_config=MoeRunnerConfig(**config), **bias)
    with pytest.raises(NotImplementedError, match=message):
        cpu_experts.run_experts(layer, None)


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
