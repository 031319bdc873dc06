"""Settings that `ep-backend tune` has found: the table that keeps them, and what a buffer takes
from it where its caller left a setting out."""

from __future__ import annotations

from ep_backend.tuning.lookup import REMEDY, TABLE_KEY, Tuned, log_taken, look_up
from ep_backend.tuning.site import Site
from ep_backend.tuning.table import (
    TUNING_VARIABLE,
    Entry,
    Shape,
    Table,
    TableUnreadable,
    merge_into,
    table_path,
    untuned_unless_asked,
)

__all__ = [
    "REMEDY",
    "TABLE_KEY",
    "TUNING_VARIABLE",
    "Entry",
    "Shape",
    "Site",
    "Table",
    "TableUnreadable",
    "Tuned",
    "log_taken",
    "look_up",
    "merge_into",
    "table_path",
    "untuned_unless_asked",
]
