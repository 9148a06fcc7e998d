from __future__ import annotations

import base64
import struct

import msgspec
import pytest

from turbofit import api
from turbofit.core.plan import Plan
from turbofit.launch.readiness import questions
from turbofit.model.images import unit_tokens, units


def sizes(body: dict) -> list[tuple[tuple[int, int], dict]]:
    found = []
    for part in body["messages"][0]["content"]:
        if part["type"] == "image_url":
            fields = dict(part["image_url"])
            raw = base64.b64decode(fields.pop("url").partition(",")[2])
            found.append((struct.unpack(">II", raw[16:24]), fields))
    return found


def asked_units(plan: Plan, body: dict) -> int:
    return sum(units(plan.model.image_rule, *size, **fields) for size, fields in sizes(body))


@pytest.mark.parametrize("model", ["internvl2-8b", "internvl2-1b", "qwen2-vl-7b", "qwen2.5-vl-7b"])
@pytest.mark.parametrize("on", ["1xrtx3090", "1xa100-80gb", "2xl4"])
def test_one_request_holds_the_worst_forward(model: str, on: str) -> None:
    plan = api.plan(model, on=on)
    assert plan.fits
    first, *more = questions(plan, "m")
    assert asked_units(plan, first.bodies[0]) == plan.limits.units_per_request
    for question in more:
        (body,) = question.bodies
        got = asked_units(plan, body)
        assert plan.limits.units_per_request < got <= plan.limits.units_per_forward
        if plan.limits.units_per_forward * 1.1 < plan.settings.session_len:
            assert got >= 0.98 * plan.limits.units_per_forward
        assert unit_tokens(plan.model.image_rule, got) < plan.settings.session_len


def test_a_text_model_is_asked_nothing() -> None:
    plan = api.plan("qwen2.5-7b", on="1xrtx3090")
    assert questions(plan, "m") == []


def test_where_the_decoder_decides_the_second_is_left_out() -> None:
    plan = api.plan("internvl2-8b", on="1xrtx3090")
    ledger = tuple(
        msgspec.structs.replace(term, worst=term.term == "text_prefill")
        for term in plan.gpus[0].ledger
    )
    gpus = (msgspec.structs.replace(plan.gpus[0], ledger=ledger),)
    assert len(questions(msgspec.structs.replace(plan, gpus=gpus), "m")) == 1
