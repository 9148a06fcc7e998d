"""How many images a second the host prepares, held against what was measured."""

from __future__ import annotations

import pytest
from msgspec.structs import replace

from turbofit import plan, predict
from turbofit.core.machine import Measured
from turbofit.core.plan import Plan
from turbofit.planning.request import PlanRequest
from turbofit.planning.resolve import resolve
from turbofit.planning.resolved_request import vision_load_of
from turbofit.planning.throughput import HostRate, host_rate, image_seconds

#: Processor milliseconds of an image on two cores of a virtual machine: tiles of InternVL2 by a
#: table (27 November 2026), and Transformers' image processor of Qwen2-VL with Pillow's decoding
#: before it (28 November 2026).
SEEN = [
    ("internvl2-2b", (1920, 1080), 99), ("internvl2-2b", (2600, 1950), 125),
    ("internvl2-2b", (4000, 3000), 261), ("qwen2-vl-2b", (448, 448), 8),
    ("qwen2-vl-2b", (1920, 1080), 106), ("qwen2-vl-2b", (4000, 3000), 629),
]  # fmt: skip
#: By which these differ, at most: the first row -17 %, the second +25 %.
WITHIN = 0.3


def planned(model: str, on: str, **asked) -> Plan:
    return plan(model, on=on, **asked)


def rate_of(model: str, on: str, *, measured: float = 0.0, engines: int = 1, **asked) -> HostRate:
    request = resolve(PlanRequest(model=model, on=on, **asked))
    if measured:
        found = Measured(torch="", image_seconds=measured)
        request = replace(request, machine=replace(request.machine, measured=found))
    rate = host_rate(
        request.machine, request.model.image_rule,
        vision_load_of(request, request.requested_image_limit), engines,
        size=request.workload.image_size, threads=request.image_threads,
    )  # fmt: skip
    assert rate is not None
    return rate


@pytest.mark.parametrize(("model", "size", "seen"), SEEN)
def test_an_image_takes_what_was_seen(model: str, size: tuple[int, int], seen: int) -> None:
    forecast = rate_of(model, "1xh100,cores=2", image_size="{}x{}".format(*size)).seconds
    assert forecast == pytest.approx(seen / 1e3, rel=WITHIN)


@pytest.mark.parametrize(
    ("cores", "engines", "busy"),
    [(1, 1, 1), (2, 1, 2), (8, 1, 7), (16, 1, 15), (64, 1, 16), (64, 4, 60), (4, 4, 4)],
)
def test_the_cores_that_prepare_images(cores: int, engines: int, busy: int) -> None:
    assert rate_of("internvl2-2b", f"4xh100,cores={cores}", engines=engines).cores == busy


def test_a_measured_host_scales_every_rule() -> None:
    for model in ("internvl2-2b", "qwen2-vl-2b"):
        usual = rate_of(model, "1xh100,cores=2")
        half = rate_of(model, "1xh100,cores=2", measured=0.0409)
        assert half.seconds == pytest.approx(usual.seconds / 2, rel=0.01)
        assert (usual.measured, half.measured) == (False, True)


def test_requests_a_second_are_the_lesser_of_host_and_cards() -> None:
    """The settings stay what the cards make them."""
    hosts = ("", ",cores=1", ",cores=16")
    alone, few, many = (planned("internvl2-2b", f"1xh100{host}") for host in hosts)
    assert few.engines[0].settings == many.engines[0].settings == alone.engines[0].settings
    assert alone.throughput.host is None
    assert "the host is not counted: its cores" in alone.throughput.basis
    assert many.throughput.requests_per_second == alone.throughput.requests_per_second
    host = few.throughput.host
    assert host is not None
    assert host.binds
    assert few.throughput.requests_per_second == pytest.approx(host.images_per_second, rel=0.01)
    assert host.gpu_images_per_second == pytest.approx(
        alone.throughput.requests_per_second, rel=0.01
    )
    # A picture is prepared before its first token, on one core, however many there are.
    first, bare = (each.usual_image.seconds_to_first_token_alone for each in (few, alone))
    assert first == bare == many.usual_image.seconds_to_first_token_alone
    text = alone.throughput.seconds_to_first_token_of_text
    assert bare > text + image_seconds(alone.model.image_rule, 13, (1920, 1080))
    assert many.throughput.host is not None
    assert not many.throughput.host.binds


def test_a_prediction_counts_lmdeploys_one_thread() -> None:
    alone = predict("internvl2-2b", on="1xh100,cores=16").throughput
    assert alone
    assert alone.host
    assert (alone.host.cores, alone.host.binds) == (1, True)
    assert alone.requests_per_second == pytest.approx(alone.host.images_per_second, rel=0.01)
    more = predict("internvl2-2b", on="1xh100,cores=16", image_threads=4).throughput
    assert more
    assert more.host
    assert more.host.cores == 4
