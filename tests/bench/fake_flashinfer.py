"""A stand-in for `flashinfer.comm` on a CPU: its one-sided all-to-all, whose calls wait for each
other as the kernels do, so every rank needs a thread. It is as strict about what it is given as the
C++ of 0.7.2 is.

T tokens of a rank, K top_k, R ranks.
"""

from __future__ import annotations

import random
import threading
from collections import defaultdict

import torch

from ep_backend.reference import experts_of_rank

AUXILIARY_BYTES = 512
WAIT_SECS = 20.0


class FakeComm:
    def __init__(self, num_ranks: int, *, forgets_a_rank: bool = False) -> None:
        self._meeting = threading.Barrier(num_ranks)
        self._forgets_a_rank = forgets_a_rank
        self._slots: dict[int, dict[tuple[int, int], int]] = defaultdict(dict)
        """Of each source: where (token, rank) went."""
        self._counts: dict[int, list[int]] = {}
        """Of each rank: rows from each source."""
        self._offsets: dict[int, int] = {}
        """Of each rank: where combine reads."""

    def moe_a2a_get_workspace_size_per_rank(
        self, ep_size: int, max_num_tokens: int, dispatch_bytes: int, combine_bytes: int
    ) -> int:
        rows = ep_size * max_num_tokens
        return AUXILIARY_BYTES + aligned(rows * dispatch_bytes) + aligned(rows * combine_bytes)

    def moe_a2a_initialize(
        self, workspace: torch.Tensor, ep_rank: int, ep_size: int, max_num_tokens: int
    ) -> torch.Tensor:
        assert workspace.dtype == torch.uint8
        assert workspace.ndim == 2
        assert workspace.shape[0] == ep_size
        workspace[ep_rank].zero_()
        self._counts[ep_rank] = [0] * ep_size
        return torch.tensor([ep_rank, max_num_tokens])

    def moe_a2a_dispatch(
        self,
        token_selected_experts: torch.Tensor,
        input_payloads: list[torch.Tensor],
        workspace: torch.Tensor,
        metainfo: torch.Tensor,
        runtime_max_tokens_per_rank: int,
        ep_rank: int,
        ep_size: int,
        top_k: int,
        num_experts: int,
    ) -> tuple[list[torch.Tensor], int, None]:
        num_tokens = len(token_selected_experts)
        assert token_selected_experts.dtype == torch.int32
        assert token_selected_experts.shape == (num_tokens, top_k)
        assert metainfo[0] == ep_rank
        assert num_tokens <= runtime_max_tokens_per_rank <= metainfo[1]
        for payload in input_payloads:
            assert payload.is_contiguous()
            assert payload.shape[0] == num_tokens
            assert payload.ndim == 2

        def views(rank: int) -> tuple[list[torch.Tensor], int]:
            received, offset = [], AUXILIARY_BYTES
            for payload in input_payloads:
                assert offset % payload.itemsize == 0
                num_bytes = ep_size * runtime_max_tokens_per_rank * payload[0].nbytes
                part = workspace[rank, offset : offset + num_bytes].view(payload.dtype)
                received.append(part.view(ep_size, runtime_max_tokens_per_rank, -1))
                offset += num_bytes
            return received, aligned(offset)

        self._meet()  # dispatch overwrites what the last combine has read
        slots = self._slots[ep_rank]
        slots.clear()
        owners = {
            expert: rank
            for rank in range(ep_size)
            for expert in experts_of_rank(num_experts, ep_size, rank)
        }
        tokens = list(range(num_tokens))
        random.shuffle(tokens)  # the first to come gets the first slot
        for rank in range(ep_size):
            mine = [
                t
                for t in tokens
                if any(owners[e] == rank for e in token_selected_experts[t].tolist())
            ]
            self._counts[rank][ep_rank] = len(mine)
            for slot, token in enumerate(mine):
                slots[token, rank] = slot
                for payload, part in zip(input_payloads, views(rank)[0], strict=True):
                    part[ep_rank, slot] = payload[token]
        self._meet()
        received, self._offsets[ep_rank] = views(ep_rank)
        return received, self._offsets[ep_rank], None

    def moe_a2a_sanitize_expert_ids(
        self,
        expert_ids: torch.Tensor,
        workspace: torch.Tensor,
        metainfo: torch.Tensor,
        ep_rank: int,
        invalid_expert_id: int,
    ) -> None:
        assert expert_ids.dtype == torch.int32
        assert expert_ids.ndim == 3
        for rows, count in zip(expert_ids, self._counts[ep_rank], strict=True):
            rows[count:] = invalid_expert_id

    def moe_a2a_combine(
        self,
        payload: torch.Tensor,
        local_num_tokens: int,
        workspace: torch.Tensor,
        metainfo: torch.Tensor,
        runtime_max_tokens_per_rank: int,
        ep_rank: int,
        ep_size: int,
        top_k: int,
        combine_payload_offset: int,
        payload_in_workspace: bool,
        output: torch.Tensor,
    ) -> torch.Tensor:
        assert payload.shape[:2] == (ep_size, runtime_max_tokens_per_rank)
        assert payload_in_workspace
        assert combine_payload_offset == self._offsets[ep_rank]
        assert payload.data_ptr() == workspace[ep_rank, combine_payload_offset:].data_ptr()
        assert output.shape == (local_num_tokens, payload.shape[2])
        assert output.dtype == payload.dtype
        self._meet()
        total = torch.zeros(output.shape)
        for (token, rank), slot in self._slots[ep_rank].items():
            if not (self._forgets_a_rank and rank == 0):
                there = workspace[rank, combine_payload_offset:][: payload.nbytes]
                total[token] += there.view(payload.dtype).view(payload.shape)[ep_rank, slot].float()
        return output.copy_(total)

    def _meet(self) -> None:
        self._meeting.wait(WAIT_SECS)


def aligned(num_bytes: int) -> int:
    return -(-num_bytes // 128) * 128
