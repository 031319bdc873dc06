"""What the serving benchmark makes of profiled kernels."""

from __future__ import annotations

import asyncio
import gzip
import json
import threading
from collections.abc import Iterator
from dataclasses import asdict, replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import httpx
import pytest

from ep_backend.bench import serve, serve_profile
from ep_backend.bench.serve_engines import ENGINES
from ep_backend.bench.serve_profile import HEADS, Kernel, RankProfile, record, table_cells
from ep_backend.bench.serve_report import has_failed, print_results
from ep_backend.bench.serve_settings import OURS, parse_arguments
from tests.bench.fake_engine import FakeEngine

SEND = "void ep::cuda::workspace_dispatch_kernel<ep::cuda::CopyRow, true, false>(ep::cuda::View)"
HOOK = SEND.replace("true, false", "false, true")
COMBINE = "void ep::cuda::(anonymous namespace)::workspace_combine_kernel<float, true, true>(View)"


def layers(names_and_us: list[tuple[str, float]], num_layers: int) -> list[Kernel]:
    """One after the other, a microsecond between two."""
    kernels, now = [], 0.0
    for _ in range(num_layers):
        for name, us in names_and_us:
            kernels.append(Kernel(name, now, us))
            now += us + 1
    return kernels


def test_halves_of_an_exchange_add_up() -> None:
    kernels = layers([(SEND, 3.0), (HOOK, 2.0), ("fused_moe_kernel", 10.0), (COMBINE, 4.0)], 20)
    slow = kernels[1]
    kernels[1] = Kernel(slow.name, slow.begin_us, 90.0)  # waits, and runs beside others
    profile = RankProfile.of(kernels)
    assert profile.num_layers == 20
    assert (profile.dispatch_us, profile.dispatch_shortest_us) == (5.0, 5.0)
    assert (profile.combine_us, profile.combine_shortest_us) == (4.0, 4.0)
    span = 20 * 23.0 - 1
    assert profile.shares["experts"] == pytest.approx(200 / span, abs=1e-4)
    assert profile.shares["dispatch"] == pytest.approx((20 * 5 + 88) / span, abs=1e-4)
    assert 0 < profile.shares["idle"] < 80 / span
    assert profile.kernels["fused_moe_kernel"] == (20, 200.0)


def test_gathers_of_several_tensors_are_one_dispatch() -> None:
    gather, scatter = "ncclDevKernel_AllGather_RING", "ncclDevKernel_ReduceScatter_Sum"
    kernels = layers([(gather, 3.0), (gather, 3.0), (scatter, 5.0), ("ncclAllReduce", 1.0)], 4)
    profile = RankProfile.of(kernels)
    assert (profile.num_layers, profile.dispatch_us, profile.combine_us) == (4, 6.0, 5.0)
    assert profile.shares["other collectives"] > 0


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("ncclDevKernel_AllGather_RING_LL(ncclDevKernelArgsStorage<4096ul>)", "dispatch"),
        ("ncclDevKernel_Reduce_Sum_bf16_RING_LL(ncclDevKernelArgsStorage<4096ul>)", "combine"),
        ("ncclDevKernel_AllReduce_Sum_bf16_RING_LL(Args)", "other collectives"),
        ("void ep::cuda::(anonymous namespace)::dispatch_layout_kernel<long>(L)", "dispatch"),
        ("void deep_gemm::sm90_bf16_gemm_impl<(cute::UMMA::Major)0>(int*)", "experts"),
        ("_silu_and_mul_kernel", "experts"),
        ("_fwd_kernel_ep_scatter_2", "experts"),
        ("_router_triton_kernel", "experts"),
        ("_fwd_grouped_kernel_stage1", "attention"),
        ("_fwd_kernel", "attention"),
        ("void sglang::fused_rope_store_kernel<true, 128l>(long)", "attention"),
        ("nvjet_sm90_tst_64x8_64x16_4x1_v_bz_TNT", "other"),
    ],
)
def test_kernels_that_sglang_runs_are_known(name: str, kind: str) -> None:
    assert Kernel(name, 0.0, 1.0).kind == kind


