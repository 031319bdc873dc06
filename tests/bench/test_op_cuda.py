"""`ep-backend bench op --device cuda`: what it counts, checks, asks for and writes. Timing itself
needs a GPU."""

from __future__ import annotations

import json
from dataclasses import replace
from importlib import util
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from ep_backend import _native, faults
from ep_backend.bench import op_cuda
from ep_backend.bench.op_cuda_bytes import PairBytes, count_bytes, travelling_row_bytes
from ep_backend.bench.op_cuda_case import CaseTimes, check_lockstep, inputs_of, open_buffers
from ep_backend.bench.op_cuda_floors import GemmTimes
from ep_backend.bench.op_cuda_graph import Spread
from ep_backend.bench.op_cuda_rank import CheckFailed, RankOps, run_lockstep
from ep_backend.bench.op_cuda_report import CaseRow, GemmRow, print_table, roofline_us, table_rows
from ep_backend.bench.op_cuda_settings import (
    OUTPUT_LAYOUTS,
    Case,
    CudaBenchSettings,
    parse_arguments,
)
from ep_backend.cli import app

HAS_GPU = _native.has_cuda and torch.cuda.is_available()
needs_gpu = pytest.mark.skipif(not HAS_GPU, reason="no GPU: nothing was timed")

SMALL = CudaBenchSettings(
    num_ranks=(3,),
    num_tokens=(4,),
    hidden=320,
    num_experts=7,
    top_k=3,
    num_max_tokens_per_rank=5,
)
CASE = Case(
    num_ranks=3,
    num_tokens=4,
    dispatch_dtype="bf16",
    combine_dtype="bf16",
    output_layout="expert_major",
    form="hook",
    transfer="push",
    num_sms=None,
    num_max_tagged_tokens=None,
)


def test_row_bytes_include_scales() -> None:
    assert travelling_row_bytes(torch.bfloat16, 7168) == 14336
    assert travelling_row_bytes(torch.float8_e4m3fn, 7168) == 7392
    assert travelling_row_bytes(torch.float8_e4m3fn, 130) == 130 + 8


def test_lists_are_swept_and_the_rest_is_default() -> None:
    line = "--ranks 2,64 --num-sms default,16 --tagged off,default,8 --tokens 3 --form fused"
    settings, output = parse_arguments([*line.split(), "--output", "x.json"])
    assert output == Path("x.json")
    cases = list(settings.cases())
    assert len(cases) == len(set(cases)) == 2 * 2 * 3 * 2 * 3
    assert {case.num_ranks for case in cases} == {2, 64}
    assert {case.num_sms for case in cases} == {None, 16}
    assert {case.num_max_tagged_tokens for case in cases} == {0, None, 8}
    assert {case.num_tokens for case in cases} == {3}
    assert settings.hidden == 7168


def test_rows_that_come_home_as_float8_are_not_in_workspaces() -> None:
    settings, _ = parse_arguments(["--combine-dtype", "bf16,fp8", "--form", "hook", "--ranks", "2"])
    in_workspaces = {(c.combine_dtype, c.output_layout): c.has_workspace for c in settings.cases()}
    assert in_workspaces == {
        ("bf16", "expert_major"): False,
        ("bf16", "expert_workspace"): True,
        ("bf16", "rank_major"): True,
        ("fp8", "expert_major"): False,
        ("fp8", "rank_major"): False,
    }


