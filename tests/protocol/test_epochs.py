"""Signals, epochs and credits against plain Python arithmetic."""

from __future__ import annotations

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from ep_backend import _native

MAX_EPOCH, MAX_COUNT = (1 << 48) - 1, (1 << 15) - 1

epochs = st.one_of(st.integers(0, 100), st.integers(MAX_EPOCH - 100, MAX_EPOCH))
banks = st.integers(2, _native.MAX_BANKS)


@given(st.integers(0, MAX_EPOCH), st.integers(0, MAX_COUNT))
@example(MAX_EPOCH, MAX_COUNT)
@example(0, 0)
@example(1, 0)
def test_a_signal_carries_its_epoch_and_count(epoch: int, count: int) -> None:
    signal = _native.pack_signal(epoch, count)
    assert signal == epoch * 2**16 + count
    assert _native.signal_epoch(signal) == epoch
    assert _native.signal_count(signal) == count
    assert not _native.signal_is_tagged(signal)


@given(st.integers(0, MAX_EPOCH), st.integers(0, MAX_COUNT))
def test_a_signal_that_promises_tagged_units_says_so_and_nothing_else(
    epoch: int, count: int
) -> None:
    signal = _native.pack_signal(epoch, count) | _native.TAGGED_BIT
    assert _native.signal_is_tagged(signal)
    assert _native.signal_epoch(signal) == epoch
    assert _native.signal_count(signal) == count


@given(epochs, epochs, st.integers(0, MAX_COUNT), st.integers(0, MAX_COUNT))
def test_a_newer_signal_is_a_larger_word_whatever_it_counts(
    a: int, b: int, count_a: int, count_b: int
) -> None:
    if a < b:
        assert _native.pack_signal(a, count_a) < _native.pack_signal(b, count_b)


def test_zeroed_memory_is_no_epoch() -> None:
    assert _native.signal_epoch(0) == 0
    assert _native.pack_signal(1, 0) != 0  # the first signal of an empty batch shows


@given(epochs, banks)
def test_consecutive_epochs_walk_through_all_banks(epoch: int, num_banks: int) -> None:
    seen = [_native.bank_of(epoch + i, num_banks) for i in range(num_banks)]
    assert sorted(seen) == list(range(num_banks))
    assert _native.bank_of(epoch + num_banks, num_banks) == seen[0]


@given(epochs, epochs, banks)
@example(0, 2, 2)
@example(0, 3, 2)
def test_credit_admits_a_send_once_the_banks_last_use_is_emptied(
    credit: int, epoch: int, num_banks: int
) -> None:
    last_use = epoch - num_banks
    assert _native.credit_admits(credit, epoch, num_banks) == (last_use <= credit)


@given(epochs, banks)
def test_a_credit_ahead_of_a_late_sender_still_admits(epoch: int, num_banks: int) -> None:
    """As an unsigned difference this would wrap, and the late sender would wait for ever."""
    assert _native.credit_admits(epoch + 5, epoch, num_banks)


@given(epochs, st.integers(0, 70), banks)
def test_at_most_num_banks_operations_are_outstanding(
    num_hooked: int, num_outstanding: int, num_banks: int
) -> None:
    num_sent = num_hooked + num_outstanding
    assert _native.may_send(num_sent, num_hooked, num_banks) == (num_outstanding < num_banks)
    assert _native.may_hook(num_sent, num_hooked) == (num_outstanding > 0)


@pytest.mark.parametrize("num_banks", [2, 3, 64])
def test_some_operation_may_always_go_on(num_banks: int) -> None:
    """From every legal state at least one of send and hook is allowed: no rank locks itself out."""
    for num_outstanding in range(num_banks + 1):
        num_sent = 1000 + num_outstanding
        may_send = _native.may_send(num_sent, 1000, num_banks)
        assert may_send or _native.may_hook(num_sent, 1000)
