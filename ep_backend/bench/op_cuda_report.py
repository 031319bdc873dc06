"""How the CUDA benchmark's results are written: one JSON document, one table."""

from __future__ import annotations

import platform
import subprocess
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from importlib import util
from typing import Any

import torch

from ep_backend import __version__
from ep_backend.bench.op_cuda_case import CaseTimes
from ep_backend.bench.op_cuda_floors import GEMM_SIZE, GemmTimes
from ep_backend.bench.op_cuda_settings import Case
from ep_backend.bench.peer_flashinfer import FlashInferRow, FlashInferTimes, is_comparable


@dataclass(frozen=True)
class CaseRow:
    """One case's results, or why there are none."""

    case: Case
    """With `num_sms` as the buffer chose it."""
    times: CaseTimes | None
    error: str | None = None

    def to_json(self, copy_gbs: float | None) -> dict[str, Any]:
        if self.times is None:
            return asdict(self.case) | {"error": self.error}
        row = asdict(self.case) | asdict(self.times) | {"combine_us": self.times.combine_us}
        if copy_gbs is not None:
            row["roofline_us"] = roofline_us(self.times.num_bytes.pair_bytes, copy_gbs)
            row["roofline_fraction"] = row["roofline_us"] / self.times.pair.median_us
        return row


@dataclass(frozen=True)
class Floors:
    """What the GPU itself takes (op_cuda_floors.py)."""

    one_element_kernel_us: dict[int, float]
    """By number of ranks."""
    copy_gbs: float

    def __str__(self) -> str:
        kernels = ", ".join(
            f"{us:.2f} us at EP{num_ranks}" for num_ranks, us in self.one_element_kernel_us.items()
        )
        return f"one-element kernel in a graph: {kernels}; copy of 1 GiB: {self.copy_gbs:.0f} GB/s"


@dataclass(frozen=True)
class GemmRow:
    """A GEMM between send and hook, or why it was not measured."""

    case: Case
    times: GemmTimes | None
    error: str | None = None

    def to_json(self) -> dict[str, Any]:
        if self.times is None:
            return asdict(self.case) | {"error": self.error}
        return asdict(self.case) | asdict(self.times) | {"ratio": self.times.ratio}

    def __str__(self) -> str:
        what = (
            f"GEMM {GEMM_SIZE}^3 between send and hook, EP{self.case.num_ranks}, "
            f"{self.case.num_tokens} tokens"
        )
        if self.times is None:
            return f"{what}: {self.error}"
        return (
            f"{what}: {self.times.between_us:.1f} us, alone {self.times.alone_us:.1f} us, "
            f"ratio {self.times.ratio:.3f}"
        )


def roofline_us(num_bytes: int, copy_gbs: float) -> float:
    """What a plain copy takes to read and write `num_bytes` together."""
    return num_bytes / copy_gbs / 1e3


def table_rows(
    rows: Sequence[CaseRow], copy_gbs: float | None
) -> tuple[str, list[str], list[list[str]]]:
    """What all rows share, the heads of the columns, the cells."""
    settings = [_setting_cells(row) for row in rows]
    shared, heads = [], []
    for head in _SETTINGS:
        values = {cells[head] for cells in settings}
        if len(values) == 1 and len(rows) > 1:
            shared.append(f"{head} {values.pop()}")
        else:
            heads.append(head)
    times = [_time_cells(row, copy_gbs) for row in rows]
    time_heads = [h for h in _TIMES if any(cells.get(h) for cells in times)]
    cells = [
        [s[head] for head in heads] + [t.get(head, "") for head in time_heads]
        for s, t in zip(settings, times, strict=True)
    ]
    return ", ".join(shared), heads + time_heads, cells


_SETTINGS = (
    "ranks",
    "tokens",
    "dtype",
    "combine dtype",
    "layout",
    "form",
    "transfer",
    "SMs",
    "tagged",
)
_TIMES = (
    "pair us",
    "p10",
    "p90",
    "dispatch",
    "combine",
    "MB",
    "roofline",
    "single",
    "cold",
    "note",
)


def _setting_cells(row: CaseRow) -> dict[str, str]:
    case = row.case
    tagged = {None: "default", 0: "off"}
    values = (
        case.num_ranks,
        case.num_tokens,
        case.dispatch_dtype,
        case.combine_dtype,
        case.output_layout.removesuffix("_major"),
        case.form,
        case.transfer,
        case.num_sms,
        tagged.get(case.num_max_tagged_tokens, case.num_max_tagged_tokens),
    )
    return dict(zip(_SETTINGS, map(str, values), strict=True))


