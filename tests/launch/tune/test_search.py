"""The space and the search of a tuning."""

from __future__ import annotations

import json
import math
from importlib.util import find_spec

import pytest
from msgspec.structs import replace

from turbofit.core.errors import UsageError
from turbofit.core.tuning import SpeedFigures, TrialForecast
from turbofit.launch.tune import search
from turbofit.launch.tune.search import SearchPoint, Surrogate, TrialSearch
from turbofit.launch.tune.space import choices, forecast_of, mean_request
from turbofit.load.spec import LoadSpec
from turbofit.planning.plan import plan
from turbofit.planning.request import PlanRequest
from turbofit.tuner.throughput import Picture, rate_of_host

pytestmark = pytest.mark.skipif(find_spec("numpy") is None, reason="LMDeploy brings it")

#: Batches of 1, 2, 4, … 128; the forecast says that more is better.
OPTIONS = [
    SearchPoint((n / 2,), TrialForecast(requests_per_second=2.0**n, ttft=0.1 * 2**n, tpot=0.01))
    for n in range(8)
]


def serve(
    rate, slo=None, starts: int = 12, ttft=lambda _: 0.1, *, latency: bool = False
) -> tuple[int | None, list[int]]:
    """The best option and those that were tried, of engines that serve so much."""
    search = TrialSearch(OPTIONS, slo or {}, latency=latency, at_once=1 if latency else 128)
    tried: list[int] = []
    while len(tried) < starts and (index := search.next()) is not None:
        tried.append(index)
        served = rate(index)
        figures = None
        if served is not None:
            figures = replace(
                SEEN, requests_per_second=served, ttft_p90=ttft(index), e2e_p50=1 / served
            )
        search.tell(index, figures)
    return search.best(), tried


def test_the_first_option_is_tried_first_and_the_peak_is_found() -> None:
    best, tried = serve(lambda n: 30 * math.exp(-((n - 5) ** 2) / 2))
    assert (best, tried[0]) == (5, 0)
    assert len(tried) < len(OPTIONS)
    # A forecast that is right up to a factor needs few starts.
    best, tried = serve(lambda n: 0.3 * 2.0**n)
    assert (best, tried[1], len(tried)) == (7, 7, 4)
    # Engines that die are left.
    best, tried = serve(lambda n: None if n >= 5 else 2.0**n)
    assert best == 4
    assert sorted(tried) == sorted(set(tried))
    assert TrialSearch(OPTIONS, {}, latency=False, at_once=1).best() is None
    # Latency wants the soonest answer.
    assert serve(lambda n: 10 - abs(n - 3), latency=True)[0] == 3


def test_the_best_keeps_the_slo() -> None:
    best, tried = serve(lambda n: 2.0**n, {"ttft": 1.0}, ttft=lambda n: 0.15 * 2**n)
    assert (best, tried.count(2)) == (2, 1)
    assert serve(lambda n: 2.0**n, {"ttft": 1e-6})[0] is None


SEEN = SpeedFigures(
    requests_per_second=1.0, output_tokens_per_second=10.0, ttft_p50=0.1, ttft_p90=0.5,
    tpot_p50=0.01, tpot_p90=0.02, e2e_p50=1.0, e2e_p90=2.0, answered=200, failed=0,
)  # fmt: skip


@pytest.mark.parametrize(
    "text", ["", "ttft", "ttft=", "ttft=0s", "itl=2s", "ttft=1s,ttft=2s", "ttft=-1s", "e2e=1d"]
)
def test_what_is_no_limit_is_said(text) -> None:
    assert search.parse_slo("ttft=2s, tpot=50ms") == {"ttft": 2.0, "tpot": 0.05}
    with pytest.raises(UsageError) as caught:
        search.parse_slo(text)
    assert caught.value.message.startswith("--slo")


def test_nine_of_ten_must_keep_it_and_nearly_all_be_answered() -> None:
    assert search.meets(SEEN, {})
    assert search.meets(SEEN, {"ttft": 0.5, "tpot": 0.02, "e2e": 2.0})
    assert not search.meets(SEEN, {"ttft": 0.49})
    assert search.meets(replace(SEEN, failed=2), {})
    assert not search.meets(replace(SEEN, failed=3), {})
    assert not search.meets(replace(SEEN, answered=0), {})


def test_one_measurement_tells_of_all_and_most_of_its_neighbours() -> None:
    """The first one settles by what factor the forecasts are wrong everywhere."""
    deviation = pytest.approx(math.sqrt(1.0 + 0.3**2))
    assert Surrogate([], []).predict((0.0,)) == (0, deviation)  # the forecast stands
    surrogate = Surrogate([(0.0,)], [0.5])
    means = [surrogate.predict((x,)) for x in (0.0, 1.0, 4.0)]
    assert [round(mean, 2) for mean, _ in means] == [0.5, 0.48, 0.46]
    deviations = [deviation for _, deviation in means]
    assert deviations == sorted(deviations)
    assert deviations[0] < 0.05
    twice = Surrogate([(0.0,), (0.0,)], [0.2, 0.4])
    assert twice.predict((0.0,))[0] == pytest.approx(0.3, abs=0.01)


