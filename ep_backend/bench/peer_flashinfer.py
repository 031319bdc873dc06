"""FlashInfer's one-sided all-to-all in the same run as ours, where its wheel is installed.

It takes the memory of all ranks as one tensor, so virtual ranks of one process can use it. Its
contract is our rank-major layout: a row a (token, rank), of bfloat16 or float8. Float8 rows are
given to it quantised, which is not timed; ours quantises in the kernel.

Its combine has a block a token, and each waits for all ranks: all blocks of all ranks must be on
the GPU at once. How large they are it reads from the environment, once a process, and where they do
not fit it traps after minutes, which would end our process, too. So it runs in others, one a block
size, after ours: same GPU, inputs, graphs and timing (peer_flashinfer_rank.py).
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any

from ep_backend.bench.op_cuda_graph import Spread
from ep_backend.bench.op_cuda_settings import Case, CudaBenchSettings

PROGRAM = (sys.executable, "-m", "ep_backend.bench.peer_flashinfer_rank")
BLOCK_SIZE_VARIABLE = "TLLM_MOE_A2A_COMBINE_BLOCK_SIZE"
DEFAULT_BLOCK_SIZE = 256
FASTEST_BLOCK_SIZE = 512
"""Where it fits, on H100s (results/NUMBERS.md)."""
SMALLER_BLOCK_SIZES = (128, 64, 32)
"""For cases in which no default one fits."""
THREADS_PER_SM = 512
"""Its combine for bfloat16 takes 104 registers a thread (0.7.2, sm_90a), of 65536 of an SM."""
# Compiling its kernels takes two minutes on a slow core.
BUILD_SECS = 1800.0
# To start, and for each case; a case takes less than a second.
START_SECS, CASE_SECS = 120.0, 10.0


@dataclass(frozen=True)
class FlashInferCase:
    num_ranks: int
    num_tokens: int
    """T of every rank."""
    dispatch_dtype: str
    combine_block_size: int
    """Threads."""


@dataclass(frozen=True)
class FlashInferRow:
    """One case's results, or why there are none."""

    case: FlashInferCase
    pair: Spread | None = None
    """A dispatch and its combine, in a chain of pairs."""
    single_pair: Spread | None = None
    cold_pair: Spread | None = None
    """Both as in `CaseTimes`."""
    relative_error: float | None = None
    """Of combine against its exact result; the worst rank's."""
    error: str | None = None

    def to_json(self) -> dict[str, Any]:
        values = asdict(self)
        return values.pop("case") | {name: v for name, v in values.items() if v is not None}

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> FlashInferRow:
        names = FlashInferCase.__dataclass_fields__
        rest = {name: v for name, v in values.items() if name not in names}
        for name in ("pair", "single_pair", "cold_pair"):
            if name in rest:
                rest[name] = Spread(**rest[name])
        return cls(FlashInferCase(**{name: values[name] for name in names}), **rest)


@dataclass(frozen=True)
class FlashInferTimes:
    version: str | None = None
    reason: str | None = None
    """Why nothing was timed."""
    rows: list[FlashInferRow] = field(default_factory=list)

    def __str__(self) -> str:
        """For a line, or for what JSON has of peers."""
        if self.version is None:
            return f"not timed: not installed: {self.reason}"
        if self.reason is not None:
            return f"{self.version}, NOT timed: {self.reason}"
        num_timed = sum(row.error is None for row in self.rows)
        return f"{self.version}, timed in {num_timed} of {len(self.rows)} cases"


def time_flashinfer(settings: CudaBenchSettings, num_sms: int) -> FlashInferTimes:
    """Builds it, checks it and times it in the rank-major cases of the settings. What goes wrong
    is told in the rows or the reason, never raised.

    Args:
        num_sms: of the GPU.
    """
    try:
        version = metadata.version("flashinfer-python")
    except metadata.PackageNotFoundError:
        return FlashInferTimes(reason="pip install flashinfer-python")
    if not settings.with_flashinfer:
        return FlashInferTimes(version, "left out")
    cases = list(flashinfer_cases(settings, num_sms))
    if not cases:
        reason = "no case is like its own, rank-major with rows that come home as bf16"
        return FlashInferTimes(version, reason)
    _, failure = _run(settings, [], DEFAULT_BLOCK_SIZE, BUILD_SECS)
    if failure is not None:
        return FlashInferTimes(version, f"it did not start: {failure}")
    rows: list[FlashInferRow] = []
    for block_size in sorted({case.combine_block_size for case in cases}):
        of_size = [case for case in cases if case.combine_block_size == block_size]
        rows += _measure(settings, of_size, block_size, num_sms)
    return FlashInferTimes(version, None, sorted(rows, key=lambda row: cases.index(row.case)))


