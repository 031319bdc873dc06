"""All ranks' rings as one trace in the trace-event format, for ui.perfetto.dev or chrome://tracing.

Each rank is a process of the trace, each of its threads a track of slices: sends, hooks, and the
engine's spans around them. Times are microseconds from the first span on.

    rank 0  | dispatch_send |----- dispatch in flight -----| dispatch_recv |
                     \\________ flow ________
                                             \\
    rank 1      | dispatch_send |             | dispatch_recv |

*In flight* is an asynchronous slice from the end of a rank's send until its hook has waited enough:
what can overlap. Arrows (flows) go from a send to the hook of every other rank: from the send's
end, or, where that rank's hook ended first, from that moment of it.

On CUDA the slices of threads are launches: when the host called, and for how long. When kernels ran
is on the track "GPU", which "in flight" and arrows are of. Replays of a captured graph run no
Python and leave nothing.
"""

from __future__ import annotations

import itertools
import json
import os
from bisect import bisect_right
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ep_backend.observe.trace import read_trace, trace_pid

JSON_NAME = "trace.json"
MAX_SPANS = 60_000
"""Of all ranks together; the newest. The page loads them in seconds."""
GPU_TRACK = 1 << 23  # above any thread id
# What a hook is the other end of; kinds that send and receive are both ends of themselves.
SEND_OF = {"dispatch_recv": "dispatch_send", "combine_recv": "combine_send"}
EXCHANGES = ("dispatch", "combine", "normal_counts", "normal_dispatch", "normal_combine")

Event = dict[str, Any]


@dataclass(frozen=True)
class _Slice:
    """A span with its place in the trace."""

    kind: str
    pid: int
    """Of the trace: a number for each rank of each process."""
    rank: int
    track: int
    begin_ns: int
    end_ns: int
    wait_ns: int
    num_tokens: int
    buffer: int
    epoch: int
    on_gpu: bool


def write_json(directory: Path, max_spans: int = MAX_SPANS) -> Path:
    """Makes `trace.json` of the rings in `directory`; an older one is replaced.

    Raises:
        FileNotFoundError: there are none.
    """
    paths = sorted(directory.glob("*.trace"))
    if not paths:
        raise FileNotFoundError(
            f"{directory} holds no *.trace files. Start the ranks with "
            f"EP_BACKEND_TRACE={directory}."
        )
    path = directory / JSON_NAME
    temporary = path.with_suffix(f".{os.getpid()}")
    temporary.write_text(json.dumps(trace_of(paths, max_spans), separators=(",", ":")) + "\n")
    temporary.replace(path)
    return path


