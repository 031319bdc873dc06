"""Low-latency dispatch and combine with receive hooks, for decode.

T tokens of this rank (T <= M), M num_max_tokens_per_rank, H hidden, K top_k, E experts, R ranks,
L experts of this rank, S = R * M rows an expert can receive, N = ceil(H / 128) scales a float8 row.

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

from dataclasses import replace

import torch

from ep_backend import _native, faults
from ep_backend.checks import (
    AtMost,
    check_alignment,
    check_handle,
    check_tensor,
    check_topk_weights,
    check_x_scales,
    note_overwritten,
    warn_of_gradients,
)
from ep_backend.errors import OrderError
from ep_backend.group import Group
from ep_backend.handles import (
    DispatchHandle,
    DispatchResult,
    KernelStatistics,
    OpCounters,
    RecvHook,
    address_of,
)
from ep_backend.kernel_calls import KernelCalls
from ep_backend.kernels import agreed_kernels, follow_stream, make_kernels, stream_of
from ep_backend.memory import SymmetricMemory, nvshmem
from ep_backend.network import NetworkConfig
from ep_backend.observe.buffer import BufferObserver, start_exporter
from ep_backend.order import PhaseOrder
from ep_backend.outputs import OutputShape, RecvBank, RecvBanks
from ep_backend.settings import (
    CUDA_ROW_ALIGNMENT,
    BufferSettings,
    check_num_sms,
    check_waits,
    default_transfer,
    device_type,
    usable_device,
)
from ep_backend.tuning import REMEDY, TABLE_KEY, Tuned, log_taken, look_up
from ep_backend.workspaces import Workspace, Workspaces

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
        dtype: of `x` and of what combine takes and gives, `torch.float32` or `torch.bfloat16`. Sums
            are in float32 either way.
        dispatch_dtype: of dispatch's rows as they travel and as the experts get them: `dtype`, the
            default, or `torch.float8_e4m3fn`, with a scale for every 128 channels.
        combine_dtype: of combine's rows as they travel, a rank's partial sum or an expert's row:
            `dtype`, the default, or `torch.float8_e4m3fn`, with a float32 scale (amax / 448) for
            every 128 channels: half the bytes of bfloat16, and errors that
            `ep-backend bench precision` measures. Quantised from float32, added in float32. A NaN
            stays alone; an infinity makes its 128 channels NaN. Not with workspaces, from which
            rows are read as the experts wrote them.
        scale_format: of dispatch's scales: "float32" (amax / 448), "power_of_two" (the next one),
            or "ue8m0", a power of two as its exponent byte.
        output_layout: of what is received, and of what combine takes. "expert_major": a row for
            each (token, expert), packed by expert. "rank_major": a row for each (token, source),
            its experts beside it; the caller weights and sums the experts of a row itself.
        reduction: where the rows that a token's experts made are weighted and added. "rank": on
            each rank that owns some of them, by the weights that dispatch was given; one partial
            sum a (token, rank) goes home. "source": at home, by the weights that combine is given;
            every row goes home as it is: more to send, but the sum is rounded only once, and
            dispatch need not wait for the weights. Expert-major only.
        transfer: CUDA: "pull", the receiver fetches rows; "push", the sender writes them into its
            peers' memory; "pull_push", dispatch's rows are fetched and combine's written. Default:
            "pull_push" between GPUs, "pull" in expert-major workspaces and between virtual ranks.
            The CPU always pushes; so does a combine with reduction "source". In workspaces
            dispatch's rows are written, and so are combine's of a tagged batch with "pull_push";
            all others are fetched.
        num_max_tagged_tokens: CUDA: batches of up to so many tokens travel with an epoch in every
            16 bytes, so that a receiver need not wait for a signal, and their rows come back so
            that it can see them come. In workspaces that is asked of `num_slots`. Default, at most
            256 and 0 where a row has more than 32 KiB: as many tokens as are 2816 KiB with the
            epochs, 256 of hidden 7168 in float8, 132 in bfloat16; with more than four ranks 256 /
            ranks. In rank-major workspaces between two ranks 352 KiB, 32 and 16 tokens; up to four
            704 KiB; more 200 KiB. Without hooks 2816 KiB, 1408 KiB and 200 KiB. Of virtual ranks in
            workspaces up to four 144 KiB, more 64 KiB; with hooks by expert 32 KiB, else nothing.
        with_hooks: CUDA: False says that every operation will be sent and received by one call
            (`dispatch_and_receive`, `combine_and_receive`). All work either way; by this, defaults
            are chosen.
        num_workspaces: CUDA, rank-major, or expert-major with reduction "source": if not 0, every
            exchange is in one of so many workspaces, sets of tensors in symmetric memory. Rows are
            sent straight to the `recv_*` tensors of their receiver, and fetched straight from its
            `combine_input`: nothing is copied. Expert-major, where a row goes depends on all
            batches: the send of a dispatch that is not tagged waits until every rank has come to
            its own.
        expert_ids: in workspaces, how received rows list their experts: "local", or "global". See
            `DispatchResult.recv_topk_idx`.
        hierarchical: where ranks are on several nodes (of a virtual world, `virtual_world`; on
            CUDA hosts, or `NetworkConfig.ranks_per_node`): a token crosses the network once for
            each node that owns some of its experts, to the rank of this one's number there, which
            forwards it; a node adds up what it sends home. Fewer bytes, by a hop within the node
            that the hooks take: a hook then waits for its peers' hooks, too, so that all ranks must
            come to it. Reduction "rank". On one node it changes nothing.
        num_banks: operations in flight, at least 2.
        timeout_secs: how long one wait for peers may last.
        device: where tensors live: "cpu", or a CUDA device. On CUDA, sends and hooks are launched
            on the current stream and return at once; what a kernel finds wrong is raised by a later
            call, or by `raise_if_failed()`.
        spin_us: CPU: how long a wait polls before it sleeps. Default: 50 where every rank has a
            core, else 0.
        num_sms: CUDA: blocks a kernel has at most. Default: all SMs, shared between virtual ranks,
            whose waiting kernels must fit on the GPU together.
        network: CUDA: how ranks are reached whose memory this GPU does not see; needs a build with
            NVSHMEM. Rows are pushed then, whatever `transfer` says, and nothing is tagged; every
            exchange is two kernels. No workspaces. The same on every rank. Default:
            EP_BACKEND_NETWORK, or `NetworkConfig()` where ranks are on several hosts, else none:
            CUDA IPC joins them.

    `transfer`, `num_max_tagged_tokens`, `spin_us` and `num_sms`, where they are left out, are those
    that `ep-backend tune` has found for the shape on this machine, if it has (`ep_backend.tuning`).
    What the table says must be the same on every rank.

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
        dispatch_dtype: torch.dtype | None = None,
        combine_dtype: torch.dtype | None = None,
        scale_format: str = "float32",
        output_layout: str = "expert_major",
        reduction: str = "rank",
        transfer: str | None = None,
        num_max_tagged_tokens: int | None = None,
        with_hooks: bool = True,
        num_workspaces: int = 0,
        expert_ids: str = "local",
        hierarchical: bool = False,
        num_banks: int = 2,
        timeout_secs: float = DEFAULT_TIMEOUT_SECS,
        device: str | torch.device = "cpu",
        spin_us: float | None = None,
        num_sms: int | None = None,
        network: NetworkConfig | None = None,
    ) -> None:
        by_default = default_transfer(
            group.num_ranks,
            has_expert_workspaces=num_workspaces > 0 and output_layout == "expert_major",
            is_virtual=group.is_virtual,
        )
        settings = BufferSettings(
            num_max_tokens_per_rank=num_max_tokens_per_rank,
            hidden=hidden,
            num_experts=num_experts,
            top_k=top_k,
            dtype=dtype,
            dispatch_dtype=dtype if dispatch_dtype is None else dispatch_dtype,
            combine_dtype=dtype if combine_dtype is None else combine_dtype,
            scale_format=scale_format,
            output_layout=output_layout,
            reduction=reduction,
            transfer=by_default if transfer is None else transfer,
            num_max_tagged_tokens=num_max_tagged_tokens,
            num_workspaces=num_workspaces,
            expert_ids=expert_ids,
            num_banks=num_banks,
            device=device_type(device),
            network=network,
            hierarchical=hierarchical,
            with_hooks=with_hooks,
            is_virtual=group.is_virtual,
        )
        error: Exception | None = None
        tuned = Tuned()
        try:
            if network is None and settings.device == "cuda":
                settings = replace(settings, network=NetworkConfig.from_env())
            settings.check(group.num_ranks)
            settings.check_nodes(group.num_nodes)
            start_exporter(group)
            check_waits(timeout_secs, spin_us)
            self.device = usable_device(device)
            check_num_sms(num_sms, self.device)
            tuned = look_up(settings.tuning_shape(group.num_ranks), group, self.device)
        except (TypeError, ValueError) as e:
            error = e
        given = {
            "transfer": transfer,
            "num_max_tagged_tokens": num_max_tagged_tokens,
            "spin_us": spin_us,
            "num_sms": num_sms,
        }
        settings = settings.tuned(tuned, given)
        agreed = {TABLE_KEY: tuned} | settings.agreed()
        group.agree("LowLatencyBuffer", agreed, error, {TABLE_KEY: REMEDY} | settings.remedies())
        log_taken("LowLatencyBuffer", group, tuned, given)
        if spin_us is None:
            spin_us = tuned.settings.get("spin_us")
        if settings.network is None and self.device.type == "cuda" and max(group.hosts()) > 0:
            # Nothing is tagged there, whatever the table says.
            settings = replace(
                settings,
                network=NetworkConfig(),
                num_max_tagged_tokens=num_max_tagged_tokens,
            )

        self.group = group
        self.num_max_tokens_per_rank = num_max_tokens_per_rank
        self.hidden = hidden
        self.num_experts = num_experts
        self.top_k = top_k
        self.dtype = dtype
        self.dispatch_dtype = settings.dispatch_dtype
        self.combine_dtype = settings.combine_dtype
        self.scale_format = scale_format
        self.output_layout = output_layout
        self.reduction = reduction
        self.num_banks = num_banks
        self.num_workspaces = num_workspaces
        self.expert_ids = expert_ids
        self.hierarchical = hierarchical
        ranks_per_node = settings.ranks_per_node(group)
        self.num_nodes: int = group.num_ranks // ranks_per_node
        """Of as many ranks each. Those of a node reach each other's memory. 1 where kernels ask for
        each pair by itself: on GPUs, flat, unless the network has `ranks_per_node`."""
        settings = replace(settings, hierarchical=hierarchical and self.num_nodes > 1)
        config = settings.config(group.num_ranks)
        layout = _native.LowLatencyLayout(config)
        multi_node = None
        if group.network is not None or settings.hierarchical:
            multi_node = settings.multi_node_config(group.num_ranks, ranks_per_node)
        self.is_multi_node: bool = multi_node is not None
        """Its kernels are told what is forwarded."""
        num_bytes = settings.num_symmetric_bytes(layout, multi_node)
        self.num_local_experts: int = layout.partition.num_local_experts(group.self_rank)
        self.first_expert: int = layout.partition.first_expert(group.self_rank)
        self.expert_capacity: int = layout.expert_capacity
        """S, rows that an expert can receive."""
        self.num_outcome_columns: int = layout.num_outcome_columns
        """C, rows that may come home for a token."""
        self.num_answer_words: int = layout.num_answer_words
        self.num_scales: int = layout.num_scales
        """N, scales of a dispatched row; 0 where it is not float8."""
        self.num_symmetric_bytes: int = num_bytes
        """Shared memory this buffer takes on every rank."""

        self._row_alignment = CUDA_ROW_ALIGNMENT if self.device.type == "cuda" else 1
        output_shape = OutputShape.of(settings, layout, group)
        self._x_dtypes = tuple(dict.fromkeys((self.dtype, self.dispatch_dtype)))
        self._expert_out_shape = (*output_shape.rows, hidden)
        self._memory: SymmetricMemory
        if settings.network is None:
            self._memory = group.allocate(num_bytes, self.device)
        else:
            nodes_of = ranks_per_node if self.num_nodes > 1 else None
            self._memory = nvshmem.allocate(group, num_bytes, self.device, settings, nodes_of)
        self._kernels = agreed_kernels(
            "LowLatencyBuffer",
            group,
            self._memory,
            lambda: make_kernels(
                config,
                multi_node,
                group,
                self._memory,
                self.device,
                timeout_secs,
                spin_us,
                num_sms,
                tuned.int_of("num_sms"),
            ),
        )
        base = self._memory.bases[group.self_rank]
        self._workspaces = Workspaces(
            num_workspaces, base, layout, output_shape, dtype, self.device
        )
        # Nobody is waited for: a send receives, too, and leaves its hook nothing to do.
        self._is_alone = group.num_ranks == 1 and self._kernels.dispatch is not None
        self._dispatches = PhaseOrder("dispatch", num_banks)
        self._combines = PhaseOrder("combine", num_banks)
        self._recv_banks = RecvBanks(output_shape, num_banks, self.device)
        self._fault = faults.active_fault()
        observer = BufferObserver(group, self.device, self.first_expert, self._kernels.statistics)
        self._calls = KernelCalls(
            self._kernels,
            num_experts,
            self.device,
            observer,
            self._kernels.statistics if self.device.type == "cpu" else None,
        )

    def dispatch(
        self,
        x: torch.Tensor,
        topk_idx: torch.Tensor,
        topk_weights: torch.Tensor | None = None,
        x_scales: torch.Tensor | None = None,
        workspace: int = 0,
        num_slots: int | None = None,
    ) -> tuple[DispatchResult, RecvHook]:
        """Sends every token once to each rank that owns one of its experts.

        Args:
            x: `[T, H]` of the buffer's dtype; or, where the dispatch dtype is float8, of that.
                Copied: it may change when this returns.
            topk_idx: `[T, K]` int32 or int64, global expert, -1 = not routed. An expert listed
                twice for a token receives it once, and both weights count.
            topk_weights: `[T, K]` float32, applied by combine; in the rank-major layout by the
                caller, on the receiving rank. With reduction "source" combine is given them: here
                they are ignored and may be left out.
            x_scales: `[T, N]` float32, of float8 `x`: a value is `x * scale`. With "power_of_two"
                and "ue8m0" they must be powers of two; that is not checked.
            workspace: where there are several, the one to use; the same on every rank. What is in
                it from the dispatch before need not have been combined, but must have been read.
            num_slots: in a workspace, rows that each source has in `recv_*` and `combine_input`,
                in place of M (expert-major, for every expert); no rank's T may be more. The same on
                every rank: where it is not, rows are lost, and the combine raises ProtocolError.

        Returns:
            The result, and the hook that fills it.

        Raises:
            ValueError: wrong shape, dtype or expert; nothing was sent. A wrong expert on CUDA is
                noticed by the kernel: it is raised by a later call, and the buffer stays failed.
            OrderError: `num_banks` dispatches are waiting for their hooks.
            PeerTimeout: a peer did not free the bank in time.
        """
        handle, arguments = self._prepare_dispatch(
            x, topk_idx, topk_weights, x_scales, workspace, num_slots
        )
        num_tokens = handle.num_tokens

        def send(epoch: int) -> tuple[RecvBank | Workspace, DispatchResult]:
            handle.epoch = epoch
            output = self._output_of(handle)  # if there is no memory for it, nothing is sent
            result = output.result(handle)
            if self._is_alone:
                self._calls.run("dispatch", num_tokens, *arguments, *output.arguments(result))
            else:
                self._calls.run("dispatch_send", num_tokens, *arguments)
            return output, result

        output, result = self._dispatches.send(send)
        sent_in = stream_of(self.device) if self._is_alone else None

        def unpack() -> None:
            if sent_in is None:
                self._calls.run("dispatch_recv", num_tokens, *output.arguments(result))
            else:
                self._follow_lone_send("dispatch_recv", sent_in)
            handle.is_received = True

        def receive() -> None:
            self._dispatches.hook(handle.epoch, unpack)

        return result, RecvHook(f"dispatch {handle.epoch}", receive)

    def dispatch_and_receive(
        self,
        x: torch.Tensor,
        topk_idx: torch.Tensor,
        topk_weights: torch.Tensor | None = None,
        x_scales: torch.Tensor | None = None,
        workspace: int = 0,
        num_slots: int | None = None,
    ) -> DispatchResult:
        """`dispatch` and its hook in one call; on CUDA also in one kernel. For where nothing could
        overlap with the transfer.

        Args, Returns: as `dispatch`, without the hook: the result is filled.

        Raises:
            ValueError, PeerTimeout: as `dispatch` and its hook. After a call that was interrupted
                on the CPU (Ctrl-C), create a new buffer.
            OrderError: a dispatch is waiting for its hook.
        """
        if self._kernels.dispatch is None:
            self._calls.require_usable("dispatch_and_receive")
            self._dispatches.require_idle()
            result, recv_hook = self.dispatch(
                x, topk_idx, topk_weights, x_scales, workspace, num_slots
            )
            recv_hook()
            return result
        handle, arguments = self._prepare_dispatch(
            x, topk_idx, topk_weights, x_scales, workspace, num_slots
        )

        def run(epoch: int) -> DispatchResult:
            handle.epoch = epoch
            output = self._output_of(handle)
            result = output.result(handle)
            received = output.arguments(result)
            self._calls.run("dispatch", handle.num_tokens, *arguments, *received)
            handle.is_received = True
            return result

        return self._dispatches.exchange(run)

    def combine(
        self,
        expert_out: torch.Tensor,
        handle: DispatchHandle,
        out: torch.Tensor | None = None,
        topk_weights: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, RecvHook]:
        """Sends the weighted sum of a token's expert rows home, one row a (token, rank); or, with
        reduction "source", every row, of which the hook makes the weighted sum. All ranks combine
        their dispatches in the same order.

        Args:
            expert_out: of the buffer's dtype, in the layout of `recv_x`. Expert-major
                `[L, S, H]`: rows that are not weighted yet. Rank-major `[R, M, H]`: for each
                message the sum over its experts, weighted. Rows behind the counts are not read. It
                may change when this returns. With workspaces: the `combine_input` of the handle's.
            handle: of a dispatch whose hook has been called.
            out: `[T, H]`, where the result goes; default: a new tensor.
            topk_weights: with reduction "source", and only then: `[T, K]` float32, of this rank's
                tokens. The hook reads them: they must not change before. Those of entries that
                are not routed are not read.

        Returns:
            `[T, H]`, valid once the hook has returned, and the hook. A token with no expert is 0.

        Raises:
            ValueError: wrong shape or dtype, or a handle of another buffer; nothing was sent.
            OrderError: the handle's dispatch hook was not called, or `num_banks` combines are
                waiting for their hooks.
            PeerTimeout: a peer did not free the bank in time.
            ProtocolError: from the hook, on the CPU: a peer has answered another dispatch, with
                other numbers of tokens. In a workspace: a peer was given another `num_slots`.
        """
        expert_out, out = self._prepare_combine(expert_out, handle, out, topk_weights)
        num_tokens = handle.num_tokens
        arguments = _combine_send_arguments(expert_out, handle)

        def send(epoch: int) -> int:
            if self._is_alone:
                received = _combine_recv_arguments(out, handle, topk_weights)
                self._calls.run("combine", num_tokens, *arguments, *received)
            else:
                self._calls.run("combine_send", num_tokens, *arguments)
            return epoch

        epoch = self._combines.send(send)
        sent_in = stream_of(self.device) if self._is_alone else None

        def add_up() -> None:
            if sent_in is None:
                # Of the tensors themselves: this keeps their memory until then.
                arguments = _combine_recv_arguments(out, handle, topk_weights)
                self._calls.run("combine_recv", num_tokens, *arguments)
            else:
                self._follow_lone_send("combine_recv", sent_in)

        def receive() -> None:
            self._combines.hook(epoch, add_up)

        return out, RecvHook(f"combine {epoch}", receive)

    def combine_and_receive(
        self,
        expert_out: torch.Tensor,
        handle: DispatchHandle,
        out: torch.Tensor | None = None,
        topk_weights: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """`combine` and its hook in one call, as `dispatch_and_receive`. Returns `[T, H]`, filled.

        Raises:
            OrderError: a combine is waiting for its hook; else as `combine` and its hook.
        """
        if self._kernels.combine is None:
            self._calls.require_usable("combine_and_receive")
            self._combines.require_idle()
            out, recv_hook = self.combine(expert_out, handle, out, topk_weights)
            recv_hook()
            return out
        expert_out, out = self._prepare_combine(expert_out, handle, out, topk_weights)
        arguments = _combine_send_arguments(expert_out, handle)
        arguments += _combine_recv_arguments(out, handle, topk_weights)
        self._combines.exchange(lambda _: self._calls.run("combine", handle.num_tokens, *arguments))
        return out

    def combine_input(self, workspace: int = 0, num_slots: int | None = None) -> torch.Tensor:
        """`[R, num_slots, H]`, expert-major `[L, R * num_slots, H]`, of the buffer's dtype, in
        symmetric memory: what a combine in that workspace takes. It may be written once a dispatch
        that was sent after the workspace's last combine was received has been received: peers have
        read it then.

        Args:
            num_slots: as the dispatch was given. Default: M.
        """
        if num_slots is None:
            num_slots = self.num_max_tokens_per_rank
        return self._workspaces.at(workspace, num_slots).combine_input

    def _follow_lone_send(self, kind: str, sent_in: int) -> None:
        """In place of a hook's kernel, where the send, in that stream, has received."""
        self._calls.require_done(kind)
        follow_stream(sent_in, self.device)

    def _output_of(self, handle: DispatchHandle) -> RecvBank | Workspace:
        """Where that dispatch, which has got its epoch, arrives."""
        if handle.workspace >= 0:
            return self._workspaces.of(handle)
        return self._recv_banks.of(handle.epoch)

    def counters(self) -> dict[str, OpCounters]:
        """Counters of "dispatch_send", "dispatch_recv", "combine_send" and "combine_recv"."""
        return self._kernels.counters()

    def statistics(self) -> KernelStatistics:
        """Who was waited for, and how much each expert got. On CUDA, waits for the device."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return self._kernels.statistics()

    def raise_if_failed(self) -> None:
        """Raises what kernels have reported so far. On CUDA, synchronise first to be sure."""
        self._calls.raise_if_failed()

    def close(self) -> None:
        """Unmaps this rank's view of the shared memory. Not collective; idempotent. Tensors that
        were returned stay valid.

        Raises:
            OrderError: an operation of this buffer is running in another thread.
        """
        for order in (self._dispatches, self._combines):
            order.require_unused()
        if self._calls.close():
            calls = self._calls  # the memory, which is kept, must not keep the buffer's tensors
            self._memory.close(has_failed=lambda: calls.has_failed)

    def links(self) -> list[str]:
        """`[R]`: how each rank is reached: "self", "shm", "p2p" or "rdma"."""
        network, self_rank = self.group.network, self.group.self_rank
        if network is not None and self.device.type == "cpu":
            return [network.link(self_rank, rank) for rank in range(self.group.num_ranks)]
        direct = "shm" if self.device.type == "cpu" else "p2p"
        links = ["rdma" if base == 0 else direct for base in self._memory.bases]
        links[self_rank] = "self"
        return links

    def __enter__(self) -> LowLatencyBuffer:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()

    def _prepare_dispatch(
        self,
        x: torch.Tensor,
        topk_idx: torch.Tensor,
        topk_weights: torch.Tensor | None,
        x_scales: torch.Tensor | None,
        workspace: int,
        num_slots: int | None,
    ) -> tuple[DispatchHandle, tuple[int, ...]]:
        """Checks the tensors; makes the handle and the arguments of the native dispatch_send."""
        check_tensor(
            "x",
            x,
            (AtMost(self.num_max_tokens_per_rank), self.hidden),
            self._x_dtypes,
            self.device,
            remedy="The buffer was created with these num_max_tokens_per_rank, hidden and dtypes.",
        )
        num_tokens = x.shape[0]
        shape = (num_tokens, self.top_k)
        check_tensor("topk_idx", topk_idx, shape, INDEX_DTYPES, self.device)
        if self.reduction == "source":
            topk_weights = None  # combine is given them
        else:
            check_topk_weights(topk_weights, shape, self.device, "dispatch", self.reduction)
        check_alignment("x", x, self._row_alignment)
        if x_scales is not None or x.dtype != self.dtype:
            check_x_scales(x, x_scales, self.num_scales, self.device)
        warn_of_gradients("dispatch", x, topk_weights)
        place = self._workspaces.place(num_tokens, workspace, num_slots)
        handle = DispatchHandle(self, num_tokens, *place)
        num_partials, answers, *_ = handle.pointers()
        return handle, (
            x.data_ptr(),
            x_scales is not None,
            address_of(x_scales),
            topk_idx.data_ptr(),
            topk_idx.dtype == torch.int64,
            address_of(topk_weights),
            num_tokens,
            num_partials,
            answers,
            handle.workspace,
            handle.num_slots,
        )

    def _prepare_combine(
        self,
        expert_out: torch.Tensor,
        handle: DispatchHandle,
        out: torch.Tensor | None,
        topk_weights: torch.Tensor | None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Checks the arguments; gives the rows to send, and the tensor for the result."""
        elsewhere = "handle is of another buffer. Combine on the buffer that dispatched."
        check_handle(handle, DispatchHandle, self, elsewhere)
        if not handle.is_received:
            raise OrderError(
                f"combine was called with the handle of dispatch {handle.epoch}, whose hook has "
                "not been called. Call that hook first."
            )
        shape: tuple[int, ...] = self._expert_out_shape
        if handle.workspace >= 0:
            shape = self.combine_input(handle.workspace, handle.num_slots).shape
        check_tensor("expert_out", expert_out, shape, (self.dtype,), self.device)
        check_alignment("expert_out", expert_out, self._row_alignment)
        warn_of_gradients("combine", expert_out, topk_weights, out)
        if handle.workspace >= 0:
            self._workspaces.check(expert_out, handle)
        shape = (handle.num_tokens, self.hidden)
        if out is None:
            out = torch.empty(shape, dtype=self.dtype, device=self.device)
        else:
            check_tensor("out", out, shape, (self.dtype,), self.device)
            check_alignment("out", out, self._row_alignment)
            note_overwritten(out)
        if self.reduction == "source":
            shape = (handle.num_tokens, self.top_k)
            check_topk_weights(topk_weights, shape, self.device, "combine", self.reduction)
        elif topk_weights is not None:
            raise ValueError(
                "topk_weights was given to combine, but with reduction 'rank' they were given at "
                "dispatch. Leave it out, or create the buffer with reduction='source'."
            )
        if self._fault is faults.Fault.DROP_REMOTE_CONTRIBUTIONS:
            expert_out = faults.drop_remote_contributions(expert_out, handle)
        return expert_out, out


def _combine_send_arguments(expert_out: torch.Tensor, handle: DispatchHandle) -> tuple[int, ...]:
    """Of the native combine_send."""
    _, _, *received = handle.pointers()
    return (expert_out.data_ptr(), *received, handle.workspace, handle.num_slots)


def _combine_recv_arguments(
    out: torch.Tensor, handle: DispatchHandle, topk_weights: torch.Tensor | None
) -> tuple[int, ...]:
    """Of the native combine_recv."""
    num_partials, answers, *_ = handle.pointers()
    weights = address_of(topk_weights)
    return (
        out.data_ptr(),
        handle.num_tokens,
        num_partials,
        answers,
        weights,
        handle.workspace,
        handle.num_slots,
    )
