"""DeepEP V1's `Buffer` on top of ours, for code that was written for DeepEP.

It translates, kernels are elsewhere. Names in signatures are DeepEP's. For decode:

    import ep_backend.deep_ep as deep_ep

    buffer = deep_ep.Buffer(gloo_group, low_latency_mode=True)
    (recv_x, scales), recv_count, handle, _, hook = buffer.low_latency_dispatch(
        x, topk_idx, num_max_dispatch_tokens_per_rank, num_experts, return_recv_hook=True
    )
    hook()                                                              # waits and unpacks
    combined, _, hook = buffer.low_latency_combine(
        experts(recv_x, scales, recv_count), topk_idx, topk_weights, handle, return_recv_hook=True
    )
    hook()

For prefill:

    per_rank, _, per_expert, is_token_in_rank, _ = buffer.get_dispatch_layout(topk_idx, num_experts)
    recv_x, recv_topk_idx, recv_topk_weights, counts, handle, _ = buffer.dispatch(
        x, num_tokens_per_rank=per_rank, is_token_in_rank=is_token_in_rank,
        num_tokens_per_expert=per_expert, topk_idx=topk_idx, topk_weights=topk_weights,
    )
    y = experts(recv_x, recv_topk_idx, recv_topk_weights)               # weighted, summed
    combined, _, _ = buffer.combine(y, handle)

Both reach ranks on other hosts from GPUs, as `LowLatencyBuffer` and `NormalBuffer` do, with the
settings of EP_BACKEND_NETWORK if it is set. NVSHMEM learns the depth of queue pairs once, from the
first shape: where normal calls come first, set a queue_pair_depth that low-latency ones need.

What differs from DeepEP: any hidden size, any top_k to 64, any number of ranks of a host, experts
that ranks do not divide and float32 `x` are fine; rows are ordered by source rank, then token;
hooks called in a wrong order raise `OrderError` instead of hanging; a dead peer raises
`PeerTimeout`; `hook` is never None.
"""

from __future__ import annotations

from typing import Any, NoReturn

import torch
import torch.distributed as dist

from ep_backend import _native
from ep_backend.checks import check_int
from ep_backend.comm_stream import CommStream
from ep_backend.deep_ep_arguments import refuse_masking
from ep_backend.deep_ep_config import MOST, Config
from ep_backend.deep_ep_low_latency import LowLatencyCalls
from ep_backend.deep_ep_normal import NormalCalls
from ep_backend.events import EventHandle, EventOverlap
from ep_backend.group import Group

__all__ = ["Buffer", "Config", "EventHandle", "EventOverlap", "topk_idx_t"]

TIMEOUT_SECS = 100.0
"""How long DeepEP's kernels wait."""

topk_idx_t = torch.int64
"""DeepEP's dtype of experts; int32 is fine, too."""


