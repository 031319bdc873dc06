"""Checks and times one case of the normal kernels on CUDA, and what as many SMs do at best."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial

import torch

from ep_backend import (
    Group,
    NormalBuffer,
    NormalDispatchHandle,
    NormalDispatchResult,
    _native,
    reference,
    virtual_world,
)
from ep_backend.bench.op_cuda_bytes import PairBytes, count_bytes, travelling_row_bytes
from ep_backend.bench.op_cuda_graph import Spread, capture, time_replays
from ep_backend.bench.op_cuda_rank import CheckFailed
from ep_backend.bench.op_cuda_settings import TRAVELLING_DTYPES
from ep_backend.bench.routing import Inputs

TIMEOUT_SECS = 5.0
YARDSTICK_BYTES = 1 << 30
# Rows of a rank whose bits are compared with those of the reference's quantisation.
NUM_QUANTIZED = 64
# Rows, columns and depth.
GEMM_SIZE = 8192
NUM_GEMMS = 8


@dataclass(frozen=True)
class NormalCase:
    """One row of the table."""

    num_ranks: int
    num_tokens: int
    """T of every rank."""
    dispatch_dtype: str
    """Of `TRAVELLING_DTYPES`."""
    num_sms: int
    """Of all ranks together."""


@dataclass(frozen=True)
class NormalSizes:
    """What all cases share."""

    hidden: int
    num_experts: int
    top_k: int
    chain: int
    num_repeats: int
    seed: int


@dataclass(frozen=True)
class NormalTimes:
    """All ranks at once on one GPU, in chains of operations in a graph."""

    dispatch: Spread
    """Routes, counts and rows; sizes are not told to the host (`num_worst_tokens`)."""
    cached_dispatch: Spread
    """Rows alone."""
    combine: Spread
    """Of rows that experts have put where combine finds them."""
    copied_combine: Spread
    """Of rows anywhere, which are copied first."""
    num_bytes: PairBytes
    num_row_bytes: int
    """Of all rows that dispatch writes."""
    num_symmetric_bytes: int
    """Of one rank."""

    @property
    def dispatch_gbs(self) -> float:
        """Read plus written, as if nothing but x and rows were."""
        return self.num_bytes.dispatch_bytes / self.dispatch.median_us / 1e3

    @property
    def written_gbs(self) -> float:
        """By dispatch: rows alone."""
        return self.num_row_bytes / self.dispatch.median_us / 1e3

    @property
    def combine_gbs(self) -> float:
        return self.num_bytes.combine_bytes / self.combine.median_us / 1e3


@dataclass(frozen=True)
class Yardstick:
    """What so many SMs do at best with ordinary loads and stores."""

    num_sms: int
    copy_gbs: float
    """Read plus written by a copy."""
    fill_gbs: float
    """Written, where nothing is read."""


@dataclass(frozen=True)
class GemmBeside:
    """A bfloat16 GEMM of `GEMM_SIZE`: alone, beside dispatches on another stream, and beside a copy
    on as many SMs. One rank, which dispatches to itself: as many kernels as on a GPU of a rank."""

    num_sms: int
    num_gpu_sms: int
    alone_us: float
    beside_dispatch_us: float
    beside_copy_us: float

    @property
    def ratio(self) -> float:
        return self.beside_dispatch_us / self.alone_us

    @property
    def copy_ratio(self) -> float:
        return self.beside_copy_us / self.alone_us

    @property
    def ratio_by_sms(self) -> float:
        """What fewer SMs alone would make of it."""
        return self.num_gpu_sms / (self.num_gpu_sms - self.num_sms)


def yardstick(num_sms: int, num_repeats: int) -> Yardstick:
    src = torch.ones(YARDSTICK_BYTES, dtype=torch.uint8, device="cuda")
    dst = torch.empty_like(src)

    def fill() -> None:
        stream = torch.cuda.current_stream().cuda_stream
        _native.cuda_fill_on_sms(dst.data_ptr(), YARDSTICK_BYTES, num_sms, stream)

    copy_us, fill_us = (
        Spread.of(time_replays(capture([act]), num_repeats)).median_us
        for act in (partial(copy_on_sms, dst, src, num_sms), fill)
    )
    return Yardstick(num_sms, 2 * YARDSTICK_BYTES / copy_us / 1e3, YARDSTICK_BYTES / fill_us / 1e3)


class RankOps:
    """One rank's operations on fixed inputs.

    Attributes:
        num_sms: of every operation; None: the buffer's.
    """

    def __init__(self, buffer: NormalBuffer, inputs: Inputs, num_worst_tokens: int) -> None:
        self.buffer = buffer
        self.inputs = inputs
        self.num_sms: int | None = None
        self._num_worst_tokens = num_worst_tokens
        self.handle: NormalDispatchHandle
        self.rows: torch.Tensor
        """What combine takes, in symmetric memory."""
        self.out = torch.empty_like(inputs.x)

    def dispatch(self) -> NormalDispatchResult:
        return self._dispatch(self._num_worst_tokens)

    def dispatch_exactly(self) -> NormalDispatchResult:
        """The host waits for counts."""
        return self._dispatch(0)

    def dispatch_again(self) -> NormalDispatchResult:
        return self.buffer.dispatch(self.inputs.x, handle=self.handle, num_sms=self.num_sms)

    def combine(self) -> torch.Tensor:
        return self.combine_copied(self.rows)

    def combine_copied(self, rows: torch.Tensor) -> torch.Tensor:
        combined = self.buffer.combine(rows, self.handle, self.out, num_sms=self.num_sms)
        assert isinstance(combined, torch.Tensor)
        return combined

    def _dispatch(self, num_worst_tokens: int) -> NormalDispatchResult:
        i = self.inputs
        return self.buffer.dispatch(
            *(i.x, i.topk_idx, i.topk_weights),
            num_worst_tokens=num_worst_tokens,
            num_sms=self.num_sms,
        )


@contextmanager
def open_ranks(sizes: NormalSizes, case: NormalCase) -> Iterator[list[RankOps]]:
    """Checked ranks, whose rows all have room; closed at the end.

    Raises:
        CheckFailed: a result is wrong.
        ValueError: SMs cannot be shared evenly.
    """
    if case.num_sms % case.num_ranks != 0:
        raise ValueError(f"{case.num_sms} SMs cannot be shared evenly by {case.num_ranks} ranks")
    inputs = [make_inputs(sizes, case, rank) for rank in range(case.num_ranks)]
    received = [tokens_for(sizes, case, inputs, rank) for rank in range(case.num_ranks)]
    num_worst = max(len(tokens) for tokens in received)
    num_sms = case.num_sms // case.num_ranks
    world = virtual_world(case.num_ranks)
    buffers = world.run(lambda group: make_buffer(sizes, case, group, num_worst, num_sms))
    try:
        ranks = [RankOps(b, i, num_worst) for b, i in zip(buffers, inputs, strict=True)]
        x = torch.cat([i.x for i in inputs])
        results: list[NormalDispatchResult | None] = [None] * len(ranks)

        def dispatch(rank: int) -> None:
            results[rank] = ranks[rank].dispatch()

        graph = capture([partial(dispatch, rank) for rank in range(len(ranks))])
        graph.replay()
        for rank, (ops, result) in enumerate(zip(ranks, results, strict=True)):
            assert result is not None
            ops.handle = result.handle
            torch.cuda.synchronize()
            ops.buffer.raise_if_failed()
            check_received(result, x, received[rank], rank)
            ops.rows = ops.buffer.combine_input(result.handle)
            ops.rows[: len(received[rank])] = x[received[rank]]
        graph = capture([ops.combine for ops in ranks])
        graph.replay()
        torch.cuda.synchronize()
        for rank, ops in enumerate(ranks):
            ops.buffer.raise_if_failed()
            check_combined(sizes, case, ops, rank)
        yield ranks
        torch.cuda.synchronize()
        for rank, ops in enumerate(ranks):
            ops.buffer.raise_if_failed()
            check_combined(sizes, case, ops, rank)
    finally:
        for buffer in buffers:
            buffer.close()


def make_buffer(
    sizes: NormalSizes, case: NormalCase, group: Group, num_rows: int, num_sms: int
) -> NormalBuffer:
    """With room for `num_rows` rows of a rank. Collective."""
    row_bytes = 2 * 2 * sizes.hidden + 16 * (sizes.top_k + 1) + sizes.hidden // 32
    return NormalBuffer(
        group,
        hidden=sizes.hidden,
        num_experts=sizes.num_experts,
        top_k=sizes.top_k,
        dtype=torch.bfloat16,
        dispatch_dtype=TRAVELLING_DTYPES[case.dispatch_dtype],
        num_bytes=(num_rows + 1) * row_bytes + (1 << 20),
        timeout_secs=TIMEOUT_SECS,
        device="cuda",
        num_sms=num_sms,
    )


def measure(sizes: NormalSizes, case: NormalCase) -> NormalTimes:
    """Checks a case, times it, and checks it again, on buffers of its own."""
    with open_ranks(sizes, case) as ranks:
        copied = [ops.rows.clone() for ops in ranks]

        def time_chain(acts: list[Callable[[], object]]) -> Spread:
            def branch(act: Callable[[], object]) -> None:
                for _ in range(sizes.chain):
                    act()

            graph = capture([partial(branch, act) for act in acts])
            return Spread.of(time_replays(graph, sizes.num_repeats), sizes.chain)

        num_bytes = count_bytes(
            [ops.inputs.topk_idx.cpu() for ops in ranks],
            num_experts=sizes.num_experts,
            hidden=sizes.hidden,
            dispatch_dtype=TRAVELLING_DTYPES[case.dispatch_dtype],
            combine_dtype=torch.bfloat16,
            output_layout="rank_major",
        )
        row_bytes = travelling_row_bytes(TRAVELLING_DTYPES[case.dispatch_dtype], sizes.hidden)
        return NormalTimes(
            dispatch=time_chain([ops.dispatch for ops in ranks]),
            cached_dispatch=time_chain([ops.dispatch_again for ops in ranks]),
            combine=time_chain([ops.combine for ops in ranks]),
            copied_combine=time_chain(
                [partial(o.combine_copied, c) for o, c in zip(ranks, copied, strict=True)]
            ),
            num_bytes=num_bytes,
            num_row_bytes=num_bytes.num_rows * row_bytes,
            num_symmetric_bytes=ranks[0].buffer.num_symmetric_bytes,
        )


def gemm_beside(sizes: NormalSizes, num_tokens: int, num_sms: int) -> GemmBeside:
    gemms = GemmStream()
    gemms.time(None)  # cuBLAS sets itself up
    alone_us = gemms.time(None)
    src = torch.ones(YARDSTICK_BYTES, dtype=torch.uint8, device="cuda")
    dst = torch.empty_like(src)
    copies = capture([partial(copy_on_sms, dst, src, num_sms)])
    beside_copy_us = gemms.time(copies)
    with open_ranks(sizes, NormalCase(1, num_tokens, "bf16", num_sms)) as ranks:
        (ops,) = ranks
        beside_dispatch_us = gemms.time(capture([ops.dispatch_again]))
    num_gpu_sms = torch.cuda.get_device_properties(src.device).multi_processor_count
    return GemmBeside(num_sms, num_gpu_sms, alone_us, beside_dispatch_us, beside_copy_us)


class GemmStream:
    """GEMMs on a stream of their own, one after the other."""

    def __init__(self) -> None:
        shape = (GEMM_SIZE, GEMM_SIZE)
        self._a, self._b, self._out = (
            torch.randn(shape, device="cuda", dtype=torch.bfloat16) for _ in range(3)
        )
        self._stream = torch.cuda.Stream()

    def time(self, beside: torch.cuda.CUDAGraph | None) -> float:
        """Microseconds of one. Replays of `beside` begin before the first and end behind the last.

        Raises:
            CheckFailed: they did not.
        """
        begin, end, first, last = (torch.cuda.Event(enable_timing=True) for _ in range(4))
        num_replays = 0
        if beside is not None:
            beside.replay()
            first.record()
            beside.replay()
            last.record()
            torch.cuda.synchronize()
            replay_us = first.elapsed_time(last) * 1e3
            num_replays = 2 + int(3 * NUM_GEMMS * self.time(None) / replay_us)
        first.record()
        if beside is not None:
            for _ in range(num_replays):
                beside.replay()
        last.record()
        self._stream.wait_event(first)
        with torch.cuda.stream(self._stream):
            begin.record()
            for _ in range(NUM_GEMMS):
                torch.mm(self._a, self._b, out=self._out)
            end.record()
        torch.cuda.synchronize()
        if beside is not None and end.elapsed_time(last) < 0:
            raise CheckFailed("dispatches did not last as long as the GEMMs beside them")
        return begin.elapsed_time(end) * 1e3 / NUM_GEMMS


def copy_on_sms(dst: torch.Tensor, src: torch.Tensor, num_sms: int) -> None:
    stream = torch.cuda.current_stream().cuda_stream
    _native.cuda_copy_on_sms(dst.data_ptr(), src.data_ptr(), src.nbytes, num_sms, stream)


def make_inputs(sizes: NormalSizes, case: NormalCase, rank: int) -> Inputs:
    """On the GPU: as `ep_backend.bench.routing` does, for more tokens than a CPU makes quickly."""
    generator = torch.Generator("cuda").manual_seed(sizes.seed * 1_000_003 + rank)
    shape = (case.num_tokens, sizes.hidden)
    x = torch.randn(shape, generator=generator, device="cuda", dtype=torch.bfloat16)
    scores = torch.rand((case.num_tokens, sizes.num_experts), generator=generator, device="cuda")
    top_scores, topk_idx = scores.topk(sizes.top_k, dim=1)
    return Inputs(x, topk_idx, torch.softmax(top_scores, dim=1))


def check_received(
    result: NormalDispatchResult, x: torch.Tensor, tokens: torch.Tensor, rank: int
) -> None:
    """Rows in their order; of float8 rows the first, and all of them roughly."""
    got = result.recv_x[: len(tokens)]
    if result.recv_scales is None:
        if not torch.equal(got, x[tokens]):
            raise CheckFailed(f"rank {rank}: dispatch has brought other rows than were sent")
        return
    scales = result.recv_scales[: len(tokens)]
    head = tokens[:NUM_QUANTIZED]
    rows, of_rows = reference.quantize(x[head].cpu())
    same = torch.equal(got[: len(head)].cpu().view(torch.uint8), rows.view(torch.uint8))
    if not same or not torch.equal(scales[: len(head)].cpu(), of_rows):
        raise CheckFailed(f"rank {rank}: dispatch has quantised otherwise than the reference")
    for begin in range(0, len(tokens), 4096):
        part = slice(begin, begin + 4096)
        values = got[part].float().view(-1, scales.shape[1], 128) * scales[part, :, None]
        error = (values.view(values.shape[0], -1) - x[tokens[part]].float()).norm()
        if error > 0.04 * x[tokens[part]].float().norm():
            raise CheckFailed(f"rank {rank}: dispatch has brought other rows than were sent")


def check_combined(sizes: NormalSizes, case: NormalCase, ops: RankOps, rank: int) -> None:
    """Experts that return what they get: a token comes home as often as it went out. At most eight
    times a bfloat16 is exact in float32, in whatever steps."""
    num_ranks = torch.zeros(case.num_tokens, dtype=torch.int64, device="cuda")
    for r in range(case.num_ranks):
        own = reference.experts_of_rank(sizes.num_experts, case.num_ranks, r)
        is_own = (ops.inputs.topk_idx >= own.start) & (ops.inputs.topk_idx < own.stop)
        num_ranks += is_own.any(1)
    for begin in range(0, case.num_tokens, 4096):
        part = slice(begin, begin + 4096)
        expected = (ops.inputs.x[part].float() * num_ranks[part, None]).bfloat16()
        if not torch.equal(ops.out[part], expected):
            raise CheckFailed(f"rank {rank}: combine's sums are wrong")


def tokens_for(
    sizes: NormalSizes, case: NormalCase, inputs: list[Inputs], rank: int
) -> torch.Tensor:
    """`[N]`: which of all ranks' tokens, one batch behind the other, a rank receives."""
    own = reference.experts_of_rank(sizes.num_experts, case.num_ranks, rank)
    topk_idx = torch.cat([i.topk_idx for i in inputs])
    return ((topk_idx >= own.start) & (topk_idx < own.stop)).any(1).nonzero().flatten()
