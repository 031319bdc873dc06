"""The prefill adapter in vLLM's real modular kernel."""

from __future__ import annotations

import gc
import weakref
from types import SimpleNamespace
from typing import Any

import pytest
import torch

pytest.importorskip("vllm", reason="vLLM is not installed")

import ep_backend_vllm
import vllm.config
import vllm.model_executor.layers.fused_moe.modular_kernel as mk
from ep_backend_vllm import adapter as adapters
from ep_backend_vllm import graphs
from ep_backend_vllm.backends import HIGH_THROUGHPUT, LOW_LATENCY
from ep_backend_vllm.high_throughput import (
    NormalPrepareAndFinalize,
    most_tokens_without_wait,
    num_bytes_for,
)
from vllm.config.compilation import CompilationConfig, CompilationMode, CUDAGraphMode
from vllm.model_executor.layers.fused_moe.config import (
    FUSED_MOE_UNQUANTIZED_CONFIG,
    fp8_w8a8_moe_quant_config,
    nvfp4_moe_quant_config,
)
from vllm.v1.worker import workspace

from ep_backend import Group, reference, virtual_world
from ep_backend.events import EventOverlap
from tests.integrations.vllm_layer import (
    HIDDEN,
    NUM_EXPERTS,
    NUM_RANKS,
    LoopExperts,
    apply_layer,
    batch_of,
    dense_layer,
    expert_map_of,
    moe_config_of,
    normal_buffer,
    set_tokens_of_ranks,
    weights_of_experts,
)


@pytest.fixture(scope="module", autouse=True)
def _registered() -> None:
    ep_backend_vllm.register()


