"""Credits and epochs under chosen interleavings: one thread drives all ranks, so nothing is left to
chance, and whatever may run must run without waiting.
"""

from __future__ import annotations

import random
from dataclasses import dataclass

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ep_backend import PeerTimeout, ProtocolError, _native
from tests.support.memory import word_of
from tests.support.programs import STEPWISE_PROGRAMS, Interpreter, Step
from tests.support.scenario import Scenario, mixed_scenario
from tests.support.shapes import Shape

# Steps that are allowed never look at the clock; steps that are not end after this.
TIMEOUT_SECS = 0.02


@dataclass
class World:
    """All ranks in the hand of one thread, with a model of who may do what."""

    scenario: Scenario
    programs: list[list[Step]]
    num_banks: int

    def __post_init__(self) -> None:
        buffers = self.scenario.shape.virtual_buffers(TIMEOUT_SECS)
        self.ranks = [Interpreter(buffer, self.scenario) for buffer in buffers]
        self.position = [0] * len(buffers)
        self.num_done = {what: [0] * len(buffers) for what in ("d", "h", "c", "hc")}

    def next_step(self, rank: int) -> Step | None:
        done = self.position[rank]
        return self.programs[rank][done] if done < len(self.programs[rank]) else None

    def missing_peers(self, rank: int) -> list[int]:
        """Whom the next step of `rank` has to wait for."""
        step = self.next_step(rank)
        assert step is not None
        what, op = step
        if what in ("d", "c"):  # credit: everyone's hook of the bank's last operation
            hook = {"d": "h", "c": "hc"}[what]
            done, needed = self.num_done[hook], op + 1 - self.num_banks
        else:  # signals: everyone's send of this operation
            send = {"h": "d", "hc": "c"}[what]
            done, needed = self.num_done[send], op + 1
        return [peer for peer, n in enumerate(done) if n < needed]

    def advance(self, rank: int) -> None:
        step = self.next_step(rank)
        assert step is not None
        self.ranks[rank].step(*step)
        self.num_done[step[0]][rank] += 1
        self.position[rank] += 1

    def unfinished(self) -> list[int]:
        return [rank for rank in range(len(self.ranks)) if self.next_step(rank) is not None]


def make_world(program: str, num_ranks: int, num_banks: int, seed: int, num_ops: int) -> World:
    shape = Shape(
        num_ranks, num_max_tokens_per_rank=3, hidden=5, num_experts=5, num_banks=num_banks
    )
    steps = list(STEPWISE_PROGRAMS[program](num_ops, num_banks))
    return World(mixed_scenario(shape, seed, num_variants=5), [steps] * num_ranks, num_banks)


interleavings = given(
    program=st.sampled_from(sorted(STEPWISE_PROGRAMS)),
    num_ranks=st.integers(2, 4),
    num_banks=st.integers(2, 3),
    seed=st.integers(0, 10_000),
    # How much one rank is preferred: drives it as far ahead as the protocol lets it go.
    bias=st.sampled_from([0.0, 0.5, 0.95, 1.0]),
)


@settings(max_examples=200)
@interleavings
def test_any_interleaving_that_the_model_allows_runs_without_waiting(
    program: str, num_ranks: int, num_banks: int, seed: int, bias: float
) -> None:
    world = make_world(program, num_ranks, num_banks, seed, num_ops=12)
    rng = random.Random(seed)
    favourite = rng.randrange(num_ranks)
    while unfinished := world.unfinished():
        ready = [rank for rank in unfinished if not world.missing_peers(rank)]
        assert ready, f"deadlock at {world.position}"
        world.advance(
            favourite if favourite in ready and rng.random() < bias else rng.choice(ready)
        )


