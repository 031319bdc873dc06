"""What `deep_ep.Buffer`'s normal calls refuse, with which words, and what they ignore."""

from __future__ import annotations

import re
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from ep_backend import (
    EPBackendError,
    Group,
    PeerTimeout,
    ProtocolError,
    SettingsMismatch,
    deep_ep,
    virtual_world,
)
from tests.deep_ep.test_arguments import names_and_defaults

T, H, E, K = 3, 24, 6, 2


@pytest.fixture
def group() -> Group:
    return virtual_world(1).groups[0]


@pytest.fixture
def buffer(group: Group) -> deep_ep.Buffer:
    return deep_ep.Buffer(group)


def of_dispatch(**changed: Any) -> dict[str, Any]:
    arguments: dict[str, Any] = dict(
        x=torch.ones((T, H), dtype=torch.bfloat16),
        num_tokens_per_rank=torch.tensor([T], dtype=torch.int32),
        is_token_in_rank=torch.ones((T, 1), dtype=torch.bool),
        num_tokens_per_expert=torch.tensor([T] + [0] * (E - 1), dtype=torch.int32),
        topk_idx=torch.tensor([[0, -1]] * T),
        topk_weights=torch.ones((T, K)),
    )
    return arguments | changed


def of_combine(buffer: deep_ep.Buffer, **changed: Any) -> dict[str, Any]:
    recv_x, *_, handle, _ = buffer.dispatch(**of_dispatch())
    return dict(x=recv_x, handle=handle) | changed


def test_signatures_are_those_of_deep_ep() -> None:
    positional = "POSITIONAL_OR_KEYWORD"
    events = [("previous_event", None), ("async_finish", False), ("allocate_on_comm_stream", False)]
    assert names_and_defaults(deep_ep.Buffer.get_dispatch_layout, positional) == [
        "topk_idx",
        "num_experts",
        *events,
    ]
    assert names_and_defaults(deep_ep.Buffer.dispatch, positional) == [
        "x",
        ("handle", None),
        ("num_tokens_per_rank", None),
        ("num_tokens_per_rdma_rank", None),
        ("is_token_in_rank", None),
        ("num_tokens_per_expert", None),
        ("topk_idx", None),
        ("topk_weights", None),
        ("expert_alignment", 1),
        ("num_worst_tokens", 0),
        ("config", None),
        *events,
    ]
    assert names_and_defaults(deep_ep.Buffer.combine, positional) == [
        "x",
        "handle",
        ("topk_weights", None),
        ("bias", None),
        ("config", None),
        *events,
    ]
    assert names_and_defaults(deep_ep.Config, positional) == [
        ("num_sms", 20),
        ("num_max_nvl_chunked_send_tokens", 6),
        ("num_max_nvl_chunked_recv_tokens", 256),
        ("num_max_rdma_chunked_send_tokens", 6),
        ("num_max_rdma_chunked_recv_tokens", 256),
    ]


LAYOUT_MISTAKES: dict[str, tuple[dict[str, Any], str]] = {
    "no experts": (dict(num_experts=0), "num_experts is 0, expected an integer in 1.."),
    "1-D": (dict(topk_idx=torch.zeros(T)), r"topk_idx has shape \[3\], expected \[T, top_k\]"),
    "dtype": (dict(topk_idx=torch.zeros((T, K))), "dtype torch.float32, expected torch.int64 or"),
    "expert": (
        dict(topk_idx=torch.tensor([[0, 1], [2, 6]])),
        r"topk_idx\[1, 1\] is 6, expected -1 \(not routed\) or an expert in 0\.\.5",
    ),
    "negative": (dict(topk_idx=torch.tensor([[-2]])), r"topk_idx\[0, 0\] is -2, expected -1"),
    "comm stream": (
        dict(allocate_on_comm_stream=True, async_finish=True),
        "needs async_finish=True and a previous_event",
    ),
}


