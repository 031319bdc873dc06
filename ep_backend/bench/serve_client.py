"""An engine's own benchmark, kept ready in a process of its own.

Importing it takes longer than many a measurement: the process does that once, while the server
starts, and then runs one measurement for every line that it is sent.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import sys
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

from ep_backend.bench.serve_engine import ServedEngine
from ep_backend.bench.serve_engines import ENGINES
from ep_backend.bench.server import LOG_TAIL_LINES


class ClientFailed(RuntimeError):
    """A measurement failed, or the client's process ended."""


def read_metrics(engine: ServedEngine, result: dict[str, Any], num_prompts: int) -> dict[str, Any]:
    """Our metrics from what the engine's benchmark returns.

    Raises:
        ClientFailed: not all requests were answered.
    """
    if result["completed"] != num_prompts:
        errors = [error for error in result.get("errors", []) if error]
        last = f": {errors[-1].strip().splitlines()[-1]}" if errors else ""
        raise ClientFailed(f"{result['completed']} of {num_prompts} requests were answered{last}")
    metrics = {ours: round(float(result[theirs]), 4) for ours, theirs in engine.metrics.items()}
    return metrics | {"num_requests": num_prompts, "num_tokens": result["total_output_tokens"]}


class BenchClient:
    """The parent's end."""

    def __init__(self, process: asyncio.subprocess.Process, log: Path) -> None:
        self._process = process
        self._log = log

    async def run(self, arguments: list[str]) -> dict[str, Any]:
        """One measurement; returns the benchmark's result.

        Raises:
            ClientFailed: it raised, or the process has ended; the text says why.
        """
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        with contextlib.suppress(ConnectionError):  # readline tells that it has ended
            self._process.stdin.write(json.dumps(arguments).encode() + b"\n")
            await self._process.stdin.drain()
        line = await self._process.stdout.readline()
        if not line:
            tail = self._log.read_text(errors="replace").splitlines()[-LOG_TAIL_LINES:]
            raise ClientFailed(
                f"the client ended by itself. The end of {self._log}:\n" + "\n".join(tail)
            )
        answer = json.loads(line)
        if "error" in answer:
            raise ClientFailed(f"{answer['error']} (log: {self._log})")
        return answer["result"]


@contextlib.asynccontextmanager
async def running_client(
    engine: str, log: Path, environment: dict[str, str], module: str = __name__
) -> AsyncIterator[BenchClient]:
    """Starts the process, and ends it with the block. `module` is what it runs."""
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("ab") as errors:
        process = await asyncio.create_subprocess_exec(
            *(sys.executable, "-m", module, engine),
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
            stderr=errors,
            env=os.environ | environment,
            limit=2**20,  # bytes of an answer's line
        )
    try:
        yield BenchClient(process, log)
    finally:
        with contextlib.suppress(ProcessLookupError):
            process.kill()
        await process.wait()


def main() -> None:
    """The process: arguments in, results out, a line each."""
    # Engines print to stdout: that goes to the log, where stderr goes.
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    engine = ENGINES[sys.argv[1]]
    run = engine.load_client()
    kept = {*engine.metrics.values(), "completed", "total_output_tokens"}
    for line in sys.stdin:
        try:
            result = run(json.loads(line))
            # Each error is a traceback; the end of one will do.
            errors = [error[-400:] for error in result.get("errors", []) if error][-1:]
            numbers = {k: v for k, v in result.items() if k in kept}
            answer: dict[str, Any] = {"result": numbers | {"errors": errors}}
        except (Exception, SystemExit) as e:
            answer = {"error": f"{type(e).__name__}: {e}"}
        print(json.dumps(answer), file=answers, flush=True)


if __name__ == "__main__":
    main()
