"""`ep-backend bench wire`: what crosses the network between nodes, and the least time it takes.

Copies of a token, bytes and messages by scheme (wire_formula.py), where every token has K different
experts, all as likely; the floor is the time that one rank's bytes take through its own NIC. Then
the formulas are compared with what the kernels of as many virtual ranks put on a network that
counts, with small rows: there are no NICs, and nothing is timed.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, replace
from datetime import datetime, timezone
from pathlib import Path
from typing import Annotated, Any

import rich.box
import rich.console
import torch
import typer
from rich.table import Table

from ep_backend.bench.provenance import command, commit, installed_versions
from ep_backend.bench.routing import make_inputs
from ep_backend.bench.wire_formula import (
    PHASES,
    Copies,
    WireShape,
    bytes_of_copy,
    network_traffic,
    node_traffic,
)
from ep_backend.bench.wire_run import ALGORITHMS, count
from ep_backend.virtual_network import Traffic

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
TRAVELLING_DTYPES = DTYPES | {"float8": torch.float8_e4m3fn}
NAMES = {
    "per_expert": "per expert (DeepEP)",
    "per_rank": "per rank (flat)",
    "per_node": "per node (hierarchical)",
}
COUNTED_HIDDEN = 256
COUNTED_TOKENS = 8
"""Of every virtual rank, at most: all of them share this machine's cores."""


@dataclass(frozen=True)
class WireCase:
    """Of one rank, one dispatch or combine."""

    scheme: str
    phase: str
    copies_per_token: float
    bytes_per_copy: int
    num_bytes: float
    """Sent over the network by a rank, signals and credits included."""
    num_messages: float
    """Puts, signals and credits of a rank."""
    floor_us: float

    @classmethod
    def of(cls, scheme: str, phase: str, shape: WireShape, nic_gbs: float) -> WireCase:
        copies = Copies.expected(shape)
        traffic = network_traffic(scheme, phase, copies, shape)
        num_bytes = traffic.num_bytes / shape.num_ranks
        return cls(
            scheme=scheme,
            phase=phase,
            copies_per_token=copies.remote_in(phase, scheme, shape)
            / (shape.num_ranks * shape.num_tokens),
            bytes_per_copy=bytes_of_copy(scheme, phase, shape),
            num_bytes=num_bytes,
            num_messages=traffic.num_messages / shape.num_ranks,
            floor_us=num_bytes / nic_gbs / 1e3,
        )


@dataclass(frozen=True)
class CountedCase:
    """What virtual ranks have sent over a link, and what the formula says of the same routing."""

    scheme: str
    phase: str
    link: str
    copies_per_token: float
    counted: Traffic
    formula: Traffic


def count_all(shape: WireShape, seed: int) -> list[CountedCase]:
    inputs = [
        make_inputs(
            seed,
            rank,
            num_tokens=shape.num_tokens,
            hidden=1,
            num_experts=shape.num_experts,
            top_k=shape.top_k,
            dtype=shape.dtype,
        )
        for rank in range(shape.num_ranks)
    ]
    topk_idx = [rank.topk_idx for rank in inputs]
    copies = Copies.of_routing(topk_idx, shape)
    cases = []
    for scheme, hierarchical in ALGORITHMS.items():
        if scheme not in shape.schemes:
            continue
        counted = count(shape, hierarchical, topk_idx, seed)
        for phase in PHASES:
            for link, formula in (("rdma", network_traffic), ("shm", node_traffic)):
                case = CountedCase(
                    scheme,
                    phase,
                    link,
                    copies.remote_in(phase, scheme, shape) / (shape.num_ranks * shape.num_tokens),
                    counted[phase][link],
                    formula(scheme, phase, copies, shape),
                )
                cases.append(case)
    return cases


def wire(
    nodes: Annotated[int, typer.Option(help="Nodes.")] = 4,
    ranks_per_node: Annotated[int, typer.Option(help="Ranks of a node, each with a NIC.")] = 8,
    tokens: Annotated[int, typer.Option(help="Of every rank.")] = 128,
    hidden: Annotated[int, typer.Option(help="Elements of a row.")] = 7168,
    experts: Annotated[int, typer.Option(help="Experts of all ranks together.")] = 256,
    top_k: Annotated[int, typer.Option(help="Experts of a token.")] = 8,
    dtype: Annotated[str, typer.Option(help=" or ".join(DTYPES) + ".")] = "bfloat16",
    dispatch_dtype: Annotated[
        str, typer.Option(help=f"Of dispatch's rows: {', '.join(TRAVELLING_DTYPES)}.")
    ] = "float8",
    combine_dtype: Annotated[
        str | None, typer.Option(help="Of combine's rows. [default: that of --dtype]")
    ] = None,
    reduction: Annotated[
        str,
        typer.Option(
            help="Where rows are weighted and added: rank, or source, as DeepEP's API does."
        ),
    ] = "rank",
    nic_gbs: Annotated[float, typer.Option(help="GB/s of a rank's NIC.")] = 50.0,
    counted: Annotated[
        bool, typer.Option(help="Also count what virtual ranks send, and compare.")
    ] = True,
    seed: Annotated[int, typer.Option(help="Of the routing, and of the network.")] = 0,
    json_path: Annotated[
        Path | None, typer.Option("--json", "--output", help="Write all results there.")
    ] = None,
) -> None:
    """Bytes and messages between nodes: per expert, per rank, per node. Status 1: what virtual
    ranks have sent is not what the formulas say."""
    try:
        shape = WireShape(
            nodes,
            ranks_per_node,
            tokens,
            hidden,
            experts,
            top_k,
            _parse("dtype", dtype, DTYPES),
            _parse("dispatch_dtype", dispatch_dtype, TRAVELLING_DTYPES),
            _parse("combine_dtype", combine_dtype or dtype, TRAVELLING_DTYPES),
            reduction,
        )
        check(shape, nic_gbs)
    except ValueError as e:
        raise typer.BadParameter(str(e)) from e
    begin = datetime.now(timezone.utc)
    console = rich.console.Console()
    cases = [WireCase.of(s, p, shape, nic_gbs) for p in PHASES for s in shape.schemes]
    console.print(_table(shape, nic_gbs, cases))
    small = replace(
        shape, num_tokens=min(tokens, COUNTED_TOKENS), hidden=min(hidden, COUNTED_HIDDEN)
    )
    counted_cases = count_all(small, seed) if counted else []
    if counted:
        console.print(_counted_table(small, counted_cases))
    if json_path is not None:
        document = {
            "bench": "wire",
            "date": begin.isoformat(timespec="seconds"),
            "commit": commit(),
            "command": command(),
            "versions": installed_versions(),
            "settings": _settings(shape) | {"nic_gbs": nic_gbs, "seed": seed},
            "cases": [asdict(case) for case in cases],
            "counted_settings": _settings(small),
            "counted": [asdict(case) for case in counted_cases],
        }
        json_path.parent.mkdir(parents=True, exist_ok=True)
        json_path.write_text(json.dumps(document, indent=2) + "\n")
    if any(case.counted != case.formula for case in counted_cases):
        raise typer.Exit(1)


