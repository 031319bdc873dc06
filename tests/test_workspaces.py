"""Workspaces as Python sees them: which tensor lies where, and which calls are refused. The memory
is a CPU's, and nobody else reads it; exchanges are in tests/cuda."""

from __future__ import annotations

import ctypes
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from ep_backend import OrderError, _native
from ep_backend.memory import cuda
from ep_backend.outputs import OutputShape
from ep_backend.workspaces import Workspaces
from tests.support.shapes import Shape

SHAPE = Shape(
    3,
    num_max_tokens_per_rank=5,
    hidden=256,
    device="cuda",
    dispatch_dtype=torch.float8_e4m3fn,
    scale_format="ue8m0",
    output_layout="rank_major",
    num_workspaces=2,
)
CPU = torch.device("cpu")


class Memory:
    """A rank's symmetric memory, of which tensors are views."""

    def __init__(self, num_bytes: int) -> None:
        self._bytes = ctypes.create_string_buffer(num_bytes)
        self.base = ctypes.addressof(self._bytes)
        self.all = torch.frombuffer(self._bytes, dtype=torch.uint8)

    def tensor_at(
        self, address: int, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device
    ) -> torch.Tensor:
        num_bytes = torch.Size(shape).numel() * dtype.itemsize
        begin = address - self.base
        return self.all[begin : begin + num_bytes].view(dtype).view(shape)


@pytest.fixture
def memory(monkeypatch: pytest.MonkeyPatch) -> Memory:
    memory = Memory(SHAPE.layout().num_bytes)
    monkeypatch.setattr(cuda, "tensor_at", memory.tensor_at)
    return memory


def workspaces_in(memory: Memory) -> Workspaces:
    group: Any = SimpleNamespace(num_ranks=SHAPE.num_ranks, self_rank=1)
    shape = OutputShape.of(SHAPE.settings(), SHAPE.layout(), group)
    return Workspaces(2, memory.base, SHAPE.layout(), shape, SHAPE.dtype, CPU)


def test_by_expert_they_are_what_a_masked_gemm_takes(monkeypatch: pytest.MonkeyPatch) -> None:
    shape = replace(
        SHAPE, num_ranks=3, num_experts=7, output_layout="expert_major", reduction="source"
    )
    layout, group = shape.layout(), SimpleNamespace(num_ranks=3, self_rank=0)
    memory = Memory(layout.num_bytes)
    monkeypatch.setattr(cuda, "tensor_at", memory.tensor_at)
    output = OutputShape.of(shape.settings(), layout, group)  # type: ignore[arg-type]
    workspaces = Workspaces(2, memory.base, layout, output, shape.dtype, CPU)
    for idx, num_slots in ((0, 5), (1, 2)):
        workspace, rows = workspaces.at(idx, num_slots), 3 * num_slots  # of an expert
        assert workspace.recv_x.shape == workspace.combine_input.shape == (3, rows, 256)
        assert workspace.recv_topk_idx is None
        assert workspace.recv_topk_weights is None
        scales = workspace.recv_scales
        assert scales is not None
        assert (scales.shape, scales.stride()) == ((3, rows, 1), (rows, 1, rows))
        last = rows * 3 - 1
        for tensor, offset_of in (
            (workspace.recv_x, layout.workspace_row),
            (workspace.combine_input, layout.combine_input),
            (scales, layout.workspace_scales),  # one word a row
        ):
            assert tensor[2, rows - 1].data_ptr() - memory.base == offset_of(idx, last)
        handle = SimpleNamespace(pointers=lambda: (1, 2, 3, 4, 5), num_slots=num_slots)
        result = workspace.result(handle)  # type: ignore[arg-type]
        counts = result.num_recv_tokens_per_expert
        assert (counts.shape, counts.dtype) == ((3,), torch.int32)
        output_layout, *arguments = workspace.arguments(result)
        assert output_layout == _native.OutputLayout.EXPERT_MAJOR
        assert arguments == [0, 0, counts.data_ptr(), 0, 0, 3, 4, 5, idx, num_slots]
        result.recv_x.set_(torch.empty(0, dtype=result.recv_x.dtype))  # the caller's own
        assert workspace.recv_x.shape == (3, rows, 256)


