"""The high-throughput backend's two kinds of steps, in vLLM's real modular kernel."""

from __future__ import annotations

from typing import Any

import pytest
import torch

pytest.importorskip("vllm", reason="vLLM is not installed")

import ep_backend_vllm
import vllm.model_executor.layers.fused_moe.modular_kernel as mk
from ep_backend_vllm.by_size import (
    MOST_SMALL_TOKENS,
    BySizePrepareAndFinalize,
    most_small_tokens,
)
from ep_backend_vllm.high_throughput import NormalPrepareAndFinalize
from ep_backend_vllm.workspace import WorkspacePrepareAndFinalize
from torch.cuda import device_count
from vllm.model_executor.layers.fused_moe.config import FUSED_MOE_UNQUANTIZED_CONFIG
from vllm.v1.worker import workspace

from ep_backend import Group, LowLatencyBuffer, virtual_world
from tests.integrations.played_workspaces import PlayedWorkspaces
from tests.integrations.vllm_layer import (
    HIDDEN,
    MAX_TOKENS,
    NUM_EXPERTS,
    NUM_RANKS,
    TOP_K,
    DenseExperts,
    LoopExperts,
    apply_layer,
    batch_of,
    dense_layer,
    expert_map_of,
    low_latency_buffer,
    moe_config_of,
    normal_buffer,
    set_tokens_of_ranks,
    weights_of_experts,
)
from tests.support.processes import Rank, RankProcesses


@pytest.fixture(scope="module", autouse=True)
def _registered() -> None:
    ep_backend_vllm.register()


