"""What the link and NCCL do beside the multi-GPU benchmark's operations."""

from __future__ import annotations

import itertools
import statistics
from collections.abc import Callable
from dataclasses import asdict
from datetime import timedelta
from functools import partial
from typing import Any

import torch
import torch.distributed as dist

from ep_backend.bench.multi_gpu_normal import Traffic
from ep_backend.bench.multi_gpu_settings import NormalSettings
from ep_backend.bench.multi_gpu_world import RankedSpread, World, time_chain
from ep_backend.bench.op_cuda_bytes import travelling_row_bytes
from ep_backend.bench.op_cuda_settings import TRAVELLING_DTYPES, CudaBenchSettings

COPY_BYTES = 256 << 20
NUM_COPIES = 20
NCCL_CHAIN = 20
NCCL_TIMEOUT = timedelta(seconds=60)


def copy_gbs() -> float:
    """GB/s of `Tensor.copy_` of 256 MiB from GPU 0 to GPU 1, one way, by this process alone."""
    src = torch.ones(COPY_BYTES, dtype=torch.uint8, device="cuda:0")
    dst = torch.empty(COPY_BYTES, dtype=torch.uint8, device="cuda:1")
    dst.copy_(src)
    for device in (0, 1):
        torch.cuda.synchronize(device)
    times_ms = []
    with torch.cuda.device(0):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        for _ in range(NUM_COPIES):
            begin.record()
            dst.copy_(src, non_blocking=True)
            end.record()
            torch.cuda.synchronize(0)
            times_ms.append(begin.elapsed_time(end))
    torch.cuda.synchronize(1)
    return COPY_BYTES / statistics.median(times_ms) / 1e6


def new_nccl(world: World) -> Any:
    """A process group of all ranks. Collective."""
    return world.step(lambda: dist.new_group(backend="nccl", timeout=NCCL_TIMEOUT))


def time_nccl(
    world: World,
    nccl: Any,
    settings: CudaBenchSettings,
    report: Callable[[dict[str, Any]], None],
) -> None:
    """A pair of NCCL all-to-alls for every number of tokens T and both dtypes: T dispatched rows to
    each rank, itself included, and T rows of combine back. It routes, copies to experts and adds
    up nothing. Collective.

    Args:
        report: takes each result, as it goes into JSON.
    """
    for dispatch_dtype, combine_dtype, num_tokens in itertools.product(
        settings.dispatch_dtypes, settings.combine_dtypes, settings.num_tokens
    ):
        row_bytes = [
            travelling_row_bytes(TRAVELLING_DTYPES[dtype], settings.hidden)
            for dtype in (dispatch_dtype, combine_dtype)
        ]
        times = _time(world, nccl, num_tokens, row_bytes, NCCL_CHAIN, settings.num_repeats)
        report(
            {
                "num_tokens": num_tokens,
                "dispatch_dtype": dispatch_dtype,
                "combine_dtype": combine_dtype,
                "pair": asdict(times.spread),
                "pair_rank_difference_us": times.rank_difference_us,
            }
        )


def time_normal_nccl(
    world: World,
    nccl: Any,
    settings: NormalSettings,
    traffic: Traffic,
    report: Callable[[dict[str, Any]], None],
) -> None:
    """An all-to-all for each type of rows of a batch of the normal kernels: as many rows to each
    rank, itself included. It routes nothing, so rows lie together. Collective."""
    num_ranks = world.group.num_ranks
    num_rows = round(traffic.num_rows / num_ranks)
    for dtype in settings.dispatch_dtypes:
        row_bytes = travelling_row_bytes(TRAVELLING_DTYPES[dtype], settings.hidden)
        times = _time(world, nccl, num_rows, [row_bytes], settings.chain, settings.num_repeats)
        link_bytes = (num_ranks - 1) * num_rows * row_bytes
        report(
            {
                "num_tokens": traffic.num_tokens,
                "dtype": dtype,
                "all_to_all": asdict(times.spread),
                "gbs": link_bytes / times.spread.median_us / 1e3,
            }
        )


def _time(
    world: World,
    nccl: Any,
    num_rows: int,
    row_bytes: list[int],
    num_ops: int,
    num_repeats: int,
) -> RankedSpread:
    """An all-to-all for each of `row_bytes`, one behind the other, of as many rows to each rank."""
    num_all = world.group.num_ranks * num_rows

    def tensors(num_bytes: int) -> tuple[torch.Tensor, torch.Tensor]:
        size = (num_all, num_bytes)
        src = torch.full(size, world.group.self_rank, dtype=torch.uint8, device="cuda")
        return torch.empty_like(src), src

    exchanges = [tensors(num_bytes) for num_bytes in row_bytes]

    def exchange() -> None:
        for dst, src in exchanges:
            dist.all_to_all_single(dst, src, group=nccl)

    def chain(length: int) -> torch.cuda.CUDAGraph:
        graph = torch.cuda.CUDAGraph()
        # NCCL's watchdog thread may query events meanwhile.
        with torch.cuda.graph(graph, capture_error_mode="thread_local"):
            for _ in range(length):
                exchange()
        return graph

    def warm_up() -> None:
        """NCCL sets itself up at its first call, which a graph must not record."""
        exchange()
        torch.cuda.synchronize()

    world.step(warm_up)
    return time_chain(
        world,
        world.step(partial(chain, 1)),
        world.step(partial(chain, num_ops)),
        num_ops=num_ops,
        num_repeats=num_repeats,
        raise_if_failed=lambda: None,
    )
