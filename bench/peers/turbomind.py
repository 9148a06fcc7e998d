"""LMDeploy's TurboMind on a pair, under turbofit's plan or under settings of one's own."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import turbofit
from bench.peers.grid import PLAN, Pair, Setting
from bench.peers.row import Fate, Row
from bench.peers.workload import lowered, requests_of
from turbofit.core.plan import Plan
from turbofit.core.units import format_bytes
from turbofit.pretend.documents import from_builtins
from turbofit.rehearse.checkpoint.twin import checkpoint_for
from turbofit.rehearse.turbomind.planned import plan_spec
from turbofit.rehearse.turbomind.probe import rehearse
from turbofit.rehearse.turbomind.spec import RehearsalCase


def served_plan(pair: Pair, **options: Any) -> Plan:
    """The plan ranked by tokens, which are compared here, and rehearsed, as it is served."""
    shape = {"on": pair.on, "tp": pair.tp, "replicas": 1, "goal": "context"}
    return turbofit.plan(pair.model, rehearse=True, **shape, **options)


def plan_of(pair: Pair, setting: Setting) -> Plan:
    """The plan, or what turbofit tells of the given settings (for what a rehearsal cannot see)."""
    if setting.changed is None:
        return served_plan(pair, engine="turbomind")
    return turbofit.predict(pair.model, on=pair.on, tp=pair.tp, **setting.changed)


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
    whole = plan_spec(plan, checkpoint)
    spec = replace(whole, cases=from_builtins(cases, tuple[RehearsalCase, ...]))
    seen = rehearse(spec)
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