def test_quick_is_a_start_that_other_options_change() -> None:
    settings, output = parse_arguments(["--quick", "--form", "hook", "--cold"])
    assert output is None
    assert len(list(settings.cases())) == 4
    assert settings.forms == ("hook",)
    assert settings.is_cold


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["--dispatch-dtype", "fp4"], "'fp4', expected bf16 or fp8"),
        (["--combine-dtype", "fp4"], "'fp4', expected bf16 or fp8"),
        (["--combine-dtype", "fp8", "--layout", "expert_workspace"], "no case is left"),
        (["--layout", "row_major"], "expert_major or expert_workspace or rank_major"),
        (["--tokens", "1,x"], "--tokens"),
        (["--tokens", "256"], "at least the largest number of tokens, 256"),
        (["--ranks", "0"], "positive"),
        (["--experts", "4", "--top-k", "5"], "at most 4 experts"),
        (["--experts", "4", "--ranks", "8", "--top-k", "2"], "number of ranks, 8"),
    ],
)
def test_impossible_settings_are_refused(
    arguments: list[str], expected: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as caught:
        parse_arguments(arguments)
    assert caught.value.code == 2
    assert expected in capsys.readouterr().err


def test_the_command_line_leads_to_each_device() -> None:
    def run(*arguments: str) -> tuple[int, str]:
        result = CliRunner().invoke(app, ["bench", "op", *arguments], env={"COLUMNS": "200"})
        return result.exit_code, result.output

    status, text = run("--device", "cuda", "--help")
    assert status == 0
    assert "--num-sms" in text
    status, text = run("--help")
    assert status == 0
    assert "--iterations" in text
    assert "--device cuda" in text
    status, text = run("--device", "tpu")
    assert status == 2
    assert "expected cpu or cuda" in text
    if not HAS_GPU:
        status, text = run("--device", "cuda", "--quick")
        assert status == 1
        assert "needs a GPU" in text


def test_bytes_of_a_small_exchange() -> None:
    """Ranks own experts 0-1 and 2-3. Token 0 stays on rank 0 with both experts, token 1 goes to
    both ranks, the token of rank 1 stays, one choice unused: 5 expert rows, 4 messages."""
    topk_idx = [torch.tensor([[0, 1], [1, 2]]), torch.tensor([[3, -1]])]
    x_bytes, row_bytes, fp8_bytes = 3 * 400, 400, 200 + 2 * 4
    counted = count_bytes(
        topk_idx,
        num_experts=4,
        hidden=200,
        dispatch_dtype=torch.float8_e4m3fn,
        combine_dtype=torch.bfloat16,
        output_layout="expert_major",
    )
    assert counted == PairBytes(
        num_messages=4,
        num_rows=5,
        dispatch_bytes=x_bytes + 5 * fp8_bytes,
        combine_bytes=5 * row_bytes + x_bytes,
        staging_bytes=2 * 4 * (fp8_bytes + row_bytes),
    )
    counted = count_bytes(
        topk_idx,
        num_experts=4,
        hidden=200,
        dispatch_dtype=torch.bfloat16,
        combine_dtype=torch.float8_e4m3fn,
        output_layout="rank_major",
    )
    assert counted.num_rows == 4
    assert counted.pair_bytes == 2 * (x_bytes + 4 * row_bytes)
    assert counted.staging_bytes == 2 * 4 * (row_bytes + fp8_bytes)  # only there it is float8


def test_spread_is_of_one_operation() -> None:
    times_us = [10.0 * i for i in range(11)]
    assert Spread.of(times_us[::-1], num_ops=10) == Spread(5.0, 1.0, 9.0)
    assert Spread.of([7.0]) == Spread(7.0, 7.0, 7.0)


@pytest.mark.parametrize("combine_dtype", ["bf16", "fp8"])
@pytest.mark.parametrize("dispatch_dtype", ["bf16", "fp8"])
@pytest.mark.parametrize("output_layout", OUTPUT_LAYOUTS)
def test_a_right_pair_passes_its_check(
    dispatch_dtype: str, combine_dtype: str, output_layout: str
) -> None:
    case = replace(
        CASE,
        dispatch_dtype=dispatch_dtype,
        combine_dtype=combine_dtype,
        output_layout=output_layout,
    )
    with open_buffers(SMALL, case, device="cpu") as buffers:
        ranks = [
            RankOps(b, i, "hook") for b, i in zip(buffers, inputs_of(SMALL, 3, 4), strict=True)
        ]
        error = check_lockstep(ranks, is_first=True)
        num_float8 = [dispatch_dtype, combine_dtype].count("fp8")
        at_least, below = {0: (0, 0.005), 1: (0.01, 0.04), 2: (0.02, 0.05)}[num_float8]
        assert at_least < error < below
        for _ in range(3):
            assert check_lockstep(ranks, is_first=False) == error


@pytest.mark.parametrize("form", ["fused", "hook"])
def test_both_forms_of_a_pair_pass(form: str) -> None:
    """With one rank, which waits for nobody: they are called for one rank after another."""
    case = replace(CASE, num_ranks=1, dispatch_dtype="fp8", form=form)
    with open_buffers(SMALL, case, device="cpu") as buffers:
        rank = RankOps(buffers[0], inputs_of(SMALL, 1, 4)[0], form)
        check_lockstep([rank], is_first=True)
        result = rank.pair()
        rank.check("first", result)
        rank.poison(result)
        with pytest.raises(CheckFailed, match="poisoned"):
            rank.check("poisoned", result)
        rank.check("second", rank.pair())


@pytest.mark.parametrize("output_layout", OUTPUT_LAYOUTS)
def test_a_wrong_pair_does_not(output_layout: str, monkeypatch: pytest.MonkeyPatch) -> None:
    case = replace(CASE, output_layout=output_layout)
    with open_buffers(SMALL, case, device="cpu") as buffers:
        ranks = [
            RankOps(b, i, "hook") for b, i in zip(buffers, inputs_of(SMALL, 3, 4), strict=True)
        ]
        results = run_lockstep(ranks, is_first=True)
        ranks[1].check("test", results[1])
        ranks[1].poison(results[1])
        with pytest.raises(CheckFailed, match="rows that rank 1 received"):
            ranks[1].check("test", results[1])
    monkeypatch.setenv(faults.FAULT_VARIABLE, faults.Fault.DROP_REMOTE_CONTRIBUTIONS.value)
    with open_buffers(SMALL, case, device="cpu") as buffers:
        ranks = [
            RankOps(b, i, "hook") for b, i in zip(buffers, inputs_of(SMALL, 3, 4), strict=True)
        ]
        with pytest.raises(CheckFailed, match=r"lockstep: .*combine"):
            check_lockstep(ranks, is_first=True)


def timed_row(case: Case, pair_us: float, cold_us: float | None = None) -> CaseRow:
    single = Spread(pair_us + 3, pair_us + 2, pair_us + 4)
    times = CaseTimes(
        pair=Spread(pair_us, pair_us - 1, pair_us + 1),
        dispatch=Spread(4.0, 3.9, 4.1),
        single_pair=None if cold_us is None else single,
        cold_pair=None if cold_us is None else Spread(cold_us, cold_us, cold_us),
        relative_error=0.002,
        num_symmetric_bytes=1 << 20,
        num_bytes=PairBytes(8, 9, 1_000_000, 500_000, 3_000_000),
    )
    return CaseRow(case, times)


def test_a_row_tells_everything_in_json() -> None:
    row = json.loads(json.dumps(timed_row(replace(CASE, num_sms=44), 10.0, 16.0).to_json(3000.0)))
    assert row["num_ranks"] == 3
    assert row["num_sms"] == 44
    assert row["pair"] == {"median_us": 10.0, "p10_us": 9.0, "p90_us": 11.0}
    assert row["combine_us"] == 6.0
    assert row["cold_pair"]["median_us"] == 16.0
    assert row["num_bytes"]["dispatch_bytes"] == 1_000_000
    assert row["roofline_us"] == roofline_us(1_500_000, 3000.0) == pytest.approx(0.5)
    assert row["roofline_fraction"] == pytest.approx(0.05)
    failed = CaseRow(CASE, None, "PeerTimeout: rank 1").to_json(None)
    assert failed["error"] == "PeerTimeout: rank 1"
    assert "pair" not in failed


def test_a_gemm_row_tells_the_ratio_or_the_reason() -> None:
    row = GemmRow(CASE, GemmTimes(alone_us=200.0, between_us=202.0))
    assert row.to_json()["ratio"] == pytest.approx(1.01)
    assert "EP3, 4 tokens: 202.0 us, alone 200.0 us, ratio 1.010" in str(row)
    failed = GemmRow(CASE, None, "PeerTimeout: rank 1")
    assert failed.to_json()["error"] == "PeerTimeout: rank 1"
    assert str(failed).endswith("tokens: PeerTimeout: rank 1")


def test_the_table_says_once_what_all_rows_share() -> None:
    rows = [
        timed_row(CASE, 10.0),
        timed_row(replace(CASE, num_tokens=1, num_max_tagged_tokens=0), 8.0),
        CaseRow(replace(CASE, num_tokens=2), None, "PeerTimeout: rank 1"),
    ]
    shared, heads, cells = table_rows(rows, 3000.0)
    assert "ranks 3" in shared
    assert "layout expert" in shared
    assert heads[:3] == ["tokens", "tagged", "pair us"]
    assert "cold" not in heads
    assert [line[heads.index("tagged")] for line in cells] == ["default", "off", "default"]
    assert [line[heads.index("pair us")] for line in cells] == ["10.0", "8.0", "failed"]
    assert [line[heads.index("combine")] for line in cells] == ["6.0", "4.0", ""]
    _, heads, cells = table_rows([timed_row(CASE, 10.0, 16.0)], None)
    assert cells[0][heads.index("cold")] == "16.0"
    assert "roofline" not in heads


@pytest.mark.parametrize("has_rich", [True, False])
def test_the_table_prints_in_full_with_and_without_rich(
    has_rich: bool, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    if not has_rich:
        monkeypatch.setattr(util, "find_spec", lambda name: None)
    monkeypatch.setenv("COLUMNS", "40")
    case = replace(CASE, num_ranks=64, num_tokens=128, num_sms=132)
    rows = [timed_row(case, 1234.5, 2345.6), timed_row(replace(CASE, form="fused"), 9.0)]
    _, heads, cells = table_rows(rows, 3000.0)
    print_table("title", heads, cells, "caption")
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    for expected in (["title"], ["caption"], " ".join(heads).split(), cells[0]):
        assert expected in lines


@needs_gpu
@pytest.mark.gpu
@pytest.mark.parametrize(
    "arguments",
    [
        ["--ranks", "1,4", "--cold", "--form", "fused,hook", "--layout", "expert_major,rank_major"],
        ["--ranks", "1,4", "--combine-dtype", "bf16,fp8", "--layout", "rank_major", "--no-gemm"],
        ["--ranks", "64", "--num-max-tokens", "2", "--tokens", "2", "--no-floors", "--no-gemm"],
    ],
)
def test_cases_are_timed_on_a_gpu(arguments: list[str], tmp_path: Path) -> None:
    path = tmp_path / "op.json"
    sizes = ["--hidden", "512", "--experts", "64", "--chain", "4", "--repeats", "5"]
    assert op_cuda.main(["--quick", *sizes, *arguments, "--output", str(path)]) == 0
    document = json.loads(path.read_text())
    assert document["machine"]["gpu"] == torch.cuda.get_device_name()
    for case in document["cases"]:
        assert case["dispatch"]["median_us"] > 0
        assert case["pair"]["median_us"] > 0
        assert 0 < case["relative_error"] < 0.05
        assert case["num_symmetric_bytes"] > 0
