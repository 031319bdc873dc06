"""The prefill adapter in vLLM's real modular kernel."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

pytest.importorskip("vllm", reason="vLLM is not installed")

import ep_backend_vllm
import vllm.model_executor.layers.fused_moe.modular_kernel as mk
from ep_backend_vllm import adapter as adapters
from ep_backend_vllm.backends import HIGH_THROUGHPUT, LOW_LATENCY
from ep_backend_vllm.high_throughput import NormalPrepareAndFinalize, num_bytes_for
from vllm.config.compilation import CompilationConfig, CompilationMode, CUDAGraphMode
from vllm.model_executor.layers.fused_moe.config import (
    FUSED_MOE_UNQUANTIZED_CONFIG,
    fp8_w8a8_moe_quant_config,
    nvfp4_moe_quant_config,
)

from ep_backend import Group, NormalBuffer, reference, virtual_world
from ep_backend.events import EventOverlap
from tests.integrations.vllm_layer import (
    HIDDEN,
    NUM_EXPERTS,
    NUM_RANKS,
    TOP_K,
    LoopExperts,
    apply_layer,
    batch_of,
    dense_layer,
    moe_config_of,
    weights_of_experts,
)


@pytest.fixture(scope="module", autouse=True)
def _registered() -> None:
    ep_backend_vllm.register()


def buffer_of(
    group: Group, dtype: torch.dtype = torch.float32, dispatch_dtype: torch.dtype | None = None
) -> NormalBuffer:
    return NormalBuffer(
        group,
        hidden=HIDDEN,
        num_experts=NUM_EXPERTS,
        top_k=TOP_K,
        dtype=dtype,
        dispatch_dtype=dispatch_dtype,
        num_bytes=1 << 20,
    )


def expert_map_of(buffer: NormalBuffer) -> torch.Tensor:
    expert_map = torch.full((NUM_EXPERTS,), -1, dtype=torch.int32)
    owned = torch.arange(buffer.num_local_experts, dtype=torch.int32)
    expert_map[buffer.first_expert :][: len(owned)] = owned
    return expert_map


@pytest.mark.parametrize("is_for_gpus", [False, True], ids=["cpu", "gpu"])
@pytest.mark.parametrize("num_tokens", [(5, 2), (4, 4), (3, 0), (0, 0)])
def test_the_real_modular_kernel_equals_the_dense_layer(
    num_tokens: tuple[int, int], is_for_gpus: bool
) -> None:
    """With (4, 4) a rank may receive as many rows as it has tokens: experts then write to the
    output itself. With (0, 0) nothing comes: vLLM runs no experts."""
    generator = torch.Generator().manual_seed(0)
    w1, w2 = weights_of_experts(generator)
    batches = [batch_of(generator, n) for n in num_tokens]

    def rank_main(group: Group) -> torch.Tensor:
        buffer = buffer_of(group)
        experts = LoopExperts(
            moe_config=moe_config_of(group, buffer), quant_config=FUSED_MOE_UNQUANTIZED_CONFIG
        )
        adapter = NormalPrepareAndFinalize(buffer, is_for_gpus)
        given: list[torch.Tensor | None] = []
        ask = adapter.allocate_fused_expert_output
        adapter.allocate_fused_expert_output = lambda *a: given.append(ask(*a)) or given[-1]
        kernel = mk.FusedMoEKernel(adapter, experts)
        expert_map = expert_map_of(buffer) if is_for_gpus else None
        out = apply_layer(kernel, buffer, (w1, w2), batches[group.self_rank], expert_map)
        if is_for_gpus and num_tokens[1] > 0:  # vLLM asked where the experts shall write
            assert [rows.shape[1] for rows in given if rows is not None] == [HIDDEN]
        return out

    outs = virtual_world(NUM_RANKS).run(rank_main)
    for out, (x, ids, weights) in zip(outs, batches, strict=True):
        torch.testing.assert_close(out, dense_layer(x, ids, weights, w1, w2))


def test_all_that_vllm_declares_abstract_is_there() -> None:
    assert not NormalPrepareAndFinalize.__abstractmethods__


ONE = torch.ones(1)
BLOCKS = fp8_w8a8_moe_quant_config(ONE, ONE, block_shape=[128, 128])


def test_quantised_activations_are_refused_on_a_cpu() -> None:
    x, ids, weights = batch_of(torch.Generator().manual_seed(0), num_tokens=3)

    def rank_main(group: Group) -> None:
        adapter = NormalPrepareAndFinalize(buffer_of(group))
        with pytest.raises(NotImplementedError, match="this layer wants torch"):
            adapter.prepare(x, weights, ids, NUM_EXPERTS, None, False, BLOCKS)

    virtual_world(1).run(rank_main)


def test_experts_on_a_gpu_get_float8_blocks_global_ids_and_counts() -> None:
    x, ids, weights = batch_of(torch.Generator().manual_seed(0), num_tokens=5)
    x = x.to(torch.bfloat16)

    def rank_main(group: Group) -> None:
        buffer = buffer_of(group, torch.bfloat16, torch.float8_e4m3fn)
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
        config: Any = moe_config_of(group, buffer_of(group))
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
        buffer = buffer_of(group)
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


@pytest.mark.parametrize(
    ("backend", "dp", "has_graphs"),
    [(HIGH_THROUGHPUT, 2, False), (HIGH_THROUGHPUT, 1, True), (LOW_LATENCY, 2, True)],
)
def test_high_throughput_runs_without_cuda_graphs(backend: str, dp: int, has_graphs: bool) -> None:
    config = CompilationConfig(mode=CompilationMode.VLLM_COMPILE)
    config.cudagraph_mode = CUDAGraphMode.FULL_AND_PIECEWISE
    config.set_splitting_ops_for_v1(all2all_backend=backend, data_parallel_size=dp)
    assert (config.cudagraph_mode != CUDAGraphMode.NONE) == has_graphs
