"""`ep-backend report`: the results that come with the package, and others, on a page by itself."""

from __future__ import annotations

import json
import shlex
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from ep_backend.bench.options import without_output
from ep_backend.bench.page import Section, Table, page
from ep_backend.bench.report import NoResult, bundled_results, section_of_file, write_report
from ep_backend.bench.report_cases import section_of
from ep_backend.cli import app
from tests.bench.pages import check_self_contained

EVIL = "</script><script>throw 1</script>'\"<b>&"
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
needs_browser = pytest.mark.skipif(
    CHROMIUM is None, reason="NO BROWSER: install chromium, or no report is ever drawn by one"
)


def demo_document() -> dict[str, Any]:
    """Of the form that `DemoResult.as_json` has."""
    latency = {m: {"p50": 4.0, "p95": 6.0, "p99": 9.0} for m in ("ttft", "itl", "tpot")}
    runs = [
        {
            "name": name,
            "tokens_equal": True,
            "latency_ms": latency,
            "completions": [{"itl_ms": [3.0 + i, 4.0, 90.0]} for i in range(2)],
        }
        for name in ("1 rank", "2 ranks, ep_backend")
    ]
    spans = {"dispatch_send": 20.0, "dispatch_recv": 30.0}
    ranks = [
        {"name": f"rank{i}", "span_us": spans, "wait_us": spans, "exchange_us": 99.0}
        | {"forward_us": 999.0}
        for i in range(2)
    ]
    exchange = {"ranks": ranks, "share_of_forward": 0.2}
    exchange |= {"dispatches_equal_layers_times_steps": True}
    shape = {"num_layers": 2, "num_experts": 8, "top_k": 2, "hidden": 128, "seed": 0}
    settings = {"ranks": 2, "mode": "low-latency", "shape": shape, "fault": None}
    settings |= {"num_prompts": 8, "num_tokens": 32}
    return {"engine": "vllm", "settings": settings, "good": True, "runs": runs} | {
        "exchange": exchange
    }


def cases_document(**changes: Any) -> dict[str, Any]:
    cases = [
        {
            "num_tokens": n,
            "form": form,
            "num_bytes": 100 * n,
            "step": {"median_ms": 0.5 * n, "p10_ms": 0.4 * n, "p90_ms": 0.7 * n},
        }
        for n in (1, 16)
        for form in ("plain", "overlapped")
    ]
    document = {"bench": "decode", "date": "2026-01-02", "settings": {"num_tokens": [1, 16]}}
    return document | {"cases": cases} | changes


def write(path: Path, document: Any) -> Path:
    path.write_text(json.dumps(document))
    return path


def test_all_bundled_results_are_drawn(tmp_path: Path) -> None:
    paths = bundled_results()
    assert len(paths) >= 9
    output = tmp_path / "report.html"
    sections = write_report(output, paths)
    assert len(sections) == len(paths)
    assert all(section.tables for section in sections)
    without = {p.name for p, s in zip(paths, sections, strict=True) if not s.charts}
    over_no_axis = {"precision-cpu.json", "observe-cpu.json"}
    assert without == over_no_axis | {"wire-2-nodes.json", "wire-4-nodes.json"}
    found = check_self_contained(output.read_text())
    assert len(found.figures) == sum(len(section.charts) for section in sections)
    for path in paths:
        assert path.name in found.text


def test_numbers_are_those_of_the_files(tmp_path: Path) -> None:
    path = next(p for p in bundled_results() if p.name == "serve-vllm-2-h200.json")
    output = tmp_path / "report.html"
    write_report(output, [path])
    html = output.read_text()
    for row in json.loads(path.read_text())["summary"]:
        assert f">{row['tpot_mean_ms']['median']:.2f}<" in html
    assert "ep-backend bench serve --concurrency 1,8,32,64,128 --repeats 3" in html
    assert "2026-11-26" in html
    assert "NVIDIA H200" in html


def test_titles_say_how_many_gpus() -> None:
    names = [f"multi-gpu-4-h200{kind}.json" for kind in ("", "-hook", "-normal", "-nvshmem")]
    names += ["decode-deepseek-v3-4-h200.json", "serve-vllm-4-h200.json"]
    sections = [section_of_file(path) for path in bundled_results() if path.name in names]
    assert len(sections) == len(names)
    assert all("| 4 x NVIDIA H200" in section.title for section in sections)


def test_recorded_commands_do_not_say_where_results_went() -> None:
    recorded = [json.loads(path.read_text()).get("command") for path in bundled_results()]
    commands = [shlex.split(command) for command in recorded if command]
    assert len(commands) >= 9
    assert all(without_output(command) == command for command in commands)


