"""FlashInfer beside ours: what is asked of it, that wrong results are found, and that a row or the
reason for none is shown. Nothing is timed here; FlashInfer is a stand-in (fake_flashinfer.py)."""

from __future__ import annotations

import io
import json
import sys
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, replace
from importlib import metadata
from pathlib import Path

import pytest
import torch

from ep_backend import _native
from ep_backend.bench import op_cuda, peer_flashinfer, peer_flashinfer_rank
from ep_backend.bench.op_cuda_bytes import PairBytes
from ep_backend.bench.op_cuda_case import CaseTimes
from ep_backend.bench.op_cuda_graph import Spread
from ep_backend.bench.op_cuda_rank import CheckFailed
from ep_backend.bench.op_cuda_report import CaseRow, flashinfer_table
from ep_backend.bench.op_cuda_settings import CudaBenchSettings, parse_arguments
from ep_backend.bench.peer_flashinfer import (
    FlashInferCase,
    FlashInferRow,
    FlashInferTimes,
    flashinfer_cases,
    time_flashinfer,
)
from ep_backend.bench.peer_flashinfer_rank import measure, settings_from_json

from .fake_flashinfer import FakeComm

HAS_GPU = _native.has_cuda and torch.cuda.is_available()
CPU = torch.device("cpu")
SMALL = CudaBenchSettings(
    num_ranks=(3,),
    num_tokens=(4,),
    hidden=320,
    num_experts=7,
    top_k=3,
    num_max_tokens_per_rank=5,
    chain=2,
)
CASE = FlashInferCase(3, 4, "bf16", 256)


class ThreadedGraph:
    """A graph of branches that wait for each other."""

    def __init__(self, branches: Sequence[Callable[[], object]]) -> None:
        self._branches = branches
        self.replay()

    def replay(self) -> None:
        with ThreadPoolExecutor(len(self._branches)) as pool:
            for done in [pool.submit(branch) for branch in self._branches]:
                done.result()


@pytest.fixture
def threads_for_graphs(monkeypatch: pytest.MonkeyPatch) -> None:
    def time_replays(graph: ThreadedGraph, num_repeats: int) -> list[float]:
        graph.replay()
        return [20.0]

    monkeypatch.setattr(peer_flashinfer_rank, "capture", ThreadedGraph)
    monkeypatch.setattr(peer_flashinfer_rank, "time_replays", time_replays)


@pytest.mark.usefixtures("threads_for_graphs")
@pytest.mark.parametrize("num_ranks", [1, 3])
@pytest.mark.parametrize(("dtype", "least", "most"), [("bf16", 0, 0.005), ("fp8", 0.01, 0.04)])
def test_a_right_exchange_gives_a_row(
    dtype: str, least: float, most: float, num_ranks: int
) -> None:
    case = replace(CASE, dispatch_dtype=dtype, num_ranks=num_ranks)
    row = measure(FakeComm(num_ranks), SMALL, case, CPU)
    assert row.pair == Spread.of([10.0])  # a replay has a chain of two
    assert row.relative_error is not None
    assert least < row.relative_error < most
    assert FlashInferRow.from_json(json.loads(json.dumps(row.to_json()))) == row


@pytest.mark.usefixtures("threads_for_graphs")
def test_a_wrong_one_does_not() -> None:
    with pytest.raises(CheckFailed, match=r"FlashInfer: rank [012]'s combine: .* wrong"):
        measure(FakeComm(3, forgets_a_rank=True), SMALL, CASE, CPU)


