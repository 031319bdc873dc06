"""`ep-backend bench serve`: an engine's latency and throughput, by all-to-all backend.

One server after another serves the same model, each with another backend, in turn. In every one:
warm-up, then a correctness check (`serve_gate`), then the sweep of concurrencies, with the engine's
own benchmark and random prompts. Every measurement is written when it is made: a run that is cut
short has told what it knows, and `--resume` goes on from there.
"""

from __future__ import annotations

import asyncio
import shlex
import shutil
import sys
import time
from contextlib import AbstractAsyncContextManager, AsyncExitStack
from importlib import util
from pathlib import Path
from typing import Any

import httpx

from ep_backend.bench import serve_gate, serve_profile
from ep_backend.bench.client import served_name
from ep_backend.bench.serve_client import (
    BenchClient,
    ClientFailed,
    read_metrics,
    running_client,
)
from ep_backend.bench.serve_document import (
    CannotResume,
    forget_server,
    lacks_profiles,
    missing_cells,
    new_document,
    read_reference,
    reference_path,
    resumed_document,
    write_document,
    write_reference,
)
from ep_backend.bench.serve_engine import Target, model_directory
from ep_backend.bench.serve_engines import ENGINES, server_command, server_environment
from ep_backend.bench.serve_page import write_report
from ep_backend.bench.serve_progress import Display, Plan, Stage
from ep_backend.bench.serve_report import gate_line, has_failed, print_results
from ep_backend.bench.serve_settings import PROGRAM, Options, Visit, parse_arguments
from ep_backend.bench.serve_share import exchange_share
from ep_backend.bench.server import (
    START_TIMEOUT_SECS,
    Server,
    ServerFailed,
    attached_server,
    end_by_signals,
    running_server,
)
from ep_backend.observe.trace import TRACE_VARIABLE

Cells = list[tuple[int, int]]


def main(arguments: list[str] | None = None) -> int:
    """Returns the exit status: 1 where something failed or was not reached, 2 where it cannot
    begin."""
    options = parse_arguments(sys.argv[1:] if arguments is None else arguments)
    engine = ENGINES[options.engine]
    if util.find_spec(engine.package) is None:
        print(f"{PROGRAM}: {engine.title} is not importable in {sys.executable}", file=sys.stderr)
        return 2
    end_by_signals()
    try:
        run = Run(options)
    except CannotResume as e:
        print(f"{PROGRAM} --resume: {e}", file=sys.stderr)
        return 2
    run.measure()
    print_results(run.document)
    for path in [options.output, *write_report(run.document, options.output)]:
        print(f"wrote {path}")
    return int(has_failed(run.document))


