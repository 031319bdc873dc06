"""`ep-backend bench serve`: an engine's latency and throughput, by all-to-all backend.

One server after another serves the same model, each with another backend. In every one: warm-up,
then a correctness check (`serve_gate`), then the sweep of concurrencies, `--repeats` times, with
`vllm bench serve`'s streaming client and random prompts. Every measurement is written when it is
made, so that a run that is cut short has told what it knows.
"""

from __future__ import annotations

import asyncio
import dataclasses
import json
import signal
import sys
import time
from contextlib import AsyncExitStack
from datetime import datetime, timezone
from importlib import util
from pathlib import Path
from typing import Any

from ep_backend.bench import serve_gate
from ep_backend.bench.serve_client import (
    BenchClient,
    ClientFailed,
    bench_arguments,
    read_metrics,
    running_client,
)
from ep_backend.bench.serve_engine import (
    inherited_environment,
    machine,
    model_directory,
    server_command,
    server_environment,
    versions,
)
from ep_backend.bench.serve_gate import Probe
from ep_backend.bench.serve_report import gate_line, has_failed, print_results, summarise
from ep_backend.bench.serve_settings import PROGRAM, Options, Visit, parse_arguments
from ep_backend.bench.server import START_TIMEOUT_SECS, Server, ServerFailed, running_server


def main(arguments: list[str] | None = None) -> int:
    """Returns the exit status: 1 where something failed or was not reached, 2 without vLLM."""
    options = parse_arguments(sys.argv[1:] if arguments is None else arguments)
    if util.find_spec("vllm") is None:
        print(f"{PROGRAM}: vLLM is not importable in {sys.executable}", file=sys.stderr)
        return 2
    # SIGTERM ends the servers as Ctrl-C does; a shell's background job begins with that ignored.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGTERM, lambda *_: signal.raise_signal(signal.SIGINT))
    run = Run(options)
    run.measure()
    print_results(run.document)
    print(f"wrote {options.output}")
    return int(has_failed(run.document))


class Run:
    """All servers of one benchmark, and the document that grows with it."""

    def __init__(self, options: Options) -> None:
        self.options = options
        self.document = new_document(options)
        self._begin = time.monotonic()
        self._reference: tuple[str, Probe] | None = None

    def measure(self) -> None:
        """Everything, within the limit. Never raises for what an engine does: the document says
        it."""
        self._say("model")
        try:
            with model_directory(self.options) as model:
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
        for visit in self.options.visits():
            entry = {"name": visit.name, "backend": visit.backend}
            self.document["servers"].append(entry)
            try:
                await self._visit(visit, model, entry)
            except (ServerFailed, ClientFailed) as e:
                entry["error"] = str(e)
                print(f"{visit.name}: {e}", flush=True)
                self._write()

    async def _visit(self, visit: Visit, model: Path, entry: dict[str, Any]) -> None:
        """One server, from its start to its end.

        Raises:
            ServerFailed: it did not start or did not last.
            ClientFailed: a measurement failed: the rest of this server's are not tried.
        """
        command = server_command(self.options, model, visit.backend)
        environment = server_environment(self.options, visit.backend)
        log = self.options.log(visit.name)
        entry |= {"command": command, "environment": environment, "log": log.name}
        self._say(f"{visit.name}, start-up (log: {log})")
        async with AsyncExitStack() as stack:
            client = await stack.enter_async_context(
                running_client(self.options.log("client"), environment)
            )
            server = await stack.enter_async_context(
                running_server(
                    command,
                    log,
                    environment=environment,
                    start_timeout_secs=max(START_TIMEOUT_SECS, self.options.limit_secs),
                )
            )
            entry["start_secs"] = round(server.start_secs, 1)
            self._say(f"{visit.name}, warm-up; up after {server.start_secs:.0f} s")
            for concurrency in self.options.concurrency:
                await self._bench(client, server, model, concurrency, None)
            self._say(f"{visit.name}, correctness")
            await self._check(visit, server, model)
            for repeat in visit.repeats:
                for concurrency in self.options.concurrency:
                    await self._cell(visit, client, server, model, concurrency, repeat)

    async def _cell(
        self,
        visit: Visit,
        client: BenchClient,
        server: Server,
        model: Path,
        concurrency: int,
        repeat: int,
    ) -> None:
        self._say(f"{visit.name}, {concurrency} in flight, repeat {repeat}", end=": ")
        cell = {
            "backend": visit.backend,
            "server": visit.name,
            "concurrency": concurrency,
            "repeat": repeat,
        }
        try:
            metrics = await self._bench(client, server, model, concurrency, repeat)
        except ClientFailed as e:
            print("failed", flush=True)
            self.document["cells"].append(cell | {"error": str(e)})
            raise
        self.document["cells"].append(cell | {"metrics": metrics})
        tpot, tokens = metrics["tpot_mean_ms"], metrics["output_tokens_per_sec"]
        print(f"TPOT {tpot:.2f} ms, {tokens:.0f} tok/s", flush=True)
        self._write()

    async def _bench(
        self,
        client: BenchClient,
        server: Server,
        model: Path,
        concurrency: int,
        repeat: int | None,
    ) -> dict[str, Any]:
        num_prompts = concurrency if repeat is None else self.options.num_prompts(concurrency)
        arguments = bench_arguments(
            self.options, server.base_url, model, concurrency=concurrency, repeat=repeat
        )
        return read_metrics(await client.run(arguments), num_prompts)

    async def _check(self, visit: Visit, server: Server, model: Path) -> None:
        """Against the first server that was checked, and against itself, which tells the noise."""
        gate: dict[str, Any] = {"server": visit.name, "backend": visit.backend}
        try:
            found = await serve_gate.probe(server.base_url, model)
            again = await serve_gate.probe(server.base_url, model)
        except RuntimeError as e:
            gate["error"] = str(e)
        else:
            gate["again"] = serve_gate.compare(found, again).as_json()
            gate["good"] = True
            if self._reference is None:
                self._reference = (visit.name, found)
            else:
                name, reference = self._reference
                difference = serve_gate.compare(reference, found)
                gate |= {"versus": name, "good": difference.is_good} | difference.as_json()
        self.document["gates"].append(gate)
        print(gate_line(gate), flush=True)
        self._write()

    def _say(self, running: str, end: str = "\n") -> None:
        self.document["running"] = running
        print(f"{time.monotonic() - self._begin:5.0f} s  {running}", end=end, flush=True)

    def _write(self) -> None:
        self.document["summary"] = summarise(self.document)
        self.options.output.parent.mkdir(parents=True, exist_ok=True)
        self.options.output.write_text(json.dumps(self.document, indent=2) + "\n")


def new_document(options: Options) -> dict[str, Any]:
    settings = dataclasses.asdict(options)
    for name in ("model", "output"):  # the command names them
        del settings[name]
    return {
        "command": settings.pop("command"),
        "date": datetime.now(timezone.utc).strftime("%Y-%m-%d"),
        "versions": versions(),
        "machine": machine(),
        "inherited_environment": inherited_environment(),
        "settings": settings,
        "running": "start",
        "servers": [],
        "gates": [],
        "cells": [],
        "summary": [],
    }


if __name__ == "__main__":
    sys.exit(main())
