"""The demo: a real engine serves a tiny MoE model on one rank, then on several through ep_backend.

Both answer the same prompts with greedy tokens in float32; the tokens must be equal. While the
second one decodes, every dispatch, hook and combine is timed inside the engine's workers, next to
the engine's own forward passes.
"""

from __future__ import annotations

import asyncio
import dataclasses
import json
import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from ep_backend.bench import exchange
from ep_backend.bench.client import Completion, fetch_text, stream_all
from ep_backend.bench.demo_engines import ENGINES, Engine
from ep_backend.bench.exchange import ExchangeReport
from ep_backend.bench.model import HEAD_DIM, TinyMoE, make_model
from ep_backend.bench.provenance import commit
from ep_backend.bench.serve_engine import machine
from ep_backend.bench.server import Server, ServerFailed, running_server
from ep_backend.faults import FAULT_VARIABLE
from ep_backend.observe import metrics
from ep_backend.observe.trace import TRACE_VARIABLE

SUBJECTS = ("alpha", "river", "engine", "lantern", "harbour", "violin", "glacier", "market")
WARMUP_ROUNDS = 2


@dataclass(frozen=True)
class DemoSettings:
    """What to serve, and where results go."""

    output: Path
    engine_name: str = "vllm"
    ranks: int = 2
    mode: str = "low-latency"
    shape: TinyMoE = field(default_factory=TinyMoE)
    num_prompts: int = 8
    num_tokens: int = 32
    max_num_batched_tokens: int = 256
    fault: str | None = None
    """Breaks ep_backend on purpose (see `ep_backend.faults`): the comparison must notice."""

    def __post_init__(self) -> None:
        if self.ranks < 2:
            raise ValueError(f"ranks is {self.ranks}, expected at least 2: one is the reference.")
        if self.engine_name not in ENGINES:
            names = ", ".join(ENGINES)
            raise ValueError(f"engine is {self.engine_name!r}, expected one of {names}.")
        if self.mode not in self.engine.modes:
            modes = ", ".join(self.engine.modes)
            raise ValueError(
                f"mode is {self.mode!r}, expected for {self.engine.title} one of {modes}."
            )
        num_heads = self.shape.num_kv_heads
        if self.engine.shares_kv_heads and num_heads % self.ranks != 0:
            raise ValueError(
                f"ranks is {self.ranks}, but a model of hidden {self.shape.hidden} has {num_heads} "
                f"key heads, which {self.engine.title} shares out on a CPU. Pass hidden "
                f"{2 * HEAD_DIM * self.ranks} or a multiple of that."
            )

    @property
    def engine(self) -> Engine:
        return ENGINES[self.engine_name]

    @property
    def max_num_low_latency_tokens(self) -> int:
        """Of a rank's step. In mode `auto` not the longest prompts: normal kernels prefill them."""
        if self.mode != "auto":
            return self.max_num_batched_tokens
        return max(self.num_prompts, max(map(len, self.prompts)) - 1)

    @property
    def prompts(self) -> list[str]:
        return [
            f"{i}: tell me about the {SUBJECTS[i % len(SUBJECTS)]}" for i in range(self.num_prompts)
        ]


@dataclass
class Run:
    """What one server answered."""

    name: str
    ranks: int
    start_secs: float
    sequential: list[Completion]
    """One prompt at a time: latencies come from here."""
    concurrent: list[Completion]
    """All prompts at once."""
    exchange: ExchangeReport | None = None
    metrics: str = ""
    """What the server's /metrics said at the end, where ep_backend was in it."""


@dataclass
class DemoResult:
    settings: DemoSettings
    reference: Run
    ours: Run

    def tokens_equal(self, pass_name: str) -> bool:
        """Every token of this pass equals the one-rank server's, prompt by prompt."""
        expected = [c.token_ids for c in self.reference.sequential]
        return [c.token_ids for c in getattr(self.ours, pass_name)] == expected

    @property
    def is_good(self) -> bool:
        """Tokens are equal, prompts differ in their answers, and nothing went round ep_backend."""
        return (
            self.tokens_equal("sequential")
            and self.tokens_equal("concurrent")
            and self.num_distinct_answers > 1
            and self.ours.exchange is not None
            and self.ours.exchange.all_steps_dispatched
        )

    @property
    def num_distinct_answers(self) -> int:
        return len({tuple(c.token_ids) for c in self.reference.sequential})

    def as_json(self) -> dict[str, Any]:
        exchange_report = self.ours.exchange
        assert exchange_report is not None
        settings = dataclasses.asdict(self.settings)
        settings["output"] = str(self.settings.output)
        return {
            "engine": settings.pop("engine_name"),
            "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
            "commit": commit(),
            "machine": machine(),
            "settings": settings,
            "good": self.is_good,
            "num_distinct_answers": self.num_distinct_answers,
            "runs": [
                {
                    "name": run.name,
                    "ranks": run.ranks,
                    "start_secs": run.start_secs,
                    "tokens_equal": run is self.reference
                    or (self.tokens_equal("sequential") and self.tokens_equal("concurrent")),
                    "num_tokens": sum(len(c.token_ids) for c in run.sequential),
                    "latency_ms": exchange.latency_summary(run.sequential),
                    "completions": [dataclasses.asdict(c) for c in run.sequential],
                }
                for run in (self.reference, self.ours)
            ],
            "exchange": exchange_report.as_json(),
        }


