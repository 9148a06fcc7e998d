"""How much a search looks at, and where it looks for lower image limits."""

from __future__ import annotations

from typing import Any

import pytest

import turbofit
from turbofit.core.plan import Plan, Workload
from turbofit.machine.source import machine_from
from turbofit.memory.account import Engine
from turbofit.memory.engines import engine_for
from turbofit.model.source import resolve_model
from turbofit.planning import remedies
from turbofit.planning.request import PlanRequest
from turbofit.planning.resolve import resolve
from turbofit.planning.resolved_request import ResolvedRequest
from turbofit.planning.search.evaluate import evaluate
from turbofit.planning.search.search import EngineFit, search
from turbofit.planning.search.shapes import Evaluation, Shape
from turbofit.planning.search.sizing import SearchState


def asked(model: str, on: str, concurrency: int | None = None) -> ResolvedRequest:
    workload = Workload(concurrency=concurrency)
    return ResolvedRequest(model=resolve_model(model), machine=machine_from(on), workload=workload)


def searched(monkeypatch: pytest.MonkeyPatch, model: str, **asked: Any) -> tuple[Plan, list[str]]:
    """A plan, and the first card of each machine that its remedies searched."""
    cards = list[str]()
    found = remedies.fit_on_host

    def counted(request: ResolvedRequest, engine: Engine) -> EngineFit:
        cards.append(request.machine.gpu(0).name)
        return found(request, engine)

    monkeypatch.setattr(remedies, "fit_on_host", counted)
    return turbofit.plan(model, **asked), cards


def test_the_third_change_that_makes_it_fit_is_the_last(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = {"images": 20, "concurrency": 8}
    plan, cards = searched(monkeypatch, "qwen2.5-vl-7b", on="2xrtx3090", **asked)
    fits = [one.change for one in plan.remedies if one.effect.startswith("fits")]
    three = ["--images 1", "--max-pixels 2304960", "--quant-policy 4 (int4 KV cache)"]
    assert fits == [*three, "--concurrency 3"]  # which a person asked for, and so may be the cause
    assert cards == ["NVIDIA GeForce RTX 3090"] * 6


def test_a_lower_limit_is_looked_for_with_one_request(monkeypatch: pytest.MonkeyPatch) -> None:
    """All requests of each limit were searched: twenty limits, and 28 s of a processor's time."""
    looked_at = set[int | None]()

    def counted(state: SearchState, shape: Shape) -> Evaluation:
        looked_at.add(shape.image_limit)
        return evaluate(state, shape)

    monkeypatch.setattr("turbofit.planning.search.search.evaluate", counted)
    request = asked("qwen2-vl-2b", "1xrtx3060:free=7GiB")
    best = search(request, engine_for(request.model, "turbomind")).best
    assert best.fits
    assert best.shape.image_limit == 6_607_552
    assert looked_at == {12_845_056, best.shape.image_limit}


def test_one_request_bounds_nothing_on_pytorch() -> None:
    """One request of its batch may take more than two: the search stopped at 7,041,104 pixels."""
    given = PlanRequest.of(model="qwen2-vl-2b", on="1xrtx3090+1xl4", concurrency=2, budget="30%")
    request = resolve(given)
    best = search(request, engine_for(request.model, "pytorch")).best
    assert best.fits
    assert best.shape.image_limit == 7_059_136
