"""The table: a JSON file of entries, each the settings found for one shape at one site.

    {"schema": 1, "entries": [{"shape": {..}, "site": {..}, "settings": {..}, "found": {..}}]}

It is read when a buffer is created, and written by `ep-backend tune` alone.
"""

from __future__ import annotations

import fcntl
import json
import os
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, TypeVar

from ep_backend.tuning.site import Site

SCHEMA = 1
TUNING_VARIABLE = "EP_BACKEND_TUNING"
OFF = "off"

Value = str | int | float
T = TypeVar("T")


class TableUnreadable(ValueError):
    """The file is no table of this version; the text says why."""


@dataclass(frozen=True)
class Shape:
    """What an entry is for. Dtypes are named as torch does, without "torch."."""

    kernels: str
    """"low_latency" or "normal"."""
    num_ranks: int
    hidden: int
    num_experts: int
    top_k: int
    dtype: str
    dispatch_dtype: str
    combine_dtype: str
    output_layout: str
    """Low latency; normal: "normal", as the two below."""
    reduction: str
    has_workspaces: bool

    def __str__(self) -> str:
        layout = self.output_layout
        if self.kernels == "low_latency":
            layout += f", reduced on {self.reduction}" if self.reduction == "source" else ""
            layout += ", in workspaces" if self.has_workspaces else ""
        return (
            f"{self.kernels}, {self.num_ranks} ranks, hidden {self.hidden}, {self.num_experts} "
            f"experts, top-{self.top_k}, {self.dispatch_dtype} out, {self.combine_dtype} home"
            + (f", {layout}" if self.kernels == "low_latency" else "")
        )

    def settings_of(self, device_type: str) -> tuple[str, ...]:
        """Names of the settings of a buffer of this shape that can be tuned."""
        if self.kernels == "normal":
            return ("num_bytes", "num_sms" if device_type == "cuda" else "spin_us")
        if device_type != "cuda":
            return ("spin_us",)
        if not self.has_workspaces:
            return ("num_sms", "transfer", "num_max_tagged_tokens")
        # There rows are pulled; and those of one rank are not tagged.
        return ("num_sms", "num_max_tagged_tokens") if self.num_ranks > 1 else ("num_sms",)


@dataclass(frozen=True)
class Entry:
    """Settings for a shape at a site, by name; a setting that is not there was not searched."""

    shape: Shape
    site: Site
    settings: dict[str, Value]
    found: dict[str, Any] = field(default_factory=dict)
    """When and by which command, and what was gained; nothing depends on it."""

    def check(self) -> None:
        """Raises `ValueError` for settings that no buffer has."""
        names = self.shape.settings_of("cpu") + self.shape.settings_of("cuda")
        for name, value in self.settings.items():
            if name not in names:
                raise ValueError(f"setting {name!r}, expected some of {', '.join(names)}")
            if not _is_allowed(name, value):
                raise ValueError(f"{name} is {value!r}")


def _is_allowed(name: str, value: Value) -> bool:
    if name == "transfer":
        return value in ("pull", "push", "pull_push")
    if isinstance(value, bool) or not isinstance(value, int | float):
        return False
    if name == "spin_us":
        return 0 <= value < float("inf")
    return isinstance(value, int) and value >= (0 if name == "num_max_tagged_tokens" else 1)


@dataclass(frozen=True)
class Table:
    entries: tuple[Entry, ...] = ()

    @classmethod
    def read(cls, path: Path) -> Table:
        """Empty where there is no file.

        Raises:
            TableUnreadable: what is there is no table of this version, or cannot be read.
        """
        try:
            document = json.loads(path.read_text())
        except FileNotFoundError:
            return cls()
        except (OSError, ValueError) as e:
            raise TableUnreadable(f"it cannot be read ({e})") from e
        schema = document.get("schema") if isinstance(document, dict) else None
        if schema != SCHEMA:
            raise TableUnreadable(f"its schema is {schema!r}, this version reads {SCHEMA}")
        try:
            return cls(tuple(_entry(each) for each in document["entries"]))
        except (KeyError, TypeError, ValueError) as e:
            raise TableUnreadable(f"an entry is malformed ({e})") from e

    def to_json(self) -> dict[str, Any]:
        return {"schema": SCHEMA, "entries": [asdict(entry) for entry in self.entries]}

    def merged(self, entries: Sequence[Entry]) -> Table:
        """With `entries` in place of those for the same shape and site."""
        by_key = {(e.shape, e.site): e for e in (*self.entries, *entries)}
        return Table(tuple(by_key.values()))


def _entry(document: Mapping[str, Any]) -> Entry:
    entry = Entry(
        _instance(Shape, document["shape"]),
        _instance(Site, document["site"]),
        dict(document["settings"]),
        dict(document.get("found", {})),
    )
    entry.check()
    return entry


def _instance(kind: type[T], document: Mapping[str, Any]) -> T:
    names = [f.name for f in fields(kind)]  # type: ignore[arg-type]
    if sorted(document) != sorted(names):
        raise ValueError(f"{sorted(document)}, expected {sorted(names)}")
    return kind(**document)


def table_path(environ: Mapping[str, str] | None = None) -> Path | None:
    """Of the table; None where `EP_BACKEND_TUNING` is "off", or where it says nothing and there is
    no home directory, as in containers whose user has no name."""
    environ = os.environ if environ is None else environ
    given = environ.get(TUNING_VARIABLE)
    if given == OFF:
        return None
    if given:
        return Path(given)
    cache = environ.get("XDG_CACHE_HOME")
    try:
        directory = Path(cache) if cache else Path(environ.get("HOME") or Path.home()) / ".cache"
    except RuntimeError:  # the user is not in /etc/passwd
        return None
    return directory / "ep_backend" / "tuning.json"


def untuned_unless_asked() -> None:
    """For benchmarks, which say what settings they measure: no table, in this process and those it
    starts, unless `EP_BACKEND_TUNING` names one."""
    os.environ.setdefault(TUNING_VARIABLE, OFF)


def merge_into(path: Path, entries: Sequence[Entry]) -> Path | None:
    """Writes `entries` into the table, beside what it holds; readers see the old file or the new.

    Returns:
        Where a file that was there and is no table of this version has been moved to, else None.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    moved = None
    # Others may write, too: each in turn.
    with open(path.with_name(f".{path.name}.lock"), "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        try:
            table = Table.read(path)
        except TableUnreadable:
            table = Table()
            moved = path.with_name(f"{path.name}.old")
            path.replace(moved)
        text = json.dumps(table.merged(entries).to_json(), indent=2) + "\n"
        with tempfile.NamedTemporaryFile(
            "w", dir=path.parent, prefix=f".{path.name}.", delete=False
        ) as draft:
            draft.write(text)
        Path(draft.name).chmod(0o644)
        os.replace(draft.name, path)
    return moved
