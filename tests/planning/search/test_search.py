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
from turbofit.planning.search.search import EngineFit, search


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
    asked = {"images": 20, "concurrency": 12}
    plan, cards = searched(monkeypatch, "qwen2.5-vl-7b", on="2xrtx3090", **asked)
    fits = [one.change for one in plan.remedies if one.effect.startswith("fits")]
    assert fits == ["--images 1", "--max-pixels 1379840", "--concurrency 10"]
    assert cards == ["NVIDIA GeForce RTX 3090"] * 7


def test_a_lower_limit_is_looked_for_with_all_requests() -> None:
    """On the PyTorch engine one request of a batch may take more memory than two."""
    given = PlanRequest.of(model="qwen2-vl-2b", on="1xrtx3090+1xl4", concurrency=2, budget="30%")
    request = resolve(given)
    best = search(request, engine_for(request.model, "pytorch")).best
    assert best.fits
    assert best.shape.image_limit == 7_059_136
