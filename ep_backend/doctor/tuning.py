"""What `ep-backend tune` has found, and what of it holds on this machine."""

from __future__ import annotations

from pathlib import Path

import torch

from ep_backend.doctor.checks import Check, Level, Machine
from ep_backend.doctor.gpu import Gpus
from ep_backend.tuning import TUNING_VARIABLE, Entry, Table, TableUnreadable, table_path
from ep_backend.tuning.site import device_name, protocol_version

NAME = "tuning table"


def check_tuning(machine: Machine, gpus: Gpus) -> list[Check]:
    """The table, then a line for each entry that buffers on this machine would take."""
    path = table_path(machine.environ)
    if path is None:
        return [Check(NAME, Level.OK, f"off ({TUNING_VARIABLE}, or no home directory)")]
    try:
        table = Table.read(_on(machine, path))
    except TableUnreadable as e:
        return [Check(NAME, Level.NOTE, f"{path} is ignored: {e}", "Run ep-backend tune.")]
    if not table.entries:
        return [
            Check(
                NAME,
                Level.OK,
                f"{path}: none; buffers have the defaults",
                "ep-backend tune fills it.",
            )
        ]
    here = [entry for entry in table.entries if _holds(entry, gpus)]
    num_others = len(table.entries) - len(here)
    others = f"; {num_others} of another device or version are ignored" if num_others else ""
    return [
        Check(NAME, Level.OK, f"{path}: {len(here)} entries for this machine{others}"),
        *(Check("tuned", Level.OK, _text(entry)) for entry in here),
    ]


def _on(machine: Machine, path: Path) -> Path:
    return machine.path(str(path)) if path.is_absolute() else path


def _holds(entry: Entry, gpus: Gpus) -> bool:
    """Whatever the link, which is told: it depends on how ranks are started."""
    if entry.site.device in gpus.names:
        return entry.site.protocol == protocol_version(entry.shape.kernels, "cuda")
    is_here = entry.site.device == device_name(torch.device("cpu"))
    return is_here and entry.site.protocol == protocol_version(entry.shape.kernels, "cpu")


def _text(entry: Entry) -> str:
    settings = ", ".join(f"{name} {value}" for name, value in entry.settings.items())
    return f"{entry.shape}, {entry.site.link}: {settings}"
