"""Layers whose experts take SGLang's standard format. Exchanges are in `test_sglang_dispatcher`, a
server in tests/serving."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any
from unittest.mock import Mock

import pytest
import torch

pytest.importorskip("sglang", reason="SGLang is not installed")

from ep_backend_sglang import buffer, small_prefill, standard, standard_exchange, sums
from ep_backend_sglang.standard_exchange import LowLatency, Received
from sglang.srt import runtime_context
from sglang.srt.layers import dp_attention
from sglang.srt.layers.moe.ep_moe import layer
from sglang.srt.layers.moe.moe_runner import MoeRunnerConfig
from sglang.srt.layers.moe.token_dispatcher.deepep import (
    DeepEPLLCombineInput,
    DeepEPNormalCombineInput,
)
from sglang.srt.layers.moe.topk import StandardTopKOutput
from sglang.srt.utils import common

from ep_backend.network import VARIABLE


class Moe:
    """As SGLang's `DeepEPMoE`, with experts that double their rows in place."""

    deprecate_flag = False

    def __init__(self, is_triton: bool) -> None:
        self.runner = SimpleNamespace(
            runner_backend=SimpleNamespace(is_triton=lambda: is_triton),
            config=MoeRunnerConfig(routed_scaling_factor=2.5, num_experts=4),
        )
        self.quant_method = SimpleNamespace(runner=self.runner)
        inner = SimpleNamespace(_low_latency_dispatcher="SGLang's")
        self.dispatcher = SimpleNamespace(_inners=[inner])

    def run_moe_core(self, dispatch_output: Any) -> Any:
        return SimpleNamespace(hidden_states=dispatch_output.hidden_states.mul_(2))

    def forward(self, hidden_states: torch.Tensor, topk_output: Any) -> str:
        return "cut out of the graph"

    def forward_impl(self, hidden_states: torch.Tensor, topk_output: Any) -> str:
        return "decode" if not dp_attention.get_is_extend_in_batch() else "prefill"


@pytest.fixture
def moe(monkeypatch: pytest.MonkeyPatch) -> type[Moe]:
    """A class of layers, patched."""
    monkeypatch.setattr(standard, "_has_layers", False)
    converted = Mock(spec=LowLatency)
    monkeypatch.setattr(LowLatency, "like", classmethod(lambda cls, other, idx: converted))
    patched: type[Moe] = type("PatchedMoe", (Moe,), {"__init__": Moe.__init__})
    standard._convert_layers(patched)
    return patched


def topk_of(num_tokens: int) -> StandardTopKOutput:
    ids = torch.zeros(num_tokens, 1, dtype=torch.int32)
    return StandardTopKOutput(torch.ones(num_tokens, 1), ids, torch.empty(0))


def received(num_rows: int, combine_input: torch.Tensor | None = None) -> Received:
    rows = torch.ones(num_rows, 3)
    return Received(rows, topk_of(num_rows), topk_of(2), DeepEPLLCombineInput, combine_input)


