"""`python -m ep_backend.bench.multi_gpu`: what it asks for, agrees on and writes. Timing itself
needs GPUs."""

from __future__ import annotations

import json
import shlex
from pathlib import Path
from typing import Any

import pytest
import torch

from ep_backend import _native
from ep_backend.bench import multi_gpu, multi_gpu_tests
from ep_backend.bench.multi_gpu_copies import CopyTimes
from ep_backend.bench.multi_gpu_normal import NormalTimes, Traffic, result_of, traffic_of
from ep_backend.bench.multi_gpu_normal_report import HEADS, normal_cells
from ep_backend.bench.multi_gpu_report import (
    SETTING_HEADS,
    TIME_HEADS,
    has_failed,
    note_crash,
    print_results,
    table_cells,
)
from ep_backend.bench.multi_gpu_settings import NormalSettings, parse_arguments
from ep_backend.bench.multi_gpu_world import RankedSpread, StepFailed, World
from ep_backend.bench.op_cuda_graph import Spread
from ep_backend.bench.op_cuda_settings import OUTPUT_LAYOUTS
from tests.support.processes import Rank, RankProcesses

NUM_GPUS = torch.cuda.device_count() if _native.has_cuda else 0


def test_off_is_left_out_where_default_is_off_already() -> None:
    options = parse_arguments([], num_visible=8)
    assert options.num_gpus == 8
    cases = options.cases()
    assert {case.num_ranks for case in cases} == {8}
    small = {(1, None), (1, 0), (16, None), (16, 0), (64, None), (128, None)}
    for layout in OUTPUT_LAYOUTS:
        of_layout = [case for case in cases if case.output_layout == layout]
        assert {(case.num_tokens, case.num_max_tagged_tokens) for case in of_layout} == small
    assert len(cases) == len(OUTPUT_LAYOUTS) * len(small)
    short = "--layout rank_major --hidden 2048 --dispatch-dtype bf16 --tokens 56,57"
    for form, of_more in (("hook", [(57, None)]), ("fused", [(57, None), (57, 0)])):
        cases = parse_arguments([*short.split(), "--form", form], 2).cases()
        tagged = [(case.num_tokens, case.num_max_tagged_tokens) for case in cases]
        assert tagged == [(56, None), (56, 0), *of_more]
    cases = parse_arguments(["--tagged", "off", "--tokens", "128"], 2).cases()
    assert {case.num_max_tagged_tokens for case in cases} == {0}


def test_lists_are_swept_and_the_rest_is_default() -> None:
    line = "--tokens 4,32 --dispatch-dtype bf16,fp8 --form hook --transfer pull,push --tagged 8"
    options = parse_arguments([*line.split(), "--no-nccl", "--limit", "50", "--json", "x.json"], 8)
    assert len(options.cases()) == 2 * 2 * (2 * 3 - 1)  # expert workspaces are not pushed
    assert options.settings.chain == 100
    assert (options.with_nccl, options.with_copy) == (False, True)
    assert (options.num_gpus, options.limit_secs, options.output) == (8, 50.0, Path("x.json"))
    assert shlex.split(options.command)[3:5] == ["--tokens", "4,32"]
    assert parse_arguments([], 16).num_gpus == 8
    assert parse_arguments(["--gpus", "1"], 1).num_gpus == 1


def test_rows_move_as_a_buffer_moves_them_unless_it_is_said() -> None:
    def transfers(arguments: str, num_gpus: int) -> set[tuple[str, str]]:
        cases = parse_arguments(arguments.split(), num_gpus).cases()
        return {(case.output_layout, case.transfer) for case in cases}

    layouts = "--layout expert_major,rank_major"
    all_pulled = {("expert_major", "pull"), ("rank_major", "pull")}
    assert transfers(f"{layouts} --gpus 1", 2) == all_pulled
    assert transfers(layouts, 4) == {("expert_major", "pull_push"), ("rank_major", "pull_push")}
    assert transfers("--layout expert_workspace", 4) == {("expert_workspace", "pull")}
    # Float8 goes home through no workspace.
    assert transfers("--layout rank_major --combine-dtype fp8", 4) == {("rank_major", "pull_push")}
    assert transfers(f"{layouts} --transfer pull", 4) == all_pulled


