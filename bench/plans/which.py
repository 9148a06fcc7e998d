"""Whether `turbofit which` says what `turbofit plan` says, and how long it takes."""

from __future__ import annotations

import random
import time
from collections.abc import Iterator
from typing import Any

import turbofit
from turbofit.core.errors import TurbofitError
from turbofit.core.plan import Plan
from turbofit.core.which import Serving
from turbofit.machine.presets import preset_names
from turbofit.model.presets import known_presets
from turbofit.planning.request import WhichRequest
from turbofit.planning.resolve import resolve
from turbofit.planning.serving import far_too_large, serving

__all__ = ["compared", "timed"]

_MACHINES = ("1xrtx3060", "1xrtx4090", "2xl4", "4xrtx3090", "8xa100-80g")


def timed() -> Iterator[tuple[str, float]]:
    """Seconds of processor time: the median and the slowest model over all cards; machines."""
    models = sorted((_seconds(model=name), name) for name in known_presets())
    yield (
        f"one model, all {len(preset_names())} cards: median of {len(models)} models",
        models[len(models) // 2][0],
    )
    yield f"the slowest: {models[-1][1]}", models[-1][0]
    for name in _MACHINES:
        yield f"one machine, all {len(models)} models: {name}", _seconds(on=name)


def _seconds(**question: Any) -> float:
    began = time.process_time()
    try:
        turbofit.which(**question)
    except TurbofitError:
        return 0.0
    return time.process_time() - began


def compared(count: int, seed: int) -> Iterator[tuple[str, str]]:
    """Random pairs of a model and cards, asked of both commands: how each ends, what differs."""
    chance = random.Random(seed)
    for _ in range(count):
        model = chance.choice(known_presets())
        on = f"{chance.choice((1, 2, 4, 8))}x{chance.choice(preset_names())}"
        options: dict[str, Any] = {}
        if chance.random() < 0.3:
            options["concurrency"] = chance.choice((2, 8, 32))
        if chance.random() < 0.3:
            options["context"] = chance.choice((2048, 8192))
        if chance.random() < 0.2:
            options["least"] = True
        why = _differs(model, on, options)
        end = "fits" if why is None else "does not fit"
        yield end, f"{model} on {on} with {options}: {why}" if why else ""


def _differs(model: str, on: str, options: dict[str, Any]) -> str | None:
    """What differs; empty where neither fits and nothing differs, None where both fit alike."""
    request = WhichRequest.of(model=model, on=on, **options)
    try:
        plan = turbofit.plan(model, on=on, **options)
    except TurbofitError as exc:
        return _refused(request, exc)
    resolved = resolve(request)
    if far_too_large(request, resolved):
        return f"far too large, and plan says {plan.verdict}" if plan.fits else ""
    row = serving(request, resolved, on)
    seen, planned = _figures_of_row(row), _figures_of_plan(plan)
    if seen != planned:
        return f"{seen} by which, {planned} by plan"
    return None if plan.fits else ""


def _refused(request: WhichRequest, error: TurbofitError) -> str:
    try:
        resolved = resolve(request)
        serving(request, resolved, str(request.on))
    except TurbofitError as exc:
        return "" if exc.message == error.message else f"{exc.message}, and {error.message}"
    return "" if far_too_large(request, resolved) else f"serves, and plan says {error.message}"


def _figures_of_row(row: Serving) -> tuple[object, ...]:
    fits = bool(row.kv_tokens or row.requests_at_once)
    if not fits:
        return (False, row.engine)
    return (
        True, row.engine, row.tp, row.replicas, row.kv_tokens, row.context, row.image_limit,
        row.requests_at_once, row.requests_per_second, row.seconds_to_first_token,
    )  # fmt: skip


def _figures_of_plan(plan: Plan) -> tuple[object, ...]:
    if not plan.fits:
        return (False, plan.engine.name)
    speed = plan.throughput
    return (
        True, plan.engine.name, max(map(len, plan.parallel.groups)), plan.parallel.replicas,
        plan.kv.total_tokens, plan.settings.session_len, plan.limits.image_limit,
        plan.requests_at_once, speed and speed.requests_per_second,
        speed and speed.seconds_to_first_token,
    )  # fmt: skip
