"""A brief search leaves out what can be no better, and a look at one request what cannot fit."""

from __future__ import annotations

import random
from collections.abc import Iterator

import pytest
from msgspec.structs import replace

import turbofit
from tests.tuner.conftest import random_request
from turbofit.core.plan import Workload
from turbofit.machine.source import machine_from
from turbofit.memory.engines import engine_for
from turbofit.model.source import resolve_model
from turbofit.planning.request import PlanRequest
from turbofit.planning.resolve import resolve
from turbofit.tuner.explain import remedies
from turbofit.tuner.resolved_request import ResolvedRequest
from turbofit.tuner.search.candidates import evaluate
from turbofit.tuner.search.search import may_fit, search
from turbofit.tuner.search.shapes import Evaluation, Shape
from turbofit.tuner.search.sizing import SearchState


def asked(model: str, on: str, concurrency: int | None = None) -> ResolvedRequest:
    workload = Workload(concurrency=concurrency)
    return ResolvedRequest(model=resolve_model(model), machine=machine_from(on), workload=workload)


def some() -> Iterator[ResolvedRequest]:
    """Requests that fit, that hold fewer than was asked, that serve smaller images, and not."""
    rng = random.Random(3)
    for context in (True, False, True, False):
        request = random_request(rng, context=context, most=2)
        yield replace(request, workload=replace(request.workload, queue_images=None))
    yield asked("internvl2-26b", "2xrtx3060")
    yield asked("qwen2-vl-7b", "2xrtx3090", 600)
    yield asked("qwen2-vl-7b", "rtx3090+rtx4090:used=9GiB", 600)
    yield asked("internvl2-8b", "1xrtx3090:free=18GiB")


@pytest.mark.parametrize("request_", list(some()))
def test_a_brief_search_has_the_same_best(request_: ResolvedRequest) -> None:
    engine = engine_for(request_.model, "auto")
    whole, brief = search(request_, engine), search(request_, engine, brief=True)
    assert brief.best == whole.best
    assert {one.shape for one in brief.evaluations} <= {one.shape for one in whole.evaluations}


@pytest.mark.parametrize(("concurrency", "fitting"), [(None, 2), (8, 1)])
def test_what_cannot_fit_is_told_without_a_search(concurrency: int | None, fitting: int) -> None:
    requests = [
        asked("qwen2-vl-7b", on, concurrency) for on in ("1xt4", "1xrtx3060", "1xl4", "1xa100-40g")
    ]
    engine = engine_for(requests[0].model, "turbomind")
    may = [may_fit(request, engine) for request in requests]
    fits = [search(request, engine).best.fits for request in requests]
    assert sum(fits) == sum(may) == fitting
    assert fits == may


def test_a_plan_that_does_not_fit_searches_no_cards_that_do_not_hold_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A search of each of fifty kinds of cards took most of the time: 14 s for eight cards."""
    searched = list[str]()
    found = remedies.fit_on_host

    def counted(request: ResolvedRequest, *args: object, **options: object) -> object:
        searched.append(request.machine.gpu(0).name)
        return found(request, *args, **options)  # type: ignore[arg-type]

    monkeypatch.setattr(remedies, "fit_on_host", counted)
    plan = turbofit.plan("internvl2-76b", on="2xrtx3060", engine="turbomind")
    larger = [name for name in searched if name != "NVIDIA GeForce RTX 3060"]
    assert plan.remedies[0].change.startswith(f"2 x {larger[-1]} ")
    assert len(larger) <= 3


def test_a_brief_search_lowers_images_where_most_requests_may_be_held() -> None:
    request = replace(
        asked("qwen2.5-vl-7b", "2xrtx3090"), workload=Workload(images=20, concurrency=8)
    )
    engine = engine_for(request.model, "turbomind")
    whole, brief = search(request, engine), search(request, engine, brief=True)
    assert brief.best == whole.best
    assert whole.best.held_requests == 2
    assert len(brief.evaluations) < len(whole.evaluations)


def test_a_lower_limit_is_looked_for_with_one_request(monkeypatch: pytest.MonkeyPatch) -> None:
    """All requests of each limit were searched: twenty limits, and 28 s of a processor's time."""
    looked_at = set[int | None]()

    def counted(state: SearchState, shape: Shape) -> Evaluation:
        looked_at.add(shape.image_limit)
        return evaluate(state, shape)

    monkeypatch.setattr("turbofit.tuner.search.search.evaluate", counted)
    request = asked("qwen2-vl-2b", "1xrtx3060:free=7GiB")
    best = search(request, engine_for(request.model, "turbomind")).best
    assert best.fits
    assert best.shape.image_limit == 6_607_552
    assert looked_at == {12_845_056, best.shape.image_limit}


@pytest.mark.parametrize("brief", [False, True])
def test_one_request_bounds_nothing_on_pytorch(brief: bool) -> None:
    """One request of its batch may take more than two: the search stopped at 7,041,104 pixels."""
    given = PlanRequest.of(model="qwen2-vl-2b", on="1xrtx3090+1xl4", concurrency=2, budget="30%")
    request = resolve(given)
    best = search(request, engine_for(request.model, "pytorch"), brief=brief).best
    assert best.fits
    assert best.shape.image_limit == 7_059_136
