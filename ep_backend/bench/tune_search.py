"""What `ep-backend tune` tries, and what it makes of the times: nothing here runs a kernel.

A candidate is a set of settings by name; its times are microseconds of a dispatch and its combine,
by number of tokens.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from ep_backend.tuning.table import Value

Settings = dict[str, Value]
Times = dict[int, float]
Measure = Callable[[Sequence[Settings]], list[Times]]
"""Times of each candidate."""

LATENCY_TOLERANCE = 0.01
"""Low latency: what is slower by less is as good, and then takes fewer SMs; and what gains less is
not worth another setting than the default."""
BANDWIDTH_TOLERANCE = 0.05
"""Normal: SMs and memory are somebody else's, too. What is slower by less takes fewer of them."""


@dataclass(frozen=True)
class Measured:
    step: str
    """For what it was tried."""
    settings: Settings
    times_us: Times


@dataclass(frozen=True)
class Found:
    """What a search has come to."""

    settings: Settings
    defaults: Settings
    default_us: Times
    """In turns with the next."""
    tuned_us: Times
    measured: list[Measured]

    @property
    def gain(self) -> float:
        """Time by default over that now; geometric mean over numbers of tokens."""
        return slowness(self.default_us, self.tuned_us)


def slowness(times_us: Times, others_us: Times) -> float:
    """How many times as long as the others these take; geometric mean over numbers of tokens."""
    logs = [math.log(us / others_us[num_tokens]) for num_tokens, us in times_us.items()]
    return math.exp(sum(logs) / len(logs))


def first_within(times_us: Sequence[Times], tolerance: float) -> int:
    """The first that is at most so much slower than the best of them."""
    slownesses = [slowness(each, times_us[0]) for each in times_us]
    limit = min(slownesses) * (1 + tolerance)
    return next(i for i, each in enumerate(slownesses) if each <= limit)


def tagged_limit(tagged_us: Times, untagged_us: Times) -> int:
    """The largest number of tokens up to which tagged words always gain; 0 where they never do."""
    limit = 0
    for num_tokens in sorted(tagged_us):
        if tagged_us[num_tokens] > untagged_us[num_tokens] * (1 - LATENCY_TOLERANCE):
            break
        limit = num_tokens
    return limit


@dataclass
class Search:
    """Settings are sought one after the other, each with what was found for those before."""

    measure: Measure
    defaults: Settings
    measured: list[Measured] = field(default_factory=list)

    def times(self, step: str, candidates: Sequence[Settings]) -> list[Times]:
        times_us = self.measure(candidates)
        self.measured += [
            Measured(step, settings, times)
            for settings, times in zip(candidates, times_us, strict=True)
        ]
        return times_us

    def sweep(
        self, name: str, values: Sequence[Value], base: Settings, tolerance: float
    ) -> Settings:
        """`base` with the first of the values that is about as fast as the best."""
        candidates = [base | {name: value} for value in values]
        return candidates[first_within(self.times(name, candidates), tolerance)]

    def wire(self, transfers: Sequence[str], num_max_tokens: int) -> Settings:
        """The defaults with the best transfer, and up to where its batches are best tagged.

        Args:
            transfers: as "transfer" may be, the default first; of one, nothing is said.
        """
        best: tuple[Times, Settings] | None = None
        for transfer in transfers:
            base = self.defaults | ({"transfer": transfer} if len(transfers) > 1 else {})
            off, on = self.times(
                "wire",
                [
                    base | {"num_max_tagged_tokens": 0},
                    base | {"num_max_tagged_tokens": num_max_tokens},
                ],
            )
            limit = tagged_limit(on, off)
            times = {n: on[n] if n <= limit else off[n] for n in off}
            if best is None or slowness(times, best[0]) < 1 - LATENCY_TOLERANCE:
                best = times, base | {"num_max_tagged_tokens": limit}
        assert best is not None
        return best[1]

    def end(self, settings: Settings, most_slowness: float) -> Found:
        """Compares with the defaults in turns.

        Args:
            most_slowness: how many times as long as by default the settings may take; else the
                defaults are kept.
        """
        if settings == self.defaults:
            (times,) = self.times("end", [settings])
            return Found(settings, settings, times, times, self.measured)
        default_us, tuned_us = self.times("end", [self.defaults, settings])
        if slowness(tuned_us, default_us) > most_slowness:
            settings, tuned_us = self.defaults, default_us
        return Found(settings, self.defaults, default_us, tuned_us, self.measured)


@dataclass(frozen=True)
class Space:
    """What there is to choose from. Empty: not a setting here."""

    transfers: tuple[str, ...] = ()
    num_max_tokens: int = 0
    """Low latency: where batches can be tagged; else 0."""
    num_sms: tuple[int, ...] = ()
    """Ascending, as the next two."""
    spin_us: tuple[float, ...] = ()
    num_bytes: tuple[int, ...] = ()


def search_low_latency(space: Space, defaults: Settings, measure: Measure) -> Found:
    search = Search(measure, defaults)
    settings = defaults
    if space.num_max_tokens > 0:
        settings = search.wire(space.transfers, space.num_max_tokens)
    if space.num_sms:
        settings = search.sweep("num_sms", space.num_sms, settings, LATENCY_TOLERANCE)
    if space.spin_us:
        settings = search.sweep("spin_us", space.spin_us, settings, LATENCY_TOLERANCE)
    return search.end(settings, 1 - LATENCY_TOLERANCE)


def search_normal(space: Space, defaults: Settings, measure: Measure) -> Found:
    """With memory for all rows first: less of it is judged by what that costs."""
    search = Search(measure, defaults)
    settings = defaults | {"num_bytes": space.num_bytes[-1]}
    if space.num_sms:
        settings = search.sweep("num_sms", space.num_sms, settings, BANDWIDTH_TOLERANCE)
    if space.spin_us:
        settings = search.sweep("spin_us", space.spin_us, settings, LATENCY_TOLERANCE)
    settings = search.sweep("num_bytes", space.num_bytes, settings, BANDWIDTH_TOLERANCE)
    return search.end(settings, 1 + BANDWIDTH_TOLERANCE)
