"""LMDeploy's TurboMind on a pair, under turbofit's plan or under settings of one's own."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any, Literal, NamedTuple

import turbofit
from bench.peers.workload import lowered, requests_of
from turbofit.core.plan import Plan
from turbofit.core.units import format_bytes
from turbofit.rehearse.checkpoint.twin import checkpoint_for
from turbofit.rehearse.document import rehearse
from turbofit.rehearse.planned import plan_spec


class Pair(NamedTuple):
    """A model on a machine; every setting gets the same ``tp``.

    ``quick``: part of the short run.
    """

    model: str
    on: str
    tp: int = 1
    quick: bool = False

    @property
    def name(self) -> str:
        """A short name for tables."""
        return f"{self.model} {self.on}" + (f" tp{self.tp}" if self.tp > 1 else "")


class Setting(NamedTuple):
    """LMDeploy's TurboMind with so much changed; ``changed`` None is turbofit's plan."""

    name: str
    changed: dict[str, Any] | None


PLAN = "turbofit's plan"

PAIRS: tuple[Pair, ...] = (
    Pair("internvl2-8b", "1xrtx3090", quick=True),
    Pair("internvl2-2b", "1xrtx3090"),
    Pair("qwen2-vl-7b", "1xrtx3090", quick=True),
    Pair("qwen2-vl-2b", "1xrtx3090"),
    Pair("qwen2.5-7b", "1xrtx3090", quick=True),
    Pair("internvl2-26b-awq", "1xrtx3090"),
    Pair("internvl2-8b", "1xl4:free=19GiB"),
    Pair("internvl2-2b", "1xl4:free=19GiB"),
    Pair("qwen2-vl-7b", "1xl4:free=19GiB"),
    Pair("qwen2-vl-2b", "1xl4:free=19GiB"),
    Pair("qwen2.5-7b", "1xl4:free=19GiB"),
    Pair("internvl2-8b", "1xv100-32g"),
    Pair("internvl2-26b-awq", "1xv100-32g"),
    Pair("qwen2-vl-7b", "1xv100-32g"),
    Pair("qwen2.5-7b", "1xv100-32g"),
    Pair("internvl2-8b", "2xrtx4090", tp=2),
    Pair("internvl2-26b-awq", "2xrtx4090", tp=2),
    Pair("qwen2-vl-7b", "2xrtx4090", tp=2),
)

SETTINGS: tuple[Setting, ...] = (
    Setting(PLAN, None),
    Setting("LMDeploy's defaults", {}),
    Setting("advice: 0.5", {"cache_max_entry_count": 0.5}),
    Setting("advice: 0.4", {"cache_max_entry_count": 0.4}),
    Setting("advice: 0.2", {"cache_max_entry_count": 0.2}),
)

Fate = Literal["survived", "died", "refused", "hung"]


class Row(NamedTuple):
    """What one setting did on one pair.

    ``fate``: ``refused`` is a start that did not come about, ``died`` a server that had started.
    ``tokens`` is the KV cache, None where none was made.
    """

    pair: str
    who: str
    settings: str
    tokens: int | None
    fate: Fate
    of: str
    note: str = ""


def plan_of(pair: Pair, setting: Setting) -> Plan:
    """The plan, ranked by tokens and rehearsed as it is served, or what turbofit tells of settings.

    That is for what a rehearsal cannot see.
    """
    shape: dict[str, Any] = {"on": pair.on, "tp": pair.tp}
    if setting.changed is not None:
        return turbofit.predict(pair.model, **shape, **setting.changed)
    shape |= {"replicas": 1, "goal": "context", "rehearse": True, "engine": "turbomind"}
    return turbofit.plan(pair.model, **shape)


def turbomind_row(pair: Pair, setting: Setting, folder: Path) -> Row:
    """Starts the engine, sends it what everybody is sent, and tells how that went."""
    plan = plan_of(pair, setting)
    of_plan = setting.changed is None
    if of_plan and not plan.fits:
        return Row(pair.name, PLAN, "", None, "refused", plan.verdict)
    checkpoint = folder / plan.model.name
    if not checkpoint.exists():
        checkpoint_for(plan.model, checkpoint)
    # Clients are not held to a limit where no gateway stands; a plan's are.
    cases = requests_of(plan, gateway=of_plan)
    seen = rehearse(replace(plan_spec(plan, checkpoint), cases=cases))
    fate, of = _fate(seen)
    settings = plan.settings
    return Row(
        pair=pair.name,
        who=setting.name,
        settings=(
            f"{settings.cache_max_entry_count:g} / {settings.max_batch_size}"
            f" / {settings.max_prefill_token_num}"
        ),
        tokens=seen["cache"]["tokens"],
        fate=fate,
        of=of,
        note=", ".join(t for t in (lowered(plan) if of_plan else "", _refused(seen)) if t),
    )


def _fate(seen: dict[str, Any]) -> tuple[Fate, str]:
    """How it ended, and of what."""
    outcome, death = seen["outcome"], seen["death"]
    if outcome == "served":
        return "survived", ""
    started = "ready" in seen["child_seconds"]
    of = f"{death['phase']}: {death['where']}"
    if death["asked"] is not None and death["left"] is not None:
        of += f", {format_bytes(death['asked'])} asked, {format_bytes(death['left'])} left"
    if outcome == "hang" and not started:
        return "hung", of
    return ("died" if started else "refused"), of


def _refused(seen: dict[str, Any]) -> str:
    """Requests that the engine turned away while it lived."""
    told = []
    for case in seen["cases"]:
        away = {s: n for s, n in case["statuses"].items() if s not in ("finished", "ok")}
        told += [f"{case['name']}: {n} {status}" for status, n in away.items()]
    return ", ".join(told)
