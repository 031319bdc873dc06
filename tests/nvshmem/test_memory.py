"""Which memory a buffer gets, and which groups are refused; NVSHMEM itself is a stand-in."""

from __future__ import annotations

import gc
import importlib.util
import itertools
import os
import threading
import weakref
from importlib import metadata
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from ep_backend import (
    Group,
    NetworkConfig,
    RendezvousError,
    SettingsMismatch,
    low_latency,
    virtual_world,
)
from ep_backend.memory import nvshmem
from tests.support.processes import Rank, RankProcesses
from tests.support.shapes import Shape

DEVICE = torch.device("cuda", 0)


class FakeNvshmem:
    """Of one rank. Memory is made of addresses alone."""

    def __init__(self, pe: int = 0, num_pes: int = 2, *, is_started: bool = True) -> None:
        self._pe, self._num_pes, self._is_started = pe, num_pes, is_started
        self._addresses = itertools.count(1000)
        self.calls: list[str] = []

    def is_initialized(self) -> bool:
        return self._is_started

    def allocate(self, num_bytes: int) -> int:
        self.calls.append(f"allocate {num_bytes}")
        return next(self._addresses)

    def quiet(self) -> None:
        self.calls.append("quiet")

    def attach(self) -> None:
        self.calls.append("attach")

    def make_unique_id(self) -> bytes:
        return b"id"

    def self_pe(self) -> int:
        return self._pe

    def num_pes(self) -> int:
        return self._num_pes


@pytest.fixture(autouse=True)
def _no_cuda(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "set_device", lambda _: None)
    monkeypatch.setattr(nvshmem, "_world", None)


def world() -> nvshmem._World:
    return nvshmem._World("a", {}, DEVICE)


def test_memory_of_closed_buffers_is_used_again() -> None:
    def rank_main(group: Group) -> list[str]:
        native, mine = FakeNvshmem(), world()

        def open_one(num_bytes: int) -> nvshmem.NetworkMemory:
            block = nvshmem._block(group, mine, num_bytes, native)
            return nvshmem.NetworkMemory(block, [1, 0], [0, 1])

        first, second = open_one(300), open_one(100)
        for memory in (first, second):
            memory.close()
        assert open_one(90)._block is second._block  # the smallest that is large enough
        third = open_one(200)
        assert third._block is first._block
        assert open_one(200)._block is mine.blocks[2]
        return native.calls

    expected = ["allocate 300", "allocate 100", "quiet", "quiet", "allocate 200"]
    assert virtual_world(2).run(rank_main) == [expected, expected]


def test_memory_that_a_peer_may_still_write_is_not() -> None:
    def rank_main(group: Group) -> list[str]:
        native, mine = FakeNvshmem(), world()
        for has_failed in (group.self_rank == 1, False):
            block = nvshmem._block(group, mine, 100, native)
            memory = nvshmem.NetworkMemory(block, [1, 0], [0, 1])
            memory.close(has_failed=lambda has_failed=has_failed: has_failed)
        assert nvshmem._block(group, mine, 100, native) is mine.blocks[1]
        return native.calls

    expected = ["allocate 100", "allocate 100", "quiet"]
    assert virtual_world(2).run(rank_main) == [expected, expected]


def test_memory_of_kernels_that_failed_after_their_buffer_was_closed_is_not() -> None:
    """Whether they have is known when they have ended."""

    def rank_main(group: Group) -> list[str]:
        native, mine = FakeNvshmem(), world()
        blocks = [nvshmem._block(group, mine, num_bytes, native) for num_bytes in (100, 200)]
        is_first_bad = group.self_rank == 1
        for block, is_bad in zip(blocks, (is_first_bad, False), strict=True):
            nvshmem.NetworkMemory(block, [1, 0], [0, 1]).close(
                has_failed=lambda bad=is_bad: bad and "quiet" in native.calls
            )
            assert block.is_free
        assert nvshmem._block(group, mine, 50, native) is blocks[1]
        assert not blocks[0].is_free
        nvshmem._block(group, mine, 50, native)
        return native.calls

    expected = ["allocate 100", "allocate 200", "quiet", "allocate 50"]
    assert virtual_world(2).run(rank_main) == [expected, expected]


def test_a_rank_without_room_is_told_everywhere() -> None:
    def rank_main(group: Group) -> str:
        native = FakeNvshmem()

        def allocate(num_bytes: int) -> int:
            raise RuntimeError(f"NVSHMEM has no {num_bytes} bytes of symmetric memory left")

        if group.self_rank == 1:
            native.allocate = allocate  # type: ignore[method-assign]
        with pytest.raises(RendezvousError, match=r"rank 1: .* has no 100 bytes") as refusal:
            nvshmem._block(group, world(), 100, native)
        return str(refusal.value)

    first, second = virtual_world(2).run(rank_main)
    assert first == second