@pytest.mark.parametrize("mistake", LAYOUT_MISTAKES)
def test_a_layout_of_wrong_arguments_is_refused(buffer: deep_ep.Buffer, mistake: str) -> None:
    changed, message = LAYOUT_MISTAKES[mistake]
    arguments = dict(topk_idx=torch.zeros((T, K), dtype=torch.int64), num_experts=E)
    with pytest.raises(ValueError, match=message):
        buffer.get_dispatch_layout(**arguments | changed)


FLOAT8 = torch.float8_e4m3fn
DISPATCH_MISTAKES: dict[str, tuple[dict[str, Any], str]] = {
    "dtype": (dict(x=torch.ones((T, H)).half()), "x has dtype torch.float16, expected torch.bfl"),
    "1-D x": (dict(x=torch.ones(H)), r"x has shape \[24\]"),
    "strides": (dict(x=torch.ones((H, T)).t()), r"Pass x.contiguous\(\)"),
    "neither tensor nor pair": (dict(x=3), "x is neither a tensor nor a pair of float8 rows"),
    "pair of bfloat16": (
        dict(x=(torch.ones((T, H)).bfloat16(), torch.ones((T, 1)))),
        r"x\[0\] has dtype torch.bfloat16, expected torch.float8_e4m3fn",
    ),
    "float8 without scales": (dict(x=torch.ones((T, H)).to(FLOAT8)), "x has dtype torch.float8"),
    "scales": (
        dict(x=(torch.ones((T, H)).to(FLOAT8), torch.ones((T, 2)))),
        r"scales, has dtype torch.float32 and shape \[3, 2\], expected float32 and \[3, 1\] or",
    ),
    "dtype of scales": (
        dict(x=(torch.ones((T, H)).to(FLOAT8), torch.ones((T, 1)).bfloat16())),
        r"scales, has dtype torch.bfloat16 and shape",
    ),
    "no layout": (dict(num_tokens_per_expert=None), "num_tokens_per_expert was not given. Pass"),
    "per expert": (
        dict(num_tokens_per_expert=torch.zeros(E)),
        "num_tokens_per_expert has dtype torch.float32",
    ),
    "per rank": (
        dict(num_tokens_per_rank=torch.zeros(2, dtype=torch.int32)),
        r"num_tokens_per_rank has shape \[2\], expected \[1\]",
    ),
    "in rank": (
        dict(is_token_in_rank=torch.ones((T, 2), dtype=torch.bool)),
        r"is_token_in_rank has shape \[3, 2\], expected \[3, 1\]",
    ),
    "layout of another topk_idx": (
        dict(topk_idx=torch.tensor([[0, 1], [-1, -1], [2, 2]])),
        r"is_token_in_rank\[1\] is \[True\], but the experts \[-1, -1\] of that token are those of",
    ),
    "topk_idx of other tokens": (
        dict(topk_idx=torch.zeros((T + 1, K), dtype=torch.int64), is_token_in_rank=None),
        r"topk_idx has shape \[4, 2\], expected \[3, 2\]",
    ),
    "expert": (dict(topk_idx=torch.full((T, K), E)), r"topk_idx\[0, 0\] is 6, expected -1"),
    "weights": (
        dict(topk_weights=torch.ones((T, K + 1))),
        r"topk_weights has shape \[3, 3\], expected \[3, 2\]",
    ),
    "weights alone": (dict(topk_idx=None), "topk_idx and topk_weights go together"),
    "nothing to go by": (
        dict(topk_idx=None, topk_weights=None, is_token_in_rank=None),
        "neither topk_idx nor is_token_in_rank was given",
    ),
    "alignment": (dict(expert_alignment=0), "expert_alignment is 0, expected"),
    "worst": (dict(num_worst_tokens=-1), "num_worst_tokens is -1, expected"),
    "handle": (
        dict(topk_idx=None, topk_weights=None, handle=(1, 2, 3, 4, 5, 6)),
        "handle is not one that dispatch of this Buffer returned",
    ),
    "comm stream": (dict(allocate_on_comm_stream=True), "allocate_on_comm_stream is True, which"),
}