def test_kernels_without_an_exchange_are_an_error() -> None:
    with pytest.raises(RuntimeError, match=r"no dispatch and combine .*fused_moe_kernel"):
        RankProfile.of([Kernel("fused_moe_kernel", 0.0, 1.0)])


@pytest.fixture
def recording(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[str, Path]]:
    """A server that writes two ranks' traces when it is told to stop."""
    monkeypatch.setattr(serve_profile, "SETTLE_SECS", 0.0)
    monkeypatch.setattr(serve_profile, "PROFILED_SECS", 0.0)

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
            if body:
                (Path(json.loads(body)["output_dir"]) / "told.json").write_bytes(body)
            if self.path == "/stop_profile":
                for rank in (0, 1):
                    kernels = layers([(SEND, 3.0), (HOOK, 2.0), (COMBINE, 4.0)], 3)
                    events = [
                        {"cat": "kernel", "name": k.name, "ts": k.begin_us, "dur": k.duration_us}
                        for k in kernels
                    ]
                    events.append({"cat": "cpu_op", "name": SEND, "ts": 0, "dur": 1000})
                    text = json.dumps({"traceEvents": events}).encode()
                    (tmp_path / f"rank{rank}.1.pt.trace.json.gz").write_bytes(gzip.compress(text))
                (tmp_path / "x.async_llm.1.pt.trace.json").write_text("{}")
            self.send_response(200 if self.path in ("/start_profile", "/stop_profile") else 404)
            self.end_headers()

        def log_message(self, *_: object) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_address[1]}", tmp_path
        server.shutdown()


def test_a_moment_is_recorded(recording: tuple[str, Path]) -> None:
    url, directory = recording
    (directory / "old.pt.trace.json").write_text("{}")
    traces = asyncio.run(record(url, directory))
    assert [path.name.split(".")[0] for path in traces] == ["rank0", "rank1"]
    ranks = serve_profile.profile_of(traces)
    rows = table_cells([{"concurrency": 8, "backend": "default", "ranks": ranks}])
    assert {len(row) for row in rows} == {len(HEADS)}
    assert [row[:8] for row in rows] == [
        ["8", "default", rank, "3", "5.0", "5.0", "4.0", "4.0"] for rank in "01"
    ]


@pytest.mark.parametrize("engine", ["vllm", "sglang"])
def test_a_server_is_told_where_traces_go(recording: tuple[str, Path], engine: str) -> None:
    """At its start, or when it is to record."""
    url, directory = recording
    served = ENGINES[engine]
    at_start, request = served.profiler_arguments(directory), served.profiler_request(directory)
    assert asyncio.run(record(url, directory, request))
    assert (str(directory) in at_start) == (engine == "vllm")
    assert (directory / "told.json").exists() == (engine == "sglang")