def flashinfer_cases(settings: CudaBenchSettings, num_sms: int) -> Iterator[FlashInferCase]:
    """Those of its contract: with both usual block sizes as far as they fit, else the largest that
    does; with the smallest where none does."""
    seen = set()
    for case in settings.cases():
        key = (case.num_ranks, case.num_tokens, case.dispatch_dtype)
        if not is_comparable(case) or key in seen:
            continue
        seen.add(key)
        usual = [
            size
            for size in (FASTEST_BLOCK_SIZE, DEFAULT_BLOCK_SIZE)
            if fits(FlashInferCase(*key, size), num_sms)
        ]
        smaller = (s for s in SMALLER_BLOCK_SIZES if fits(FlashInferCase(*key, s), num_sms))
        for size in usual or [next(smaller, SMALLER_BLOCK_SIZES[-1])]:
            yield FlashInferCase(*key, size)


def is_comparable(case: Case) -> bool:
    """Whether ours does in this case what FlashInfer does."""
    return case.output_layout == "rank_major" and case.combine_dtype == "bf16"


def fits(case: FlashInferCase, num_sms: int) -> bool:
    """Whether all blocks of a combine can be on the GPU at once. One rank waits for itself alone,
    in the block that comes first."""
    num_resident = num_sms * (THREADS_PER_SM // case.combine_block_size)
    return case.num_ranks == 1 or case.num_ranks * case.num_tokens <= num_resident


def _measure(
    settings: CudaBenchSettings, cases: list[FlashInferCase], block_size: int, num_sms: int
) -> list[FlashInferRow]:
    """A row for each of `cases`, all of this block size."""
    able = [case for case in cases if fits(case, num_sms)]
    rows: list[FlashInferRow] = []
    failure = None
    if able:
        limit_secs = START_SECS + CASE_SECS * len(able)
        rows, failure = _run(settings, able, block_size, limit_secs)
    done = {row.case for row in rows}
    for case in cases:
        if case in able and case not in done:
            rows.append(FlashInferRow(case, error=failure or "its process forgot this case"))
        elif case not in able:
            num_blocks = case.num_ranks * case.num_tokens
            reason = f"its combine needs {num_blocks} blocks at once, too many for {num_sms} SMs"
            rows.append(FlashInferRow(case, error=reason))
    return rows


def _run(
    settings: CudaBenchSettings, cases: list[FlashInferCase], block_size: int, limit_secs: float
) -> tuple[list[FlashInferRow], str | None]:
    """In a process with this block size: what it has measured, and what it has died of."""
    with tempfile.TemporaryDirectory() as folder:
        output, log = Path(folder, "rows"), Path(folder, "log")
        output.touch()
        request = {
            "settings": asdict(settings),
            "cases": [asdict(case) for case in cases],
            "output": str(output),
        }
        failure = _run_process(json.dumps(request), block_size, log, limit_secs)
        rows = [FlashInferRow.from_json(json.loads(r)) for r in output.read_text().splitlines()]
        if failure is not None:
            print(log.read_text(errors="replace")[-2000:], file=sys.stderr)
    return rows, failure


def _run_process(request: str, block_size: int, log: Path, limit_secs: float) -> str | None:
    """What it has died of, if it has."""
    with (
        log.open("w") as written,
        subprocess.Popen(
            PROGRAM,
            stdin=subprocess.PIPE,
            stdout=written,
            stderr=written,
            text=True,
            env=os.environ | {BLOCK_SIZE_VARIABLE: str(block_size)},
            start_new_session=True,
        ) as process,
    ):
        try:
            process.communicate(request, timeout=limit_secs)
        except BaseException as e:
            # And its compilers.
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            if not isinstance(e, subprocess.TimeoutExpired):
                raise
            return f"not done after {limit_secs:g} s"
    if process.returncode == 0:
        return None
    lines = log.read_text(errors="replace").split("\n")
    last = next((line.strip() for line in reversed(lines) if line.strip()), "it said nothing")
    return f"exit status {process.returncode}: {last}"
