"""What buffers take from the table, and what they leave."""

from __future__ import annotations

import json
import logging
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from ep_backend import LowLatencyBuffer, NormalBuffer, SettingsMismatch, _native, virtual_world
from ep_backend.tuning import TUNING_VARIABLE, Entry, Shape, Site, Tuned, merge_into
from tests.support.processes import Rank, RankProcesses
from tests.support.shapes import Shape as BufferShape

CPU = torch.device("cpu")
SIZES: dict[str, Any] = {"hidden": 64, "num_experts": 8, "top_k": 2, "dtype": torch.bfloat16}
LOW_LATENCY = Shape(
    kernels="low_latency",
    num_ranks=2,
    hidden=64,
    num_experts=8,
    top_k=2,
    dtype="bfloat16",
    dispatch_dtype="bfloat16",
    combine_dtype="bfloat16",
    output_layout="expert_major",
    reduction="rank",
    has_workspaces=False,
)
NORMAL = replace(LOW_LATENCY, kernels="normal", output_layout="normal", reduction="normal")
SPIN_US = 7.0
NUM_BYTES = 3 << 20
LOGGER = "ep_backend.tuning"


def here(kernels: str, **changes: Any) -> Site:
    """Of virtual ranks on this CPU."""
    group = virtual_world(2).groups[0]
    return replace(Site.of(kernels, group, CPU), **changes)


@pytest.fixture
def table(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    path = tmp_path / "tuning.json"
    monkeypatch.setenv(TUNING_VARIABLE, str(path))
    return path


def spins(num_ranks: int = 2, **given: Any) -> list[float]:
    """Of the low-latency buffers of a virtual world."""

    def rank_main(group: Any) -> float:
        with LowLatencyBuffer(group, num_max_tokens_per_rank=4, **SIZES, **given) as buffer:
            return buffer._kernels.spin_us  # type: ignore[attr-defined]

    return virtual_world(num_ranks).run(rank_main)


def test_a_buffer_takes_what_was_found_for_it(
    table: Path, caplog: pytest.LogCaptureFixture
) -> None:
    found = {"date": "2026-11-26"}
    merge_into(table, [Entry(LOW_LATENCY, here("low_latency"), {"spin_us": SPIN_US}, found)])
    with caplog.at_level(logging.INFO, LOGGER):
        assert spins() == [SPIN_US] * 2
    assert sorted(r.getMessage() for r in caplog.records) == [
        f"LowLatencyBuffer, rank {rank}: spin_us={SPIN_US} from {table}, found 2026-11-26"
        for rank in range(2)
    ]


def test_another_shape_takes_nothing_and_says_nothing(
    table: Path, caplog: pytest.LogCaptureFixture
) -> None:
    merge_into(table, [Entry(LOW_LATENCY, here("low_latency"), {"spin_us": SPIN_US})])
    assert SPIN_US not in spins(num_ranks=1)
    assert SPIN_US not in spins(combine_dtype=torch.float8_e4m3fn)
    assert SPIN_US not in spins(output_layout="rank_major")
    assert not caplog.records


def test_what_the_caller_gives_wins(table: Path, caplog: pytest.LogCaptureFixture) -> None:
    merge_into(table, [Entry(LOW_LATENCY, here("low_latency"), {"spin_us": SPIN_US})])
    with caplog.at_level(logging.INFO, LOGGER):
        assert spins(spin_us=3.0) == [3.0, 3.0]
    assert f"nothing from {table}" in caplog.text
    assert "given by the caller: {'spin_us': 3.0}" in caplog.text


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"device": "another CPU"}, "device 'another CPU', not "),
        ({"link": "shm"}, "link 'shm', not 'virtual'"),
        ({"protocol": 1}, f"protocol 1, not {_native.PROTOCOL_VERSION}"),
    ],
)
def test_what_was_found_elsewhere_is_left_with_a_warning(
    change: dict[str, Any], message: str, table: Path, caplog: pytest.LogCaptureFixture
) -> None:
    elsewhere = Entry(LOW_LATENCY, here("low_latency", **change), {"spin_us": SPIN_US})
    merge_into(table, [elsewhere])
    assert SPIN_US not in spins()
    assert all(record.levelno == logging.WARNING for record in caplog.records)
    assert message in caplog.text
    assert "Run `ep-backend tune` here" in caplog.text
    # Beside an entry for here it is nothing to warn of.
    caplog.clear()
    merge_into(table, [replace(elsewhere, site=here("low_latency"))])
    assert spins() == [SPIN_US] * 2
    assert not caplog.records


