"""`ep-backend bench op`: how long a dispatch and its combine take, beside gloo and beside memcpy.

A pair is dispatch, hook, combine, hook, or the normal kernels' dispatch and combine; the experts
between them do nothing. R processes run it, and two ways over torch.distributed (op_gloo.py,
op_normal_gloo.py) with the same contract, in turns, after all have been checked. A pair's time is
that of its slowest rank; p50 and p95 are over pairs.

The roofline is what plain memcpy needs, on all ranks at once, to move as many bytes. What counts as
moved (`count_bytes` of op_rank.py and op_normal_rank.py): every row read or written once. With T
tokens, m_out messages sent, m_in messages received and n rows for the local experts, a rank moves
2 * (T + m_out + m_in + n) rows: dispatch reads x and writes messages, reads messages and writes
expert rows; combine reads expert rows and writes partial rows, reads partial rows and writes the
result. Of the normal kernels, n is m_in. A memcpy of half as
many bytes moves as many. The table gives the busiest rank's.
"""

from __future__ import annotations

import json
import os
import statistics
from dataclasses import asdict, dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import Annotated, Any

import rich.box
import rich.console
import torch
import typer
from rich.table import Table

from ep_backend.bench.op_measure import BenchSettings, RankReport
from ep_backend.bench.op_normal_rank import NormalBenchSettings, bench_normal_rank
from ep_backend.bench.op_processes import RankFailed, RankMain, run_ranks
from ep_backend.bench.op_rank import OpBenchSettings, bench_rank
from ep_backend.bench.provenance import command, commit, installed_versions, this_machine
from ep_backend.tuning import untuned_unless_asked

RANK_MAINS: dict[str, RankMain] = {
    OpBenchSettings.kind: bench_rank,
    NormalBenchSettings.kind: bench_normal_rank,
}
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


@dataclass(frozen=True)
class Timing:
    """Of the slowest rank of each pair, microseconds."""

    p50_us: float
    p95_us: float
    min_us: float

    @classmethod
    def of_ranks(cls, times_us: list[list[float]]) -> Timing:
        """From `[R][pairs]`."""
        slowest = sorted(map(max, zip(*times_us, strict=True)))
        p95 = slowest[min(len(slowest) - 1, int(0.95 * len(slowest)))]
        return cls(statistics.median(slowest), p95, slowest[0])


@dataclass(frozen=True)
class OpBenchCase:
    """The result for one number of tokens."""

    num_ranks: int
    num_tokens: int
    num_bytes: int
    """Moved by the busiest rank in a pair."""
    ours: Timing
    gloo_all_to_all: Timing
    gloo_all_gather: Timing
    memcpy_us: float
    """To move `num_bytes` at the same time on all ranks: slowest rank, median of the rounds."""

    @classmethod
    def of_reports(cls, reports: list[RankReport]) -> OpBenchCase:
        """From every rank's report of the case."""

        def timing(way: str) -> Timing:
            return Timing.of_ranks([report.pair_us[way] for report in reports])

        return cls(
            num_ranks=len(reports),
            num_tokens=reports[0].num_tokens,
            num_bytes=max(report.num_bytes for report in reports),
            ours=timing("ours"),
            gloo_all_to_all=timing("gloo_all_to_all"),
            gloo_all_gather=timing("gloo_all_gather"),
            memcpy_us=statistics.median(
                map(max, zip(*(report.memcpy_us for report in reports), strict=True))
            ),
        )

    @property
    def speedup(self) -> float:
        """Time of the better gloo way over ours."""
        return min(self.gloo_all_to_all.p50_us, self.gloo_all_gather.p50_us) / self.ours.p50_us

    @property
    def roofline_fraction(self) -> float:
        """Time of memcpy over ours."""
        return self.memcpy_us / self.ours.p50_us

    @property
    def gbs(self) -> float:
        """GB/s of the busiest rank."""
        return self.num_bytes / self.ours.p50_us / 1e3

    @property
    def memcpy_gbs(self) -> float:
        return self.num_bytes / self.memcpy_us / 1e3

    def to_json(self) -> dict[str, Any]:
        return asdict(self) | {
            "speedup": self.speedup,
            "roofline_fraction": self.roofline_fraction,
            "gbs": self.gbs,
            "memcpy_gbs": self.memcpy_gbs,
        }