@pytest.mark.parametrize(
    ("is_for_gpus", "num_waitless_tokens"),
    [(False, 0), (True, 0), (True, 5), (True, 4)],
    ids=["cpu", "gpu", "waitless", "small waitless"],
)
@pytest.mark.parametrize("num_tokens", [(5, 2), (4, 4), (3, 0), (0, 0)])
def test_the_real_modular_kernel_equals_the_dense_layer(
    num_tokens: tuple[int, int],
    is_for_gpus: bool,
    num_waitless_tokens: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """With (4, 4) a rank may receive as many rows as it has tokens: experts then write to the
    output itself. With (0, 0) nothing comes: vLLM runs no experts."""
    set_tokens_of_ranks(monkeypatch, list(num_tokens))
    is_exact = max(num_tokens) > num_waitless_tokens or max(num_tokens) == 0
    generator = torch.Generator().manual_seed(0)
    w1, w2 = weights_of_experts(generator)
    batches = [batch_of(generator, n) for n in num_tokens]

    def rank_main(group: Group) -> torch.Tensor:
        buffer = normal_buffer(group)
        experts = LoopExperts(
            moe_config=moe_config_of(group, buffer), quant_config=FUSED_MOE_UNQUANTIZED_CONFIG
        )
        adapter = NormalPrepareAndFinalize(buffer, is_for_gpus, num_waitless_tokens)
        given: list[torch.Tensor | None] = []
        ask = adapter.allocate_fused_expert_output
        adapter.allocate_fused_expert_output = lambda *a: given.append(ask(*a)) or given[-1]
        kernel = mk.FusedMoEKernel(adapter, experts)
        expert_map = expert_map_of(buffer) if is_for_gpus else None
        out = apply_layer(kernel, buffer, (w1, w2), batches[group.self_rank], expert_map)
        if is_for_gpus and num_tokens[1] > 0:  # vLLM asked where the experts shall write
            (rows,) = [rows for rows in given if rows is not None]
            assert rows.shape[1] == HIDDEN
            assert is_exact or len(rows) == sum(num_tokens)
        return out

    outs = virtual_world(NUM_RANKS).run(rank_main)
    for out, (x, ids, weights) in zip(outs, batches, strict=True):
        torch.testing.assert_close(out, dense_layer(x, ids, weights, w1, w2))


def test_tensor_parallel_ranks_that_hold_the_same_tokens_have_room_for_all(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """2 data-parallel ranks of 2: vLLM lists 2 sizes where a model does not share tokens out."""
    sizes = [5, 2]
    set_tokens_of_ranks(monkeypatch, sizes)
    generator = torch.Generator().manual_seed(0)
    w1, w2 = weights_of_experts(generator)
    batches = [batch_of(generator, n) for n in sizes]

    def rank_main(group: Group) -> torch.Tensor:
        buffer = normal_buffer(group)
        experts = LoopExperts(
            moe_config=moe_config_of(group, buffer), quant_config=FUSED_MOE_UNQUANTIZED_CONFIG
        )
        adapter = NormalPrepareAndFinalize(buffer, is_for_gpus=True, num_waitless_tokens=5)
        kernel = mk.FusedMoEKernel(adapter, experts)
        batch = batches[group.self_rank // 2]
        return apply_layer(kernel, buffer, (w1, w2), batch, expert_map_of(buffer))

    for rank, out in enumerate(virtual_world(4).run(rank_main)):
        torch.testing.assert_close(out, dense_layer(*batches[rank // 2], w1, w2))


def test_all_that_vllm_declares_abstract_is_there() -> None:
    assert not NormalPrepareAndFinalize.__abstractmethods__


ONE = torch.ones(1)
BLOCKS = fp8_w8a8_moe_quant_config(ONE, ONE, block_shape=[128, 128])


def test_quantised_activations_are_refused_on_a_cpu() -> None:
    x, ids, weights = batch_of(torch.Generator().manual_seed(0), num_tokens=3)

    def rank_main(group: Group) -> None:
        adapter = NormalPrepareAndFinalize(normal_buffer(group))
        with pytest.raises(NotImplementedError, match="this layer wants torch"):
            adapter.prepare(x, weights, ids, NUM_EXPERTS, None, False, BLOCKS)

    virtual_world(1).run(rank_main)


def test_experts_on_a_gpu_get_float8_blocks_global_ids_and_counts() -> None:
    x, ids, weights = batch_of(torch.Generator().manual_seed(0), num_tokens=5)
    x = x.to(torch.bfloat16)

    def rank_main(group: Group) -> None:
        buffer = normal_buffer(group, torch.bfloat16, torch.float8_e4m3fn)
        adapter = NormalPrepareAndFinalize(buffer, is_for_gpus=True)
        own = range(buffer.first_expert, buffer.first_expert + buffer.num_local_experts)
        is_own = (ids >= own.start) & (ids < own.stop)
        tokens = is_own.any(1).nonzero()[:, 0]
        arguments = (x, weights, ids, NUM_EXPERTS, None, False)
        rows, scales, counts, got_ids, got_weights = adapter.prepare(*arguments, BLOCKS)
        expected, expected_scales = reference.quantize(x[tokens], "float32")
        # Both ranks have the same tokens.
        assert torch.equal(rows.view(torch.uint8), torch.cat([expected] * 2).view(torch.uint8))
        assert torch.equal(scales, torch.cat([expected_scales] * 2))
        assert counts.expert_num_tokens.tolist() == [2 * int((ids == e).sum()) for e in own]
        foreign = NUM_EXPERTS - 1 if own.start == 0 else 0
        assert foreign not in own
        expected_ids = torch.where(is_own, ids, foreign)[tokens]
        assert torch.equal(got_ids, torch.cat([expected_ids] * 2))
        expected_weights = torch.where(is_own, weights, 0.0)[tokens]
        assert torch.equal(got_weights, torch.cat([expected_weights] * 2))
        with pytest.raises(NotImplementedError, match="wants unquantised activations"):
            adapter.prepare(*arguments, BLOCKS, defer_input_quant=True)

    virtual_world(NUM_RANKS).run(rank_main)


def test_rows_are_quantised_as_the_layer_says(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of nvfp4 by its global scale, and with scales in the order in which the experts read them;
    vLLM's kernel for it, which no CPU has, is played."""
    seen: list[Any] = []

    def quantise(x: torch.Tensor, scale: torch.Tensor, **how: Any) -> tuple[torch.Tensor, str]:
        seen.append((scale, how["quant_dtype"], how["is_scale_swizzled"]))
        return x, "scales"

    monkeypatch.setattr(adapters, "moe_kernel_quantize_input", quantise)
    of_a1 = torch.tensor([3.0])
    for is_swizzled in (False, True):
        config = nvfp4_moe_quant_config(
            ONE, ONE, of_a1, ONE, ONE, ONE, is_scale_swizzled=is_swizzled
        )
        assert adapters.quantised_rows(torch.ones(2, HIDDEN), None, config, False)[1] == "scales"
    assert seen == [(of_a1, "nvfp4", False), (of_a1, "nvfp4", True)]


@pytest.mark.parametrize(
    ("backend", "device", "is_taken"),
    [
        (HIGH_THROUGHPUT, "cuda", False),
        (HIGH_THROUGHPUT, "cpu", True),
        (LOW_LATENCY, "cuda", True),
        ("allgather_reducescatter", "cuda", True),
    ],
)
def test_experts_that_take_no_counts_are_not_chosen(
    monkeypatch: pytest.MonkeyPatch, backend: str, device: str, is_taken: bool
) -> None:
    """CUTLASS's assert that there are none. What a CPU cannot say yes to is said for it."""
    from vllm.model_executor.layers.fused_moe.experts.cutlass_moe import CutlassExpertsFp8
    from vllm.model_executor.layers.fused_moe.experts.triton_moe import TritonExperts

    def rank_main(group: Group) -> None:
        config: Any = moe_config_of(group, normal_buffer(group))
        config.device = device
        config.moe_parallel_config.all2all_backend = backend
        standard = mk.FusedMoEActivationFormat.Standard
        for experts, expected in ((CutlassExpertsFp8, is_taken), (TritonExperts, True)):
            for name in ("_supports_current_device", "_supports_quant_scheme"):
                monkeypatch.setattr(experts, name, staticmethod(lambda *_: True))
            is_supported, why = experts.is_supported_config(experts, config, None, None, standard)
            assert is_supported == expected, why

    virtual_world(NUM_RANKS).run(rank_main)


def test_shared_experts_run_beside_combine_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Between its call and the wait for its event; played on a CPU, where there are no events."""
    batch = batch_of(torch.Generator().manual_seed(1), 3)
    w1, w2 = weights_of_experts(torch.Generator().manual_seed(0))
    log: list[str] = []

    def rank_main(group: Group) -> None:
        buffer = normal_buffer(group)
        combine = buffer.combine

        def watched(*args: Any, **kwargs: Any) -> Any:
            log.append(f"combine, async_finish={kwargs.get('async_finish')}")
            return combine(*args, **kwargs)

        monkeypatch.setattr(buffer, "combine", watched)
        wait = lambda *_: log.append("wait")  # noqa: E731
        monkeypatch.setattr(EventOverlap, "current_stream_wait", wait)
        experts = LoopExperts(
            moe_config=moe_config_of(group, buffer), quant_config=FUSED_MOE_UNQUANTIZED_CONFIG
        )
        kernel = mk.FusedMoEKernel(NormalPrepareAndFinalize(buffer, is_for_gpus=True), experts)
        kernel.impl._maybe_apply_shared_experts = lambda *_: log.append("shared experts")
        apply_layer(kernel, buffer, (w1, w2), batch, expert_map_of(buffer))

    virtual_world(1).run(rank_main)
    assert log == ["combine, async_finish=True", "shared experts", "wait"]


@pytest.mark.parametrize(
    ("ranks", "tokens", "num_bytes"),
    [
        (2, 16, 64 << 20),  # never less
        (8, 1024, 1024 * 8 * (7168 * 5 + 16 * 8)),
        (8, 16384, 1 << 30),  # nor more
    ],
)
def test_memory_on_a_gpu_has_room_for_the_largest_batch(
    ranks: int, tokens: int, num_bytes: int
) -> None:
    moe = SimpleNamespace(
        max_num_tokens=tokens, experts_per_token=8, hidden_dim=7168, in_dtype=torch.bfloat16
    )
    assert num_bytes_for(moe, ranks, "cuda") == num_bytes
    assert num_bytes_for(moe, ranks, "cpu") is None


def test_rows_without_a_token_do_not_count_in_a_scale_of_all(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """vLLM's kernel that finds such a scale, which no CPU has, is played."""
    seen: list[torch.Tensor] = []
    quantise = lambda x, *_, **__: (seen.append(x), None)  # noqa: E731
    monkeypatch.setattr(adapters, "moe_kernel_quantize_input", quantise)
    x, is_used = torch.full((3, HIDDEN), 7.0), torch.tensor([True, False, True])
    of_rows = fp8_w8a8_moe_quant_config(ONE, ONE, per_act_token_quant=True)
    of_all = fp8_w8a8_moe_quant_config(ONE, ONE)
    given = fp8_w8a8_moe_quant_config(ONE, ONE, a1_scale=ONE)
    for config in (of_rows, of_all, given):
        adapters.quantised_rows(x, None, config, False, lambda: is_used)
    assert seen[0] is x
    assert seen[1][:, 0].tolist() == [7.0, 0.0, 7.0]
    assert seen[2] is x


@pytest.mark.parametrize(
    ("mode", "sizes", "expected"),
    [
        (CUDAGraphMode.FULL_AND_PIECEWISE, [1, 8, 64], 64),
        (CUDAGraphMode.PIECEWISE, [4], 4),
        (CUDAGraphMode.NONE, [1, 8, 64], 0),
    ],
)
def test_graphs_hold_steps_as_large_as_vllm_captures(
    mode: CUDAGraphMode, sizes: list[int], expected: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    compilation = CompilationConfig(
        mode=CompilationMode.VLLM_COMPILE, cudagraph_capture_sizes=sizes
    )
    compilation.max_cudagraph_capture_size = max(sizes)
    compilation.cudagraph_mode = mode
    compilation.set_splitting_ops_for_v1(all2all_backend=HIGH_THROUGHPUT, data_parallel_size=2)
    assert compilation.cudagraph_mode == mode
    assert graphs.most_tokens() == 0
    # A whole VllmConfig would change this process's environment, LD_PRELOAD for one.
    config = SimpleNamespace(compilation_config=compilation)
    monkeypatch.setattr(vllm.config, "get_current_vllm_config_or_none", lambda: config)
    assert graphs.most_tokens() == expected


@pytest.mark.parametrize(
    ("num_ranks", "num_rows", "num_max_tokens", "expected"),
    [
        (2, 4096, 2048, 2048),
        (8, 4096, 512, 512),
        (8, 4096, 513, 64),
        (8, 4096, 2048, 256),
        (16, 4096, 256, 64),
        (2, 100, 2048, 64),
        (2, None, 2048, 64),
    ],
)
def test_steps_of_few_ranks_wait_for_no_sizes(
    num_ranks: int, num_rows: int | None, num_max_tokens: int, expected: int
) -> None:
    """Of 8 experts a token, 2 ranks get nearly all tokens, 8 two thirds, 16 two fifths. Where the
    largest step waits, a smaller one takes no more places for experts' rows than that one fills."""
    buffer: Any = SimpleNamespace(group=SimpleNamespace(num_ranks=num_ranks), top_k=8)
    if num_rows is not None:
        buffer.num_rows = num_rows
    assert most_tokens_without_wait(buffer, 64, num_max_tokens) == expected


def test_scratch_memory_grows_beyond_what_graphs_have(monkeypatch: pytest.MonkeyPatch) -> None:
    manager = workspace.WorkspaceManager(torch.device("cpu"))
    monkeypatch.setattr(workspace, "_manager", manager)
    monkeypatch.setattr(torch.accelerator, "empty_cache", lambda: None)
    for _ in range(2):  # two layers
        graphs.let_scratch_memory_grow()
    (captured,) = manager.get_simultaneous(((64,), torch.uint8))
    captured.fill_(3)
    address = captured.data_ptr()
    del captured
    workspace.lock_workspace()
    (larger,) = manager.get_simultaneous(((1 << 20,), torch.uint8))
    larger.fill_(5)
    (kept,) = manager.of_graphs
    assert kept.data_ptr() == address
    assert kept[:64].tolist() == [3] * 64


@pytest.mark.skipif(
    not hasattr(workspace.WorkspaceManager, "get_persistent_resource"), reason="older than 0.32"
)
def test_what_experts_keep_in_scratch_memory_stays_when_they_replace_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """As vLLM's `MoEPermuteScratch.reserve`, which asks for operators that no CPU has."""
    manager = workspace.WorkspaceManager(torch.device("cpu"))
    monkeypatch.setattr(workspace, "_manager", manager)
    graphs.let_scratch_memory_grow()
    scratch = manager.get_persistent_resource("scratch", SimpleNamespace)
    scratch.sorted_row_idx = torch.zeros(4)
    is_freed: list[bool] = []
    weakref.finalize(scratch.sorted_row_idx, is_freed.append, True)
    workspace.lock_workspace()
    assert not manager.is_locked()  # else vLLM would refuse what follows
    scratch.sorted_row_idx = torch.zeros(8)
    gc.collect()
    assert is_freed == []
