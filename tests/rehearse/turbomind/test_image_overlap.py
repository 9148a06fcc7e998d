from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from msgspec.structs import replace

import turbofit.api
from tests.rehearse.conftest import Rehearse, forward_pool
from turbofit.core.plan import Plan
from turbofit.rehearse.checkpoint.twin import checkpoint_for
from turbofit.rehearse.document import rehearse
from turbofit.rehearse.planned import plan_spec
from turbofit.rehearse.turbomind.image_overlap import (
    Image,
    Prompt,
    Room,
    most_met,
    queue,
    worst_cases,
)

#: A batch and no queue, so that the images of whole requests fill what is paid for.
EIGHT: dict[str, Any] = {"max_batch_size": 8, "queue_images": False}


def prompt(lead: int, units: int, tokens: int, rest: int) -> Prompt:
    """With one image."""
    return Prompt(lead, (Image(units, tokens),), rest)


def test_prompts_that_meet_in_a_forward() -> None:
    # 8320 tokens: two prompts of 3330, and of the third what is left, which has its image's head.
    four = [prompt(1, 13, 3328, 1)] * 4
    assert most_met(four, Room(8320, 32768)) == 39
    # As long as the context at most.
    assert most_met(four, Room(8320, 6660)) == 26
    assert most_met(four, Room(8320, 6659)) == 13
    assert most_met([prompt(0, 13, 3328, 0)], Room(8192, 100)) == 0
    # The second prompt's image begins at its 64th token: 63 tokens of room do not reach it.
    long = prompt(8192 - 3328 - 63, 13, 3328, 0)
    assert most_met([long, prompt(63, 1, 256, 1)], Room(8192, 32768)) == 13
    assert most_met([long, prompt(0, 1, 256, 1)], Room(8192 + 1, 32768)) == 14
    # An image is encoded in every chunk that it lies in.
    cut = prompt(4096 + 1 - 3328, 13, 3328, 8)
    assert most_met([cut], Room(4104, 32768)) == 13
    assert most_met([cut, prompt(1, 13, 3328, 1)], Room(4104, 32768)) == 26
    # Of an engine that encodes it once it counts where it begins.
    assert most_met([cut, prompt(1, 13, 3328, 1)], Room(4104, 32768, again=False)) == 13


def aimed(plan: Plan) -> tuple[int, int]:
    """What the queue brings together by the scheduler's rule, and the bound that is paid for."""
    rule, settings = plan.model.image_rule, plan.settings
    assert rule is not None
    sent = queue(plan, rule, plan.limits.units_per_image)
    assert len(sent) <= settings.max_batch_size
    found = []
    for request in sent:
        (unit,) = request.units
        tiles = isinstance(unit, int)
        units = unit if tiles else unit[1] * unit[2]
        tokens = units * 256 if tiles else units // 4
        assert request.lead is not None
        rest = request.text_tokens - request.lead
        found.append(prompt(request.lead, units, tokens, rest))
    forward = settings.max_prefill_token_num + settings.max_batch_size
    return most_met(found, Room(forward, settings.session_len)), plan.limits.units_per_forward


@pytest.mark.parametrize(
    ("model", "on", "options"),
    [
        ("internvl2-8b", "1xrtx3090", {}),
        ("internvl2-8b", "1xrtx3090", {"max_prefill_token_num": 8192, "max_batch_size": 128}),
        ("internvl2-8b", "1xrtx3090", {"max_prefill_token_num": 2048}),
        ("internvl2-40b-awq", "1xa100-40g", {}),  # a context of 8,192, less than a forward
        ("internvl3.5-4b", "1xt4", {}),
        ("qwen2-vl-7b", "1xrtx3090", {}),
        ("qwen2.5-vl-7b", "1xv100-32g", {}),  # a context that three images fit
        ("qwen2-vl-2b", "1xrtx3060", {"max_batch_size": 2}),
    ],
)
def test_nearly_as_many_meet_as_the_account_pays_for(
    model: str, on: str, options: dict[str, Any]
) -> None:
    options = {"tp": 1, "replicas": 1, "engine": "turbomind", "queue_images": False, **options}
    met, paid = aimed(turbofit.api.plan(model, on=on, **options))
    assert 0.96 * paid <= met <= paid


