"""A trace by events: against the same rules token by token, the forecast, and a full cache."""

from __future__ import annotations

import random
from collections import deque
from itertools import pairwise
from math import isnan

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.tuner.simulated_cache import Case, simulated
from turbofit.core.plan import Settings
from turbofit.machine.spec import parse_spec
from turbofit.memory.engines import engine_named
from turbofit.model.source import resolve_model
from turbofit.tuner.speed import ClosedLoad, group_rates, rates, speed_of
from turbofit.tuner.trace import SimulatedEngine, TraceRequest, replay

MACHINE = parse_spec("1xa100-80g")
RATES = group_rates(
    resolve_model("qwen2.5-7b"), Settings(), MACHINE, MACHINE.gpus, engine_named("turbomind")
)
CHUNK = 8192


def engine(batch: int = 64, kv: int = 10**6, **fields: object) -> SimulatedEngine:
    return SimulatedEngine(RATES, batch, kv, CHUNK, **fields)


def sent(engines, requests):
    return replay(engines, requests, queue=256, patience=30.0)


def token_by_token(
    one: SimulatedEngine, requests: list[TraceRequest]
) -> tuple[list[float], list[float]]:
    """First tokens and ends by the same rules, a step at a time, for a cache that holds all."""
    figures, slope = rates(), RATES.work.kv_bytes / RATES.card.bandwidth
    ready, loop = [], 0.0
    for request in requests:
        ready.append(max(loop, request.at))
        loop = ready[-1] + figures.request_seconds
    waiting, running = deque(range(len(requests))), dict[int, int]()
    first, ended = [0.0] * len(requests), [0.0] * len(requests)
    now = 0.0
    while waiting or running:
        read = 0
        while waiting and len(running) < one.batch and read < one.chunk:
            index = waiting[0]
            if not running:
                now = max(now, ready[index])
            if ready[index] > now:
                break
            prompt = requests[waiting.popleft()].prompt
            now += RATES.seconds(figures, prompt, pairs=prompt**2 / 2)
            running[index], read = 0, read + prompt
        cached = sum(requests[index].prompt + done for index, done in running.items())
        now += RATES.seconds(figures, len(running)) + slope * cached
        for index in list(running):
            if not running[index]:
                first[index] = now
            running[index] += 1
            if running[index] == requests[index].output:
                ended[index] = now
                del running[index]
    return first, ended


@given(st.integers(0, 10**6))
def test_events_are_the_steps_between_them(seed: int) -> None:
    rng = random.Random(seed)
    at, requests = 0.0, []
    for _ in range(rng.randint(1, 25)):
        at += rng.expovariate(8)
        requests.append(TraceRequest(at, rng.randint(1, 5000), rng.randint(1, 60)))
    one = engine(batch=rng.randint(1, 8))
    times, _ = sent([one], requests)
    first, ended = token_by_token(one, requests)
    assert times.first == pytest.approx(first, rel=1e-9)
    assert times.ended == pytest.approx(ended, rel=1e-9)
    assert all(a <= b for a, b in pairwise(times.begun))


@pytest.mark.parametrize(("at_once", "kv"), [(1, 10**6), (8, 10**6), (64, 10**6), (256, 100_000)])
def test_a_crowd_is_as_fast_as_the_forecast_says(at_once: int, kv: int) -> None:
    requests = [TraceRequest(0.0, 256, 256)] * (at_once * 20)
    times, (load,) = sent([engine(at_once, kv)], requests)
    settings = Settings(max_batch_size=at_once, max_prefill_token_num=CHUNK)
    load_of = ClosedLoad(prompt=256, output=256, at_once=at_once)
    forecast = speed_of(RATES, rates(), load_of, settings, kv)
    found = len(requests) / max(times.ended)
    assert found == pytest.approx(forecast.requests_per_second, rel=0.07 if load.evicted else 0.01)


@pytest.mark.parametrize("case", [Case(50, 500, 30), Case(256, 256, 60), Case(2048, 128, 40)])
@pytest.mark.parametrize("crowd", [1.0, 1.3, 2.5])
def test_a_full_cache_runs_as_many_as_the_simulation_of_tokens(case: Case, crowd: float) -> None:
    there = round(case.fitting * crowd)
    requests = [TraceRequest(0.0, case.prompt, case.output)] * (there * 12)
    kv = case.fitting * (case.prompt + case.output)
    times, (load,) = sent([engine(there, kv)], requests)
    assert not any(map(isnan, times.ended))
    assert load.most_cached <= kv
    assert (load.evicted > 0) == (crowd > 1)
    running = load.running_seconds / load.now / case.fitting
    # Filling and emptying are in it here; there a part in the middle is looked at.
    assert running == pytest.approx(simulated(case, crowd)[0], rel=0.2)


def test_requests_go_where_they_are_fewest_and_by_shares() -> None:
    requests = [TraceRequest(n / 50, 500, 100) for n in range(400)]
    _, loads = sent([engine(share=3.0), engine(share=1.0)], requests)
    assert loads[0].running_seconds > 1.5 * loads[1].running_seconds
    ends = [max(sent([engine(4)] * count, requests)[0].ended) for count in (1, 2)]
    assert ends[1] < 0.7 * ends[0]


def test_images_that_wait_too_long_or_too_many_are_refused() -> None:
    requests = [TraceRequest(0.0, 3000, 20, 13, 1)] * 600
    times, _ = sent([engine(8, gate=13)], requests)
    assert not [begun for begun in times.begun if begun > 30]
    assert len(times.refused) + sum(not isnan(end) for end in times.ended) == 600
    assert len(times.refused) > 600 - 257 - 1 - 8
    assert sent([engine(8)], requests)[0].refused == []
