"""What lies in symmetric memory between the hops of a hierarchical exchange, and what is said when
it was damaged or when somebody does not come."""

from __future__ import annotations

import signal
from collections.abc import Callable
from dataclasses import dataclass, replace

import pytest
import torch

from ep_backend import (
    DispatchResult,
    Group,
    LowLatencyBuffer,
    PeerTimeout,
    ProtocolError,
    RecvHook,
    VirtualWorld,
    _native,
)
from tests.support.memory import entry_of, header_of, word_of
from tests.support.scenario import Scenario, check_combined, check_received, run_experts
from tests.support.shapes import Shape

DISPATCH = _native.Phase.DISPATCH
EPOCH, BANK = 1, 1  # the first operation; bank 1 mod 2
EXAMPLE = Shape(
    4,
    num_max_tokens_per_rank=2,
    hidden=1,
    num_experts=4,
    top_k=3,
    dtype=torch.float32,
    ranks_per_node=2,
    hierarchical=True,
)


@dataclass
class Exchange:
    """Of all ranks, whose dispatches have been sent."""

    world: VirtualWorld
    buffers: list[LowLatencyBuffer]
    dispatched: list[tuple[DispatchResult, RecvHook]]

    def hooks(self) -> None:
        self.world.run(lambda group: self.dispatched[group.self_rank][1]())

    def close(self) -> None:
        self.world.run(lambda group: self.buffers[group.self_rank].close())


def send(
    shape: Shape,
    x: list[torch.Tensor],
    idx: list[torch.Tensor],
    weights: list[torch.Tensor],
    timeout_secs: float = 5.0,
) -> Exchange:
    world = shape.world()
    assert world.network is not None
    buffers = world.run(lambda group: shape.buffer(group, timeout_secs))
    dispatched = [b.dispatch(x[r], idx[r], weights[r]) for r, b in enumerate(buffers)]
    for rank in range(shape.num_ranks):
        world.network.native.flush(rank)
    return Exchange(world, buffers, dispatched)


def sent_example(timeout_secs: float = 5.0) -> Exchange:
    """Token a of rank 1; nobody else has any."""
    none = torch.empty((0, 3))
    idx = [none.long()] * 4
    idx[1] = torch.tensor([[3, 0, 2]])
    weights = [none] * 4
    weights[1] = torch.tensor([[0.5, 0.25, 2.0]])
    x = [torch.empty((0, 1))] * 4
    x[1] = torch.tensor([[8.0]])
    return send(EXAMPLE, x, idx, weights, timeout_secs)


def test_worked_example_of_two_nodes() -> None:
    """Numbers of the first comments of csrc/cpu/multi_node_dispatch.cpp and _combine.cpp."""
    exchange = sent_example()
    layout = EXAMPLE.multi_node_layout()
    # Over the network: one message to rank 3, of experts 2 and 3, for the second row home.
    message = layout.node_inbox(BANK, 0, 0)
    header = header_of(exchange.buffers[3], message)
    assert (header.src_token, header.outcome_slot, header.num_entries) == (0, 1, 2)
    assert header.epoch_tag == EPOCH
    entries = [entry_of(exchange.buffers[3], message, i) for i in range(2)]
    assert [(e.local_expert, e.k, e.position, e.weight) for e in entries] == [
        (2, 2, 0, 2.0),
        (3, 0, 0, 0.5),
    ]
    signal = word_of(exchange.buffers[3], layout.node_signal(BANK, 0)).value
    assert signal == _native.pack_signal(EPOCH, 1)
    # Within the node: what rank 1 would have written there, but for the outcome slots.
    exchange.hooks()
    for rank, entry in ((2, (0, 2, 0, 2.0)), (3, (0, 0, 0, 0.5))):
        message = layout.base.header(BANK, 1, 0)
        header = header_of(exchange.buffers[rank], message)
        column = rank - 2
        assert (header.src_token, header.outcome_slot, header.num_entries) == (0, column, 1)
        e = entry_of(exchange.buffers[rank], message, 0)
        assert (e.local_expert, e.k, e.position, e.weight) == entry
        word = word_of(exchange.buffers[rank], layout.base.signal(BANK, DISPATCH, 1)).value
        assert word == _native.pack_signal(EPOCH, 1)

    def combine(group: Group) -> torch.Tensor:
        buffer, (result, _) = (
            exchange.buffers[group.self_rank],
            exchange.dispatched[group.self_rank],
        )
        return buffer.combine_and_receive(result.recv_x + group.self_rank, result.handle)

    outs = exchange.world.run(combine)
    assert outs[1].tolist() == [[0.25 * 8 + (2.0 * (8 + 2) + 0.5 * (8 + 3))]]
    exchange.close()


def test_undamaged_memory_is_received() -> None:
    """The control of what follows."""
    shape = Shape(4, num_max_tokens_per_rank=4, ranks_per_node=2, hierarchical=True)
    scenario = Scenario(shape).add("uniform", [4] * 4, seed=0)
    variant = scenario.variants[0]
    exchange = send(shape, variant.x, variant.topk_idx, variant.topk_weights)
    exchange.hooks()
    for rank, (result, _) in enumerate(exchange.dispatched):
        check_received(result, variant, shape, rank)
    exchange.close()


def set_tag(exchange: Exchange, message: int) -> None:
    header_of(exchange.buffers[3], message).epoch_tag += 1


def set_no_entries(exchange: Exchange, message: int) -> None:
    header_of(exchange.buffers[3], message).num_entries = 0


def set_too_many_entries(exchange: Exchange, message: int) -> None:
    header_of(exchange.buffers[3], message).num_entries = 4