def test_an_unknown_benchmark_of_cases_is_drawn_by_what_varies() -> None:
    section = section_of(cases_document(commit="abc", command="ep-backend bench decode"), "d.json")
    (chart,) = section.charts
    assert (chart.title, chart.x_label, chart.y_label) == ("step", "tokens", "ms")
    assert [s.name for s in chart.series] == ["plain", "overlapped"]
    assert [(p.x, p.y, p.low, p.high) for p in chart.series[0].points] == [
        (1, 0.5, 0.4, 0.7),
        (16, 8.0, 6.4, pytest.approx(11.2)),
    ]
    assert ("commit", "abc") in section.facts
    assert ("command", "ep-backend bench decode") in section.facts
    assert "bytes" in section.tables[0].heads


def test_units_are_found_wherever_a_name_has_them() -> None:
    """As `bench decode` writes its cases."""
    cases = [
        {"num_ranks": 2, "num_tokens": n, "num_micro_batches": m, "num_bytes": n * m}
        | {"ms_per_layer": {"step": 1.0 * n, "exchange": 0.5 * n, "relative_error": 0.01}}
        | {"exchange_share": 0.5, "ms_per_token": 60.0 * n}
        for n in (1, 8)
        for m in (1, 2)
    ]
    settings = {"num_ranks": [2], "num_tokens": [1, 8]}
    charts = section_of(cases_document(cases=cases, settings=settings), "d.json").charts
    titles = ["ms per layer step", "ms per layer exchange", "ms per token"]
    assert [chart.title for chart in charts] == titles
    assert {chart.y_label for chart in charts} == {"ms"}
    assert [s.name for s in charts[0].series] == ["micro batches 1", "micro batches 2"]


def test_a_case_that_failed_is_told_and_not_drawn() -> None:
    document = cases_document()
    document["cases"][0] = {"num_tokens": 1, "form": "plain", "error": "no peer"}
    section = section_of(document, "d.json")
    assert section.problems == ["failed: tokens 1, form plain: no peer"]
    num_points = {series.name: len(series.points) for series in section.charts[0].series}
    assert num_points == {"plain": 1, "overlapped": 2}


def test_too_many_lines_are_split_over_charts() -> None:
    cases = [
        {"num_ranks": r, "layout": layout, "form": f, "num_tokens": n, "pair": {"p50_us": 1.0 * n}}
        for r in (1, 8)
        for layout in ("a", "b", "c")
        for f in ("x", "y")
        for n in (1, 2)
    ]
    settings = {"num_ranks": [1, 8], "num_tokens": [1, 2]}
    section = section_of(cases_document(cases=cases, settings=settings), "d.json")
    assert [chart.title for chart in section.charts] == ["pair, ranks 1", "pair, ranks 8"]
    assert [s.name for s in section.charts[0].series][:2] == ["a, x", "a, y"]


def test_flashinfer_is_drawn_beside_ours() -> None:
    ours = [
        {"num_ranks": 2, "num_tokens": n, "dispatch_dtype": dtype, "output_layout": "rank_major"}
        | {"num_sms": 66, "pair": {"median_us": 5.0 + n}}
        for n in (1, 16)
        for dtype in ("bf16", "fp8")
    ]
    theirs = [
        {"num_ranks": 2, "num_tokens": n, "dispatch_dtype": dtype, "combine_block_size": size}
        | {"pair": {"median_us": 1.0 * size}}
        for n in (1, 16)
        for dtype in ("bf16", "fp8")
        for size in (512, 256)
    ]
    theirs[0] = theirs[0] | {"pair": {"median_us": 7.0}}
    failed = {"num_ranks": 2, "num_tokens": 1, "dispatch_dtype": "fp8", "error": "too many"}
    document = cases_document(cases=ours, flashinfer=[*theirs, failed])
    (chart,) = section_of(document, "d.json").charts
    layouts = ("rank major", "FlashInfer")
    assert [s.name for s in chart.series] == [f"{d}, {w}" for w in layouts for d in ("bf16", "fp8")]
    drawn = {s.name: [(p.x, p.y) for p in s.points] for s in chart.series}
    assert drawn["bf16, rank major"] == [(1, 6.0), (16, 21.0)]
    assert drawn["bf16, FlashInfer"] == [(1, 7.0), (16, 256.0)]
    assert drawn["fp8, FlashInfer"] == [(1, 256.0), (16, 256.0)]


def test_the_demo_has_its_section(tmp_path: Path) -> None:
    section = section_of_file(write(tmp_path / "result.json", demo_document()))
    assert [s.name for s in section.charts[0].series] == ["1 rank", "2 ranks, ep_backend"]
    assert [p.y for p in section.charts[0].series[0].points][-1] == 1.0
    assert not section.problems
    assert dict(section.facts)["command"] == (
        "ep-backend demo --engine vllm --mode low-latency --ranks 2 --prompts 8 --tokens 32 "
        "--layers 2 --experts 8 --top-k 2 --hidden 128 --seed 0"
    )
    failed = section_of_file(write(tmp_path / "r.json", demo_document() | {"good": False}))
    assert failed.problems


