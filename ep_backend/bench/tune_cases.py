"""A candidate of `ep-backend tune`: its buffers, checked operations on them, and their times.

T tokens of every rank, H hidden, K top_k, R ranks, N rows that a rank receives.
"""

from __future__ import annotations

import gc
import statistics
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from functools import lru_cache, partial
from typing import Any, Generic, TypeVar

import torch

from ep_backend import DispatchResult, LowLatencyBuffer, NormalBuffer
from ep_backend.bench.op_cuda_rank import (
    BF16_TOLERANCE,
    FP8_SUBNORMAL,
    FP8_TOLERANCE,
    CheckFailed,
    RankOps,
)
from ep_backend.bench.routing import Inputs, make_inputs
from ep_backend.bench.tune_ranks import Chain, Ranks
from ep_backend.bench.tune_search import Settings, Times
from ep_backend.bench.tune_settings import DTYPES_BY_NAME, TuneSettings
from ep_backend.reference import CHANNELS_PER_SCALE
from ep_backend.tuning import Shape

# A hang ends the search, not the machine: far above any time measured.
TIMEOUT_SECS = 20.0
NUM_ROUNDS = 2
MAX_CACHED_INPUTS = 16


Buffer = TypeVar("Buffer", LowLatencyBuffer, NormalBuffer)
Ops = TypeVar("Ops")


class Candidate(ABC, Generic[Buffer, Ops]):
    """Buffers of this process's ranks, of one kind, and checked operations on them."""

    _buffers: Sequence[Buffer]

    def __init__(self, ranks: Ranks, settings: TuneSettings, shape: Shape) -> None:
        self._ranks = ranks
        self._settings = settings
        self._shape = shape
        self._ops: list[Ops] = []
        self._chain: Chain | None = None

    @abstractmethod
    def chain(self, num_tokens: int) -> Chain:
        """Of pairs, checked. Collective."""

    def check(self) -> None:
        """Runs the chain once more, and raises `CheckFailed` where it is wrong now. Collective."""

        def run() -> None:
            self._poison()
            assert self._chain is not None
            self._chain.run()
            self._raise_if_failed()
            self._check_results()

        self._ranks.step(run)

    @abstractmethod
    def _poison(self) -> None:
        """What the chain must write anew."""

    @abstractmethod
    def _check_results(self) -> None:
        """Of the chain."""

    def _checked_chain(self, acts: Sequence[Callable[[], object]]) -> Chain:
        """Of a pair on each rank."""
        self._chain = chain = self._ranks.chain(acts, self._raise_if_failed)
        self.check()
        return chain

    def _raise_if_failed(self) -> None:
        for buffer in self._buffers:
            buffer.raise_if_failed()

    def close(self) -> None:
        # A graph must not be left to the garbage collector, which may come in a capture.
        self._chain = None
        self._ops.clear()
        if self._ranks.device.type == "cuda":
            torch.cuda.synchronize()
        if len(self._buffers) < self._buffers[0].group.num_ranks:
            self._ranks.gather([None])  # no peer may still read what is unmapped now
        for buffer in self._buffers:
            buffer.close()


def measure(
    ranks: Ranks,
    open_candidate: Callable[[Settings], Candidate],
    num_tokens: Sequence[int],
    candidates: Sequence[Settings],
    say: Callable[[str], None],
) -> list[Times]:
    """Of each candidate, the median microseconds of a dispatch and its combine. Those that are open
    at a time are timed in turns. Collective.

    Args:
        say: told how far it is, so that who waits knows that ranks are alive.
    """
    times_us: list[Times] = []
    for begin in range(0, len(candidates), ranks.num_open):
        opened = [open_candidate(each) for each in candidates[begin : begin + ranks.num_open]]
        of_opened: list[Times] = [{} for _ in opened]
        for n in num_tokens:
            chains = [candidate.chain(n) for candidate in opened]
            samples: list[list[float]] = [[] for _ in chains]
            for _ in range(NUM_ROUNDS):
                for chain, sample in zip(chains, samples, strict=True):
                    sample += chain.time()
            for candidate, sample, times in zip(opened, samples, of_opened, strict=True):
                times[n] = statistics.median(sample)
                candidate.check()
            say(f"  {n} tokens, {len(opened)} of {len(candidates)} candidates")
        times_us += of_opened
        # After a failure nothing is closed: it ends the program, and peers may be anywhere.
        for candidate in opened:
            candidate.close()
        gc.collect()
    return times_us