def check(shape: WireShape, nic_gbs: float) -> None:
    """Raises `ValueError` for what there is no formula of."""
    for name, at_least in (("num_nodes", 2), ("ranks_per_node", 1), ("num_tokens", 1)):
        if getattr(shape, name) < at_least:
            raise ValueError(f"{name} is {getattr(shape, name)}, expected at least {at_least}")
    if shape.num_experts < shape.top_k:
        raise ValueError(
            f"num_experts is {shape.num_experts}, expected at least {shape.top_k}, the number of a "
            "token's experts"
        )
    if nic_gbs <= 0:
        raise ValueError(f"nic_gbs is {nic_gbs:g}, expected more than 0")
    shape.layout(hierarchical="per_node" in shape.schemes)


def _parse(name: str, value: str, choices: dict[str, torch.dtype]) -> torch.dtype:
    if value not in choices:
        raise ValueError(f"{name} is {value!r}, expected {' or '.join(choices)}")
    return choices[value]


def _settings(shape: WireShape) -> dict[str, Any]:
    return {
        name: str(value).removeprefix("torch.") if isinstance(value, torch.dtype) else value
        for name, value in asdict(shape).items()
    }


def _table(shape: WireShape, nic_gbs: float, cases: list[WireCase]) -> Table:
    names = _settings(shape)
    table = Table(
        title=f"between nodes, a rank's dispatch and combine | {shape.num_nodes} nodes x "
        f"{shape.ranks_per_node} ranks, {shape.num_tokens} tokens each, hidden {shape.hidden}, "
        f"{shape.num_experts} experts, top-{shape.top_k}, dispatch {names['dispatch_dtype']}, "
        f"combine {names['combine_dtype']}, reduced at the {shape.reduction}",
        caption="Formulas, for K different experts, all as likely; nothing was timed. Of DeepEP "
        f"rows, scales and 16-byte headers alone. Floor: a rank's bytes at {nic_gbs:g} GB/s.",
        box=rich.box.SIMPLE_HEAD,
        pad_edge=False,
    )
    for column in ("", "a copy"):
        table.add_column(column, no_wrap=True)
    for column in (
        "copies\na token",
        "bytes\na copy",
        "KiB\na rank",
        "messages\na rank",
        "floor us",
    ):
        table.add_column(column, justify="right", no_wrap=True)
    for case in cases:
        table.add_row(
            case.phase,
            NAMES[case.scheme],
            f"{case.copies_per_token:.2f}",
            str(case.bytes_per_copy),
            f"{case.num_bytes / 1024:.0f}",
            f"{case.num_messages:.0f}",
            f"{case.floor_us:.1f}",
        )
    return table


def _counted_table(shape: WireShape, cases: list[CountedCase]) -> Table:
    table = Table(
        title=f"counted: {shape.num_ranks} virtual ranks, {shape.num_tokens} tokens each, hidden "
        f"{shape.hidden}, a drawn routing",
        caption="Sent by all ranks together: rdma between nodes, shm between ranks of a node.",
        box=rich.box.SIMPLE_HEAD,
        pad_edge=False,
    )
    for column in ("", "a copy", "link"):
        table.add_column(column, no_wrap=True)
    for column in ("copies\na token", "messages", "formula", "bytes", "formula", ""):
        table.add_column(column, justify="right", no_wrap=True)
    for case in cases:
        is_same = case.counted == case.formula
        table.add_row(
            case.phase,
            NAMES[case.scheme],
            case.link,
            f"{case.copies_per_token:.2f}" if case.link == "rdma" else "",
            str(case.counted.num_messages),
            str(case.formula.num_messages),
            str(case.counted.num_bytes),
            str(case.formula.num_bytes),
            "equal" if is_same else "DIFFERENT",
        )
    return table