def test_each_kind_has_lists_of_its_own() -> None:
    line = "--kind normal --normal-tokens 64,128 --normal-num-sms 4 --hidden 512 --repeats 3"
    options = parse_arguments(line.split(), 2)
    assert options.cases() == []
    assert options.normal == NormalSettings((64, 128), num_sms=(4,), hidden=512, num_repeats=3)
    options = parse_arguments(["--kind", "low-latency", "--top-k", "9"], 2)
    assert options.kinds == ("low-latency",)
    assert len(options.cases()) > 0


@pytest.mark.parametrize(
    ("arguments", "num_visible", "expected"),
    [
        ([], 0, "needs two GPUs"),
        ([], 1, "needs two GPUs"),
        (["--gpus", "3"], 2, "--gpus is 3; 2 visible"),
        (["--gpus", "0"], 2, "--gpus is 0"),
        (["--layout", "row_major"], 2, "expert_major or expert_workspace or rank_major"),
        (["--tokens", "256"], 2, "at least the largest number of tokens, 256"),
        (["--kind", "fast"], 2, "--kind is fast, expected a list of low-latency and normal"),
        (["--top-k", "9"], 2, "top_k is 9, expected at most 8"),
        (["--normal-dispatch-dtype", "fp4"], 2, "'fp4', expected bf16 or fp8"),
        (["--normal-num-sms", "0"], 2, "num_sms is (0,), expected positive numbers"),
    ],
)
def test_wrong_arguments_end_the_program(
    arguments: list[str], num_visible: int, expected: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as end:
        parse_arguments(arguments, num_visible)
    assert end.value.code == 2
    assert expected in capsys.readouterr().err


@pytest.mark.skipif(NUM_GPUS >= 2, reason="there are GPUs")
def test_without_gpus_it_says_so() -> None:
    with pytest.raises(SystemExit) as end:
        multi_gpu.main([])
    assert end.value.code == 2


def test_a_replay_lasts_as_long_as_on_its_slowest_rank() -> None:
    times = RankedSpread.of([[10.0, 22.0, 30.0], [12.0, 20.0, 30.0]], num_ops=2)
    assert times.spread == Spread(11.0, 6.0, 15.0)
    assert times.rank_difference_us == 1.0


def test_rows_that_cross_the_link_are_counted() -> None:
    # Ranks own experts 0-1, 2, 3. Token by token: ranks 0 and 1; 0; nobody | 2; 0; 1 and 2.
    first, second = [[0, 2], [1, 0], [-1, -1]], [[3, -1], [0, 1], [2, 3]]
    traffic = traffic_of([torch.tensor(first), torch.tensor(second), torch.tensor(first)], 4)
    assert traffic == Traffic(num_tokens=3, num_rows=10 / 3, num_remote_rows=7 / 3)
    assert traffic.link_bytes(30) == 70
    assert traffic.moved_bytes(hidden=5, row_bytes=30) == 3 * 10 + 100


def ranked(us: float) -> RankedSpread:
    return RankedSpread(Spread(us, us, us), 0.5)


def test_normal_operations_are_fractions_of_copies() -> None:
    times = NormalTimes(ranked(200.0), ranked(300.0), ranked(160.0), ranked(400.0), ranked(900.0))
    dispatch = CopyTimes(40_000_000, 8, ranked(100.0), ranked(125.0), ranked(250.0))
    combine = CopyTimes(80_000_000, 8, ranked(200.0), ranked(250.0), ranked(320.0))
    result = result_of(times, (dispatch, combine), (120_000_000, 240_000_000))
    assert result["dispatch_gbs"] == 200
    assert result["dispatch_copy_fraction"] == 0.5  # of 400 GB/s by engines
    assert result["dispatch_sms_copy_fraction"] == 600 / 640  # pushed
    assert result["cached_dispatch_copy_fraction"] == 250 / 400
    assert result["combine_copy_fraction"] == 0.5
    assert result["combine_sms_copy_fraction"] == 600 / 500  # pulled
    assert result["rank_difference_us"] == 0.5
    case = dict(num_tokens=4096, dispatch_dtype="fp8", num_sms=8) | result
    nccl = [
        dict(num_tokens=4096, dtype=dtype, all_to_all=spread(us), gbs=1.0)
        for dtype, us in (("fp8", 210.0), ("bf16", 420.0))
    ]
    written = document() | {
        "normal": {
            "settings": {"hidden": 7168, "num_experts": 256, "top_k": 8},
            "cases": [case, {"num_tokens": 1, "dispatch_dtype": "bf16", "error": "no"}],
            "copies": [dispatch.to_json()],
        },
        "nccl": {"pairs": [], "normal": nccl},
    }
    (line,) = normal_cells(written)
    assert len(line) == len(HEADS)
    of_dispatch = ["200", "200", "0.50", "0.94", "300", "160", "250", "210"]
    assert line == ["4096", "fp8", "8", *of_dispatch, "400", "200", "0.50", "1.20", "900", "420"]
    assert has_failed(written | {"cases": []})
    print_results(written)


def fail_between_meetings(rank: Rank, num_before_failure: int) -> str:
    """Rank 1 fails where the others only meet; then a step succeeds."""
    world = World(rank.group)

    def work() -> None:
        for i in range(4):
            world.meet()
            if rank.group.self_rank == 1 and i == num_before_failure:
                raise ValueError("no")

    with pytest.raises(StepFailed) as failed:
        world.step(work)
    assert world.gather(world.step(lambda: rank.group.self_rank)) == [0, 1, 2]
    return str(failed.value)


def test_all_ranks_give_up_a_step_together() -> None:
    with RankProcesses(3) as ranks:
        for i in range(4):
            assert ranks.run(fail_between_meetings, i) == ["rank 1: ValueError: no"] * 3


def spread(us: float) -> dict[str, float]:
    return {"median_us": us, "p10_us": us - 1, "p90_us": us + 1}


def document() -> dict[str, Any]:
    case = {
        "num_tokens": 16,
        "dispatch_dtype": "fp8",
        "combine_dtype": "bf16",
        "output_layout": "rank_major",
        "form": "fused",
        "transfer": "pull",
        "num_sms": None,
        "num_max_tagged_tokens": None,
    }
    times = {
        "pair": spread(10.0),
        "dispatch": spread(4.0),
        "combine_us": 6.0,
        "pair_rank_difference_us": 0.25,
    }
    off = case | {"num_max_tagged_tokens": 0, "num_sms": 64}
    nccl = {
        "num_tokens": 16,
        "dispatch_dtype": "fp8",
        "combine_dtype": "bf16",
        "pair": spread(17.7),
    }
    versions = dict.fromkeys(("driver", "cuda", "torch", "ep_backend"), "1")
    return {
        "machine": {"gpu": "H100"} | versions,
        "cards": ["H100", "H100"],
        "settings": {"hidden": 7168, "num_experts": 256, "top_k": 8},
        "running": None,
        "cases": [case | times, off | {"error": "rank 1: PeerTimeout: x"}],
        "nccl": {"pairs": [nccl]},
        "copy": {"num_bytes": 256 << 20, "gbs": 390.0},
    }


def test_the_table_has_times_beside_nccl_or_says_failed(capsys: pytest.CaptureFixture[str]) -> None:
    first, second = table_cells(document())
    assert len(first) == len(second) == len(SETTING_HEADS) + len(TIME_HEADS)
    assert first[:8] == ["16", "fp8", "bf16", "rank", "fused", "pull", "all", "default"]
    assert first[8:] == ["10.00", "9.00", "11.00", "4.00", "6.00", "17.70", "0.25"]
    assert second[6:10] == ["64", "off", "failed", ""]
    print_results(document())
    printed = capsys.readouterr().out
    assert "2 x H100" in printed
    assert "failed: 16 fp8 bf16 rank fused pull 64 off: rank 1: PeerTimeout: x" in printed
    assert "copy of 256 MiB, GPU 0 to 1: 390 GB/s" in printed


@pytest.mark.parametrize(
    ("running", "is_failure"), [("nccl", False), ("copy", False), (None, False), ("Case()", True)]
)
def test_only_a_crash_in_a_case_is_a_failure(running: str | None, is_failure: bool) -> None:
    written = document() | {"running": running}
    del written["cases"][1]
    assert not has_failed(written)
    note_crash(written, "process 1 died")
    assert has_failed(written) == is_failure
    assert "process 1 died" in json.dumps(written)
    print_results(written)


def test_a_crash_at_the_start_is_told(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    written = multi_gpu.read_document(tmp_path / "none.json")
    note_crash(written, "process 0 died")
    print_results(written)
    assert has_failed(written)
    assert "error: in start: process 0 died" in capsys.readouterr().out


def test_tests_are_told_and_fail_the_run(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tests = tmp_path / multi_gpu_tests.TESTS
    tests.mkdir(parents=True)
    (tmp_path / "pytest.ini").write_text("[pytest]\nmarkers = gpus(n)\n")
    monkeypatch.setattr(multi_gpu_tests, "ROOT", tmp_path)
    assert multi_gpu_tests.are_here()
    marked = "import pytest\n@pytest.mark.gpus(2)\ndef test_kernel():\n    "
    (tests / "test_a.py").write_text(marked + "pass\ndef test_of_one_gpu():\n    assert False\n")
    found = multi_gpu_tests.run_tests(60.0)
    assert found["summary"].startswith("1 passed, 1 deselected")
    assert "error" not in found
    (tests / "test_b.py").write_text(marked + "assert False\n")
    found = multi_gpu_tests.run_tests(60.0)
    assert "FAILED" in found["error"]
    assert "test_b.py::test_kernel" in found["error"]
    document = {"running": None, "cases": [], "tests": found}
    assert has_failed(document)
    print_results(document)
    assert "test_b.py::test_kernel" in capsys.readouterr().out
    sleeping = "import subprocess, pathlib; p = subprocess.Popen(['sleep', '60'])\n    "
    sleeping += f"pathlib.Path({str(tmp_path / 'pid')!r}).write_text(str(p.pid)); p.wait()\n"
    (tests / "test_b.py").write_text(marked + sleeping)
    assert multi_gpu_tests.run_tests(5.0)["error"] == "not done after 5 s"
    assert not is_alive(int((tmp_path / "pid").read_text())), "what a test has started goes on"


def is_alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


@pytest.mark.gpus(2)
def test_cases_are_timed_between_gpus(tmp_path: Path) -> None:
    path = tmp_path / "out.json"
    sizes = "--hidden 512 --experts 64 --chain 4 --repeats 5 --tokens 1,64 --form fused,hook"
    normal = "--normal-tokens 256 --normal-num-sms 2,5 --normal-chain 2"
    line = f"{sizes} {normal} --transfer pull,push --no-tests --output {path}"
    assert multi_gpu.main(line.split()) == 0
    written = json.loads(path.read_text())
    assert written["running"] is None
    assert len(written["cases"]) == len(parse_arguments(line.split(), NUM_GPUS).cases())
    for case in written["cases"]:
        assert 0 < case["dispatch"]["median_us"] < case["pair"]["median_us"]
        assert 0 < case["relative_error"] < 0.04
    assert written["copy"]["gbs"] > 1
    assert [row["num_tokens"] for row in written["nccl"]["pairs"]] == [1, 64]
    cases = written["normal"]["cases"]
    assert [(c["dispatch_dtype"], c["num_sms"]) for c in cases] == [
        (dtype, num_sms) for dtype in ("bf16", "fp8") for num_sms in (2, 5)
    ]
    assert all(case["dispatch_copy_fraction"] > 0 for case in cases)
    assert [row["dtype"] for row in written["nccl"]["normal"]] == ["bf16", "fp8"]
