"""What our plug-ins for inference engines have in common: how long they wait, checks that an engine
looks as their patches expect, and what engines lack on a CPU."""

from __future__ import annotations

import inspect
import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

TIMEOUT_VARIABLE = "EP_BACKEND_TIMEOUT_SECS"
# An engine's ranks may be apart by a compilation or a slow first step.
DEFAULT_TIMEOUT_SECS = 120.0


def timeout_secs() -> float:
    """How long an engine's rank waits for a peer."""
    return float(os.environ.get(TIMEOUT_VARIABLE, DEFAULT_TIMEOUT_SECS))


def reduce_scatter_rows(rows: Any, sizes: Sequence[int], group: Any) -> Any:
    """This rank's part of the sum of all ranks' `rows`, added in the order of ranks.

    Args:
        rows: `[sum(sizes), ..]`, on a CPU; rank r gets `sizes[r]` of them.
        group: a gloo group. As an all-to-all: gloo has no reduce-scatter of uneven sizes.
    """
    from torch import distributed

    num_ranks, num_own = group.size(), sizes[group.rank()]
    received = rows.new_empty(num_ranks * num_own, *rows.shape[1:])
    distributed.all_to_all_single(
        received,
        rows.contiguous(),
        output_split_sizes=[num_own] * num_ranks,
        input_split_sizes=list(sizes),
        group=group,
    )
    return received.reshape(num_ranks, num_own, *rows.shape[1:]).sum(0)


@dataclass(frozen=True)
class Guard:
    """Checks of one engine, before it is changed."""

    engine: str
    """Its name for messages."""
    installed_version: Callable[[], str]
    supported: str
    tested: str
    plugins_variable: str
    """In which users list the plug-ins that the engine loads."""
    error: type[Exception]

    def require(self, condition: bool, place: str, expectation: str) -> None:
        """Raises the guard's error unless `condition`."""
        if not condition:
            raise self.error(
                f"ep_backend cannot plug into {self.engine} {self.installed_version()}: {place} "
                f"{expectation}. Supported: {self.engine} {self.supported} (tested: "
                f"{self.tested}). Install one of these, or keep the plugin out of this "
                f"{self.engine} by listing the plugins you want in {self.plugins_variable}."
            )

    def require_parameters(self, function: Callable[..., Any], place: str, *names: str) -> None:
        """Requires that `function` has parameters of these names."""
        parameters = inspect.signature(function).parameters
        for name in names:
            self.require(name in parameters, place, f"has no parameter {name!r}")

    def rebind_everywhere(self, original: Any, replacement: Any) -> None:
        """Replaces a function in its home module and wherever the engine has imported it by name.

        Modules imported later find the replacement in the home module.
        """
        for module in list(sys.modules.values()):
            names = getattr(module, "__dict__", None)
            package = getattr(module, "__name__", "").partition(".")[0]
            if not names or package != self.engine.lower():
                continue
            for name, value in list(names.items()):
                if value is original:
                    setattr(module, name, replacement)
