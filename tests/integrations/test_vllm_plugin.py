"""The plugin against vLLM's real classes: the flag, the guards, and the real modular MoE kernel."""

from __future__ import annotations

import pickle
from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("vllm", reason="vLLM is not installed")

import ep_backend_vllm
from ep_backend_vllm import (
    communicator,
    config,
    cpu,
    cpu_default,
    kernels,
    micro_batches,
    tracing,
)
from ep_backend_vllm.backends import BACKENDS, HIGH_THROUGHPUT, LOW_LATENCY
from ep_backend_vllm.patching import UnsupportedVLLM

from ep_backend import Group, LowLatencyBuffer, reference, virtual_world
from tests.integrations.vllm_layer import (
    MAX_TOKENS,
    NUM_EXPERTS,
    NUM_RANKS,
    apply_layer,
    batch_of,
    dense_layer,
    low_latency_buffer,
    moe_config_of,
    weights_of_experts,
)


@pytest.fixture(scope="module", autouse=True)
def _registered() -> None:
    ep_backend_vllm.register()
    ep_backend_vllm.register()  # idempotent: vLLM calls it in every process, sometimes twice


def test_flag_is_a_choice_of_the_real_parser() -> None:
    from vllm.engine.arg_utils import EngineArgs
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    parser = EngineArgs.add_cli_args(FlexibleArgumentParser())
    for backend in BACKENDS:
        assert parser.parse_args(["--all2all-backend", backend]).all2all_backend == backend
    with pytest.raises(SystemExit):
        parser.parse_args(["--all2all-backend", "ep_backend_typo"])


def test_config_accepts_the_backend_and_still_refuses_unknown_ones() -> None:
    from vllm.config.parallel import ParallelConfig

    accepted = ParallelConfig(all2all_backend=LOW_LATENCY)
    assert pickle.loads(pickle.dumps(accepted)).all2all_backend == LOW_LATENCY
    with pytest.raises(ValueError, match="ep_backend_typo"):
        ParallelConfig(all2all_backend="ep_backend_typo")


@pytest.mark.parametrize(
    ("backend", "dp", "ep", "tp", "batched_dp", "sequence_parallel"),
    [
        (LOW_LATENCY, 2, True, 1, True, False),
        (LOW_LATENCY, 2, True, 2, True, True),
        (LOW_LATENCY, 2, False, 2, False, False),
        (LOW_LATENCY, 1, True, 2, False, False),
        (HIGH_THROUGHPUT, 2, True, 1, False, False),
        (HIGH_THROUGHPUT, 2, True, 2, False, True),
        ("allgather_reducescatter", 2, True, 1, False, False),
        ("allgather_reducescatter", 2, True, 2, False, True),
        ("deepep_low_latency", 2, True, 1, True, False),
    ],
)
def test_name_tests_of_vllm_know_the_backend(
    backend: str, dp: int, ep: bool, tp: int, batched_dp: bool, sequence_parallel: bool
) -> None:
    from vllm.config.parallel import ParallelConfig

    parallel = ParallelConfig(all2all_backend=backend)
    parallel.data_parallel_size = dp
    parallel.enable_expert_parallel = ep
    parallel.tensor_parallel_size = tp
    assert parallel.use_batched_dp_moe == batched_dp
    assert parallel.use_sequence_parallel_moe == sequence_parallel