class Buffer(LowLatencyCalls, NormalCalls):
    """DeepEP's communication buffer, for normal and for low-latency dispatch and combine.

    Creation takes no memory and is not collective. The first dispatch of a shape (M, H, E, K, dtype
    of `x`, float8 and scale format, weights at dispatch or at combine) creates what that shape
    needs, which is collective, and keeps it: all ranks issue the same calls, as with DeepEP. Before
    a CUDA graph is captured, dispatch once outside of it. Shapes, and the two halves, share no
    memory: calls may change between them at any time.

    Low latency: between their call and their hook there may be two dispatches and two combines of
    each shape; hooks are called in the order of their calls. A call without `return_recv_hook`
    needs that none of its kind is waiting for its hook.

    Args:
        group: a torch.distributed process group with a gloo backend, or ours.
        num_nvl_bytes: if not 0, the most that a shape of the normal calls takes; a token of every
            rank fits always. On the CPU never more than 64 MiB are taken; on a GPU so much, or 256
            MiB if it is 0: batches that have no room travel in rounds, which is slower.
        num_rdma_bytes: not used: low-latency memory is taken at first use, as much as is needed.
        low_latency_mode: not used: both halves are always there.
        num_qps_per_rank, allow_nvlink_for_low_latency_mode, allow_mnnvl, use_fabric: not used: they
            choose between links that we do not have.
        explicitly_destroy: not used: `destroy` may always be called, and what it frees is also
            freed with the last reference to the buffer.
        enable_shrink: must be False: ranks cannot be masked.
        comm: of mpi4py; must be None.
        timeout_secs: ours: how long one wait for peers may last.

    Attributes:
        rank, group_size: this rank, and how many there are.

    Raises:
        NotImplementedError: `enable_shrink` is True, or `comm` was given.
        ValueError: `group` is None or has no gloo backend; or `num_nvl_bytes` is negative.
    """

    num_sms: int = 20
    """Of every buffer: what `set_num_sms` was given. Blocks, and so SMs, that the kernels of normal
    calls on CUDA tensors take at most; 0: as many as they think best. An odd number is fine."""

    def __init__(
        self,
        group: dist.ProcessGroup | Group | None,
        num_nvl_bytes: int = 0,
        num_rdma_bytes: int = 0,
        low_latency_mode: bool = False,
        num_qps_per_rank: int = 24,
        allow_nvlink_for_low_latency_mode: bool = True,
        allow_mnnvl: bool = False,
        explicitly_destroy: bool = False,
        enable_shrink: bool = False,
        comm: Any = None,
        *,
        use_fabric: bool = False,
        timeout_secs: float = TIMEOUT_SECS,
    ) -> None:
        if comm is not None:
            raise NotImplementedError(
                "comm was given, but ranks meet through torch.distributed only. Pass group, a "
                "process group with a gloo backend."
            )
        if enable_shrink:
            refuse_masking("enable_shrink is True")
        check_int("num_nvl_bytes", num_nvl_bytes, 0, 1 << 60)
        if group is None:
            raise ValueError(
                "group is None. Pass a torch.distributed process group with a gloo backend, or an "
                "ep_backend.Group."
            )
        ours = group if isinstance(group, Group) else Group.from_process_group(group)
        super().__init__(ours, timeout_secs)
        self.group = group
        self.rank = ours.self_rank
        self.group_size = ours.num_ranks
        self.num_nvl_bytes = num_nvl_bytes
        self.num_rdma_bytes = num_rdma_bytes
        self.low_latency_mode = low_latency_mode
        self.explicitly_destroy = explicitly_destroy

    @staticmethod
    def is_sm90_compiled() -> bool:
        """Whether there are CUDA kernels."""
        return _native.has_cuda

    @staticmethod
    def set_num_sms(new_num_sms: int) -> None:
        """Of every buffer: of its normal calls without a config, and for `get_dispatch_config` and
        `get_combine_config`.

        Raises:
            ValueError: out of range.
        """
        check_int("new_num_sms", new_num_sms, 0, MOST)
        Buffer.num_sms = new_num_sms

    @staticmethod
    def capture() -> EventOverlap:
        """What the current stream has been given until now, to be waited for by a later call."""
        return EventOverlap(EventHandle())

    @staticmethod
    def get_dispatch_config(num_ranks: int) -> Config:
        """A `Config` for any number of ranks, of what `set_num_sms` was given."""
        check_int("num_ranks", num_ranks, 1, _native.MAX_RANKS)
        return Config(Buffer.num_sms)

    @staticmethod
    def get_combine_config(num_ranks: int) -> Config:
        """As `get_dispatch_config`."""
        return Buffer.get_dispatch_config(num_ranks)

    def get_comm_stream(self) -> torch.cuda.Stream | None:
        """The stream of calls with `previous_event` or `async_finish` on tensors of the current
        device; others run on the current stream. None where no GPU is in use."""
        if not torch.cuda.is_initialized():
            return None
        streams = self._streams_of(torch.device("cuda", torch.cuda.current_device()))
        assert isinstance(streams, CommStream)
        return streams.stream

    def get_local_buffer_tensor(
        self,
        dtype: torch.dtype,
        size: torch.Size | None = None,
        offset: int = 0,
        use_rdma_buffer: bool = False,
    ) -> NoReturn:
        """Raises `NotImplementedError`: there is no memory of all shapes to look at."""
        raise NotImplementedError(
            "get_local_buffer_tensor was called, but each shape has memory of its own, which only "
            "kernels write. Make a tensor with torch.empty instead."
        )

    def destroy(self) -> None:
        """Frees the shared memory. Not collective, unlike DeepEP's; idempotent. No operation of
        this rank may be running; tensors that were returned stay valid."""
        self._is_destroyed = True
        for buffer in self._buffers.values():
            buffer.close()
        for streams in self._streams.values():
            streams.close()
        self._combine_inputs.clear()
