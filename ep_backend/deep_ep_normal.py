"""The normal half of `deep_ep.Buffer`, on top of `NormalBuffer`.

T tokens of this rank, N rows received, H hidden, K top_k, E experts, R ranks, L experts of this
rank, S = ceil(H / 128) scales of a float8 row.
"""

from __future__ import annotations

import torch

from ep_backend.checks import check_tensor
from ep_backend.deep_ep_base import BufferBase
from ep_backend.deep_ep_config import Config
from ep_backend.deep_ep_cuda_handle import handle_of
from ep_backend.deep_ep_handle import NormalHandle
from ep_backend.deep_ep_routing import (
    Routing,
    expert_counts_of_all,
    layout_of,
    routing_of_experts,
    routing_of_ranks,
)
from ep_backend.deep_ep_rows import Rows, RowsOrPair, device_of, rows_of, tensors_of
from ep_backend.events import EventOverlap, check_overlap
from ep_backend.network import spans_nodes
from ep_backend.normal import NormalBuffer
from ep_backend.normal_checks import Bias
from ep_backend.normal_cuda_settings import CudaNormalSettings
from ep_backend.normal_handles import NormalDispatchResult
from ep_backend.normal_network_settings import network_settings_of
from ep_backend.normal_settings import NormalSettings

MOST_BYTES = 64 << 20
"""Of memory that a shape takes on the CPU; larger batches travel in rounds."""
CUDA_BYTES = 256 << 20
"""Of GPU memory that a shape takes where the caller does not say."""


OfRouting = tuple[torch.Tensor | None, torch.Tensor | None, list[int] | None, NormalHandle | None]
"""What a dispatch finds out: experts and weights of its rows, counts, and the handle."""


