"""`ep-backend bench op --kind normal --device cuda`: what it counts, asks for and writes. Timing
itself needs a GPU."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from ep_backend import _native
from ep_backend.bench import op_cuda_normal
from ep_backend.bench.op_cuda_bytes import PairBytes
from ep_backend.bench.op_cuda_graph import Spread
from ep_backend.bench.op_cuda_normal import HEADS, NormalRow, parse_arguments
from ep_backend.bench.op_cuda_normal_case import NormalCase, NormalTimes, Yardstick

HAS_GPU = _native.has_cuda and torch.cuda.is_available()
CASE = NormalCase(num_ranks=2, num_tokens=100, dispatch_dtype="bf16", num_sms=4)
YARDSTICK = Yardstick(num_sms=4, copy_gbs=400.0, fill_gbs=250.0)
TIMES = NormalTimes(
    dispatch=Spread(1000.0, 900.0, 1100.0),
    cached_dispatch=Spread(900.0, 800.0, 1000.0),
    combine=Spread(500.0, 400.0, 600.0),
    copied_combine=Spread(800.0, 700.0, 900.0),
    num_bytes=PairBytes(
        num_messages=150,
        num_rows=150,
        dispatch_bytes=300_000_000,
        combine_bytes=200_000_000,
        staging_bytes=0,
    ),
    num_row_bytes=200_000_000,
    num_symmetric_bytes=1 << 20,
)


def test_fractions_are_of_a_copy_and_of_a_fill() -> None:
    row = NormalRow(CASE, YARDSTICK, TIMES)
    assert row.dispatch_fraction == 300 / 400
    assert row.written_fraction == 200 / 250
    assert row.combine_fraction == 400 / 400
    assert len(row.cells()) == len(HEADS)
    assert row.to_json()["dispatch_written_fraction"] == 200 / 250


def test_a_case_that_failed_is_a_row_too() -> None:
    row = NormalRow(CASE, YARDSTICK, None, "RuntimeError: no memory")
    assert row.cells()[-1] == "RuntimeError: no memory"
    assert len(row.cells()) == len(HEADS)
    assert row.to_json()["error"] == "RuntimeError: no memory"


def test_lists_are_swept_and_the_rest_is_default() -> None:
    settings, output = parse_arguments(
        ["--ranks", "2,4", "--num-sms", "8,16", "--tokens", "3", "--json", "x.json"]
    )
    assert output == Path("x.json")
    assert len(set(settings.cases())) == 2 * 2 * 2
    assert settings.sizes().hidden == 7168


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("--ranks 8 --num-sms 12", "12 SMs cannot be shared evenly by 8 ranks"),
        ("--ranks 3 --num-sms 3", "256 experts cannot be shared evenly by 3 ranks"),
        ("--tokens 0", "num_tokens is (0,), expected positive numbers"),
        ("--dispatch-dtype fp4", "dispatch dtype is 'fp4', expected bf16 or fp8"),
        ("--top-k 9", "top_k is 9, expected 1..8"),
    ],
)
def test_what_cannot_work_is_refused(
    line: str, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        parse_arguments(line.split())
    assert message in capsys.readouterr().err


@pytest.mark.skipif(HAS_GPU, reason="here is a GPU")
def test_without_a_gpu_it_says_so(capsys: pytest.CaptureFixture[str]) -> None:
    assert op_cuda_normal.main(["--tokens", "16"]) == 1
    assert "needs a GPU" in capsys.readouterr().err


@pytest.mark.skipif(not HAS_GPU, reason="no GPU: nothing was timed")
@pytest.mark.gpu
def test_a_small_run_writes_its_results(tmp_path: Path) -> None:
    line = "--ranks 2 --tokens 64 --num-sms 4 --hidden 512 --experts 16 --top-k 4 --repeats 2"
    output = tmp_path / "results.json"
    assert op_cuda_normal.main([*line.split(), "--no-gemm", "--json", str(output)]) == 0
    cases = json.loads(output.read_text())["cases"]
    assert [case["dispatch_dtype"] for case in cases] == ["bf16", "fp8"]
    assert all(case["combine_gbs"] > 0 for case in cases)