@pytest.mark.parametrize(
    ("part", "target"),
    [
        (config, "vllm.config.parallel.ParallelConfig.use_batched_dp_moe"),
        (config, "vllm.engine.arg_utils._compute_kwargs"),
        (
            communicator,
            "vllm.distributed.device_communicators.base_device_communicator.All2AllManagerBase",
        ),
        (kernels, "vllm.model_executor.layers.fused_moe.all2all_utils.maybe_make_prepare_finalize"),
        (kernels, "vllm.v1.worker.workspace.WorkspaceManager.unlock"),
        (cpu, "vllm.model_executor.layers.fused_moe.oracle.unquantized.backend_to_kernel_cls"),
        (
            cpu,
            "vllm.model_executor.layers.fused_moe.runner.moe_runner.MoERunner._select_forward",
        ),
        (cpu, "vllm.distributed.device_communicators.shm_broadcast.sched_yield"),
        (
            cpu_default,
            "vllm.distributed.device_communicators.base_device_communicator."
            "DeviceCommunicatorBase.all_gatherv",
        ),
        (
            cpu_default,
            "vllm.model_executor.layers.fused_moe.prepare_finalize.naive_dp_ep."
            "MoEPrepareAndFinalizeNaiveDPEPModular",
        ),
        (micro_batches, "vllm.v1.worker.utils.AttentionGroup.create_metadata_builders"),
        (micro_batches, "vllm.v1.worker.workspace.WorkspaceManager.is_locked"),
        (micro_batches, "vllm.v1.worker.workspace.current_workspace_manager"),
        (tracing, "vllm.forward_context.set_forward_context"),
    ],
    ids=lambda value: value if isinstance(value, str) else value.__name__,
)
def test_a_vanished_target_stops_the_plugin_with_the_supported_versions(
    part: SimpleNamespace, target: str, monkeypatch: pytest.MonkeyPatch, tmp_path: object
) -> None:
    monkeypatch.setenv("EP_BACKEND_TRACE", str(tmp_path))
    monkeypatch.setenv("EP_BACKEND_VLLM_POLL_US", "200")
    monkeypatch.setenv("EP_BACKEND_VLLM_CPU_DEFAULT", "1")
    monkeypatch.delattr(target)
    with pytest.raises(UnsupportedVLLM, match=r"Supported: vLLM 0\.26 to 0\.33") as caught:
        part.check()
    assert target.rsplit(".", 1)[1] in str(caught.value)


