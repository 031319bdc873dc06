"""`ep-backend bench precision`: how far combine is from the exact sum, by the type of its rows on
their way.

Experts' rows are drawn as bfloat16 (precision_rows.py); buffers of virtual ranks on the CPU combine
them. The exact result is the float64 sum of the same rows with the same weights, so that only what
combine does counts, the rounding of its result to bfloat16 included. GPUs give the same bits.

T tokens of a rank, R ranks, H hidden, K top_k.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import Annotated

import rich.box
import rich.console
import torch
import typer
from rich.table import Table

from ep_backend import DispatchHandle, LowLatencyBuffer, virtual_world
from ep_backend.bench.precision_rows import DISTRIBUTIONS
from ep_backend.bench.provenance import command, commit, installed_versions, this_machine
from ep_backend.bench.routing import Inputs, make_inputs

COMBINE_DTYPES = {"bf16": torch.bfloat16, "fp8": torch.float8_e4m3fn}
REDUCTIONS = ("rank", "source")


@dataclass(frozen=True)
class PrecisionSettings:
    num_ranks: int = 8
    num_tokens: int = 32
    """T of every rank."""
    hidden: int = 7168
    num_experts: int = 64
    top_k: int = 8
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("num_ranks", "num_tokens", "hidden", "top_k"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}, expected at least 1")
        at_least = max(self.num_ranks, self.top_k)
        if self.num_experts < at_least:
            raise ValueError(
                f"num_experts is {self.num_experts}, expected at least {at_least}, the number of "
                "ranks or of a token's experts"
            )


@dataclass(frozen=True)
class Errors:
    """Of a result against the exact one, as norms: |result - exact| / |exact|."""

    overall: float
    worst_token: float
    worst_channel: float
    """Over all tokens: shows what a large channel does to its neighbours."""

    @classmethod
    def of(cls, result: torch.Tensor, exact: torch.Tensor) -> Errors:
        """Of `[tokens, H]`, `exact` float64."""
        error = result.double() - exact

        def worst(dim: int) -> float:
            return float((error.norm(dim=dim) / exact.norm(dim=dim)).max())

        return cls(float(error.norm() / exact.norm()), worst(1), worst(0))


@dataclass(frozen=True)
class PrecisionCase:
    distribution: str
    """Of `DISTRIBUTIONS`."""
    reduction: str
    combine_dtype: str
    """Of `COMBINE_DTYPES`."""
    errors: Errors


class CombiningRanks:
    """Buffers of all ranks with a dispatch that may be combined again and again."""

    def __init__(
        self,
        settings: PrecisionSettings,
        inputs: list[Inputs],
        reduction: str,
        combine_dtype: torch.dtype,
    ) -> None:
        self._settings = settings
        self._inputs = inputs
        self._buffers: list[LowLatencyBuffer] = virtual_world(settings.num_ranks).run(
            lambda group: LowLatencyBuffer(
                group,
                num_max_tokens_per_rank=settings.num_tokens,
                hidden=settings.hidden,
                num_experts=settings.num_experts,
                top_k=settings.top_k,
                dtype=torch.bfloat16,
                combine_dtype=combine_dtype,
                reduction=reduction,
            )
        )
        # What is dispatched does not matter: the experts' rows are drawn.
        sent = [
            buffer.dispatch(rank.x, rank.topk_idx, rank.topk_weights)
            for buffer, rank in zip(self._buffers, inputs, strict=True)
        ]
        for _, recv_hook in sent:
            recv_hook()
        self._handles: list[DispatchHandle] = [result.handle for result, _ in sent]

    def combine(self, rows: torch.Tensor) -> torch.Tensor:
        """`[R * T, H]` bfloat16 of the rows `[R * T, K, H]` that experts made for each token."""
        topk_idx = torch.cat([rank.topk_idx for rank in self._inputs])
        sent = []
        for buffer, handle, rank in zip(self._buffers, self._handles, self._inputs, strict=True):
            shape = (buffer.num_local_experts, buffer.expert_capacity, buffer.hidden)
            expert_out = torch.empty(shape, dtype=torch.bfloat16)
            for local in range(buffer.num_local_experts):
                # By source rank, then token: the order in which experts get their rows.
                of_expert = rows[topk_idx == buffer.first_expert + local]
                expert_out[local, : len(of_expert)] = of_expert
            weights = rank.topk_weights if buffer.reduction == "source" else None
            sent.append(buffer.combine(expert_out, handle, topk_weights=weights))
        for _, recv_hook in sent:
            recv_hook()
        return torch.cat([out for out, _ in sent])

    def close(self) -> None:
        for buffer in self._buffers:
            buffer.close()


def measure(settings: PrecisionSettings) -> Iterator[PrecisionCase]:
    inputs = [
        make_inputs(
            settings.seed,
            rank,
            num_tokens=settings.num_tokens,
            hidden=settings.hidden,
            num_experts=settings.num_experts,
            top_k=settings.top_k,
            dtype=torch.bfloat16,
        )
        for rank in range(settings.num_ranks)
    ]
    weights = torch.cat([rank.topk_weights for rank in inputs]).double()
    ranks = {
        (reduction, name): CombiningRanks(settings, inputs, reduction, dtype)
        for reduction in REDUCTIONS
        for name, dtype in COMBINE_DTYPES.items()
    }
    for distribution, draw in DISTRIBUTIONS.items():
        generator = torch.Generator().manual_seed(settings.seed)
        rows = draw(weights.numel(), settings.hidden, generator).bfloat16()
        rows = rows.view(*weights.shape, settings.hidden)
        exact = torch.zeros(len(rows), settings.hidden, dtype=torch.float64)
        for k in range(settings.top_k):
            exact += weights[:, k, None] * rows[:, k].double()
        for (reduction, name), combining in ranks.items():
            errors = Errors.of(combining.combine(rows), exact)
            yield PrecisionCase(distribution, reduction, name, errors)
    for combining in ranks.values():
        combining.close()


def precision(
    ranks: Annotated[int, typer.Option(help="Virtual ranks.")] = PrecisionSettings.num_ranks,
    tokens: Annotated[int, typer.Option(help="Of every rank.")] = PrecisionSettings.num_tokens,
    hidden: Annotated[int, typer.Option(help="Elements of a row.")] = PrecisionSettings.hidden,
    experts: Annotated[
        int, typer.Option(help="Experts of all ranks together.")
    ] = PrecisionSettings.num_experts,
    top_k: Annotated[int, typer.Option(help="Experts of a token.")] = PrecisionSettings.top_k,
    seed: Annotated[int, typer.Option(help="Of what is drawn.")] = PrecisionSettings.seed,
    json_path: Annotated[
        Path | None, typer.Option("--json", help="Write all results there.")
    ] = None,
) -> None:
    """Error of combine by the type in which its rows travel, on heavy-tailed rows; on the CPU."""
    try:
        settings = PrecisionSettings(ranks, tokens, hidden, experts, top_k, seed)
    except ValueError as e:
        raise typer.BadParameter(str(e)) from e
    begin = datetime.now(timezone.utc)
    cases = list(measure(settings))
    versions = installed_versions()
    rich.console.Console().print(_table(settings, versions, cases))
    if json_path is not None:
        document = {
            "bench": "precision",
            "date": begin.isoformat(timespec="seconds"),
            "commit": commit(),
            "command": command(),
            "machine": this_machine(),
            "versions": versions,
            "settings": asdict(settings),
            "cases": [asdict(case) for case in cases],
        }
        json_path.parent.mkdir(parents=True, exist_ok=True)
        json_path.write_text(json.dumps(document, indent=2) + "\n")


def _table(
    settings: PrecisionSettings, versions: dict[str, str], cases: list[PrecisionCase]
) -> Table:
    table = Table(
        title=f"error of combine against the exact sum, % | {settings.num_ranks} ranks x "
        f"{settings.num_tokens} tokens, hidden {settings.hidden}, {settings.num_experts} experts, "
        f"top-{settings.top_k} | ep_backend {versions['ep_backend']}, torch {versions['torch']}",
        caption="Norm of the error / norm of the exact result: of all elements, of the worst "
        "token, of the worst channel.",
        box=rich.box.SIMPLE_HEAD,
        pad_edge=False,
    )
    for column in ("rows", "reduction", "combine"):
        table.add_column(column, no_wrap=True)
    for column in ("error", "worst token", "worst channel"):
        table.add_column(column, justify="right", no_wrap=True)
    for case in cases:
        table.add_row(
            case.distribution,
            case.reduction,
            case.combine_dtype,
            *(f"{100 * error:.2f}" for error in asdict(case.errors).values()),
        )
    return table
