"""The low-latency half of `deep_ep.Buffer`, on top of `LowLatencyBuffer`.

T tokens of this rank (T <= M), M num_max_dispatch_tokens_per_rank, H hidden, K top_k, E experts,
R ranks, L experts of this rank, S = R * M rows an expert can receive, N = ceil(H / 128).

This file is long because a signature and its contract are: there is little between them.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NoReturn

import torch

from ep_backend import _native
from ep_backend.checks import AtMost, check_tensor
from ep_backend.deep_ep_arguments import (
    X_DTYPES,
    reduction_for,
    refuse_both,
    refuse_masking,
    refuse_wait_stats,
    scale_format_of,
    weights_for_combine,
)
from ep_backend.deep_ep_base import BufferBase
from ep_backend.deep_ep_handle import LowLatencyHandle
from ep_backend.errors import OrderError
from ep_backend.events import EventOverlap
from ep_backend.group import Group
from ep_backend.low_latency import LowLatencyBuffer
from ep_backend.network import NetworkConfig
from ep_backend.settings import BufferSettings

Hook = Callable[[], None]

NUM_BANKS = 2
"""DeepEP has two sets of buffers."""
MAX_TOP_K_OF_DEEP_EP = 11


class LowLatencyCalls(BufferBase):
    """Every dispatch and every combine is sent by its call and received by its hook."""

    def __init__(self, group: Group, timeout_secs: float) -> None:
        super().__init__(group, timeout_secs)
        # By buffer and bank: the tensor, and the dispatch whose experts may write to it.
        self._combine_inputs: dict[tuple[LowLatencyBuffer, int], tuple[torch.Tensor, int]] = {}

    @staticmethod
    def get_low_latency_rdma_size_hint(
        num_max_dispatch_tokens_per_rank: int,
        hidden: int,
        num_ranks: int,
        num_experts: int,
        *,
        top_k: int = MAX_TOP_K_OF_DEEP_EP,
        over_network: bool = False,
    ) -> int:
        """Bytes of shared memory that bfloat16 `x` of this shape takes on every rank at most,
        whichever way it travels and wherever it is weighted. For who plans memory: a `Buffer` need
        not be told, and takes it once for each shape and way that it is used with.

        Args:
            top_k: ours: experts of a token at most. Default: as many as DeepEP allows.
            over_network: ours: ranks are on several hosts, so that what is sent is staged, too.

        Raises:
            ValueError: an argument is out of range.
        """

        def num_bytes(link: str, reduction: str, dispatch_dtype: torch.dtype) -> int:
            device = "cpu" if link == "shm" else "cuda"
            settings = BufferSettings(
                num_max_tokens_per_rank=num_max_dispatch_tokens_per_rank,
                hidden=hidden,
                num_experts=num_experts,
                top_k=top_k,
                dtype=torch.bfloat16,
                dispatch_dtype=dispatch_dtype,
                combine_dtype=torch.bfloat16,
                scale_format="float32",
                output_layout="expert_major",
                reduction=reduction,
                transfer="pull",
                num_max_tagged_tokens=None,
                num_workspaces=0,
                expert_ids="local",
                num_banks=NUM_BANKS,
                device=device,
                network=NetworkConfig() if link == "rdma" else None,
            )
            if device == "cpu":  # a CPU may plan for a GPU that it does not have
                settings.check(num_ranks)
            layout = _native.LowLatencyLayout(settings.config(num_ranks))
            return _native.NetworkLayout(layout).num_bytes if link == "rdma" else layout.num_bytes

        return max(
            num_bytes(link, reduction, dispatch_dtype)
            for link in (("shm", "p2p", "rdma") if over_network else ("shm", "p2p"))
            for reduction in ("source", "rank")
            for dispatch_dtype in (torch.bfloat16, torch.float8_e4m3fn)
        )

    def clean_low_latency_buffer(
        self, num_max_dispatch_tokens_per_rank: int, hidden: int, num_experts: int
    ) -> None:
        """Does nothing: no other operation writes to this memory, and what is left there from an
        earlier one carries its epoch, so that it is never taken for new."""

    def low_latency_dispatch(
        self,
        x: torch.Tensor,
        topk_idx: torch.Tensor,
        num_max_dispatch_tokens_per_rank: int,
        num_experts: int,
        cumulative_local_expert_recv_stats: torch.Tensor | None = None,
        dispatch_wait_recv_cost_stats: torch.Tensor | None = None,
        use_fp8: bool = True,
        round_scale: bool = False,
        use_ue8m0: bool = False,
        async_finish: bool = False,
        return_recv_hook: bool = False,
        *,
        topk_weights: torch.Tensor | None = None,
    ) -> tuple[
        torch.Tensor | tuple[torch.Tensor, torch.Tensor],
        torch.Tensor,
        LowLatencyHandle,
        EventOverlap,
        Hook,
    ]:
        """Sends every token to the ranks that own its experts.

        Args:
            x: `[T, H]` bfloat16, or float32. Copied: it may change when this returns.
            topk_idx: `[T, K]` int64 or int32, global expert, -1 = not routed.
            num_max_dispatch_tokens_per_rank: M, the same on all ranks.
            num_experts: E, global.
            cumulative_local_expert_recv_stats: `[L]` int32; the hook adds `recv_count` to it.
            dispatch_wait_recv_cost_stats: must be None.
            use_fp8: rows travel, and are received, as float8_e4m3fn with their scales; else as `x`.
            round_scale: scales are powers of two.
            use_ue8m0: scales are the exponents of those; needs `round_scale`. Without `use_fp8`
                both are ignored.
            async_finish: CUDA: runs on the stream of `Buffer.get_comm_stream()`, behind all that
                the current stream was given, which waits for it when the returned event's
                `current_stream_wait()` is called. Nothing on the CPU.
            return_recv_hook: only send; the hook receives.
            topk_weights: ours: `[T, K]` float32. Weights are applied where the experts are: one row
                a rank comes home instead of one for each expert. Combine is then given this very
                tensor, or None.

        Returns:
            `recv_x` `[L, S, H]`, with `use_fp8` `(recv_x, scales)`: expert e has its tokens in rows
            `0 .. recv_count[e] - 1`, rows behind them hold anything. Overwritten by the hook of the
            second dispatch of this shape from here (with one rank, by its send). Scales are
            `[L, S, N]` float32, or with `use_ue8m0` `[L, S, ceil(N / 4)]` int32, four exponents a
            word, the lowest first; those of one channel group lie side by side.
            `recv_count`: `[L]` int32.
            The handle, for combine.
            The event.
            The hook; without `return_recv_hook` all is received and it does nothing.

        Raises:
            NotImplementedError: `dispatch_wait_recv_cost_stats` was given.
            ValueError: wrong shape, dtype, expert or combination of arguments; nothing was sent.
            OrderError: two dispatches of this shape wait for their hooks; or one does, and this
                call has no `return_recv_hook`.
            SettingsMismatch, RendezvousError: at the first use of a shape: ranks disagree about it,
                or one is missing.
            PeerTimeout: a peer did not come in time.
        """
        refuse_both(async_finish, return_recv_hook)
        if dispatch_wait_recv_cost_stats is not None:
            refuse_wait_stats("dispatch_wait_recv_cost_stats")
        check_tensor(
            "x",
            x,
            (AtMost(num_max_dispatch_tokens_per_rank), *x.shape[-1:]),
            X_DTYPES,
            x.device,
            remedy="It has at most num_max_dispatch_tokens_per_rank rows.",
        )
        if topk_idx.dim() != 2:
            raise ValueError(f"topk_idx has shape {list(topk_idx.shape)}, expected [T, top_k].")
        buffer = self._buffer_for(
            LowLatencyBuffer,
            x.device,
            num_banks=NUM_BANKS,
            num_max_tokens_per_rank=num_max_dispatch_tokens_per_rank,
            hidden=x.shape[1],
            num_experts=num_experts,
            top_k=topk_idx.shape[1],
            dtype=x.dtype,
            dispatch_dtype=torch.float8_e4m3fn if use_fp8 else x.dtype,
            scale_format=scale_format_of(use_fp8, round_scale, use_ue8m0),
            reduction=reduction_for(topk_weights),
        )
        stats = cumulative_local_expert_recv_stats
        if stats is not None:
            shape, name = (buffer.num_local_experts,), "cumulative_local_expert_recv_stats"
            check_tensor(name, stats, shape, (torch.int32,), buffer.device)

        streams = self._streams_of(buffer.device)
        with streams.operation(async_finish=async_finish) as operation:
            operation.reads(x, topk_idx, topk_weights, stats)
            recv_hook: Hook = _do_nothing
            if return_recv_hook:
                result, recv_hook = buffer.dispatch(x, topk_idx, topk_weights)
            else:
                result = buffer.dispatch_and_receive(x, topk_idx, topk_weights)
            recv_count = result.num_recv_tokens_per_expert
            if stats is not None and not return_recv_hook:
                stats.add_(recv_count)
            operation.writes(result.handle.storage)

        def receive() -> None:
            with streams.operation():
                recv_hook()
                if stats is not None:
                    stats.add_(recv_count)

        scales = result.recv_scales
        return (
            result.recv_x if scales is None else (result.recv_x, scales),
            recv_count,
            LowLatencyHandle(self, result.handle, topk_weights),
            operation.event,
            receive if return_recv_hook else _do_nothing,
        )

    def low_latency_combine(
        self,
        x: torch.Tensor,
        topk_idx: torch.Tensor,
        topk_weights: torch.Tensor | None,
        handle: LowLatencyHandle,
        use_logfmt: bool = False,
        zero_copy: bool = False,
        async_finish: bool = False,
        return_recv_hook: bool = False,
        out: torch.Tensor | None = None,
        combine_wait_recv_cost_stats: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, EventOverlap, Hook]:
        """Brings the weighted sum of a token's expert rows home.

        Args:
            x: `[L, S, H]` of dispatch's `x.dtype`, the experts' rows, not weighted. Rows behind the
                counts are not read. It may change when this returns.
            topk_idx: `[T, K]`, as dispatch was given them. Only the shape is looked at: the handle
                knows where the rows came from.
            topk_weights: `[T, K]` float32; must not change before the hook has returned. Where
                dispatch was given them: the same tensor, or None.
            handle: of a dispatch that has been received.
            use_logfmt: must be False.
            zero_copy: the rows are in the tensor of `get_next_low_latency_combine_buffer(handle)`;
                of `x` only shape and dtype are looked at.
            async_finish, return_recv_hook: as in dispatch.
            out: `[T, H]`, where the result goes; default: a new tensor.
            combine_wait_recv_cost_stats: must be None.

        Returns:
            `[T, H]`, the event and the hook. A token without experts is 0.

        Raises:
            NotImplementedError: `use_logfmt`, or `combine_wait_recv_cost_stats` was given.
            ValueError: wrong shape or dtype, other weights than dispatch was given, or a handle of
                another `Buffer`; nothing was sent.
            OrderError: the dispatch was not received, two combines of this shape wait for their
                hooks, or `zero_copy` without a combine buffer of this handle.
            PeerTimeout: a peer did not come in time.
        """
        refuse_both(async_finish, return_recv_hook)
        if use_logfmt:
            raise NotImplementedError(
                "use_logfmt is True, but here combine sends rows in the dtype of x only. Leave it "
                "out, or, for rows of float8, use ep_backend.LowLatencyBuffer with "
                "combine_dtype=torch.float8_e4m3fn."
            )
        if combine_wait_recv_cost_stats is not None:
            refuse_wait_stats("combine_wait_recv_cost_stats")
        buffer = self._buffer_of(handle)
        dispatch_handle = handle.dispatch_handle
        rows = (buffer.num_local_experts, buffer.expert_capacity, buffer.hidden)
        check_tensor("x", x, rows, (buffer.dtype,), buffer.device)
        if topk_idx.shape != (dispatch_handle.num_tokens, buffer.top_k):
            raise ValueError(
                f"topk_idx has shape {list(topk_idx.shape)}, expected "
                f"[{dispatch_handle.num_tokens}, {buffer.top_k}], as dispatch was given."
            )
        weights = weights_for_combine(handle.topk_weights, topk_weights)
        if zero_copy:
            x = self._combine_input_of(handle)
        streams = self._streams_of(buffer.device)
        with streams.operation(async_finish=async_finish) as operation:
            if return_recv_hook:
                combined, recv_hook = buffer.combine(x, dispatch_handle, out, weights)
            else:
                combined = buffer.combine_and_receive(x, dispatch_handle, out, weights)
            operation.reads(x, weights, out, dispatch_handle.storage)
            operation.writes(combined if out is None else None)
        if not return_recv_hook:
            return combined, operation.event, _do_nothing

        def receive() -> None:
            with streams.operation():
                recv_hook()

        return combined, operation.event, receive

    def get_next_low_latency_combine_buffer(self, handle: LowLatencyHandle) -> torch.Tensor:
        """`[L, S, H]` of dispatch's `x.dtype`, contiguous, for the experts to write to and for a
        combine of this handle with `zero_copy`.

        Our kernels read any `x` where it is, so this saves an allocation, not a copy. Valid until
        the second dispatch of this shape from here asks for its own.

        Raises:
            ValueError: a handle of another `Buffer`.
        """
        buffer = self._buffer_of(handle)
        key, epoch = self._combine_input_key(handle)
        held = self._combine_inputs.get(key)
        if held is None:
            shape = (buffer.num_local_experts, buffer.expert_capacity, buffer.hidden)
            tensor = torch.empty(shape, dtype=buffer.dtype, device=buffer.device)
        else:
            tensor = held[0]
        self._combine_inputs[key] = tensor, epoch
        return tensor

    # Methods that refuse, rather than none: whoever handles dead ranks learns why it cannot.
    def low_latency_update_mask_buffer(self, rank_to_mask: int, mask: bool = False) -> NoReturn:
        """Raises `NotImplementedError`: ranks cannot be masked."""
        refuse_masking("low_latency_update_mask_buffer was called")

    def low_latency_query_mask_buffer(self, mask_status: torch.Tensor) -> NoReturn:
        """Raises `NotImplementedError`: ranks cannot be masked."""
        refuse_masking("low_latency_query_mask_buffer was called")

    def low_latency_clean_mask_buffer(self) -> NoReturn:
        """Raises `NotImplementedError`: ranks cannot be masked."""
        refuse_masking("low_latency_clean_mask_buffer was called")

    def _buffer_of(self, handle: LowLatencyHandle) -> LowLatencyBuffer:
        self._require_alive()
        if not isinstance(handle, LowLatencyHandle) or handle.owner is not self:
            raise ValueError(
                "handle is not one that low_latency_dispatch of this Buffer returned. Combine on "
                "the Buffer that dispatched."
            )
        return handle.dispatch_handle.buffer

    def _combine_input_key(
        self, handle: LowLatencyHandle
    ) -> tuple[tuple[LowLatencyBuffer, int], int]:
        buffer, epoch = handle.dispatch_handle.buffer, handle.dispatch_handle.epoch
        return (buffer, epoch % buffer.num_banks), epoch

    def _combine_input_of(self, handle: LowLatencyHandle) -> torch.Tensor:
        key, epoch = self._combine_input_key(handle)
        tensor, epoch_of_tensor = self._combine_inputs.get(key, (None, 0))
        if tensor is None or epoch_of_tensor != epoch:
            raise OrderError(
                "zero_copy is True, but get_next_low_latency_combine_buffer was not called with "
                f"the handle of dispatch {epoch}, or was called for a later dispatch since. Write "
                "the rows to the tensor that it returns, then combine."
            )
        return tensor


def _do_nothing() -> None:
    pass
