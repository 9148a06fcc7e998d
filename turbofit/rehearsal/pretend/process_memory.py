"""Computes from a timeline how much memory a process holds on each card, by phase.

A phase begins at a mark of the process. A rehearsal of TurboMind marks import, context, weights,
prepare, engine, ready, ``case ...`` and ``after ...``. Within ``engine`` each card has three phases
of its own. ``cache`` begins when the engine reads free memory. ``buffers`` begins after the cache
is allocated. ``warm-up`` begins with the first allocation of the executor's pool.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from functools import cache
from typing import NamedTuple

from turbofit.core.struct import Document
from turbofit.rehearsal.pretend.elf import PLUMBING
from turbofit.rehearsal.pretend.usage import BEFORE, KINDS, PINNED, POOL, Event

LOADER = "LMDeploy's weight loader"
STAGING = "torch staging"

_LINEAR = "LlamaLinear"
#: The owner of a pool, by the beginning of a function's name in the trace that made the pool. The
#: first line that fits a name counts.
_OWNERS = {"ModelExecutor": "executor", "Engine": "engine thread", "TurboMind": "rank context"}


class CallSites:
    """Finds the name of the engine's call in a stack trace.

    A trace lists offsets of functions, innermost first. ``name`` returns the name of the function
    at an offset, or ``?``.
    """

    def __init__(self, name: Callable[[int], str]) -> None:
        self._name = cache(name)
        self.site = cache(self._site)

    def _site(self, trace: tuple[int, ...]) -> str:
        """Return the name of the innermost engine function in a stack trace.

        If a linear layer allocates its output, the name is of the function that called the layer.
        """
        if not trace:
            return STAGING
        useful = [n for n in map(self._name, trace) if not n.startswith(PLUMBING)]
        if not useful:
            return LOADER
        owner = next((n for n in useful if not n.startswith(_LINEAR)), useful[0])
        return f"linear output in {owner}" if useful[0].startswith(_LINEAR) else useful[0]

    def owner(self, trace: tuple[int, ...]) -> str:
        """Return the owner of a pool; ``trace`` is the stack trace of the call that made the pool.

        The owner is ``executor``, ``engine thread``, ``rank context``, or the name of a call.
        """
        names = [self._name(offset) for offset in trace]
        for prefix, owner in _OWNERS.items():
            if any(name.startswith(prefix) for name in names):
                return owner
        return self.site(trace)


@dataclass
class Pool:
    """A stream-ordered memory pool of a card.

    The engine uses ``live`` bytes of the ``held`` bytes that the pool has taken of the card.
    ``live_peak`` has the most live bytes of each phase; ``live_end`` and ``held_end`` have the
    bytes at the end of each phase.
    """

    device: int
    owner: str
    live: int = 0
    held: int = 0
    live_peak: dict[str, int] = field(default_factory=dict)
    live_end: dict[str, int] = field(default_factory=dict)
    held_end: dict[str, int] = field(default_factory=dict)


@dataclass
class CardMemory:
    """The memory of one card, in bytes; ``end`` and ``peak`` are by phase.

    ``context`` is the process's CUDA context, which no other figure includes. ``late`` has the
    memory that was allocated after the cache and not freed, by kind and by call. ``pinned`` is
    page-locked host memory that was allocated while the card was current. ``pinned_peak`` is by
    card, since the peak of the whole process depends on the timing of the ranks' threads.
    """

    in_use: int = 0
    context: int = 0
    phase: str = BEFORE
    end: dict[str, int] = field(default_factory=dict)
    peak: dict[str, int] = field(default_factory=dict)
    late: dict[str, int] = field(default_factory=dict)
    pinned: int = 0
    pinned_peak: dict[str, int] = field(default_factory=dict)
    free_at_cache: int | None = None
    cache_region: int | None = None
    cache_address: int = 0

    def span(self, phase: str, order: Sequence[str]) -> tuple[int, int]:
        """Return the bytes that the process holds in a phase: the most, and those at its end.

        ``order`` is the order of the phases. The bytes include the CUDA context. Allocations before
        the process's first mark count in its first phase. A phase that the process did not mark has
        the bytes from the end of the earlier phase.
        """
        first = next((name for name in self.peak if name != BEFORE), phase)
        if BEFORE in self.peak and phase == first:
            most = max(self.peak[BEFORE], self.peak.get(phase, 0))
            return self.context + most, self.context + self.end.get(phase, self.end[BEFORE])
        if phase in self.peak:
            return self.context + self.peak[phase], self.context + self.end[phase]
        earlier = order[: order.index(phase)] if phase in order else ()
        end = next((self.end[name] for name in reversed(earlier) if name in self.end), 0)
        return self.context + end, self.context + end


class _Block(NamedTuple):
    """An allocation that is not freed; ``late`` has its names in `CardMemory.late`, if any."""

    device: int
    kind: int
    pool: int
    size: int
    late: tuple[str, ...]


class ProcessMemory:
    """The memory that one process holds on each card, computed from the events of its timeline.

    A pool grows by ``pool_step`` bytes at a time. ``sites`` names the calls of TurboMind; it is
    None for another program. ``deaths`` has the fields of an `End` for each refused allocation.
    ``complete`` is False if the timeline ended before the process.
    """

    def __init__(self, cards: int, sites: CallSites | None, pool_step: int) -> None:
        self.pid = self.parent = 0
        self.command = ""
        self.complete = True
        self.cards = [CardMemory() for _ in range(cards)]
        self.pools: dict[int, Pool] = {}
        self.phases = [BEFORE]
        self.deaths: list[Document] = []
        self._sites = sites
        self.pool_step = pool_step
        self._blocks: dict[str, _Block] = {}

    def read(self, events: Iterable[Event]) -> ProcessMemory:
        """Read the next events, and close the current phase; return this object."""
        for event in events:
            self._count(event)
        for index in range(len(self.cards)):
            self._end_phase(index)
        return self

    def _count(self, event: Event) -> None:
        """Count one event of the timeline."""
        number = event.number
        match event.tag:
            case "I":
                self.pid, self.parent = number(0), number(1)
            case "N":
                self.command = event.fields[0]
            case "K":
                self.cards[number(0)].context = number(1)
            case "S" if self.deaths and self.deaths[-1]["where"] is None:
                self.deaths[-1]["where"] = event.fields[0]
            case "P":
                self.phases.append(event.fields[0])
                for index in range(len(self.cards)):
                    self._begin_phase(index, event.fields[0])
            case "C":
                owner = self._sites.owner(event.trace) if self._sites else "default"
                self.pools[number(1)] = Pool(number(0), owner)
            case "A":
                self._allocated(event)
            case "F" if event.fields[0] in self._blocks:
                self._freed(self._blocks.pop(event.fields[0]), number(1))
            case "R":
                self._pool(number(0), number(1)).held = number(2)
                self._hold(number(0), number(3))
            case "G" if self._sites and self.phases[-1] == "engine":
                if self.cards[number(0)].free_at_cache is None:
                    self.cards[number(0)].free_at_cache = number(1)
                    self._begin_phase(number(0), "cache")
            case "O" | "E":
                phase = self.cards[number(0)].phase
                self.deaths.append(refused(event, phase, self._sites))

    def executor_pool(self, index: int) -> Pool | None:
        """Return the pool of a card's activations; None if the engine has not made the pool yet."""
        return next((pool for pool in self.of_card(index) if pool.owner == "executor"), None)

    def of_card(self, index: int) -> list[Pool]:
        """Return a card's pools, in the order of their creation."""
        return [pool for pool in self.pools.values() if pool.device == index]

    def pinned(self) -> dict[str, int]:
        """Return the bytes of page-locked host memory by phase: the sum of the ranks' peaks."""
        total = Counter[str]()
        for card in self.cards:
            total.update(card.pinned_peak)
        return total

    def _end_phase(self, index: int) -> None:
        """Note the bytes that a card and its pools hold at the end of the card's phase."""
        card = self.cards[index]
        if card.phase == BEFORE and not card.peak:
            return
        card.end[card.phase] = card.in_use
        for pool in self.of_card(index):
            pool.live_end[card.phase] = pool.live
            pool.held_end[card.phase] = pool.held

    def _begin_phase(self, index: int, phase: str) -> None:
        """End the phase of a card, and begin the next one."""
        self._end_phase(index)
        card = self.cards[index]
        card.phase = phase
        card.peak[phase] = card.in_use
        card.pinned_peak[phase] = card.pinned
        for pool in self.of_card(index):
            pool.live_peak[phase] = pool.live

    def _pool(self, device: int, number: int) -> Pool:
        """Return a pool by its number; a pool that no event made is a card's default pool."""
        return self.pools.setdefault(number, Pool(device, "default"))

    def _hold(self, device: int, value: int) -> None:
        """Note that a card has ``value`` bytes in use."""
        card = self.cards[device]
        card.in_use = value
        card.peak[card.phase] = max(card.peak.get(card.phase, 0), value)

    def _allocated(self, event: Event) -> None:
        """Count an allocation; an allocation of TurboMind may end the card's phase."""
        device, kind, number, size, in_use = (event.number(i) for i in range(5))
        card, address = self.cards[device], event.fields[5]
        if kind == PINNED:
            card.pinned += size
            card.pinned_peak[card.phase] = max(card.pinned_peak.get(card.phase, 0), card.pinned)
            self._blocks[address] = _Block(device, kind, number, size, ())
            return
        if kind == POOL:
            pool = self._pool(device, number)
            if card.phase == "buffers" and pool.owner == "executor":
                self._begin_phase(device, "warm-up")
            pool.live += size
            pool.held = max(pool.held, -(-pool.live // self.pool_step) * self.pool_step)
            pool.live_peak[card.phase] = max(pool.live_peak.get(card.phase, 0), pool.live)
        self._hold(device, in_use)
        late: tuple[str, ...] = ()
        if self._sites and card.phase in ("buffers", "warm-up"):
            late = KINDS[kind], self._sites.site(event.trace)
        for name in late:
            card.late[name] = card.late.get(name, 0) + size
        self._blocks[address] = _Block(device, kind, number, size, late)
        if self._sites and card.phase == "cache":
            card.cache_region, card.cache_address = size, int(address, 16)
            self._begin_phase(device, "buffers")

    def _freed(self, block: _Block, in_use: int) -> None:
        """Count a block that was freed; the card then has ``in_use`` bytes in use."""
        card = self.cards[block.device]
        if block.kind == PINNED:
            card.pinned -= block.size
            return
        for name in block.late:
            card.late[name] -= block.size
        self._hold(block.device, in_use)
        if block.pool in self.pools:
            self.pools[block.pool].live -= block.size


def refused(event: Event, phase: str, sites: CallSites | None) -> Document:
    """Return the fields of an `End` for a refused allocation, and its ``memory_kind``.

    ``simulated`` is the number of an allocation that the scenario made fail, else None.
    """
    device, kind, _, size, left, last_field = (event.number(i) for i in range(6))
    simulated = last_field if event.tag == "E" else None
    return {
        "gpu": device,
        "phase": phase,
        "memory_kind": KINDS[kind],
        "where": sites.site(event.trace) if sites else None,
        "asked": size,
        "left": left,
        "missing": None if event.tag == "E" else last_field - left,
        "simulated": simulated,
    }