def run_op_bench(
    settings: BenchSettings, json_path: Path | None, console: rich.console.Console
) -> list[OpBenchCase]:
    """Runs the benchmark, prints its table, and writes everything to `json_path`.

    Raises:
        RankFailed: a way gave a wrong result, or a rank failed; nothing is printed or written.
    """
    untuned_unless_asked()
    cases: list[OpBenchCase] = []
    begin = datetime.now(timezone.utc)
    load_before = os.getloadavg()
    with console.status("checking every way against the reference") as status:

        def on_reports(reports: list[RankReport]) -> None:
            cases.append(OpBenchCase.of_reports(reports))
            status.update(f"measured {len(cases)} of {len(settings.num_tokens)} cases")

        run_ranks(RANK_MAINS[settings.kind], settings.num_ranks, settings, on_reports)
    machine = this_machine() | {"load_average_before": load_before[0]}
    console.print(_table(settings, machine, cases))
    if json_path is not None:
        document = {
            "bench": "op",
            "kind": settings.kind,
            "date": begin.isoformat(timespec="seconds"),
            "commit": commit(),
            "command": command(),
            "machine": machine,
            "versions": installed_versions(),
            "settings": asdict(settings) | {"dtype": str(settings.dtype).removeprefix("torch.")},
            "cases": [case.to_json() for case in cases],
        }
        json_path.parent.mkdir(parents=True, exist_ok=True)
        json_path.write_text(json.dumps(document, indent=2) + "\n")
    return cases


def _table(settings: BenchSettings, machine: dict[str, Any], cases: list[OpBenchCase]) -> Table:
    versions = installed_versions()
    table = Table(
        title=f"{settings.kind} dispatch + combine, {settings.num_ranks} ranks | "
        f"hidden {settings.hidden}, {settings.num_experts} experts, top-{settings.top_k}, "
        f"{str(settings.dtype).removeprefix('torch.')} | {machine['cpu']}, {machine['num_cpus']} "
        f"CPUs, load {machine['load_average_before']:.1f} | ep_backend {versions['ep_backend']}, "
        f"torch {versions['torch']}",
        caption=f"Times are of the slowest rank, over {settings.num_iterations} pairs. GB/s = each "
        "row read or written once on the busiest rank: x, messages (written, read), rows for "
        "experts (written, read), rows home (written, read), result. memcpy moves as many, on "
        "all ranks at once. x gloo = the better gloo way / ours.",
        box=rich.box.SIMPLE_HEAD,
        pad_edge=False,
        padding=(0, 1, 0, 0),
    )
    for column in (
        "tokens",
        "ours us\np50",
        "\np95",
        "gloo\nto-all us",
        "gloo\ngather us",
        "\nx gloo",
        "memcpy\nus",
        "memcpy\n/ ours",
        "\nGB/s",
    ):
        table.add_column(column, justify="right", no_wrap=True)
    for case in cases:
        table.add_row(
            str(case.num_tokens),
            _microseconds(case.ours.p50_us),
            _microseconds(case.ours.p95_us),
            _microseconds(case.gloo_all_to_all.p50_us),
            _microseconds(case.gloo_all_gather.p50_us),
            f"{case.speedup:.1f}",
            _microseconds(case.memcpy_us),
            f"{case.roofline_fraction:.2f}",
            f"{case.gbs:.1f}",
        )
    return table


def _microseconds(us: float) -> str:
    return f"{us:.1f}" if us < 100 else f"{us:.0f}"


