"""What was measured in a case of the decode benchmark, and what follows from it."""

from __future__ import annotations

import statistics
from dataclasses import asdict, dataclass
from typing import Any

from ep_backend.bench.decode_rank import PARTS
from ep_backend.bench.decode_settings import Case


@dataclass(frozen=True)
class Times:
    """Milliseconds of the slowest rank, medians over steps; for one layer of the model."""

    step: float
    exchange: float
    """Of a step without experts."""
    experts: float
    """Of a step without dispatches and combines."""
    relative_error: float
    """Of the worst token that was checked."""

    @classmethod
    def of_steps(
        cls, times_us: dict[str, list[float]], num_layers: int, relative_error: float
    ) -> Times:
        """From the steps of every part, each as long as on its slowest rank."""
        step, exchange, experts = (
            statistics.median(times_us[part]) / num_layers / 1e3 for part in PARTS
        )
        return cls(step, exchange, experts, relative_error)

    @property
    def exchange_share(self) -> float:
        """Of a step, what the exchange adds to the experts."""
        return max(0.0, self.step - self.experts) / self.step

    @property
    def hidden(self) -> float:
        """Of the exchange's own time, what does not show in the step: it passes beside experts.
        What experts lose by it counts against it."""
        return min(1.0, max(0.0, 1 - (self.step - self.experts) / self.exchange))


@dataclass(frozen=True)
class CaseRow:
    case: Case
    times: Times
    num_model_layers: int

    @property
    def ms_per_token(self) -> float:
        """A decode step gives every sequence a token: all layers with routed experts, one after
        the other; without attention, dense layers and shared experts."""
        return self.times.step * self.num_model_layers

    def to_json(self) -> dict[str, Any]:
        derived = {
            "exchange_share": self.times.exchange_share,
            "hidden": self.times.hidden,
            "ms_per_token": self.ms_per_token,
        }
        return asdict(self.case) | {"ms_per_layer": asdict(self.times)} | derived
