"""Where a served step's time goes on a GPU, kernel by kernel: the engine's own switch for PyTorch's
profiler, pressed while requests are in flight, and what its traces say."""

from __future__ import annotations

import asyncio
import gzip
import json
import re
import statistics
import zlib
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import httpx

SETTLE_SECS = 1.0
"""After the first request is sent: prefills have passed, all decode."""
PROFILED_SECS = 0.3
STOP_TIMEOUT_SECS = 120.0
"""Workers write their traces before they answer."""
# The first that matches a kernel's name decides. Ours in two halves, where a hook separates them.
KINDS = {
    "dispatch": r"ep::cuda::.*(dispatch|dispatch_layout|unpack)_kernel|AllGather",
    # SGLang reduces to one rank after the other.
    "combine": r"ep::cuda::.*combine_kernel|ReduceScatter|ncclDevKernel_Reduce_",
    "other collectives": r"nccl",
    "experts": r"moe|topk|router|(act|silu)_and_mul|group.*gemm|deep_gemm|_ep_(scatter|gather)",
    "attention": r"_fwd_(grouped_)?kernel|flash|fmha|attention|attn|reshape_and_cache|rotary|rope",
}
OTHER, IDLE = "other", "idle"
HEADS = (
    *("in flight", "backend", "rank", "layers", "dispatch us", "shortest", "combine us"),
    *("shortest", *(f"{kind} %" for kind in (*KINDS, OTHER, IDLE))),
)
CAPTION = (
    "Of the kernels while requests decode: a dispatch and a combine of one layer, median and the "
    "shortest tenth (the rest waits for the other rank), and shares of the time profiled. layers: "
    "how many were seen, of all steps."
)


async def record(
    base_url: str, trace_dir: Path, request: dict[str, Any] | None = None
) -> list[Path]:
    """Has the server record a moment; returns the new traces, one a worker.

    Args:
        request: what it is told, where it was not told at its start.

    Raises:
        RuntimeError: it did not.
    """
    before = set(_traces(trace_dir))
    await asyncio.sleep(SETTLE_SECS)
    async with httpx.AsyncClient(
        base_url=base_url, timeout=STOP_TIMEOUT_SECS, trust_env=False
    ) as client:
        for path, body, secs in (
            ("/start_profile", request, PROFILED_SECS),
            ("/stop_profile", None, 0.0),
        ):
            answer = await client.post(path, json=body)
            if answer.status_code != 200:
                raise RuntimeError(f"{path} answered {answer.status_code}: {answer.text[:200]}")
            await asyncio.sleep(secs)
    traces = sorted(set(_traces(trace_dir)) - before)
    if not traces:
        raise RuntimeError(f"the server has left no trace in {trace_dir}")
    return traces


def _traces(trace_dir: Path) -> Iterator[Path]:
    # The front end's own, without GPU events, are not of a rank.
    return (p for p in trace_dir.rglob("*.trace.json*") if "async_llm" not in p.name)


@dataclass(frozen=True)
class Kernel:
    name: str
    begin_us: float
    duration_us: float

    @property
    def kind(self) -> str:
        return next((k for k, pattern in KINDS.items() if re.search(pattern, self.name)), OTHER)


@dataclass(frozen=True)
class RankProfile:
    """One rank's kernels, microseconds."""

    num_layers: int
    """Exchanges seen, over all steps."""
    dispatch_us: float
    dispatch_shortest_us: float
    """Of the shortest tenth: those that did not wait."""
    combine_us: float
    combine_shortest_us: float
    shares: dict[str, float]
    """Of the time from the first kernel to the last, by kind; they may overlap."""
    kernels: dict[str, tuple[int, float]]
    """Times and microseconds in all of the names that took longest."""

    @classmethod
    def of(cls, kernels: list[Kernel]) -> RankProfile:
        """
        Raises:
            RuntimeError: there was no exchange among them.
        """
        by_kind: dict[str, list[float]] = {kind: [] for kind in (*KINDS, OTHER)}
        by_name: dict[str, list[float]] = {}
        for kernel in kernels:
            by_kind[kernel.kind].append(kernel.duration_us)
            by_name.setdefault(kernel.name[:120], []).append(kernel.duration_us)
        if not (by_kind["dispatch"] and by_kind["combine"]):
            names = ", ".join(sorted(by_name)[:8]) or "none"
            raise RuntimeError(f"no dispatch and combine among the profiled kernels ({names})")
        begin = min(kernel.begin_us for kernel in kernels)
        span = max(kernel.begin_us + kernel.duration_us for kernel in kernels) - begin
        shares = {kind: round(sum(us) / span, 4) for kind, us in by_kind.items()}
        shares[IDLE] = round(1 - _busy_us(kernels) / span, 4)
        num_layers = _num_exchanges(kernels, "combine")
        longest = sorted(by_name.items(), key=lambda item: -sum(item[1]))[:20]
        return cls(
            num_layers,
            *_of_exchange(kernels, "dispatch"),
            *_of_exchange(kernels, "combine"),
            shares,
            {name: (len(us), round(sum(us), 1)) for name, us in longest},
        )


