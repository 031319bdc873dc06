"""The normal kernels between GPUs, a process each: rows cross a link, where stores arrive late and
in any order. The same bits as the reference."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch

from ep_backend import PeerTimeout
from ep_backend.bench.op_cuda_graph import capture
from tests.support.normal import NormalCase, NormalShape, make_case
from tests.support.normal_cuda import CudaNormalRank, CudaNormalShape, How, on_gpu
from tests.support.processes import Rank, RankProcesses

pytestmark = pytest.mark.gpus(2)

FLOAT8 = torch.float8_e4m3fn
NUM_TOKENS = (70, 1, 33, 0, 64, 13, 40, 5)


@pytest.fixture(scope="module")
def ranks() -> Iterator[RankProcesses]:
    """A process on each GPU."""
    with RankProcesses(min(torch.cuda.device_count(), len(NUM_TOKENS))) as ranks:
        yield ranks


def shape_of(ranks: RankProcesses, **settings: object) -> NormalShape:
    defaults = NormalShape(ranks.num_ranks, hidden=7168, num_experts=30, top_k=8)
    return replace(defaults, **settings)  # type: ignore[arg-type]


def on_own_gpu(rank: Rank) -> None:
    torch.cuda.set_device(rank.group.self_rank)


def run_all(
    rank: Rank, shape: CudaNormalShape, cases: list[NormalCase], hows: tuple[How, ...]
) -> None:
    on_own_gpu(rank)
    with shape.buffer(rank.group) as buffer:
        ops = CudaNormalRank(buffer)
        for case in cases:
            for how in hows:
                ops.run_again(case, ops.run(case, how), how)
        rank.group.all_gather(None)  # nobody's memory goes while a peer still reads it


@pytest.mark.parametrize("num_rows", [2000, 100], ids=["direct", "rounds"])
@pytest.mark.parametrize(
    "settings",
    [
        {},
        dict(dtype=torch.float32),
        dict(dispatch_dtype=FLOAT8),
        dict(dispatch_dtype=FLOAT8, scale_format="ue8m0", hidden=15_136),
    ],
    ids=["bf16", "fp32", "fp8", "ue8m0"],
)
def test_every_mode_equals_the_reference(
    ranks: RankProcesses, settings: dict[str, object], num_rows: int
) -> None:
    shape = shape_of(ranks, **settings)
    num_tokens = list(NUM_TOKENS[: ranks.num_ranks])
    cases = [
        make_case(shape, routing, num_tokens, seed, num_biases=seed, with_weights=seed == 1)
        for seed, routing in enumerate(("uniform", "uniform", "one_hot_expert"))
    ]
    one, all_roles = {"num_sms": 1}, {"num_sms": 24}  # on 24, some only copy own rows
    hows = (
        *(How(), How(num_sms=all_roles), How(copy=True)),
        *(How(3000, in_place=True), How(3000, num_sms=one)),
    )
    ranks.run(run_all, CudaNormalShape(shape, num_rows), cases, hows, deadline_secs=120)


def replay(rank: Rank, shape: CudaNormalShape, cases: list[NormalCase]) -> None:
    on_own_gpu(rank)
    with shape.buffer(rank.group) as buffer:
        CudaNormalRank(buffer).replay(cases, 3000)
        rank.group.all_gather(None)


@pytest.mark.parametrize("num_rows", [3000, 100], ids=["direct", "rounds"])
def test_a_graph_is_replayed_with_other_tokens(ranks: RankProcesses, num_rows: int) -> None:
    shape = shape_of(ranks)
    cases = [make_case(shape, "uniform", [60] * ranks.num_ranks, seed) for seed in range(3)]
    ranks.run(replay, CudaNormalShape(shape, num_rows), cases, deadline_secs=60)


def drift(rank: Rank, shape: CudaNormalShape, case: NormalCase, num_replays: int) -> list[int]:
    """Wrong elements received, and brought home. Every operation has rows of another sign than the
    one before, so what came too late is wrong."""
    on_own_gpu(rank)
    self_rank = rank.group.self_rank
    x, idx, weights = on_gpu(case.inputs(self_rank))
    per_rank = -(-case.shape.num_experts // case.shape.num_ranks)
    num_ranks = [len({int(e) // per_rank for e in token}) for token in case.topk_idx[self_rank]]
    expected = case.received[self_rank].rows.cuda()
    expected_out = (x.float() * torch.tensor(num_ranks).cuda()[:, None]).bfloat16()
    signed, sign = x.clone(), torch.ones((), dtype=torch.bfloat16, device="cuda")
    num_wrong = torch.zeros(2, dtype=torch.int64, device="cuda")
    with shape.buffer(rank.group) as buffer:

        def pairs() -> None:
            for _ in range(4):
                sign.neg_()
                torch.mul(x, sign, out=signed)
                result = buffer.dispatch(signed, idx, weights, num_worst_tokens=shape.num_rows)
                num_wrong[0] += (result.recv_x[: len(expected)] != expected * sign).sum()
                out = buffer.combine(result.recv_x, result.handle)
                num_wrong[1] += (out != expected_out * sign).sum()

        graph = capture([pairs])
        rank.group.all_gather(None)
        for i in range(num_replays):
            if (i + self_rank) % 7 == 0:
                torch.cuda._sleep(200_000)
            graph.replay()
        torch.cuda.synchronize()
        buffer.raise_if_failed()
        rank.group.all_gather(None)
    return num_wrong.tolist()


@pytest.mark.parametrize("num_tokens", [3, 500])
def test_ranks_that_drift_apart_get_every_row_in_time(
    ranks: RankProcesses, num_tokens: int
) -> None:
    shape = shape_of(ranks, num_experts=8 * ranks.num_ranks, hidden=4096)
    case = make_case(shape, "uniform", [num_tokens] * ranks.num_ranks, seed=1)
    num_rows = num_tokens * ranks.num_ranks + 16
    settings = CudaNormalShape(shape, num_rows, num_sms=24)
    results = ranks.run(drift, settings, case, 500, deadline_secs=60)
    assert results == [[0, 0]] * ranks.num_ranks


def wait_for_silent_peers(rank: Rank, shape: CudaNormalShape, case: NormalCase) -> None:
    on_own_gpu(rank)
    inputs = on_gpu(case.inputs(rank.group.self_rank))
    with shape.buffer(rank.group, timeout_secs=0.5) as buffer:
        if rank.group.self_rank == 0:
            begin = time.monotonic()
            with pytest.raises(PeerTimeout) as caught:
                buffer.dispatch(*inputs)
            assert time.monotonic() - begin < 5.0
            assert caught.value.record["peer_rank"] > 0
            assert caught.value.record["phase"] == "dispatch"
            assert torch.ones(3, device="cuda").sum().item() == 3.0
        rank.group.all_gather(None)


def test_silent_peers_are_named(ranks: RankProcesses) -> None:
    shape = shape_of(ranks)
    case = make_case(shape, "uniform", [5] * ranks.num_ranks, seed=0)
    ranks.run(wait_for_silent_peers, CudaNormalShape(shape), case, deadline_secs=30)