@pytest.mark.parametrize("mistake", DISPATCH_MISTAKES)
def test_wrong_dispatches_are_refused_and_send_nothing(
    buffer: deep_ep.Buffer, mistake: str
) -> None:
    changed, message = DISPATCH_MISTAKES[mistake]
    with pytest.raises(ValueError, match=message):
        buffer.dispatch(**of_dispatch(**changed))
    recv_x, _, _, counts, _, _ = buffer.dispatch(**of_dispatch())
    assert counts == [T] + [0] * (E - 1)
    assert bool((recv_x == 1).all())


def test_a_handle_has_decided_on_routing_and_rows(buffer: deep_ep.Buffer) -> None:
    arguments = of_combine(buffer)
    x, handle = of_dispatch()["x"], arguments["handle"]
    for given in (dict(num_worst_tokens=4), of_dispatch()):
        with pytest.raises(ValueError, match="together with a handle, whose dispatch has decided"):
            buffer.dispatch(**dict(x=x) | given, handle=handle)
    for dtype in (torch.bfloat16, torch.float32):
        with pytest.raises(
            ValueError, match=r"x has (2 tokens, but|shape \[2, 24\], expected \[3)"
        ):
            buffer.dispatch(x[:2].to(dtype), handle=handle)
    recv_x, *_ = buffer.dispatch(x, handle=handle)
    assert torch.equal(recv_x, x)


COMBINE_MISTAKES: dict[str, tuple[dict[str, Any], str]] = {
    "shape": (
        dict(x=torch.ones((T + 1, H), dtype=torch.bfloat16)),
        r"x has shape \[4, 24\], expected \[3, 24\]",
    ),
    "dtype": (
        dict(x=torch.ones((T, H))),
        "x has dtype torch.float32, expected torch.bfloat16: the dtype that was dispatched",
    ),
    "weights": (
        dict(topk_weights=torch.ones((T, K + 1))),
        r"topk_weights has shape \[3, 3\], expected \[3, 2\]",
    ),
    "bias": (
        dict(bias=torch.ones((T, H))),
        "bias has dtype torch.float32, expected torch.bfloat16",
    ),
    "biases": (
        dict(bias=(torch.ones((T, H)).bfloat16(),) * 3),
        "bias has 3 tensors, expected one, or a pair",
    ),
    "handle": (dict(handle=(1, 2, 3, 4, 5, 6)), "handle is not one that dispatch of this Buffer"),
    "comm stream": (dict(allocate_on_comm_stream=True), "allocate_on_comm_stream is True, which"),
}


@pytest.mark.parametrize("mistake", COMBINE_MISTAKES)
def test_wrong_combines_are_refused_and_send_nothing(buffer: deep_ep.Buffer, mistake: str) -> None:
    changed, message = COMBINE_MISTAKES[mistake]
    arguments = of_combine(buffer)
    with pytest.raises(ValueError, match=message):
        buffer.combine(**arguments | changed)
    combined, weights, _ = buffer.combine(**arguments)
    assert bool((combined == 1).all())
    assert weights is None


def test_a_handle_belongs_to_its_buffer_and_its_half(group: Group, buffer: deep_ep.Buffer) -> None:
    arguments = of_combine(buffer)
    other = deep_ep.Buffer(group)
    with pytest.raises(ValueError, match="Use the Buffer that dispatched"):
        other.combine(**arguments)
    x, topk_idx = of_dispatch()["x"], of_dispatch()["topk_idx"]
    rows, _, low_latency_handle, _, _ = buffer.low_latency_dispatch(
        x, topk_idx, T, E, use_fp8=False
    )
    with pytest.raises(ValueError, match="handle is not one that dispatch of this Buffer returned"):
        buffer.combine(arguments["x"], low_latency_handle)
    with pytest.raises(ValueError, match="handle is not one that low_latency_dispatch"):
        buffer.low_latency_combine(rows, topk_idx, torch.ones((T, K)), arguments["handle"])


