"""Sweeps of `ep-backend bench serve` with servers that are not there: what is measured, written,
told and resumed."""

from __future__ import annotations

import json
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from ep_backend.bench import serve
from ep_backend.bench.serve_engine import ServedEngine, Target
from ep_backend.bench.serve_gate import Probe, compare
from ep_backend.bench.serve_report import HEADS, has_failed, print_results, summarise, table_cells
from ep_backend.bench.serve_settings import OURS, Options, parse_arguments
from ep_backend.bench.serve_vllm import METRICS
from ep_backend.bench.server import Server
from tests.bench.fake_engine import FakeEngine, logprobs_of


def metrics(tpot: float, tokens: float) -> dict[str, float]:
    return dict.fromkeys(METRICS, 1.0) | {"tpot_mean_ms": tpot, "output_tokens_per_sec": tokens}


def canned_run(options: Options) -> serve.Run:
    """As if measured: ours is 10 % faster in the median, and has one run less."""
    run = serve.Run(options)
    measured = [("default", 0, 4.0), ("default", 1, 5.0), ("default", 2, 4.4)]
    measured += [(OURS, 0, 3.96), (OURS, 1, 3.0)]
    for backend, repeat, tpot in measured:
        cell = {"backend": backend, "server": f"{backend}-0", "concurrency": 8, "repeat": repeat}
        run.document["cells"].append(cell | {"metrics": metrics(tpot, 1000 / tpot)})
    again = compare(logprobs_of(-9.0), logprobs_of(-9.0)).as_json()
    gate = {"server": f"{OURS}-0", "backend": OURS, "again": again, "versus": "default-0"}
    run.document["gates"].append(gate | again | {"good": True})
    return run


def test_medians_and_ranges_are_over_repeats(capsys: pytest.CaptureFixture[str]) -> None:
    document = canned_run(parse_arguments(["--concurrency", "1,8"])).document
    first, second = summarise(document)
    assert (first["backend"], first["concurrency"], first["num_runs"]) == ("default", 8, 3)
    assert first["tpot_mean_ms"]["median"] == 4.4
    assert first["tpot_mean_ms"]["spread"] == pytest.approx(1.0 / 4.4)
    assert (second["tpot_mean_ms"]["min"], second["tpot_mean_ms"]["max"]) == (3.0, 3.96)
    lines = table_cells(document)
    assert {len(line) for line in lines} == {len(HEADS)}
    assert lines[0][:5] == ["8", "default", "4.40", "4.00-5.00", ""]
    assert lines[1][:5] == ["8", OURS, "3.48", "3.00-3.96", "0.79"]
    print_results(document)
    printed = capsys.readouterr().out
    assert "against default-0: mean |d| 0.0000" in printed
    assert not has_failed(document)


@pytest.mark.parametrize(
    ("where", "what"),
    [
        ("servers", {"name": "x-0", "error": "it ended"}),
        (
            "cells",
            {"server": "x-0", "backend": "x", "concurrency": 1, "repeat": 0, "error": "it ended"},
        ),
        ("gates", {"server": "x-0", "error": "it ended"}),
        ("error", "it ended"),
    ],
)
def test_any_failure_is_told(where: str, what: Any, capsys: pytest.CaptureFixture[str]) -> None:
    document = canned_run(parse_arguments([])).document
    if where == "error":
        document["error"] = what
    else:
        document[where].append(what)
    assert has_failed(document)
    print_results(document)
    assert "it ended" in capsys.readouterr().out


def test_other_results_fail_the_run(capsys: pytest.CaptureFixture[str]) -> None:
    document = canned_run(parse_arguments([])).document
    document["gates"][0]["good"] = False
    assert has_failed(document)
    print_results(document)
    assert f"DIFFERENT RESULTS: {OURS}-0" in capsys.readouterr().out


