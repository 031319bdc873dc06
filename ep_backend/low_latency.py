"""Low-latency dispatch and combine with receive hooks, for decode.

T tokens of this rank (T <= M), M num_max_tokens_per_rank, H hidden, K top_k, E experts, R ranks,
L experts of this rank, S = R * M rows an expert can receive.

    buffer = LowLatencyBuffer(group, num_max_tokens_per_rank=128, hidden=2048, num_experts=64,
                              top_k=8, dtype=torch.bfloat16)
    result, recv_hook = buffer.dispatch(x, topk_idx, topk_weights)      # only sends
    ...                                                                 # work that overlaps
    recv_hook()                                                         # waits and unpacks
    y = experts(result.recv_x, result.num_recv_tokens_per_expert)
    combined, recv_hook = buffer.combine(y, result.handle)
    recv_hook()
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch

from ep_backend import _native, faults
from ep_backend.checks import AtMost, check_alignment, check_tensor
from ep_backend.errors import EPBackendError, OrderError, PeerTimeout, ProtocolError
from ep_backend.group import Group
from ep_backend.handles import DispatchHandle, DispatchResult, OpCounters, RecvHook
from ep_backend.kernel_errors import exception_for
from ep_backend.kernels import make_kernels
from ep_backend.observe.trace import TraceWriter
from ep_backend.order import PhaseOrder
from ep_backend.settings import (
    DTYPES,
    check_num_sms,
    check_settings,
    check_waits,
    device_type,
    usable_device,
)

INDEX_DTYPES = (torch.int64, torch.int32)
DEFAULT_TIMEOUT_SECS = 60.0


class LowLatencyBuffer:
    """Symmetric memory and state for low-latency dispatch and combine of one MoE shape.

    Creation is collective. Afterwards every rank issues the same sequence of operations; the number
    of tokens may differ between ranks and calls. At most `num_banks` dispatches, and as many
    combines, may be between their send and their hook; hooks of a phase are called in the order of
    their sends. Layers of a model with the same shape share one buffer.

    Args:
        group: the ranks.
        num_max_tokens_per_rank: M, the most tokens one dispatch may send from a rank.
        hidden: H, any number of elements.
        num_experts: E, global. Rank r owns a contiguous block of them; where R does not divide E,
            the first E mod R ranks own one more.
        top_k: K, experts a token is routed to.
        dtype: payload, `torch.float32` or `torch.bfloat16`. Sums are in float32 either way; a
            rank's partial sum travels as `dtype`.
        num_banks: operations in flight, at least 2.
        timeout_secs: how long one wait for peers may last.
        device: where tensors live: "cpu", or a CUDA device. On CUDA, sends and hooks are launched
            on the current stream and return at once; what a kernel finds wrong is raised by a later
            call, or by `raise_if_failed()`.
        spin_us: CPU: how long a wait polls before it sleeps. Default: 50 where every rank has a
            core, else 0.
        num_sms: CUDA: blocks a kernel has at most. Default: all SMs, shared between virtual ranks,
            whose waiting kernels must fit on the GPU together.

    Raises:
        ValueError: an argument is out of range; the text names the limit.
        SettingsMismatch: ranks disagree; raised on every rank.
        RendezvousError: a rank is missing or has no room for its memory.
    """

    def __init__(
        self,
        group: Group,
        *,
        num_max_tokens_per_rank: int,
        hidden: int,
        num_experts: int,
        top_k: int,
        dtype: torch.dtype,
        num_banks: int = 2,
        timeout_secs: float = DEFAULT_TIMEOUT_SECS,
        device: str | torch.device = "cpu",
        spin_us: float | None = None,
        num_sms: int | None = None,
    ) -> None:
        settings = {
            "num_max_tokens_per_rank": num_max_tokens_per_rank,
            "hidden": hidden,
            "num_experts": num_experts,
            "top_k": top_k,
            "dtype": dtype,
            "num_banks": num_banks,
            "device": device_type(device),
            "protocol version": _native.PROTOCOL_VERSION,
        }
        error: Exception | None = None
        try:
            check_settings(group.num_ranks, settings)
            check_waits(timeout_secs, spin_us)
            self.device = usable_device(device)
            check_num_sms(num_sms, self.device)
        except (TypeError, ValueError) as e:
            error = e
        group.agree("LowLatencyBuffer", settings, error)

        self.group = group
        self.num_max_tokens_per_rank = num_max_tokens_per_rank
        self.hidden = hidden
        self.num_experts = num_experts
        self.top_k = top_k
        self.dtype = dtype
        self.num_banks = num_banks
        config = _native.LowLatencyConfig(
            num_ranks=group.num_ranks,
            num_experts=num_experts,
            num_max_tokens_per_rank=num_max_tokens_per_rank,
            hidden=hidden,
            top_k=top_k,
            num_banks=num_banks,
            dtype=DTYPES[dtype],
        )
        layout = _native.LowLatencyLayout(config)
        self.num_local_experts: int = layout.partition.num_local_experts(group.self_rank)
        self.first_expert: int = layout.partition.first_expert(group.self_rank)
        self.expert_capacity: int = layout.expert_capacity
        """S, rows of `recv_x` an expert has."""
        self.num_symmetric_bytes: int = layout.num_bytes
        """Shared memory this buffer takes on every rank."""

        # The CUDA kernels move rows in the widest vectors that divide them.
        self._row_alignment = math.gcd(16, layout.row_bytes) if self.device.type == "cuda" else 1
        self._memory = group.allocate(layout.num_bytes, self.device)
        self._rank = make_kernels(
            config, group, self._memory.bases, self.device, timeout_secs, spin_us, num_sms
        )
        self._dispatches = PhaseOrder("dispatch", num_banks)
        self._combines = PhaseOrder("combine", num_banks)
        self._recv_x: list[torch.Tensor | None] = [None] * num_banks
        self._failure: Exception | None = None
        self._is_closed = False
        self._fault = faults.active_fault()
        self._trace = TraceWriter.from_env(f"rank{group.self_rank}")

    def dispatch(
        self, x: torch.Tensor, topk_idx: torch.Tensor, topk_weights: torch.Tensor
    ) -> tuple[DispatchResult, RecvHook]:
        """Sends every token once to each rank that owns one of its experts.

        Args:
            x: `[T, H]` of the buffer's dtype. Copied: it may change when this returns.
            topk_idx: `[T, K]` int32 or int64, global expert, -1 = not routed. An expert listed
                twice for a token receives it once, and both weights count.
            topk_weights: `[T, K]` float32, applied by combine.

        Returns:
            The result, and the hook that fills it.

        Raises:
            ValueError: wrong shape, dtype or expert; nothing was sent. A wrong expert on CUDA is
                noticed by the kernel: it is raised by a later call, and the buffer stays failed.
            OrderError: `num_banks` dispatches are waiting for their hooks.
            PeerTimeout: a peer did not free the bank in time.
        """
        num_tokens = self._check_dispatch(x, topk_idx, topk_weights)
        handle = DispatchHandle(self, num_tokens)
        num_partials, *received = handle.pointers()
        handle.epoch = self._dispatches.send(
            lambda: self._run(
                "dispatch_send",
                num_tokens,
                self._rank.dispatch_send,
                x.data_ptr(),
                topk_idx.data_ptr(),
                topk_idx.dtype == torch.int64,
                topk_weights.data_ptr(),
                num_tokens,
                num_partials,
            )
        )
        counts = torch.empty(self.num_local_experts, dtype=torch.int32, device=self.device)
        result = DispatchResult(handle, self._recv_bank(handle.epoch), counts)

        def unpack() -> None:
            self._run(
                "dispatch_recv",
                num_tokens,
                self._rank.dispatch_recv,
                result.recv_x.data_ptr(),
                counts.data_ptr(),
                *received,
            )
            handle.is_received = True

        def receive() -> None:
            self._dispatches.hook(handle.epoch, unpack)

        return result, RecvHook(f"dispatch {handle.epoch}", receive)

    def combine(
        self, expert_out: torch.Tensor, handle: DispatchHandle, out: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, RecvHook]:
        """Sends the weighted sum of a token's expert rows home, one row a (token, rank).

        Args:
            expert_out: `[L, S, H]` in the layout of `recv_x`; rows behind the counts are not read.
                It may change when this returns.
            handle: of a dispatch whose hook has been called.
            out: `[T, H]`, where the result goes; default: a new tensor.

        Returns:
            `[T, H]`, valid once the hook has returned, and the hook. A token with no expert is 0.

        Raises:
            ValueError: wrong shape or dtype, or a handle of another buffer; nothing was sent.
            OrderError: the handle's dispatch hook was not called, or `num_banks` combines are
                waiting for their hooks.
            PeerTimeout: a peer did not free the bank in time.
        """
        out = self._check_combine(expert_out, handle, out)
        if self._fault is faults.Fault.DROP_REMOTE_CONTRIBUTIONS:
            handle = faults.drop_remote_contributions(handle)
        num_partials, *received = handle.pointers()
        epoch = self._combines.send(
            lambda: self._run(
                "combine_send",
                handle.num_tokens,
                self._rank.combine_send,
                expert_out.data_ptr(),
                *received,
            )
        )

        def add_up() -> None:
            self._run(
                "combine_recv",
                handle.num_tokens,
                self._rank.combine_recv,
                out.data_ptr(),
                handle.num_tokens,
                num_partials,
            )

        def receive() -> None:
            self._combines.hook(epoch, add_up)

        return out, RecvHook(f"combine {epoch}", receive)

    def counters(self) -> dict[str, OpCounters]:
        """Counters of "dispatch_send", "dispatch_recv", "combine_send" and "combine_recv"."""
        return self._rank.counters()

    def raise_if_failed(self) -> None:
        """Raises what kernels have reported so far. On CUDA, synchronise first to be sure."""
        if self._failure is not None:
            raise self._failure
        self._raise_unless_ok(self._rank.report())

    def close(self) -> None:
        """Unmaps this rank's view of the shared memory. Not collective; idempotent. No operation of
        this rank may be running; tensors that were returned stay valid."""
        if not self._is_closed:
            self._is_closed = True
            self._memory.close()

    def __enter__(self) -> LowLatencyBuffer:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()

    def _check_dispatch(
        self, x: torch.Tensor, topk_idx: torch.Tensor, topk_weights: torch.Tensor
    ) -> int:
        check_tensor(
            "x",
            x,
            (AtMost(self.num_max_tokens_per_rank), self.hidden),
            (self.dtype,),
            self.device,
            remedy="The buffer was created with these num_max_tokens_per_rank, hidden and dtype.",
        )
        num_tokens = x.shape[0]
        shape = (num_tokens, self.top_k)
        check_tensor("topk_idx", topk_idx, shape, INDEX_DTYPES, self.device)
        check_tensor("topk_weights", topk_weights, shape, (torch.float32,), self.device)
        check_alignment("x", x, self._row_alignment)
        return num_tokens

    def _check_combine(
        self, expert_out: torch.Tensor, handle: DispatchHandle, out: torch.Tensor | None
    ) -> torch.Tensor:
        if handle.buffer is not self:
            raise ValueError("handle is of another buffer. Combine on the buffer that dispatched.")
        if not handle.is_received:
            raise OrderError(
                f"combine was called with the handle of dispatch {handle.epoch}, whose hook has "
                "not been called. Call that hook first."
            )
        shape = (self.num_local_experts, self.expert_capacity, self.hidden)
        check_tensor("expert_out", expert_out, shape, (self.dtype,), self.device)
        check_alignment("expert_out", expert_out, self._row_alignment)
        if out is None:
            size = (handle.num_tokens, self.hidden)
            return torch.empty(size, dtype=self.dtype, device=self.device)
        check_tensor("out", out, (handle.num_tokens, self.hidden), (self.dtype,), self.device)
        check_alignment("out", out, self._row_alignment)
        return out

    def _recv_bank(self, epoch: int) -> torch.Tensor:
        bank = epoch % self.num_banks
        recv_x = self._recv_x[bank]
        if recv_x is None:
            # Kept: fresh pages for each dispatch would cost more than the exchange.
            shape = (self.num_local_experts, self.expert_capacity, self.hidden)
            recv_x = self._recv_x[bank] = torch.empty(shape, dtype=self.dtype, device=self.device)
        return recv_x

    def _run(
        self, kind: str, num_tokens: int, kernel: Callable[..., _native.OpResult], *args: int
    ) -> None:
        """Calls a kernel, with a span around it where a trace is wanted; raises what it reports."""
        if self._is_closed:
            raise EPBackendError(f"{kind} was called on a closed buffer.")
        if self._failure is not None:
            raise self._failure
        if self._trace is None:
            result = kernel(*args)
        else:
            with self._trace.span(kind, num_tokens) as span:
                result = kernel(*args)
                span.wait_ns = result.wait_ns
        self._raise_unless_ok(result)

    def _raise_unless_ok(self, result: _native.OpResult) -> None:
        if result.ok:
            return
        is_async = self.device.type == "cuda"
        error = exception_for(result, self.num_experts, is_async=is_async)
        if isinstance(error, (PeerTimeout, ProtocolError)) or is_async:
            self._failure = error  # every later call raises it again
        raise error
