"""`x` of a normal dispatch of `deep_ep.Buffer`: rows, or float8 rows and their scales.

T tokens of this rank, N rows received, H hidden, S = ceil(H / 128) scales of a float8 row.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from ep_backend.checks import AtMost, check_tensor
from ep_backend.deep_ep_arguments import X_DTYPES
from ep_backend.normal_checks import MAX_TOKENS
from ep_backend.normal_handles import NormalDispatchResult
from ep_backend.reference import CHANNELS_PER_SCALE, unpack_ue8m0

RowsOrPair = torch.Tensor | tuple[torch.Tensor, torch.Tensor]
FLOAT8 = torch.float8_e4m3fn


@dataclass(frozen=True)
class Rows:
    """As `NormalBuffer.dispatch` takes them."""

    x: torch.Tensor
    """`[T, H]`."""
    scales: torch.Tensor | None
    """`[T, S]` float32, of float8 rows."""
    scale_format: str
    given_scales: tuple[int, ...]
    """Shape of one row's scales as they were given: `()` or `(1,)` where a row has only one."""

    @property
    def settings(self) -> dict[str, Any]:
        """What of a `NormalBuffer` they decide. Rows that DeepEP combines are bfloat16."""
        dtype = torch.bfloat16 if self.x.dtype == FLOAT8 else self.x.dtype
        return dict(
            hidden=self.x.shape[1],
            dtype=dtype,
            dispatch_dtype=self.x.dtype,
            scale_format=self.scale_format,
        )

    def received(self, result: NormalDispatchResult) -> RowsOrPair:
        """`[N, H]`, and scales in the form in which they were given."""
        scales = result.recv_scales
        if scales is None:
            return result.recv_x
        if self.given_scales in ((), (1,)):
            scales = scales[:, 0].reshape(-1, *self.given_scales).contiguous()
        return result.recv_x, scales


def rows_of(x: Any) -> Rows:
    """
    Args:
        x: `[T, H]` bfloat16 or float32; or a pair of `[T, H]` float8_e4m3fn and its scales:
            `[T, S]` float32, `[T, ceil(S / 4)]` int32, which are four exponents a word, the lowest
            first, or `[T]` or `[T, 1]` float32, one for a row. Scales may have any strides.

    Raises:
        ValueError: wrong shape or dtype.
    """
    if isinstance(x, torch.Tensor):
        _check_rows("x", x, X_DTYPES)
        return Rows(x, None, "float32", ())
    if not isinstance(x, (tuple, list)) or len(x) != 2:
        raise ValueError("x is neither a tensor nor a pair of float8 rows and their scales.")
    rows, scales = x
    _check_rows("x[0]", rows, (FLOAT8,))
    if scales.device != rows.device:
        raise ValueError(f"x[1], the scales, is on {scales.device}, but x[0] on {rows.device}.")
    num_tokens, num_scales = len(rows), -(-rows.shape[1] // CHANNELS_PER_SCALE)
    full = (num_tokens, num_scales)
    if scales.dtype == torch.float32 and scales.shape == full:
        return Rows(rows, scales.contiguous(), "float32", (num_scales,))
    if scales.dtype == torch.int32 and scales.shape == (num_tokens, -(-num_scales // 4)):
        return Rows(rows, unpack_ue8m0(scales, num_scales), "ue8m0", tuple(scales.shape[1:]))
    if scales.dtype == torch.float32 and scales.shape in ((num_tokens,), (num_tokens, 1)):
        expanded = scales.reshape(-1, 1).expand(full).contiguous()
        return Rows(rows, expanded, "float32", tuple(scales.shape[1:]))
    raise ValueError(
        f"x[1], the scales, has dtype {scales.dtype} and shape {list(scales.shape)}, expected "
        f"float32 and {list(full)} or [{num_tokens}], or int32 and "
        f"[{num_tokens}, {-(-num_scales // 4)}], which are exponents."
    )


def tensors_of(x: Any) -> tuple[torch.Tensor, ...]:
    """Of rows, or of a pair."""
    return tuple(x) if isinstance(x, (tuple, list)) else (x,)


def device_of(x: Any) -> torch.device:
    """Of rows, or of a pair; of anything else, which `rows_of` refuses, the CPU."""
    for tensor in tensors_of(x):
        if isinstance(tensor, torch.Tensor):
            return tensor.device
    return torch.device("cpu")


def _check_rows(name: str, rows: torch.Tensor, dtypes: tuple[torch.dtype, ...]) -> None:
    shape = (AtMost(MAX_TOKENS), *rows.shape[-1:])
    check_tensor(name, rows, shape, dtypes, rows.device)
