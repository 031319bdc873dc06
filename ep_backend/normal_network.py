"""Normal dispatch and combine on CUDA between nodes: a token crosses the network once for each node
that wants it, and one row of it comes back from there.

T tokens of this rank, N rows received, H hidden, K top_k, R ranks, V other nodes, D = min(K, R),
the ranks that a token can go to, C tokens of a rank in a round.
"""

from __future__ import annotations

from functools import partial

import torch

from ep_backend import _native, faults
from ep_backend.group import Group
from ep_backend.handles import address_of
from ep_backend.kernels import agreed_kernels
from ep_backend.low_latency import DEFAULT_TIMEOUT_SECS
from ep_backend.memory import nvshmem
from ep_backend.memory.nvshmem import NetworkMemory
from ep_backend.network import NetworkConfig
from ep_backend.normal import NormalBuffer, overlap
from ep_backend.normal_checks import MAX_TOKENS
from ep_backend.normal_cuda import CudaNormalBuffer
from ep_backend.normal_cuda_counters import CudaNormalCounters
from ep_backend.normal_cuda_handles import CudaNormalDispatchHandle, Rows
from ep_backend.normal_handles import NormalDispatchHandle
from ep_backend.normal_network_settings import (
    NetworkNormalKernels,
    NetworkNormalSettings,
    network_settings_of,
)
from ep_backend.normal_settings import DEFAULT_NUM_BYTES, check_local_ids
from ep_backend.observe.buffer import start_exporter
from ep_backend.settings import check_waits, usable_device

_NOTHING_BESIDE_ROWS = (0, 0, 0)


class NetworkNormalBuffer(CudaNormalBuffer):
    """A `NormalBuffer` on CUDA whose ranks are on several nodes; made by that name. It is as
    `ep_backend.normal_cuda.CudaNormalBuffer`, but:

    - Rows travel in rounds, as between nodes on the CPU, and are copied out: all that a dispatch
      returns is the caller's, `copy` changes nothing, and `num_worst_tokens` may be any number.
    - A dispatch of exact sizes sends its rows when the host has learned them.
    - What `ep-backend tune` has found is not looked at.

    Attributes:
        ranks_per_node: of the nodes that a token crosses the network to.
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
        settings: NetworkNormalSettings | None = None
        error: Exception | None = None
        try:
            self.device = usable_device(device)
            settings = network_settings_of(
                group,
                network,
                hidden=hidden,
                num_experts=num_experts,
                top_k=top_k,
                dtype=dtype,
                dispatch_dtype=dtype if dispatch_dtype is None else dispatch_dtype,
                scale_format=scale_format,
                num_bytes=DEFAULT_NUM_BYTES if num_bytes is None else num_bytes,
            )
            settings.check(group.num_ranks)
            check_local_ids(expert_ids, "ranks of one host have")
            start_exporter(group)
            check_waits(timeout_secs, spin_us)
            self._take_sms(group, num_sms)
        except (TypeError, ValueError) as e:
            error = e
        agreed, remedies = {}, {}
        if settings is not None:
            agreed, remedies = settings.agreed(), settings.remedies()
        group.agree("NormalBuffer", agreed, error, remedies)
        assert settings is not None

        config = settings.config()
        self.num_tokens_per_round: int = settings.num_tokens_per_round()
        self.ranks_per_node: int = settings.ranks_per_node
        self.num_node_columns: int = min(top_k, group.num_ranks // self.ranks_per_node - 1)
        """Other nodes that a token can go to."""
        layout = _native.NormalLayout(
            settings.round_config(group.num_ranks, self.num_tokens_per_round)
        )
        allocate = partial(
            nvshmem.allocate, group, settings=settings, ranks_per_node=self.ranks_per_node
        )
        self._take(group, settings, layout, _native.NormalNetworkLayout(config).num_bytes, allocate)
        self._fault = faults.active_fault()
        memory = self._memory
        assert isinstance(memory, NetworkMemory)
        self._network_kernels = agreed_kernels(
            "NormalBuffer",
            group,
            memory,
            lambda: NetworkNormalKernels(
                config, group.self_rank, memory, timeout_secs, self.device
            ),
        )
        self._num_scale_words: int = layout.num_scale_words
        counters = CudaNormalCounters(
            self, self._network_kernels.num_operations(), 0, has_all_counts=False
        )
        self._start(self._network_kernels, counters)

    def combine_input(self, handle: NormalDispatchHandle) -> torch.Tensor:
        """`[N or num_worst_tokens, H]` of the buffer's dtype; combine copies it like any other."""
        self._check_handle(handle)
        return NormalBuffer.combine_input(self, handle)

    def _give_memory_back(self) -> None:
        """That late puts may reach is not used again."""
        calls = self._calls  # the memory, which is kept, must not keep the buffer's tensors
        self._memory.close(has_failed=lambda: calls.has_failed)

    def _new_handle(self, num_tokens: int) -> CudaNormalDispatchHandle:
        return NetworkNormalDispatchHandle(self, num_tokens)

    def _check_out(self, out: torch.Tensor | None) -> None:
        """Nothing that a caller has is in symmetric memory."""

    def _is_in_place(self, x: torch.Tensor) -> bool:
        """Combine copies it like any other."""
        return False

    def _input_of(
        self, x: torch.Tensor, handle: CudaNormalDispatchHandle, out: torch.Tensor
    ) -> tuple[tuple[_native.CombineInput, ...], torch.Tensor]:
        """Tokens come home before the last rows have left."""
        x = self._with_faults(x, handle)
        return (), x.clone() if overlap(x, out) else x

    def _dispatch_exact(
        self,
        rows: tuple[int, bool, int],
        routing: tuple[int, bool, int],
        handle: CudaNormalDispatchHandle,
        copy: bool,
        num_sms: int,
    ) -> Rows:
        """The host waits for counts, and makes room."""
        ticket = next(self._tickets)
        self._route(routing, handle, ticket, MAX_TOKENS, num_sms)
        self._wait_for_counts(handle.num_tokens, ticket)
        num_rows, num_rounds, expert_counts = self._network_kernels.counts()
        try:
            handle.take_counts(num_rows, num_rounds, expert_counts)
            handle.allocate(num_rows)
            received = self._new_rows(num_rows)
        except Exception as e:
            self._calls.fail(e)  # peers count on this rank to go on
            raise
        self._bring(rows, routing, handle, received, num_sms)
        return received

    def _dispatch_unknown(
        self,
        rows: tuple[int, bool, int],
        routing: tuple[int, bool, int],
        handle: CudaNormalDispatchHandle,
        copy: bool,
        num_sms: int,
    ) -> Rows:
        """The host does not wait: N stays on the GPU."""
        received = self._new_rows(handle.num_rows)
        self._route(routing, handle, 0, handle.num_rows, num_sms)
        self._bring(rows, routing, handle, received, num_sms)
        return received

    def _dispatch_again(
        self,
        rows: tuple[int, bool, int],
        handle: CudaNormalDispatchHandle,
        copy: bool,
        num_sms: int,
    ) -> Rows:
        """With a handle's routing: rows travel alone."""
        received = self._new_rows(handle.num_rows)
        self._bring(rows, None, handle, received, num_sms)
        return received

    def _route(
        self,
        routing: tuple[int, bool, int],
        handle: CudaNormalDispatchHandle,
        ticket: int,
        num_rows: int,
        num_sms: int,
    ) -> None:
        """Finds where tokens go, and exchanges counts."""
        topk_idx, is_int64, _ = routing
        self._calls.run(
            "normal_route",
            handle.num_tokens,
            *(topk_idx, is_int64, *handle.routes(), handle.expert_counts.data_ptr()),
            *(ticket, num_rows, num_sms),
        )

    def _bring(
        self,
        rows: tuple[int, bool, int],
        routing: tuple[int, bool, int] | None,
        handle: CudaNormalDispatchHandle,
        received: Rows,
        num_sms: int,
    ) -> None:
        """The rows; without a routing nothing beside them."""
        is_cached = routing is None
        beside_rows = _NOTHING_BESIDE_ROWS if is_cached else handle.beside_rows()
        self._calls.run(
            "normal_dispatch",
            handle.num_tokens,
            *(*rows, is_cached, *(routing or (0, False, 0)), *handle.routes()),
            *(*map(address_of, received), *beside_rows, handle.num_rows, num_sms),
        )

    def _new_rows(self, num_rows: int) -> Rows:
        rows = torch.empty((num_rows, self.hidden), dtype=self.dispatch_dtype, device=self.device)
        if self.num_scales == 0:
            return rows, None
        dtype = torch.int32 if self.scale_format == "ue8m0" else torch.float32
        shape = (num_rows, self._num_scale_words)
        return rows, torch.empty(shape, dtype=dtype, device=self.device)


