"""Plans that are rehearsed before they are believed."""

from __future__ import annotations

import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import pytest

from tests.support.plans import plausible_plan
from turbofit.core.errors import PackageError
from turbofit.core.plan import Plan, Rehearsal
from turbofit.core.rehearsal import End, RehearsedCache
from turbofit.launch.serve.leases import Leases
from turbofit.launch.serve.planner import Planner
from turbofit.machine import source
from turbofit.planning.request import PlanRequest
from turbofit.rehearse import confirm

REQUEST = PlanRequest(model="internvl2-1b", on="1xrtx3060")
CACHE = RehearsedCache(free=(), region=(), object_size=None, slab_size=None, tokens=None)


def rehearsed(outcome: Any, *, fits: bool) -> Plan:
    death = End(phase="warm-up", where="somewhere", asked=2, left=1)
    rehearsal = Rehearsal(
        outcome=outcome, seconds=1.0, engine_version="0.18.0", cases=(), cache=CACHE, death=death
    )
    return msgspec.structs.replace(plausible_plan(), fits=fits, rehearsal=rehearsal)


@pytest.fixture
def planner(monkeypatch: pytest.MonkeyPatch) -> Callable[[list[str], Plan | Exception], Planner]:
    """A planner whose rehearsals are given."""

    def with_rehearsal(said: list[str], seen: Plan | Exception) -> Planner:
        def given(_request: PlanRequest, _plan: Plan) -> Plan:
            if isinstance(seen, Exception):
                raise seen
            return seen

        monkeypatch.setattr(confirm, "rehearsed", given)
        return Planner(REQUEST, None, said.append, rehearse=True)

    return with_rehearsal


def test_what_a_rehearsal_shows_counts(planner: Any) -> None:
    said: list[str] = []
    served = rehearsed("served", fits=True)
    assert planner(said, served).make({}) is served
    dead = rehearsed("out_of_memory", fits=False)
    assert planner(said, dead).make({}) is dead
    assert all(text.startswith("rehearsing") for text in said)


@pytest.mark.parametrize(
    "seen", [rehearsed("failed", fits=False), PackageError("no compiler", hint="install one")]
)
def test_a_rehearsal_that_cannot_be_held_costs_nothing_but_itself(
    planner: Any, seen: Plan | Exception
) -> None:
    said: list[str] = []
    assert planner(said, seen).make({}).fits
    assert said[-1].startswith("not rehearsed: ")


def test_pretend_plans_are_neither_measured_nor_reserved() -> None:
    one = Planner(REQUEST, None, print, rehearse=False)
    plan = one.make({"max_prefill_token_num": 2048})
    assert plan.settings.max_prefill_token_num == 2048
    one.take(plan)


@pytest.mark.parametrize("look", ["make", "take"])
def test_engines_of_a_dead_turbofit_are_ended_before_the_machine_is_measured(
    look: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One that still loads takes more than it holds: `calibrate` planned with that memory."""
    machine = msgspec.structs.replace(source.machine_from("1xrtx3060"), source="nvml")
    plan = Planner(REQUEST.changed(on=machine), None, print, rehearse=False).make({})
    orphan = subprocess.Popen(
        [sys.executable, "-c", "input()"], stdin=subprocess.PIPE, start_new_session=True
    )
    try:
        with Leases(tmp_path) as dead:
            dead.reserve(plan)
            dead.note(model="InternVL2-2B", engines=[orphan.pid], ready=False)
            shutil.copy(next(tmp_path.glob("*.json")), tmp_path / "left.json")
        seen: list[int | None] = []
        said: list[str] = []

        def measure(*_: object, **__: object) -> Any:
            seen.append(orphan.poll())
            return machine

        monkeypatch.setattr(source, "machine_from", measure)
        with Leases(tmp_path) as leases:
            planner = Planner(REQUEST.changed(on=None), leases, said.append, rehearse=False)
            if look == "make":
                assert planner.make({}).fits
            else:
                planner.take(plan)
        assert seen == [-9]
        assert len(said) == 1
        assert "an engine for InternVL2-2B had left behind" in said[0]
    finally:
        orphan.kill()
        orphan.wait()
        assert orphan.stdin is not None
        orphan.stdin.close()
