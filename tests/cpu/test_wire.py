"""What lies in symmetric memory between a send and its hook, and what a hook says when that memory
was damaged. The second half also proves that the checks of the other tests can fail.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import pytest
import torch

from ep_backend import DispatchResult, LowLatencyBuffer, ProtocolError, RecvHook, _native
from tests.support.memory import byte_of, entry_of, header_of, word_of
from tests.support.scenario import (
    Scenario,
    check_combined,
    check_received,
    run_experts,
)
from tests.support.shapes import Shape

DISPATCH, COMBINE = _native.Phase.DISPATCH, _native.Phase.COMBINE
EPOCH, BANK = 1, 1  # the first operation; bank 1 mod 2


@dataclass
class Sent:
    """Rank 1 has sent a dispatch to rank 0, which has not looked at it yet."""

    shape: Shape
    scenario: Scenario
    buffers: list[LowLatencyBuffer]
    dispatched: list[tuple[DispatchResult, RecvHook]]

    @property
    def layout(self) -> _native.LowLatencyLayout:
        return self.shape.layout()

    @property
    def message(self) -> int:
        """Offset of the header of the first message from rank 1."""
        return self.layout.header(BANK, 1, 0)

    @property
    def row(self) -> int:
        """Offset of its row."""
        return self.layout.inbox_row(BANK, 1, 0)


SHAPE = Shape(3, num_max_tokens_per_rank=4, hidden=12, num_experts=7, top_k=3)


@pytest.fixture
def sent() -> Sent:
    return send(SHAPE)


@pytest.fixture
def sent_for_source() -> Sent:
    """Where combine sends every row home."""
    return send(replace(SHAPE, reduction="source"))


def send(shape: Shape) -> Sent:
    scenario = Scenario(shape).add("uniform", [4, 4, 4], seed=2)
    variant = scenario.variants[0]
    for idx in variant.topk_idx:
        assert (idx < 3).any()  # rank 0, which owns experts 0 1 2, has a message from everyone
    buffers = shape.virtual_buffers(timeout_secs=0.2)
    dispatched = [
        b.dispatch(variant.x[r], variant.topk_idx[r], variant.topk_weights[r])
        for r, b in enumerate(buffers)
    ]
    return Sent(shape, scenario, buffers, dispatched)


def test_undamaged_memory_is_received(sent: Sent) -> None:
    """The control: what the damage tests below start from is right."""
    sent.dispatched[0][1]()
    check_received(sent.dispatched[0][0], sent.scenario.variants[0], sent.shape, 0)


def test_worked_example_of_the_message_header() -> None:
    """Numbers of the first comment of csrc/protocol/message.h."""
    shape = Shape(2, num_max_tokens_per_rank=6, num_experts=4, top_k=3, hidden=5)
    buffers = shape.virtual_buffers()
    idx = torch.full((6, 3), -1)
    idx[5] = torch.tensor([3, 0, 2])
    weights = torch.zeros(6, 3)
    weights[5] = torch.tensor([0.25, 0.5, 0.75])
    x = torch.arange(30).view(6, 5).to(shape.dtype)
    buffers[0].dispatch(x, idx, weights)

    layout = shape.layout()
    message = layout.header(BANK, 0, 0)
    header = header_of(buffers[1], message)
    assert header.src_token == 5
    assert header.outcome_slot == 5 * 2 + 1
    assert header.num_entries == 2
    assert header.epoch_tag == EPOCH
    entries = [entry_of(buffers[1], message, i) for i in range(2)]
    assert [(e.local_expert, e.k, e.weight) for e in entries] == [(1, 0, 0.25), (0, 2, 0.75)]
    row = layout.inbox_row(BANK, 0, 0)
    got = bytes(byte_of(buffers[1], row + i).value for i in range(10))
    assert got == x[5].view(torch.uint8).numpy().tobytes()

    signal = word_of(buffers[1], layout.signal(BANK, DISPATCH, 0)).value
    assert signal == _native.pack_signal(EPOCH, 1)
    counts = [word_of(buffers[1], layout.counts(BANK, 0) + 8 * i).value for i in range(2)]
    assert counts == [_native.pack_signal(EPOCH, 1)] * 2
    # Rank 0 owns expert 0 alone of these: one message to itself, in column 0.
    assert header_of(buffers[0], message).outcome_slot == 5 * 2


def test_a_message_whose_rows_go_home_one_by_one_names_the_first_place_of_its_token() -> None:
    """The same token, and one that lists an expert twice, whose rows then are the same."""
    shape = Shape(2, 6, 5, num_experts=4, top_k=3, dtype=torch.float32, reduction="source")
    buffers = shape.virtual_buffers(timeout_secs=1.0)
    idx = torch.full((6, 3), -1)
    idx[4:] = torch.tensor([[1, -1, 1], [3, 0, 2]])
    x = torch.arange(30).view(6, 5).float()
    sent = [buffers[0].dispatch(x, idx), buffers[1].dispatch(x[:0], idx[:0])]

    layout = shape.layout()
    messages = [layout.header(BANK, 0, slot) for slot in range(2)]
    for rank, tokens in ((0, [4, 5]), (1, [5])):
        headers = [header_of(buffers[rank], m) for m, _ in zip(messages, tokens, strict=False)]
        assert [h.outcome_slot for h in headers] == [3 * token for token in tokens]
    entries = [entry_of(buffers[1], messages[0], i) for i in range(2)]
    assert [(e.local_expert, e.k, e.weight) for e in entries] == [(1, 0, 0.0), (0, 2, 0.0)]
    assert sent[0][0].handle.num_partials.tolist() == [0, 0, 0, 0, 2, 3]

    for _, hook in sent:
        hook()
    received = [result for result, _ in sent]
    of_messages = [received[r].handle.entries[:n].tolist() for r, n in ((0, 3), (1, 2))]
    # Row, k. Each of an expert's 12 rows belongs to one token of one source.
    assert of_messages == [[[12, 0], [12, 2], [0, 1]], [[12, 0], [0, 2]]]

    weights = torch.tensor([[0.0, 0.0, 0.0]] * 4 + [[2.0, torch.nan, 3.0], [4.0, 5.0, 6.0]])
    factor = torch.tensor([1.0, 10.0])[:, None, None]  # of a rank's first and second expert
    (out, hook), (_, other_hook) = (
        buffers[r].combine(received[r].recv_x * factor, received[r].handle, topk_weights=w)
        for r, w in enumerate([weights, weights[:0]])
    )

    def outcome(token: int, k: int) -> list[float]:
        place = layout.outcome(BANK, 3 * token + k)
        row = bytes(byte_of(buffers[0], place + i).value for i in range(20))
        return torch.frombuffer(bytearray(row), dtype=torch.float32).tolist()

    assert outcome(4, 0) == outcome(4, 2) == (10 * x[4]).tolist()
    assert outcome(4, 1) == [0.0] * 5  # nobody writes what is not routed
    for k, factor_of_k in enumerate([10, 1, 1]):
        assert outcome(5, k) == (factor_of_k * x[5]).tolist()
    hook()
    other_hook()
    assert torch.equal(out[4], (2 + 3) * 10 * x[4])
    assert torch.equal(out[5], 4 * 10 * x[5] + 5 * x[5] + 6 * x[5])
    assert not out[:4].any()


def test_a_hook_credits_every_peer_with_its_epoch(sent: Sent) -> None:
    sent.dispatched[1][1]()
    for peer in sent.buffers:
        credits = [word_of(peer, sent.layout.credit(DISPATCH, r)).value for r in range(3)]
        assert credits == [0, EPOCH, 0]
        assert [word_of(peer, sent.layout.credit(COMBINE, r)).value for r in range(3)] == [0] * 3


def test_zero_tokens_still_signal_every_rank() -> None:
    shape = Shape(3)
    buffers = shape.virtual_buffers()
    buffers[2].dispatch(
        torch.empty(0, shape.hidden, dtype=shape.dtype),
        torch.empty(0, shape.top_k, dtype=torch.int64),
        torch.empty(0, shape.top_k),
    )
    for peer in buffers:
        signal = word_of(peer, shape.layout().signal(BANK, DISPATCH, 2)).value
        assert signal == _native.pack_signal(EPOCH, 0)


def damage_signal_from_the_future(sent: Sent) -> None:
    signal = word_of(sent.buffers[0], sent.layout.signal(BANK, DISPATCH, 1))
    signal.value = _native.pack_signal(EPOCH + sent.shape.num_banks, 4)


def damage_signal_counts_more_than_m(sent: Sent) -> None:
    signal = word_of(sent.buffers[0], sent.layout.signal(BANK, DISPATCH, 1))
    signal.value = _native.pack_signal(EPOCH, sent.shape.num_max_tokens_per_rank + 1)


def damage_signal_counts_one_too_few(sent: Sent) -> None:
    word_of(sent.buffers[0], sent.layout.signal(BANK, DISPATCH, 1)).value -= 1


def damage_signal_promises_tagged_units(sent: Sent) -> None:
    signal = word_of(sent.buffers[0], sent.layout.signal(BANK, DISPATCH, 1))
    signal.value |= _native.TAGGED_BIT


def damage_epoch_tag(sent: Sent) -> None:
    header_of(sent.buffers[0], sent.message).epoch_tag = EPOCH + 1


def damage_too_many_entries(sent: Sent) -> None:
    header_of(sent.buffers[0], sent.message).num_entries = sent.shape.top_k + 1


def damage_one_entry_too_few(sent: Sent) -> None:
    header_of(sent.buffers[0], sent.message).num_entries -= 1


def damage_outcome_slot_out_of_range(sent: Sent) -> None:
    header_of(sent.buffers[0], sent.message).outcome_slot = sent.layout.num_outcome_slots


def damage_local_expert_that_does_not_exist(sent: Sent) -> None:
    entry_of(sent.buffers[0], sent.message, 0).local_expert = 3  # rank 0 owns 3 experts


def damage_k_out_of_range(sent: Sent) -> None:
    entry_of(sent.buffers[0], sent.message, 0).k = sent.shape.top_k


def damage_counts_disagree(sent: Sent) -> None:
    word_of(sent.buffers[0], sent.layout.counts(BANK, 1) + 8 * 2).value += 1


def damage_counts_of_another_epoch(sent: Sent) -> None:
    word_of(sent.buffers[0], sent.layout.counts(BANK, 1)).value = _native.pack_signal(EPOCH - 1, 0)


DAMAGE = [f for name, f in sorted(globals().items()) if name.startswith("damage_")]


def damage_last_column_out_of_range(sent: Sent) -> None:
    slot = sent.layout.num_outcome_slots - sent.shape.top_k
    header_of(sent.buffers[0], sent.message).outcome_slot = slot + 1


def damage_outcome_slot_that_wraps_around(sent: Sent) -> None:
    header_of(sent.buffers[0], sent.message).outcome_slot = (1 << 32) - 1


DAMAGE_FOR_SOURCE = [
    *DAMAGE,
    damage_last_column_out_of_range,
    damage_outcome_slot_that_wraps_around,
]


def name_of(damage: Callable[[Sent], None]) -> str:
    return damage.__name__.removeprefix("damage_")


@pytest.mark.parametrize("damage", DAMAGE, ids=name_of)
def test_damaged_memory_is_a_protocol_error_that_names_the_peer(
    sent: Sent, damage: Callable[[Sent], None]
) -> None:
    damage(sent)
    check_that_the_damage_is_noticed(sent)


@pytest.mark.parametrize("damage", DAMAGE_FOR_SOURCE, ids=name_of)
def test_damaged_memory_is_noticed_where_every_row_goes_home(
    sent_for_source: Sent, damage: Callable[[Sent], None]
) -> None:
    damage(sent_for_source)
    check_that_the_damage_is_noticed(sent_for_source)


def test_the_last_place_of_an_outcome_may_be_used(sent_for_source: Sent) -> None:
    """The control of the damaged columns above."""
    last = sent_for_source.layout.num_outcome_slots - sent_for_source.shape.top_k
    header_of(sent_for_source.buffers[0], sent_for_source.message).outcome_slot = last
    sent_for_source.dispatched[0][1]()


def check_that_the_damage_is_noticed(sent: Sent) -> None:
    with pytest.raises(ProtocolError, match=r"dispatch recv 1 on rank 0: .* by rank 1 ") as first:
        sent.dispatched[0][1]()
    # Nothing was credited, and the buffer stays failed in both phases.
    for peer in sent.buffers:
        assert word_of(peer, sent.layout.credit(DISPATCH, 0)).value == 0
    variant = sent.scenario.variants[0]
    with pytest.raises(ProtocolError) as second:
        sent.buffers[0].dispatch(variant.x[0], variant.topk_idx[0], variant.topk_weights[0])
    assert str(second.value) == str(first.value)


def test_the_checks_notice_one_wrong_bit_of_a_payload_and_name_the_row(sent: Sent) -> None:
    byte_of(sent.buffers[0], sent.row + 23).value ^= 1
    result, hook = sent.dispatched[0]
    hook()
    token = header_of(sent.buffers[0], sent.message).src_token
    with pytest.raises(AssertionError, match=rf"expected \(src rank 1, token {token}, variant 0\)"):
        check_received(result, sent.scenario.variants[0], sent.shape, 0)


def test_the_checks_notice_a_message_taken_from_another_source(sent: Sent) -> None:
    other = sent.layout.inbox_row(BANK, 2, 0)
    for i in range(sent.layout.dispatch_row_bytes):
        byte_of(sent.buffers[0], sent.row + i).value = byte_of(sent.buffers[0], other + i).value
    result, hook = sent.dispatched[0]
    hook()
    with pytest.raises(AssertionError, match=r"expected \(src rank 1, .* got \(src rank 2, "):
        check_received(result, sent.scenario.variants[0], sent.shape, 0)


def test_the_checks_notice_a_wrong_weight_and_a_wrong_partial_row(sent: Sent) -> None:
    variant = sent.scenario.variants[0]
    entry_of(sent.buffers[0], sent.message, 0).weight += 0.5
    back = []
    for rank, (result, hook) in enumerate(sent.dispatched):
        hook()
        y = run_experts(result, sent.shape, rank)
        back.append(sent.buffers[rank].combine(y, result.handle))
    outcome = sent.layout.outcome(BANK, 3 * sent.layout.num_outcome_columns)
    # An exponent bit: no rounding hides it.
    byte_of(sent.buffers[2], outcome + 2 * 7 + 1).value ^= 0x40
    for _, hook in back:
        hook()
    check_combined(back[0][0], variant, 0)
    with pytest.raises(AssertionError, match="rank 1, token"):
        check_combined(back[1][0], variant, 1)
    with pytest.raises(AssertionError, match=r"rank 2, token 3 of experts .* column 7"):
        check_combined(back[2][0], variant, 2)
