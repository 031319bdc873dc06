"""What ranks of `test_sglang_dispatcher` do in their processes: its dispatcher over our buffer.

Each process publishes SGLang's arguments as a scheduler does. What the dispatcher returns is
compared with the reference, bit for bit.
"""

from __future__ import annotations

import contextlib
import inspect
import os
from collections.abc import Iterator
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any
from unittest import mock

import ep_backend_sglang
import torch
import torch.distributed as dist
from ep_backend_sglang import small_prefill, standard, standard_exchange
from ep_backend_sglang.buffer import MOST_TOKENS_VARIABLE, Buffer
from sglang.srt import runtime_context
from sglang.srt.batch_overlap.operations import execute_overlapped_operations
from sglang.srt.batch_overlap.operations_strategy import OperationsStrategy
from sglang.srt.batch_overlap.two_batch_overlap import MaybeTboDeepEPDispatcher
from sglang.srt.layers.dp_attention import (
    get_is_extend_in_batch,
    set_dp_buffer_len,
    set_is_extend_in_batch,
)
from sglang.srt.layers.moe.token_dispatcher.deepep import DeepEPBuffer, DeepEPConfig
from sglang.srt.layers.moe.topk import StandardTopKOutput
from sglang.srt.layers.moe.utils import get_deepep_mode, initialize_moe_config
from sglang.srt.model_executor.forward_batch_info import ForwardMode
from sglang.srt.model_executor.forward_context import ForwardContext, forward_context
from sglang.srt.models.deepseek_v2 import DeepseekV2MoE
from sglang.srt.server_args import ServerArgs

from ep_backend import LowLatencyBuffer, deep_ep
from tests.integrations.played_workspaces import PlayedWorkspaces
from tests.integrations.sglang_steps import Step
from tests.support.processes import Rank
from tests.support.shapes import Shape


@dataclass
class Plan:
    """What to start SGLang with, and what goes through its dispatcher."""

    shape: Shape
    deepep_mode: str
    steps: list[Step]
    deepep_config: str | None = None
    has_hook: bool = True
    """One of SGLang's between a dispatch and its receive."""
    knows_counts: bool = False
    """A step knows the most tokens of any rank, as with data-parallel attention."""
    is_standard: bool = False
    """For experts that take SGLang's standard format."""


def start(rank: Rank, plan: Plan, has_two_batches: bool = False) -> MaybeTboDeepEPDispatcher:
    """SGLang's dispatcher of a layer of this shape."""
    ep_backend_sglang.register()
    shape = plan.shape
    os.environ[MOST_TOKENS_VARIABLE] = str(shape.num_max_tokens_per_rank)
    arguments = ServerArgs(
        model_path="dummy",
        tp_size=shape.num_ranks,
        moe_a2a_backend="ep_backend",
        deepep_mode=plan.deepep_mode,
        deepep_config=plan.deepep_config,
        deepep_dispatcher_output_dtype="fp8" if shape.is_float8 else "bf16",
        enable_two_batch_overlap=has_two_batches,
    )
    publish_as_rank(arguments, rank.group.self_rank)
    initialize_moe_config()
    DeepEPConfig._instance = None  # an earlier plan's
    dispatcher = MaybeTboDeepEPDispatcher(
        group=dist.group.WORLD,
        router_topk=shape.top_k,
        permute_fusion=True,
        num_experts=shape.num_experts,
        num_local_experts=shape.num_experts // shape.num_ranks,
        hidden_size=shape.hidden,
        params_dtype=shape.dtype,
        deepep_mode=get_deepep_mode(),
        async_finish=True,
        return_recv_hook=True,
    )
    if plan.is_standard:
        standard.convert_dispatcher(dispatcher)
    return dispatcher


def publish_as_rank(arguments: ServerArgs, self_rank: int) -> None:
    """What schedulers do with their arguments; up to 0.5.20 without ranks."""
    placement = {}
    if "ranks" in inspect.signature(runtime_context.publish).parameters:
        placement["ranks"] = runtime_context.SpawnRanks(world_rank=self_rank, dp_rank=None)
    runtime_context.reset_context()
    runtime_context.publish(arguments, role="test", **placement)


@dataclass
class Experts:
    """What SGLang's layers have as `experts`: a dispatcher, and expert functions that check what
    they get."""

    dispatcher: MaybeTboDeepEPDispatcher
    rank: int
    steps: list[Step]
    """Those in flight, in the order of their dispatches."""

    def run_moe_core(self, dispatch_output: Any) -> Any:
        return self.steps.pop(0).run_experts(dispatch_output, self.rank)


