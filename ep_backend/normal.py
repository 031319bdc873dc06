"""Normal dispatch and combine, for prefill: batches of any size, through a bounded memory.

T tokens of this rank, N rows received, H hidden, K top_k, E experts, R ranks, L local experts, S =
ceil(H / 128) scales of a float8 row.

    buffer = NormalBuffer(group, hidden=2048, num_experts=64, top_k=8, dtype=torch.bfloat16,
                          num_bytes=64 << 20)
    result = buffer.dispatch(x, topk_idx, topk_weights)
    y = experts(result.recv_x, result.recv_topk_idx, result.recv_topk_weights)  # weighted, summed
    combined = buffer.combine(y, result.handle)
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Literal, overload

import torch

from ep_backend import _native, faults
from ep_backend.comm_stream import CommStream, NoStreams, Streams
from ep_backend.errors import OrderError
from ep_backend.events import EventOverlap, check_overlap
from ep_backend.group import Group
from ep_backend.handles import KernelStatistics, address_of
from ep_backend.kernel_calls import KernelCalls
from ep_backend.low_latency import DEFAULT_TIMEOUT_SECS
from ep_backend.memory import SymmetricMemory
from ep_backend.network import NetworkConfig, spans_nodes
from ep_backend.normal_checks import ArgumentChecks, Bias
from ep_backend.normal_handles import NormalDispatchHandle, NormalDispatchResult
from ep_backend.normal_settings import (
    DEFAULT_NUM_BYTES,
    CpuNormalKernels,
    NormalSettings,
    NormalShape,
    check_cpu,
    check_local_ids,
    node_config,
)
from ep_backend.observe.buffer import BufferObserver, start_exporter
from ep_backend.settings import check_waits, device_type
from ep_backend.tuning import REMEDY, TABLE_KEY, Tuned, log_taken, look_up

Combined = (
    torch.Tensor
    | tuple[torch.Tensor, torch.Tensor]
    | tuple[torch.Tensor, EventOverlap]
    | tuple[torch.Tensor, torch.Tensor, EventOverlap]
)
"""What combine returns, see there."""


class NormalBuffer(ArgumentChecks):
    """Symmetric memory and state for normal dispatch and combine of one MoE shape.

    Creation is collective. Afterwards every rank issues the same sequence of operations, one at a
    time; the number of tokens may differ between ranks and calls. Every call waits for its peers:
    when it returns, its results are there. Layers of a model with the same shape share one buffer.

    Args:
        group: the ranks.
        hidden: H, any number of elements.
        num_experts: E, global. Rank r owns a contiguous block of them; where R does not divide E,
            the first E mod R ranks own one more.
        top_k: K, experts a token is routed to.
        dtype: of `x` and of combine's rows, `torch.float32` or `torch.bfloat16`. Sums are in
            float32.
        num_bytes: symmetric memory that a rank may take. It bounds no batch: larger batches travel
            in more rounds, with the same results. Default: 64 MiB.
        dispatch_dtype: of dispatch's rows as they travel and as the experts get them: `dtype`, the
            default, or `torch.float8_e4m3fn`, with a scale for every 128 channels.
        scale_format: of those scales: "float32" (amax / 448), "power_of_two" (the next one), or
            "ue8m0", a power of two as its exponent byte.
        timeout_secs: how long one wait for a peer may last.
        device: where tensors live: "cpu", or a CUDA device; there a `NormalBuffer` is a
            `ep_backend.normal_cuda.CudaNormalBuffer`, which says what differs; where ranks are on
            several nodes, a `ep_backend.normal_network.NetworkNormalBuffer`.
        spin_us: CPU: how long a wait polls before it sleeps. Default: 50 where every rank has a
            core, else 0.
        num_sms: CUDA: blocks a kernel has, each with an SM of its own. Default: 16, or what there
            is for each virtual rank.
        network: CUDA: how ranks on other nodes are reached, where ranks are on several; needs a
            build with NVSHMEM. Default: EP_BACKEND_NETWORK, or `NetworkConfig()`. On one host
            nodes are what its `ranks_per_node` makes of it; without that it is not looked at.
        expert_ids: CUDA, one host: how received rows list their experts. "local": from 0 on each
            rank, -1 in places of other ranks' experts. "global": as `topk_idx`, and there an expert
            of another rank, with weight 0, which experts with an expert map skip.

    `num_bytes`, `spin_us` and `num_sms`, where they are left out, are those that `ep-backend tune`
    has found for the shape on this machine, if it has (`ep_backend.tuning`). What the table says
    must be the same on every rank.

    Raises:
        ValueError: an argument is out of range; the text names the limit.
        SettingsMismatch: ranks disagree; raised on every rank.
        RendezvousError: a rank is missing or has no room for its memory.
    """

    def __new__(
        cls,
        group: Group,
        *,
        device: str | torch.device = "cpu",
        network: NetworkConfig | None = None,
        **settings: object,
    ) -> NormalBuffer:
        if cls is not NormalBuffer:
            return super().__new__(cls)
        hosts = group.hosts()  # collective: on any device, so that ranks which differ meet, too
        if device_type(device) != "cuda":
            return super().__new__(cls)
        if spans_nodes(hosts, network):
            from ep_backend.normal_network import NetworkNormalBuffer

            return super().__new__(NetworkNormalBuffer)
        from ep_backend.normal_cuda import CudaNormalBuffer

        return super().__new__(CudaNormalBuffer)

    def __init__(
        self,
        group: Group,
        *,
        hidden: int,
        num_experts: int,
        top_k: int,
        dtype: torch.dtype,
        num_bytes: int | None = None,
        dispatch_dtype: torch.dtype | None = None,
        scale_format: str = "float32",
        timeout_secs: float = DEFAULT_TIMEOUT_SECS,
        device: str | torch.device = "cpu",
        spin_us: float | None = None,
        num_sms: int | None = None,
        network: NetworkConfig | None = None,
        expert_ids: str = "local",
    ) -> None:
        settings = NormalSettings(
            hidden=hidden,
            num_experts=num_experts,
            top_k=top_k,
            dtype=dtype,
            dispatch_dtype=dtype if dispatch_dtype is None else dispatch_dtype,
            scale_format=scale_format,
            num_bytes=DEFAULT_NUM_BYTES if num_bytes is None else num_bytes,
        )
        given = {"num_bytes": num_bytes, "spin_us": spin_us}
        ranks_per_node = group.ranks_per_node if group.num_nodes > 1 else None
        error: Exception | None = None
        tuned = Tuned()
        try:
            check_cpu(device, network)
            check_local_ids(expert_ids, "kernels of a GPU on one host have")
            tuned = look_up(settings.tuning_shape(group.num_ranks), group, torch.device("cpu"))
            settings = settings.tuned(tuned, given)
            settings.check(group.num_ranks, ranks_per_node)
            start_exporter(group)
            check_waits(timeout_secs, spin_us)
        except (TypeError, ValueError) as e:
            error = e
        agreed = {TABLE_KEY: tuned} | settings.agreed()
        group.agree("NormalBuffer", agreed, error, {TABLE_KEY: REMEDY})
        log_taken("NormalBuffer", group, tuned, given)
        if spin_us is None:
            spin_us = tuned.settings.get("spin_us")

        self.device = torch.device("cpu")
        config = settings.config(group.num_ranks, ranks_per_node)
        layout = _native.NormalLayout(config)
        num_symmetric_bytes = layout.num_bytes
        if ranks_per_node is not None:
            node_layout = _native.NormalNodeLayout(node_config(config, ranks_per_node))
            num_symmetric_bytes = node_layout.num_bytes
        self._take(group, settings, layout, num_symmetric_bytes)
        self._fault = faults.active_fault()
        self.num_max_sms = 0
        """CUDA: what a call may take."""
        self.num_tokens_per_round: int = config.num_tokens_per_round
        """Tokens of a rank that travel at once: what `num_bytes` has room for."""

        kernels = CpuNormalKernels(config, group, self._memory.bases, timeout_secs, spin_us)
        self._statistics = kernels.statistics
        observer = BufferObserver(group, self.device, self.first_expert, self._statistics)
        self._calls = KernelCalls(kernels, num_experts, self.device, observer, self._statistics)

    def _take(
        self,
        group: Group,
        settings: NormalShape,
        layout: _native.NormalLayout | _native.NormalDeviceLayout,
        num_bytes: int,
        allocate: Callable[[int, torch.device], SymmetricMemory] | None = None,
    ) -> None:
        """What is the same on any device. Collective: takes the memory.

        Args:
            allocate: default: the group's.
        """
        self.group = group
        self.hidden = settings.hidden
        self.num_experts = settings.num_experts
        self.top_k = settings.top_k
        self.dtype = settings.dtype
        self.dispatch_dtype = settings.dispatch_dtype
        self.scale_format = settings.scale_format
        self.num_local_experts: int = layout.partition.num_local_experts(group.self_rank)
        self.first_expert: int = layout.partition.first_expert(group.self_rank)
        self.num_columns: int = layout.num_max_messages_per_token
        """Ranks that a token can go to."""
        self.expert_ids: str = settings.expert_ids
        self.num_scales: int = layout.num_scales
        """Of a dispatched row; 0 where it is not float8."""
        self.num_symmetric_bytes: int = num_bytes
        """Memory of the device that this buffer takes on every rank for the exchange."""
        self._x_dtypes = tuple(dict.fromkeys((self.dtype, self.dispatch_dtype)))
        self._lock = threading.Lock()
        is_cuda = self.device.type == "cuda"
        self._streams: Streams = CommStream(self.device) if is_cuda else NoStreams()
        self._memory = (allocate or group.allocate)(num_bytes, self.device)

    def dispatch(
        self,
        x: torch.Tensor,
        topk_idx: torch.Tensor | None = None,
        topk_weights: torch.Tensor | None = None,
        x_scales: torch.Tensor | None = None,
        *,
        handle: NormalDispatchHandle | None = None,
        num_worst_tokens: int = 0,
        expert_alignment: int = 1,
        copy: bool = False,
        num_sms: int | None = None,
        previous_event: EventOverlap | None = None,
        async_finish: bool = False,
        allocate_on_comm_stream: bool = False,
    ) -> NormalDispatchResult:
        """Brings every token once to each rank that owns one of its experts.

        Args:
            x: `[T, H]` of the buffer's dtype; or, where the dispatch dtype is float8, of that.
            topk_idx: `[T, K]` int32 or int64, global expert, -1 = not routed. An expert listed
                twice for a token receives it once.
            topk_weights: `[T, K]` float32; they travel along, nothing is multiplied.
            x_scales: `[T, S]` float32, of float8 `x`: a value is `x * scale`. With "power_of_two"
                and "ue8m0" they must be powers of two; that is not checked.
            handle: of an earlier dispatch of as many tokens on every rank, whose routing is used
                again: counts are not exchanged, only rows travel. In place of `topk_idx` and
                `topk_weights`.
            num_worst_tokens: if not 0, rows of the `recv_*` tensors, however few come. Not with a
                handle, whose dispatch has decided.
            expert_alignment: `num_recv_tokens_per_expert` is rounded up to multiples of this.
            copy: CUDA: `recv_x` and `recv_scales` are the caller's too. On the CPU they always are.
            num_sms: CUDA: as the buffer's, for this call.
            previous_event: CUDA: run on a stream of the buffer's own, behind this event, instead of
                on the current stream. It comes behind all that has read what earlier calls brought.
            async_finish: CUDA: run there, and do not let the current stream wait for it:
                `result.event.current_stream_wait()` does, before anything reads the result.
                Without `previous_event` all that the current stream was given comes first.
            allocate_on_comm_stream: that stream's tensors are its own anyway. Only with both.

        Raises:
            ValueError: wrong shape, dtype or expert; nothing was sent. Or more rows came than
                `num_worst_tokens`: the buffer stays failed.
            OrderError: another operation of this buffer is running.
            PeerTimeout: a peer did not come in time. After this, and after a call that was
                interrupted (Ctrl-C), create a new buffer.
        """
        check_overlap(previous_event, async_finish, allocate_on_comm_stream)
        self._check_rows(x, x_scales, num_worst_tokens, expert_alignment)
        is_cached = handle is not None
        if handle is None:
            self._check_routing(x.shape[0], topk_idx, topk_weights)
        else:
            self._check_cached(x.shape[0], handle, topk_idx, topk_weights, num_worst_tokens)
        with self._exclusive("dispatch"), self._streams.operation(previous_event):
            if handle is None:
                handle, received = self._exchange_counts(topk_idx, x.shape[0], num_worst_tokens)
            else:
                received = handle.new_rows()
            recv_x, recv_scales = received
            self._calls.run(
                "normal_dispatch",
                handle.num_tokens,
                x.data_ptr(),
                x_scales is not None,
                address_of(x_scales),
                is_cached,
                address_of(topk_idx),
                topk_idx is not None and topk_idx.dtype == torch.int64,
                address_of(topk_weights),
                *handle.routes(),
                *handle.rows(),
                recv_x.data_ptr(),
                address_of(recv_scales),
                handle.recv_topk_idx.data_ptr(),
                handle.recv_topk_weights.data_ptr(),
                handle.recv_src_tokens.data_ptr(),
            )
        counts = -(-handle.expert_counts // expert_alignment) * expert_alignment
        return NormalDispatchResult(
            recv_x,
            recv_scales,
            handle.recv_topk_idx,
            handle.recv_topk_weights,
            counts.int() if num_worst_tokens > 0 else counts.tolist(),
            handle,
        )

    @overload
    def combine(
        self,
        x: torch.Tensor,
        handle: NormalDispatchHandle,
        out: torch.Tensor | None = None,
        topk_weights: None = None,
        bias: Bias = None,
        num_sms: int | None = None,
        previous_event: EventOverlap | None = None,
        async_finish: Literal[False] = False,
        allocate_on_comm_stream: bool = False,
    ) -> torch.Tensor: ...

    @overload
    def combine(
        self,
        x: torch.Tensor,
        handle: NormalDispatchHandle,
        out: torch.Tensor | None = None,
        *,
        topk_weights: torch.Tensor,
        bias: Bias = None,
        num_sms: int | None = None,
        previous_event: EventOverlap | None = None,
        async_finish: Literal[False] = False,
        allocate_on_comm_stream: bool = False,
    ) -> tuple[torch.Tensor, torch.Tensor]: ...

    @overload
    def combine(
        self,
        x: torch.Tensor,
        handle: NormalDispatchHandle,
        out: torch.Tensor | None = None,
        *,
        topk_weights: None = None,
        bias: Bias = None,
        num_sms: int | None = None,
        previous_event: EventOverlap | None = None,
        async_finish: Literal[True],
        allocate_on_comm_stream: bool = False,
    ) -> tuple[torch.Tensor, EventOverlap]: ...

    @overload
    def combine(
        self,
        x: torch.Tensor,
        handle: NormalDispatchHandle,
        out: torch.Tensor | None = None,
        *,
        topk_weights: torch.Tensor,
        bias: Bias = None,
        num_sms: int | None = None,
        previous_event: EventOverlap | None = None,
        async_finish: Literal[True],
        allocate_on_comm_stream: bool = False,
    ) -> tuple[torch.Tensor, torch.Tensor, EventOverlap]: ...

    def combine(
        self,
        x: torch.Tensor,
        handle: NormalDispatchHandle,
        out: torch.Tensor | None = None,
        topk_weights: torch.Tensor | None = None,
        bias: Bias = None,
        num_sms: int | None = None,
        previous_event: EventOverlap | None = None,
        async_finish: bool = False,
        allocate_on_comm_stream: bool = False,
    ) -> Combined:
        """Sends every row home, where a token adds up its rows, in rank order, in float32.

        Args:
            x: of the buffer's dtype and the shape of `recv_x`: for each row the sum over its
                experts, weighted. Rows behind N are not read.
            handle: of the dispatch that brought them; the same one on every rank.
            out: `[T, H]`, where the result goes; default: a new tensor. It may share memory with
                `x` or a bias, which is then copied first.
            topk_weights: `[N, K]` float32, given on every rank or on none: they go home too, where
                a token adds those of its rows, as its rows. Nothing is multiplied.
            bias: one or two tensors `[T, H]` of the buffer's dtype, added behind the rows before
                the sum is rounded.
            num_sms: CUDA: as the buffer's, for this call.
            previous_event, async_finish, allocate_on_comm_stream: as `dispatch`; the event is
                returned.

        Returns:
            `[T, H]`; with `topk_weights` that and their sums, `[T, K]` float32; with `async_finish`
            the event behind them. A token that went nowhere is 0, or its biases, and its weights
            are 0.

        Raises:
            ValueError: wrong shape or dtype, or a handle of another buffer; nothing was sent.
            ProtocolError: some ranks have given `topk_weights` and others not.
            OrderError, PeerTimeout: as `dispatch`.
        """
        check_overlap(previous_event, async_finish, allocate_on_comm_stream)
        biases = self._check_combine(x, handle, out, topk_weights, bias)
        with self._exclusive("combine"), self._streams.operation(previous_event) as operation:
            out, sums = self._home(handle, out, topk_weights)
            if self._fault is faults.Fault.DROP_REMOTE_CONTRIBUTIONS:
                rows_per_rank = handle.num_recv_tokens_per_rank
                x = faults.drop_remote_rows(x, rows_per_rank, self.group.self_rank)
            # Tokens come home before the last rows have left. vLLM passes the same tensor for both
            # where N equals T.
            if overlap(x, out):
                x = x.clone()
            biases = [b.clone() if b is not None and overlap(b, out) else b for b in biases]
            self._calls.run(
                "normal_combine",
                handle.num_tokens,
                x.data_ptr(),
                topk_weights is not None,
                address_of(topk_weights),
                *map(address_of, biases),
                *handle.routes(),
                *handle.rows(),
                out.data_ptr(),
                address_of(sums),
            )
        return combined(out, sums, operation.event if async_finish else None)

    def combine_input(self, handle: NormalDispatchHandle) -> torch.Tensor:
        """A tensor of the shape and dtype that `combine` takes, for experts to write; on CUDA in
        symmetric memory, if there is room for it, from which combine need not copy."""
        return torch.empty((handle.num_rows, self.hidden), dtype=self.dtype, device=self.device)

    def raise_if_failed(self) -> None:
        """Raises what kernels have reported so far. On CUDA, synchronise first to be sure."""
        self._calls.raise_if_failed()

    def statistics(self) -> KernelStatistics:
        """Who was waited for, and how much each expert got."""
        return self._statistics()

    def close(self) -> None:
        """Unmaps this rank's view of the shared memory. Not collective; idempotent. Tensors that
        were returned stay valid.

        Raises:
            OrderError: an operation of this buffer is running in another thread.
        """
        with self._exclusive("close"):
            if self._calls.close():
                self._streams.close()
                self._give_memory_back()

    def _give_memory_back(self) -> None:
        self._memory.close()

    def __enter__(self) -> NormalBuffer:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()

    def _exchange_counts(
        self, topk_idx: torch.Tensor | None, num_tokens: int, num_worst_tokens: int
    ) -> tuple[NormalDispatchHandle, tuple[torch.Tensor, torch.Tensor | None]]:
        """A handle, and memory for the rows that come, and for their scales."""
        assert topk_idx is not None
        handle = NormalDispatchHandle(self, num_tokens)
        self._calls.run(
            "normal_counts",
            num_tokens,
            topk_idx.data_ptr(),
            topk_idx.dtype == torch.int64,
            *handle.counts_arguments(),
        )
        try:
            handle.allocate(num_worst_tokens)
            return handle, handle.new_rows()
        except Exception as e:
            self._calls.fail(e)  # peers count on this rank to go on
            raise

    def _home(
        self,
        handle: NormalDispatchHandle,
        out: torch.Tensor | None,
        topk_weights: torch.Tensor | None,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Tensors for the result and, with weights, for their sums."""
        if out is None:
            shape = (handle.num_tokens, self.hidden)
            out = torch.empty(shape, dtype=self.dtype, device=self.device)
        if topk_weights is None:
            return out, None
        shape = (handle.num_tokens, self.top_k)
        return out, torch.empty(shape, dtype=torch.float32, device=self.device)

    @contextmanager
    def _exclusive(self, what: str) -> Iterator[None]:
        if not self._lock.acquire(blocking=False):
            raise OrderError(
                f"{what} was called while another operation of this buffer is running in another "
                "thread. Call the operations of one buffer one after the other."
            )
        try:
            yield
        finally:
            self._lock.release()


def combined(out: torch.Tensor, sums: torch.Tensor | None, event: EventOverlap | None) -> Combined:
    """What combine returns; `event` is None where it was not asked for."""
    if event is None:
        return out if sums is None else (out, sums)
    return (out, event) if sums is None else (out, sums, event)


def overlap(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Whether two contiguous tensors share memory."""
    return a.data_ptr() < b.data_ptr() + b.nbytes and b.data_ptr() < a.data_ptr() + a.nbytes
