"""Checks of tensor arguments: one declarative call per argument, before anything is sent."""

from __future__ import annotations

from collections.abc import Sequence

import torch


class AtMost(int):
    """A dimension that may be anything from 0 to this."""


def check_tensor(
    name: str,
    tensor: torch.Tensor,
    *,
    shape: Sequence[int],
    dtypes: Sequence[torch.dtype],
    device: torch.device,
    remedy: str = "",
) -> None:
    """Raises `ValueError` unless `tensor` has this shape, one of these dtypes and this device.

    Args:
        shape: one entry a dimension; an `AtMost` allows fewer.
        remedy: ends the message, where there is more to say than "pass the right tensor".
    """
    if tensor.dtype not in dtypes:
        allowed = " or ".join(str(dtype) for dtype in dtypes)
        raise ValueError(f"{name} has dtype {tensor.dtype}, expected {allowed}. {remedy}".strip())
    if tensor.device.type != device.type:
        raise ValueError(f"{name} is on {tensor.device}, expected {device}. {remedy}".strip())
    fits = tensor.dim() == len(shape) and all(
        got <= want if isinstance(want, AtMost) else got == want
        for got, want in zip(tensor.shape, shape, strict=True)
    )
    if not fits:
        wanted = ", ".join(f"<={int(n)}" if isinstance(n, AtMost) else str(n) for n in shape)
        got = list(tensor.shape)
        raise ValueError(f"{name} has shape {got}, expected [{wanted}]. {remedy}".strip())
    if not tensor.is_contiguous():
        raise ValueError(
            f"{name} of shape {list(tensor.shape)} has strides {list(tensor.stride())}, expected a "
            f"contiguous tensor. Pass {name}.contiguous()."
        )


def check_int(name: str, value: int, low: int, high: int, why: str = "") -> None:
    """Raises `ValueError` unless `low <= value <= high`."""
    if not isinstance(value, int) or not low <= value <= high:
        raise ValueError(
            f"{name} is {value!r}, expected an integer in {low}..{high}. {why}".strip()
        )
