"""Rows as experts might make them, for `ep-backend bench precision`: from the harmless to the tails
of real models."""

from __future__ import annotations

from collections.abc import Callable

import torch

OUTLIER_FACTOR = 100.0
CHANNELS_PER_OUTLIER = 1000
MASSIVE_FACTOR = 10_000.0
ROWS_PER_MASSIVE = 16


def normal(num_rows: int, hidden: int, generator: torch.Generator) -> torch.Tensor:
    return torch.randn(num_rows, hidden, generator=generator)


def student_t(
    degrees: int,
) -> Callable[[int, int, torch.Generator], torch.Tensor]:
    """Of 3 degrees of freedom the variance is finite, of 2 it is not."""

    def draw(num_rows: int, hidden: int, generator: torch.Generator) -> torch.Tensor:
        chi_square = torch.zeros(num_rows, hidden)
        for _ in range(degrees):
            chi_square += normal(num_rows, hidden, generator).square()
        return normal(num_rows, hidden, generator) / (chi_square / degrees).sqrt()

    return draw


def outlier_channels(num_rows: int, hidden: int, generator: torch.Generator) -> torch.Tensor:
    """A channel in a thousand, the same of all rows, is 100 times as large as the others: the
    features of LLM.int8()."""
    rows = normal(num_rows, hidden, generator)
    num_outliers = -(-hidden // CHANNELS_PER_OUTLIER)
    rows[:, torch.randperm(hidden, generator=generator)[:num_outliers]] *= OUTLIER_FACTOR
    return rows


def massive(num_rows: int, hidden: int, generator: torch.Generator) -> torch.Tensor:
    """One channel of every 16th row is 10,000 times as large: the massive activations of a few
    tokens, as of the first one."""
    rows = normal(num_rows, hidden, generator)
    channel = int(torch.randint(hidden, (), generator=generator))
    rows[::ROWS_PER_MASSIVE, channel] *= MASSIVE_FACTOR
    return rows


DISTRIBUTIONS = {
    "normal": normal,
    "student_t_3": student_t(3),
    "student_t_2": student_t(2),
    "outlier_channels": outlier_channels,
    "massive": massive,
}
