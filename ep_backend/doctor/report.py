"""An examination: all checks, by what they are for; what follows for a configuration."""

from __future__ import annotations

from collections import Counter
from dataclasses import asdict, dataclass
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from ep_backend.doctor.checks import Check, Level, Machine
from ep_backend.doctor.gpu import Gpus, check_gpus
from ep_backend.doctor.host import check_host
from ep_backend.doctor.links import Link, link_table
from ep_backend.doctor.rdma import Build, check_rdma
from ep_backend.doctor.tuning import check_tuning

CONFIGS = {
    "cpu": ("host",),
    "cuda": ("host", "gpus"),
    "rdma": ("host", "gpus", "rdma"),
}
"""What can be asked for, and which sections it needs: ranks on this host's CPU, on its GPUs, on
several hosts."""
SECTIONS = {"host": "Every rank", "gpus": "Ranks on GPUs", "rdma": "Ranks on several hosts"}
COLORS = {Level.OK: "green", Level.NOTE: "yellow", Level.MISSING: "red"}
# A table with more columns does not fit a terminal.
MAX_LISTED_RANKS = 16


@dataclass(frozen=True)
class Examination:
    config: str
    sections: dict[str, list[Check]]
    links: list[list[Link]]

    @property
    def missing(self) -> list[Check]:
        """What the configuration lacks."""
        needed = CONFIGS[self.config]
        return [c for s in needed for c in self.sections[s] if c.level is Level.MISSING]

    @property
    def apart(self) -> dict[str, int]:
        """Why pairs of ranks cannot be joined, and how many for that reason."""
        return Counter(link.why for row in self.links for link in row if link.kind is None)

    @property
    def can_run(self) -> bool:
        return not self.missing and not self.apart

    def to_json(self) -> dict[str, Any]:
        return {
            "config": self.config,
            "can_run": self.can_run,
            "checks": {
                section: [asdict(check) | {"level": check.level.value} for check in checks]
                for section, checks in self.sections.items()
            },
            "links": [[asdict(link) for link in row] for row in self.links],
        }


def examine(
    config: str,
    num_ranks: int,
    ranks_per_host: int,
    machine: Machine | None = None,
    gpus: Gpus | None = None,
    build: Build | None = None,
) -> Examination:
    """
    Args:
        config: of `CONFIGS`.

    Raises:
        ValueError: there is no such configuration, or no such ranks.
    """
    if config not in CONFIGS:
        raise ValueError(f"config is {config!r}, expected {' or '.join(map(repr, CONFIGS))}")
    machine = Machine() if machine is None else machine
    gpus = Gpus.visible() if gpus is None else gpus
    build = Build.present() if build is None else build
    no_network = "see --config rdma"
    if config == "rdma":
        no_network = "this build is without NVSHMEM" if build.nvshmem is None else ""
    return Examination(
        config,
        {
            "host": [*check_host(machine), *check_tuning(machine, gpus)],
            "gpus": check_gpus(machine, gpus),
            "rdma": check_rdma(machine, gpus, build),
        },
        link_table(
            num_ranks, ranks_per_host, "cpu" if config == "cpu" else "cuda", gpus, no_network
        ),
    )


def print_examination(examination: Examination, console: Console) -> None:
    for section, checks in examination.sections.items():
        is_needed = section in CONFIGS[examination.config]
        title = SECTIONS[section] + ("" if is_needed else f" (not needed: {examination.config})")
        console.print(f"[bold]{title}[/]")
        table = Table(box=None, show_header=False)
        for check in checks:
            color = COLORS[check.level]
            said = escape(check.found)
            if check.remedy:
                said += f"\n[dim]{escape(check.remedy)}[/]"
            table.add_row(f"[{color}]{check.level.value}[/]", check.name, said)
        console.print(table)
        console.print()
    _print_links(examination.links, console)
    verdict = "can run" if examination.can_run else "cannot run"
    console.print(f"[bold]{examination.config}[/], {len(examination.links)} ranks: {verdict}")
    for check in examination.missing:
        console.print(f"  missing: {check.name}: {check.found}", highlight=False, markup=False)
    for why, num_pairs in examination.apart.items():
        console.print(f"  {num_pairs} pairs of ranks: {why}", highlight=False)


def _print_links(links: list[list[Link]], console: Console) -> None:
    listed = links[:MAX_LISTED_RANKS]
    console.print("[bold]Links, from rank (row) to rank[/]")
    table = Table(box=None)
    table.add_column("")
    for rank in range(len(listed)):
        table.add_column(str(rank))
    for rank, row in enumerate(listed):
        kinds = (link.kind or "[red]none[/]" for link in row[:MAX_LISTED_RANKS])
        table.add_row(str(rank), *kinds)
    console.print(table)
    if len(links) > len(listed):
        console.print(f"(the first {len(listed)} of {len(links)} ranks)")
    for kind, why in dict.fromkeys(
        (link.kind or "none", link.why) for row in links for link in row
    ):
        console.print(f"  {kind}: {why}", highlight=False)
    console.print()
