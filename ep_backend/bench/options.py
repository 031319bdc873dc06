"""Command-line options that show the defaults of a settings dataclass."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from typing import Any, Protocol


class AddOption(Protocol):
    def __call__(
        self,
        flag: str,
        name: str,
        parse: Callable[[str], Any],
        text: str,
        shown: str | None = None,
    ) -> None:
        """An option that is None where it was not given.

        Args:
            name: of the field.
            text: of the help, in front of the default.
            shown: as the default; else the field's.
        """


def option_adder(parser: argparse.ArgumentParser, default: Any) -> AddOption:
    """
    Args:
        default: the settings whose fields are shown; None in a list is shown as "default".
    """

    def add(
        flag: str, name: str, parse: Callable[[str], Any], text: str, shown: str | None = None
    ) -> None:
        if shown is None:
            value = getattr(default, name)
            values = value if isinstance(value, tuple) else (str(value),)
            shown = ",".join("default" if v is None else str(v) for v in values)
        parser.add_argument(
            flag, dest=name, type=parse, metavar=flag[2:].upper(), help=f"{text} [default: {shown}]"
        )

    return add


def words(text: str) -> tuple[str, ...]:
    return tuple(text.split(","))


def numbers(text: str) -> tuple[int, ...]:
    return tuple(int(word) for word in text.split(","))


def without_output(arguments: Sequence[str], *others: str) -> list[str]:
    """Where results were written to says nothing about them.

    Args:
        others: options beside `--output` and `--json` that name such a file.
    """
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--output", "--json", *others)
    return parser.parse_known_args(arguments)[1]
