"""`deep_ep.Buffer` as SGLang's dispatcher makes and calls it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist

from ep_backend import LowLatencyBuffer, deep_ep, plugins
from ep_backend.network import NetworkConfig
from ep_backend_sglang import cpu_only

MOST_TOKENS_VARIABLE = "SGLANG_DEEPEP_NUM_MAX_DISPATCH_TOKENS_PER_RANK"
MOST_TOKENS_LIMIT = 1024  # SGLang's
WAYS = ("previous_event", "async_finish", "allocate_on_comm_stream", "return_recv_hook")


class _NumSms:
    """What SGLang keeps from the experts' GEMM of one micro-batch, and our normal kernels take of
    the other's exchange. Low-latency kernels occupy none between a send and its hook."""

    def __get__(self, buffer: Any, cls: Any = None) -> int:
        from sglang.srt.layers.moe.utils import get_deepep_mode

        has_normal_kernels = get_deepep_mode().enable_normal() and not cpu_only.is_active()
        return deep_ep.Buffer.num_sms if has_normal_kernels else 0


class Buffer(deep_ep.Buffer):
    """One per process, of all layers.

    Args:
        group: SGLang's group of the ranks that exchange, of any backend.
        arguments, options: of `deep_ep.Buffer`.

    Raises:
        NotImplementedError, ValueError: see `deep_ep.Buffer`.
    """

    num_sms = _NumSms()

    def __init__(self, group: dist.ProcessGroup, *arguments: Any, **options: Any) -> None:
        group = gloo_group_of(group)
        super().__init__(group, *arguments, timeout_secs=plugins.timeout_secs(), **options)
        self._weights_at_dispatch: torch.Tensor | None = None
        self.is_at_once = False
        """See `at_once`."""

    @contextmanager
    def weights_at_dispatch(self, topk_weights: torch.Tensor) -> Iterator[None]:
        """Low-latency dispatches meanwhile send these, `[T, K]` float32: rows are weighted and
        added up where the experts are. Their combines are given the same tensor, as SGLang does."""
        self._weights_at_dispatch = topk_weights
        try:
            yield
        finally:
            self._weights_at_dispatch = None

    @contextmanager
    def at_once(self) -> Iterator[None]:
        """Calls meanwhile send and receive on the current stream, whatever way they are asked for:
        their hooks do nothing, and there is nothing to wait for in their events."""
        self.is_at_once = True
        try:
            yield
        finally:
            self.is_at_once = False

    def low_latency_dispatch(
        self,
        x: torch.Tensor,
        topk_idx: torch.Tensor,
        num_max_dispatch_tokens_per_rank: int,
        num_experts: int,
        *arguments: Any,
        use_nvfp4: bool = False,
        x_global_scale: torch.Tensor | None = None,
        **options: Any,
    ) -> Any:
        """`deep_ep.Buffer.low_latency_dispatch`, and what SGLang knows beside DeepEP.

        Args:
            use_nvfp4: must be False.
            x_global_scale: not used: it belongs to nvfp4.

        Raises:
            NotImplementedError: `use_nvfp4` is True.
            ValueError: `x` has more rows than the server was started for; nothing was sent.
        """
        if use_nvfp4:
            raise NotImplementedError(
                "experts want nvfp4 rows, but dispatch sends bfloat16 or float8. Pass "
                "--deepep-dispatcher-output-dtype bf16, if these experts take that."
            )
        most = num_max_dispatch_tokens_per_rank
        require_room(x.shape[0], most)
        options.setdefault("topk_weights", self._weights_at_dispatch)
        options = self._options(options)
        return super().low_latency_dispatch(x, topk_idx, most, num_experts, *arguments, **options)

    def low_latency_combine(self, *arguments: Any, **options: Any) -> Any:
        return super().low_latency_combine(*arguments, **self._options(options))

    def get_dispatch_layout(self, *arguments: Any, **options: Any) -> Any:
        return super().get_dispatch_layout(*arguments, **self._options(options))

    def dispatch(self, *arguments: Any, **options: Any) -> Any:
        return super().dispatch(*arguments, **self._options(options))

    def combine(self, *arguments: Any, **options: Any) -> Any:
        return super().combine(*arguments, **self._options(options))

    def low_latency_by_token(
        self,
        x: torch.Tensor,
        topk_idx: torch.Tensor,
        num_max_tokens: int,
        num_experts: int,
        num_workspaces: int,
    ) -> LowLatencyBuffer:
        """Rank-major, for dispatches of such `x` `[T, H]` with `topk_idx` `[T, K]`. With one
        workspace operations are sent and received at once, see `at_once`."""
        return self._buffer_for(
            LowLatencyBuffer,
            x.device,
            num_max_tokens_per_rank=num_max_tokens,
            hidden=x.shape[1],
            num_experts=num_experts,
            top_k=topk_idx.shape[1],
            dtype=x.dtype,
            output_layout="rank_major",
            num_workspaces=num_workspaces,
            with_hooks=num_workspaces != 1,
        )

    def _options(self, options: dict[str, Any]) -> dict[str, Any]:
        """Of a call; SGLang names those that say where it runs."""
        if not self.is_at_once:
            return options
        return {name: value for name, value in options.items() if name not in WAYS}


def has_workspaces() -> bool:
    """Whether ranks see each other's memory: on the GPUs of one host."""
    from sglang.srt.runtime_context import get_server_args

    is_one_host = get_server_args().nnodes == 1 and NetworkConfig.from_env() is None
    return is_one_host and not cpu_only.is_active()


def require_room(num_tokens: int, most: int) -> None:
    """Raises for a step with more tokens on a rank than low-latency kernels were given room for.

    Raises:
        ValueError: it has.
    """
    if num_tokens > most:
        raise ValueError(
            f"a step has {num_tokens} tokens on this rank, but dispatch takes at most {most}, "
            f"as {MOST_TOKENS_VARIABLE} says. Set it to {num_tokens} or more (SGLang allows "
            f"{MOST_TOKENS_LIMIT}), or make steps smaller: --chunked-prefill-size for prefill, "
            "--max-running-requests for decode."
        )


def gloo_group_of(group: dist.ProcessGroup) -> dist.ProcessGroup:
    """The gloo group of the same ranks, in which ranks meet at set-up.

    Raises:
        ValueError: SGLang has none.
    """
    if dist.get_backend(group) == "gloo":
        return group
    from sglang.srt.distributed.parallel_state import get_tp_group

    coordinator = get_tp_group()
    if coordinator.device_group is not group or dist.get_backend(coordinator.cpu_group) != "gloo":
        raise ValueError(
            f"the group has backend {dist.get_backend(group)!r} and is not that of SGLang's tensor "
            "parallelism, or that has no gloo group beside it: ranks need one to meet. Leave "
            "--elastic-ep-backend out."
        )
    return coordinator.cpu_group
