"""The streaming client against a small server with known delays and mistakes."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest

from ep_backend.bench.client import stream_all

NUM_TOKENS = 4


@asynccontextmanager
async def server(chunks: list[str], status: str = "200 OK", pause: float = 0.0) -> AsyncIterator:
    """Answers every request with these server-sent events, `pause` seconds apart."""
    num_open, most_open = 0, 0

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        nonlocal num_open, most_open
        num_open += 1
        most_open = max(most_open, num_open)
        head = await reader.readuntil(b"\r\n\r\n")
        length = next(
            int(line.split(b":")[1])
            for line in head.split(b"\r\n")
            if line.lower().startswith(b"content-length")
        )
        request = json.loads(await reader.readexactly(length))
        assert request["temperature"] == 0.0
        assert request["max_tokens"] == NUM_TOKENS
        writer.write(f"HTTP/1.1 {status}\r\nConnection: close\r\n\r\n".encode())
        for chunk in chunks:
            await asyncio.sleep(pause)
            writer.write(f"data: {chunk}\n\n".encode())
            await writer.drain()
        num_open -= 1
        writer.close()

    listening = await asyncio.start_server(answer, "127.0.0.1", 0)
    port = listening.sockets[0].getsockname()[1]
    async with listening:
        yield f"http://127.0.0.1:{port}", lambda: most_open


def tokens(*ids: int) -> str:
    return json.dumps({"choices": [{"text": "x" * len(ids), "token_ids": list(ids)}]})


async def test_tokens_and_gaps_are_counted() -> None:
    chunks = [tokens(1), tokens(2, 3), tokens(4), "[DONE]"]
    async with server(chunks, pause=0.05) as (url, _):
        (completion,) = await stream_all(url, "m", ["p"], NUM_TOKENS)
    assert completion.token_ids == [1, 2, 3, 4]
    assert completion.text == "xxxx"
    assert completion.ttft_ms >= 50
    assert len(completion.itl_ms) == 2
    assert min(completion.itl_ms) >= 40
    assert completion.tpot_ms == pytest.approx(sum(completion.itl_ms) / 3)


async def test_concurrency_is_kept_and_order_is_that_of_the_prompts() -> None:
    async with server([tokens(1, 2, 3, 4)], pause=0.05) as (url, most_open):
        prompts = [str(i) for i in range(6)]
        completions = await stream_all(url, "m", prompts, NUM_TOKENS, concurrency=3)
    assert [c.prompt for c in completions] == prompts
    assert most_open() == 3


@pytest.mark.parametrize(
    ("chunks", "status", "expected"),
    [
        ([tokens(1, 2)], "200 OK", "sent 2 tokens, expected 4"),
        ([tokens(1), '{"error": "engine died"}'], "200 OK", "engine died"),
        ([], "503 Service Unavailable", "answered 503"),
    ],
)
async def test_a_failing_server_is_an_error(chunks: list[str], status: str, expected: str) -> None:
    async with server(chunks, status) as (url, _):
        with pytest.raises(RuntimeError, match=expected):
            await stream_all(url, "m", ["p"], NUM_TOKENS)