class Progress:
    """What the demo tells while it works; the command line draws it, tests ignore it."""

    def stage(self, text: str) -> None: ...

    def update(self, text: str) -> None: ...


async def serve_reference(settings: DemoSettings, progress: Progress) -> Run:
    """Serves on one rank, with the engine's own experts."""
    return await _serve(settings, 1, {}, progress)


async def serve_ours(settings: DemoSettings, progress: Progress) -> Run:
    """Serves on `settings.ranks` ranks through ep_backend, with a trace and metrics."""
    trace_dir = settings.output / f"trace-{settings.ranks}-ranks"
    metrics_dir = settings.output / f"metrics-{settings.ranks}-ranks"
    for directory in (trace_dir, metrics_dir):
        shutil.rmtree(directory, ignore_errors=True)
        directory.mkdir(parents=True)
    environment = {
        TRACE_VARIABLE: str(trace_dir.resolve()),
        metrics.DIRECTORY_VARIABLE: str(metrics_dir.resolve()),
    }
    if settings.fault:
        environment[FAULT_VARIABLE] = settings.fault
    return await _serve(settings, settings.ranks, environment, progress, trace_dir)


async def run_demo(settings: DemoSettings, progress: Progress | None = None) -> DemoResult:
    """Both servers, one after the other; writes `result.json` and the plot.

    Raises:
        ServerFailed: a server did not start or did not last; the text holds the end of its log.
    """
    progress = progress or Progress()
    reference = await serve_reference(settings, progress)
    ours = await serve_ours(settings, progress)
    result = DemoResult(settings, reference, ours)
    settings.output.mkdir(parents=True, exist_ok=True)
    path = settings.output / "result.json"
    path.write_text(json.dumps(result.as_json(), indent=2) + "\n")
    return result


async def _serve(
    settings: DemoSettings,
    ranks: int,
    environment: dict[str, str],
    progress: Progress,
    trace_dir: Path | None = None,
) -> Run:
    model = make_model(settings.output / "model", settings.shape)
    name = "1 rank" if ranks == 1 else f"{ranks} ranks, ep_backend"
    engine = settings.engine
    command = engine.command(
        model, ranks, engine.modes[settings.mode], settings.max_num_batched_tokens
    )
    log = settings.output / f"{settings.engine_name}-{ranks}-ranks.log"
    progress.stage(f"{engine.program}, {name}: starting (log: {log})")
    async with running_server(
        command,
        log,
        environment=engine.environment_of(ranks, settings.max_num_low_latency_tokens) | environment,
        on_wait=lambda seconds: progress.update(f"{seconds:.0f} s"),
    ) as server:
        return await _stream(settings, server, str(model), ranks, name, progress, trace_dir)


async def _stream(
    settings: DemoSettings,
    server: Server,
    model: str,
    ranks: int,
    name: str,
    progress: Progress,
    trace_dir: Path | None,
) -> Run:
    def ask(concurrency: int, on_done: Callable[[], None] = lambda: None) -> Any:
        return stream_all(
            server.base_url,
            model,
            settings.prompts,
            settings.num_tokens,
            concurrency=concurrency,
            on_done=on_done,
        )

    program = settings.engine.program
    progress.stage(f"{program}, {name}: up after {server.start_secs:.0f} s, warming up")
    for _ in range(WARMUP_ROUNDS):  # the first decode steps of every rank take seconds
        await ask(concurrency=settings.num_prompts)

    progress.stage(f"{program}, {name}: streaming {settings.num_prompts} prompts one by one")
    num_done = 0

    def count() -> None:
        nonlocal num_done
        num_done += 1
        progress.update(f"{num_done}/{settings.num_prompts}")

    begin_ns = time.monotonic_ns()
    sequential = await ask(1, count)
    end_ns = time.monotonic_ns()
    concurrent = await ask(settings.num_prompts)
    run = Run(name, ranks, server.start_secs, sequential, concurrent)
    if trace_dir is not None:
        # Idle ranks go on with empty steps for a moment: count when all of them rest.
        await asyncio.to_thread(exchange.wait_until_quiet, trace_dir)
        run.exchange = exchange.read_exchange(
            trace_dir,
            num_layers=settings.shape.num_layers,
            num_ranks=ranks,
            window_ns=(begin_ns, end_ns),
        )
        if settings.engine.metrics_path is not None:
            await asyncio.sleep(2 * metrics.INTERVAL_SECS)  # the last counts are in the registry
            run.metrics = await fetch_text(server.base_url + settings.engine.metrics_path)
    return run


__all__ = ["DemoResult", "DemoSettings", "Progress", "Run", "ServerFailed", "run_demo"]