@pytest.mark.parametrize(
    ("num_tokens", "are_told", "is_small"),
    [
        ((5, 2), True, True),
        ((MAX_TOKENS, 0), True, True),
        ((3, MAX_TOKENS + 1), True, False),
        ((0, 0), True, False),
        ((5, 2), False, False),
    ],
)
def test_steps_of_either_kind_equal_the_dense_layer(
    num_tokens: tuple[int, int], are_told: bool, is_small: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if are_told:
        set_tokens_of_ranks(monkeypatch, list(num_tokens))
    generator = torch.Generator().manual_seed(0)
    w1, w2 = weights_of_experts(generator)
    batches = [batch_of(generator, n) for n in num_tokens]

    def rank_main(group: Group) -> torch.Tensor:
        played = PlayedWorkspaces(low_latency_buffer(group, torch.float32, None, "rank_major"))
        small_buffer: Any = played
        buffer = normal_buffer(group)
        small = WorkspacePrepareAndFinalize(small_buffer, is_async=False)
        large = NormalPrepareAndFinalize(buffer, is_for_gpus=True)
        called: list[str] = []
        for adapter, name in ((small, "small"), (large, "large")):
            for method in ("prepare", "allocate_fused_expert_output", "finalize"):
                watch(adapter, method, called, f"{name}.{method}")
        watch(large, "finalize_async", called, "large.finalize")
        experts = LoopExperts(
            moe_config=moe_config_of(group, buffer), quant_config=FUSED_MOE_UNQUANTIZED_CONFIG
        )
        kernel = mk.FusedMoEKernel(BySizePrepareAndFinalize(small, large), experts)
        out = apply_layer(kernel, buffer, (w1, w2), batches[group.self_rank], expert_map_of(buffer))
        assert {name.split(".")[0] for name in called} == {"small" if is_small else "large"}
        assert called[0].endswith("prepare")
        assert called[-1].endswith("finalize")
        return out

    outs = virtual_world(NUM_RANKS).run(rank_main)
    for out, (x, ids, weights) in zip(outs, batches, strict=True):
        torch.testing.assert_close(out, dense_layer(x, ids, weights, w1, w2))


def watch(owner: Any, method: str, called: list[str], name: str) -> None:
    original = getattr(owner, method)

    def watched(*args: Any, **kwargs: Any) -> Any:
        called.append(name)
        return original(*args, **kwargs)

    setattr(owner, method, watched)


def test_all_that_vllm_declares_abstract_is_there() -> None:
    assert not BySizePrepareAndFinalize.__abstractmethods__


@pytest.mark.parametrize(
    ("num_graph_tokens", "hosts", "expected"),
    [
        (128, [0, 0], 128),
        (2048, [0, 0], MOST_SMALL_TOKENS),
        (0, [0, 0], 0),  # no graphs
        (128, [0, 1], 0),  # no workspaces over a network
    ],
)
def test_small_is_what_graphs_hold(num_graph_tokens: int, hosts: list[int], expected: int) -> None:
    assert most_small_tokens(num_graph_tokens, hosts) == expected


def run_layer_in_graphs(rank: Rank, sizes: list[int], has_small_steps: bool) -> None:
    """Captures a step of each size; replays them with other tokens, and runs exact ones between."""
    group, device = rank.group, torch.device("cuda", rank.group.self_rank % device_count())
    torch.cuda.set_device(device)
    workspace.init_workspace_manager(device)
    generator = torch.Generator().manual_seed(group.self_rank)
    w1, w2 = (w.to(device) for w in weights_of_experts(torch.Generator().manual_seed(7)))
    buffer = normal_buffer(group, device="cuda", expert_ids="global")
    buffers: list[Any] = [buffer]
    adapter: Any = NormalPrepareAndFinalize(
        buffer, is_for_gpus=True, num_waitless_tokens=max(sizes)
    )
    if has_small_steps:  # and a size that is not one of them
        buffers.append(
            LowLatencyBuffer(
                group,
                num_max_tokens_per_rank=max(sizes) - 1,
                hidden=HIDDEN,
                num_experts=NUM_EXPERTS,
                top_k=TOP_K,
                dtype=torch.float32,
                output_layout="rank_major",
                expert_ids="global",
                num_workspaces=1,
                device="cuda",
            )
        )
        small = WorkspacePrepareAndFinalize(buffers[-1], is_async=False)
        adapter = BySizePrepareAndFinalize(small, adapter)
    experts = DenseExperts(
        moe_config=moe_config_of(group, buffer), quant_config=FUSED_MOE_UNQUANTIZED_CONFIG
    )
    kernel = mk.FusedMoEKernel(adapter, experts)
    expert_map = expert_map_of(buffer).to(device)

    def run(batch: tuple[torch.Tensor, ...]) -> torch.Tensor:
        num_tokens = len(batch[0])
        with pytest.MonkeyPatch.context() as patch:
            set_tokens_of_ranks(patch, [num_tokens] * group.num_ranks)
            return apply_layer(kernel, buffer, (w1, w2), batch, expert_map)

    def check(out: torch.Tensor, batch: tuple[torch.Tensor, ...]) -> None:
        expected = dense_layer(*(t.cpu() for t in (*batch, w1, w2)))
        torch.testing.assert_close(out.cpu(), expected, rtol=1e-3, atol=1e-3)

    steps = []
    for num_tokens in sizes:
        batch = tuple(t.to(device) for t in batch_of(generator, num_tokens))
        check(run(batch), batch)
        torch.cuda.synchronize()
        group.all_gather(None)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            out = run(batch)
        steps.append((graph, batch, out))
    for _ in range(3):
        for graph, batch, out in steps:
            for old, new in zip(batch, batch_of(generator, len(batch[0])), strict=True):
                old.copy_(new)
            graph.replay()
            torch.cuda.synchronize()
            for each in buffers:
                each.raise_if_failed()
            check(out, batch)
        batch = tuple(t.to(device) for t in batch_of(generator, max(sizes) + 3))
        check(run(batch), batch)
    torch.cuda.synchronize()
    for each in buffers:
        each.close()


@pytest.mark.gpus(1)
@pytest.mark.parametrize("has_small_steps", [False, True], ids=["normal", "by size"])
def test_graphs_and_exact_steps_equal_the_dense_layer(has_small_steps: bool) -> None:
    with RankProcesses(NUM_RANKS) as ranks:
        ranks.run(run_layer_in_graphs, [8, 3], has_small_steps, deadline_secs=120)
