"""Checks of tensor arguments: one declarative call per argument, before anything is sent."""

from __future__ import annotations

import warnings
from typing import Any

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
    """Raises `ValueError` unless `tensor` is contiguous, as its memory says, and has this shape,
    dtype and device.

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
        and not tensor.is_neg()
    ):
        return
    raise ValueError(f"{_mismatch(name, tensor, shape, dtypes, device)} {remedy}".strip())


def _fits(got: tuple[int, ...], wanted: tuple[int, ...]) -> bool:
    if len(got) != len(wanted):
        return False
    # Not all(..): a generator costs more than the comparisons.
    for g, w in zip(got, wanted, strict=True):
        if g > w or (g != w and not isinstance(w, AtMost)):
            return False
    return True


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
    if tensor.is_neg():
        return (
            f"{name} of shape {got} is the negative of what its memory holds, as is the imaginary "
            f"part of a conjugate. Pass {name}.resolve_neg()."
        )
    return (
        f"{name} of shape {got} has strides {list(tensor.stride())}, expected a contiguous tensor. "
        f"Pass {name}.contiguous()."
    )


def warn_of_gradients(operation: str, *tensors: torch.Tensor | None) -> None:
    """Where one of them requires a gradient, which would end here."""
    if not torch.is_grad_enabled():
        return
    if any(tensor is not None and tensor.requires_grad for tensor in tensors):
        warnings.warn(
            f"{operation} was given a tensor that requires a gradient, but hands none on. For "
            "training use ep_backend.normal_autograd; else call it under torch.no_grad().",
            stacklevel=4,
        )


def note_overwritten(*tensors: torch.Tensor | None) -> None:
    """Tells autograd, as PyTorch's own operations in place do, that kernels write to these: the
    backward of whatever has kept one for a gradient raises, rather than compute with other rows."""
    # Of an inference tensor nothing is kept, and before PyTorch 2.13 it must not be counted.
    known = [tensor for tensor in tensors if tensor is not None and not tensor.is_inference()]
    if known:
        torch.autograd.graph.increment_version(known)


def check_alignment(name: str, tensor: torch.Tensor, alignment: int) -> None:
    """Raises `ValueError` unless the tensor starts at a multiple of `alignment` bytes."""
    if alignment > 1 and tensor.data_ptr() % alignment != 0:
        excess = tensor.data_ptr() % alignment
        raise ValueError(
            f"{name} starts {excess} bytes behind a multiple of {alignment}, expected one: it is a "
            f"view into the middle of a row. Pass {name}.clone()."
        )


def check_topk_weights(
    topk_weights: torch.Tensor | None,
    shape: tuple[int, int],
    device: torch.device,
    operation: str,
    reduction: str,
) -> None:
    """Raises `ValueError` unless there are weights.

    Args:
        shape: (T, K).
        operation: which needs them with this reduction.
    """
    if topk_weights is None:
        raise ValueError(
            f"topk_weights was not given to {operation}, which needs them with reduction "
            f"{reduction!r}. Pass float32 weights of shape {list(shape)}."
        )
    check_tensor("topk_weights", topk_weights, shape, (torch.float32,), device)


def check_x_scales(
    x: torch.Tensor, x_scales: torch.Tensor | None, num_scales: int, device: torch.device
) -> None:
    """Raises `ValueError` unless float8 `x`, and no other, has its scales.

    Args:
        num_scales: of a row; 0 where rows do not travel as float8.
    """
    if x.dtype == torch.float8_e4m3fn and x_scales is not None:
        check_tensor("x_scales", x_scales, (x.shape[0], num_scales), (torch.float32,), device)
    elif x_scales is None:
        raise ValueError(
            "x has dtype torch.float8_e4m3fn, but x_scales was not given. Pass the float32 scales "
            "of its groups of 128 channels, or x in the buffer's dtype."
        )
    elif num_scales == 0:
        raise ValueError(
            f"x_scales was given, but this buffer sends {x.dtype}. Leave it out, or create the "
            "buffer with dispatch_dtype=torch.float8_e4m3fn."
        )
    else:
        raise ValueError(
            f"x_scales was given with x of {x.dtype}, which the buffer quantises itself. Leave it "
            "out, or pass x as torch.float8_e4m3fn."
        )


def check_int(name: str, value: int, low: int, high: int, why: str = "") -> None:
    """Raises `ValueError` unless `low <= value <= high`."""
    if not isinstance(value, int) or not low <= value <= high:
        raise ValueError(
            f"{name} is {value!r}, expected an integer in {low}..{high}. {why}".strip()
        )


def check_handle(handle: Any, kind: type, buffer: object, elsewhere: str) -> None:
    """Raises `TypeError` unless `handle` is of that kind, and `ValueError`, which says
    `elsewhere`, unless it is of `buffer`."""
    if getattr(handle, "buffer", None) is buffer:
        return
    if not isinstance(handle, kind):
        got = type(handle).__name__
        raise TypeError(f"handle is a {got}, expected a {kind.__name__}. Pass a result's handle.")
    raise ValueError(elsewhere)