def set_outcome_slot(exchange: Exchange, message: int) -> None:
    header_of(exchange.buffers[3], message).outcome_slot = 2 * 3


def set_expert_of_another_node(exchange: Exchange, message: int) -> None:
    entry_of(exchange.buffers[3], message, 0).local_expert = 1


def set_no_expert(exchange: Exchange, message: int) -> None:
    entry_of(exchange.buffers[3], message, 0).local_expert = 4


def set_experts_out_of_order(exchange: Exchange, message: int) -> None:
    entry_of(exchange.buffers[3], message, 0).local_expert = 3
    entry_of(exchange.buffers[3], message, 1).local_expert = 2


def set_too_many_messages(exchange: Exchange, message: int) -> None:
    layout = EXAMPLE.multi_node_layout()
    signal = word_of(exchange.buffers[3], layout.node_signal(BANK, 0))
    signal.value = _native.pack_signal(EPOCH, 3)


@pytest.mark.parametrize(
    "damage",
    [
        set_tag,
        set_no_entries,
        set_too_many_entries,
        set_outcome_slot,
        set_expert_of_another_node,
        set_no_expert,
        set_experts_out_of_order,
        set_too_many_messages,
    ],
)
def test_a_damaged_message_is_not_forwarded(damage: Callable[[Exchange, int], None]) -> None:
    exchange = sent_example()
    damage(exchange, EXAMPLE.multi_node_layout().node_inbox(BANK, 0, 0))
    with pytest.raises(ProtocolError, match=r"dispatch recv 1 on rank 3: .* by rank 1 contradicts"):
        exchange.dispatched[3][1]()
    # Nothing of it has reached rank 2.
    at = EXAMPLE.layout().signal(BANK, DISPATCH, 1)
    assert word_of(exchange.buffers[2], at).value == 0
    exchange.close()


def test_a_partial_row_for_no_message_of_the_forwarder_is_refused() -> None:
    """Between forwarding and receiving: rank 2 is told where its row goes by rank 3."""
    exchange = sent_example(timeout_secs=0.5)
    with pytest.raises(PeerTimeout):
        exchange.dispatched[3][1]()  # has forwarded; waits for what rank 2 forwards
    header = header_of(exchange.buffers[2], EXAMPLE.layout().header(BANK, 1, 0))
    assert header.num_entries == 1
    header.outcome_slot = 2 * 2  # messages times ranks of a node
    with pytest.raises(ProtocolError, match="CORRUPT: expected 4, saw 4"):
        exchange.dispatched[2][1]()
    exchange.close()


class Interrupted(Exception):
    pass


def interrupt(hook: RecvHook) -> None:
    """Calls it alone, as if Ctrl-C was pressed while it waits for what others forward or add up."""

    def raise_it(*_: object) -> None:
        raise Interrupted

    handler = signal.signal(signal.SIGALRM, raise_it)
    signal.setitimer(signal.ITIMER_REAL, 0.5)
    try:
        with pytest.raises(Interrupted):
            hook()
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, handler)


def test_a_hook_that_was_interrupted_goes_on_behind_what_it_has_forwarded() -> None:
    shape = Shape(6, num_max_tokens_per_rank=4, ranks_per_node=2, hierarchical=True)
    scenario = Scenario(shape).add("uniform", [4, 0, 3, 4, 4, 1], seed=0)
    variant = scenario.variants[0]
    exchange = send(shape, variant.x, variant.topk_idx, variant.topk_weights)
    assert exchange.world.network is not None
    network = exchange.world.network

    def hooks_of_all(hooks: list[RecvHook], rank: int) -> None:
        """`rank`'s is interrupted first. It has forwarded or added up then, and does so once."""
        before = network.traffic(rank, rank ^ 1), network.traffic(rank, (rank + 2) % 6)
        interrupt(hooks[rank])
        first = network.traffic(rank, rank ^ 1), network.traffic(rank, (rank + 2) % 6)
        assert first != before
        interrupt(hooks[rank])
        assert (network.traffic(rank, rank ^ 1), network.traffic(rank, (rank + 2) % 6)) == first
        exchange.world.run(lambda group: hooks[group.self_rank]())

    hooks_of_all([hook for _, hook in exchange.dispatched], 3)
    results = [result for result, _ in exchange.dispatched]
    for rank, result in enumerate(results):
        check_received(result, variant, shape, rank)
    combined = [
        buffer.combine(run_experts(result, shape, rank), result.handle)
        for rank, (buffer, result) in enumerate(zip(exchange.buffers, results, strict=True))
    ]
    hooks_of_all([hook for _, hook in combined], 4)
    for rank, (out, _) in enumerate(combined):
        check_combined(out, variant, rank)
    exchange.close()


def test_whoever_does_not_forward_is_named() -> None:
    """Rank 3's hook does not run: rank 2 has all of rank 1's node but what rank 3 would forward."""
    exchange = sent_example(timeout_secs=0.3)
    with pytest.raises(PeerTimeout) as error:
        exchange.dispatched[2][1]()
    assert error.value.record["peer_rank"] == 3
    assert error.value.record["phase"] == "dispatch"
    exchange.close()


def test_whoever_does_not_send_over_the_network_is_named() -> None:
    shape = replace(EXAMPLE, ranks_per_node=1)
    world = shape.world()
    buffers = world.run(lambda group: shape.buffer(group, timeout_secs=0.3))
    idx, rows = torch.tensor([[0, 1, 2]]), torch.ones((1, 1))
    _, hook = buffers[0].dispatch(rows, idx, torch.ones((1, 3)))
    with pytest.raises(PeerTimeout) as error:
        hook()
    assert error.value.record["peer_rank"] == 1
    world.run(lambda group: buffers[group.self_rank].close())