def exchange(rank: Rank, plan: Plan) -> list[str]:
    """Every step goes out and comes home, twice; returns what SGLang's hooks saw, and the buffer's
    class."""
    log: list[str] = []
    dispatcher, self_rank = start(rank, plan), rank.group.self_rank
    if plan.has_hook:
        dispatcher.register_deepep_dispatch_hook(lambda _: log.append("sent"))
    dispatcher.register_post_dispatch_hook(
        lambda _, output: log.append(output.format.value)  # type: ignore[func-returns-value]
    )
    for step in plan.steps * 2:
        set_is_extend_in_batch(step.is_extend)
        sizes = [len(step.x(r)) for r in range(plan.shape.num_ranks)]
        small_prefill._most_rows = max(sizes) if plan.knows_counts else None
        set_dp_buffer_len(sum(sizes), sizes[self_rank], False, sizes)
        experts = Experts(dispatcher, self_rank, [step])
        output = dispatcher.dispatch(
            hidden_states=step.x(self_rank), topk_output=step.topk(self_rank)
        )
        combined = dispatcher.combine(combine_input=experts.run_moe_core(output))
        step.check_combined(combined, self_rank)
        assert get_is_extend_in_batch() == step.is_extend
    return [*log, _class_of_the_buffer()]


@contextlib.contextmanager
def playing_workspaces(num_workspaces: int) -> Iterator[list[PlayedWorkspaces]]:
    """Meanwhile the dispatcher has so many of a buffer, which is then in the list."""
    by_token = Buffer.low_latency_by_token
    played: list[PlayedWorkspaces] = []

    def in_workspaces(*args: Any) -> PlayedWorkspaces:
        *of_shape, num_wanted = args
        assert num_wanted == num_workspaces
        inner = by_token(*of_shape, 0)
        if not played:
            played.append(PlayedWorkspaces(inner, "local"))
        return played[0]

    parallel = SimpleNamespace(attn_tp_size=1)
    with (
        mock.patch.object(Buffer, "low_latency_by_token", in_workspaces),
        mock.patch.object(standard_exchange, "get_parallel", return_value=parallel),
        mock.patch.object(standard_exchange, "has_workspaces", return_value=True),
    ):
        yield played


def exchange_in_workspaces(rank: Rank, plan: Plan) -> list[tuple[int, int]]:
    """`exchange`; returns the workspaces and numbers of slots that were used."""
    with playing_workspaces(1) as played:
        exchange(rank, plan)
    assert played[0].num_max_tokens_per_rank == standard_exchange.MOST_SMALL_TOKENS
    return list(played[0].inputs)


def received_at_once(rank: Rank, plan: Plan) -> list[int]:
    """How many dispatches and combines our low-latency buffer received by what sent them."""
    with contextlib.ExitStack() as patches:
        spies = []
        for name in ("dispatch_and_receive", "combine_and_receive"):
            original = getattr(LowLatencyBuffer, name)
            spy = mock.patch.object(LowLatencyBuffer, name, autospec=True, side_effect=original)
            spies.append(patches.enter_context(spy))
        exchange(rank, plan)
    return [spy.call_count for spy in spies]


def config_of_dispatch(rank: Rank, plan: Plan) -> deep_ep.Config:
    """What SGLang made of `plan.deepep_config`, after its dispatcher was used."""
    exchange(rank, plan)
    return DeepEPConfig.get_instance().normal_dispatch_config


def too_many_tokens(rank: Rank, plan: Plan) -> None:
    dispatcher = start(rank, plan)
    set_is_extend_in_batch(False)
    x, topk = plan.steps[0].x(0), plan.steps[0].topk(0)
    twice = StandardTopKOutput(*(torch.cat([part, part]) for part in topk))
    dispatcher.dispatch(hidden_states=torch.cat([x, x]), topk_output=twice)


