"""No forward has more units than the gate, whatever the engine evicts, and whenever."""

from __future__ import annotations

from dataclasses import dataclass
from random import Random

from hypothesis import given, settings
from hypothesis import strategies as st

from tests.sweep import part
from turbofit.gateway.limits.gate import UNSTATED, Cost, Gate, KvCache

KV = KvCache(tokens=2000 + 640, longest=1024, block=64)
#: What a request of so few tokens reserves: its block, and two more.
LEAST = 3 * 64


def gate(units: int = 13, kv: KvCache = KV) -> Gate:
    return Gate(units, kv)


def taken(door: Gate, units: int, tokens: int = 64) -> Cost:
    cost = Cost(units=units, tokens=tokens)
    assert door.fits(cost)
    door.take(cost)
    return cost


def test_a_reservation_is_whole_blocks_and_no_more_than_the_session() -> None:
    assert KV.reservation(Cost(tokens=64)) == LEAST
    assert KV.reservation(Cost(tokens=65)) == LEAST + 64
    assert KV.reservation(Cost(tokens=UNSTATED)) == 1024 + 2 * 64
    assert KV.reservation(Cost(tokens=64, copies=3)) == 3 * LEAST
    assert KV.reservation(Cost()) == 0


def test_the_next_goes_on_at_the_first_token_where_nothing_can_be_evicted() -> None:
    door = gate()
    first = taken(door, 13)
    assert not door.fits(Cost(units=13, tokens=64))
    assert door.begin(first)
    second = taken(door, 13)
    assert (door.counted, door.reserved) == (13, 2 * LEAST)
    assert door.end(first)
    assert not door.end(second)
    assert (door.counted, door.reserved) == (0, 0)


def test_where_something_can_be_evicted_units_count_to_the_end() -> None:
    door = gate()
    first = taken(door, 7)
    door.begin(first)
    long = taken(door, 0, UNSTATED)
    longer = taken(door, 6, UNSTATED)
    door.begin(longer)
    assert door.counted == 13  # the first's as well: it may be encoded again
    assert not door.fits(Cost(units=1, tokens=64))
    door.end(long)
    assert door.reserved < KV.room
    # It may have been evicted meanwhile, and not have come back yet.
    assert not door.fits(Cost(units=1, tokens=64))
    door.end(first)
    assert door.fits(Cost(units=7, tokens=64))
    assert not door.fits(Cost(units=8, tokens=64))


def test_a_text_that_could_evict_waits_where_more_images_run_than_a_forward_may_have() -> None:
    door = gate()
    for _ in range(2):
        door.begin(taken(door, 13))
    assert not door.fits(Cost(tokens=UNSTATED, copies=2))
    assert door.fits(Cost(tokens=64))


def test_what_holds_nothing_always_fits() -> None:
    door = gate(kv=KvCache())
    taken(door, 13, UNSTATED)
    assert door.fits(Cost())
    assert not door.begin(Cost())


def test_a_request_alone_fits_whatever_it_reserves() -> None:
    assert gate(kv=KvCache()).fits(Cost(units=13, tokens=UNSTATED, copies=100))
    assert not gate().fits(Cost(units=14))


@dataclass(eq=False)
class Sequence:
    """A request at the engine: its true length grows up to what it reserved."""

    cost: Cost
    door: Gate
    most: int
    length: int = 1
    encoded: bool = False
    evicted: bool = False


class Engine:
    """Evicts who has images when its blocks run out, and encodes what is evicted again."""

    def __init__(self, blocks: int, dice: Random) -> None:
        self.blocks, self._dice = blocks, dice
        self.there: list[Sequence] = []
        self.evictions = 0

    def any(self, *, evicted: bool = False) -> Sequence | None:
        sequences = [item for item in self.there if item.evicted is evicted]
        return self._dice.choice(sequences) if sequences else None

    def make_room(self) -> None:
        while sum(-(-item.length // 64) for item in self.there if not item.evicted) > self.blocks:
            running = [item for item in self.there if not item.evicted]
            victim = max(running, key=lambda item: (item.encoded, item.cost.units, -item.length))
            victim.evicted, victim.encoded = True, False
            self.evictions += 1

    @property
    def forward(self) -> int:
        """Units of all that one forward may encode."""
        return sum(item.cost.units for item in self.there if not item.encoded)


def history(dice: Random, *, steps: int = 300) -> tuple[int, int]:
    """Arrivals, first tokens, growth, evictions and ends in any order; how many came, and went.

    The question of the gateway is not simulated, and no room is left for it.
    """
    units, blocks = dice.randrange(13, 20), dice.randrange(4, 90)
    kv = KvCache(tokens=640 + 64 * blocks, longest=1024, block=64)
    engine, door = Engine(blocks, dice), Gate(units, kv)
    came = 0
    for _ in range(steps):
        what = dice.choice(("come", "come", "token", "token", "grow", "grow", "back", "end"))
        sequence = engine.any(evicted=what == "back")
        if what == "come":
            stated = dice.choice((64, 64, 200, 500, UNSTATED))
            cost = Cost(units=dice.choice((0, 5, 9, 13, 13)), tokens=stated)
            if door.fits(cost):
                door.take(cost)
                # Two tokens beyond its end, and a block that it copies.
                most = min(stated, kv.longest) + 2 + 64
                engine.there.append(Sequence(cost, door, most))
                came += 1
        elif sequence is None:
            pass
        elif what == "token":
            sequence.encoded = True
            sequence.door.begin(sequence.cost)
        elif what == "grow":
            sequence.length = sequence.most
        elif what == "back":
            sequence.evicted = False
        else:
            engine.there.remove(sequence)
            sequence.door.end(sequence.cost)
        engine.make_room()
        assert engine.forward <= units
    for sequence in engine.there:
        sequence.door.end(sequence.cost)
    assert (door.counted, door.reserved) == (0, 0)
    return came, engine.evictions


@settings(max_examples=part(300, 3))
@given(st.integers(0, 1 << 32))
def test_no_forward_has_more_units_than_the_gate(seed: int) -> None:
    history(Random(seed))


def test_the_histories_hold_evictions() -> None:
    came, evictions = zip(*(history(Random(seed)) for seed in range(20)), strict=True)
    assert sum(came) > 500
    assert sum(evictions) > 100


def test_a_line_before_the_gate_comes_to_its_end() -> None:
    """Nobody starves: whoever is first in line fits once those before it have ended."""
    door, waiting = gate(), [Cost(units=13 - n, tokens=UNSTATED) for n in range(9)]
    there: list[Cost] = []
    while waiting or there:
        while waiting and door.fits(waiting[0]):
            door.take(waiting[0])
            there.append(waiting.pop(0))
        assert there
        door.end(there.pop(0))
    assert door.reserved == 0