def trace_of(paths: Iterable[Path], max_spans: int = MAX_SPANS) -> dict[str, Any]:
    """The JSON object of some rings."""
    paths = list(paths)
    rings = [(trace_pid(path), read_trace(path)) for path in paths]
    num_kept = max(1, max_spans // max(1, len(rings)))
    num_dropped = sum(max(0, len(ring) - num_kept) for _, ring in rings)
    rings = [(pid, ring[-num_kept:]) for pid, ring in rings]
    numbers = itertools.count(1)
    slices: list[_Slice] = []
    events: list[Event] = []
    for path, (os_pid, ring) in zip(paths, rings, strict=True):
        of_ring = list(_slices_of(ring, path, numbers))
        events += _names(of_ring, os_pid)
        slices += of_ring
    if slices:
        first_ns = min(s.begin_ns for s in slices)
        events += [_complete(s, first_ns) for s in slices]
        events += _exchanges(slices, first_ns)
    return {
        "traceEvents": events,
        "displayTimeUnit": "ns",
        "otherData": {"spans left out, older": num_dropped},
    }


def _slices_of(ring: np.ndarray, path: Path, numbers: Iterator[int]) -> Iterator[_Slice]:
    """Spans of one process. Those of no operation are of the rank that has most of the others."""
    ranks = Counter(int(rank) for rank in ring["rank"][ring["epoch"] > 0])
    ((own_rank, _),) = ranks.most_common(1) or ((_rank_in_name(path), 0),)
    pids = {rank: next(numbers) for rank in sorted({own_rank, *ranks})}
    for span in ring:
        is_operation = int(span["epoch"]) > 0
        rank = int(span["rank"]) if is_operation else own_rank
        on_gpu = bool(span["on_gpu"])
        begin_ns = int(span["begin_ns"])
        yield _Slice(
            kind=span["kind"].decode(),
            pid=pids[rank],
            rank=rank,
            track=GPU_TRACK if on_gpu else int(span["thread"]),
            begin_ns=begin_ns,
            end_ns=begin_ns + int(span["duration_ns"]),
            wait_ns=int(span["wait_ns"]),
            num_tokens=int(span["num_tokens"]),
            buffer=int(span["buffer"]),
            epoch=int(span["epoch"]),
            on_gpu=on_gpu,
        )


def _rank_in_name(path: Path) -> int:
    digits = path.name.split("-")[0].removeprefix("rank")
    return int(digits) if digits.isdigit() else 0


def _names(slices: list[_Slice], os_pid: int) -> Iterator[Event]:
    """Metadata: what processes and tracks are called, and their order."""
    for pid, rank in sorted({(s.pid, s.rank) for s in slices}):
        common = {"ph": "M", "pid": pid, "tid": 0, "ts": 0}
        yield {**common, "name": "process_name", "args": {"name": f"rank {rank}, pid {os_pid}"}}
        yield {**common, "name": "process_sort_index", "args": {"sort_index": rank}}
    for pid, track in sorted({(s.pid, s.track) for s in slices}):
        name = "GPU" if track == GPU_TRACK else f"thread {track}"
        args = {"name": name}
        yield {"ph": "M", "pid": pid, "tid": track, "ts": 0, "name": "thread_name", "args": args}


def _complete(s: _Slice, first_ns: int) -> Event:
    args: dict[str, Any] = {"tokens": s.num_tokens}
    if s.epoch > 0:
        args |= {"buffer": s.buffer, "epoch": s.epoch, "wait_us": s.wait_ns / 1e3}
    return {
        "ph": "X",
        "name": s.kind,
        "cat": "engine" if s.epoch == 0 else "kernel" if s.on_gpu else "operation",
        "pid": s.pid,
        "tid": s.track,
        "ts": (s.begin_ns - first_ns) / 1e3,
        "dur": (s.end_ns - s.begin_ns) / 1e3,
        "args": args,
    }


def _exchanges(slices: list[_Slice], first_ns: int) -> Iterator[Event]:
    """What connects slices: flight, and arrows between ranks."""
    # Ranks whose kernels have stamps: their launches have no ends of exchanges.
    with_gpu = {s.pid for s in slices if s.on_gpu}
    ends = [s for s in slices if s.epoch > 0 and (s.on_gpu or s.pid not in with_gpu)]
    sends: dict[tuple[str, int, int, int], list[_Slice]] = defaultdict(list)
    for s in ends:
        sends[s.kind, s.buffer, s.epoch, s.rank].append(s)
    for of_operation in sends.values():  # more than one: the service was started again
        of_operation.sort(key=lambda s: s.begin_ns)
    ranks = sorted({s.rank for s in ends})
    num_arrows = 0
    for hook in ends:
        is_whole = hook.kind in EXCHANGES
        kind = hook.kind if is_whole else SEND_OF.get(hook.kind)
        if kind is None:
            continue  # a send
        for rank in ranks:
            send = _latest(sends.get((kind, hook.buffer, hook.epoch, rank), []), hook.end_ns)
            if send is None:
                continue  # its ring is not here, or has been overwritten
            if rank != hook.rank:
                num_arrows += 1
                yield from _arrow(send, hook, num_arrows, first_ns)
            elif not is_whole and send.pid == hook.pid:
                yield from _flight(send, hook, first_ns)


def _latest(sends: list[_Slice], before_ns: int) -> _Slice | None:
    place = bisect_right([s.begin_ns for s in sends], before_ns)
    return sends[place - 1] if place > 0 else None


def _flight(send: _Slice, hook: _Slice, first_ns: int) -> Iterator[Event]:
    name = f"{send.kind.split('_')[0]} in flight"
    common = {"cat": "flight", "name": name, "pid": send.pid, "tid": send.track}
    common |= {"id": f"{send.pid}.{send.buffer}.{send.kind}.{send.epoch}"}
    end_ns = max(send.end_ns, min(hook.begin_ns + hook.wait_ns, hook.end_ns))
    yield {**common, "ph": "b", "ts": (send.end_ns - first_ns) / 1e3, "args": {"epoch": send.epoch}}
    yield {**common, "ph": "e", "ts": (end_ns - first_ns) / 1e3}


def _arrow(send: _Slice, hook: _Slice, number: int, first_ns: int) -> Iterator[Event]:
    """Both ends lie inside their slices, where viewers look for them."""
    end_ns = max(hook.begin_ns, hook.end_ns - 1)
    begin_ns = max(send.begin_ns, min(send.end_ns - 1, end_ns))
    if begin_ns > end_ns:
        return  # clocks of two GPUs, aligned to some tens of microseconds
    common = {"cat": "exchange", "name": hook.kind.split("_recv")[0], "id": number}
    for ph, s, ns in (("s", send, begin_ns), ("f", hook, end_ns)):
        event = {**common, "ph": ph, "pid": s.pid, "tid": s.track, "ts": (ns - first_ns) / 1e3}
        yield event | ({"bp": "e"} if ph == "f" else {})
