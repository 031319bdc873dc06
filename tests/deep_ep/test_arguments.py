"""What `deep_ep.Buffer` and its low-latency calls refuse, with which words, and what is ignored."""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable
from itertools import product
from typing import Any

import pytest
import torch

from ep_backend import (
    EPBackendError,
    Group,
    NetworkConfig,
    PeerTimeout,
    SettingsMismatch,
    _native,
    deep_ep,
    virtual_world,
)
from tests.deep_ep.support import buffer_of
from tests.support.shapes import Shape

T, M, H, E, K = 3, 4, 24, 6, 2


@pytest.fixture
def group() -> Group:
    return virtual_world(1).groups[0]


@pytest.fixture
def buffer(group: Group) -> deep_ep.Buffer:
    return buffer_of(group)


def of_dispatch(**changed: Any) -> dict[str, Any]:
    arguments: dict[str, Any] = dict(
        x=torch.ones((T, H), dtype=torch.bfloat16),
        topk_idx=torch.zeros((T, K), dtype=torch.int64),
        num_max_dispatch_tokens_per_rank=M,
        num_experts=E,
        use_fp8=False,
    )
    return arguments | changed


def of_combine(buffer: deep_ep.Buffer, **changed: Any) -> dict[str, Any]:
    _, _, handle, _, _ = buffer.low_latency_dispatch(**of_dispatch())
    arguments: dict[str, Any] = dict(
        x=torch.ones((E, M, H), dtype=torch.bfloat16),
        topk_idx=torch.zeros((T, K), dtype=torch.int64),
        topk_weights=torch.ones((T, K)),
        handle=handle,
    )
    return arguments | changed


def names_and_defaults(function: Callable[..., Any], kinds: str) -> list[Any]:
    """Of the parameters of these kinds: names, and values where there are defaults."""
    return [
        p.name if p.default is p.empty else (p.name, p.default)
        for p in inspect.signature(function).parameters.values()
        if p.kind.name in kinds and p.name != "self"
    ]


def test_signatures_are_those_of_deep_ep() -> None:
    positional = "POSITIONAL_OR_KEYWORD"
    assert names_and_defaults(deep_ep.Buffer, positional) == [
        "group",
        ("num_nvl_bytes", 0),
        ("num_rdma_bytes", 0),
        ("low_latency_mode", False),
        ("num_qps_per_rank", 24),
        ("allow_nvlink_for_low_latency_mode", True),
        ("allow_mnnvl", False),
        ("explicitly_destroy", False),
        ("enable_shrink", False),
        ("comm", None),
    ]
    assert names_and_defaults(deep_ep.Buffer.low_latency_dispatch, positional) == [
        "x",
        "topk_idx",
        "num_max_dispatch_tokens_per_rank",
        "num_experts",
        ("cumulative_local_expert_recv_stats", None),
        ("dispatch_wait_recv_cost_stats", None),
        ("use_fp8", True),
        ("round_scale", False),
        ("use_ue8m0", False),
        ("async_finish", False),
        ("return_recv_hook", False),
    ]
    assert names_and_defaults(deep_ep.Buffer.low_latency_combine, positional) == [
        "x",
        "topk_idx",
        "topk_weights",
        "handle",
        ("use_logfmt", False),
        ("zero_copy", False),
        ("async_finish", False),
        ("return_recv_hook", False),
        ("out", None),
        ("combine_wait_recv_cost_stats", None),
    ]


