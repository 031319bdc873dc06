"""What a buffer takes from the table."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from ep_backend.tuning.site import Site
from ep_backend.tuning.table import Entry, Shape, Table, TableUnreadable, Value, table_path

if TYPE_CHECKING:
    from ep_backend.group import Group

logger = logging.getLogger("ep_backend.tuning")

TABLE_KEY = "the tuning table's entry"
"""Under which ranks agree on what the table says."""
REMEDY = "Give all ranks the same table, or switch it off on all of them (EP_BACKEND_TUNING=off)."


@dataclass(frozen=True)
class Tuned:
    """What the table says, whatever the caller has given. Equal where the settings are."""

    settings: dict[str, Any] = field(default_factory=dict)
    path: str = field(default="", compare=False)
    date: str = field(default="", compare=False)

    def __repr__(self) -> str:
        return f"{self.settings} of {self.path}" if self.path else "none"

    def int_of(self, name: str) -> int | None:
        """None where the table says nothing of this setting."""
        value = self.settings.get(name)
        return None if value is None else int(value)


def look_up(shape: Shape, group: Group, device: torch.device) -> Tuned:
    """Reads the table. What it holds for another site is not taken: that is a warning, as is a file
    that is no table."""
    path = table_path()
    if path is None:
        return Tuned()
    try:
        table = Table.read(path)
    except TableUnreadable as e:
        logger.warning(
            "%s is ignored: %s. `ep-backend tune` makes a new one; EP_BACKEND_TUNING=off says "
            "nothing.",
            path,
            e,
        )
        return Tuned()
    of_shape = [entry for entry in table.entries if entry.shape == shape]
    if not of_shape:
        return Tuned()
    site = Site.of(shape.kernels, group, device)
    for entry in of_shape:
        if entry.site == site:
            return _taken(entry, path, device)
    for entry in of_shape:
        logger.warning(
            "%s: the entry for %s is ignored: it is for %s. Run `ep-backend tune` here.",
            path,
            shape,
            site.differences(entry.site),
        )
    return Tuned()


def _taken(entry: Entry, path: Path, device: torch.device) -> Tuned:
    names = entry.shape.settings_of(device.type)
    settings: dict[str, Value] = {k: v for k, v in entry.settings.items() if k in names}
    return Tuned(settings, str(path), str(entry.found.get("date", "")))


def log_taken(what: str, group: Group, tuned: Tuned, given: Mapping[str, Any]) -> None:
    """Says which settings a buffer has from the table.

    Args:
        what: the buffer.
        given: what its caller gave for each setting, None where it was left out.
    """
    taken = {k: v for k, v in tuned.settings.items() if given.get(k) is None}
    overruled = {k: given[k] for k in tuned.settings if given.get(k) is not None}
    if tuned.path:
        logger.info(
            "%s, rank %d: %s from %s, found %s%s",
            what,
            group.self_rank,
            ", ".join(f"{k}={v!r}" for k, v in taken.items()) or "nothing",
            tuned.path,
            tuned.date or "some time",
            f"; given by the caller: {overruled}" if overruled else "",
        )
