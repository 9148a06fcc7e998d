"""How far a calibration has come, on disk after every step; of one plan and one set of options."""

from __future__ import annotations

import hashlib
import json
from contextlib import suppress
from typing import TYPE_CHECKING, Any, Final

import msgspec
from msgspec.structs import replace

from turbofit.core.errors import TurbofitError, UsageError
from turbofit.core.plan import Plan
from turbofit.core.process.files import write_atomic
from turbofit.core.process.state import state_dir
from turbofit.core.struct import to_builtins
from turbofit.core.units import MIB
from turbofit.observe.calibration import STEADY, Observation

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from turbofit.core.json_types import Options

__all__ = ["Progress"]

_SCHEMA: Final = "turbofit.calibrating/1"
#: What reading a damaged file raises.
_UNREADABLE: Final = (
    OSError, ValueError, LookupError, TypeError, AttributeError, ArithmeticError, RecursionError,
    TurbofitError,
)  # fmt: skip
#: Bytes that others may hold more or less for readings of two starts to belong together.
_MOVED: Final = 16 * MIB


class Progress:
    """What was read so far for a model as it was asked for, on pretend GPUs apart.

    ``options`` are the planner's keywords, and what else a run's result depends on.
    """

    def __init__(self, model: str, options: Options, *, pretend: bool) -> None:
        key = json.dumps([model, sorted((k, str(v)) for k, v in options.items()), pretend])
        self._name = f"{hashlib.sha256(key.encode()).hexdigest()[:24]}.json"
        self._pretend = pretend
        self.plan: Plan | None = None
        self.texts: dict[int, int] = {}
        self._seen: dict[int, Observation] = {}
        self._finished: set[int] = set()
        with suppress(*_UNREADABLE):
            self._read(json.loads(self._path(make=False).read_bytes()))

    @property
    def seen(self) -> tuple[Observation, ...]:
        """By group."""
        return tuple(self._seen[group] for group in sorted(self._seen))

    @property
    def complete(self) -> bool:
        """Whether every group of the plan has shown everything, and has started in this process.

        An earlier process may have read while others had given memory back that they hold again
        now, so that one start in this process is needed.
        """
        return self.plan is not None and len(self._finished) == len(self.plan.parallel.groups)

    def begin(self, plan: Plan, before: Mapping[int, int]) -> None:
        """A plan is launched; what was read of another one no longer counts.

        What was read while others held another amount does not count either: the cache had another
        size.
        """
        cards = [card for one in self._seen.values() for card in one.cards]
        moved = any(
            card.index not in before or abs(card.before - before[card.index]) > _MOVED
            for card in cards
        )
        if self.plan is None or _kind(plan) != _kind(self.plan) or moved:
            self._seen, self._finished, self.texts = {}, set(), {}
            self.plan = plan
        self._write()

    def has(self, group: int, name: str) -> bool:
        """Whether a step was read before."""
        one = self._seen.get(group)
        return one is not None and all(name in card.used for card in one.cards)

    def add(self, more: Observation) -> None:
        """Keep a reading, and those of an earlier start where both found and took the same.

        Others may have given memory back while that was measured, and taken as much again since.
        Under: they did so after its first reading.
        """
        one = self._seen.get(more.group)
        if one is not None and _differs(one, more):
            one = None
            self._finished.discard(more.group)
            self.texts.pop(more.group, None)
        self._seen[more.group] = more if one is None else joined(one, more)
        self._write()

    def finish(self, group: int) -> None:
        """All of a group's steps were read, now or before this process."""
        self._finished.add(group)

    def forget(self) -> bool:
        """Drop it; whether there was anything."""
        try:
            self._path(make=False).unlink()
        except OSError:
            return False
        return True

    def _read(self, body: Mapping[str, Any]) -> None:
        if body["schema"] != _SCHEMA:
            return
        seen = msgspec.convert(body["seen"], tuple[Observation, ...])
        plan = Plan.from_json(json.dumps(body["plan"]))
        self.texts = {int(group): int(count) for group, count in body["texts"].items()}
        self._seen, self.plan = {one.group: one for one in seen}, plan

    def _write(self) -> None:
        """A folder that cannot be written costs the progress, never the run."""
        body = {
            "schema": _SCHEMA, "plan": to_builtins(self.plan), "seen": to_builtins(self.seen),
            "texts": self.texts,
        }  # fmt: skip
        with suppress(OSError, UsageError):
            write_atomic(self._path(), json.dumps(body) + "\n", mode=0o600)

    def _path(self, *, make: bool = True) -> Path:
        room = "calibrating-pretend" if self._pretend else "calibrating"
        return state_dir(room, make=make) / self._name


def joined(one: Observation, more: Observation) -> Observation:
    """Two readings of one group; the later one is counted with what others held at the first."""
    cards = []
    for card in one.cards:
        other = next((c for c in more.cards if c.index == card.index), None)
        moved = 0 if other is None else card.before - other.before
        new = {} if other is None else {name: v + moved for name, v in other.used.items()}
        cards.append(replace(card, used={**card.used, **new}))
    free, region = one.free, one.region
    if free is None and more.free is not None:
        free, region = more.free, more.region
    return replace(one, cards=tuple(cards), free=free, region=region)


def _differs(one: Observation, more: Observation) -> bool:
    """Whether two starts of one group found, or took, different amounts before any request."""
    if one.free is not None and more.free is not None and abs(one.free - more.free) > 2 * _MOVED:
        return True
    taken = {
        card.index: card.used[STEADY] - card.before for card in one.cards if STEADY in card.used
    }
    return any(
        abs(card.used[STEADY] - card.before - taken[card.index]) > _MOVED
        for card in more.cards
        if STEADY in card.used and card.index in taken
    )


def _kind(plan: Plan) -> tuple[Any, ...]:
    """What must be the same for readings to belong together."""
    settings = [one.settings for one in plan.by_group] or plan.settings
    return (plan.engine, settings, plan.limits, plan.parallel.groups, plan.model.parameters)