@settings(max_examples=100)
@interleavings
def test_a_step_that_the_model_forbids_waits_for_exactly_the_missing_peer(
    program: str, num_ranks: int, num_banks: int, seed: int, bias: float
) -> None:
    world = make_world(program, num_ranks, num_banks, seed, num_ops=12)
    rng = random.Random(seed)
    for _ in range(rng.randrange(60)):
        ready = [rank for rank in world.unfinished() if not world.missing_peers(rank)]
        if ready:
            world.advance(rng.choice(ready))
    # One rank runs ahead until it has to wait.
    rank = rng.randrange(num_ranks)
    while world.next_step(rank) is not None and not world.missing_peers(rank):
        world.advance(rank)
    step = world.next_step(rank)
    if step is None:
        return
    missing = world.missing_peers(rank)
    with pytest.raises(PeerTimeout) as raised:
        world.advance(rank)
    record = raised.value.record
    what, op = step
    assert record["self_rank"] == rank
    assert record["peer_rank"] == missing[0]  # peers are waited for in rank order
    assert record["phase"] == ("dispatch" if what in ("d", "h") else "combine")
    assert record["half"] == ("send" if what in ("d", "c") else "recv")
    assert record["epoch"] == op + 1
    assert record["seen"] < record["expected"]
    assert record["waited_secs"] >= TIMEOUT_SECS


@pytest.mark.parametrize("num_banks", [2, 3])
def test_steady_dispatch_needs_credit_before_every_reuse_of_a_bank(num_banks: int) -> None:
    """Rank 0 has hooked everything it could, rank 1 nothing: the next send is credit's business."""
    world = make_world("steady", 2, num_banks, seed=1, num_ops=num_banks + 1)
    for _ in range(num_banks):
        world.advance(0)
        world.advance(1)
    world.advance(0)  # hook 1 of rank 0
    assert world.next_step(0) == ("d", num_banks)
    with pytest.raises(PeerTimeout, match="the credit of rank 1 did not come"):
        world.advance(0)


def test_third_combine_needs_credit_where_a_plain_loop_never_waits() -> None:
    """(d h) x 3 c1 c2 hc1 c3: rank 0 is ready to send c3 while rank 1 has not hooked c1."""
    world = make_world("three_combines", 2, 2, seed=1, num_ops=3)
    c3 = world.programs[0].index(("c", 2))
    while world.position[0] < c3:
        world.advance(0 if not world.missing_peers(0) else 1)
    while world.next_step(1) != ("hc", 0):
        world.advance(1)
    with pytest.raises(PeerTimeout, match="combine send 3 on rank 0: the credit of rank 1"):
        world.advance(0)


@pytest.mark.parametrize("num_banks", [2, 3])
def test_without_credit_a_fast_rank_overwrites_and_the_slow_one_notices(num_banks: int) -> None:
    """The seeded bug "no credit": rank 0 is made to believe that all banks are empty."""
    world = make_world("steady", 2, num_banks, seed=1, num_ops=num_banks + 1)
    layout = world.scenario.shape.layout()
    for peer in range(2):
        credit = layout.credit(_native.Phase.DISPATCH, peer)
        word_of(world.ranks[0].buffer, credit).value = 1 << 40
    for _ in range(num_banks):
        world.advance(0)
        world.advance(1)
    world.advance(0)
    world.advance(0)  # rank 1 has not read this bank
    with pytest.raises(ProtocolError, match=rf"by rank 0 .*expected 1, saw {num_banks + 1}"):
        world.advance(1)


def test_the_next_epoch_in_a_bank_of_combine_is_noticed_too() -> None:
    world = make_world("three_combines", 2, 2, seed=1, num_ops=3)
    layout = world.scenario.shape.layout()
    for peer in range(2):
        credit = layout.credit(_native.Phase.COMBINE, peer)
        word_of(world.ranks[0].buffer, credit).value = 1 << 40
    while world.next_step(1) != ("hc", 0):
        world.advance(1 if not world.missing_peers(1) else 0)
    while world.next_step(0) != ("hc", 1):  # past c3, which credit would have held back
        world.advance(0)
    with pytest.raises(ProtocolError, match="combine recv 1 on rank 1: memory written by rank 0"):
        world.advance(1)
