"""The space and the search of a tuning."""

from __future__ import annotations

import json

import pytest
from msgspec.structs import replace

from turbofit.core.errors import UsageError
from turbofit.core.tuning import SpeedFigures, TrialForecast
from turbofit.measure import tune_runner as runner
from turbofit.measure.load.spec import LoadSpec
from turbofit.measure.tune_runner import order
from turbofit.measure.tune_space import (
    LoadForecast,
    TrialChoice,
    choices,
    forecast_of,
)
from turbofit.memory.account import VisionLoad
from turbofit.planning.plan import plan
from turbofit.planning.request import PlanRequest
from turbofit.planning.throughput import host_rate

SEEN = SpeedFigures(
    requests_per_second=1.0, output_tokens_per_second=10.0, ttft_p50=0.1, ttft_p90=0.5,
    tpot_p50=0.01, tpot_p90=0.02, e2e_p50=1.0, e2e_p90=2.0, answered=200, failed=0,
)  # fmt: skip


@pytest.mark.parametrize(
    "text", ["", "ttft", "ttft=", "ttft=0s", "itl=2s", "ttft=1s,ttft=2s", "ttft=-1s", "e2e=1d"]
)
def test_what_is_no_limit_is_said(text) -> None:
    assert runner.parse_slo("ttft=2s, tpot=50ms") == {"ttft": 2.0, "tpot": 0.05}
    with pytest.raises(UsageError) as caught:
        runner.parse_slo(text)
    assert caught.value.message.startswith("--slo")


def test_nine_of_ten_must_keep_it_and_nearly_all_be_answered() -> None:
    assert runner.meets(SEEN, {})
    assert runner.meets(SEEN, {"ttft": 0.5, "tpot": 0.02, "e2e": 2.0})
    assert not runner.meets(SEEN, {"ttft": 0.49})
    assert runner.meets(replace(SEEN, failed=2), {})
    assert not runner.meets(replace(SEEN, failed=3), {})
    assert not runner.meets(replace(SEEN, answered=0), {})


REQUEST = PlanRequest(model="internvl2-2b", on="1xrtx3090", engine="turbomind")
USUAL = plan(REQUEST)
LOAD = LoadSpec.of(image_size=(448, 448))


def choice(rate: float, ttft: float = 0.1, tpot: float = 0.01) -> TrialChoice:
    told = TrialForecast(requests_per_second=rate, ttft=None, tpot=tpot)
    forecast = LoadForecast(requests_per_second=rate, ttft=ttft, tpot=tpot, told=told)
    return TrialChoice({"max_batch_size": rate}, USUAL, forecast)


def measured(rate: float, ttft_p90: float) -> tuple[LoadForecast, SpeedFigures]:
    """Settings with a forecast of 4 requests a second and 0.1 s to the first token."""
    return choice(4).forecast, replace(SEEN, requests_per_second=rate, ttft_p90=ttft_p90)


def rates(
    *given: TrialChoice,
    measured: tuple[LoadForecast, SpeedFigures] | None = None,
    **slo: float,
) -> list[float]:
    return [one.rate for one in order(given, measured, slo, at_once=8)]


def test_the_highest_forecast_that_keeps_the_slo_comes_first() -> None:
    few, some, many = choice(2, ttft=0.1), choice(4, ttft=0.2), choice(8, ttft=0.4)
    assert (rates(few, some, many), rates(few, some, many, ttft=0.2)) == ([8, 4, 2], [4, 2, 8])
    # Where none keeps it, the one that misses it least.
    assert rates(few, some, many, ttft=0.01) == [2, 4, 8]
    # Times were twice the forecast, so that they are for the others, too.
    assert rates(few, some, many, measured=measured(1.0, 0.2), ttft=0.2) == [2, 4, 8]
    assert rates(few, some, many, measured=measured(1.0, 0.05), ttft=0.2) == [8, 4, 2]
    # An answer of 8 requests at once takes 8 s at one a second.
    assert rates(few, some, many, e2e=3.0) == [8, 4, 2]


def test_all_keep_the_promise_and_fit_and_the_usual_plan_is_first() -> None:
    found = choices(REQUEST, USUAL, LOAD, 32, (0, 8))
    assert (found[0].plan, found[0].options) == (USUAL, {})
    assert len(found) > 20
    assert {one.plan.engines[0].settings.quant_policy for one in found} == {0, 8}
    for one in found:
        assert one.plan.fits
        assert one.plan.promise.limits.image_limit == USUAL.promise.limits.image_limit
        assert one.plan.engines[0].settings.session_len >= USUAL.engines[0].settings.session_len
        json.dumps(one.options)
    # Rows that the load cannot fill make no other trial.
    assert len({(one.plan.engines[0].settings, one.plan.promise.limits) for one in found}) == len(
        found
    )
    rates = [one.rate for one in found[1:]]
    assert rates == sorted(rates, reverse=True)


def test_what_is_given_is_not_changed_and_shapes_use_all_cards() -> None:
    fixed = REQUEST.changed(max_batch_size=8, quant_policy=4)
    settings = [
        one.plan.engines[0].settings for one in choices(fixed, plan(fixed), LOAD, 32, (0, 8))
    ]
    assert {(one.max_batch_size, one.quant_policy) for one in settings} == {(8, 4)}
    assert len({one.max_prefill_token_num for one in settings}) > 1
    request = PlanRequest(model="internvl2-8b", on="2xrtx3090", engine="turbomind")
    found = choices(request, plan(request), LOAD, 16)
    assert {(one.plan.tp, one.plan.replicas) for one in found} == {(1, 2), (2, 1)}


def test_a_forecast_follows_the_load() -> None:
    small = forecast_of(USUAL, LOAD, 8)
    long = forecast_of(USUAL, LOAD.changed(output_tokens=1024), 8)
    assert long.requests_per_second < small.requests_per_second / 3
    many = forecast_of(USUAL, LOAD.changed(images=8), 8)
    assert many.requests_per_second < small.requests_per_second
    assert many.ttft > small.ttft


def test_a_forecast_knows_the_host_that_prepares_images() -> None:
    machine = replace(USUAL.machine, host=replace(USUAL.machine.host, cpus=1))
    alone = replace(USUAL, machine=machine)
    photos = LOAD.changed(image_size=(8160, 6120))
    known, unknown = (forecast_of(one, photos, 8) for one in (alone, USUAL))
    load = VisionLoad(
        units_per_image=USUAL.promise.limits.units_per_image,
        images_per_request=1,
        tokens_per_request=0,
    )
    rule, engines = USUAL.model.image_rule, USUAL.replicas
    host = host_rate(machine, rule, load, engines, size=(8160, 6120))
    assert host is not None
    assert known.requests_per_second == min(unknown.requests_per_second, host.images_per_second)
    assert known.requests_per_second < unknown.requests_per_second
    assert known.ttft > unknown.ttft + host.seconds
    text = LOAD.changed(images=0)
    assert forecast_of(alone, text, 8) == forecast_of(USUAL, text, 8)
