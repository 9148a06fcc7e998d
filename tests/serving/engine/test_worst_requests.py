"""What an engine must answer before it is ready."""

from __future__ import annotations

import base64
import struct
from typing import Any

import pytest
from msgspec.structs import replace

from tests.support.gateway import PATCHES, TILES
from tests.support.plans import changed, model, plausible_plan
from turbofit import api
from turbofit.core.plan import Plan, Workload
from turbofit.memory.turbomind.pool import forward_tokens
from turbofit.serving.engine import worst_requests
from turbofit.serving.engine.worst_requests import fullest_forward, worst_image, worst_request

CARDS = ["1xrtx3090", "1xa100-80gb", "2xl4"]


def image_units(plan: Plan, question: worst_requests.ProbeRequest) -> list[int]:
    """Units of each image, by the model's own rule."""
    found = []
    for part in question.body["messages"][0]["content"]:
        if part["type"] == "image_url":
            fields = dict(part["image_url"])
            raw = base64.b64decode(fields.pop("url").partition(",")[2])
            size = struct.unpack(">II", raw[16:24])
            found.append(replace(plan.model.image_rule, **fields).units(*size))
    return found


def fullest(plan: Plan, sizes: list[int], text: int) -> int:
    """Units that meet in the fullest forward of one prompt, as TurboMind cuts it.

    The text of a template comes first but for 10 tokens of it; each image stands between two of
    its own. An image counts in every forward that holds one of its tokens.
    """
    forward, place, met = forward_tokens(plan.engines[0].settings), text - 10, dict[int, int]()
    for size in sizes:
        place += 1
        end = place + plan.model.image_rule.unit_tokens(size)
        for number in range(place // forward, (end - 1) // forward + 1):
            met[number] = met.get(number, 0) + size
        place = end + 1
    assert place < plan.engines[0].settings.session_len
    return max(met.values())


@pytest.mark.parametrize("model", ["internvl2-8b", "internvl2-1b", "qwen2-vl-7b", "qwen2.5-vl-7b"])
@pytest.mark.parametrize("on", CARDS)
def test_one_image_holds_the_worst_forward(model: str, on: str) -> None:
    plan = api.plan(model, on=on)
    limits, rule = plan.promise.limits, plan.model.image_rule
    assert plan.fits
    assert sum(image_units(plan, worst_request(plan, "m"))) == limits.units_per_request
    assert worst_requests.worst_image_tokens(plan) == rule.unit_tokens(limits.units_per_request)
    second = fullest_forward(plan, plan.engines[0], "m", 75)
    paid = plan.engines[0].units_per_forward
    if paid <= limits.units_per_request:
        assert second is None
        return
    (got,) = image_units(plan, second)
    assert limits.units_per_request < got <= paid
    if paid * 1.1 < plan.engines[0].settings.session_len:
        assert got >= 0.98 * paid
    assert rule.unit_tokens(got) < plan.engines[0].settings.session_len


@pytest.mark.parametrize("on", CARDS)
@pytest.mark.parametrize("forward", [1024, 4096, 8192])
@pytest.mark.parametrize("patch", [None, 1, 6])
def test_where_no_client_can_ask_for_one_image_many_meet(on, forward, patch) -> None:
    plan = api.plan(
        "internvl3-8b-hf", on=on, max_prefill_token_num=forward, max_dynamic_patch=patch,
        concurrency=8, queue_images=False,
    )  # fmt: skip
    limits = plan.promise.limits
    for text in (75, 225):  # tokens of a chat template around it: InternVL's, and three times that
        question = fullest_forward(plan, plan.engines[0], "m", text)
        paid = plan.engines[0].units_per_forward
        if paid <= limits.units_per_request:
            assert question is None
            continue
        assert question is not None
        sizes = image_units(plan, question)
        assert max(sizes) <= limits.units_per_image
        assert fullest(plan, sizes, text) >= paid - 2


def test_a_session_too_short_for_two_forwards_is_filled() -> None:
    plan = api.plan("internvl3-8b-hf", on="1xrtx3090", context=5120)
    question = fullest_forward(plan, plan.engines[0], "m", 75)
    assert question is not None
    sizes = image_units(plan, question)
    assert 75 + sum(sizes) * 258 <= 5120
    assert sum(sizes) >= plan.engines[0].units_per_forward - 1


def test_a_text_model_is_asked_for_what_decides() -> None:
    plan = api.plan("qwen2.5-7b", on="1xrtx3090", concurrency=8)
    assert worst_image(plan) is None
    assert worst_request(plan, "m") is None
    assert worst_requests.worst_image_tokens(plan) == 0
    longest = fullest_forward(plan, plan.engines[0], "m", 0)
    assert longest is not None
    assert len(longest.body["input_ids"]) == plan.engines[0].settings.session_len - 2


def test_a_full_batch_samples_together() -> None:
    plan = decided_by(api.plan("qwen2.5-0.5b", on="1xrtx3090", concurrency=100), "sampling")
    question = fullest_forward(plan, plan.engines[0], "m", 0)
    assert question is not None
    path, body = question.path, question.body
    assert (path, body["top_k"], body["ignore_eos"]) == ("/v1/completions", 0, True)
    assert len(body["prompt"]) == plan.engines[0].settings.max_batch_size == 100
    smaller = changed(plan, kv=replace(plan.engines[0].kv, tokens=2304))
    few = fullest_forward(smaller, smaller.engines[0], "m", 0)
    assert few is not None
    assert len(few.body["prompt"]) == 36
    assert 36 * (few.body["max_tokens"] + 32) <= 2304


def test_where_the_decoder_decides_no_more_images_are_asked() -> None:
    plan = decided_by(api.plan("internvl2-8b", on="1xrtx3090"), "text_prefill")
    question = fullest_forward(plan, plan.engines[0], "m", 75)
    assert question is not None
    assert question.path == "/generate"
    request = decided_by(plan, "vision_request")
    assert fullest_forward(request, request.engines[0], "m", 75) is None


def decided_by(plan: Plan, name: str) -> Plan:
    """The same plan, with another term as the one that decides."""
    ledger = tuple(replace(term, worst=term.term == name) for term in plan.ledgers[0].terms)
    return changed(plan, ledgers=(replace(plan.ledgers[0], terms=ledger),))


def limited(units_per_image: int, rule: Any = TILES, **limits: object) -> Plan:
    plan = plausible_plan(model=model(image_rule=rule))
    return changed(
        plan, limits=replace(plan.promise.limits, units_per_image=units_per_image, **limits)
    )


def pixels(worst: int, most: int) -> Plan:
    return limited(
        worst, PATCHES, vision_unit="patch", max_dynamic_patch=None, max_pixels_per_image=most
    )


@pytest.mark.parametrize("most", [1, 2, 6, 7, 12, 24])
def test_the_worst_tiles(most: int) -> None:
    worst = TILES.worst_units(most)
    image = worst_image(limited(worst, max_dynamic_patch=most))
    assert image is not None
    assert TILES.units(*image.size, most) == worst


@pytest.mark.parametrize("most", [12845056, 200_704, 401_408])
def test_the_worst_patches(most: int) -> None:
    worst = PATCHES.worst_units(most)
    image = worst_image(pixels(worst, most))
    assert image is not None
    assert worst * 0.995 <= PATCHES.units(*image.size, most) <= worst


@pytest.mark.parametrize(
    ("plan", "size"),
    [
        (limited(13), (1792, 1344)),  # of equal grids the squarest
        (plausible_plan(workload=Workload(image_size=(640, 480))), (640, 480)),  # as promised
    ],
    ids=["tiles", "promised"],
)
def test_the_size_of_the_worst_image(plan: Plan, size: tuple[int, int]) -> None:
    image = worst_image(plan)
    assert image is not None
    assert image.size == size


def test_the_request_carries_the_limit_and_all_images() -> None:
    request = worst_request(limited(13, images_per_request=3), "name")
    assert request is not None
    body = request.body
    images = [x for x in body["messages"][0]["content"] if x["type"] == "image_url"]
    assert len(images) == 3
    assert (images[0]["image_url"]["max_dynamic_patch"], body["model"]) == (12, "name")
    image = worst_image(pixels(4, 3136))
    assert image is not None
    assert image.knobs == {"min_pixels": 3136, "max_pixels": 3136}


@pytest.mark.parametrize("session", [64, 4096])
@pytest.mark.parametrize("each", [1, 2])
def test_every_prompt_of_it_fits_the_session(session: int, each: int) -> None:
    """A server that counts one or two tokens a word, five around them, and refuses what is more."""
    plan = plausible_plan()
    plan = changed(plan, settings=replace(plan.engines[0].settings, session_len=session))
    questions: list[int] = []

    def count(question: worst_requests.ProbeRequest) -> int:
        tokens = 5 + each * question.body["prompt"].count(" a")
        questions.append(tokens)
        assert tokens + question.body["max_tokens"] <= session
        return tokens

    longest = worst_requests.longest_request(plan.engines[0], "m", None, 0, count)
    assert longest is not None
    count(longest)
    assert questions[-1] >= 0.9 * session
