"""`ep-backend tune`: how it chooses, what it refuses, and that its table changes new buffers."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from ep_backend import LowLatencyBuffer, NormalBuffer, _native, reference
from ep_backend.bench import tune
from ep_backend.bench.op_cuda_rank import CheckFailed
from ep_backend.bench.report import section_of_file
from ep_backend.bench.routing import make_inputs
from ep_backend.bench.tune_cases import NormalOps, owners
from ep_backend.bench.tune_search import (
    Settings,
    Space,
    Times,
    first_within,
    search_low_latency,
    search_normal,
    slowness,
    tagged_limit,
)
from ep_backend.bench.tune_settings import parse_arguments
from ep_backend.cli import app
from ep_backend.tuning import TUNING_VARIABLE, Site, Table, merge_into
from tests.support.processes import Rank, RankProcesses
from tests.tuning.test_table import ENTRY

HAS_GPU = _native.has_cuda and torch.cuda.is_available()
DEFAULTS: Settings = {"num_sms": 132, "transfer": "pull", "num_max_tagged_tokens": 128}
SPACE = Space(("pull", "push"), 128, (16, 64, 132))


def test_the_first_that_is_fast_enough() -> None:
    times = [{1: 30.0, 8: 60.0}, {1: 20.8, 8: 40.0}, {1: 20.0, 8: 40.0}]
    assert first_within(times, 0.05) == 1
    assert first_within(times, 0.01) == 2
    assert slowness(times[0], times[2]) == pytest.approx(1.5)


def test_small_batches_are_tagged_up_to_the_first_that_does_not_gain() -> None:
    untagged = {1: 10.0, 16: 12.0, 64: 20.0, 128: 30.0}
    assert tagged_limit({1: 8.0, 16: 11.0, 64: 21.0, 128: 29.0}, untagged) == 16
    assert tagged_limit({1: 8.0, 16: 11.0, 64: 19.0, 128: 29.0}, untagged) == 128
    assert tagged_limit({1: 10.0, 16: 11.0, 64: 19.0, 128: 29.0}, untagged) == 0
    # What is within the tolerance is no gain.
    assert tagged_limit({1: 9.95, 16: 11.0, 64: 19.0, 128: 29.0}, untagged) == 0


class Machine:
    """Times of a machine that is a formula."""

    def __init__(self, push: float = 1.0, best_sms: int = 64, saves_tagged: float = 2.0) -> None:
        self.push = push
        self.best_sms = best_sms
        self.saves_tagged = saves_tagged
        self.num_measured = 0

    def __call__(self, candidates: Sequence[Settings]) -> list[Times]:
        self.num_measured += len(candidates)
        return [{n: self.us(settings, n) for n in (1, 16, 128)} for settings in candidates]

    def us(self, settings: dict[str, Any], num_tokens: int) -> float:
        us = 10 + num_tokens / min(settings["num_sms"], self.best_sms)
        us += 0.02 * max(0, settings["num_sms"] - self.best_sms)
        if num_tokens <= settings["num_max_tagged_tokens"]:
            us += num_tokens / 32 - self.saves_tagged
        return us * (self.push if settings["transfer"] == "push" else 1)


def test_low_latency_finds_each_setting_of_a_machine() -> None:
    machine = Machine(push=0.8)
    found = search_low_latency(SPACE, DEFAULTS, machine)
    assert found.settings == {"num_sms": 64, "transfer": "push", "num_max_tagged_tokens": 16}
    assert found.defaults == DEFAULTS
    assert found.gain > 1.25
    assert machine.num_measured == len(found.measured) == 4 + 3 + 2


def test_defaults_that_are_best_stay() -> None:
    machine = Machine(best_sms=132, saves_tagged=5.0)
    found = search_low_latency(SPACE, DEFAULTS, machine)
    assert found.settings == DEFAULTS
    assert found.gain == 1.0


def test_what_gains_less_than_the_tolerance_does_not_replace_the_defaults() -> None:
    def measure(candidates: Sequence[Settings]) -> list[Times]:
        return [{1: 10.0 - 0.001 * c["spin_us"]} for c in candidates]  # type: ignore[operator]

    found = search_low_latency(Space(spin_us=(0, 50)), {"spin_us": 0.0}, measure)
    assert found.settings == {"spin_us": 0}


def test_normal_takes_the_fewest_sms_and_the_least_memory_that_are_fast_enough() -> None:
    def measure(candidates: Sequence[Settings]) -> list[Times]:
        return [
            {4096: 100 / min(int(c["num_sms"]), 8) + 100 * (int(c["num_bytes"]) < 2000)}
            for c in candidates
        ]

    space = Space(num_sms=(4, 8, 16), num_bytes=(1000, 2000, 4000))
    found = search_normal(space, {"num_sms": 16, "num_bytes": 500}, measure)
    assert found.settings == {"num_sms": 8, "num_bytes": 2000}
    assert found.gain == pytest.approx(112.5 / 12.5)


def test_owners_are_those_of_the_partition() -> None:
    topk_idx = make_inputs(
        0, 0, num_tokens=50, hidden=8, num_experts=7, top_k=3, dtype=torch.float32
    ).topk_idx
    expected = torch.zeros(50, 3, dtype=torch.bool)
    for rank in range(3):
        own = reference.experts_of_rank(7, 3, rank)
        expected[:, rank] = ((topk_idx >= own.start) & (topk_idx < own.stop)).any(1)
    assert torch.equal(owners(topk_idx, 7, 3), expected)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--layout", "row_major"], "layouts has 'row_major', expected expert_major or"),
        (["--kernels", "fast"], "kernels has 'fast', expected low_latency or normal"),
        (["--dispatch-dtype", "float32"], "dispatch_dtype has 'float32', expected bf16 or fp8"),
        (["--layout", "expert_workspace"], "expert workspaces are for --device cuda"),
        (["--virtual"], "are for --device cuda"),
        (["--experts", "4", "--ranks", "8", "--top-k", "2"], "number of ranks, 8"),
        (["--spin-us=-1"], "spin_us is (-1.0,), expected numbers from 0"),
        (["--tokens", "0"], "num_tokens is (0,), expected positive"),
    ],
)
def test_impossible_settings_are_refused(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as caught:
        parse_arguments(arguments)
    assert caught.value.code == 2
    assert message in capsys.readouterr().err


def test_a_model_is_a_shape() -> None:
    settings = parse_arguments(
        [
            *("--model", "deepseek-v3", "--top-k", "4", "--device", "cuda", "--virtual"),
            *("--dispatch-dtype", "fp8", "--layout", "expert_major,expert_source,rank_major"),
        ]
    ).settings
    shapes = settings.shapes_of(2)
    assert [(s.output_layout, s.reduction, s.has_workspaces) for s in shapes] == [
        ("expert_major", "rank", False),
        ("expert_major", "source", False),
        ("rank_major", "rank", True),
        ("normal", "normal", False),
    ]
    assert {(s.hidden, s.num_experts, s.top_k, s.dispatch_dtype) for s in shapes} == {
        (7168, 256, 4, "float8_e4m3fn")
    }


@pytest.mark.skipif(HAS_GPU, reason="there is a GPU")
def test_without_a_gpu_cuda_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    table = tmp_path / "t.json"
    assert tune.main(["--device", "cuda", "--virtual", "--table", str(table)]) == 1
    assert "needs a GPU" in capsys.readouterr().err
    assert not table.exists()


def test_a_table_that_cannot_be_written_is_noticed_before_the_search(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tune, "_search_processes", lambda *_: pytest.fail("it has searched"))
    file = tmp_path / "file"
    file.touch()
    table = file / "t.json"
    assert tune.main(["--ranks", "2", "--table", str(table)]) == 1
    assert f"{table} cannot be written" in (said := capsys.readouterr().err)
    assert "name another with --table" in said


def test_it_does_not_guess_where_the_table_is(capsys: pytest.CaptureFixture[str]) -> None:
    assert tune.main(["--ranks", "2"]) == 2  # tests have it off
    expected = "EP_BACKEND_TUNING is off, or there is no home directory; name a table with --table"
    assert expected in capsys.readouterr().err


def test_show_prints_the_table(tmp_path: Path) -> None:
    path = tmp_path / "t.json"

    def shown() -> tuple[int, str]:
        result = CliRunner().invoke(app, ["tune", "--show", "--table", str(path)])
        return result.exit_code, result.output

    assert shown() == (0, f"table: {path}\nno entries\n")
    merge_into(path, [ENTRY])
    status, text = shown()
    assert status == 0
    assert "8 ranks, hidden 7168, 256 experts, top-8, float8_e4m3fn out, bfloat16 home" in text
    assert "NVIDIA H100, nvlink-18, protocol 7" in text
    assert "num_sms 24, transfer push, num_max_tagged_tokens 16" in text
    path.write_text("{}")
    status, text = shown()
    assert status == 1
    assert "its schema is None" in text


def make_buffers(rank: Rank, path: str) -> tuple[float, float, int]:
    import os

    os.environ[TUNING_VARIABLE] = path
    sizes: dict[str, Any] = {"hidden": 256, "num_experts": 8, "top_k": 2, "dtype": torch.bfloat16}
    with (
        LowLatencyBuffer(rank.group, num_max_tokens_per_rank=4, **sizes) as low_latency,
        NormalBuffer(rank.group, **sizes) as normal,
    ):
        return (
            low_latency._kernels.spin_us,  # type: ignore[attr-defined]
            normal._calls._kernels.spin_us,  # type: ignore[attr-defined]
            normal.num_symmetric_bytes,
        )


def test_a_table_made_here_is_what_new_buffers_take(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """With ranks that are processes. What polls for 7 us here can only come from the table."""
    monkeypatch.setenv(TUNING_VARIABLE, "off")  # set by the command, too
    path, output = tmp_path / "cache" / "tuning.json", tmp_path / "all.json"
    shape = ["--ranks", "2", "--hidden", "256", "--experts", "8", "--top-k", "2"]
    batches = ["--tokens", "1,4", "--prefill-tokens", "64", "--chain", "3", "--repeats", "2"]
    files = ["--table", str(path), "--output", str(output)]
    assert tune.main([*shape, *batches, *files, "--layout", "expert_major,rank_major"]) == 0
    assert f"table: {path}" in capsys.readouterr().out

    table = Table.read(path)
    assert [(e.shape.kernels, e.shape.output_layout) for e in table.entries] == [
        ("low_latency", "expert_major"),
        ("low_latency", "rank_major"),
        ("normal", "normal"),
    ]
    assert {e.site.link for e in table.entries} == {"shm"}
    document = json.loads(output.read_text())
    assert [c["kernels"] for c in document["cases"]] == ["low_latency"] * 4 + ["normal"]
    assert len(document["table"]["entries"]) == 3
    assert {line["step"] for line in document["tried"]} == {"spin_us", "num_bytes", "end"}
    assert not any(str(file) in document["command"] for file in (path, output))
    assert section_of_file(output).charts

    by_kernels = {
        e.shape.kernels: e for e in table.entries if e.shape.output_layout != "rank_major"
    }
    low_latency, normal = by_kernels["low_latency"], by_kernels["normal"]
    with RankProcesses(2) as ranks:
        taken = ranks.run(make_buffers, str(path))
        assert [t[:2] for t in taken] == [
            (low_latency.settings["spin_us"], normal.settings["spin_us"])
        ] * 2
        assert all(t[2] <= normal.settings["num_bytes"] for t in taken)  # type: ignore[operator]
        # By way of the table: another one changes them.
        merge_into(
            path, [replace(e, settings=e.settings | {"spin_us": 7.0}) for e in table.entries]
        )
        assert [t[:2] for t in ranks.run(make_buffers, str(path))] == [(7.0, 7.0)] * 2
        assert [t[:2] for t in ranks.run(make_buffers, "off")] != [(7.0, 7.0)] * 2
        other = [replace(e, site=replace(e.site, device="x")) for e in Table.read(path).entries]
        merge_into(tmp_path / "other.json", other)
        assert [t[:2] for t in ranks.run(make_buffers, str(tmp_path / "other.json"))] != [
            (7.0, 7.0)
        ] * 2


def test_a_wrong_sum_is_noticed() -> None:
    from ep_backend import virtual_world

    (group,) = virtual_world(1).groups
    sizes: dict[str, Any] = {"hidden": 256, "num_experts": 8, "top_k": 2, "dtype": torch.bfloat16}
    for dispatch_dtype in (torch.bfloat16, torch.float8_e4m3fn):
        with NormalBuffer(group, **sizes, dispatch_dtype=dispatch_dtype) as buffer:
            inputs = make_inputs(0, 0, num_tokens=9, **sizes)
            ops = NormalOps(buffer, inputs, 0)
            ops.dispatch()
            ops.make_rows()
            ops.pair()
            ops.check()
            ops.out[3, 200] *= 1.5
            with pytest.raises(CheckFailed, match="rank 0: combine's sums are wrong"):
                ops.check()


def test_sites_of_processes_on_a_cpu_are_joined_by_shared_memory() -> None:
    with RankProcesses(2) as ranks:
        (first, second) = ranks.run(site_of)
    assert first == second
    assert first.link == "shm"
    assert first.protocol == _native.NORMAL_PROTOCOL_VERSION


def site_of(rank: Rank) -> Site:
    return Site.of("normal", rank.group, torch.device("cpu"))
