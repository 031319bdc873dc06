"""`ep-backend bench op --kind normal --device cuda`: prefill's dispatch and combine between virtual
ranks on one GPU, beside what as many SMs can do at best.

Every rank has a branch of one CUDA graph, with a chain of operations. GB/s count what an operation
must read and write: dispatch every token once and every row that it brings, combine the other way.
A dispatch writes several rows for each that it reads, and loads and stores of an SM have a limit
each: so it is also measured against SMs that do nothing but store.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch

from ep_backend import EPBackendError, _native
from ep_backend.bench.op_cuda import give_memory_back
from ep_backend.bench.op_cuda_normal_case import (
    GEMM_SIZE,
    GemmBeside,
    NormalCase,
    NormalSizes,
    NormalTimes,
    Yardstick,
    gemm_beside,
    measure,
    yardstick,
)
from ep_backend.bench.op_cuda_report import driver_and_versions, machine, print_table, reason
from ep_backend.bench.op_cuda_settings import TRAVELLING_DTYPES
from ep_backend.bench.options import numbers, option_adder, without_output, words
from ep_backend.tuning import untuned_unless_asked

PROGRAM = "ep-backend bench op --kind normal --device cuda"
CAPTION = (
    "All ranks at once. GB/s: read plus written; copy: as a fraction of what a copy on as many SMs "
    "reads and writes; written: of what they write if they do nothing else."
)


@dataclass(frozen=True)
class NormalBenchSettings:
    """What is swept, and what all cases share."""

    num_ranks: tuple[int, ...] = (8,)
    num_tokens: tuple[int, ...] = (4096, 8192)
    dispatch_dtypes: tuple[str, ...] = tuple(TRAVELLING_DTYPES)
    num_sms: tuple[int, ...] = (8, 16, 24)
    """Of all ranks together."""
    hidden: int = 7168
    num_experts: int = 256
    top_k: int = 8
    chain: int = 4
    """Operations of a graph."""
    num_repeats: int = 10
    """Replays timed."""
    seed: int = 0
    with_gemm: bool = True

    def __post_init__(self) -> None:
        for name in ("num_ranks", "num_tokens", "num_sms"):
            if not getattr(self, name) or min(getattr(self, name)) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}, expected positive numbers")
        for dtype in self.dispatch_dtypes:
            if dtype not in TRAVELLING_DTYPES:
                raise ValueError(f"dispatch dtype is {dtype!r}, expected bf16 or fp8")
        for num_ranks in self.num_ranks:
            if self.num_experts % num_ranks != 0:
                raise ValueError(
                    f"{self.num_experts} experts cannot be shared evenly by {num_ranks} ranks"
                )
            for num_sms in self.num_sms:
                if num_sms % num_ranks != 0:
                    raise ValueError(f"{num_sms} SMs cannot be shared evenly by {num_ranks} ranks")
        if not 1 <= self.top_k <= min(8, self.num_experts):
            raise ValueError(f"top_k is {self.top_k}, expected 1..8, and no more than experts")

    def cases(self) -> list[NormalCase]:
        return [
            NormalCase(num_ranks, num_tokens, dtype, num_sms)
            for num_ranks in self.num_ranks
            for num_tokens in self.num_tokens
            for dtype in self.dispatch_dtypes
            for num_sms in self.num_sms
        ]

    def sizes(self) -> NormalSizes:
        return NormalSizes(
            self.hidden, self.num_experts, self.top_k, self.chain, self.num_repeats, self.seed
        )


@dataclass(frozen=True)
class NormalRow:
    """One case's results, or why there are none."""

    case: NormalCase
    yardstick: Yardstick
    times: NormalTimes | None
    error: str | None = None

    @property
    def dispatch_fraction(self) -> float:
        assert self.times is not None
        return self.times.dispatch_gbs / self.yardstick.copy_gbs

    @property
    def written_fraction(self) -> float:
        """Of dispatch: written GB/s by those of a fill."""
        assert self.times is not None
        return self.times.written_gbs / self.yardstick.fill_gbs

    @property
    def combine_fraction(self) -> float:
        assert self.times is not None
        return self.times.combine_gbs / self.yardstick.copy_gbs

    def to_json(self) -> dict[str, Any]:
        if self.times is None:
            return asdict(self.case) | {"error": self.error}
        return (
            asdict(self.case)
            | asdict(self.times)
            | {
                "dispatch_gbs": self.times.dispatch_gbs,
                "dispatch_copy_fraction": self.dispatch_fraction,
                "dispatch_written_fraction": self.written_fraction,
                "combine_gbs": self.times.combine_gbs,
                "combine_copy_fraction": self.combine_fraction,
            }
        )

    def cells(self) -> list[str]:
        case = [str(v) for v in asdict(self.case).values()]
        if self.times is None:
            return [*case, *[""] * 8, self.error or ""]
        return [
            *case,
            f"{self.times.dispatch.median_us:.0f}",
            f"{self.times.dispatch_gbs:.0f}",
            f"{self.dispatch_fraction:.2f}",
            f"{self.written_fraction:.2f}",
            f"{self.times.cached_dispatch.median_us:.0f}",
            f"{self.times.combine.median_us:.0f}",
            f"{self.times.combine_gbs:.0f}",
            f"{self.combine_fraction:.2f}",
            f"{self.times.copied_combine.median_us:.0f}",
        ]


HEADS = [
    *("ranks", "tokens", "dtype", "SMs"),
    *("dispatch us", "GB/s", "copy", "written", "cached us"),
    *("combine us", "GB/s", "copy", "copied first, us"),
]


