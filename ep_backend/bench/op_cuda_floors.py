"""What the GPU itself takes: a kernel in a graph, a copy, and a GEMM beside an exchange."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

import torch

from ep_backend.bench.op_cuda_case import check_lockstep, inputs_of, open_buffers
from ep_backend.bench.op_cuda_graph import NUM_WARMUP_REPLAYS, Spread, capture, time_replays
from ep_backend.bench.op_cuda_rank import RankOps
from ep_backend.bench.op_cuda_settings import Case, CudaBenchSettings

COPY_BYTES = 1 << 30
NUM_COPIES = 20
# Rows, columns and depth.
GEMM_SIZE = 4096


def one_element_kernel_us(num_ranks: int, chain: int, num_repeats: int) -> Spread:
    """A kernel that adds 1 to one element, in a chain of its kind; one chain a rank, side by side.
    No operation is faster than the kernels it consists of."""

    def branch(element: torch.Tensor) -> None:
        for _ in range(chain):
            element.add_(1.0)

    graph = capture([partial(branch, torch.zeros(1, device="cuda")) for _ in range(num_ranks)])
    return Spread.of(time_replays(graph, num_repeats), chain)


def copy_gbs() -> float:
    """GB/s read plus written by `Tensor.copy_` of 1 GiB: the roofline of memory."""
    src = torch.ones(COPY_BYTES, dtype=torch.uint8, device="cuda")
    dst = torch.empty_like(src)
    graph = capture([lambda: dst.copy_(src)])
    return 2 * COPY_BYTES / Spread.of(time_replays(graph, NUM_COPIES)).median_us / 1e3


@dataclass(frozen=True)
class GemmTimes:
    """A bf16 GEMM of `GEMM_SIZE`, alone, and between all ranks' sends and their hooks."""

    alone_us: float
    between_us: float

    @property
    def ratio(self) -> float:
        """Above 1: what a dispatch does between send and hook costs the GEMM time."""
        return self.between_us / self.alone_us


def gemm_beside_dispatch(settings: CudaBenchSettings, case: Case) -> GemmTimes:
    """Both on one stream, in a graph: every rank's send, the GEMM, every rank's hook. The GEMM's
    own time is taken, by events in the graph; alone, the same without sends and hooks."""
    a, b, out = (
        torch.randn(GEMM_SIZE, GEMM_SIZE, device="cuda", dtype=torch.bfloat16) for _ in range(3)
    )
    begin, end = (torch.cuda.Event(enable_timing=True, external=True) for _ in range(2))

    def gemm() -> None:
        begin.record()
        torch.mm(a, b, out=out)
        end.record()

    def gemm_us(graph: torch.cuda.CUDAGraph) -> float:
        times_us = []
        for i in range(NUM_WARMUP_REPLAYS + settings.num_repeats):
            graph.replay()
            torch.cuda.synchronize()
            if i >= NUM_WARMUP_REPLAYS:
                times_us.append(begin.elapsed_time(end) * 1e3)
        return Spread.of(times_us).median_us

    torch.mm(a, b, out=out)  # cuBLAS sets itself up
    with open_buffers(settings, case) as buffers:
        inputs = inputs_of(settings, case.num_ranks, case.num_tokens)
        ranks = [RankOps(b, i, case.form) for b, i in zip(buffers, inputs, strict=True)]
        check_lockstep(ranks, is_first=True)

        def beside() -> None:
            hooks = [rank.send_dispatch()[1] for rank in ranks]
            gemm()
            for recv_hook in hooks:
                recv_hook()

        alone_us = gemm_us(capture([gemm]))
        between_us = gemm_us(capture([beside]))
        check_lockstep(ranks, is_first=False)
    return GemmTimes(alone_us, between_us)
