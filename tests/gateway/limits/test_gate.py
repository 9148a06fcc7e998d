"""No forward of an engine has more units than its gate, whatever the engine evicts."""

from __future__ import annotations

from dataclasses import dataclass
from random import Random

from msgspec.structs import replace

from tests.sweep import part
from turbofit.gateway.limits.gate import UNSTATED, Cost, Gate, KvCache, Share

KV = KvCache(tokens=2000 + 640, longest=1024, block=64, ahead=2)


def gate(units: int = 13, kv: KvCache = KV) -> Gate:
    return Gate(units, kv)


def taken(door: Gate, units: int, tokens: int) -> Share:
    cost = Cost(units=units, tokens=tokens)
    assert door.fits(cost)
    return door.take(cost)


def test_a_reservation_is_whole_blocks_and_no_more_than_the_session() -> None:
    least = 3 * 64  # what a request of so few tokens reserves: its block, and two more
    for cost, reserved in (
        (Cost(tokens=64), least), (Cost(tokens=65), least + 64), (Cost(), 0),
        (Cost(tokens=UNSTATED), 1024 + 2 * 64), (Cost(tokens=64, copies=3), 3 * least),
    ):  # fmt: skip
        assert KV.reservation(cost) == reserved


def test_what_is_alone_or_holds_nothing_always_fits() -> None:
    door = gate(kv=KvCache())
    assert door.fits(Cost(units=13, tokens=UNSTATED, copies=100))
    assert not door.fits(Cost(units=14))
    taken(door, 13, UNSTATED)
    assert door.fits(Cost())


def test_a_cache_that_is_full_to_the_last_block_puts_nothing_in_doubt() -> None:
    """Beyond it the engine may evict, and units count until the end."""
    small, room = Cost(units=5, tokens=64), 2 * KV.reservation(Cost(tokens=64))
    for tokens, fits in ((room, True), (room - 64, False)):
        door = gate(10, replace(KV, tokens=KV.tokens - KV.room + tokens))
        assert door.kv.room == tokens
        first = taken(door, 5, 64)
        door.begin(first)
        door.begin(door.take(small))
        assert door.counted == (0 if fits else 10)
        assert door.fits(Cost(units=10)) is fits


@dataclass(eq=False)
class Sequence:
    """A request at the engine: its true length grows up to what it reserved."""

    share: Share
    most: int
    prompt: int
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
            victim = max(
                running, key=lambda item: (item.encoded, item.share.cost.units, -item.length)
            )
            victim.evicted, victim.encoded = True, False
            self.evictions += 1

    @property
    def forward(self) -> int:
        """Units of all that one forward may encode."""
        return sum(item.share.cost.units for item in self.there if not item.encoded)


def history(dice: Random, *, steps: int = 300) -> tuple[int, int]:
    """Arrivals, first tokens, growth, evictions and ends in any order; how many came, and went.

    The question of the gateway is not simulated, and no room is left for it.
    """
    units, blocks = dice.randrange(13, 20), dice.randrange(4, 90)
    kv = KvCache(tokens=640 + 64 * blocks, longest=1024, block=64, ahead=2)
    engine, door = Engine(blocks, dice), Gate(units, kv)
    came = 0
    for _ in range(steps):
        what = dice.choice(("come", "come", "token", "token", "grow", "grow", "back", "end"))
        sequence = engine.any(evicted=what == "back")
        if what == "come":
            stated = dice.choice((64, 64, 200, 500, UNSTATED))
            answer = 0 if stated == UNSTATED else dice.randrange(64)
            cost = Cost(units=dice.choice((0, 5, 9, 13, 13)), tokens=stated, answer=answer)
            if door.fits(cost):
                # Its prompt may have fewer tokens than bytes; two tokens beyond its end, and a
                # block that it copies.
                prompt = 0 if stated == UNSTATED else dice.randrange(stated - answer)
                most = (prompt + answer if prompt else min(stated, kv.longest)) + 2 + 64
                engine.there.append(Sequence(door.take(cost), most, prompt))
                came += 1
        elif sequence is None:
            pass
        elif what == "token":
            sequence.encoded = True
            door.begin(sequence.share, sequence.prompt)
        elif what == "grow":
            sequence.length = sequence.most
        elif what == "back":
            sequence.evicted = False
        else:
            engine.there.remove(sequence)
            door.end(sequence.share)
        engine.make_room()
        assert engine.forward <= units
    for sequence in engine.there:
        door.end(sequence.share)
    assert (door.counted, door.reserved) == (0, 0)
    return came, engine.evictions


def test_no_forward_has_more_units_than_the_gate() -> None:
    histories = [history(Random(seed)) for seed in range(part(300, 5))]
    came, evictions = zip(*histories, strict=True)
    assert sum(came) > 25 * len(histories)
    assert sum(evictions) > 5 * len(histories)


def test_a_line_before_the_gate_comes_to_its_end() -> None:
    """Nobody starves: whoever is first in line fits once those before it have ended."""
    door, waiting = gate(), [Cost(units=13 - n, tokens=UNSTATED) for n in range(9)]
    there: list[Share] = []
    while waiting or there:
        while waiting and door.fits(waiting[0]):
            there.append(door.take(waiting.pop(0)))
        assert there
        door.end(there.pop(0))
    assert door.reserved == 0


def test_the_prompt_s_true_tokens_take_the_place_of_its_bytes() -> None:
    door = gate(kv=KvCache(tokens=2000 + 640, longest=1024, block=64))
    shares = [door.take(Cost(units=5, tokens=900, answer=100)) for _ in range(2)]
    another = Cost(units=4, tokens=900)
    door.begin(shares[0])
    assert (door.reserved, door.lacks(another)) == (2 * 960, "room in the KV cache")
    for share in shares:
        door.begin(share, prompt=300)
    assert (door.reserved, door.lacks(another)) == (2 * 448, "")
    for share in shares:
        door.end(share)
    assert (door.reserved, door.counted) == (0, 0)