def handle_of(epoch: int, workspace: int, num_slots: int) -> Any:
    return SimpleNamespace(epoch=epoch, workspace=workspace, num_slots=num_slots)


@pytest.mark.parametrize("num_slots", [1, 3, 5])
def test_tensors_lie_where_the_layout_says(memory: Memory, num_slots: int) -> None:
    layout, workspaces = SHAPE.layout(), workspaces_in(memory)
    for idx in range(2):
        workspace = workspaces.at(idx, num_slots)
        assert workspace.recv_scales is not None
        assert workspaces.at(idx, num_slots) is workspace  # made once
        for tensor, offset_of, last, dtype in (
            (workspace.recv_x, layout.workspace_row, 256, torch.float8_e4m3fn),
            (workspace.recv_scales, layout.workspace_scales, 1, torch.int32),
            (workspace.recv_topk_idx, layout.workspace_topk_idx, 3, torch.int32),
            (workspace.recv_topk_weights, layout.workspace_topk_weights, 3, torch.float32),
            (workspace.combine_input, layout.combine_input, 256, torch.bfloat16),
        ):
            assert tensor.shape == (3, num_slots, last)
            assert tensor.dtype == dtype
            for src_rank in range(3):
                message = src_rank * num_slots  # as the kernels number them
                assert tensor[src_rank].data_ptr() - memory.base == offset_of(idx, message)


def test_a_dispatch_takes_all_slots_or_as_many_as_it_is_told(memory: Memory) -> None:
    workspaces = workspaces_in(memory)
    assert workspaces.place(4, 1, None) == (1, 5)
    assert workspaces.place(4, 0, 4) == (0, 4)
    assert workspaces.place(0, 0, 1) == (0, 1)
    with pytest.raises(ValueError, match=r"workspace is 2, expected an integer in 0\.\.1"):
        workspaces.place(4, 2, None)
    with pytest.raises(ValueError, match=r"num_slots is 3, .* in 4\.\.5\. x has 4 tokens"):
        workspaces.place(4, 0, 3)
    with pytest.raises(ValueError, match=r"num_slots is 6, expected an integer in 4\.\.5"):
        workspaces.place(4, 0, 6)


def test_without_workspaces_nothing_may_be_asked_of_them() -> None:
    group: Any = SimpleNamespace(num_ranks=1, self_rank=0)
    shape = Shape(1)
    layout = shape.layout()
    output_shape = OutputShape.of(shape.settings(), layout, group)
    none = Workspaces(0, 0, layout, output_shape, shape.dtype, CPU)
    assert none.place(4, 0, None) == (-1, 0)
    with pytest.raises(ValueError, match="num_slots is 4, but this buffer has no workspaces"):
        none.place(4, 0, 4)
    with pytest.raises(ValueError, match="workspace is 1"):
        none.place(4, 1, None)


def test_combine_takes_the_input_of_the_last_dispatch_there(memory: Memory) -> None:
    workspaces = workspaces_in(memory)
    first, other, second = handle_of(1, 0, 5), handle_of(2, 1, 5), handle_of(3, 0, 2)
    out = workspaces.of(first).combine_input
    workspaces.check(out, first)
    with pytest.raises(ValueError, match=r"expert_out is not combine_input\(0\)"):
        workspaces.check(workspaces.of(other).combine_input, first)
    workspaces.check(out, first)
    workspaces.check(workspaces.of(second).combine_input, second)
    with pytest.raises(OrderError, match="of dispatch 1, but dispatch 3 has gone to the same work"):
        workspaces.check(out, first)
