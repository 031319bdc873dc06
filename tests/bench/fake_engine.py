"""Servers, a client and answers as if there were an engine, for tests of the serving benchmark."""

from __future__ import annotations

import asyncio
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

from ep_backend.bench.serve_engine import ServedEngine, Target
from ep_backend.bench.serve_gate import NUM_PROMPT_TOKENS, NUM_PROMPTS, Probe
from ep_backend.bench.serve_vllm import METRICS
from ep_backend.bench.server import Server, ServerFailed


def values_of(command: list[str], flag: str) -> list[str]:
    """What stands between this flag and the next one."""
    rest = command[command.index(flag) + 1 :]
    return rest[: next((i for i, word in enumerate(rest) if word.startswith("--")), len(rest))]


def logprobs_of(value: float) -> Probe:
    return Probe([[value] * (NUM_PROMPT_TOKENS - 1)] * NUM_PROMPTS, [7] * NUM_PROMPTS)


class FakeEngine:
    """Servers that answer at once; `broken` ones do not start, `slow` ones do not answer. All give
    `answer` as log-probability, else ours differs a little."""

    def __init__(self, broken: str = "", slow: str = "", answer: float | None = None) -> None:
        self.broken = broken
        self.slow = slow
        self.answer = answer
        self.started: list[str] = []
        self.num_running = 0
        self.backend = ""

    @asynccontextmanager
    async def server(self, command: list[str], log: Path, **_: Any) -> Any:
        flag = "--all2all-backend"
        self.backend = values_of(command, flag)[0] if flag in command else "default"
        self.started.append(self.backend)
        if self.backend == self.broken:
            raise ServerFailed("no GPU")
        self.num_running += 1
        try:
            yield Server("http://127.0.0.1:1", log, 12.0)
        finally:
            self.num_running -= 1

    @asynccontextmanager
    async def client(self, engine: str, log: Path, environment: dict[str, str]) -> Any:
        yield self

    async def run(self, arguments: list[str]) -> dict[str, Any]:
        if self.backend == self.slow and values_of(arguments, "--random-output-len") == ["128"]:
            await asyncio.sleep(60)
        completed = int(values_of(arguments, "--num-prompts")[0])
        result: dict[str, Any] = dict.fromkeys(METRICS.values(), 2.0)
        return result | {"completed": completed, "total_output_tokens": 128 * completed}

    async def probe(self, engine: ServedEngine, target: Target) -> Probe:
        if self.answer is not None:
            return logprobs_of(self.answer)
        return logprobs_of(-9.0 if self.backend == "default" else -9.005)
