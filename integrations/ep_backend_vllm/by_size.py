"""`ep_backend_high_throughput` on the GPUs of one host: small steps take low-latency kernels.

Those that vLLM replays from CUDA graphs are decode steps: what counts there is the time of
messages, not of bytes. Both kinds hand over vLLM's standard format: experts need not know which it
was. In a prefill step one rank may have many tokens and the others few: normal kernels bring
experts as many rows as there are tokens, these as many from every rank as the fullest has.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from ep_backend import NormalBuffer
from ep_backend_vllm.adapter import Prepared, StandardAdapter, tokens_of_ranks
from ep_backend_vllm.high_throughput import NormalPrepareAndFinalize
from ep_backend_vllm.workspace import WorkspacePrepareAndFinalize

MOST_SMALL_TOKENS = 512
"""Of a rank. Of more, bytes take most of the time with either kind, and a workspace for them takes
memory: of 8 ranks and 512 tokens of 7168 bfloat16, 120 MB."""


def most_small_tokens(num_graph_tokens: int, hosts: list[int]) -> int:
    """Of a rank, in a step for low-latency kernels; 0: all are for normal ones.

    Args:
        num_graph_tokens: see `graphs.most_tokens`.
        hosts: of each rank. Workspaces are for ranks whose GPUs see each other's memory.
    """
    return min(num_graph_tokens, MOST_SMALL_TOKENS) if max(hosts) == 0 else 0


class BySizePrepareAndFinalize(StandardAdapter[NormalBuffer]):
    """A finalize follows each prepare.

    Args:
        small: for steps in which no rank has more tokens than its buffer takes.
        large: for the others, and where vLLM does not say how many ranks have.
    """

    def __init__(self, small: WorkspacePrepareAndFinalize, large: NormalPrepareAndFinalize) -> None:
        super().__init__(large.buffer)
        self._small = small
        self._large = large
        self._is_small = False  # the step that was prepared last

    def supports_async(self) -> bool:
        return True

    def prepare(self, *args: Any, **kwargs: Any) -> Prepared:
        """As that of either; every rank comes to the same."""
        sizes = tokens_of_ranks()
        self._is_small = 0 < max(sizes, default=0) <= self._small.buffer.num_max_tokens_per_rank
        return self._current().prepare(*args, **kwargs)

    def prepare_async(self, *args: Any, **kwargs: Any) -> Callable[[], Prepared]:
        prepared = self.prepare(*args, **kwargs)
        return lambda: prepared

    def allocate_fused_expert_output(self, *args: Any, **kwargs: Any) -> torch.Tensor | None:
        return self._current().allocate_fused_expert_output(*args, **kwargs)

    def finalize(self, *args: Any, **kwargs: Any) -> None:
        self._current().finalize(*args, **kwargs)

    def finalize_async(self, *args: Any, **kwargs: Any) -> Callable[[], None]:
        """Of a large step, combine runs beside shared experts; of a small one it is over sooner
        than another stream has been told."""
        if not self._is_small:
            return self._large.finalize_async(*args, **kwargs)
        self._small.finalize(*args, **kwargs)
        return lambda: None

    def _current(self) -> WorkspacePrepareAndFinalize | NormalPrepareAndFinalize:
        return self._small if self._is_small else self._large