class Run:
    """All servers of one benchmark, and the document that grows with it."""

    def __init__(self, options: Options) -> None:
        """A new run, or, with `options.resume`, what is missing of an earlier one.

        Raises:
            CannotResume: the earlier one was measured otherwise.
        """
        self.options = options
        self.engine = ENGINES[options.engine]
        self._begin = time.monotonic()
        if options.resume:
            self.document = resumed_document(options)
            self._reference = read_reference(self.document, options)
        else:
            self.document = new_document(options)
            self._reference = None
        self._visits: list[tuple[Visit, Cells]] = [
            (visit, cells)
            for visit in options.visits()
            if (cells := missing_cells(self.document, visit, options))
            or lacks_profiles(self.document, visit, options)
        ]
        self._display = Display(
            Plan([s for v, cells in self._visits for s in stages(v, cells, options)])
        )

    def measure(self) -> None:
        """Everything, within the limit. Never raises for what an engine does: the document says
        it."""
        if self._reference is None:  # an earlier sweep's would be taken for this one's
            reference_path(self.options).unlink(missing_ok=True)
        try:
            with self._display.shown(), model_directory(self.options) as model:
                asyncio.run(self._measure_within(model))
        except KeyboardInterrupt:
            self.document["error"] = f"stopped by hand in {self.document['running']}"
        except RuntimeError as e:
            self.document["error"] = str(e)
        else:
            self.document["running"] = None
        self._write()

    async def _measure_within(self, model: Path) -> None:
        left_secs = self.options.limit_secs - (time.monotonic() - self._begin)
        measuring = asyncio.ensure_future(self._measure(model))
        done, _ = await asyncio.wait([measuring], timeout=max(left_secs, 0.0))
        if not done:
            measuring.cancel()
            await asyncio.wait([measuring])
            limit = f"the limit of {self.options.limit_secs:g} s"
            raise RuntimeError(f"{limit} came in {self.document['running']}")
        measuring.result()

    async def _measure(self, model: Path) -> None:
        for visit, cells in self._visits:
            forget_server(self.document, visit)
            entry = {"name": visit.name, "backend": visit.backend}
            self.document["servers"].append(entry)
            try:
                await self._visit(visit, cells, model, entry)
            except (ServerFailed, ClientFailed) as e:
                entry["error"] = str(e)
                self._display.say(f"{visit.name}: {e}")
                self._write()

    async def _visit(self, visit: Visit, cells: Cells, model: Path, entry: dict[str, Any]) -> None:
        """One server, from its start to its end.

        Raises:
            ServerFailed: it did not start or did not last.
            ClientFailed: a measurement failed: the rest of this server's are not tried.
        """
        profile_dir = self._profile_dir(visit)
        environment = server_environment(self.options, visit.backend)
        trace_dir = self._new_trace_dir(visit)
        running = self._server(visit, model, environment, trace_dir, profile_dir, entry)
        async with AsyncExitStack() as stack:
            client = await stack.enter_async_context(
                running_client(self.options.engine, self.options.log("client"), environment)
            )
            server = await stack.enter_async_context(running)
            target = Target(server.base_url, model, await self._served_name(visit, server, model))
            entry["start_secs"] = round(server.start_secs, 1)
            self._begin_stage(visit, "warm-up", f", up after {server.start_secs:.0f} s")
            for concurrency in sorted({c for _, c in cells} or set(self.options.profile)):
                await self._bench(client, target, concurrency, None)
            self._begin_stage(visit, "correctness")
            await self._check(visit, target)
            for repeat, concurrency in cells:
                self._begin_stage(visit, cell_name(repeat, concurrency))
                await self._cell(visit, client, target, concurrency, repeat, trace_dir)
            if profile_dir is not None:
                for concurrency in self.options.profile:
                    self._begin_stage(visit, profile_name(concurrency))
                    await self._profile(visit, client, target, concurrency, profile_dir)

    def _server(
        self,
        visit: Visit,
        model: Path,
        environment: dict[str, str],
        trace_dir: Path | None,
        profile_dir: Path | None,
        entry: dict[str, Any],
    ) -> AbstractAsyncContextManager[Server]:
        """Started here, or running already; `entry` tells which."""
        url = self.options.urls.get(visit.backend)
        if url is not None:
            entry |= {"url": url}
            self._begin_stage(visit, "start-up", f" (is at {url})")
            return attached_server(url, min(START_TIMEOUT_SECS, self.options.limit_secs))
        command = server_command(self.options, model, visit.backend)
        if profile_dir is not None:
            command += self.engine.profiler_arguments(profile_dir)
        log = self.options.log(visit.name)
        entry |= {"command": self._shown(command, model), "environment": environment.copy()}
        entry["log"] = log.name
        if trace_dir is not None:
            environment = environment | {TRACE_VARIABLE: str(trace_dir.resolve())}
        self._begin_stage(visit, "start-up", f" (log: {log})")
        return running_server(
            command,
            log,
            environment=environment,
            start_timeout_secs=max(START_TIMEOUT_SECS, self.options.limit_secs),
        )

    async def _served_name(self, visit: Visit, server: Server, model: Path) -> str:
        """What the server calls the model: one that runs already may have been told a name."""
        if visit.backend not in self.options.urls:
            return str(model)
        try:
            return await served_name(server.base_url)
        except RuntimeError as e:
            raise ServerFailed(str(e)) from e

    async def _cell(
        self,
        visit: Visit,
        client: BenchClient,
        target: Target,
        concurrency: int,
        repeat: int,
        trace_dir: Path | None,
    ) -> None:
        cell: dict[str, Any] = {
            "backend": visit.backend,
            "server": visit.name,
            "concurrency": concurrency,
            "repeat": repeat,
        }
        begin_ns = time.monotonic_ns()
        try:
            metrics = await self._bench(client, target, concurrency, repeat)
        except ClientFailed as e:
            self.document["cells"].append(cell | {"error": str(e)})
            raise
        if trace_dir is not None:
            metrics |= exchange_share(trace_dir, (begin_ns, time.monotonic_ns()))
        arguments = self._bench_arguments(target, concurrency, repeat)
        shown = shlex.join(self._shown(arguments, target.model))
        cell["client"] = f"{self.engine.client_name} {shown}"
        self.document["cells"].append(cell | {"metrics": metrics})
        tpot, tokens = metrics["tpot_mean_ms"], metrics["output_tokens_per_sec"]
        self._say(f"  TPOT {tpot:.2f} ms, {tokens:.0f} tok/s")
        self._write()

    async def _profile(
        self,
        visit: Visit,
        client: BenchClient,
        target: Target,
        concurrency: int,
        profile_dir: Path,
    ) -> None:
        """While requests as those of the first repeat are answered."""
        profile = {"server": visit.name, "backend": visit.backend, "concurrency": concurrency}
        requests = asyncio.ensure_future(self._bench(client, target, concurrency, 0))
        try:
            request = self.engine.profiler_request(profile_dir)
            traces = await serve_profile.record(target.base_url, profile_dir, request)
            profile["ranks"] = serve_profile.profile_of(traces)
        except (RuntimeError, httpx.HTTPError) as e:
            profile["error"] = f"{type(e).__name__}: {e}"
            self._display.say(f"{visit.name}: not profiled: {e}")
        self.document["profiles"].append(profile)
        self._write()
        await requests

    def _bench_arguments(self, target: Target, concurrency: int, repeat: int | None) -> list[str]:
        of_round = self.options.round(concurrency, repeat)
        return self.engine.bench_arguments(self.options, target, of_round)

    async def _bench(
        self, client: BenchClient, target: Target, concurrency: int, repeat: int | None
    ) -> dict[str, Any]:
        result = await client.run(self._bench_arguments(target, concurrency, repeat))
        num_prompts = self.options.round(concurrency, repeat).num_prompts
        return read_metrics(self.engine, result, num_prompts)

    async def _check(self, visit: Visit, target: Target) -> None:
        """Against the first server that was checked, and against itself, which tells the noise."""
        gate: dict[str, Any] = {"server": visit.name, "backend": visit.backend}
        try:
            found = await serve_gate.probe(self.engine, target)
            again = await serve_gate.probe(self.engine, target)
        except RuntimeError as e:
            gate["error"] = str(e)
        else:
            gate["again"] = serve_gate.compare(found, again).as_json()
            gate["good"] = True
            if self._reference is None:
                self._reference = (visit.name, found)
                write_reference(self.options, visit.name, found)
            else:
                name, reference = self._reference
                difference = serve_gate.compare(reference, found)
                gate |= {"versus": name, "good": difference.is_good} | difference.as_json()
        self.document["gates"].append(gate)
        self._display.say(gate_line(gate))
        self._write()

    def _new_trace_dir(self, visit: Visit) -> Path | None:
        if not self.options.trace or visit.backend in self.options.urls:
            return None
        trace_dir = self.options.beside(f"{visit.name}-trace")
        shutil.rmtree(trace_dir, ignore_errors=True)
        trace_dir.mkdir(parents=True)
        return trace_dir

    def _profile_dir(self, visit: Visit) -> Path | None:
        if not self.options.is_profiled(visit):
            return None
        profile_dir = self.options.beside(f"{visit.name}-profile").resolve()
        shutil.rmtree(profile_dir, ignore_errors=True)
        profile_dir.mkdir(parents=True)
        return profile_dir

    def _shown(self, command: list[str], model: Path) -> list[str]:
        """As it may be typed elsewhere: a random model's path is of this run alone."""
        names = {sys.executable: "python"}
        if self.options.model is None:
            names[str(model)] = "MODEL"
        return [names.get(word, word) for word in command]

    def _begin_stage(self, visit: Visit, name: str, more: str = "") -> None:
        self.document["running"] = f"{visit.name}, {name}"
        self._display.begin(self.document["running"], more)

    def _say(self, text: str) -> None:
        self._display.say(f"{time.monotonic() - self._begin:5.0f} s  {text}")

    def _write(self) -> None:
        write_document(self.document, self.options)


def cell_name(repeat: int, concurrency: int) -> str:
    return f"{concurrency} in flight, repeat {repeat}"


def profile_name(concurrency: int) -> str:
    return f"profile of {concurrency} in flight"


def stages(visit: Visit, cells: Cells, options: Options) -> list[Stage]:
    """Of one server, as `Run` begins them."""
    named = [(name, name, visit.backend) for name in ("start-up", "warm-up", "correctness")]
    named += [(cell_name(r, c), "cell", f"{visit.backend} {c}") for r, c in cells]
    if options.is_profiled(visit):
        named += [(profile_name(c), "profile", f"{visit.backend} {c}") for c in options.profile]
    return [Stage(f"{visit.name}, {name}", kind, variant) for name, kind, variant in named]


if __name__ == "__main__":
    sys.exit(main())
