"""What a normal buffer between nodes asks of its kernels, which are a stand-in, and what DeepEP's
handles make of what those leave. Without a GPU."""

from __future__ import annotations

import re
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from ep_backend import Group, PeerTimeout, SettingsMismatch, _native, virtual_world
from ep_backend.deep_ep_cuda_handle import NetworkNormalHandle
from ep_backend.deep_ep_handle import NormalHandle
from ep_backend.memory import nvshmem
from ep_backend.memory.nvshmem import NetworkMemory
from tests.support.normal import NormalShape, make_case
from tests.support.normal_network import NetworkNormalShape

BINDINGS = (Path(__file__).parents[2] / "csrc/nvshmem/bindings_normal.cpp").read_text()
KERNELS = {
    "normal_route": "exchange_counts",
    "normal_counts": "wait_for_counts",
    "normal_dispatch": "dispatch",
    "normal_combine": "combine",
}
LOST = SimpleNamespace(
    self_rank=0,
    peer_rank=1,
    phase=_native.Phase.DISPATCH,
    half=_native.Half.RECV,
    epoch=3,
    expected=4,
    seen=2,
    waited_ns=10**9,
)
SHAPE = NetworkNormalShape(
    NormalShape(2, hidden=32, num_experts=6, num_tokens_per_round=4, ranks_per_node=1)
)


def num_parameters(method: str) -> int:
    """Of a binding, without `self` and the stream."""
    found = re.search(rf'"{method}",\s*\[\]\(NormalNetworkRank& self,([^)]*)\)', BINDINGS)
    assert found is not None
    return found[1].count(",")


class FakeKernels:
    """Of one rank, which receives five rows in two rounds."""

    def __init__(self, *_: object) -> None:
        self.calls: list[tuple[str, tuple[Any, ...]]] = []
        self.result: Any = _native.OpResult()

    def __getattr__(self, name: str) -> Any:
        if name not in KERNELS:
            raise AttributeError(name)

        def kernel(*args: Any) -> Any:
            has_stream = name == "normal_combine"  # others add it
            assert len(args) == num_parameters(KERNELS[name]) + has_stream, name
            self.calls.append((name, args))
            return self.result

        return kernel

    def counts(self) -> tuple[int, int, list[int]]:
        return 5, 2, [1, 2, 3]

    def num_operations(self) -> int:
        return 0

    def report(self) -> Any:
        return self.result


class FakeCounters:
    are_rows_counted = False
    statistics = None

    def __init__(self, *_: object, **__: object) -> None: ...

    def dispatched(self, *_: object) -> None: ...

    def combined(self, *_: object) -> None: ...

    def waiting(self, _: int) -> Any:
        return nullcontext()


@pytest.fixture(autouse=True)
def _on_a_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    module = "ep_backend.normal_network"
    monkeypatch.setattr(f"{module}.usable_device", lambda _: torch.device("cpu"))
    monkeypatch.setattr("ep_backend.normal_cuda.num_available_sms", lambda *_: 132)
    monkeypatch.setattr(f"{module}.NetworkNormalKernels", FakeKernels)
    monkeypatch.setattr(f"{module}.CudaNormalCounters", FakeCounters)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    monkeypatch.setattr(nvshmem, "allocate", allocate)


def allocate(
    group: Group, num_bytes: int, device: torch.device, *, ranks_per_node: int, **_: object
) -> NetworkMemory:
    assert (num_bytes, ranks_per_node) == (SHAPE.num_bytes(), 1)
    return NetworkMemory(nvshmem._Block(1000, num_bytes), [1, 0], [0, 1])