def op(
    ranks: Annotated[int, typer.Option(help="Processes on this machine.")] = 2,
    tokens: Annotated[
        list[str] | None,
        typer.Option(
            help="Tokens a rank; a comma-separated list, may be repeated. [default: 1,16,64,512]"
        ),
    ] = None,
    hidden: Annotated[int, typer.Option(help="Elements of a row.")] = 2048,
    experts: Annotated[int, typer.Option(help="Experts of all ranks together.")] = 64,
    top_k: Annotated[int, typer.Option(help="Experts of a token.")] = 8,
    dtype: Annotated[str, typer.Option(help=" or ".join(DTYPES) + ".")] = "float32",
    num_max_tokens: Annotated[
        int | None,
        typer.Option(help="num_max_tokens_per_rank of the buffers. [default: most of --tokens]"),
    ] = None,
    iterations: Annotated[int, typer.Option(help="Pairs timed for each way and case.")] = 100,
    warmup: Annotated[int, typer.Option(help="Pairs run before, not timed.")] = 10,
    seed: Annotated[int, typer.Option(help="Of the inputs.")] = 0,
    json_path: Annotated[
        Path | None, typer.Option("--json", "--output", help="Write all results there.")
    ] = None,
) -> None:
    """Time of dispatch + combine, beside gloo and memcpy in the same processes.

    With `--kind normal`: of the normal kernels; `--kind normal --help` lists its options. With
    `--device cuda`: between virtual ranks on a GPU; `--device cuda --help` lists those.
    """
    try:
        num_tokens = _parse_tokens(tokens or ["1,16,64,512"])
        settings = OpBenchSettings(
            num_ranks=ranks,
            num_tokens=num_tokens,
            num_max_tokens_per_rank=max(num_tokens) if num_max_tokens is None else num_max_tokens,
            hidden=hidden,
            num_experts=experts,
            top_k=top_k,
            dtype=_parse_dtype(dtype),
            num_iterations=iterations,
            num_warmup=warmup,
            seed=seed,
        )
    except ValueError as e:
        raise typer.BadParameter(str(e)) from e
    _run(settings, json_path)


def op_normal(
    ranks: Annotated[int, typer.Option(help="Processes on this machine.")] = 2,
    tokens: Annotated[
        list[str] | None,
        typer.Option(
            help="Tokens a rank; a comma-separated list, may be repeated. [default: 512,2048,4096]"
        ),
    ] = None,
    hidden: Annotated[int, typer.Option(help="Elements of a row.")] = 2048,
    experts: Annotated[int, typer.Option(help="Experts of all ranks together.")] = 64,
    top_k: Annotated[int, typer.Option(help="Experts of a token.")] = 8,
    dtype: Annotated[str, typer.Option(help=" or ".join(DTYPES) + ".")] = "bfloat16",
    num_bytes: Annotated[int, typer.Option(help="Symmetric memory of a rank.")] = 64 << 20,
    iterations: Annotated[int, typer.Option(help="Pairs timed for each way and case.")] = 30,
    warmup: Annotated[int, typer.Option(help="Pairs run before, not timed.")] = 3,
    seed: Annotated[int, typer.Option(help="Of the inputs.")] = 0,
    json_path: Annotated[
        Path | None, typer.Option("--json", "--output", help="Write all results there.")
    ] = None,
) -> None:
    """Time of normal dispatch + combine, beside gloo and memcpy in the same processes."""
    try:
        settings = NormalBenchSettings(
            num_ranks=ranks,
            num_tokens=_parse_tokens(tokens or ["512,2048,4096"]),
            hidden=hidden,
            num_experts=experts,
            top_k=top_k,
            dtype=_parse_dtype(dtype),
            num_bytes=num_bytes,
            num_iterations=iterations,
            num_warmup=warmup,
            seed=seed,
        )
    except ValueError as e:
        raise typer.BadParameter(str(e)) from e
    _run(settings, json_path)


def _run(settings: BenchSettings, json_path: Path | None) -> None:
    console = rich.console.Console()
    try:
        run_op_bench(settings, json_path, console)
    except RankFailed as e:
        console.print(f"bench op failed: {e}", style="red", markup=False)
        raise typer.Exit(1) from e


def _parse_dtype(name: str) -> torch.dtype:
    if name not in DTYPES:
        raise ValueError(f"dtype is {name!r}, expected {' or '.join(DTYPES)}")
    return DTYPES[name]


def _parse_tokens(lists: list[str]) -> tuple[int, ...]:
    try:
        return tuple(int(number) for text in lists for number in text.split(","))
    except ValueError:
        raise ValueError(
            f"tokens is {','.join(lists)!r}, expected numbers such as 1,16,64"
        ) from None
