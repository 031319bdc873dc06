"""What a buffer's settings become, and what CUDA refuses: no GPU is needed to say so."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from ep_backend import _native
from ep_backend.settings import default_transfer
from tests.support.shapes import Shape

CUDA = Shape(2, num_max_tokens_per_rank=128, hidden=2048, device="cuda")
IN_RANK_MAJOR: dict[str, Any] = {"num_workspaces": 1, "output_layout": "rank_major"}
IN_EXPERT_WORKSPACES: dict[str, Any] = {"num_workspaces": 1, "reduction": "source"}


def test_the_cpu_pushes_and_tags_nothing_whatever_it_is_told() -> None:
    for transfer in ("push", "pull", "pull_push"):
        config = Shape(2, transfer=transfer, num_max_tagged_tokens=3).config()
        assert config.transfer == _native.Transfer.PUSH
        assert config.num_max_tagged_tokens == 0


def test_combine_is_pushed_between_gpus() -> None:
    own_gpus = {"has_expert_workspaces": False, "is_virtual": False}
    by_ranks = [default_transfer(n, **own_gpus) for n in (1, 2, 8)]
    assert by_ranks == ["pull", "pull_push", "pull_push"]
    for there in ("has_expert_workspaces", "is_virtual"):
        assert default_transfer(8, **(own_gpus | {there: True})) == "pull"


def test_rows_of_combine_travel_as_the_dtype_or_as_float8() -> None:
    assert CUDA.config().combine_dtype == _native.DType.BFLOAT16
    for reduction in ("rank", "source"):
        shape = replace(CUDA, combine_dtype=torch.float8_e4m3fn, reduction=reduction)
        shape.settings().check(num_ranks=2)
        assert shape.config().combine_dtype == _native.DType.FLOAT8_E4M3
    rank_major = replace(
        CUDA, output_layout="rank_major", num_workspaces=1, combine_dtype=torch.float8_e4m3fn
    )
    with pytest.raises(ValueError, match=r"nobody quantises them\. Leave one of the two out"):
        rank_major.settings().check(num_ranks=2)


def test_only_rows_of_single_experts_can_be_reduced_at_home() -> None:
    for transfer in ("push", "pull"):
        shape = replace(CUDA, reduction="source", transfer=transfer)
        shape.settings().check(num_ranks=2)
        assert shape.config().reduction == _native.Reduction.SOURCE
        message = (
            "output_layout is 'rank_major', in which the caller weights and sums .* no rows of"
        )
        with pytest.raises(ValueError, match=message):
            replace(shape, output_layout="rank_major").settings().check(num_ranks=2)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            {"reduction": "rank"},
            "output_layout 'expert_major' and reduction 'rank', .* it is 'source'",
        ),
        ({"expert_ids": "global"}, "expert_ids 'global', but in such workspaces it is 'local'"),
        ({"transfer": "push"}, "transfer 'push', but in such workspaces it is 'pull'"),
        ({"device": "cpu"}, "device 'cpu', but in such workspaces it is 'cuda'"),
        (
            {"combine_dtype": torch.float8_e4m3fn},
            "combine_dtype torch.float8_e4m3fn, but from workspaces rows are read as the experts",
        ),
    ],
)
def test_workspaces_by_expert_are_for_rows_that_are_fetched(
    settings: dict[str, Any], message: str
) -> None:
    shape = replace(CUDA, reduction="source", num_workspaces=1)
    shape.settings().check(num_ranks=2)
    with pytest.raises(ValueError, match=message):
        replace(shape, **settings).settings().check(num_ranks=2)


@pytest.mark.parametrize(
    ("settings", "num_tagged"),
    [
        ({}, 128),
        ({"num_max_tokens_per_rank": 512}, 256),
        ({"hidden": 7168, "num_max_tokens_per_rank": 512}, 133),  # 2816 KiB
        ({"num_ranks": 8}, 32),  # 256 / ranks
        ({"num_max_tokens_per_rank": 5}, 5),
        ({"hidden": 16384}, 58),  # rows of 32 KiB
        ({"hidden": 16384 + 8}, 0),
        ({"hidden": 16384 + 16, "dispatch_dtype": torch.float8_e4m3fn}, 0),
        ({"num_max_tagged_tokens": 0}, 0),
        ({"num_max_tagged_tokens": 128}, 128),
        ({"hidden": 7168} | IN_RANK_MAJOR, 16),
        ({"hidden": 7168, "dispatch_dtype": torch.float8_e4m3fn} | IN_RANK_MAJOR, 33),
        ({"hidden": 2048} | IN_RANK_MAJOR, 57),
        ({"hidden": 2048, "num_max_tokens_per_rank": 5} | IN_RANK_MAJOR, 5),
        ({"hidden": 2048, "num_ranks": 4} | IN_RANK_MAJOR, 114),
        ({"hidden": 2048, "num_ranks": 8} | IN_RANK_MAJOR, 32),
        ({"hidden": 7168, "with_hooks": False} | IN_RANK_MAJOR, 128),
        ({"hidden": 7168, "with_hooks": False, "num_ranks": 4} | IN_RANK_MAJOR, 66),
        ({"hidden": 2048, "with_hooks": False, "num_ranks": 8} | IN_RANK_MAJOR, 32),
        ({"hidden": 7168, "with_hooks": False}, 128),
        ({"hidden": 16384 + 8} | IN_RANK_MAJOR, 0),
        ({"num_max_tagged_tokens": 5} | IN_RANK_MAJOR, 5),
        ({"num_ranks": 1} | IN_RANK_MAJOR, 0),
        (IN_EXPERT_WORKSPACES, 128),
        ({"num_ranks": 8} | IN_EXPERT_WORKSPACES, 32),
        ({"num_max_tagged_tokens": 5} | IN_EXPERT_WORKSPACES, 5),
        ({"num_ranks": 1} | IN_EXPERT_WORKSPACES, 0),
    ],
)
def test_small_batches_of_rows_that_are_not_large_are_tagged(
    settings: dict[str, Any], num_tagged: int
) -> None:
    assert replace(CUDA, **settings).config().num_max_tagged_tokens == num_tagged


@pytest.mark.parametrize("workspaces", [IN_RANK_MAJOR, IN_EXPERT_WORKSPACES])
@pytest.mark.parametrize(("num_ranks", "num_tagged"), [(1, 0), (2, 13), (4, 13), (8, 5)])
def test_ranks_that_share_a_gpu_tag_less_in_workspaces(
    num_ranks: int, num_tagged: int, workspaces: dict[str, Any]
) -> None:
    shape = replace(CUDA, hidden=7168, top_k=8, dispatch_dtype=torch.float8_e4m3fn, **workspaces)
    virtual = replace(shape.settings(), is_virtual=True, with_hooks=False)
    assert virtual.config(num_ranks).num_max_tagged_tokens == num_tagged
    virtual = replace(virtual, with_hooks=True)
    is_by_expert = workspaces is IN_EXPERT_WORKSPACES and num_ranks > 1
    assert virtual.config(num_ranks).num_max_tagged_tokens == (2 if is_by_expert else 0)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            {"hidden": 20},
            "hidden is 20, so rows of torch.bfloat16 have 40 bytes; on CUDA that must",
        ),
        ({"hidden": 20}, "a multiple of 16. Pass a multiple of 8, with zeros behind the row"),
        ({"hidden": 18, "dtype": torch.float32}, "Pass a multiple of 4"),
        ({"hidden": 24, "dispatch_dtype": torch.float8_e4m3fn}, "e4m3fn have 24 bytes.*of 16"),
        ({"hidden": 24, "combine_dtype": torch.float8_e4m3fn}, "e4m3fn have 24 bytes.*of 16"),
        ({"num_experts": 4097}, "num_experts is 4097, expected an integer in 1..4096"),
    ],
)
def test_cuda_refuses_rows_of_no_whole_vectors_and_too_many_experts(
    settings: dict[str, Any], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_native, "has_cuda", True)
    monkeypatch.setattr(_native, "CUDA_MAX_EXPERTS", 4096, raising=False)
    CUDA.settings().check(num_ranks=2)
    with pytest.raises(ValueError, match=message):
        replace(CUDA, **settings).settings().check(num_ranks=2)
