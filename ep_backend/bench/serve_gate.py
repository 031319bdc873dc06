"""Whether backends compute the same: log-probabilities of the tokens of fixed prompts.

Greedy tokens are no measure in bfloat16: the same server gives others when it batches otherwise.
They are counted, not required.
"""

from __future__ import annotations

import asyncio
import json
import random
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx

from ep_backend.bench.serve_engine import ServedEngine, Target

NUM_PROMPTS = 16
NUM_PROMPT_TOKENS = 100
# Between two exact exchanges in bfloat16 on 24 layers, two H100s against one gave 0.0094 and 0.055.
MEAN_LIMIT = 0.01
MAX_LIMIT = 0.06
TIMEOUT_SECS = 120.0


@dataclass(frozen=True)
class Probe:
    """What a server said to the fixed prompts."""

    logprobs: list[list[float]]
    """`[prompts][tokens - 1]`: of every token of a prompt after its first."""
    first_tokens: list[int]
    """The first greedy token of every prompt."""


@dataclass(frozen=True)
class Difference:
    """Between two probes."""

    mean: float
    max: float
    num_logprobs: int
    num_first_tokens_equal: int

    @property
    def is_good(self) -> bool:
        return self.mean <= MEAN_LIMIT and self.max <= MAX_LIMIT

    def as_json(self) -> dict[str, Any]:
        return {
            "mean": self.mean,
            "max": self.max,
            "num_logprobs": self.num_logprobs,
            "num_first_tokens_equal": self.num_first_tokens_equal,
        }


def fixed_prompts(vocab_size: int) -> list[list[int]]:
    """Token ids, the same in every run. The last id ends a text and is left out."""
    generator = random.Random(0)
    return [
        [generator.randrange(vocab_size - 1) for _ in range(NUM_PROMPT_TOKENS)]
        for _ in range(NUM_PROMPTS)
    ]


def vocab_size_of(model: Path) -> int:
    config = json.loads((model / "config.json").read_text())
    if "vocab_size" not in config:
        raise RuntimeError(f"{model / 'config.json'} has no vocab_size, of which prompts are drawn")
    return config["vocab_size"]


async def probe(engine: ServedEngine, target: Target) -> Probe:
    """Asks all prompts at once.

    Raises:
        RuntimeError: the server answered with an error, or without log-probabilities; or the model
            does not say how many tokens it knows.
    """
    prompts = fixed_prompts(vocab_size_of(target.model))
    async with httpx.AsyncClient(
        base_url=target.base_url, timeout=TIMEOUT_SECS, trust_env=False
    ) as client:
        answers = await asyncio.gather(*(_ask(client, engine, target, p) for p in prompts))
    return Probe([logprobs for logprobs, _ in answers], [token for _, token in answers])


async def _ask(
    client: httpx.AsyncClient, engine: ServedEngine, target: Target, prompt: list[int]
) -> tuple[list[float], int]:
    path, request = engine.question(target, prompt)
    try:
        response = await client.post(path, json=request)
    except httpx.HTTPError as e:
        raise RuntimeError(f"no answer to a fixed prompt: {type(e).__name__}: {e}") from e
    if response.status_code != 200:
        raise RuntimeError(f"the server answered {response.status_code}: {response.text}")
    return engine.read_answer(response.json(), prompt)


def compare(reference: Probe, other: Probe) -> Difference:
    """Mean and largest absolute difference. A NaN makes both NaN, which is not good."""
    differences = [
        abs(a - b)
        for ours, theirs in zip(reference.logprobs, other.logprobs, strict=True)
        for a, b in zip(ours, theirs, strict=True)
    ]
    has_nan = any(d != d for d in differences)
    return Difference(
        mean=sum(differences) / len(differences),
        max=float("nan") if has_nan else max(differences),
        num_logprobs=len(differences),
        num_first_tokens_equal=sum(
            a == b for a, b in zip(reference.first_tokens, other.first_tokens, strict=True)
        ),
    )