class NetworkNormalDispatchHandle(CudaNormalDispatchHandle):
    """As `CudaNormalDispatchHandle`; csrc/nvshmem/normal.h says what its routes are."""

    buffer: NetworkNormalBuffer

    def __init__(self, buffer: NetworkNormalBuffer, num_tokens: int) -> None:
        num_ranks = buffer.group.num_ranks
        num_rounds = -(-num_tokens // buffer.num_tokens_per_round)
        num_targets = num_ranks + num_ranks // buffer.ranks_per_node - 1
        self.buffer = buffer
        self.num_tokens = num_tokens
        self.host_expert_counts = None
        self.num_rounds = None
        new = partial(torch.empty, dtype=torch.int32, device=buffer.device)
        self.ranks = new(num_tokens, dtype=torch.int64)
        """`[T]`: the ranks of each token, as bits."""
        self.messages = new((num_tokens, buffer.num_columns))
        """`[T, D]`: where each token went, ranks ascending, as `rank << 16 | slot`, the slot of its
        round; behind them anything."""
        self.node_slots = new((num_tokens, buffer.num_node_columns))
        """`[T, min(K, V)]`: slots of what went to other nodes, nodes ascending."""
        self.round_counts = new((num_rounds, num_targets))
        """`[ceil(T / C), R + V]`: messages for each rank, and for each other node."""
        self.sources = new((num_ranks, 2))
        """`[R, 2]`: of each source, its tokens, and its rows for this rank."""
        self.expert_counts = new(buffer.num_local_experts)

    @property
    def num_recv_tokens_per_rank(self) -> torch.Tensor:  # type: ignore[override]
        """`[R]` int32 on the GPU: rows from each rank; N is their sum."""
        return self.sources[:, 1]

    def may_need_rounds(self, num_rows_with_room: int) -> bool:
        """All rows travel in rounds."""
        return True

    def routes(self) -> tuple[int, ...]:  # type: ignore[override]
        """T, and addresses of all that tells where tokens and rows go."""
        return (
            self.num_tokens,
            self.ranks.data_ptr(),
            self.messages.data_ptr(),
            self.node_slots.data_ptr(),
            self.round_counts.data_ptr(),
            self.sources.data_ptr(),
        )

    def tensors(self) -> tuple[torch.Tensor, ...]:
        """All that is on the GPU."""
        return (
            self.ranks,
            self.messages,
            self.node_slots,
            self.round_counts,
            self.sources,
            self.expert_counts,
            self.recv_topk_idx,
            self.recv_topk_weights,
            self.recv_src_tokens,
        )
