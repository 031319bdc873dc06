"""Reads what ranks, or their engine, export: one look at all endpoints, as sums by label."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

import httpx

from ep_backend.handles import SENDING_OPS
from ep_backend.observe import counts

TIMEOUT_SECS = 5.0


class ScrapeFailed(RuntimeError):
    """An endpoint did not answer, or not with metrics of ep_backend."""


def endpoint_urls(endpoints: Sequence[str], num_ranks: int = 1) -> list[str]:
    """`HOST:PORT`, or a URL; with `num_ranks` also the ports behind that.

    Raises:
        ScrapeFailed: no port to count from.
    """
    urls = []
    for endpoint in endpoints:
        try:
            url = httpx.URL(endpoint if "://" in endpoint else f"http://{endpoint}")
        except httpx.InvalidURL as e:
            raise ScrapeFailed(f"{endpoint!r} is no HOST:PORT and no URL: {e}") from e
        if url.path in ("", "/"):
            url = url.copy_with(path="/metrics")
        if num_ranks > 1 and url.port is None:
            raise ScrapeFailed(f"{endpoint!r} names no port, of which --ranks needs one a rank.")
        urls += [
            str(url.copy_with(port=url.port + rank) if url.port is not None else url)
            for rank in range(num_ranks)
        ]
    return urls


@dataclass
class Look:
    """Counters of all ranks at one moment. `seconds`: since what they are differences to."""

    seconds: float
    operations: dict[int, float]
    """By rank: sends of dispatch."""
    tokens: dict[int, float]
    sent_bytes: dict[int, float]
    """To other ranks."""
    op_seconds: dict[int, float]
    forward_seconds: dict[int, float]
    wait_seconds: dict[tuple[int, int], float]
    """By (rank that waits, rank that it waits for)."""
    expert_rows: dict[int, float]
    expert_rank: dict[int, int]
    timeouts: dict[int, float]

    @property
    def ranks(self) -> list[int]:
        return sorted(self.operations)

    def since(self, before: Look, seconds: float) -> Look:
        """Differences. A rank that has started again counts from 0."""

        def difference(now: dict, then: dict) -> dict:
            return {
                key: value - then.get(key, 0.0) if value >= then.get(key, 0.0) else value
                for key, value in now.items()
            }

        return Look(
            seconds,
            difference(self.operations, before.operations),
            difference(self.tokens, before.tokens),
            difference(self.sent_bytes, before.sent_bytes),
            difference(self.op_seconds, before.op_seconds),
            difference(self.forward_seconds, before.forward_seconds),
            difference(self.wait_seconds, before.wait_seconds),
            difference(self.expert_rows, before.expert_rows),
            self.expert_rank,
            difference(self.timeouts, before.timeouts),
        )


def look(urls: Sequence[str]) -> Look:
    """Scrapes all endpoints.

    Raises:
        ScrapeFailed: names the endpoint and what to do.
    """
    texts = []
    with httpx.Client(timeout=TIMEOUT_SECS, trust_env=False) as client:
        for url in urls:
            try:
                texts.append(client.get(url).raise_for_status().text)
            except httpx.HTTPError as e:
                raise ScrapeFailed(
                    f"{url} gives no metrics: {e}. Start the ranks with EP_BACKEND_METRICS_PORT "
                    "set, or an engine with PROMETHEUS_MULTIPROC_DIR, and pass HOST:PORT."
                ) from e
    found = read(texts)
    if not found.operations:
        raise ScrapeFailed(
            f"{', '.join(urls)}: no ep_backend metrics there. Is the engine's "
            "PROMETHEUS_MULTIPROC_DIR set, and does it serve with our backend?"
        )
    return found


def read(texts: Sequence[str]) -> Look:
    """What some endpoints have said, in Prometheus's text format.

    Raises:
        ScrapeFailed: prometheus_client is not installed.
    """
    try:
        from prometheus_client.parser import text_string_to_metric_families
    except ImportError as e:
        raise ScrapeFailed(f"Reading metrics takes ep_backend[metrics]: {e}") from e

    result = Look(
        seconds=0.0,
        operations=defaultdict(float),
        tokens=defaultdict(float),
        sent_bytes=defaultdict(float),
        op_seconds=defaultdict(float),
        forward_seconds=defaultdict(float),
        wait_seconds=defaultdict(float),
        expert_rows=defaultdict(float),
        expert_rank={},
        timeouts=defaultdict(float),
    )
    by_rank = {
        f"{counts.TOKENS.name}_total": result.tokens,
        f"{counts.OP_SECONDS.name}_sum": result.op_seconds,
        f"{counts.FORWARD_SECONDS.name}_total": result.forward_seconds,
        f"{counts.TIMEOUTS.name}_total": result.timeouts,
    }
    for text in texts:
        for family in text_string_to_metric_families(text):
            if not family.name.startswith("ep_backend_"):
                continue
            for sample in family.samples:
                rank = int(sample.labels["rank"])
                if sample.name in by_rank:
                    by_rank[sample.name][rank] += sample.value
                elif sample.name == f"{counts.OPERATIONS.name}_total":
                    if sample.labels["op"] in SENDING_OPS:
                        result.operations[rank] += sample.value
                elif sample.name == f"{counts.SENT_BYTES.name}_total":
                    if sample.labels["link"] != "self":
                        result.sent_bytes[rank] += sample.value
                elif sample.name == f"{counts.WAIT_SECONDS.name}_total":
                    result.wait_seconds[rank, int(sample.labels["peer"])] += sample.value
                elif sample.name == f"{counts.EXPERT_ROWS.name}_total":
                    expert = int(sample.labels["expert"])
                    result.expert_rows[expert] += sample.value
                    result.expert_rank[expert] = rank
    return result
