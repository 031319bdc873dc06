"""Normal dispatch and combine on CUDA: rows are pushed to where experts read them, and pulled from
where they have written them.

T tokens of this rank, N rows received, H hidden, K top_k, R ranks, P rows that a rank has room for.
"""

from __future__ import annotations

import itertools

import torch

from ep_backend import _native, faults
from ep_backend.checks import check_alignment, check_int
from ep_backend.errors import EPBackendError
from ep_backend.events import EventOverlap, check_overlap
from ep_backend.group import Group
from ep_backend.handles import KernelStatistics, address_of
from ep_backend.kernel_calls import KernelCalls, Kernels
from ep_backend.kernels import agreed_kernels
from ep_backend.low_latency import DEFAULT_TIMEOUT_SECS
from ep_backend.network import NetworkConfig
from ep_backend.normal import Combined, NormalBuffer, combined, overlap
from ep_backend.normal_checks import MAX_TOKENS, Bias
from ep_backend.normal_cuda_counters import CudaNormalCounters
from ep_backend.normal_cuda_handles import CudaNormalDispatchHandle, Rows, SymmetricRows
from ep_backend.normal_cuda_settings import (
    DEFAULT_NUM_SMS,
    CudaNormalKernels,
    CudaNormalSettings,
    num_available_sms,
)
from ep_backend.normal_handles import NormalDispatchHandle, NormalDispatchResult
from ep_backend.normal_settings import DEFAULT_NUM_BYTES, check_one_node
from ep_backend.observe.buffer import BufferObserver, start_exporter
from ep_backend.settings import CUDA_ROW_ALIGNMENT, check_waits, usable_device
from ep_backend.tuning import REMEDY, TABLE_KEY, Tuned, log_taken, look_up

_NO_ROWS = (0, 0)
_NOTHING_BESIDE_ROWS = (0, 0, 0)


