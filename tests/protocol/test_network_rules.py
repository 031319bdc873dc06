"""The rules of csrc/protocol/README.md, "Over a network", on a network that keeps only the promise
they ask for: a put's payload is there before the 1 that it adds. All else arrives in any order, and
a card reads what it puts as late as it likes. Every rule is needed: without it a run goes wrong.

A model of one phase; the kernels themselves run in tests/nvshmem.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field

import pytest

NUM_RANKS, NUM_BANKS, NUM_OPS, MAX_MESSAGES = 3, 2, 7, 3
RULES = ("count arrivals", "a count for each bank", "credits add", "outbox waits for credit")


class Wrong(AssertionError):
    """A rank has taken what was not there, or nobody can go on."""


Action = Callable[[], None]


@dataclass
class Memory:
    """Of one rank: what peers write, and its outbox."""

    inbox: dict = field(default_factory=dict)  # [bank, src, slot]: epoch
    signals: dict = field(default_factory=dict)  # [bank, src]: (epoch, count)
    arrivals: Counter = field(default_factory=Counter)  # [bank, src]
    credits: Counter = field(default_factory=Counter)  # [peer]
    outbox: dict = field(default_factory=dict)  # [bank, dst, slot]: epoch


class Network:
    """What is on its way: lists of actions, each after the one before."""

    def __init__(self, rng: random.Random) -> None:
        self._rng = rng
        self._flights: list[list[Action]] = []

    def send(self, *actions: Action) -> None:
        self._flights.append(list(actions))

    def deliver(self) -> bool:
        if not self._flights:
            return False
        i = self._rng.randrange(len(self._flights))
        self._flights[i].pop(0)()
        if not self._flights[i]:
            self._flights.pop(i)
        return True


class Rank:
    def __init__(self, rank: int, memories: list[Memory], network: Network, rules: set[str]):
        self.rank, self.memories, self.network, self.rules = rank, memories, network, rules
        self.memory = memories[rank]
        self.peers = [r for r in range(NUM_RANKS) if r != rank]
        self.num_sent = self.num_hooked = 0
        self.seen: Counter = Counter()

    def arrivals_of(self, bank: int, src: int) -> tuple[int, int]:
        return (bank if "a count for each bank" in self.rules else 0), src

    def try_send(self, rng: random.Random) -> bool:
        epoch = self.num_sent + 1
        if epoch > NUM_OPS or self.num_sent - self.num_hooked >= NUM_BANKS:
            return False
        has_credit = all(self.memory.credits[p] + NUM_BANKS >= epoch for p in self.peers)
        if "outbox waits for credit" in self.rules and not has_credit:
            return False
        self.num_sent = epoch
        for peer in self.peers:
            self.put_all(peer, epoch, rng.randrange(MAX_MESSAGES + 1))
        return True

    def put_all(self, peer: int, epoch: int, count: int) -> None:
        bank, theirs = epoch % NUM_BANKS, self.memories[peer]
        for slot in range(count + 1):  # the last one is the counts
            self.memory.outbox[bank, peer, slot] = epoch

            def write(slot: int = slot) -> None:
                theirs.inbox[bank, self.rank, slot] = self.memory.outbox[bank, peer, slot]

            def add() -> None:
                theirs.arrivals[self.arrivals_of(bank, self.rank)] += 1

            self.network.send(write, add)

        def signal() -> None:
            theirs.signals[bank, self.rank] = (epoch, count)

        self.network.send(signal)

    def try_hook(self) -> bool:
        epoch = self.num_hooked + 1
        if epoch > self.num_sent:
            return False
        bank = epoch % NUM_BANKS
        for src in self.peers:
            signalled, count = self.memory.signals.get((bank, src), (0, 0))
            if signalled > epoch:
                raise Wrong(f"rank {self.rank}: a newer signal of {src}")
            if signalled < epoch:
                return False
            at = self.arrivals_of(bank, src)
            num_arrived = self.memory.arrivals[at] - self.seen[at]
            if "count arrivals" in self.rules and num_arrived < count + 1:
                return False
        for src in self.peers:
            _, count = self.memory.signals[bank, src]
            for slot in range(count + 1):
                found = self.memory.inbox.get((bank, src, slot), 0)
                if found != epoch:
                    raise Wrong(f"rank {self.rank}: {found} where {epoch} of {src} should be")
            at = self.arrivals_of(bank, src)
            self.seen[at] = self.memory.arrivals[at]
        self.num_hooked = epoch
        for peer in self.peers:
            self.network.send(lambda peer=peer, epoch=epoch: self.give_credit(peer, epoch))
        return True

    def give_credit(self, peer: int, epoch: int) -> None:
        credits = self.memories[peer].credits
        credits[self.rank] = credits[self.rank] + 1 if "credits add" in self.rules else epoch

    @property
    def is_done(self) -> bool:
        return self.num_hooked == NUM_OPS


def run(seed: int, rules: set[str]) -> None:
    rng = random.Random(seed)
    memories = [Memory() for _ in range(NUM_RANKS)]
    network = Network(rng)
    ranks = [Rank(r, memories, network, rules) for r in range(NUM_RANKS)]
    haste = rng.random()  # of the ranks; the network is as fast as it is slow
    while not all(rank.is_done for rank in ranks):
        rank = rng.choice(ranks)
        steps: list[Callable[[], bool]] = [lambda rank=rank: rank.try_send(rng), rank.try_hook]
        rng.shuffle(steps)
        if rng.random() < haste and any(step() for step in steps):
            continue
        if network.deliver():
            continue
        if not any(rank.try_hook() or rank.try_send(rng) for rank in ranks):
            raise Wrong("nothing is on its way, and every rank waits")


def run_many(rules: set[str]) -> None:
    for seed in range(3000):
        run(seed, rules)


def test_the_rules_are_enough() -> None:
    run_many(set(RULES))


@pytest.mark.parametrize("rule", RULES)
def test_every_rule_is_needed(rule: str) -> None:
    with pytest.raises(Wrong):
        run_many(set(RULES) - {rule})