def _of_exchange(kernels: list[Kernel], kind: str) -> tuple[float, float]:
    """Median and shortest tenth of one exchange. Where it is several kernels (send and hook; two
    gathers), theirs add up, kernel by kernel."""
    by_name: dict[str, list[float]] = {}
    for kernel in kernels:
        if kernel.kind == kind:
            by_name.setdefault(kernel.name, []).append(kernel.duration_us)
    num_exchanges = _num_exchanges(kernels, kind)
    median = shortest = 0.0
    for durations in by_name.values():
        weight = len(durations) / num_exchanges
        durations.sort()
        median += weight * statistics.median(durations)
        shortest += weight * durations[len(durations) // 10]
    return round(median, 2), round(shortest, 2)


def _num_exchanges(kernels: list[Kernel], kind: str) -> int:
    """Of ours, how often the half that receives ran."""
    names = [kernel.name for kernel in kernels if kernel.kind == kind]
    # The last template argument says whether the kernel receives.
    received = [name for name in names if re.search(r"ep::cuda::.*(true|\(bool\)1)>\(", name)]
    # Others gather several tensors, but scatter one.
    return len(received) or sum(kernel.kind == "combine" for kernel in kernels)


def _busy_us(kernels: list[Kernel]) -> float:
    """Time in which some kernel ran."""
    busy, end = 0.0, -1.0
    for kernel in sorted(kernels, key=lambda k: k.begin_us):
        kernel_end = kernel.begin_us + kernel.duration_us
        busy += max(0.0, kernel_end - max(kernel.begin_us, end))
        end = max(end, kernel_end)
    return busy


def read_kernels(trace: Path) -> list[Kernel]:
    """Of a trace of PyTorch's profiler.

    Raises:
        RuntimeError: it is none, or not whole.
    """
    try:
        raw = trace.read_bytes()
        events = json.loads(gzip.decompress(raw) if trace.suffix == ".gz" else raw)["traceEvents"]
    except (OSError, EOFError, ValueError, KeyError, zlib.error) as e:
        raise RuntimeError(f"{trace} cannot be read: {type(e).__name__}: {e}") from e
    return [
        Kernel(event["name"], float(event["ts"]), float(event["dur"]))
        for event in events
        if event.get("cat") == "kernel"
    ]


def profile_of(traces: list[Path]) -> list[dict[str, Any]]:
    """A `RankProfile` for each trace, as JSON.

    Raises:
        RuntimeError: a trace has no exchange, or cannot be read.
    """
    return [asdict(RankProfile.of(read_kernels(trace))) for trace in traces]


def table_cells(profiles: list[dict[str, Any]]) -> list[list[str]]:
    """Rows under `HEADS`."""
    return [
        [
            *(str(profile["concurrency"]), profile["backend"], str(rank), str(row["num_layers"])),
            *(f"{row[key]:.1f}" for key in ("dispatch_us", "dispatch_shortest_us")),
            *(f"{row[key]:.1f}" for key in ("combine_us", "combine_shortest_us")),
            *(f"{100 * row['shares'][kind]:.1f}" for kind in (*KINDS, OTHER, IDLE)),
        ]
        for profile in profiles
        for rank, row in enumerate(profile.get("ranks", []))
    ]
