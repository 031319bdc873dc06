"""What normal dispatch and combine refuse before anything is sent.

T tokens of this rank, N rows received, H hidden, K top_k.
"""

from __future__ import annotations

import torch

from ep_backend.checks import (
    AtMost,
    check_handle,
    check_int,
    check_tensor,
    check_x_scales,
    note_overwritten,
    warn_of_gradients,
)
from ep_backend.low_latency import INDEX_DTYPES
from ep_backend.normal_handles import NormalDispatchHandle

MAX_TOKENS = (1 << 31) - 1
"""Of a batch; also the most rows that a rank may ask for."""

Bias = torch.Tensor | tuple[torch.Tensor, torch.Tensor] | None


class ArgumentChecks:
    """Of a buffer's arguments, by its shape. Each raises `ValueError`, which names the limit."""

    device: torch.device
    hidden: int
    top_k: int
    dtype: torch.dtype
    num_scales: int
    _x_dtypes: tuple[torch.dtype, ...]

    def _check_rows(
        self,
        x: torch.Tensor,
        x_scales: torch.Tensor | None,
        num_worst_tokens: int,
        expert_alignment: int,
    ) -> None:
        check_tensor("x", x, (AtMost(MAX_TOKENS), self.hidden), self._x_dtypes, self.device)
        if x_scales is not None or x.dtype != self.dtype:
            check_x_scales(x, x_scales, self.num_scales, self.device)
        warn_of_gradients("dispatch", x)
        check_int("num_worst_tokens", num_worst_tokens, 0, MAX_TOKENS)
        check_int("expert_alignment", expert_alignment, 1, MAX_TOKENS)

    def _check_routing(
        self, num_tokens: int, topk_idx: torch.Tensor | None, topk_weights: torch.Tensor | None
    ) -> None:
        if topk_idx is None or topk_weights is None:
            missing = "topk_idx" if topk_idx is None else "topk_weights"
            raise ValueError(
                f"{missing} was not given. Pass topk_idx and topk_weights of shape "
                f"[{num_tokens}, {self.top_k}], or the handle of an earlier dispatch."
            )
        shape = (num_tokens, self.top_k)
        check_tensor("topk_idx", topk_idx, shape, INDEX_DTYPES, self.device)
        check_tensor("topk_weights", topk_weights, shape, (torch.float32,), self.device)
        warn_of_gradients("dispatch", topk_weights)

    def _check_cached(
        self,
        num_tokens: int,
        handle: NormalDispatchHandle,
        topk_idx: torch.Tensor | None,
        topk_weights: torch.Tensor | None,
        num_worst_tokens: int,
    ) -> None:
        self._check_handle(handle)
        if topk_idx is not None or topk_weights is not None:
            raise ValueError(
                "topk_idx or topk_weights was given together with a handle, whose routing is used "
                "again. Leave them out, or leave the handle out."
            )
        if num_worst_tokens != 0:
            raise ValueError(
                f"num_worst_tokens is {num_worst_tokens}, but the handle's dispatch has decided on "
                f"{handle.num_rows} rows. Leave it out."
            )
        if num_tokens != handle.num_tokens:
            raise ValueError(
                f"x has {num_tokens} tokens, but the handle's dispatch had {handle.num_tokens}. "
                "Pass as many, or leave the handle out."
            )

    def _check_combine(
        self,
        x: torch.Tensor,
        handle: NormalDispatchHandle,
        out: torch.Tensor | None,
        topk_weights: torch.Tensor | None,
        bias: Bias,
    ) -> list[torch.Tensor | None]:
        """Gives two biases."""
        self._check_handle(handle)
        rows, dtypes = (handle.num_rows, self.hidden), (self.dtype,)
        check_tensor("x", x, rows, dtypes, self.device, "It has a row for each row of recv_x.")
        home = (handle.num_tokens, self.hidden)
        if out is not None:
            check_tensor("out", out, home, dtypes, self.device)
            note_overwritten(out)
        if topk_weights is not None:
            shape = (handle.num_rows, self.top_k)
            check_tensor("topk_weights", topk_weights, shape, (torch.float32,), self.device)
        biases = self._check_bias(bias, home)
        warn_of_gradients("combine", x, topk_weights, out, *biases)
        return biases

    def _check_bias(self, bias: Bias, home: tuple[int, int]) -> list[torch.Tensor | None]:
        """Both of a pair, or what stands for them."""
        pair = (bias, None) if bias is None or isinstance(bias, torch.Tensor) else bias
        if len(pair) != 2:
            raise ValueError(f"bias has {len(pair)} tensors, expected one, or a pair.")
        for one in pair:
            if one is not None:
                check_tensor("bias", one, home, (self.dtype,), self.device)
        return list(pair)

    def _check_handle(self, handle: NormalDispatchHandle) -> None:
        elsewhere = (
            "the handle comes from another buffer. Use the buffer that dispatched the tokens."
        )
        check_handle(handle, NormalDispatchHandle, self, elsewhere)
