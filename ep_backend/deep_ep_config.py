"""DeepEP's `Config`, which tunes its normal kernels."""

from __future__ import annotations

from dataclasses import dataclass

from ep_backend import _native
from ep_backend.checks import check_int

MOST = (1 << 31) - 1


@dataclass(frozen=True)
class Config:
    """SMs of a normal call, and how many tokens a queue between two ranks takes and holds.

    Normal calls on CUDA tensors take `num_sms`; our kernels have no queues. Its hints say what a
    rank's memory would be with as many tokens in flight; `Buffer` takes no more than it is given.

    Raises:
        ValueError: a number is out of range; a queue must hold more than it takes at once, and over
            RDMA twice as much.
    """

    num_sms: int = 20
    num_max_nvl_chunked_send_tokens: int = 6
    num_max_nvl_chunked_recv_tokens: int = 256
    num_max_rdma_chunked_send_tokens: int = 6
    num_max_rdma_chunked_recv_tokens: int = 256

    def __post_init__(self) -> None:
        check_int("num_sms", self.num_sms, 0, MOST)
        for link, factor in (("nvl", 1), ("rdma", 2)):
            send_name = f"num_max_{link}_chunked_send_tokens"
            send = getattr(self, send_name)
            check_int(send_name, send, 1, MOST)
            least = factor * send if factor > 1 else send + 1
            recv_name = f"num_max_{link}_chunked_recv_tokens"
            why = f"{send_name} is {send}."
            check_int(recv_name, getattr(self, recv_name), least, MOST, why)

    def get_nvl_buffer_size_hint(self, hidden_bytes: int, num_ranks: int) -> int:
        """Bytes for rounds of as many tokens as the queues of `num_sms / 2` channels hold.

        Args:
            hidden_bytes: of a row.

        Raises:
            ValueError: an argument is out of range.
        """
        check_int("hidden_bytes", hidden_bytes, 1, 1 << 21)
        check_int("num_ranks", num_ranks, 1, _native.MAX_RANKS)
        num_tokens = max(1, self.num_sms // 2) * self.num_max_nvl_chunked_recv_tokens
        num_tokens = -(-num_tokens // _native.NUM_ROUND_BANKS)
        config = _native.NormalConfig(
            num_ranks=num_ranks,
            num_experts=_native.MAX_EXPERTS,
            hidden=-(-hidden_bytes // 2),
            top_k=_native.MAX_TOP_K,
            dtype=_native.DType.BFLOAT16,
            dispatch_dtype=_native.DType.BFLOAT16,
            scale_format=_native.ScaleFormat.FLOAT32,
            num_tokens_per_round=min(num_tokens, _native.MAX_TOKENS_PER_RANK),
        )
        return _native.NormalLayout(config).num_bytes

    def get_rdma_buffer_size_hint(self, hidden_bytes: int, num_ranks: int) -> int:
        """0: what ranks on other hosts need is part of `num_nvl_bytes`.

        Raises:
            ValueError: an argument is out of range.
        """
        check_int("hidden_bytes", hidden_bytes, 1, 1 << 21)
        check_int("num_ranks", num_ranks, 1, _native.MAX_RANKS)
        return 0