def test_layers_of_triton_experts_are_converted(
    moe: type[Moe], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv(standard.FORMAT_VARIABLE, raising=False)
    others = moe(is_triton=False)
    assert not others.deprecate_flag
    assert others.runner.config.routed_scaling_factor == 2.5
    assert not standard._has_layers
    triton = moe(is_triton=True)
    assert triton.deprecate_flag
    assert isinstance(triton.dispatcher._inners[0]._low_latency_dispatcher, LowLatency)
    config = triton.runner.config
    assert (config.routed_scaling_factor, config.num_experts) == (None, 4), "the model scales"
    assert standard._has_layers


def test_the_format_can_be_chosen(moe: type[Moe], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(standard.FORMAT_VARIABLE, "deepep")
    assert moe(is_triton=True).dispatcher._inners[0]._low_latency_dispatcher == "SGLang's"
    monkeypatch.setenv(standard.FORMAT_VARIABLE, "packed")
    with pytest.raises(ValueError, match="SGLANG_FORMAT is 'packed', expected standard or deepep"):
        moe(is_triton=True)


def test_experts_leave_their_sums_where_peers_read(moe: type[Moe]) -> None:
    experts = moe(is_triton=True)
    in_place = experts.run_moe_core(received(4))
    assert isinstance(in_place, DeepEPLLCombineInput)
    assert torch.equal(in_place.hidden_states, torch.full((4, 3), 2.0))
    assert len(in_place.topk_ids) == 2, "those of this rank's tokens"
    workspace = torch.zeros(4, 3)
    elsewhere = experts.run_moe_core(received(4, workspace))
    assert elsewhere.hidden_states is workspace
    assert torch.equal(workspace, torch.full((4, 3), 2.0))
    other = SimpleNamespace(hidden_states=torch.ones(1))
    assert not isinstance(experts.run_moe_core(other), DeepEPLLCombineInput)


def test_a_rank_that_received_nothing_runs_no_experts(moe: type[Moe]) -> None:
    output = received(0)
    output.combine_input_type = DeepEPNormalCombineInput
    experts = moe(is_triton=True)
    combine_input = experts.run_moe_core(output)
    assert isinstance(combine_input, DeepEPNormalCombineInput)
    assert combine_input.hidden_states.shape == (0, 3)


def test_rows_without_routes_have_no_experts() -> None:
    rows, routes = torch.ones(3, 4), topk_of(3)
    assert standard_exchange._routes_of_all(rows, routes) is routes
    of_all = standard_exchange._routes_of_all(rows, topk_of(0))
    assert of_all.topk_ids.tolist() == [[-1]] * 3
    assert of_all.topk_weights.tolist() == [[0.0]] * 3


def test_the_last_kernel_of_experts_is_given_the_workspace() -> None:
    written: list[torch.Tensor] = []
    kernel = sums._redirected(lambda rows, output, scale: written.append(output))
    own, workspace = torch.zeros(2, 3), torch.zeros(2, 3)
    with sums.into(workspace) as target:
        kernel(None, own, 1.0)
        assert target.rows_or(own) is workspace
    with sums.into(None) as target:
        kernel(None, own, 1.0)
        assert target.rows_or(own) is own
    kernel(None, own, 1.0)
    assert [tensor is workspace for tensor in written] == [True, False, False]


@pytest.mark.parametrize(
    ("is_in_graph", "num_rows", "expected"),
    [(True, 5, "decode"), (True, 6, "cut out of the graph"), (False, 5, "cut out of the graph")],
)
def test_graphs_of_prefill_hold_the_exchange_of_few_tokens(
    moe: type[Moe],
    is_in_graph: bool,
    num_rows: int,
    expected: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(layer, "is_in_breakable_cuda_graph", lambda: is_in_graph)
    monkeypatch.setattr(small_prefill, "fits", lambda of_layer, num_rows: num_rows <= 5)
    dp_attention.set_is_extend_in_batch(True)
    layer_of_experts = moe(is_triton=True)
    assert layer_of_experts.forward(torch.ones(num_rows, 3), topk_of(num_rows)) == expected
    assert dp_attention.get_is_extend_in_batch()
    dp_attention.set_is_extend_in_batch(False)


@pytest.mark.parametrize(
    ("num_nodes", "network", "has_gpu", "expected"),
    [
        (1, None, True, True),
        (2, None, True, False),
        (1, "links=rdma", True, False),
        (1, None, False, False),
    ],
)
def test_workspaces_are_for_gpus_of_one_host(
    num_nodes: int,
    network: str | None,
    has_gpu: bool,
    expected: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    arguments = SimpleNamespace(nnodes=num_nodes)
    monkeypatch.setattr(runtime_context, "get_server_args", lambda: arguments)
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: has_gpu)
    monkeypatch.delenv(VARIABLE, raising=False)
    if network is not None:
        monkeypatch.setenv(VARIABLE, network)
    assert buffer.has_workspaces() is expected


def test_as_many_tokens_as_a_workspace_may_take_are_few() -> None:
    row_bytes = 2 * 7168
    assert standard_exchange.most_small_tokens(2, row_bytes) == 2048
    assert standard_exchange.most_small_tokens(8, row_bytes) == 1152
    assert 8 * 1152 * 2 * row_bytes <= standard_exchange.WORKSPACE_BYTES
    assert standard_exchange.most_small_tokens(1024, row_bytes) == 0


@pytest.mark.parametrize("is_needed", [False, True])
def test_counts_of_all_ranks_are_kept_where_slots_go_by_them(
    is_needed: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    def by_sglang() -> bool:
        return False

    monkeypatch.setattr(common, "require_mlp_tp_gather", by_sglang)
    monkeypatch.setattr(dp_attention, "is_dp_attention_enabled", lambda: True)
    standard._keep_counts_of_all_ranks(by_sglang)
    assert common.require_mlp_tp_gather is not by_sglang
    monkeypatch.setattr(standard, "_has_layers", is_needed)
    assert common.require_mlp_tp_gather() is is_needed


@pytest.mark.parametrize(
    ("sizes", "attn_tp_size", "num_rows", "num_slots"),
    [
        ([3, 7], 1, 3, 7),  # of data-parallel attention
        ([3, 7], 2, 2, 4),  # two ranks share a batch
        ([3, 7], 1, 8, 8),  # all have what a graph pads to
        ([9], 2, 5, 5),  # all have the same batch
        (None, 1, 0, 1),
    ],
)
def test_slots_are_as_many_on_every_rank(
    sizes: list[int] | None,
    attn_tp_size: int,
    num_rows: int,
    num_slots: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    of_two_ranks = low_latency(monkeypatch, sizes, attn_tp_size)
    assert of_two_ranks._slots_for(torch.empty(num_rows, 3), most=6) == num_slots


@pytest.mark.parametrize(("sizes", "num_slots"), [((3, 5), 5), ((3, 15), 6), ((9,), 2), ((), 2)])
def test_halves_have_as_many_as_their_batch_or_as_a_dispatch_takes(
    sizes: tuple[int, ...], num_slots: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    of_two_ranks = low_latency(monkeypatch, None)
    monkeypatch.setattr(standard_exchange, "_sizes_of_whole", sizes)
    assert of_two_ranks._slots_for(torch.empty(2, 3), most=6) == num_slots


def low_latency(
    monkeypatch: pytest.MonkeyPatch, sizes: list[int] | None, attn_tp_size: int = 1
) -> LowLatency:
    """Of two ranks, which have said that they have so many tokens."""
    monkeypatch.setattr(standard_exchange, "_sizes_of_whole", ())
    monkeypatch.setattr(standard_exchange, "get_dp_global_num_tokens", lambda: sizes)
    parallel = SimpleNamespace(attn_tp_size=attn_tp_size)
    monkeypatch.setattr(standard_exchange, "get_parallel", lambda: parallel)
    monkeypatch.setattr(standard_exchange, "is_dp_attention_enabled", lambda: False)
    exchange = LowLatency.__new__(LowLatency)
    exchange.group = SimpleNamespace(size=lambda: 2)
    exchange._num_workspaces = 0
    return exchange


def test_ranks_that_do_not_know_of_each_other_have_no_slots(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    exchange = low_latency(monkeypatch, [3])
    monkeypatch.setattr(standard_exchange, "is_dp_attention_enabled", lambda: True)
    exchange._num_workspaces = 1
    with pytest.raises(RuntimeError, match="SGLANG_SCHEDULER_SKIP_ALL_GATHER"):
        exchange._slots_for(torch.empty(3, 3), most=6)


@pytest.mark.parametrize("mode", [None, "stat"])
def test_rows_of_experts_are_counted_where_they_are_recorded(
    mode: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = SimpleNamespace(moe=SimpleNamespace(expert_distribution_recorder_mode=mode))
    recorder = Mock()
    monkeypatch.setattr(standard_exchange, "get_exec", lambda: settings)
    monkeypatch.setattr(
        standard_exchange, "get_global_expert_distribution_recorder", lambda: recorder
    )
    exchange = low_latency(monkeypatch, [3])
    counts = torch.tensor([2, 0])
    result: Any = SimpleNamespace(
        recv_x=torch.ones(2, 3, 4),
        recv_topk_idx=torch.zeros(2, 3, 1, dtype=torch.int32),
        recv_topk_weights=torch.ones(2, 3, 1),
        num_recv_tokens_per_expert=counts,
    )
    exchange._in_flight = standard_exchange._InFlight(Mock(), result, None)
    received_rows = exchange.dispatch_b(topk_of(3), lambda: None)
    assert received_rows.hidden_states.shape == (6, 4)
    asked = recorder.on_deepep_dispatch_low_latency.call_args_list
    assert [call.args[0] is counts for call in asked] == ([True] if mode else [])