@dataclass
class DeepseekV2DecoderLayer:
    """A layer as SGLang's two-batch overlap sees one, which goes by this name. Exchanging and
    computing experts are SGLang's own operations; the others do nothing."""

    experts: Experts
    log: list[str]
    """The operations of both halves that exchange, in the order they ran."""
    is_layer_sparse = True
    layer_id = 0
    ep_size = 2
    self_attn: Any = field(init=False)
    mlp: Any = field(init=False)

    def __post_init__(self) -> None:
        self.self_attn = self.mlp = self

    def op_comm_prepare_attn(self, state: Any, **inputs: Any) -> None:
        state.update(inputs)

    def op_prepare(self, state: Any) -> None: ...
    def op_core(self, state: Any) -> None: ...
    def op_comm_prepare_mlp(self, state: Any) -> None: ...
    def op_gate(self, state: Any) -> None: ...
    def op_shared_experts(self, state: Any) -> None: ...

    def op_select_experts(self, state: Any) -> None:
        self_rank = self.experts.rank
        state.hidden_states_mlp_input = state.step.x(self_rank)
        state.topk_output = state.step.topk(self_rank)

    def op_dispatch_a(self, state: Any) -> None:
        self._log("dispatch_a", state)
        self.experts.steps.append(state.step)
        DeepseekV2MoE.op_dispatch_a(self, state)

    def op_dispatch_b(self, state: Any) -> None:
        self._log("dispatch_b", state)
        DeepseekV2MoE.op_dispatch_b(self, state)

    def op_experts(self, state: Any) -> None:
        DeepseekV2MoE.op_experts(self, state)

    def op_combine_a(self, state: Any) -> None:
        self._log("combine_a", state)
        DeepseekV2MoE.op_combine_a(self, state)

    def op_combine_b(self, state: Any) -> None:
        self._log("combine_b", state)
        DeepseekV2MoE.op_combine_b(self, state)

    def op_output(self, state: Any) -> None:
        state.step.check_combined(state.hidden_states_after_combine, self.experts.rank)

    def op_comm_postprocess_layer(self, state: Any) -> dict[str, Any]:
        """What the next layer gets."""
        kept = {name: state.get(name) for name in Inputs.__annotations__}
        state.clear(expect_keys=[*kept, "hidden_states_mlp_input", "hidden_states_after_combine"])
        return kept

    def _log(self, name: str, state: Any) -> None:
        self.log.append(f"{name} {'ab'[state.tbo_subbatch_index]}")


@dataclass
class Inputs:
    """Of one half of a batch."""

    step: Step
    tbo_subbatch_index: int
    forward_batch: Any


def overlap_two_batches(rank: Rank, plan: Plan, is_decode: bool) -> list[str]:
    """Two layers, each step in a half of its own, in the order that SGLang has for prefill or
    decode; returns the log."""
    log: list[str] = []
    dispatcher = start(rank, plan, has_two_batches=True)
    set_is_extend_in_batch(not is_decode)
    experts = Experts(dispatcher, rank.group.self_rank, [])
    layers = [DeepseekV2DecoderLayer(experts, log) for _ in range(2)]
    strategy = OperationsStrategy.init_new_tbo(
        layers, ForwardMode.DECODE if is_decode else ForwardMode.EXTEND
    )
    assert strategy.tbo_delta_stages is not None
    batch = SimpleNamespace(
        moe_num_token_non_padded=None,
        global_dp_buffer_len=0,
        tbo_padded_len=0,
        global_num_tokens_cpu=None,
        dp_padding_mode=SimpleNamespace(is_max_len=lambda: False),
    )
    with forward_context(ForwardContext(attn_backend=None)):
        execute_overlapped_operations(
            [vars(Inputs(plan.steps[half], half, batch)) for half in range(2)],
            [strategy.operations] * 2,
            [0, strategy.tbo_delta_stages],
        )
    assert _class_of_the_buffer() == f"{Buffer.__module__}.Buffer"
    return log


def overlap_in_workspaces(rank: Rank, plan: Plan, is_decode: bool) -> list[tuple[int, int]]:
    """`overlap_two_batches`, with data-parallel attention; returns the workspaces and numbers of
    slots that were used."""
    sizes = [sum(len(step.x(r)) for step in plan.steps[:2]) for r in range(plan.shape.num_ranks)]
    set_dp_buffer_len(sum(sizes), sizes[rank.group.self_rank], False, sizes)
    with playing_workspaces(2) as played:
        overlap_two_batches(rank, plan, is_decode)
    return list(played[0].inputs)


def _class_of_the_buffer() -> str:
    cls = type(DeepEPBuffer._state().buffer)
    return f"{cls.__module__}.{cls.__qualname__}"