@pytest.mark.usefixtures("threads_for_graphs")
def test_the_process_writes_a_row_or_an_error_for_each_case(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    comms = iter([FakeComm(3), FakeComm(3, forgets_a_rank=True)])
    make_ranks = peer_flashinfer_rank.make_ranks
    monkeypatch.setattr(
        peer_flashinfer_rank,
        "make_ranks",
        lambda _, s, c, device: make_ranks(next(comms), s, c, CPU),
    )
    monkeypatch.setattr(peer_flashinfer_rank, "import_module", lambda name: FakeComm(1))
    request = {
        "settings": json.loads(json.dumps(asdict(SMALL))),
        "cases": [asdict(CASE), asdict(replace(CASE, dispatch_dtype="fp8"))],
        "output": str(tmp_path / "rows"),
    }
    monkeypatch.setattr(sys, "stdin", io.StringIO(json.dumps(request)))
    assert peer_flashinfer_rank.main() == 0
    lines = (tmp_path / "rows").read_text().splitlines()
    right, wrong = (FlashInferRow.from_json(json.loads(line)) for line in lines)
    assert right.case == CASE
    assert right.pair is not None
    assert wrong.pair is None
    assert wrong.error is not None
    assert wrong.error.startswith("CheckFailed: FlashInfer")


def test_settings_survive_json() -> None:
    settings, _ = parse_arguments(["--num-sms", "default,8", "--cold", "--tokens", "1,2"])
    assert settings_from_json(json.loads(json.dumps(asdict(settings)))) == settings


def test_blocks_are_as_large_as_all_of_a_combine_fit() -> None:
    settings = CudaBenchSettings(num_ranks=(1, 2, 4, 8, 64), dispatch_dtypes=("fp8",))
    sizes: dict[tuple[int, int], list[int]] = {}
    for case in flashinfer_cases(settings, num_sms=132):
        sizes.setdefault((case.num_ranks, case.num_tokens), []).append(case.combine_block_size)
    assert len(sizes) == 15  # forms and transfers are ours alone
    assert sizes[1, 128] == sizes[8, 16] == [512, 256]
    assert sizes[2, 128] == [256]
    assert sizes[4, 128] == [128]
    assert sizes[8, 128] == [64]
    assert sizes[64, 128] == [32]  # not even that fits: it is reported
    by_expert = replace(settings, output_layouts=("expert_major", "expert_workspace"))
    assert not list(flashinfer_cases(by_expert, num_sms=132))


@pytest.fixture
def installed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(metadata, "version", lambda name: {"flashinfer-python": "0.7.9"}[name])


def pretend(monkeypatch: pytest.MonkeyPatch, program: str) -> None:
    """In place of the process: `request`, what it was given; `block`, its block size."""
    prelude = (
        "import json, os, sys, time; request = json.load(sys.stdin);"
        f"block = int(os.environ['{peer_flashinfer.BLOCK_SIZE_VARIABLE}'])\n"
    )
    monkeypatch.setattr(peer_flashinfer, "PROGRAM", (sys.executable, "-c", prelude + program))


ANSWER = """
def answer(case):
    assert case["combine_block_size"] == block
    row = case | {"pair": {"median_us": 9.5, "p10_us": 9.0, "p90_us": 10.0}, "relative_error": 0.0}
    print(json.dumps(row), file=open(request["output"], "a"))
"""
SWEEP = CudaBenchSettings(num_ranks=(1, 8, 64), num_tokens=(16, 128), dispatch_dtypes=("fp8",))


@pytest.mark.usefixtures("installed")
def test_every_case_gets_its_row(monkeypatch: pytest.MonkeyPatch) -> None:
    pretend(monkeypatch, ANSWER + "for case in request['cases']: answer(case)")
    times = time_flashinfer(SWEEP, num_sms=132)
    assert str(times) == "0.7.9, timed in 8 of 9 cases"
    assert [row.case for row in times.rows] == list(flashinfer_cases(SWEEP, 132))
    assert [row.pair is not None for row in times.rows] == [True] * 8 + [False]
    assert times.rows[-1].error == "its combine needs 8192 blocks at once, too many for 132 SMs"


@pytest.mark.usefixtures("installed")
def test_a_process_that_dies_or_hangs_keeps_what_it_had(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    die = (
        "if request['cases'] and block == 512: answer(request['cases'][0]); exit('rank 3 trapped')"
    )
    hang = "if request['cases'] and block == 256: time.sleep(100)"
    pretend(monkeypatch, f"{ANSWER}\n{die}\n{hang}\nfor case in request['cases']: answer(case)")
    monkeypatch.setattr(peer_flashinfer, "START_SECS", 3.0)
    monkeypatch.setattr(peer_flashinfer, "CASE_SECS", 0.0)
    settings = replace(SWEEP, num_ranks=(1,))
    rows = {
        (row.case.num_tokens, row.case.combine_block_size): row
        for row in time_flashinfer(settings, num_sms=132).rows
    }
    assert rows[16, 512].pair is not None
    assert rows[128, 512].error == "exit status 1: rank 3 trapped"
    assert rows[16, 256].error == rows[128, 256].error == "not done after 3 s"
    assert "rank 3 trapped" in capfd.readouterr().err


@pytest.mark.usefixtures("installed")
@pytest.mark.parametrize(
    ("program", "changes", "expected"),
    [
        (
            "exit('RuntimeError: no nvcc')",
            {},
            "did not start: exit status 1: RuntimeError: no nvcc",
        ),
        ("", {"with_flashinfer": False}, "left out"),
        ("", {"output_layouts": ("expert_major",)}, "rank-major"),
        ("", {"combine_dtypes": ("fp8",), "output_layouts": ("rank_major",)}, "home as bf16"),
    ],
)
def test_the_reason_for_no_row_is_told(
    program: str, changes: dict, expected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    pretend(monkeypatch, program)
    times = time_flashinfer(replace(SWEEP, **changes), num_sms=132)
    assert not times.rows
    assert str(times).startswith("0.7.9, NOT timed: ")
    assert expected in str(times)


def test_so_is_that_it_is_not_installed(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def missing(name: str) -> str:
        raise metadata.PackageNotFoundError(name)

    monkeypatch.setattr(metadata, "version", missing)
    times = time_flashinfer(SWEEP, num_sms=132)
    op_cuda.print_flashinfer(times, [])
    told = "flashinfer: not timed: not installed: pip install flashinfer-python"
    assert told in capsys.readouterr().out


@pytest.mark.gpu
@pytest.mark.skipif(not HAS_GPU, reason="no GPU: FlashInfer was NOT run")
def test_it_is_timed_on_a_gpu(tmp_path: Path) -> None:
    pytest.importorskip("flashinfer", reason="no flashinfer-python: FlashInfer was NOT run")
    path = tmp_path / "op.json"
    sizes = [
        "--hidden",
        "512",
        "--experts",
        "64",
        "--chain",
        "4",
        "--repeats",
        "5",
        "--ranks",
        "1,4",
    ]
    others = ["--layout", "rank_major", "--no-gemm", "--no-floors", "--cold"]
    assert op_cuda.main(["--quick", *sizes, *others, "--output", str(path)]) == 0
    document = json.loads(path.read_text())
    assert len(document["flashinfer"]) >= 4
    for row in document["flashinfer"]:
        assert min(row[name]["median_us"] for name in ("pair", "single_pair", "cold_pair")) > 0
        assert 0.01 < row["relative_error"] < 0.04


def test_rows_stand_beside_ours(capsys: pytest.CaptureFixture[str]) -> None:
    settings = CudaBenchSettings(num_ranks=(8,), num_tokens=(16,))
    ours_us = {"fused": 10.0, "hook": 5.0}
    ours = [
        CaseRow(
            case,
            CaseTimes(
                pair=Spread(ours_us[case.form], 1.0, 2.0),
                dispatch=Spread(1.0, 1.0, 1.0),
                single_pair=None,
                cold_pair=None,
                relative_error=0.0,
                num_symmetric_bytes=1,
                num_bytes=PairBytes(1, 1, 1, 1, 1),
            ),
        )
        for case in settings.cases()
    ]
    timed = FlashInferRow(FlashInferCase(8, 16, "fp8", 256), Spread(17.5, 17.0, 18.0))
    failed = FlashInferRow(FlashInferCase(8, 16, "bf16", 512), error="CheckFailed: wrong")
    heads, lines = flashinfer_table([timed, failed], ours)
    assert "single" not in heads
    assert lines[0][:5] == ["8", "16", "fp8", "256", "17.5"]
    assert lines[0][heads.index("ours") :] == ["10.0", "1.75"]  # with as many kernels, not hooks
    assert lines[1][:5] == ["8", "16", "bf16", "512", "failed"]
    op_cuda.print_flashinfer(FlashInferTimes("0.7.9", None, [timed, failed]), ours)
    printed = " ".join(capsys.readouterr().out.split())
    assert "FlashInfer 0.7.9, one-sided all-to-all, rank-major" in printed
    assert "float8 rows were quantised before, which is not timed" in printed
    assert "CheckFailed: wrong" in printed
    assert "flashinfer: 0.7.9, timed in 1 of 2 cases" in printed
