"""Arguments of the low-latency half of `deep_ep.Buffer`: what `LowLatencyBuffer` calls them, and
which it refuses."""

from __future__ import annotations

from typing import NoReturn

import torch

X_DTYPES = (torch.bfloat16, torch.float32)


def scale_format_of(use_fp8: bool, round_scale: bool, use_ue8m0: bool) -> str:
    """`LowLatencyBuffer`'s name of a scale format. Raises `ValueError` for what there is not."""
    if not use_fp8:
        return "float32"
    if use_ue8m0 and not round_scale:
        raise ValueError(
            "use_ue8m0 is True, but round_scale is False: an exponent can only say powers of two. "
            "Pass round_scale=True."
        )
    if use_ue8m0:
        return "ue8m0"
    return "power_of_two" if round_scale else "float32"


def reduction_for(topk_weights: torch.Tensor | None) -> str:
    """`LowLatencyBuffer`'s reduction for weights that dispatch was given, or was not."""
    return "source" if topk_weights is None else "rank"


def weights_for_combine(
    sent: torch.Tensor | None, topk_weights: torch.Tensor | None
) -> torch.Tensor | None:
    """What `LowLatencyBuffer.combine` is to be given.

    Args:
        sent: the weights that dispatch was given, or None.
        topk_weights: those that combine was.

    Raises:
        ValueError: both were given, and are not the same tensor.
    """
    if sent is None:
        return topk_weights
    if topk_weights is None or _is_same(topk_weights, sent):
        return None
    raise ValueError(
        "topk_weights is another tensor than low_latency_dispatch was given, whose weights have "
        "been sent. Pass that tensor or None, or leave topk_weights out at dispatch."
    )


def _is_same(a: torch.Tensor, b: torch.Tensor) -> bool:
    # Not by value: on a GPU that would wait for the device.
    return a.data_ptr() == b.data_ptr() and a.shape == b.shape and a.dtype == b.dtype


def refuse_both(async_finish: bool, return_recv_hook: bool) -> None:
    if async_finish and return_recv_hook:
        raise ValueError(
            "async_finish and return_recv_hook are both True. Pass one of them: before the hook "
            "there is no end to mark."
        )


def refuse_wait_stats(name: str) -> NoReturn:
    # CPU kernels count waits in total, CUDA kernels not those for tagged words: neither is the time
    # that DeepEP adds up for each source rank.
    raise NotImplementedError(
        f"{name} was given, but waits are not measured for each source rank. Leave it out."
    )


def refuse_masking(what: str) -> NoReturn:
    raise NotImplementedError(
        f"{what}, but dead ranks cannot be masked: a wait for one ends in PeerTimeout, which names "
        "it, and a Buffer must then be created anew."
    )