@pytest.fixture
def start(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    (tmp_path / "config.json").write_text("{}")
    monkeypatch.setattr(serve.util, "find_spec", lambda name: object())
    monkeypatch.setattr(serve, "end_by_signals", lambda: None)

    def start(engine: FakeEngine, *arguments: str) -> tuple[int, dict[str, Any]]:
        monkeypatch.setattr(serve, "running_server", engine.server)
        monkeypatch.setattr(serve, "running_client", engine.client)
        monkeypatch.setattr(serve.serve_gate, "probe", engine.probe)
        output = tmp_path / "out" / "r.json"
        given = ["--model", str(tmp_path), "--output", str(output), *arguments]
        status = serve.main([*given, "--concurrency", "1,8", "--repeats", "2"])
        assert engine.num_running == 0
        return status, json.loads(output.read_text())

    return start


def test_a_run_measures_every_backend(start: Any) -> None:
    status, document = start(FakeEngine())
    assert status == 0
    assert document["running"] is None
    order = [(c["backend"], c["repeat"], c["concurrency"]) for c in document["cells"]]
    assert order == [(b, r, c) for r in (0, 1) for b in ("default", OURS) for c in (1, 8)]
    assert [s["start_secs"] for s in document["servers"]] == [12.0] * 4
    assert [g.get("versus") for g in document["gates"]] == [None] + ["default-0"] * 3
    assert document["cells"][0]["client"].startswith("vllm bench serve --backend vllm")
    assert document["gates"][1]["mean"] == pytest.approx(0.005)
    assert len(document["summary"]) == 4


def test_a_server_that_does_not_start_leaves_the_others(start: Any) -> None:
    status, document = start(FakeEngine(broken="default"))
    assert status == 1
    errors = ["no GPU", None] * 2
    assert [s.get("error") for s in document["servers"]] == errors
    assert {c["backend"] for c in document["cells"]} == {OURS}


def test_the_limit_ends_servers_and_keeps_what_was_measured(start: Any) -> None:
    status, document = start(FakeEngine(slow=OURS), "--limit", "2")
    assert status == 1
    assert f"the limit of 2 s came in {OURS}-0, 1 in flight, repeat 0" in document["error"]
    assert [c["backend"] for c in document["cells"]] == ["default"] * 2
    assert len(document["summary"]) == 2


@pytest.mark.parametrize(("engine", "title"), [("vllm", "vLLM"), ("sglang", "SGLang")])
def test_without_the_engine_it_says_so(
    engine: str, title: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    missing = lambda name: None if name == engine else object()  # noqa: E731
    monkeypatch.setattr(serve.util, "find_spec", missing)
    assert serve.main(["--engine", engine]) == 2
    assert f"{title} is not importable" in capsys.readouterr().err


# Servers that run already


def test_a_running_server_is_measured_by_the_name_it_gives(
    start: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    engine, attached = FakeEngine(), []

    @asynccontextmanager
    async def attach(url: str, timeout_secs: float) -> Any:
        attached.append(url)
        async with engine.server(["--all2all-backend", OURS], tmp_path / "log") as server:
            yield replace(server, base_url=url, log=None)

    async def served_name(base_url: str) -> str:
        return f"the model at {base_url}"

    monkeypatch.setattr(serve, "attached_server", attach)
    monkeypatch.setattr(serve, "served_name", served_name)
    status, document = start(engine, "--url", f"{OURS}=http://b:2", "--backends", f"default,{OURS}")
    assert status == 0
    assert attached == ["http://b:2"] * 2, "the other backend's servers were started"
    assert [server.get("url") for server in document["servers"]] == [None, "http://b:2"] * 2
    assert all(("command" in s) == (s["backend"] == "default") for s in document["servers"])
    for cell in document["cells"]:
        ours = cell["backend"] == OURS
        assert ("--base-url http://b:2 " in cell["client"]) == ours
        assert ("'the model at http://b:2'" in cell["client"]) == ours
    assert document["gates"][1]["versus"] == "default-0"
    assert "http://b:2" in (tmp_path / "out" / "r.html").read_text()


def test_a_running_server_that_names_no_model_is_a_failure(
    start: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def nameless(base_url: str) -> str:
        raise RuntimeError("no name")

    @asynccontextmanager
    async def attach(url: str, timeout_secs: float) -> Any:
        yield Server(url, None, 0.0)

    monkeypatch.setattr(serve, "attached_server", attach)
    monkeypatch.setattr(serve, "served_name", nameless)
    status, document = start(FakeEngine(), "--url", f"{OURS}=http://b:2")
    assert (status, document["cells"]) == (1, [])
    assert [server["error"] for server in document["servers"]] == ["no name"] * 2


# Resumed


def without_dates(document: dict[str, Any]) -> dict[str, Any]:
    return {k: v for k, v in document.items() if k not in ("resumed", "load_average_before")}


def test_an_interrupted_sweep_goes_on_with_what_is_missing(start: Any) -> None:
    whole = start(FakeEngine())[1]
    status, cut = start(FakeEngine(slow=OURS), "--limit", "2")
    assert status == 1
    assert len(cut["cells"]) == 2

    engine = FakeEngine()
    status, resumed = start(engine, "--resume")
    assert status == 0
    assert engine.started == [OURS, "default", OURS]  # the first server has told all
    assert resumed["cells"][:2] == cut["cells"]
    assert "error" not in resumed
    assert len(resumed["resumed"]) == 1
    for document in (whole, resumed):
        for part in (*document["servers"], *document["cells"]):
            part.pop("client", None)
        document.pop("command")
    assert without_dates(resumed) == without_dates(whole)

    engine = FakeEngine()
    assert start(engine, "--resume")[0] == 0
    assert engine.started == []


def test_a_resumed_sweep_compares_with_the_answers_of_the_first_server(start: Any) -> None:
    start(FakeEngine(slow=OURS), "--limit", "2")
    status, document = start(FakeEngine(answer=-8.0), "--resume")
    assert status == 1
    assert [gate["good"] for gate in document["gates"]] == [True, False, False, False]
    assert {gate["versus"] for gate in document["gates"][1:]} == {"default-0"}


def test_what_failed_is_tried_again(start: Any) -> None:
    status, document = start(FakeEngine(broken=OURS))
    assert (status, len(document["cells"])) == (1, 4)
    engine = FakeEngine()
    status, document = start(engine, "--resume")
    assert (status, len(document["cells"])) == (0, 8)
    assert engine.started == [OURS, OURS]
    assert not any("error" in server for server in document["servers"])


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({"--output-tokens": "64"}, "num_output_tokens 128, now it is 64"),
        ({"--env": "A=1"}, "environment {}, now it is {'A': '1'}"),
    ],
)
def test_other_settings_do_not_go_on(
    start: Any, change: dict[str, str], expected: str, capsys: pytest.CaptureFixture[str]
) -> None:
    start(FakeEngine(slow=OURS), "--limit", "2")
    engine = FakeEngine()
    arguments = [word for pair in change.items() for word in pair]
    status, document = start(engine, "--resume", *arguments)
    assert (status, engine.started) == (2, [])
    assert expected in capsys.readouterr().err
    assert len(document["cells"]) == 2


def test_another_machine_or_lost_answers_do_not_go_on(
    start: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    start(FakeEngine(slow=OURS), "--limit", "2")
    path = tmp_path / "out" / "r.json"
    document = json.loads(path.read_text())
    path.write_text(json.dumps(document | {"versions": document["versions"] | {"vllm": "0.1"}}))
    assert start(FakeEngine(), "--resume")[0] == 2
    assert "measured with vllm '0.1'" in capsys.readouterr().err
    path.write_text(json.dumps(document))
    (tmp_path / "out" / "r-reference.json").unlink()
    assert start(FakeEngine(), "--resume")[0] == 2
    assert "r-reference.json is gone" in capsys.readouterr().err


def test_a_sweep_in_which_no_server_could_be_checked_goes_on(start: Any) -> None:
    class Mute(FakeEngine):
        async def probe(self, engine: ServedEngine, target: Target) -> Probe:
            raise RuntimeError("no answer")

    assert start(Mute(slow=OURS), "--limit", "2")[0] == 1
    engine = FakeEngine()
    _, document = start(engine, "--resume")
    assert engine.started == [OURS, "default", OURS]
    assert "versus" not in document["gates"][1]


def test_answers_of_a_sweep_that_is_gone_are_not_compared_with(start: Any, tmp_path: Path) -> None:
    start(FakeEngine())
    (tmp_path / "out" / "r.json").unlink()
    status, document = start(FakeEngine(answer=-8.0), "--resume")
    assert (status, "versus" in document["gates"][0]) == (0, False)


def test_without_resume_a_sweep_starts_anew(start: Any) -> None:
    start(FakeEngine())
    engine = FakeEngine(answer=-8.0)
    status, document = start(engine)
    assert len(engine.started) == 4
    # Its own first server is what others are compared with, not the earlier sweep's.
    assert "versus" not in document["gates"][0]
    assert status == 0


# The report beside it


def test_every_sweep_leaves_a_page_and_charts(start: Any, tmp_path: Path) -> None:
    start(FakeEngine())
    page = (tmp_path / "out" / "r.html").read_text()
    for word in ("TPOT, percentiles", "Throughput", f"{OURS}, p95", "bench serve"):
        assert word in page
    assert "Exchange in a step" not in page  # no server was traced
    names = {path.name for path in (tmp_path / "out").glob("*.png")}
    assert names == {f"r-{chart}.png" for chart in ("tpot", "itl", "ttft", "throughput")}
    assert all(p.read_bytes().startswith(b"\x89PNG") for p in (tmp_path / "out").glob("*.png"))
