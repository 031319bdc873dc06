"""Checks of tensor arguments: one declarative call per argument, before anything is sent."""

from __future__ import annotations

import torch


class AtMost(int):
    """A dimension that may be anything from 0 to this."""


def check_tensor(
    name: str,
    tensor: torch.Tensor,
    shape: tuple[int, ...],
    dtypes: tuple[torch.dtype, ...],
    device: torch.device,
    remedy: str = "",
) -> None:
    """Raises `ValueError` unless `tensor` is contiguous and has this shape, dtype and device.

    Args:
        shape: one entry a dimension; an `AtMost` allows fewer.
        dtypes: any of these.
        remedy: ends the message, where there is more to say than "pass the right tensor".
    """
    # Passed by every call of every layer: texts are made only for what is wrong.
    if (
        tensor.dtype in dtypes
        and tensor.device.type == device.type
        and (tensor.shape == shape or _fits(tensor.shape, shape))
        and tensor.is_contiguous()
    ):
        return
    raise ValueError(f"{_mismatch(name, tensor, shape, dtypes, device)} {remedy}".strip())


def _fits(got: tuple[int, ...], wanted: tuple[int, ...]) -> bool:
    return len(got) == len(wanted) and all(
        g <= w if isinstance(w, AtMost) else g == w for g, w in zip(got, wanted, strict=True)
    )


def _mismatch(
    name: str,
    tensor: torch.Tensor,
    shape: tuple[int, ...],
    dtypes: tuple[torch.dtype, ...],
    device: torch.device,
) -> str:
    got = list(tensor.shape)
    if tensor.dtype not in dtypes:
        allowed = " or ".join(str(dtype) for dtype in dtypes)
        return f"{name} has dtype {tensor.dtype}, expected {allowed}."
    if tensor.device.type != device.type:
        return f"{name} is on {tensor.device}, expected {device}."
    if not _fits(tensor.shape, shape):
        wanted = ", ".join(f"<={int(n)}" if isinstance(n, AtMost) else str(n) for n in shape)
        return f"{name} has shape {got}, expected [{wanted}]."
    return (
        f"{name} of shape {got} has strides {list(tensor.stride())}, expected a contiguous tensor. "
        f"Pass {name}.contiguous()."
    )


def check_alignment(name: str, tensor: torch.Tensor, alignment: int) -> None:
    """Raises `ValueError` unless the tensor starts at a multiple of `alignment` bytes."""
    if alignment > 1 and tensor.data_ptr() % alignment != 0:
        excess = tensor.data_ptr() % alignment
        raise ValueError(
            f"{name} starts {excess} bytes behind a multiple of {alignment}, expected one: it is a "
            f"view into the middle of a row. Pass {name}.clone()."
        )


def check_int(name: str, value: int, low: int, high: int, why: str = "") -> None:
    """Raises `ValueError` unless `low <= value <= high`."""
    if not isinstance(value, int) or not low <= value <= high:
        raise ValueError(
            f"{name} is {value!r}, expected an integer in {low}..{high}. {why}".strip()
        )