@lru_cache(MAX_CACHED_INPUTS)
def inputs_of(settings: TuneSettings, shape: Shape, rank: int, num_tokens: int) -> Inputs:
    return make_inputs(
        settings.seed,
        rank,
        num_tokens=num_tokens,
        hidden=shape.hidden,
        num_experts=shape.num_experts,
        top_k=shape.top_k,
        dtype=DTYPES_BY_NAME[shape.dtype],
    )


class LowLatencyCandidate(Candidate[LowLatencyBuffer, RankOps]):
    def __init__(
        self, ranks: Ranks, settings: TuneSettings, shape: Shape, tried: dict[str, Any]
    ) -> None:
        super().__init__(ranks, settings, shape)
        self._results: dict[int, DispatchResult] = {}
        self._buffers = ranks.make(
            lambda group: LowLatencyBuffer(
                group,
                num_max_tokens_per_rank=max(settings.num_tokens),
                hidden=shape.hidden,
                num_experts=shape.num_experts,
                top_k=shape.top_k,
                dtype=DTYPES_BY_NAME[shape.dtype],
                dispatch_dtype=DTYPES_BY_NAME[shape.dispatch_dtype],
                combine_dtype=DTYPES_BY_NAME[shape.combine_dtype],
                output_layout=shape.output_layout,
                reduction=shape.reduction,
                num_workspaces=int(shape.has_workspaces),
                with_hooks=settings.form == "hook",
                timeout_secs=TIMEOUT_SECS,
                device=ranks.device,
                **tried,
            )
        )

    def chain(self, num_tokens: int) -> Chain:
        self._ops = [
            RankOps(
                buffer,
                inputs_of(self._settings, self._shape, buffer.group.self_rank, num_tokens),
                self._settings.form,
            )
            for buffer in self._buffers
        ]
        places = range(len(self._ops))
        self._ranks.run([partial(self._keep, RankOps.dispatch, i) for i in places])
        self._ranks.step(self._make_expert_out)
        return self._checked_chain([partial(self._keep, RankOps.pair, i) for i in places])

    def _keep(self, operation: Callable[[RankOps], DispatchResult], place: int) -> None:
        self._results[place] = operation(self._ops[place])

    def _make_expert_out(self) -> None:
        self._raise_if_failed()
        for place, ops in enumerate(self._ops):
            ops.make_expert_out(self._results[place])

    def _poison(self) -> None:
        for place, ops in enumerate(self._ops):
            ops.poison(self._results[place])

    def _check_results(self) -> None:
        for place, ops in enumerate(self._ops):
            ops.check("chain", self._results[place])


class NormalCandidate(Candidate[NormalBuffer, "NormalOps"]):
    def __init__(
        self, ranks: Ranks, settings: TuneSettings, shape: Shape, tried: dict[str, Any]
    ) -> None:
        super().__init__(ranks, settings, shape)
        self._buffers = ranks.make(
            lambda group: NormalBuffer(
                group,
                hidden=shape.hidden,
                num_experts=shape.num_experts,
                top_k=shape.top_k,
                dtype=DTYPES_BY_NAME[shape.dtype],
                dispatch_dtype=DTYPES_BY_NAME[shape.dispatch_dtype],
                timeout_secs=TIMEOUT_SECS,
                device=ranks.device,
                **tried,
            )
        )

    def chain(self, num_tokens: int) -> Chain:
        inputs = [
            inputs_of(self._settings, self._shape, buffer.group.self_rank, num_tokens)
            for buffer in self._buffers
        ]
        num_rows = most_rows(self._ranks, self._shape, [i.topk_idx for i in inputs])
        on_device = self._ranks.device.type == "cuda"
        self._ops = [
            NormalOps(buffer, each, num_rows if on_device else 0)
            for buffer, each in zip(self._buffers, inputs, strict=True)
        ]
        self._ranks.run([ops.dispatch for ops in self._ops])
        self._ranks.step(self._make_rows)
        return self._checked_chain([ops.pair for ops in self._ops])

    def _make_rows(self) -> None:
        self._raise_if_failed()
        for ops in self._ops:
            ops.make_rows()

    def _poison(self) -> None:
        for ops in self._ops:
            ops.out.fill_(torch.nan)

    def _check_results(self) -> None:
        for ops in self._ops:
            ops.check()