def test_kernels_are_called_in_their_order_with_what_they_take() -> None:
    case = make_case(SHAPE.shape, "uniform", [7, 3], seed=0, num_biases=1)

    def rank_main(group: Group) -> list[str]:
        inputs = case.inputs(group.self_rank)
        with SHAPE.buffer(group) as buffer:
            kernels: Any = buffer._network_kernels
            result = buffer.dispatch(*inputs)
            assert result.recv_x.shape == (5, 32)
            assert result.num_recv_tokens_per_expert == [1, 2, 3]
            assert (result.handle.num_rows, result.handle.num_rounds) == (5, 2)
            x = buffer.combine_input(result.handle)
            weights = result.recv_topk_weights
            buffer.combine(x, result.handle, topk_weights=weights, bias=inputs[0])
            names = [name for name, _ in kernels.calls]
            (_, *brought), (_, *sent_home) = kernels.calls[-2:]
            assert brought[0][-2:] == (5, 16)  # rows there is room for, SMs
            assert sent_home[0][0] == x.data_ptr()

            kernels.calls.clear()
            buffer.dispatch(inputs[0], handle=result.handle, num_sms=3)
            ((_, cached),) = kernels.calls
            assert cached[3:7] == (True, 0, False, 0)
            assert cached[-6:] == (0, 0, 0, 0, 5, 3)  # no scales, nothing beside the rows

            aligned = buffer.dispatch(*inputs, expert_alignment=2)
            assert aligned.num_recv_tokens_per_expert == [2, 2, 4]

            kernels.calls.clear()
            worst = buffer.dispatch(*inputs, num_worst_tokens=9)
            assert [name for name, _ in kernels.calls] == ["normal_route", "normal_dispatch"]
            assert kernels.calls[0][1][-3:] == (0, 9, 16)  # nobody waits
            assert worst.recv_x.shape == (9, 32)
        return names

    expected = ["normal_route", "normal_counts", "normal_dispatch", "normal_combine"]
    assert virtual_world(2).run(rank_main) == [expected] * 2


def test_a_rank_without_kernels_is_told_everywhere(monkeypatch: pytest.MonkeyPatch) -> None:
    """And nobody's memory stays with a buffer that does not exist."""
    blocks: list[nvshmem._Block] = []

    def note(*args: Any, **kwargs: Any) -> NetworkMemory:
        memory = allocate(*args, **kwargs)
        blocks.append(memory._block)
        return memory

    def refuse(_: object, self_rank: int, *rest: object) -> Any:
        if self_rank == 1:
            raise RuntimeError("no room for counters")
        return FakeKernels()

    monkeypatch.setattr(nvshmem, "allocate", note)
    monkeypatch.setattr("ep_backend.normal_network.NetworkNormalKernels", refuse)

    def rank_main(group: Group) -> None:
        with pytest.raises((RuntimeError, SettingsMismatch), match="no room for counters"):
            SHAPE.buffer(group)

    virtual_world(2).run(rank_main)
    assert [block.is_free for block in blocks] == [True, True]


def test_memory_of_a_failed_buffer_is_not_used_again() -> None:
    case = make_case(SHAPE.shape, "uniform", [7, 3], seed=0)

    def rank_main(group: Group) -> list[bool]:
        are_free = []
        for fails in (False, True):
            buffer: Any = SHAPE.buffer(group)
            if fails:
                buffer._network_kernels.result = SimpleNamespace(
                    ok=False, status=_native.Status.NOT_ARRIVED, record=LOST
                )
                with pytest.raises(PeerTimeout, match="of the 4 puts that it tells of only 2"):
                    buffer.dispatch(*case.inputs(group.self_rank))
            buffer.close()
            are_free.append(buffer._memory._block.is_free)
        return are_free

    assert virtual_world(2).run(rank_main) == [[True, False]] * 2


def test_deep_eps_handle_says_what_that_of_the_cpu_does() -> None:
    """Of the same routing."""
    shape = NormalShape(4, hidden=8, num_experts=7, top_k=3, ranks_per_node=2)
    case = make_case(shape, "masked", [9, 0, 14, 3], seed=1)

    def rank_main(group: Group) -> None:
        with shape.buffer(group) as buffer:
            first = buffer.dispatch(*case.inputs(group.self_rank)).handle
            owner: Any = None
            on_cpu = NormalHandle(owner, first, case.topk_idx[group.self_rank], 0)
            is_sent = on_cpu.is_token_in_rank
            num_per_round = shape.num_tokens_per_round
            rounds = [is_sent[i : i + num_per_round] for i in range(0, len(is_sent), num_per_round)]
            counts = torch.stack([r.sum(0) for r in rounds]) if rounds else torch.empty(0, 4)
            on_gpu: Any = SimpleNamespace(
                buffer=buffer,
                num_rounds=first.num_rounds,
                ranks=(is_sent.long() << torch.arange(4)).sum(1),
                messages=first.messages,
                round_counts=torch.nn.functional.pad(counts.int(), (0, 1)),  # another node's
                num_recv_tokens_per_rank=first.num_recv_tokens_per_rank.int(),
                recv_src_tokens=first.recv_src_tokens,
            )
            theirs = NetworkNormalHandle(owner, on_gpu, case.topk_idx[group.self_rank], 0)
            for name, ours, same in zip(NormalHandle._FIELDS, on_cpu, theirs, strict=True):
                assert ours.dtype == same.dtype, name
                assert torch.equal(ours, same), name

    shape.world().run(rank_main)