def test_the_demo_writes_what_the_report_reads() -> None:
    """The document above is made up; these are the names that the demo has."""
    import inspect

    from ep_backend.bench.demo import DemoResult

    source = inspect.getsource(DemoResult.as_json)
    assert all(f'"{name}"' in source for name in demo_document())


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        ("not JSON", "cannot be read"),
        ("[1]", "holds a list"),
        ("{}", "no measurement"),
        ('{"cases": []}', "no measurement"),
        ('{"cells": [], "gates": [], "servers": []}', "lacks what its benchmark writes"),
        ('{"cases": [{"num_tokens": 1, "us": 1.0}, {"num_tokens": 2, "us": NaN}]}', "not a number"),
    ],
)
def test_other_files_are_refused_by_name(content: str, expected: str, tmp_path: Path) -> None:
    path = tmp_path / "x.json"
    path.write_text(content)
    with pytest.raises(NoResult, match=expected) as caught:
        write_report(tmp_path / "report.html", [path])
    assert "x.json" in str(caught.value)
    assert not (tmp_path / "report.html").exists()


def test_the_command_merges_given_and_bundled_results(tmp_path: Path) -> None:
    given = write(tmp_path / "mine.json", cases_document())
    output = tmp_path / "out" / "report.html"
    done = CliRunner().invoke(app, ["report", str(given), "--output", str(output)])
    assert done.exit_code == 0, done.output
    assert f"{len(bundled_results()) + 1} results" in done.output.replace("\n", " ")
    found = check_self_contained(output.read_text())
    assert found.text.index("mine.json") < found.text.index(bundled_results()[0].name)
    alone = ["report", str(given), "--no-bundled", "--output", str(output)]
    assert CliRunner().invoke(app, alone).exit_code == 0
    assert bundled_results()[0].name not in output.read_text()
    wrong = CliRunner().invoke(app, ["report", str(tmp_path / "nowhere.json")])
    assert wrong.exit_code == 2


def test_texts_of_results_stay_texts(tmp_path: Path) -> None:
    document = cases_document(command=EVIL, commit=EVIL, bench=EVIL, date=EVIL)
    for case in document["cases"]:
        case["form"] += EVIL
    output = tmp_path / "report.html"
    write_report(output, [write(tmp_path / "d.json", document)])
    found = check_self_contained(output.read_text())
    assert EVIL in found.text
    section = Section(EVIL, [(EVIL, EVIL)], [], [Table([EVIL], [[EVIL]], EVIL)], [EVIL], [EVIL])
    assert check_self_contained(page(EVIL, [section, section])).text.count(EVIL) > 12


def chromium(*arguments: str) -> subprocess.CompletedProcess:
    assert CHROMIUM is not None
    # As root it has no sandbox; a container's /dev/shm may be small.
    flags = ("--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage")
    offline = ("--host-resolver-rules=MAP * ~NOTFOUND", "--disable-background-networking")
    return subprocess.run(
        [CHROMIUM, *flags, *offline, "--enable-logging=stderr", "--v=0", *arguments],
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
    )


def console_messages(log: str) -> list[str]:
    return [line for line in log.splitlines() if ":CONSOLE" in line]


@pytest.mark.skipif(
    CHROMIUM is None, reason="NO BROWSER: install chromium, or no report is drawn by one"
)
def test_a_browser_draws_the_charts_without_errors(tmp_path: Path) -> None:
    output = tmp_path / "report.html"
    mine = write(tmp_path / "result.json", demo_document())
    sections = write_report(output, [mine, *bundled_results()])
    profile = f"--user-data-dir={tmp_path / 'profile'}"
    measure = (
        "<script>addEventListener('load', () => { const boxes = [...document.querySelectorAll("
        "'figure > svg polyline')].map(l => l.getBBox()); console.log('drawn', boxes.filter("
        "b => b.width + b.height > 0).length, performance.getEntriesByType('resource').length) "
        "})</script></body>"
    )
    probed = tmp_path / "probed.html"
    probed.write_text(output.read_text().replace("</body>", measure))
    messages = console_messages(chromium(profile, "--dump-dom", probed.as_uri()).stderr)
    num_lines = sum(
        len({(p.x, p.y) for p in series.points}) > 1
        for section in sections
        for chart in section.charts
        for series in chart.series
    )
    assert num_lines > 50
    assert len(messages) == 1, messages
    assert f"drawn {num_lines} 0" in messages[0]

    picture = tmp_path / "page.png"
    seen = chromium(profile, f"--screenshot={picture}", output.as_uri())
    assert console_messages(seen.stderr) == []
    assert picture.read_bytes().startswith(b"\x89PNG")


@pytest.mark.skipif(
    CHROMIUM is None, reason="NO BROWSER: install chromium, or no report is drawn by one"
)
def test_an_error_on_a_page_would_be_seen(tmp_path: Path) -> None:
    broken = tmp_path / "broken.html"
    broken.write_text("<!doctype html><body><script>throw new Error('seen')</script>")
    profile = f"--user-data-dir={tmp_path / 'profile'}"
    messages = console_messages(chromium(profile, "--dump-dom", broken.as_uri()).stderr)
    assert any("seen" in message for message in messages)