class NormalOps:
    """One rank's operations on fixed inputs; experts return what they get.

    Args:
        num_worst_tokens: rows of what is received; 0: exact sizes.
    """

    def __init__(self, buffer: NormalBuffer, inputs: Inputs, num_worst_tokens: int) -> None:
        self._buffer = buffer
        self._x = inputs.x.to(buffer.device)
        self._topk_idx = inputs.topk_idx.to(buffer.device)
        self._topk_weights = inputs.topk_weights.to(buffer.device)
        self._num_worst_tokens = num_worst_tokens
        self._rows = torch.empty(0)
        self.out = torch.empty_like(self._x)

    def dispatch(self) -> None:
        self._result = self._buffer.dispatch(
            self._x,
            self._topk_idx,
            self._topk_weights,
            num_worst_tokens=self._num_worst_tokens,
        )

    def make_rows(self) -> None:
        """What combine takes, of the rows of a finished dispatch."""
        self._rows = self._buffer.combine_input(self._result.handle)
        rows, scales = self._result.recv_x, self._result.recv_scales
        if scales is None:
            self._rows.copy_(rows)
            return
        for begin in range(0, len(rows), 4096):  # in float32 all at once are too many
            part = slice(begin, begin + 4096)
            of_part = scales[part].repeat_interleave(CHANNELS_PER_SCALE, dim=1)
            self._rows[part] = rows[part].float() * of_part[:, : rows.shape[1]]

    def pair(self) -> None:
        self.dispatch()
        self._buffer.combine(self._rows, self._result.handle, self.out)

    def check(self) -> None:
        """A token comes home once from each rank that it went to; so many times a bfloat16 are
        exact in float32, in whatever steps."""
        group = self._buffer.group
        num_owners = owners(self._topk_idx, self._buffer.num_experts, group.num_ranks).sum(1)
        for begin in range(0, len(self.out), 4096):
            part = slice(begin, begin + 4096)
            exact = self._x[part].float() * num_owners[part, None]
            if self._buffer.dispatch_dtype == self._buffer.dtype:
                is_right = self.out[part] == exact.to(self.out.dtype)
            else:
                amax = exact.abs().amax(1, keepdim=True)
                most = exact.abs() * (FP8_TOLERANCE + BF16_TOLERANCE) + amax * FP8_SUBNORMAL
                is_right = (self.out[part].float() - exact).abs() <= most
            if not bool(is_right.all()):
                raise CheckFailed(f"rank {group.self_rank}: combine's sums are wrong")


def owners(topk_idx: torch.Tensor, num_experts: int, num_ranks: int) -> torch.Tensor:
    """`[T, R]` bool: which ranks own some of a token's experts."""
    least, num_larger = divmod(num_experts, num_ranks)
    owns = torch.zeros((topk_idx.shape[0], num_ranks), dtype=torch.bool, device=topk_idx.device)
    end = 0
    for rank in range(num_ranks):
        begin, end = end, end + least + (rank < num_larger)
        owns[:, rank] = ((topk_idx >= begin) & (topk_idx < end)).any(1)
    return owns


def most_rows(ranks: Ranks, shape: Shape, topk_idx: Sequence[torch.Tensor]) -> int:
    """N of the rank that receives most, of batches of all ranks. Collective.

    Args:
        topk_idx: of this process's ranks.
    """
    counts = [owners(idx, shape.num_experts, shape.num_ranks).sum(0).tolist() for idx in topk_idx]
    return max(map(sum, zip(*ranks.gather(counts), strict=True)))