def test_no_trace_is_an_error(recording: tuple[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(serve_profile, "_traces", lambda trace_dir: iter(()))
    with pytest.raises(RuntimeError, match="left no trace in"):
        asyncio.run(record(*recording))


@pytest.mark.parametrize(
    "content",
    [b"{", b"{}", gzip.compress(b"{}")[:-9]],
    ids=["half", "without events", "half, compressed"],
)
def test_a_trace_that_cannot_be_read_is_told(content: bytes, tmp_path: Path) -> None:
    name = "a.pt.trace.json" + (".gz" if content[0] == 0x1F else "")
    (tmp_path / name).write_bytes(content)
    with pytest.raises(RuntimeError, match=rf"{name} cannot be read"):
        serve_profile.profile_of([tmp_path / name])


def test_profiles_that_are_missing_are_made_when_a_sweep_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "config.json").write_text("{}")
    row = asdict(RankProfile.of(layers([(SEND, 3.0), (HOOK, 2.0), (COMBINE, 4.0)], 3)))
    monkeypatch.setattr(serve_profile, "profile_of", lambda traces: [row] * len(traces))
    is_broken = True

    async def recorded(_url: str, profile_dir: Path, _request: None) -> list[Path]:
        if is_broken and "ep_backend" in profile_dir.name:
            raise RuntimeError("no trace")
        return [profile_dir]

    monkeypatch.setattr(serve_profile, "record", recorded)

    def measured(*more: str) -> tuple[dict[str, Any], list[str]]:
        engine = FakeEngine()
        monkeypatch.setattr(serve, "running_server", engine.server)
        monkeypatch.setattr(serve, "running_client", engine.client)
        monkeypatch.setattr(serve.serve_gate, "probe", engine.probe)
        arguments = ["--concurrency", "2", "--repeats", "2", "--profile", "2,4", *more]
        arguments += ["--model", str(tmp_path), "--output", str(tmp_path / "x.json")]
        run = serve.Run(parse_arguments(arguments))
        run.measure()
        return run.document, engine.started

    cut, _ = measured()
    assert has_failed(cut)
    is_broken = False
    resumed, started = measured("--resume")
    assert started == [OURS]  # the first server of the other backend has told all
    assert not has_failed(resumed)
    assert [(p["backend"], p["concurrency"]) for p in resumed["profiles"]] == [
        (backend, concurrency) for backend in ("default", OURS) for concurrency in (2, 4)
    ]
    assert resumed["cells"] == cut["cells"]
    assert measured("--resume")[1] == []


def test_servers_that_run_on_are_profiled_when_all_is_measured(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    arguments = f"--engine sglang --device cuda --profile 2 --repeats 3 --model {tmp_path}"
    options = parse_arguments([*arguments.split(), "--url", "default=http://a:1"])
    profiled = [visit.name for visit in options.visits() if options.is_profiled(visit)]
    assert profiled == ["default-2"]
    both = replace(options, backends=("default", OURS))
    profiled = [visit.name for visit in both.visits() if both.is_profiled(visit)]
    assert profiled == [f"{OURS}-0", "default-2"]
    unprofiled = replace(both, profile=())
    assert not any(unprofiled.is_profiled(visit) for visit in unprofiled.visits())


def test_a_server_that_cannot_be_profiled_fails_the_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    engine = FakeEngine()
    monkeypatch.setattr(serve, "running_server", engine.server)
    monkeypatch.setattr(serve, "running_client", engine.client)
    monkeypatch.setattr(serve.serve_gate, "probe", engine.probe)
    asked: list[Path] = []

    async def no_answer(_url: str, profile_dir: Path, _request: None) -> list[Path]:
        asked.append(profile_dir)
        raise httpx.ConnectError("nobody there")

    monkeypatch.setattr(serve_profile, "record", no_answer)
    (tmp_path / "config.json").write_text("{}")
    arguments = ["--concurrency", "2", "--repeats", "2", "--profile", "2,4"]
    arguments += ["--model", str(tmp_path), "--output", str(tmp_path / "x.json")]
    run = serve.Run(parse_arguments(arguments))
    run.measure()
    document = run.document
    # Of each backend the first server.
    assert [path.name for path in asked] == [
        f"x-{backend}-0-profile" for backend in document["settings"]["backends"] for _ in "12"
    ]
    assert has_failed(document)
    assert len(document["cells"]) == 4
    print_results(document)
    assert "not profiled: ConnectError: nobody there" in capsys.readouterr().out
    commands = {server["name"]: server["command"] for server in document["servers"]}
    assert "--profiler-config.profiler" in commands["default-0"]
    assert "--profiler-config.profiler" not in commands["default-1"]


def test_somebody_must_be_in_flight(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        parse_arguments(["--profile", "8,0"])
    assert "--profile must be at least 1" in capsys.readouterr().err


def test_running_servers_are_profiled_where_they_can_be_told(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "config.json").write_text("{}")
    arguments = ["--profile", "2", "--model", str(tmp_path), "--url", "default=http://a:1"]
    assert parse_arguments([*arguments, "--engine", "sglang"]).profile == (2,)
    with pytest.raises(SystemExit):
        parse_arguments(arguments)
    assert "vLLM's are told then where traces go" in capsys.readouterr().err


def test_kernels_are_a_gpus(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        parse_arguments(["--device", "cpu", "--profile", "1"])
    assert "kernels on a GPU" in capsys.readouterr().err