def test_it_goes_through_what_was_measured() -> None:
    points = [(float(x), float(y)) for x in range(4) for y in range(3)]
    seen = [math.sin(x) - 0.3 * y for x, y in points]
    surrogate = Surrogate(points, seen)
    for point, value in zip(points, seen, strict=True):
        assert surrogate.predict(point)[0] == pytest.approx(value, abs=0.03)


def test_expected_improvement_wants_what_is_good_or_unknown() -> None:
    assert search.expected_improvement(1.0, 0.1, 0.0) == pytest.approx(1.0)
    assert search.expected_improvement(0.0, 1.0, 0.0) == pytest.approx(1 / math.sqrt(2 * math.pi))
    assert search.expected_improvement(-3.0, 0.1, 0.0) < 1e-9
    assert search.expected_improvement(0.5, 0.0, 0.2) == pytest.approx(0.3)
    assert search.below(0.0, -1.0, 0.5) == pytest.approx(0.977, abs=1e-3)


REQUEST = PlanRequest(model="internvl2-2b", on="1xrtx3090", engine="turbomind")
USUAL = plan(REQUEST)
MEAN = mean_request(LoadSpec.of(image_size=(448, 448)))


def test_all_keep_the_promise_and_fit_and_the_usual_plan_is_first() -> None:
    found = choices(REQUEST, USUAL, MEAN, 32, (0, 8))
    assert found[0].plan == USUAL
    assert found[0].options == {}
    assert len(found) > 20
    assert {one.plan.settings.quant_policy for one in found} == {0, 8}
    for one in found:
        assert one.plan.fits
        assert one.plan.limits.image_limit == USUAL.limits.image_limit
        assert one.plan.settings.session_len >= USUAL.settings.session_len
        json.dumps(one.options)
    # Rows that the load cannot fill make no other trial.
    assert len({one.option.point for one in found}) == len(found)


def test_what_is_given_is_not_changed_and_shapes_use_all_cards() -> None:
    fixed = REQUEST.changed(max_batch_size=8, quant_policy=4)
    settings = [one.plan.settings for one in choices(fixed, plan(fixed), MEAN, 32, (0, 8))]
    assert {(one.max_batch_size, one.quant_policy) for one in settings} == {(8, 4)}
    assert len({one.max_prefill_token_num for one in settings}) > 1
    request = PlanRequest(model="internvl2-8b", on="2xrtx3090", engine="turbomind")
    found = choices(request, plan(request), MEAN, 16)
    shapes = {(one.plan.parallel.tp, one.plan.parallel.replicas) for one in found}
    assert shapes == {(1, 2), (2, 1)}


def test_a_forecast_follows_the_load() -> None:
    small = forecast_of(USUAL, MEAN, 8)
    long = forecast_of(USUAL, MEAN._replace(output_tokens=1024), 8)
    assert long.requests_per_second < small.requests_per_second / 3
    many = forecast_of(USUAL, MEAN._replace(images=((448, 448),) * 8), 8)
    assert many.requests_per_second < small.requests_per_second
    assert many.ttft > small.ttft
    one = LoadSpec.of(prompt_tokens=2, output_tokens=20, image_size=(64, 32), images=1)
    assert mean_request(one) == (2, 20, ((64, 32),))


def test_a_forecast_knows_the_host_that_prepares_images() -> None:
    machine = replace(USUAL.machine, host=replace(USUAL.machine.host, cpus=1))
    alone = replace(USUAL, machine=machine)
    photos = MEAN._replace(images=((8160, 6120),))
    known, unknown = (forecast_of(one, photos, 8) for one in (alone, USUAL))
    picture = Picture(USUAL.model.image_rule, USUAL.limits.units_per_image, (8160, 6120))
    host = rate_of_host(machine, picture, USUAL.parallel.replicas)
    assert known.requests_per_second == min(unknown.requests_per_second, host.images_per_second)
    assert known.requests_per_second < unknown.requests_per_second
    assert known.ttft > unknown.ttft + host.seconds
    text = MEAN._replace(images=())
    assert forecast_of(alone, text, 8) == forecast_of(USUAL, text, 8)


@pytest.mark.slow
def test_images_are_queued_where_the_forecast_gains_by_it() -> None:
    request = PlanRequest(model="qwen2-vl-7b", on="1xrtx3090", engine="turbomind")
    usual = plan(request)
    large = mean_request(LoadSpec.of(image_size=(1400, 1400)))
    found = choices(request, usual, large, 32)
    queued = [one.plan.limits for one in found if one.options.get("queue_images")]
    assert queued
    assert all(one.units_per_forward <= one.units_per_request for one in queued)
    for asked, load in ((request, MEAN), (request.changed(queue_images=False), large)):
        assert not [one for one in choices(asked, usual, load, 32) if "queue_images" in one.options]
