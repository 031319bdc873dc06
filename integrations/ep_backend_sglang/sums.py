"""Where SGLang's Triton experts leave the sums of a row's experts: they write over their input, and
are made to write where peers read instead."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from ep_backend_sglang import cpu_only
from ep_backend_sglang.patching import require, uses_global

PLACE = f"{cpu_only.MOE}.moe_runner.triton_utils.fused_moe"
KERNELS = ("moe_sum_reduce", "moe_sum_reduce_triton")
CALLERS = ("moe_combine_topk", "_fused_moe_kernel_sequence")


class Target:
    """Of one run of experts.

    Args:
        rows: `[N, H]`, where the sums are wanted, or None: where the experts leave them.
    """

    def __init__(self, rows: torch.Tensor | None) -> None:
        self.rows = rows
        self.is_written = False

    def rows_or(self, others: torch.Tensor) -> torch.Tensor:
        """What was wanted, with the sums, which are in `others` if the experts ended with another
        kernel than those of `KERNELS`."""
        if self.rows is None:
            return others
        if not self.is_written:
            self.rows.copy_(others)
        return self.rows


_current: Target | None = None


def check() -> None:
    if cpu_only.is_active():
        return
    from sglang.srt.layers.moe.moe_runner.triton_utils import fused_moe

    callers = [getattr(fused_moe, name) for name in CALLERS if hasattr(fused_moe, name)]
    for name in KERNELS:
        is_called = any(uses_global(caller, name) for caller in callers)
        require(is_called, PLACE, f"calls {name!r} in none of {', '.join(CALLERS)}")


def install() -> None:
    if cpu_only.is_active():
        return
    from sglang.srt.layers.moe.moe_runner.triton_utils import fused_moe

    for name in KERNELS:
        if hasattr(fused_moe, name):  # as far as this device has them
            setattr(fused_moe, name, _redirected(getattr(fused_moe, name)))


@contextmanager
def into(rows: torch.Tensor | None) -> Iterator[Target]:
    """The experts that run meanwhile, of one layer, leave their sums there."""
    global _current
    _current = Target(rows)
    try:
        yield _current
    finally:
        _current = None


def _redirected(kernel: Any) -> Any:
    @functools.wraps(kernel)
    def into_target(rows: Any, output: Any, *args: Any, **kwargs: Any) -> Any:
        if _current is not None and _current.rows is not None:
            output, _current.is_written = _current.rows, True
        return kernel(rows, output, *args, **kwargs)

    return into_target
