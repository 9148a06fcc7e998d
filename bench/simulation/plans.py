"""Plans that were found, and are found again: in this process, and in a file for all workers."""

from __future__ import annotations

import io
import itertools
import pickle
import sqlite3
from pathlib import Path
from typing import Any

import msgspec

from bench.simulation.modules import world
from turbofit.core.errors import TurbofitError
from turbofit.observe.calibrations import with_calibrations

__all__ = ["make_store", "remembered", "share"]

#: Plans and errors that were found, by what was asked; the oldest go.
_PLANS: dict[bytes, Any] = {}
_MOST_PLANS = 20_000
#: One remembered plan in so many is searched for again, and must be equal.
_SEARCHED_AGAIN = 200
_CALLS = itertools.count(1)
#: Where all workers of a run keep theirs.
_SHARED: list[sqlite3.Connection] = []


def make_store(path: Path) -> None:
    """Make the file that `share` opens: of two that set its journal's mode at once one fails."""
    made = sqlite3.connect(path, isolation_level=None)
    made.execute("pragma journal_mode = wal")
    made.execute("create table plans (question primary key, found)")
    made.close()


def share(path: Path) -> None:
    """Keep what is found in a file too, and look there for what this process has not found."""
    shared = sqlite3.connect(path, timeout=60, isolation_level=None)
    shared.execute("pragma synchronous = off")
    _SHARED[:] = [shared]


def remembered(real: Any) -> Any:
    """Planning is pure: equal questions have equal answers, over all worlds of a run.

    Args:
        real: `planner.best_plan`.
    """

    def best_plan(request: Any) -> Any:
        if world().calibrates:
            request = request.changed(on=with_calibrations(request.on, pretend=False))
        key = _question(request)
        plan = _PLANS.get(key) or _shared(key)
        if plan is None:
            plan = _found(real, request)
            for shared in _SHARED:
                shared.execute("insert or ignore into plans values (?, ?)", (key, _packed(plan)))
        elif not isinstance(plan, TurbofitError):
            plan = _with_holders(plan, request.on)
        if key not in _PLANS:
            if len(_PLANS) >= _MOST_PLANS:
                del _PLANS[next(iter(_PLANS))]
            _PLANS[key] = plan
        if next(_CALLS) % _SEARCHED_AGAIN == 0:
            _check_equal(plan, _found(real, request))
        if isinstance(plan, TurbofitError):
            raise plan.with_traceback(None)
        world().planned(plan)
        return plan

    return best_plan


def _question(request: Any) -> bytes:
    """What a plan depends on: all that is asked, and the machine without names of processes."""
    gpus = tuple(msgspec.structs.replace(one, holders=()) for one in request.on.gpus)
    bare = msgspec.structs.replace(request.on, gpus=gpus)
    asked = {name: one for name, one in request.given().items() if name != "on"}
    return msgspec.json.encode([bare, asked], enc_hook=str)


def _found(real: Any, request: Any) -> Any:
    try:
        return real(request)
    except TurbofitError as exc:
        return exc


def _with_holders(plan: Any, machine: Any) -> Any:
    """A remembered plan for a machine that is equal but for who holds its memory."""
    holders = {one.uuid: one.holders for one in machine.gpus}
    gpus = tuple(
        msgspec.structs.replace(one, holders=holders[one.uuid]) for one in plan.machine.gpus
    )
    return msgspec.structs.replace(plan, machine=msgspec.structs.replace(plan.machine, gpus=gpus))


def _check_equal(remembered: Any, fresh: Any) -> None:
    """A violation where a search finds now what it did not find before."""
    one, two = (
        repr(found) if isinstance(found, TurbofitError)
        else msgspec.structs.replace(found, created="").to_json()
        for found in (remembered, fresh)
    )  # fmt: skip
    if one != two:
        world().violate("a remembered plan is not what a search finds")


def _shared(key: bytes) -> Any:
    """What another worker found, None where none did."""
    for shared in _SHARED:
        for (packed,) in shared.execute("select found from plans where question = ?", (key,)):
            return pickle.loads(packed)
    return None


class _Pickler(pickle.Pickler):
    """Takes errors whose constructors take more than `Exception` keeps."""

    def reducer_override(self, found: Any) -> Any:
        if isinstance(found, TurbofitError):
            return _error, (type(found), found.args, vars(found))
        return NotImplemented


def _error(kind: type[TurbofitError], args: tuple[Any, ...], facts: dict[str, Any]) -> Any:
    error = kind.__new__(kind, *args)
    vars(error).update(facts)
    return error


def _packed(found: Any) -> bytes:
    file = io.BytesIO()
    _Pickler(file, pickle.HIGHEST_PROTOCOL).dump(found)
    return file.getvalue()