class CudaNormalBuffer(NormalBuffer):
    """A `NormalBuffer` on CUDA; made by that name. What differs from the CPU's:

    - Kernels are launched on the current stream, or with `previous_event` or `async_finish` on one
      of the buffer's own; calls return at once, but for a dispatch of exact sizes, which waits
      until counts are known. What a kernel finds wrong is raised by a later call, or by
      `raise_if_failed()`.
    - `recv_x` and `recv_scales` are views of symmetric memory, unless `copy` is asked for or rows
      have no room: valid until the next dispatch, on the stream, and until `close()`.
    - With `num_worst_tokens`, or a handle, a call can be captured in a graph.
    - Where every rank's rows have room (`num_rows`), they travel at once, to their place. Else in
      rounds, and are copied out: the same bits.
    - Combine copies `x` to symmetric memory first, unless it is `combine_input(handle)`, or
      `recv_x` itself. Those may be written again when a later dispatch has been received.
    - `num_worst_tokens` is at most `num_rows` on every rank, or more on every rank.
    - Rows are multiples of 16 bytes; there are at most 64 ranks and 4096 experts.
    """

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
        device: str | torch.device = "cuda",
        spin_us: float | None = None,
        num_sms: int | None = None,
        network: NetworkConfig | None = None,
        expert_ids: str = "local",
    ) -> None:
        settings = CudaNormalSettings(
            hidden=hidden,
            num_experts=num_experts,
            top_k=top_k,
            dtype=dtype,
            dispatch_dtype=dtype if dispatch_dtype is None else dispatch_dtype,
            scale_format=scale_format,
            num_bytes=DEFAULT_NUM_BYTES if num_bytes is None else num_bytes,
            expert_ids=expert_ids,
        )
        given = {"num_bytes": num_bytes, "num_sms": num_sms}
        error: Exception | None = None
        tuned = Tuned()
        try:
            self.device = usable_device(device)
            tuned = look_up(settings.tuning_shape(group.num_ranks), group, self.device)
            settings = settings.tuned(tuned, given)
            settings.check(group.num_ranks)
            check_one_node(group)
            start_exporter(group)
            check_waits(timeout_secs, spin_us)
            self._take_sms(group, num_sms, tuned.int_of("num_sms"))
        except (TypeError, ValueError) as e:
            error = e
        agreed = {TABLE_KEY: tuned} | settings.agreed()
        group.agree("NormalBuffer", agreed, error, {TABLE_KEY: REMEDY})
        log_taken("NormalBuffer", group, tuned, given)

        config = settings.config(group.num_ranks)
        layout = _native.NormalDeviceLayout(config)
        self._take(group, settings, layout, layout.num_bytes)
        self._fault = faults.active_fault()
        self.num_rows: int = config.num_rows
        """P, rows that a rank has room for: what `num_bytes` allows."""
        self.num_tokens_per_round: int = layout.num_tokens_per_round
        """Tokens of a rank that travel at once where rows have no room."""

        self._rows = SymmetricRows(self, layout, self._memory.bases[group.self_rank])
        self._device_kernels = agreed_kernels(
            "NormalBuffer",
            group,
            self._memory,
            lambda: CudaNormalKernels(
                config,
                group.self_rank,
                self._memory.bases,
                timeout_secs,
                self.num_max_sms,
                group.is_virtual,
                self.device,
            ),
        )
        row_bytes = self.hidden * self.dispatch_dtype.itemsize + 4 * layout.num_scale_words
        counters = CudaNormalCounters(self, self._device_kernels.epochs(), row_bytes)
        self._start(self._device_kernels, counters)

    def _take_sms(self, group: Group, num_sms: int | None, tuned: int | None = None) -> None:
        """Blocks of a kernel, by default and at most.

        Raises:
            ValueError: `num_sms` is more than there are, or less than 1.
        """
        self.num_max_sms = num_available_sms(group, self.device)
        if num_sms is None:
            num_sms = min(tuned or DEFAULT_NUM_SMS, self.num_max_sms)
        self.num_sms = self._checked_num_sms(num_sms)

    def _start(self, kernels: Kernels, counters: CudaNormalCounters) -> None:
        """What calls need, when there is all else."""
        self._tickets = itertools.count(1)
        self.counters = counters
        observer = BufferObserver(self.group, self.device, self.first_expert, counters.statistics)
        self._calls = KernelCalls(kernels, self.num_experts, self.device, observer)

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
        """As `NormalBuffer.dispatch`; see this class for what differs.

        Raises:
            ValueError: also where a dispatch of exact sizes is captured in a graph. A wrong expert,
                and more rows than `num_worst_tokens`, are noticed by the kernel: they are raised by
                a later call, and the buffer stays failed.
        """
        check_overlap(previous_event, async_finish, allocate_on_comm_stream)
        self._check_rows(x, x_scales, num_worst_tokens, expert_alignment)
        check_alignment("x", x, CUDA_ROW_ALIGNMENT)
        num_blocks = self.num_sms if num_sms is None else self._checked_num_sms(num_sms)
        if handle is not None:
            self._check_cached(x.shape[0], handle, topk_idx, topk_weights, num_worst_tokens)
        else:
            self._check_routing(x.shape[0], topk_idx, topk_weights)
            if num_worst_tokens == 0 and torch.cuda.is_current_stream_capturing():
                raise ValueError(
                    "a dispatch of exact sizes was captured in a graph, but the host waits for its "
                    "counts. Pass num_worst_tokens, or the handle of an earlier dispatch."
                )
        rows = (x.data_ptr(), x_scales is not None, address_of(x_scales))
        with (
            self._exclusive("dispatch"),
            self._streams.operation(previous_event, async_finish) as operation,
        ):
            operation.reads(x, topk_idx, topk_weights, x_scales)
            is_cached = handle is not None
            if handle is not None:
                assert isinstance(handle, CudaNormalDispatchHandle)
                operation.reads(*handle.tensors())
                received = self._dispatch_again(rows, handle, copy, num_blocks)
            else:
                assert topk_idx is not None
                routing = (
                    topk_idx.data_ptr(),
                    topk_idx.dtype == torch.int64,
                    address_of(topk_weights),
                )
                handle = self._new_handle(x.shape[0])
                if num_worst_tokens > 0:
                    handle.allocate(num_worst_tokens)
                    received = self._dispatch_unknown(rows, routing, handle, copy, num_blocks)
                else:
                    received = self._dispatch_exact(rows, routing, handle, copy, num_blocks)
                operation.writes(*handle.tensors())
            self.counters.dispatched(handle, is_cached)
            counts = _aligned_counts(handle, expert_alignment)
            if isinstance(counts, torch.Tensor):
                operation.writes(counts)
            operation.writes(*received)
        return NormalDispatchResult(
            *received,
            handle.recv_topk_idx,
            handle.recv_topk_weights,
            counts,
            handle,
            operation.event,
        )

    def combine(  # type: ignore[override]
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
        """As `NormalBuffer.combine`; see this class for what differs."""
        check_overlap(previous_event, async_finish, allocate_on_comm_stream)
        biases = self._check_combine(x, handle, out, topk_weights, bias)
        assert isinstance(handle, CudaNormalDispatchHandle)
        num_blocks = self.num_sms if num_sms is None else self._checked_num_sms(num_sms)
        for name, tensor in (("x", x), ("out", out), ("bias", biases[0]), ("bias", biases[1])):
            if tensor is not None:
                check_alignment(name, tensor, CUDA_ROW_ALIGNMENT)
        self._check_out(out)
        needs_nothing = (
            out is not None
            and topk_weights is None
            and biases == [None, None]
            and self._is_in_place(x)
            and not self.counters.are_rows_counted
        )
        with (
            self._exclusive("combine"),
            self._streams.operation(previous_event, async_finish, needs_nothing) as operation,
        ):
            operation.reads(x, topk_weights, out, *biases, *handle.tensors())
            is_new = out is None
            out, sums = self._home(handle, out, topk_weights)
            operation.writes(out if is_new else None, sums)
            where, x = self._input_of(x, handle, out)
            biases = [b.clone() if b is not None and overlap(b, out) else b for b in biases]
            self._calls.run(
                "normal_combine",
                handle.num_tokens,
                x.data_ptr(),
                *where,
                topk_weights is not None,
                address_of(topk_weights),
                *map(address_of, biases),
                *handle.routes(),
                handle.recv_src_tokens.data_ptr(),
                out.data_ptr(),
                address_of(sums),
                num_blocks,
                operation.stream,
            )
            self.counters.combined(handle)
        return combined(out, sums, operation.event if async_finish else None)

    def statistics(self) -> KernelStatistics:
        """As `NormalBuffer.statistics`; waits for the device. Tokens, rows and bytes are counted
        only where metrics are asked for when the buffer is made."""
        torch.cuda.synchronize(self.device)
        return self.counters.statistics()

    def combine_input(self, handle: NormalDispatchHandle) -> torch.Tensor:
        """`[N or num_worst_tokens, H]` of the buffer's dtype: in symmetric memory, if there is room
        for it, from which combine need not copy. All handles share that, and peers may still read
        it when a combine of this rank has ended: so it may be written when a dispatch behind the
        last combine has been received, until a combine has been given it."""
        self._check_handle(handle)
        assert isinstance(handle, CudaNormalDispatchHandle)
        if handle.may_need_rounds(self.num_rows):
            return super().combine_input(handle)
        return self._rows.combined[: handle.num_rows]

    def _new_handle(self, num_tokens: int) -> CudaNormalDispatchHandle:
        return CudaNormalDispatchHandle(self, num_tokens)

    def _check_out(self, out: torch.Tensor | None) -> None:
        if out is not None and self._rows.holds(out):
            raise ValueError(
                "out is in the buffer's symmetric memory, which peers read meanwhile. Pass a "
                "tensor of your own, or none."
            )

    def _is_in_place(self, x: torch.Tensor) -> bool:
        """Combine reads it where it is, and takes no memory for it."""
        is_there = self._rows.input_of(x) != _native.CombineInput.ELSEWHERE
        return is_there and self._fault is None

    def _input_of(
        self, x: torch.Tensor, handle: CudaNormalDispatchHandle, out: torch.Tensor
    ) -> tuple[tuple[_native.CombineInput, ...], torch.Tensor]:
        """Where combine finds its rows, if its kernel asks, and what it reads instead of `x`, which
        may be in its way."""
        x = self._with_faults(x, handle)
        where = self._rows.input_of(x)
        is_in_the_way = where == _native.CombineInput.ELSEWHERE and self._rows.holds(x)
        if handle.may_need_rounds(self.num_rows):
            is_in_the_way |= self._rows.holds(x)
        if is_in_the_way or overlap(x, out):
            return (_native.CombineInput.ELSEWHERE,), x.clone()
        return (where,), x

    def _with_faults(self, x: torch.Tensor, handle: CudaNormalDispatchHandle) -> torch.Tensor:
        """`x`, or what a fault that was asked for makes of it."""
        if self._fault is not faults.Fault.DROP_REMOTE_CONTRIBUTIONS:
            return x
        rows_per_rank = handle.num_recv_tokens_per_rank
        return faults.drop_remote_rows(x, rows_per_rank, self.group.self_rank)

    def _dispatch_exact(
        self,
        rows: tuple[int, bool, int],
        routing: tuple[int, bool, int],
        handle: CudaNormalDispatchHandle,
        copy: bool,
        num_sms: int,
    ) -> Rows:
        """The kernel sends rows as soon as it knows that all have room. The host waits for counts
        meanwhile, and makes room itself if they have none."""
        ticket = next(self._tickets)
        nowhere = (False, *_NO_ROWS, *_NOTHING_BESIDE_ROWS)
        self._calls.run(
            "normal_dispatch",
            handle.num_tokens,
            *(*rows, _native.DispatchStart.ROUTE, *routing, *handle.routes()),
            *(handle.expert_counts.data_ptr(), ticket, MAX_TOKENS, *nowhere, num_sms),
        )
        self._wait_for_counts(handle.num_tokens, ticket)
        num_rows, num_rounds, has_room, expert_counts = self._device_kernels.counts()
        try:
            handle.take_counts(num_rows, num_rounds, expert_counts)
            handle.allocate(num_rows)
            own = self._rows.like(num_rows) if copy or not has_room else None
        except Exception as e:
            self._calls.fail(e)  # peers count on this rank to go on
            raise
        if has_room:
            self._unpack(handle, own, handle.beside_rows(), num_sms)
            return own or self._rows.first(num_rows)
        assert own is not None
        outputs = (True, *map(address_of, own), *handle.beside_rows())
        self._calls.run(
            "normal_dispatch",
            handle.num_tokens,
            *(*rows, _native.DispatchStart.RESUME, *routing, *handle.routes()),
            *(0, ticket, num_rows, *outputs, num_sms),
        )
        return own

    def _wait_for_counts(self, num_tokens: int, ticket: int) -> None:
        try:
            with self.counters.waiting(num_tokens):
                self._calls.run("normal_counts", num_tokens, ticket)
        except (EPBackendError, ValueError):
            raise  # kept for later calls already
        except BaseException as e:  # a signal handler's, as that of Ctrl-C; or CUDA has failed
            self._calls.fail(
                EPBackendError(
                    f"a dispatch of this buffer was broken off ({type(e).__name__}), but peers "
                    "count on this rank to go on. Create a new buffer."
                )
            )
            raise

    def _dispatch_unknown(
        self,
        rows: tuple[int, bool, int],
        routing: tuple[int, bool, int],
        handle: CudaNormalDispatchHandle,
        copy: bool,
        num_sms: int,
    ) -> Rows:
        """The host does not wait: N stays on the GPU."""
        own = None
        if copy or handle.may_need_rounds(self.num_rows):
            own = self._rows.like(handle.num_rows)
        outputs = (own is not None, *map(address_of, own or (None, None)), *handle.beside_rows())
        self._calls.run(
            "normal_dispatch",
            handle.num_tokens,
            *(*rows, _native.DispatchStart.ROUTE, *routing, *handle.routes()),
            *(handle.expert_counts.data_ptr(), 0, handle.num_rows, *outputs, num_sms),
        )
        return own or self._rows.first(handle.num_rows)

    def _dispatch_again(
        self,
        rows: tuple[int, bool, int],
        handle: CudaNormalDispatchHandle,
        copy: bool,
        num_sms: int,
    ) -> Rows:
        """With a handle's routing: rows travel alone."""
        own = None
        if copy or handle.may_need_rounds(self.num_rows):
            own = self._rows.like(handle.num_rows)
        outputs = (own is not None, *map(address_of, own or (None, None)), *_NOTHING_BESIDE_ROWS)
        self._calls.run(
            "normal_dispatch",
            handle.num_tokens,
            *(*rows, _native.DispatchStart.CACHED, 0, False, 0, *handle.routes()),
            *(0, 0, handle.num_rows, *outputs, num_sms),
        )
        return own or self._rows.first(handle.num_rows)

    def _unpack(
        self,
        handle: CudaNormalDispatchHandle,
        rows: Rows | None,
        beside_rows: tuple[int, int, int],
        num_sms: int,
    ) -> None:
        """Copies what an exact dispatch has brought from symmetric memory; rows only where tensors
        for them are given."""
        *_, batch = handle.routes()
        outputs = (*map(address_of, rows or (None, None)), *beside_rows)
        self._calls.run(
            "normal_unpack", handle.num_tokens, batch, *outputs, handle.num_rows, num_sms
        )

    def _checked_num_sms(self, num_sms: int) -> int:
        why = f"{self.device} has so many for a rank."
        check_int("num_sms", num_sms, 1, self.num_max_sms, why)
        return num_sms


def _aligned_counts(handle: CudaNormalDispatchHandle, alignment: int) -> list[int] | torch.Tensor:
    """Of each local expert, rounded up; a list where the host knows."""
    if handle.host_expert_counts is not None:
        return [-(-count // alignment) * alignment for count in handle.host_expert_counts]
    counts = handle.expert_counts
    if alignment == 1:
        return counts
    return (-(-counts // alignment) * alignment).to(counts.dtype)