def _time_cells(row: CaseRow, copy_gbs: float | None) -> dict[str, str]:
    times = row.times
    if times is None:
        return {"pair us": "failed"}
    cells = {
        "pair us": f"{times.pair.median_us:.1f}",
        "p10": f"{times.pair.p10_us:.1f}",
        "p90": f"{times.pair.p90_us:.1f}",
        "dispatch": f"{times.dispatch.median_us:.1f}",
        "combine": f"{times.combine_us:.1f}",
        "MB": f"{times.num_bytes.pair_bytes / 1e6:.1f}",
    }
    if copy_gbs is not None:
        share = roofline_us(times.num_bytes.pair_bytes, copy_gbs) / times.pair.median_us
        cells["roofline"] = f"{share:.2f}"
    if times.single_pair is not None and times.cold_pair is not None:
        cells["single"] = f"{times.single_pair.median_us:.1f}"
        cells["cold"] = f"{times.cold_pair.median_us:.1f}"
    return cells


def driver_and_versions(gpu: dict[str, Any]) -> str:
    """Of `machine()`, for a title."""
    return (
        f"driver {gpu['driver']}, CUDA {gpu['cuda']}, torch {gpu['torch']}, "
        f"ep_backend {gpu['ep_backend']}"
    )


def print_table(title: str, heads: list[str], cells: list[list[str]], caption: str) -> None:
    """With rich where it is installed, else as aligned text."""
    if util.find_spec("rich") is None:
        widths = [max(map(len, column)) for column in zip(heads, *cells, strict=True)]
        print(title)
        for line in (heads, *cells):
            print("  ".join(cell.rjust(width) for cell, width in zip(line, widths, strict=True)))
        print(caption)
        return
    import rich.box
    import rich.console
    from rich.table import Table

    table = Table(title=title, caption=caption, box=rich.box.SIMPLE_HEAD, pad_edge=False)
    for head in heads:
        table.add_column(head, justify="right", no_wrap=True)
    for line in cells:
        table.add_row(*line)
    # A log has no width, and a number cut short is worse than a long line.
    num_chars = sum(max(map(len, column)) + 3 for column in zip(heads, *cells, strict=True))
    width = max(rich.console.Console().width, num_chars)
    rich.console.Console(width=width).print(table)


def reason(error: BaseException) -> str:
    """One line. Leaving a broken capture raises once more: what came first is the reason."""
    while error.__context__ is not None:
        error = error.__context__
    return f"{type(error).__name__}: {error}".splitlines()[0]


def machine() -> dict[str, Any]:
    properties = torch.cuda.get_device_properties(torch.cuda.current_device())
    return {
        "gpu": properties.name,
        "num_sms": properties.multi_processor_count,
        "driver": _driver_version(),
        "cuda": torch.version.cuda,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "ep_backend": __version__,
    }


def peers(flashinfer: FlashInferTimes) -> dict[str, str]:
    """What was timed of other libraries, or why it was not."""
    return {
        "flashinfer": str(flashinfer),
        "deep_ep": "not timed: its low-latency kernels need RDMA and one rank a process",
    }


def flashinfer_table(
    flashinfer: Sequence[FlashInferRow], rows: Sequence[CaseRow]
) -> tuple[list[str], list[list[str]]]:
    """The heads of the columns, the cells: FlashInfer's rows, each beside the fastest of ours that
    has done the same in one kernel for dispatch and one for combine."""
    lines = []
    for row in flashinfer:
        case = row.case
        sizes = (case.num_ranks, case.num_tokens, case.dispatch_dtype)
        values = (*sizes, case.combine_block_size)
        line = dict(zip(("ranks", "tokens", "dtype", "block"), map(str, values), strict=True))
        line["pair us"] = "failed"
        lines.append(line)
        if row.pair is None:
            continue
        ours_us = [
            r.times.pair.median_us
            for r in rows
            if r.times is not None and is_comparable(r.case) and r.case.form == "fused"
            if (r.case.num_ranks, r.case.num_tokens, r.case.dispatch_dtype) == sizes
        ]
        us = {"pair us": row.pair.median_us, "p10": row.pair.p10_us, "p90": row.pair.p90_us}
        if row.single_pair is not None and row.cold_pair is not None:
            us |= {"single": row.single_pair.median_us, "cold": row.cold_pair.median_us}
        if ours_us:
            us["ours"] = min(ours_us)
            line["theirs / ours"] = f"{row.pair.median_us / min(ours_us):.2f}"
        line |= {head: f"{value:.1f}" for head, value in us.items()}
    heads = [head for head in _FLASHINFER if any(head in line for line in lines)]
    return heads, [[line.get(head, "") for head in heads] for line in lines]


_FLASHINFER = (
    "ranks",
    "tokens",
    "dtype",
    "block",
    "pair us",
    "p10",
    "p90",
    "single",
    "cold",
    "ours",
    "theirs / ours",
)


def _driver_version() -> str:
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()[0]
    except (OSError, subprocess.CalledProcessError, IndexError):
        return "unknown"