@pytest.mark.parametrize("text", ["", "{}", json.dumps({"schema": 99, "entries": []}), "\0"])
def test_a_file_that_is_no_table_is_left_with_a_warning(
    text: str, table: Path, caplog: pytest.LogCaptureFixture
) -> None:
    table.write_text(text)
    assert SPIN_US not in spins()
    assert f"{table} is ignored: it" in caplog.text
    assert caplog.records[0].levelno == logging.WARNING


def test_wrong_arguments_are_refused_as_without_a_table(table: Path) -> None:
    merge_into(table, [Entry(LOW_LATENCY, here("low_latency"), {"spin_us": SPIN_US})])
    with pytest.raises(ValueError, match="transfer is 'shove'"):
        spins(transfer="shove")
    with pytest.raises(ValueError, match="device is 'abacus'"):
        spins(device="abacus")
    with pytest.raises(ValueError, match="device is 'abacus'"):
        virtual_world(2).run(lambda group: NormalBuffer(group, device="abacus", **SIZES))


def test_a_normal_buffer_takes_memory_and_polling(table: Path) -> None:
    settings = {"spin_us": SPIN_US, "num_bytes": NUM_BYTES}
    merge_into(table, [Entry(NORMAL, here("normal"), dict(settings))])

    def rank_main(group: Any) -> None:
        with NormalBuffer(group, **SIZES) as tuned:
            assert NUM_BYTES // 2 < tuned.num_symmetric_bytes <= NUM_BYTES
            assert tuned._calls._kernels.spin_us == SPIN_US  # type: ignore[attr-defined]
        with NormalBuffer(group, num_bytes=1 << 20, spin_us=1.0, **SIZES) as told:
            assert told.num_symmetric_bytes <= 1 << 20
            assert told._calls._kernels.spin_us == 1.0  # type: ignore[attr-defined]

    virtual_world(2).run(rank_main)


def test_without_a_table_a_normal_buffer_has_64_mib() -> None:
    sizes = SIZES | {"hidden": 4096}

    def rank_main(group: Any) -> None:
        with NormalBuffer(group, **sizes) as buffer:
            assert 63 << 20 < buffer.num_symmetric_bytes <= 64 << 20

    virtual_world(2).run(rank_main)


CUDA = BufferShape(2, num_max_tokens_per_rank=128, hidden=2048, device="cuda")
FOUND = Tuned({"num_sms": 24, "transfer": "push", "num_max_tagged_tokens": 64}, "/t.json")
OPEN = {"transfer": None, "num_max_tagged_tokens": None}


def test_on_cuda_the_wire_is_what_was_found() -> None:
    config = CUDA.settings().tuned(FOUND, OPEN).config(2)
    assert config.transfer == _native.Transfer.PUSH
    assert config.num_max_tagged_tokens == 64


def test_on_cuda_a_given_wire_wins() -> None:
    given = {"transfer": "pull", "num_max_tagged_tokens": 0}
    told = replace(CUDA, num_max_tagged_tokens=0).settings().tuned(FOUND, given).config(2)
    assert told.transfer == _native.Transfer.PULL
    assert told.num_max_tagged_tokens == 0


def test_on_cuda_no_more_is_tagged_than_a_batch_has() -> None:
    small = replace(CUDA, num_max_tokens_per_rank=5).settings().tuned(FOUND, OPEN)
    small.check(num_ranks=2)
    assert small.config(2).num_max_tagged_tokens == 5


def make_buffer(rank: Rank, path: str, normal: bool) -> None:
    import os

    os.environ[TUNING_VARIABLE] = path
    if normal:
        NormalBuffer(rank.group, **SIZES).close()
    else:
        LowLatencyBuffer(rank.group, num_max_tokens_per_rank=4, **SIZES).close()


@pytest.mark.parametrize("normal", [False, True])
def test_ranks_whose_tables_differ_are_told_so(normal: bool, tmp_path: Path) -> None:
    shape = NORMAL if normal else LOW_LATENCY
    site = here(shape.kernels, link="shm")
    paths = [str(tmp_path / f"{rank}.json") for rank in range(2)]
    for path, spin_us in zip(paths, (1.0, 2.0), strict=True):
        merge_into(Path(path), [Entry(shape, site, {"spin_us": spin_us})])
    with RankProcesses(2) as ranks:
        # The same from two files: no difference.
        ranks.run(make_buffer, paths[0], normal)
        for tables in (paths, [paths[0], "off"]):
            for rank, path in enumerate(tables):
                ranks.start(make_buffer, path, normal, ranks=[rank])
            for answer in ranks.answers():
                assert answer.error_type == SettingsMismatch.__name__
                assert "the tuning table's entry differs between ranks" in answer.error
                assert f"rank 0: {{'spin_us': 1.0}} of {paths[0]}, rank 1: " in answer.error
                assert "EP_BACKEND_TUNING=off" in answer.error