def main(arguments: list[str] | None = None) -> int:
    """Runs the benchmark; returns the exit status, 1 where a case failed."""
    arguments = sys.argv[1:] if arguments is None else arguments
    settings, output = parse_arguments(arguments)
    if not _native.has_cuda or not torch.cuda.is_available():
        print("bench op --device cuda: needs a GPU and a build with CUDA", file=sys.stderr)
        return 1
    # So that no two streams share one of the GPU's queues; read when CUDA starts.
    os.environ.setdefault("CUDA_DEVICE_MAX_CONNECTIONS", "32")
    untuned_unless_asked()
    begin = datetime.now(timezone.utc)
    yardsticks = {n: yardstick(n, settings.num_repeats) for n in settings.num_sms}
    give_memory_back()
    rows = [measured(settings, case, yardsticks[case.num_sms]) for case in settings.cases()]
    gemms = measure_gemms(settings) if settings.with_gemm else []
    gpu = machine()
    print_results(settings, gpu, rows, list(yardsticks.values()), gemms)
    if output is not None:
        document = {
            "bench": "op",
            "kind": "normal",
            "device": "cuda",
            "date": begin.isoformat(timespec="seconds"),
            "command": shlex.join([*PROGRAM.split(), *without_output(arguments)]),
            "machine": gpu,
            "settings": asdict(settings),
            "yardsticks": [asdict(y) for y in yardsticks.values()],
            "gemm_beside_dispatch": [
                asdict(g)
                | {"ratio": g.ratio, "copy_ratio": g.copy_ratio, "ratio_by_sms": g.ratio_by_sms}
                for g in gemms
            ],
            "cases": [row.to_json() for row in rows],
        }
        output.parent.mkdir(parents=True, exist_ok=True)
        output.write_text(json.dumps(document, indent=2) + "\n")
    return int(any(row.error for row in rows))


def measured(settings: NormalBenchSettings, case: NormalCase, of_sms: Yardstick) -> NormalRow:
    """A case that fails is reported as that, the others go on."""
    try:
        row = NormalRow(case, of_sms, measure(settings.sizes(), case))
    except (EPBackendError, RuntimeError, ValueError) as e:
        row = NormalRow(case, of_sms, None, reason(e))
    give_memory_back()
    print(" ".join(row.cells()), file=sys.stderr)
    return row


def measure_gemms(settings: NormalBenchSettings) -> list[GemmBeside]:
    """For every number of SMs. One rank has as many tokens as all ranks in the first case."""
    num_tokens = settings.num_ranks[0] * settings.num_tokens[0]
    gemms = []
    for num_sms in settings.num_sms:
        gemms.append(gemm_beside(settings.sizes(), num_tokens, num_sms))
        give_memory_back()
    return gemms


def print_results(
    settings: NormalBenchSettings,
    gpu: dict[str, Any],
    rows: Sequence[NormalRow],
    yardsticks: Sequence[Yardstick],
    gemms: Sequence[GemmBeside],
) -> None:
    title = (
        f"normal dispatch and combine, virtual ranks on one {gpu['gpu']} | hidden "
        f"{settings.hidden}, {settings.num_experts} experts, top-{settings.top_k} | "
        f"{driver_and_versions(gpu)}"
    )
    print_table(title, HEADS, [row.cells() for row in rows], CAPTION)
    for y in yardsticks:
        print(f"{y.num_sms} SMs: copy {y.copy_gbs:.0f} GB/s, fill {y.fill_gbs:.0f} GB/s")
    for gemm in gemms:
        print(
            f"GEMM {GEMM_SIZE}^3, {gemm.alone_us:.0f} us alone: {gemm.ratio:.3f} times as long "
            f"beside dispatch on {gemm.num_sms} SMs, {gemm.copy_ratio:.3f} beside a copy; by SMs "
            f"alone {gemm.ratio_by_sms:.3f}"
        )


def parse_arguments(arguments: list[str]) -> tuple[NormalBenchSettings, Path | None]:
    """The settings, and where the JSON goes. Wrong arguments end the program, as argparse does."""
    default = NormalBenchSettings()
    parser = argparse.ArgumentParser(
        prog=PROGRAM,
        description="Time and GB/s of prefill's dispatch and combine between virtual ranks on one "
        "GPU, beside a copy on as many SMs. A list is swept.",
    )

    add = option_adder(parser, default)
    add("--ranks", "num_ranks", numbers, "List: virtual ranks, all on this GPU.")
    add("--tokens", "num_tokens", numbers, "List: tokens of every rank.")
    add("--dispatch-dtype", "dispatch_dtypes", words, "List of bf16, fp8: rows of dispatch.")
    add("--num-sms", "num_sms", numbers, "List: SMs of all ranks together.")
    add("--hidden", "hidden", int, "Elements of a row.")
    add("--experts", "num_experts", int, "Experts of all ranks together.")
    add("--top-k", "top_k", int, "Experts of a token.")
    add("--chain", "chain", int, "Operations in a graph.")
    add("--repeats", "num_repeats", int, "Replays timed.")
    add("--seed", "seed", int, "Of the inputs.")
    parser.add_argument(
        "--no-gemm", dest="with_gemm", action="store_const", const=False, help="Leave out the GEMM."
    )
    parser.add_argument("--output", "--json", type=Path, help="Write all results there, as JSON.")
    given = vars(parser.parse_args(arguments))
    output: Path | None = given.pop("output")
    try:
        return replace(default, **{k: v for k, v in given.items() if v is not None}), output
    except ValueError as e:
        parser.error(str(e))


if __name__ == "__main__":
    sys.exit(main())
