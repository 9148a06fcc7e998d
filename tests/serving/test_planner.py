"""Plans that are rehearsed before they are believed, and read again at SIGHUP."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import msgspec
import pytest

from tests.support.gateway import plan_for
from tests.support.plans import changed, plausible_plan
from tests.support.serving import ask_at
from tests.support.waiting import until
from turbofit.core.engine_end import AnyEnd, RehearsedCache
from turbofit.core.errors import PackageError, UsageError
from turbofit.core.plan import Plan, Rehearsal
from turbofit.core.process.signals import StopSignal
from turbofit.core.units import MIB
from turbofit.gateway.config import GatewayConfig
from turbofit.gateway.server import GatewayThread
from turbofit.machine import source
from turbofit.model.source import resolve_model
from turbofit.planning.plan import plan as best_plan
from turbofit.planning.request import PlanRequest
from turbofit.rehearsal import confirm
from turbofit.serving.leases import Leases
from turbofit.serving.options import ServeConfig
from turbofit.serving.plan_gateway import make_gateway
from turbofit.serving.planner import Planner, launch_request, leases_for
from turbofit.serving.run import Reloader

REQUEST = PlanRequest(model="internvl2-1b", on="1xrtx3060")
CONFIG = ServeConfig(request=REQUEST, pretend=True)
CACHE = RehearsedCache(free=(), region=(), object_size=None, slab_size=None, tokens=None)


def rehearsed(outcome: Any, *, fits: bool) -> Plan:
    death = AnyEnd(phase="warm-up", where="somewhere", asked=2, left=1)
    rehearsal = Rehearsal(
        outcome=outcome, seconds=1.0, engine_version="0.18.0", cases=(), cache=CACHE, death=death
    )
    return plausible_plan(fits=fits, rehearsal=rehearsal)


@pytest.fixture
def planner(monkeypatch: pytest.MonkeyPatch) -> Callable[..., Plan]:
    """Makes a plan whose rehearsal is given."""

    def made(said: list[str], seen: Plan | Exception, **given: Any) -> Plan:
        def shown(_request: PlanRequest, _plan: Plan) -> Plan:
            if isinstance(seen, Exception):
                raise seen
            return seen

        monkeypatch.setattr(confirm, "rehearsed", shown)
        with leases_for(CONFIG) as leases:
            one = Planner(REQUEST, leases, said.append, rehearse=True, pretend=True, **given)
            return one.make({})

    return made


def test_what_a_rehearsal_shows_counts(planner: Any) -> None:
    said: list[str] = []
    for plan in (rehearsed("served", fits=True), rehearsed("out_of_memory", fits=False)):
        assert planner(said, plan) is plan
    assert all(text.startswith("rehearsing") for text in said)
    # One that cannot be held costs nothing but itself.
    for seen in (rehearsed("failed", fits=False), PackageError("no compiler", hint="install one")):
        assert planner(said, seen).fits
        assert said[-1].startswith("not rehearsed: ")


def test_a_plan_is_rehearsed_once(planner: Any) -> None:
    said: list[str] = []
    seen = rehearsed("served", fits=True).rehearsal
    first = best_plan(REQUEST, pretend=True)
    begun: list[Plan] = []  # beside its rehearsal
    for _ in range(2):
        plan = changed(first, rehearsal=seen)
        assert planner(said, plan, meanwhile=begun.append).rehearsal == seen
    assert len(begun) == 1
    assert [text.partition(":")[0] for text in said] == [
        "rehearsing", "rehearsed before",
    ]  # fmt: skip


@pytest.mark.parametrize("look", ["make", "take"])
def test_engines_of_a_dead_turbofit_are_ended_before_the_machine_is_measured(
    look: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One that still loads takes more than it holds: `calibrate` planned with that memory."""
    machine = msgspec.structs.replace(source.machine_from("1xrtx3060"), source="nvml")
    plan = best_plan(REQUEST.changed(on=machine))
    seen: list[int | None] = []
    said: list[str] = []
    with subprocess.Popen(["sleep", "1000"], start_new_session=True) as orphan:
        try:
            with Leases(tmp_path) as dead:
                dead.reserve(plan)
                dead.note([orphan.pid], ready=False)
                shutil.copy(next(tmp_path.glob("*.json")), tmp_path / "left.json")
            monkeypatch.setattr(
                source, "machine_from", lambda *_, **__: seen.append(orphan.poll()) or machine
            )
            with Leases(tmp_path) as leases:
                one = Planner(REQUEST.changed(on=None), leases, said.append, rehearse=False)
                plan = one.make({}) if look == "make" else one.reserve(plan) or plan
        finally:
            orphan.kill()
    assert plan.fits
    assert seen == [-9]
    assert len(said) == 1
    assert f"1 process of an engine for {plan.model.name}, whose turbofit" in said[0]


