"""`--enable-dbo` with our backend: vLLM's own checks, attention metadata and scratch memory."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any
from unittest.mock import MagicMock

import numpy as np
import pytest
import torch

pytest.importorskip("vllm", reason="vLLM is not installed")

import ep_backend_vllm
import vllm.model_executor.layers.fused_moe.modular_kernel as mk
from ep_backend_vllm.backends import HIGH_THROUGHPUT, LOW_LATENCY
from vllm.config import ParallelConfig, VllmConfig
from vllm.v1.attention.backend import AttentionMetadataBuilder
from vllm.v1.worker import ubatching, workspace

NUM_RANKS, MAX_TOKENS, HIDDEN, TOP_K = 2, 64, 8, 2
BYTES_A_ROW = 2 * TOP_K * HIDDEN * 4


@pytest.fixture(scope="module", autouse=True)
def _registered() -> None:
    ep_backend_vllm.register()


@pytest.fixture
def _platform_that_overlaps(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a CPU vLLM switches overlap off before it looks at the backend."""
    from vllm.platforms import current_platform

    leave_it = classmethod(lambda cls, config: None)
    monkeypatch.setattr(type(current_platform), "check_and_update_config", leave_it)


@pytest.mark.usefixtures("_platform_that_overlaps")
def test_vllm_accepts_overlap_with_our_low_latency_backend() -> None:
    config = VllmConfig(
        parallel_config=ParallelConfig(enable_dbo=True, all2all_backend=LOW_LATENCY)
    )
    assert config.parallel_config.all2all_backend == LOW_LATENCY
    assert config.parallel_config.use_ubatching


@pytest.mark.usefixtures("_platform_that_overlaps")
@pytest.mark.parametrize(
    ("backend", "flags"),
    [
        (HIGH_THROUGHPUT, {"enable_dbo": True}),
        ("allgather_reducescatter", {"enable_dbo": True}),
        (LOW_LATENCY, {"ubatch_size": 2}),  # of which vLLM's scratch memory knows nothing
    ],
)
def test_vllm_refuses_what_it_refused_before(backend: str, flags: dict[str, Any]) -> None:
    parallel_config = ParallelConfig(all2all_backend=backend, **flags)
    with pytest.raises(ValueError, match=f"{backend} is not supported"):
        VllmConfig(parallel_config=parallel_config)
    assert parallel_config.all2all_backend == backend


@pytest.mark.usefixtures("_platform_that_overlaps")
def test_a_configuration_that_fails_keeps_our_name(monkeypatch: pytest.MonkeyPatch) -> None:
    from vllm.platforms import current_platform

    def refuse(cls: type, config: VllmConfig) -> None:
        raise ValueError("for another reason")

    monkeypatch.setattr(type(current_platform), "check_and_update_config", classmethod(refuse))
    parallel_config = ParallelConfig(enable_dbo=True, all2all_backend=LOW_LATENCY)
    with pytest.raises(ValueError, match="for another reason"):
        VllmConfig(parallel_config=parallel_config)
    assert parallel_config.all2all_backend == LOW_LATENCY


class CopyingBuilder(AttentionMetadataBuilder):
    """Like FlashAttention's: it can take over metadata with another block table."""

    supports_update_block_table = True

    def __init__(self, *args: Any, **kwargs: Any) -> None: ...

    def build(self, common_prefix_len: int, common_attn_metadata: Any, **_: Any) -> Any:
        return copy.copy(common_attn_metadata)

    def update_block_table(self, metadata: Any, blk_table: Any, slot_mapping: Any) -> Any:
        updated = copy.copy(metadata)
        updated.block_table_tensor, updated.slot_mapping = blk_table, slot_mapping
        return updated