def test_a_vllm_that_cannot_exchange_rows_on_a_cpu_is_refused(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(cpu, "ROUTER", "vllm.no_such_router")
    with pytest.raises(UnsupportedVLLM, match=r"no_such_router does not exist: 0\.30"):
        communicator.make_manager(None, LOW_LATENCY)


def test_adapter_implements_all_that_vllm_declares_abstract() -> None:
    from ep_backend_vllm.cpu_experts import BatchedCPUExperts
    from ep_backend_vllm.low_latency import LowLatencyPrepareAndFinalize

    assert not LowLatencyPrepareAndFinalize.__abstractmethods__
    assert not BatchedCPUExperts.__abstractmethods__


def test_vllm_chooses_our_experts_for_the_batched_format_only() -> None:
    import vllm.model_executor.layers.fused_moe.modular_kernel as mk
    from vllm.model_executor.layers.fused_moe.oracle import unquantized

    classes = unquantized.backend_to_kernel_cls(unquantized.UnquantizedMoeBackend.CPU)
    batched = [
        cls
        for cls in classes
        if cls.activation_format() == mk.FusedMoEActivationFormat.BatchedExperts
    ]
    assert [cls.__name__ for cls in batched] == ["BatchedCPUExperts"]
    assert len(classes) > 1, "vLLM's own classes are still offered"


def test_real_modular_kernel_equals_the_dense_layer() -> None:
    """FusedMoEKernel, our adapter and our experts on two ranks against a per-token loop."""
    generator = torch.Generator().manual_seed(0)
    w1, w2 = weights_of_experts(generator)
    batches = [batch_of(generator, num_tokens) for num_tokens in (5, 0)]

    def rank_main(group: Group) -> torch.Tensor:
        return _run_layer(group, w1, w2, batches[group.self_rank])

    outs = virtual_world(NUM_RANKS).run(rank_main)
    for out, (x, ids, weights) in zip(outs, batches, strict=True):
        torch.testing.assert_close(out, dense_layer(x, ids, weights, w1, w2))


def test_shared_experts_run_between_the_combine_and_its_hook() -> None:
    generator = torch.Generator().manual_seed(1)
    w1, w2 = weights_of_experts(generator)
    batch = batch_of(generator, 3)
    seen: list[tuple[int, int]] = []

    def rank_main(group: Group) -> None:
        def watch(buffer: LowLatencyBuffer) -> None:
            counters = buffer.counters()
            seen.append((counters["combine_send"].num_ops, counters["combine_recv"].num_ops))

        _run_layer(group, w1, w2, batch, shared_experts=watch)

    virtual_world(1).run(rank_main)
    assert seen == [(1, 0)], "the send had happened, the hook had not"


def test_experts_that_want_float8_blocks_get_rows_and_scales() -> None:
    from ep_backend_vllm.adapter import dispatch_dtype_for
    from ep_backend_vllm.low_latency import LowLatencyPrepareAndFinalize
    from vllm.model_executor.layers.fused_moe.config import fp8_w8a8_moe_quant_config

    one = torch.ones(1)
    blocks = fp8_w8a8_moe_quant_config(one, one, block_shape=[128, 128])
    per_token = fp8_w8a8_moe_quant_config(one, one, per_act_token_quant=True)
    assert dispatch_dtype_for(per_token, torch.bfloat16) == torch.bfloat16
    dispatch_dtype = dispatch_dtype_for(blocks, torch.bfloat16)
    assert dispatch_dtype == torch.float8_e4m3fn
    x, ids, weights = batch_of(torch.Generator().manual_seed(0), num_tokens=3)
    x = x.to(torch.bfloat16)

    def rank_main(group: Group) -> None:
        buffer = low_latency_buffer(group, torch.bfloat16, dispatch_dtype)
        adapter = LowLatencyPrepareAndFinalize(buffer)
        arguments = (x, weights, ids, NUM_EXPERTS, None, False)
        rows, scales, meta, _, _ = adapter.prepare(*arguments, blocks)
        expected, expected_scales = reference.quantize(x, "float32")
        for expert, num_rows in enumerate(meta.expert_num_tokens.tolist()):
            tokens = (ids == expert).any(dim=1).nonzero()[:, 0]
            assert num_rows == len(tokens)
            got = rows[expert, :num_rows].view(torch.uint8)
            assert torch.equal(got, expected.view(torch.uint8)[tokens])
            assert torch.equal(scales[expert, :num_rows], expected_scales[tokens])
        with pytest.raises(NotImplementedError, match="this layer wants unquantised activations"):
            adapter.prepare(*arguments, blocks, defer_input_quant=True)

    virtual_world(1).run(rank_main)


def _run_layer(
    group: Group,
    w1: torch.Tensor,
    w2: torch.Tensor,
    batch: tuple[torch.Tensor, torch.Tensor, torch.Tensor],
    shared_experts: object = None,
) -> torch.Tensor:
    from ep_backend_vllm.cpu_experts import BatchedCPUExperts
    from ep_backend_vllm.low_latency import LowLatencyPrepareAndFinalize
    from vllm.model_executor.layers.fused_moe.config import FUSED_MOE_UNQUANTIZED_CONFIG
    from vllm.model_executor.layers.fused_moe.modular_kernel import FusedMoEKernel

    buffer = low_latency_buffer(group, torch.float32)
    experts = BatchedCPUExperts(
        moe_config=moe_config_of(group, buffer),
        quant_config=FUSED_MOE_UNQUANTIZED_CONFIG,
        max_num_tokens=MAX_TOKENS,
        num_dispatchers=group.num_ranks,
    )
    kernel = FusedMoEKernel(LowLatencyPrepareAndFinalize(buffer), experts)
    if shared_experts is not None:
        kernel.impl._maybe_apply_shared_experts = lambda *_: shared_experts(buffer)  # type: ignore[operator]
    return apply_layer(kernel, buffer, (w1, w2), batch)