def test_ranks_write_to_each_other_or_neither_does() -> None:
    seen = [[1, 2, 3], [0, 2, 3], [1, 2, 3]]  # rank 1 does not see the memory of rank 0

    def rank_main(group: Group) -> list[int]:
        return nvshmem._mutual(group, seen[group.self_rank])

    assert virtual_world(3).run(rank_main) == [[1, 0, 3], [0, 2, 3], [1, 2, 3]]


def test_ranks_of_other_nodes_are_put_to() -> None:
    def rank_main(group: Group) -> list[int]:
        block = nvshmem._Block(10, 100)
        bases = nvshmem._of_node(group, block, [10, 11, 12, 13], 2)
        assert not block.is_free
        return bases

    assert virtual_world(4).run(rank_main) == [[10, 11, 0, 0]] * 2 + [[0, 0, 12, 13]] * 2


def test_ranks_of_a_node_must_see_each_other() -> None:
    def rank_main(group: Group) -> str:
        bases = [10, 11, 12, 13] if group.self_rank != 3 else [10, 11, 0, 13]
        block = nvshmem._Block(10, 100)
        with pytest.raises(RendezvousError) as refusal:
            nvshmem._of_node(group, block, bases, 2)
        assert block.is_free
        return str(refusal.value)

    (refusal,) = set(virtual_world(4).run(rank_main))
    assert refusal.startswith("rank 3: its GPU does not see the memory of rank 2")