def forward(plan: Plan, units: int | None = None) -> list[tuple[tuple[Any, ...], int | None]]:
    """Units and images of the fullest forward's requests, where a gateway lets so many through."""
    if units is not None:
        plan = replace(plan, limits=replace(plan.limits, units_per_forward=units))
    (case,) = (case for case in worst_cases(plan) if case.name == "vision_forward")
    return [(request.units, request.images) for request in case.requests]


def test_a_prefix_cache_is_asked_again_about_what_it_has_seen() -> None:
    keywords: dict[str, Any] = {"on": "1xrtx3090", "enable_prefix_caching": True}
    plan = turbofit.api.plan("internvl2-8b", **EIGHT, **keywords)
    cases = {case.name: case.requests for case in worst_cases(plan)}
    assert cases["vision_request"][0].images == 1
    again = forward(plan)
    assert {images for _, images in again} == {1}
    assert sum(sum(units) for units, _ in again) == plan.limits.units_per_forward
    # A gate leaves room for a smaller image.
    plan = turbofit.api.plan("internvl2-8b", **keywords)
    assert forward(plan, 60) == [*[((13,), 1)] * 4, ((8,), None)]


def _sent(plan: Plan, gate: int | None = None) -> list[list[int]]:
    """Units of the images of each request of the case, in its order."""
    return [
        [unit if isinstance(unit, int) else unit[1] * unit[2] for unit in units]
        for units, _ in forward(plan, gate)
    ]


@pytest.mark.parametrize("gate", [65536, 70000, 86016, 100000])
def test_unequal_images_fill_what_the_gateway_lets_through(gate: int) -> None:
    plan = turbofit.api.plan("qwen2-vl-2b", on="1xrtx3060")
    sent = [sum(request) for request in _sent(plan, gate)]
    assert max(sent) <= plan.limits.units_per_image == 65536
    assert gate - 64 <= sum(sent) <= gate


@pytest.mark.parametrize("prefix", [False, True])
def test_several_images_a_request_meet_too(prefix: bool) -> None:
    options: dict[str, Any] = {"images": 4, "enable_prefix_caching": prefix, **EIGHT}
    plan = turbofit.api.plan("internvl2-8b", on="1xrtx3090", **options)
    sent, limits = _sent(plan), plan.limits
    assert all(len(request) <= 4 and sum(request) <= limits.units_per_request for request in sent)
    assert any(len(request) > 1 for request in sent)
    assert len(sent) <= plan.settings.max_batch_size
    met = sum(map(sum, sent))
    assert limits.units_per_forward - 1 <= met <= limits.units_per_forward


def test_one_row_meets_the_images_of_one_request() -> None:
    plan = turbofit.api.plan(
        "qwen2.5-vl-3b", on="1xrtx3060", images=2, max_batch_size=1, engine="turbomind"
    )
    assert _sent(plan) == [[plan.limits.units_per_image] * 2]


def test_a_cache_that_holds_no_image_is_asked_for_one_all_the_same() -> None:
    told = turbofit.api.predict("internvl2-8b", on="1xrtx3090", cache_max_entry_count=0.004)
    assert told.model.image_rule is not None
    (one,) = queue(told, told.model.image_rule, 13)
    assert one.units == (13,)


@pytest.mark.lmdeploy
@pytest.mark.exhaustive  # a plan's worst mix meets in the engine in `test_planned`, too
@pytest.mark.parametrize(
    ("model", "on", "options", "gate"),
    [
        ("qwen2-vl-2b", "1xrtx3060", {}, 86016),
        (
            "internvl2-8b", "1xrtx3090", {"images": 4, "enable_prefix_caching": True, **EIGHT},
            None,
        ),
    ],
)  # fmt: skip
def test_the_engine_brings_a_mix_together(
    run: Rehearse, tmp_path: Path, model: str, on: str, options: dict[str, Any], gate: int | None
) -> None:
    """With a prefix cache too; of one image a request without one see `test_planned`."""
    plan = turbofit.api.plan(model, on=on, **options)
    paid = plan.limits.units_per_forward
    if gate is not None:
        plan = replace(plan, limits=replace(plan.limits, units_per_forward=gate))
    document = rehearse(plan_spec(plan, checkpoint_for(plan.model, tmp_path)))
    assert document["outcome"] == "served"
    seen, bound = forward_pool(plan, document)
    bound = bound * (gate or paid) // paid
    assert 0.96 * bound <= seen <= bound
