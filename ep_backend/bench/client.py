"""An async client that streams completions from an OpenAI-compatible server and times every token.

TTFT is the first token's arrival minus the request's departure; an inter-token latency is the gap
between two arrivals; TPOT is (last arrival - first arrival) / (tokens - 1) of one request: the
definitions of `vllm bench serve`.
"""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import httpx


@dataclass
class Completion:
    """One streamed answer."""

    prompt: str
    token_ids: list[int] = field(default_factory=list)
    text: str = ""
    ttft_ms: float = 0.0
    itl_ms: list[float] = field(default_factory=list)
    """Gaps between chunks; one shorter than `token_ids` where every chunk holds one token."""

    @property
    def tpot_ms(self) -> float:
        return sum(self.itl_ms) / max(len(self.token_ids) - 1, 1)


async def stream_completion(
    client: httpx.AsyncClient, model: str, prompt: str, num_tokens: int
) -> Completion:
    """Greedy decoding of exactly `num_tokens` tokens.

    Raises:
        RuntimeError: the server answered with an error, or with another number of tokens.
    """
    request = {
        "model": model,
        "prompt": prompt,
        "max_tokens": num_tokens,
        "temperature": 0.0,
        "ignore_eos": True,
        "stream": True,
        "return_token_ids": True,
    }
    completion = Completion(prompt)
    last = time.perf_counter()
    async with client.stream("POST", "/v1/completions", json=request) as response:
        if response.status_code != 200:
            body = (await response.aread()).decode(errors="replace")
            raise RuntimeError(f"the server answered {response.status_code}: {body}")
        async for line in response.aiter_lines():
            if not line.startswith("data: ") or line == "data: [DONE]":
                continue
            chunk = json.loads(line.removeprefix("data: "))
            if "error" in chunk:
                raise RuntimeError(f"the server ended the stream with an error: {chunk['error']}")
            choice = chunk["choices"][0]
            token_ids = choice.get("token_ids") or []
            if not token_ids:
                continue
            now = time.perf_counter()
            gap_ms, last = (now - last) * 1e3, now
            if completion.token_ids:
                completion.itl_ms.append(gap_ms)
            else:
                completion.ttft_ms = gap_ms
            completion.token_ids += token_ids
            completion.text += choice["text"]
    if len(completion.token_ids) != num_tokens:
        raise RuntimeError(
            f"the server sent {len(completion.token_ids)} tokens, expected {num_tokens}"
        )
    return completion


async def stream_all(
    base_url: str,
    model: str,
    prompts: Sequence[str],
    num_tokens: int,
    *,
    concurrency: int = 1,
    on_done: Callable[[], None] = lambda: None,
    timeout_secs: float = 120.0,
) -> list[Completion]:
    """Streams all prompts, `concurrency` at a time; results in the order of `prompts`."""
    slots = asyncio.Semaphore(concurrency)

    async def one(client: httpx.AsyncClient, prompt: str) -> Completion:
        async with slots:
            completion = await stream_completion(client, model, prompt, num_tokens)
        on_done()
        return completion

    # trust_env: a proxy from the environment must not come between us and this machine.
    async with httpx.AsyncClient(
        base_url=base_url, timeout=timeout_secs, trust_env=False
    ) as client:
        return await asyncio.gather(*(one(client, prompt) for prompt in prompts))


async def served_name(base_url: str, timeout_secs: float = 30.0) -> str:
    """What an OpenAI-compatible server calls its (first) model.

    Raises:
        RuntimeError: it does not tell.
    """
    url = f"{base_url}/v1/models"
    try:
        return json.loads(await fetch_text(url, timeout_secs))["data"][0]["id"]
    except (httpx.HTTPError, ValueError, LookupError, TypeError) as e:
        raise RuntimeError(f"{url} does not name a model: {type(e).__name__}: {e}") from e


async def fetch_text(url: str, timeout_secs: float = 30.0) -> str:
    """The body of a page.

    Raises:
        httpx.HTTPError: it could not be had.
    """
    async with httpx.AsyncClient(timeout=timeout_secs, trust_env=False) as client:
        return (await client.get(url)).raise_for_status().text