def test_attention_of_each_micro_batch_is_of_its_own_requests() -> None:
    """Two that decode, and a prefill that is cut in two, by vLLM's own runner."""
    from vllm.v1.worker.gpu_model_runner import GPUModelRunner
    from vllm.v1.worker.ubatch_utils import maybe_create_ubatch_slices
    from vllm.v1.worker.utils import AttentionGroup

    query_lens, seq_lens = [1, 1, 8], [30, 40, 8]
    slices, _ = maybe_create_ubatch_slices(True, np.array(query_lens, np.int32), 10, 3, 2)
    spec = MagicMock()
    group = AttentionGroup(
        backend=SimpleNamespace(get_builder_cls=lambda: CopyingBuilder),  # type: ignore[arg-type]
        layer_names=["layer"],
        kv_cache_spec=spec,
        kv_cache_group_id=0,
    )
    parallel_config = SimpleNamespace(enable_dbo=True, all2all_backend=LOW_LATENCY)
    vllm_config = SimpleNamespace(parallel_config=parallel_config)
    group.create_metadata_builders(vllm_config, torch.device("cpu"), num_metadata_builders=2)
    starts = torch.tensor([0, *np.cumsum(query_lens)], dtype=torch.int32)
    lens = torch.tensor(seq_lens, dtype=torch.int32)
    runner = MagicMock(
        kv_cache_config=SimpleNamespace(kv_cache_groups=[SimpleNamespace(kv_cache_spec=spec)]),
        optimistic_seq_lens_cpu=lens,
        query_start_loc=SimpleNamespace(cpu=starts, gpu=starts.clone()),
        seq_lens=lens.clone(),
        positions=torch.zeros(10, dtype=torch.int64),
        is_mm_prefix_lm=False,
        dcp_world_size=1,
        attn_groups=[[group]],
        speculative_config=None,
        _get_encoder_seq_lens=lambda *args, **kwargs: (None, None),
    )
    runner.model_config.rswa_window = None
    runner.cache_config.use_replayssm = False
    runner.input_batch.num_computed_tokens_cpu_tensor = lens - torch.tensor(query_lens)
    runner.input_batch.num_prompt_tokens_cpu_tensor = torch.tensor([20, 20, 8])
    tables = torch.arange(3)[:, None]
    runner.input_batch.block_table = [SimpleNamespace(get_device_tensor=lambda n: tables[:n])]
    metadata, _ = GPUModelRunner._build_attention_metadata(
        runner, 10, 3, 8, ubatch_slices=slices, slot_mappings={0: torch.arange(10)}
    )
    first, second = (of_batch["layer"] for of_batch in metadata)
    assert (first.num_reqs, first.seq_lens.tolist()) == (3, [30, 40, 3])
    assert (second.num_reqs, second.seq_lens.tolist()) == (1, [8])
    assert second.query_start_loc.tolist() == [0, 5]
    assert second.block_table_tensor.tolist() == [[2]]


@pytest.fixture
def _scratch(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """vLLM's scratch memory for two micro-batches, on a CPU, as on a GPU."""
    monkeypatch.setattr(mk, "current_platform", SimpleNamespace(is_cpu=lambda: False))
    monkeypatch.setattr(torch.accelerator, "empty_cache", lambda: None)
    workspace.reset_workspace_manager()
    workspace.init_workspace_manager(torch.device("cpu"), 2)
    yield
    workspace.reset_workspace_manager()


def allocate(num_rows: int) -> tuple[torch.Tensor, ...]:
    """Of a layer in the standard format that gets so many rows."""
    from ep_backend_vllm.workspace import WorkspacePrepareAndFinalize

    buffer = MagicMock(num_max_tokens_per_rank=MAX_TOKENS)
    buffer.group.num_ranks, buffer.group.self_rank = NUM_RANKS, 0
    experts = SimpleNamespace(
        workspace_dtype=lambda dtype: dtype,
        workspace_shapes=lambda m, *args: ((m, TOP_K * HIDDEN), (m, TOP_K * HIDDEN), (m, HIDDEN)),
        finalize_weight_and_reduce_impl=lambda: None,
    )
    kernel = SimpleNamespace(
        fused_experts=experts, prepare_finalize=WorkspacePrepareAndFinalize(buffer, is_async=True)
    )
    sizes = (num_rows, num_rows, 4, HIDDEN, TOP_K, 4, 2)
    allocate_buffers = mk.FusedMoEKernelModularImpl._allocate_buffers
    given = (torch.float32, torch.device("cpu"), *sizes, None, None)
    return allocate_buffers(kernel, *given)


@pytest.mark.usefixtures("_scratch")
def test_a_step_that_is_not_split_has_scratch_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """Before it serves, vLLM tries the largest step in two halves; afterwards memory is locked."""
    whole = NUM_RANKS * MAX_TOKENS
    monkeypatch.setattr(ubatching, "dbo_enabled", lambda: True)
    for micro_batch in (0, 1):
        for module in (ubatching, workspace):
            monkeypatch.setattr(module, "dbo_current_ubatch_id", lambda i=micro_batch: i)
        assert allocate(whole // 2)[0].shape == (whole // 2, TOP_K * HIDDEN)
    workspace.lock_workspace()
    sizes = [len(memory) for memory in workspace.current_workspace_manager()._current_workspaces]
    assert sizes == [whole * BYTES_A_ROW, whole // 2 * BYTES_A_ROW]

    monkeypatch.setattr(ubatching, "dbo_enabled", lambda: False)
    for module in (ubatching, workspace):
        monkeypatch.setattr(module, "dbo_current_ubatch_id", lambda: 0)
    assert allocate(whole)[0].shape == (whole, TOP_K * HIDDEN)
    with pytest.raises(AssertionError, match="locked"):
        allocate(2 * whole)