class NormalCalls(BufferBase):
    """Every call sends and receives. On the CPU its results are there when it returns; so
    `previous_event`, `async_finish` and `allocate_on_comm_stream` change nothing but what they
    refuse together, and no call reads its `config`.

    On CUDA tensors a call runs on the current stream; with `previous_event` or `async_finish` on
    the stream of `Buffer.get_comm_stream()`, behind that event, or behind all that the current
    stream was given; with `async_finish` the current stream waits for it when the returned event's
    `current_stream_wait()` is called. The host waits in dispatch alone, and only for exact sizes.
    """

    num_nvl_bytes: int
    num_sms: int

    def get_dispatch_layout(
        self,
        topk_idx: torch.Tensor,
        num_experts: int,
        previous_event: EventOverlap | None = None,
        async_finish: bool = False,
        allocate_on_comm_stream: bool = False,
    ) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor, torch.Tensor, EventOverlap]:
        """Counts where tokens go. Not collective.

        Args:
            topk_idx: `[T, K]` int64 or int32, global expert, -1 = not routed.
            num_experts: E.

        Returns:
            `num_tokens_per_rank` `[R]` int32; None, as there are no ranks behind RDMA;
            `num_tokens_per_expert` `[E]` int32; `is_token_in_rank` `[T, R]` bool; the event. A
            token that lists an expert twice counts once.

        Raises:
            ValueError: wrong shape or dtype; on a CPU also a wrong expert.
            EPBackendError: `topk_idx` is on another GPU than the thread's current one.
        """
        self._check_call(previous_event, async_finish, allocate_on_comm_stream)
        streams = self._streams_of(topk_idx.device)
        with streams.operation(previous_event, async_finish) as operation:
            operation.reads(topk_idx)
            num_ranks = self._group.num_ranks
            layout = layout_of(topk_idx, num_experts, num_ranks, operation.stream)
            tensors = (
                layout.num_tokens_per_rank,
                layout.num_tokens_per_expert,
                layout.is_token_in_rank,
            )
            operation.writes(*tensors)
        per_rank, per_expert, is_token_in_rank = tensors
        return per_rank, None, per_expert, is_token_in_rank, operation.event

    def dispatch(
        self,
        x: RowsOrPair,
        handle: NormalHandle | None = None,
        num_tokens_per_rank: torch.Tensor | None = None,
        num_tokens_per_rdma_rank: torch.Tensor | None = None,
        is_token_in_rank: torch.Tensor | None = None,
        num_tokens_per_expert: torch.Tensor | None = None,
        topk_idx: torch.Tensor | None = None,
        topk_weights: torch.Tensor | None = None,
        expert_alignment: int = 1,
        num_worst_tokens: int = 0,
        config: Config | None = None,
        previous_event: EventOverlap | None = None,
        async_finish: bool = False,
        allocate_on_comm_stream: bool = False,
    ) -> tuple[
        RowsOrPair,
        torch.Tensor | None,
        torch.Tensor | None,
        list[int] | None,
        NormalHandle | None,
        EventOverlap,
    ]:
        """Brings every token once to each rank that owns one of its experts.

        Args:
            x: `[T, H]` bfloat16 or float32, or a pair of `[T, H]` float8_e4m3fn and its scales:
                `[T, S]` float32, `[T, ceil(S / 4)]` int32, which are packed exponents, or `[T]`
                float32.
            handle: of an earlier dispatch, whose routing is used again for as many tokens, of any
                dtype. Then no layout, `topk_idx` or `topk_weights` is given.
            num_tokens_per_rank, is_token_in_rank, num_tokens_per_expert: of `get_dispatch_layout`.
                The last is needed: it says how many experts there are.
            num_tokens_per_rdma_rank: not used.
            topk_idx, topk_weights: `[T, K]` int64 or int32 and float32, both or none. Without them
                rows go where `is_token_in_rank` says, which is needed then; to 64 ranks at most.
            expert_alignment: counts are rounded up to multiples of this.
            num_worst_tokens: if not 0, rows of what is received, however few come: the sum of all
                ranks' tokens is always enough. On CUDA the host does not wait then, and a graph can
                capture the call; without `topk_idx` every rank gives it, or none.
            config: CUDA: its `num_sms`, or as many as there are for a rank; 0: as the buffer
                thinks best. Default: of `set_num_sms`.

        Returns:
            `recv_x` `[N, H]`, ordered by source rank, then token; of a pair, a pair, its scales in
            the form of `x`'s. Rows behind N hold anything.
            `recv_topk_idx` `[N, K]` of `topk_idx`'s dtype: local experts at their k, -1 elsewhere
            and behind N; None without `topk_idx`.
            `recv_topk_weights` `[N, K]` float32: theirs, 0 elsewhere; None without `topk_weights`.
            `num_recv_tokens_per_expert_list`: L integers; empty with `num_worst_tokens`.
            The handle, for combine and for later dispatches; and the event.
            With a handle all but the first and the last are None.

        Raises:
            ValueError: wrong shape, dtype, expert or combination of arguments; nothing was sent. Or
                more rows came than `num_worst_tokens`. On CUDA both this and a wrong expert may be
                raised by a later call.
            SettingsMismatch, RendezvousError: at the first use of a shape: ranks disagree about it,
                or one is missing.
            PeerTimeout: a peer did not come in time.
        """
        self._check_call(previous_event, async_finish, allocate_on_comm_stream)
        if (topk_idx is None) != (topk_weights is None):
            raise ValueError("topk_idx and topk_weights go together. Pass both, or neither.")
        if handle is not None and (topk_idx is not None or num_worst_tokens != 0):
            raise ValueError(
                "topk_idx or num_worst_tokens was given together with a handle, whose dispatch "
                "has decided on both. Leave them out, or leave the handle out."
            )
        streams = self._streams_of(device_of(x))
        with streams.operation(previous_event, async_finish) as operation:
            rows = rows_of(x)
            operation.reads(*tensors_of(x), topk_idx, topk_weights, is_token_in_rank)
            if handle is not None:
                of_routing: OfRouting = (None, None, None, None)
                received = self._dispatch_again(rows, handle, config)
            else:
                routing = self._routing_of(
                    rows.x,
                    num_tokens_per_rank,
                    is_token_in_rank,
                    num_tokens_per_expert,
                    topk_idx,
                    topk_weights,
                )
                result, handle = self._dispatch_first(
                    rows, routing, expert_alignment, num_worst_tokens, config
                )
                received = rows.received(result)
                if topk_idx is None:
                    assert num_tokens_per_expert is not None
                    counts = self._counts_of_all(
                        num_tokens_per_expert, expert_alignment, num_worst_tokens
                    )
                    of_routing = (None, None, counts, handle)
                else:
                    of_routing = (
                        result.recv_topk_idx.to(topk_idx.dtype),
                        result.recv_topk_weights,
                        counts_of(result),
                        handle,
                    )
            operation.reads(*handle.tensors())
            operation.writes(*tensors_of(received), *handle.tensors(), *of_routing[:2])
        return received, *of_routing, operation.event

    def combine(
        self,
        x: torch.Tensor,
        handle: NormalHandle,
        topk_weights: torch.Tensor | None = None,
        bias: Bias = None,
        config: Config | None = None,
        previous_event: EventOverlap | None = None,
        async_finish: bool = False,
        allocate_on_comm_stream: bool = False,
    ) -> tuple[torch.Tensor, torch.Tensor | None, EventOverlap]:
        """Sends every row home, where a token adds up its rows, in rank order, in float32. Nothing
        is weighted.

        Args:
            x: `[N, H]` of the dtype that was dispatched, bfloat16 where that was float8. Rows
                behind N are not read.
            handle: of the dispatch that brought them.
            topk_weights: `[N, K]` float32, on every rank or on none: they go home too.
            bias: one or two tensors `[T, H]` of `x.dtype`, added behind the rows.
            config: as for dispatch.

        Returns:
            `[T, H]`: a token that went nowhere is 0, or its biases. `[T, K]` float32: of each token
            the sum of its rows' weights, or None. The event.

        Raises:
            ValueError: wrong shape or dtype, or a handle of another `Buffer`; nothing was sent.
            ProtocolError: some ranks have given `topk_weights` and others not.
            PeerTimeout: a peer did not come in time.
        """
        self._check_call(previous_event, async_finish, allocate_on_comm_stream)
        self._check_handle(handle)
        dispatch_handle = handle.of_dtype(x.dtype)
        buffer = dispatch_handle.buffer
        num_sms = self._num_sms_of(config, buffer)
        biases = bias if isinstance(bias, tuple) else (bias,)
        with self._streams_of(buffer.device).operation(previous_event, async_finish) as operation:
            operation.reads(x, topk_weights, *biases, *handle.tensors())
            sums = None
            if topk_weights is None:
                combined = buffer.combine(x, dispatch_handle, bias=bias, num_sms=num_sms)
            else:
                combined, sums = buffer.combine(
                    x, dispatch_handle, topk_weights=topk_weights, bias=bias, num_sms=num_sms
                )
            operation.writes(combined, sums)
        return combined, sums, operation.event

    def _check_call(
        self,
        previous_event: EventOverlap | None,
        async_finish: bool,
        allocate_on_comm_stream: bool,
    ) -> None:
        self._require_alive()
        check_overlap(previous_event, async_finish, allocate_on_comm_stream)

    def _routing_of(
        self,
        x: torch.Tensor,
        num_tokens_per_rank: torch.Tensor | None,
        is_token_in_rank: torch.Tensor | None,
        num_tokens_per_expert: torch.Tensor | None,
        topk_idx: torch.Tensor | None,
        topk_weights: torch.Tensor | None,
    ) -> Routing:
        num_ranks, device = self._group.num_ranks, x.device
        if num_tokens_per_expert is None:
            raise ValueError(
                "num_tokens_per_expert was not given. Pass what get_dispatch_layout returns, or "
                "the handle of an earlier dispatch."
            )
        num_experts = num_tokens_per_expert.numel()
        int32, bool_ = (torch.int32,), (torch.bool,)
        per_expert = num_tokens_per_expert
        check_tensor("num_tokens_per_expert", per_expert, (num_experts,), int32, device)
        if num_tokens_per_rank is not None:
            name = "num_tokens_per_rank"
            check_tensor(name, num_tokens_per_rank, (num_ranks,), int32, device)
        if is_token_in_rank is not None:
            shape = (len(x), num_ranks)
            check_tensor("is_token_in_rank", is_token_in_rank, shape, bool_, device)
        if topk_idx is not None and topk_weights is not None:
            return routing_of_experts(
                topk_idx, topk_weights, num_experts, is_token_in_rank, num_ranks
            )
        if is_token_in_rank is None:
            raise ValueError(
                "neither topk_idx nor is_token_in_rank was given. Pass what get_dispatch_layout "
                "returns, or the handle of an earlier dispatch."
            )
        return routing_of_ranks(is_token_in_rank)

    def _dispatch_first(
        self,
        rows: Rows,
        routing: Routing,
        expert_alignment: int,
        num_worst_tokens: int,
        config: Config | None,
    ) -> tuple[NormalDispatchResult, NormalHandle]:
        buffer = self._normal_buffer_for(rows, routing.num_experts, routing.topk_idx.shape[1])
        result = buffer.dispatch(
            rows.x,
            routing.topk_idx,
            routing.topk_weights,
            rows.scales,
            num_worst_tokens=num_worst_tokens,
            expert_alignment=expert_alignment,
            copy=True,
            num_sms=self._num_sms_of(config, buffer),
        )
        topk_idx = routing.topk_idx.clone()
        return result, handle_of(self, result.handle, topk_idx, num_worst_tokens)

    def _counts_of_all(
        self, num_tokens_per_expert: torch.Tensor, alignment: int, num_worst_tokens: int
    ) -> list[int]:
        """As dispatch returns them, of a routing without experts."""
        is_cpu = num_tokens_per_expert.device.type == "cpu"
        if num_worst_tokens and not is_cpu:
            return []
        # On the CPU by every rank, also one with worst tokens, which need not be all.
        counts = expert_counts_of_all(self._group, num_tokens_per_expert, alignment)
        return [] if num_worst_tokens else counts

    def _dispatch_again(
        self, rows: Rows, handle: NormalHandle, config: Config | None
    ) -> RowsOrPair:
        self._check_handle(handle)
        topk_idx = handle.topk_idx
        buffer = self._normal_buffer_for(rows, handle.num_experts, topk_idx.shape[1])
        num_sms = self._num_sms_of(config, buffer)
        dispatch_handle = handle.of_buffer(buffer)
        if dispatch_handle is not None:
            return rows.received(
                buffer.dispatch(
                    rows.x,
                    x_scales=rows.scales,
                    handle=dispatch_handle,
                    copy=True,
                    num_sms=num_sms,
                )
            )
        # Rows of another dtype than before have another buffer, which must learn the routing.
        device = topk_idx.device
        check_tensor("x", rows.x, (len(topk_idx), rows.x.shape[1]), (rows.x.dtype,), device)
        result = buffer.dispatch(
            rows.x,
            topk_idx,
            torch.zeros(topk_idx.shape, dtype=torch.float32, device=device),
            rows.scales,
            num_worst_tokens=handle.num_worst_tokens,
            copy=True,
            num_sms=num_sms,
        )
        handle.add(result.handle)
        return rows.received(result)

    def _normal_buffer_for(self, rows: Rows, num_experts: int, top_k: int) -> NormalBuffer:
        settings = dict(num_experts=num_experts, top_k=top_k, **rows.settings)
        device, num_ranks = rows.x.device, self._group.num_ranks
        if device.type == "cuda" and spans_nodes(self._group.hosts(), None):
            most = self.num_nvl_bytes or CUDA_BYTES
            least = network_settings_of(self._group, num_bytes=most, **settings).least_num_bytes()
        elif device.type == "cuda":
            most = self.num_nvl_bytes or CUDA_BYTES
            least = CudaNormalSettings(num_bytes=most, **settings).least_num_bytes(num_ranks)
        else:
            most = min(self.num_nvl_bytes or MOST_BYTES, MOST_BYTES)
            least = NormalSettings(num_bytes=most, **settings).least_num_bytes(num_ranks)
        return self._buffer_for(NormalBuffer, device, num_bytes=max(most, least), **settings)

    def _num_sms_of(self, config: Config | None, buffer: NormalBuffer) -> int | None:
        """Of a call; None: as many as the buffer has been made with."""
        asked = self.num_sms if config is None else config.num_sms
        return min(asked, buffer.num_max_sms) or None

    def _check_handle(self, handle: NormalHandle) -> None:
        if not isinstance(handle, NormalHandle) or handle.owner is not self:
            raise ValueError(
                "handle is not one that dispatch of this Buffer returned. Use the Buffer that "
                "dispatched."
            )


def counts_of(result: NormalDispatchResult) -> list[int]:
    """Of each local expert, as dispatch returns them: none where the host does not know."""
    counts = result.num_recv_tokens_per_expert
    return counts if isinstance(counts, list) else []