def test_a_proved_plan_gets_a_higher_ratio_with_what_its_engines_held(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    machine = msgspec.structs.replace(source.machine_from("1xrtx3060"), source="nvml")
    monkeypatch.setattr(source, "machine_from", lambda *_, **__: machine)
    said: list[str] = []

    def made(over: int | None, **changes: Any) -> Plan:
        with Leases(tmp_path) as leases:
            request = REQUEST.changed(on=None, **changes)
            one = Planner(request, leases, said.append, rehearse=False, over=lambda _plan: over)
            return one.make({})

    before, raised, less, as_before = (made(over * MIB if over else over) for over in
                                       (None, -50, 100, 206))  # fmt: skip
    assert [plan.ledgers[0].margin for plan in (before, raised, less, as_before)] == [
        256 * MIB, 96 * MIB, 196 * MIB, 256 * MIB,
    ]  # fmt: skip
    ratios = [plan.engines[0].settings.cache_max_entry_count for plan in (before, less, raised)]
    assert ratios == sorted(set(ratios))
    assert as_before.engines[0].kv == before.engines[0].kv
    assert raised.ledgers[0].headroom >= 96 * MIB
    assert raised.serve == before.serve
    first = f"from {ratios[0]:.3f} to {ratios[2]:.3f}"
    assert [text.rpartition("raised ")[2] for text in said] == [
        first, f"from {ratios[0]:.3f} to {ratios[1]:.3f}"
    ]  # fmt: skip
    assert made(-50 * MIB, margin=256 * MIB).ledgers[0].margin == 256 * MIB  # as it was given
    assert len(said) == 2


OPTIONS = {"api_key": ("one",), "context": "4096", "port": 0}


def public(*keys: str) -> GatewayConfig:
    return GatewayConfig(port=0, api_key=keys, drain_seconds=1.0)


@pytest.fixture
def job() -> Iterator[Any]:
    config = public("one")
    with GatewayThread(make_gateway(plan_for(), ["http://127.0.0.1:9"], config)) as front:
        said: list[str] = []
        yield SimpleNamespace(
            config=ServeConfig(gateway=config), public=front, say=said.append, said=said
        )


def known(job: Any, key: str) -> bool:
    """Whether a request with this key is let in; no engine runs behind the gateway."""
    return ask_at(job.public.url, "/v1/models", Authorization=f"Bearer {key}")[0] != 401


def test_a_key_changes_at_once_and_in_later_starts(job):
    assert (known(job, "one"), known(job, "two")) == (True, False)
    options = {**OPTIONS, "api_key": ("two",), "context": "8192"}
    reloader = Reloader(job, OPTIONS, lambda: (options, public("two")))
    reloader.reload()
    assert (known(job, "one"), known(job, "two")) == (False, True)
    assert job.said == ["needs a restart: context", "reloaded: api_key"]
    reloader.reload()
    assert job.said[2:] == ["needs a restart: context", "reloaded: nothing"]
    assert job.config.gateway.api_key == ("two",)


def test_a_wrong_file_changes_nothing(job):
    def wrong() -> Any:
        raise UsageError("turbofit.yaml:3: contxt is nothing", hint="did you mean context?")

    Reloader(job, OPTIONS, wrong).reload()
    assert job.said == ["not reloaded: turbofit.yaml:3: contxt is nothing (did you mean context?)"]
    assert known(job, "one")


def test_the_hangup_reloads_and_ends_the_run_where_the_terminal_closed(job, monkeypatch):
    options = {**OPTIONS, "api_key": ("two",)}
    open_terminals = {0, 2}
    monkeypatch.setattr("os.isatty", lambda fd: fd in open_terminals)
    with StopSignal() as stop:
        stop.abrupt = False
        stop.on_hangup = Reloader(job, OPTIONS, lambda: (options, public("two"))).begin
        signal.raise_signal(signal.SIGHUP)
        until(lambda: job.said == ["reloaded: api_key"], "the reload")
        assert stop.signal is None
        open_terminals.clear()
        signal.raise_signal(signal.SIGHUP)
        assert stop.signal is signal.SIGHUP
    assert known(job, "two")
    assert len(job.said) == 1


@pytest.mark.parametrize(
    "name",
    [
        "./internvl2-26b", "../internvl2-26b", "/nowhere/internvl2-26b", "~/internvl2-26b",
        "a/b/internvl2-26b", "models/internvl2-26b",
    ],
)  # fmt: skip
def test_a_launch_downloads_no_preset_for_a_path_that_is_not_here(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A plan notes it, and plans for the preset."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "models").mkdir()
    assert f"no folder {os.path.expanduser(name)} is here" in resolve_model(name).warnings[0]
    request = PlanRequest.of(model=name, on="1xa100-80g")
    for pretend in (True, False):
        with pytest.raises(UsageError, match="is here") as caught:
            launch_request(request, pretend=pretend)
        assert "turbofit plan internvl2-26b" in caught.value.hint
    assert launch_request(request.changed(model="internvl2-26b"), pretend=False).model