@pytest.mark.parametrize(
    ("changed", "error", "message"),
    [
        (dict(enable_shrink=True), NotImplementedError, "enable_shrink is True, but dead ranks"),
        (dict(comm=object()), NotImplementedError, "comm was given"),
        (dict(group=None), ValueError, "group is None"),
        (dict(num_nvl_bytes=-1), ValueError, "num_nvl_bytes is -1, expected an integer in 0.."),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else None,
)
def test_a_buffer_that_cannot_be_is_refused(
    group: Group, changed: dict[str, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        deep_ep.Buffer(**dict(group=group) | changed)


def test_low_latency_calls_need_no_mode(group: Group) -> None:
    buffer = deep_ep.Buffer(group)
    assert not buffer.low_latency_mode
    _, recv_count, *_ = buffer.low_latency_dispatch(**of_dispatch())
    assert recv_count.tolist() == [T] + [0] * (E - 1)


def test_sizes_and_links_of_deep_ep_are_accepted(group: Group) -> None:
    buffer = deep_ep.Buffer(
        group,
        1 << 30,
        1 << 30,
        True,
        1,
        False,
        True,
        True,
        use_fabric=True,
    )
    assert (buffer.rank, buffer.group_size, buffer.low_latency_mode) == (0, 1, True)


DISPATCH_MISTAKES: dict[str, tuple[dict[str, Any], type[Exception], str]] = {
    "too many tokens": (
        dict(num_max_dispatch_tokens_per_rank=2),
        ValueError,
        r"x has shape \[3, 24\], expected \[<=2, 24\]. It has at most num_max_dispatch_tokens",
    ),
    "dtype": (
        dict(x=torch.ones((T, H), dtype=torch.float16)),
        ValueError,
        "x has dtype torch.float16, expected torch.bfloat16 or torch.float32",
    ),
    "1-D x": (dict(x=torch.ones(H)), ValueError, r"x has shape \[24\], expected \[<=4, 24\]"),
    "0-D x": (dict(x=torch.ones(())), ValueError, r"x has shape \[\]"),
    "strides": (
        dict(x=torch.ones((H, T)).t()),
        ValueError,
        r"expected a contiguous tensor. Pass x.contiguous\(\)",
    ),
    "1-D topk_idx": (
        dict(topk_idx=torch.zeros(T)),
        ValueError,
        r"topk_idx has shape \[3\], expected \[T, top_k\]",
    ),
    "topk_idx of other tokens": (
        dict(topk_idx=torch.zeros((T + 1, K), dtype=torch.int64)),
        ValueError,
        r"topk_idx has shape \[4, 2\], expected \[3, 2\]",
    ),
    "dtype of topk_idx": (
        dict(topk_idx=torch.zeros((T, K))),
        ValueError,
        "topk_idx has dtype torch.float32, expected torch.int64 or torch.int32",
    ),
    "expert": (
        dict(topk_idx=torch.full((T, K), E)),
        ValueError,
        "expert",
    ),
    "no experts": (dict(num_experts=0), ValueError, "num_experts is 0, expected an integer in 1.."),
    "ue8m0": (
        dict(use_fp8=True, use_ue8m0=True),
        ValueError,
        "use_ue8m0 is True, but round_scale is False",
    ),
    "async and hook": (
        dict(async_finish=True, return_recv_hook=True),
        ValueError,
        "async_finish and return_recv_hook are both True",
    ),
    "wait stats": (
        dict(dispatch_wait_recv_cost_stats=torch.zeros(1, dtype=torch.int64)),
        NotImplementedError,
        "dispatch_wait_recv_cost_stats was given, but waits are not measured",
    ),
    "stats": (
        dict(cumulative_local_expert_recv_stats=torch.zeros(E)),
        ValueError,
        "cumulative_local_expert_recv_stats has dtype torch.float32, expected torch.int32",
    ),
    "size of stats": (
        dict(cumulative_local_expert_recv_stats=torch.zeros(2, dtype=torch.int32)),
        ValueError,
        r"cumulative_local_expert_recv_stats has shape \[2\], expected \[6\]",
    ),
    "weights": (
        dict(topk_weights=torch.ones((T, K + 1))),
        ValueError,
        r"topk_weights has shape \[3, 3\], expected \[3, 2\]",
    ),
}


@pytest.mark.parametrize("mistake", DISPATCH_MISTAKES)
def test_wrong_dispatches_are_refused_and_send_nothing(
    buffer: deep_ep.Buffer, mistake: str
) -> None:
    changed, error, message = DISPATCH_MISTAKES[mistake]
    with pytest.raises(error, match=message):
        buffer.low_latency_dispatch(**of_dispatch(**changed))
    recv_x, recv_count, _, _, _ = buffer.low_latency_dispatch(**of_dispatch())
    assert recv_count.tolist() == [T] + [0] * (E - 1)
    assert isinstance(recv_x, torch.Tensor)
    assert bool((recv_x[0, :T] == 1).all())


COMBINE_MISTAKES: dict[str, tuple[dict[str, Any], type[Exception], str]] = {
    "shape": (
        dict(x=torch.ones((E, M, H + 1), dtype=torch.bfloat16)),
        ValueError,
        r"x has shape \[6, 4, 25\], expected \[6, 4, 24\]",
    ),
    "dtype": (
        dict(x=torch.ones((E, M, H))),
        ValueError,
        "x has dtype torch.float32, expected torch.bfloat16",
    ),
    "topk_idx": (
        dict(topk_idx=torch.zeros((T, K + 1), dtype=torch.int64)),
        ValueError,
        r"topk_idx has shape \[3, 3\], expected \[3, 2\], as dispatch was given",
    ),
    "no weights": (dict(topk_weights=None), ValueError, "topk_weights was not given to combine"),
    "weights": (
        dict(topk_weights=torch.ones((T, K), dtype=torch.bfloat16)),
        ValueError,
        "topk_weights has dtype torch.bfloat16, expected torch.float32",
    ),
    "handle": (dict(handle=(1, 2, 3, 4, 5)), ValueError, "handle is not one that"),
    "out": (
        dict(out=torch.empty((T + 1, H), dtype=torch.bfloat16)),
        ValueError,
        r"out has shape \[4, 24\], expected \[3, 24\]",
    ),
    "logfmt": (
        dict(use_logfmt=True),
        NotImplementedError,
        r"use_logfmt is True, .*LowLatencyBuffer with combine_dtype=torch\.float8_e4m3fn",
    ),
    "wait stats": (
        dict(combine_wait_recv_cost_stats=torch.zeros(1, dtype=torch.int64)),
        NotImplementedError,
        "combine_wait_recv_cost_stats was given",
    ),
    "async and hook": (
        dict(async_finish=True, return_recv_hook=True),
        ValueError,
        "async_finish and return_recv_hook are both True",
    ),
}


@pytest.mark.parametrize("mistake", COMBINE_MISTAKES)
def test_wrong_combines_are_refused_and_send_nothing(buffer: deep_ep.Buffer, mistake: str) -> None:
    changed, error, message = COMBINE_MISTAKES[mistake]
    arguments = of_combine(buffer)
    with pytest.raises(error, match=message):
        buffer.low_latency_combine(**arguments | changed)
    combined, _, _ = buffer.low_latency_combine(**arguments)
    assert bool((combined == K).all())


def test_a_handle_belongs_to_its_buffer(group: Group, buffer: deep_ep.Buffer) -> None:
    arguments = of_combine(buffer)
    other = buffer_of(group)
    with pytest.raises(ValueError, match="Combine on the Buffer that dispatched"):
        other.low_latency_combine(**arguments)
    with pytest.raises(ValueError, match="Combine on the Buffer that dispatched"):
        other.get_next_low_latency_combine_buffer(arguments["handle"])


def test_scale_formats_are_ignored_without_fp8(buffer: deep_ep.Buffer) -> None:
    arguments = of_dispatch(round_scale=False, use_ue8m0=True)
    recv_x, *_ = buffer.low_latency_dispatch(**arguments)
    assert isinstance(recv_x, torch.Tensor)


def test_scales_are_column_major() -> None:
    buffer = buffer_of(virtual_world(1).groups[0])
    x = torch.ones((T, 1536), dtype=torch.bfloat16)
    (recv_x, scales), *_ = buffer.low_latency_dispatch(**of_dispatch(x=x, use_fp8=True))
    assert recv_x.dtype == torch.float8_e4m3fn
    assert (scales.dtype, scales.shape) == (torch.float32, (E, M, 12))
    assert scales.stride() == (12 * M, 1, M)
    (_, scales), *_ = buffer.low_latency_dispatch(
        **of_dispatch(x=x, use_fp8=True, round_scale=True, use_ue8m0=True)
    )
    assert (scales.dtype, scales.shape) == (torch.int32, (E, M, 3))
    assert scales.stride() == (3 * M, 1, M)


def test_masking_is_refused_by_name(buffer: deep_ep.Buffer) -> None:
    status = torch.zeros(1, dtype=torch.int32)
    with pytest.raises(NotImplementedError, match="low_latency_update_mask_buffer was called"):
        buffer.low_latency_update_mask_buffer(0, True)
    with pytest.raises(NotImplementedError, match="low_latency_query_mask_buffer was called"):
        buffer.low_latency_query_mask_buffer(status)
    with pytest.raises(NotImplementedError, match="low_latency_clean_mask_buffer was called"):
        buffer.low_latency_clean_mask_buffer()


def test_cleaning_changes_nothing(buffer: deep_ep.Buffer) -> None:
    _, recv_count, *_, hook = buffer.low_latency_dispatch(**of_dispatch(return_recv_hook=True))
    buffer.clean_low_latency_buffer(M, H, E)
    hook()
    assert recv_count.tolist() == [T] + [0] * (E - 1)


def test_a_destroyed_buffer_says_so_and_leaves_results(buffer: deep_ep.Buffer) -> None:
    arguments = of_combine(buffer)
    combined, _, _ = buffer.low_latency_combine(**arguments)
    buffer.destroy()
    buffer.destroy()
    assert bool((combined == K).all())
    with pytest.raises(EPBackendError, match=re.escape("used after destroy()")):
        buffer.low_latency_dispatch(**of_dispatch())
    with pytest.raises(EPBackendError, match=re.escape("used after destroy()")):
        buffer.low_latency_combine(**arguments)


@pytest.mark.parametrize("num_ranks", [1, 2, 5])
@pytest.mark.parametrize(("top_k", "hidden"), [(1, 640), (11, 1), (11, 640), (11, 200)])
def test_no_buffer_takes_more_than_the_size_hint(num_ranks: int, top_k: int, hidden: int) -> None:
    def rank_main(group: Group) -> int:
        buffer = buffer_of(group)
        x = torch.ones((T, hidden), dtype=torch.bfloat16)
        idx = torch.full((T, top_k), -1)
        for use_fp8, weights in product((False, True), (None, torch.ones((T, top_k)))):
            arguments = of_dispatch(x=x, topk_idx=idx, use_fp8=use_fp8, topk_weights=weights)
            buffer.low_latency_dispatch(**arguments)
        assert len(buffer._buffers) == 4
        return max(b.num_symmetric_bytes for b in buffer._buffers.values())

    hint = deep_ep.Buffer.get_low_latency_rdma_size_hint
    taken = max(virtual_world(num_ranks).run(rank_main))
    of_top_k = hint(M, hidden, num_ranks, E, top_k=top_k)
    assert taken <= of_top_k <= hint(M, hidden, num_ranks, E)


def num_bytes_over_network(shape: Shape) -> int:
    return _native.NetworkLayout(shape.layout()).num_bytes


def test_the_size_hint_is_a_fraction_of_what_deep_ep_takes() -> None:
    hint = deep_ep.Buffer.get_low_latency_rdma_size_hint
    assert hint(128, 7168, 8, 256) < 1.78 * 2**30 / 20
    with pytest.raises(ValueError, match="hidden is 0"):
        hint(128, 0, 8, 256)
    # Over a network what is sent is staged: of combine a row for each of a message's experts.
    shape = Shape(8, 128, 7168, 256, 11, device="cuda", network=NetworkConfig(), reduction="source")
    assert hint(128, 7168, 8, 256, over_network=True) == num_bytes_over_network(shape)


def test_ranks_that_disagree_about_a_new_shape_are_told() -> None:
    def rank_main(group: Group) -> None:
        arguments = of_dispatch(num_max_dispatch_tokens_per_rank=M + group.self_rank)
        with pytest.raises(SettingsMismatch, match="num_max_tokens_per_rank differs"):
            buffer_of(group).low_latency_dispatch(**arguments)

    virtual_world(2).run(rank_main)


def test_a_silent_peer_is_a_timeout_that_names_it() -> None:
    def rank_main(group: Group) -> None:
        buffer = buffer_of(group, timeout_secs=0.2)
        stats = torch.zeros(E // 2, dtype=torch.int32)
        arguments = of_dispatch(return_recv_hook=True)
        *_, hook = buffer.low_latency_dispatch(**arguments)
        hook()
        group.all_gather(None)
        if group.self_rank == 0:
            *_, hook = buffer.low_latency_dispatch(
                **arguments, cumulative_local_expert_recv_stats=stats
            )
            with pytest.raises(PeerTimeout) as raised:
                hook()
            assert raised.value.record["peer_rank"] == 1
            assert stats.tolist() == [0] * (E // 2)
        group.all_gather(None)

    virtual_world(2).run(rank_main)


class FakeEvent:
    def __init__(self) -> None:
        self.num_waits = 0

    def wait(self) -> None:
        self.num_waits += 1


def test_events_are_waited_for_where_there_are_any(buffer: deep_ep.Buffer) -> None:
    *_, event, _ = buffer.low_latency_dispatch(**of_dispatch(async_finish=True))
    assert event.event is None  # the CPU has finished
    event.current_stream_wait()

    fake: Any = FakeEvent()
    event = deep_ep.EventOverlap(fake, (torch.ones(1),))
    event.current_stream_wait()
    with event:
        assert fake.num_waits == 1
    assert fake.num_waits == 2
    event.current_stream_wait(release_handle=True)
    assert fake.num_waits == 3
    assert event.event is event.extra_tensors is None