def test_a_call_that_waits_for_a_missing_peer_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(nvshmem, "CALL_SECS", 0.05)
    for_ever = threading.Event()
    with pytest.raises(RendezvousError, match="NVSHMEM's malloc did not return within 0 s"):
        nvshmem._bounded("malloc", DEVICE, for_ever.wait)
    for_ever.set()
    assert nvshmem._bounded("malloc", DEVICE, lambda: 7) == 7
    with pytest.raises(ZeroDivisionError):
        nvshmem._bounded("malloc", DEVICE, lambda: 1 // 0)


def join(rank: Rank, is_started: list[bool], pes: list[int], num_pes: int) -> Any:
    torch.cuda.set_device = lambda _: None  # type: ignore[assignment]
    mine = rank.group.self_rank
    nvshmem._world = world() if is_started[mine] else None
    native = FakeNvshmem(pes[mine], num_pes, is_started=is_started[mine])
    try:
        joined, found = nvshmem._join(rank.group, DEVICE, {}, native)
    except RendezvousError as e:
        return str(e)
    finally:
        nvshmem._world = None
    return joined.identity, found, native.calls


def test_who_may_join() -> None:
    with RankProcesses(2) as ranks:
        # Ranks of the group in another order than NVSHMEM's.
        expected = ("a", [1, 0], ["attach"])
        assert ranks.run(join, [True, True], [1, 0], 2) == [expected, expected]
        for answer in ranks.run(join, [True, False], [0, 1], 2):
            assert "some ranks of this group have started NVSHMEM with other processes" in answer
        for answer in ranks.run(join, [True, True], [0, 2], 3):
            assert "this group's ranks are [0, 2] of NVSHMEM's 3 in this process" in answer


def test_what_nvshmem_cannot_have(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(nvshmem, "extension", lambda: FakeNvshmem(is_started=False))
    required = {"NVSHMEM_IB_SL": "3"}
    alone, *_ = virtual_world(1).groups
    nvshmem._check_start(alone, DEVICE, required)
    with pytest.raises(ValueError, match="one rank a process"):
        nvshmem._check_start(virtual_world(2).groups[0], DEVICE, required)
    monkeypatch.setenv("NVSHMEM_IB_SL", "4")
    with pytest.raises(ValueError, match="NVSHMEM_IB_SL is '4' in the environment"):
        nvshmem._check_start(alone, DEVICE, required)
    # Started by somebody else, with what is in the environment.
    monkeypatch.setattr(nvshmem, "extension", FakeNvshmem)
    with pytest.raises(ValueError, match="NVSHMEM has started in this process with 4"):
        nvshmem._check_start(alone, DEVICE, required)
    monkeypatch.setattr(nvshmem, "_world", world())
    with pytest.raises(ValueError, match="has started on cuda:0 in this process, not on cuda:1"):
        nvshmem._check_start(alone, torch.device("cuda", 1), {})


def environments(rank: Rank, values: list[str | None]) -> None:
    """`NVSHMEM_SYMMETRIC_SIZE` of each rank."""
    value = values[rank.group.self_rank]
    if value is not None:
        os.environ["NVSHMEM_SYMMETRIC_SIZE"] = value
    os.environ["NVSHMEM_HCA_LIST"] = f"mlx5_{rank.group.self_rank}:1"  # a host's own
    nvshmem.extension = lambda: FakeNvshmem(is_started=False)  # type: ignore[assignment,return-value]
    shape = Shape(2, hidden=24, network=NetworkConfig(), device="cuda")
    nvshmem._join = lambda *_: throw(Joined())  # type: ignore[assignment]
    nvshmem.allocate(rank.group, 100, DEVICE, shape.settings())


class Joined(Exception):
    pass


def throw(error: Exception) -> Any:
    raise error


def test_variables_of_nvshmem_are_the_same_on_all_hosts() -> None:
    for values in (["1G", "2G"], ["1G", None], [None, "2G"]):
        with RankProcesses(2) as ranks:
            ranks.start(environments, values)
            for answer in ranks.answers():
                assert answer.error_type == SettingsMismatch.__name__, answer.details
                told = f"rank 0: {values[0]!r}, rank 1: {values[1]!r}"
                assert f"NVSHMEM_SYMMETRIC_SIZE differs between ranks ({told})" in answer.error
                assert "alike on all hosts" in answer.error
    with RankProcesses(2) as ranks:
        ranks.start(environments, ["1G", "1G"])
        assert [answer.error_type for answer in ranks.answers()] == ["Joined"] * 2


def networks(rank: Rank, levels: list[int | None]) -> None:
    """As if there were GPUs; up to where ranks agree."""
    level = levels[rank.group.self_rank]
    network = None if level is None else NetworkConfig(service_level=level)
    settings = Shape(2, network=network, device="cuda").settings()
    rank.group.agree("LowLatencyBuffer", settings.agreed(), None, settings.remedies())


def test_settings_of_the_network_are_the_same_on_all_hosts() -> None:
    with RankProcesses(2) as ranks:
        ranks.run(networks, [3, 3])
    for levels, told in (
        ([3, 4], r"network.service_level differs between ranks (rank 0: 3, rank 1: 4). Pass"),
        ([3, None], "network differs between ranks (rank 0: 'given', rank 1: None). Pass"),
    ):
        with RankProcesses(2) as ranks:
            ranks.start(networks, levels)
            for answer in ranks.answers():
                assert told in answer.error
                assert "EP_BACKEND_NETWORK to the same on every host" in answer.error


def test_a_rank_that_has_no_kernels_is_told_everywhere(monkeypatch: pytest.MonkeyPatch) -> None:
    """And nobody's memory stays with a buffer that does not exist."""
    closed: list[int] = []
    original = low_latency.make_kernels

    def make_kernels(*arguments: Any) -> Any:
        group, memory = arguments[2], arguments[3]
        close = memory.close

        def note(**options: Any) -> None:
            assert not options["has_failed"]()
            closed.append(group.self_rank)
            close(**options)

        memory.close = note
        if group.self_rank == 1:
            raise ValueError("num_max_tokens_per_rank is too much")
        return original(*arguments)

    monkeypatch.setattr(low_latency, "make_kernels", make_kernels)

    def rank_main(group: Group) -> None:
        with pytest.raises(ValueError, match="num_max_tokens_per_rank is too much"):
            Shape(3).buffer(group)

    virtual_world(3).run(rank_main)
    assert sorted(closed) == [0, 1, 2]


def test_memory_that_is_kept_keeps_no_tensors() -> None:
    """What it asks of its closed buffer is not the buffer."""

    def rank_main(group: Group) -> bool:
        asked: list[Any] = []
        buffer = Shape(1).buffer(group)
        memory = SimpleNamespace(close=lambda *, has_failed: asked.append(has_failed))
        buffer._memory = memory  # type: ignore[assignment]
        buffer.close()
        alive = weakref.ref(buffer)
        del buffer
        gc.collect()
        return alive() is None and not asked[0]()

    assert virtual_world(1).run(rank_main) == [True]


def test_a_module_that_does_not_load_names_both_versions(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / nvshmem.VERSION_NOTE).write_text("3.8.0\n")
    spec = SimpleNamespace(origin=str(tmp_path / "_nvshmem.so"))
    monkeypatch.setattr(importlib.util, "find_spec", lambda _: spec)
    versions = {"nvidia-nvshmem-cu13": "3.4.5"}

    def version(wheel: str) -> str:
        if wheel not in versions:
            raise metadata.PackageNotFoundError(wheel)
        return versions[wheel]

    def load(_: str) -> None:
        raise ImportError("undefined symbol: nvshmem_selected_device_transport")

    monkeypatch.setattr(metadata, "version", version)
    monkeypatch.setattr(importlib, "import_module", load)
    with pytest.raises(ImportError) as refusal:
        nvshmem.extension()
    assert "undefined symbol" in str(refusal.value)
    assert "built with NVSHMEM 3.8.0; installed: nvidia-nvshmem-cu13 3.4.5." in str(refusal.value)
    assert "Install nvidia-nvshmem-cu13==3.8.0, or build" in str(refusal.value)


def test_a_build_without_it_says_what_to_do() -> None:
    if importlib.util.find_spec("ep_backend._nvshmem") is not None:
        pytest.skip("this build has NVSHMEM: its absence was NOT tested")
    with pytest.raises(ImportError, match="EP_BACKEND_NVSHMEM=ON"):
        nvshmem.extension()
    shape = Shape(1, network=NetworkConfig(), device="cuda")
    settings = shape.settings()
    with pytest.raises(ValueError, match="ep_backend was built without NVSHMEM"):
        nvshmem.allocate(virtual_world(1).groups[0], 100, DEVICE, settings)