def test_more_ranks_than_a_token_can_list_need_topk_idx() -> None:
    def rank_main(group: Group) -> None:
        arguments = of_dispatch(
            num_tokens_per_rank=None,
            is_token_in_rank=torch.ones((T, 65), dtype=torch.bool),
            topk_idx=None,
            topk_weights=None,
        )
        with pytest.raises(ValueError, match=r"number of ranks is 65, .*1\.\.64.*Pass topk_idx"):
            deep_ep.Buffer(group).dispatch(**arguments)

    virtual_world(65).run(rank_main)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (dict(num_sms=-1), "num_sms is -1, expected an integer in 0.."),
        (
            dict(num_max_nvl_chunked_send_tokens=256),
            r"nvl_chunked_recv_tokens is 256, .*257\.\..*num_max_nvl_chunked_send_tokens is 256",
        ),
        (dict(num_max_nvl_chunked_send_tokens=0), "num_max_nvl_chunked_send_tokens is 0"),
        (
            dict(num_max_rdma_chunked_send_tokens=9, num_max_rdma_chunked_recv_tokens=17),
            r"num_max_rdma_chunked_recv_tokens is 17, expected an integer in 18\.\.",
        ),
    ],
)
def test_a_config_that_could_not_be_is_refused(arguments: dict[str, int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        deep_ep.Config(**arguments)


@pytest.mark.parametrize("num_ranks", [1, 2, 8, 9, 64])
def test_size_hints_are_for_any_number_of_ranks(num_ranks: int) -> None:
    config = deep_ep.Config(20, 6, 256)
    hint = config.get_nvl_buffer_size_hint(14336, num_ranks)
    rows = 20 // 2 * 256 * num_ranks * 14336
    assert rows < hint < 1.06 * rows + (1 << 20)
    assert deep_ep.Config(4, 6, 256).get_nvl_buffer_size_hint(14336, num_ranks) < hint
    assert config.get_rdma_buffer_size_hint(14336, num_ranks) == 0
    with pytest.raises(ValueError, match="hidden_bytes is 0"):
        config.get_nvl_buffer_size_hint(0, num_ranks)


def test_configs_exist_for_any_number_of_ranks_and_carry_num_sms(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(deep_ep.Buffer, "num_sms", 20)
    assert deep_ep.Buffer.get_dispatch_config(3) == deep_ep.Config()
    deep_ep.Buffer.set_num_sms(24)
    assert deep_ep.Buffer.num_sms == 24
    for num_ranks in (1, 7, 8, 160):
        assert deep_ep.Buffer.get_dispatch_config(num_ranks) == deep_ep.Config(24)
        assert deep_ep.Buffer.get_combine_config(num_ranks) == deep_ep.Config(24)
    with pytest.raises(ValueError, match="new_num_sms is -2"):
        deep_ep.Buffer.set_num_sms(-2)
    with pytest.raises(ValueError, match="num_ranks is 0"):
        deep_ep.Buffer.get_combine_config(0)


@pytest.mark.parametrize(
    ("asked", "most", "taken"),
    [(24, 132, 24), (24, 16, 16), (0, 132, None), (24, 0, None)],
    ids=["as asked", "what there is", "as the buffer thinks best", "cpu"],
)
def test_normal_calls_take_the_sms_of_their_config(
    buffer: deep_ep.Buffer,
    monkeypatch: pytest.MonkeyPatch,
    asked: int,
    most: int,
    taken: int | None,
) -> None:
    normal: Any = SimpleNamespace(num_max_sms=most)
    assert buffer._num_sms_of(deep_ep.Config(asked), normal) == taken
    monkeypatch.setattr(deep_ep.Buffer, "num_sms", asked)
    assert buffer._num_sms_of(None, normal) == taken


def test_events_and_streams_are_nothing_on_a_cpu(buffer: deep_ep.Buffer) -> None:
    if torch.cuda.is_initialized():
        pytest.skip("a GPU is in use")
    event = deep_ep.Buffer.capture()
    event.current_stream_wait()
    with event:
        pass
    deep_ep.EventHandle().current_stream_wait()
    *_, done = buffer.dispatch(
        **of_dispatch(previous_event=event, async_finish=True, allocate_on_comm_stream=True)
    )
    done.current_stream_wait()
    assert done.event is None
    assert buffer.get_comm_stream() is None


class FakeEvent:
    num_waits = 0

    def wait(self) -> None:
        self.num_waits += 1


def test_a_previous_event_is_waited_for(buffer: deep_ep.Buffer) -> None:
    fake: Any = FakeEvent()
    previous = deep_ep.EventOverlap(fake)
    arguments = of_combine(buffer)
    buffer.get_dispatch_layout(torch.zeros((T, K), dtype=torch.int64), E, previous)
    buffer.dispatch(**of_dispatch(previous_event=previous))
    buffer.combine(**arguments, previous_event=previous)
    assert fake.num_waits == 3


def test_there_is_no_memory_of_all_shapes_to_look_at(buffer: deep_ep.Buffer) -> None:
    with pytest.raises(NotImplementedError, match="each shape has memory of its own"):
        buffer.get_local_buffer_tensor(torch.uint8)


def test_a_destroyed_buffer_says_so_and_leaves_results(buffer: deep_ep.Buffer) -> None:
    arguments = of_combine(buffer)
    combined, _, _ = buffer.combine(**arguments)
    buffer.destroy()
    assert bool((combined == 1).all())
    message = re.escape("used after destroy()")
    with pytest.raises(EPBackendError, match=message):
        buffer.dispatch(**of_dispatch())
    with pytest.raises(EPBackendError, match=message):
        buffer.combine(**arguments)
    with pytest.raises(EPBackendError, match=message):
        buffer.get_dispatch_layout(torch.zeros((T, K), dtype=torch.int64), E)


def test_ranks_that_disagree_about_a_new_shape_are_told() -> None:
    def rank_main(group: Group) -> None:
        arguments = of_dispatch(
            x=torch.ones((T, H + group.self_rank), dtype=torch.bfloat16),
            num_tokens_per_rank=None,
            is_token_in_rank=None,
        )
        with pytest.raises(SettingsMismatch, match="hidden differs"):
            deep_ep.Buffer(group).dispatch(**arguments)

    virtual_world(2).run(rank_main)


def two_ranks() -> dict[str, Any]:
    return of_dispatch(num_tokens_per_rank=None, is_token_in_rank=None)


def test_a_silent_peer_is_a_timeout_that_names_it() -> None:
    def rank_main(group: Group) -> None:
        buffer = deep_ep.Buffer(group, timeout_secs=0.2)
        buffer.dispatch(**two_ranks())
        if group.self_rank == 0:
            with pytest.raises(PeerTimeout) as raised:
                buffer.dispatch(**two_ranks())
            assert raised.value.record["peer_rank"] == 1
        group.all_gather(None)

    virtual_world(2).run(rank_main)


def test_weights_that_only_one_rank_sends_home_are_noticed() -> None:
    def rank_main(group: Group) -> None:
        buffer = deep_ep.Buffer(group, timeout_secs=5.0)
        recv_x, _, recv_weights, _, handle, _ = buffer.dispatch(**two_ranks())
        with pytest.raises(ProtocolError, match="ranks have issued different operations"):
            buffer.combine(recv_x, handle, recv_weights if group.self_rank == 0 else None)

    virtual_world(2).run(rank_main)
