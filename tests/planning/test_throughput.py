"""What a plan tells of speed: each figure with the word of its kind, and none that is not known."""

from __future__ import annotations

import re
from collections.abc import Iterator
from itertools import product

import pytest

import turbofit
from tests.sweep import sweep
from turbofit.core.errors import TurbofitError
from turbofit.core.forecast import Surety
from turbofit.core.plan import Plan
from turbofit.machine.presets import preset_names
from turbofit.machine.spec import parse_spec
from turbofit.model.presets import known_presets, preset_model
from turbofit.planning import throughput
from turbofit.planning.throughput import UNSEEN, Errors, kind_of, surety_of, surety_of_speed
from turbofit.report.painters.terminal import paint
from turbofit.report.views.plan_view import plan_view

#: A prime: the sample has all cards and models, in ever other pairs.
_STEP = 661
#: All pairs take the better part of an hour of one core, which several workers share.
_PARTS = 4


def kind(model: str, on: str, engine: str = "turbomind", *, images: bool = False) -> str:
    return kind_of(preset_model(model), engine, parse_spec(on).gpus, images=images)


def test_what_has_other_errors_is_another_kind() -> None:
    assert (
        kind("qwen2.5-7b", "1xa100-80g") == kind("qwen2-vl-7b", "1xh100") == "text with turbomind"
    )
    assert kind("qwen2-vl-7b", "1xh100", images=True) == "images in patches with turbomind"
    assert kind("internvl2-8b", "1xt4", images=True) == (
        "images in tiles with turbomind on cards before Ampere"
    )
    assert kind("mixtral-8x7b", "2xa100-80g", "pytorch") == "text of experts with pytorch"
    assert kind("qwen3.5-27b", "1xh200") == "text of delta nets with turbomind"
    slow = "text of experts and delta nets with turbomind on cards before Ampere"
    assert kind("qwen3.6-35b-a3b-awq", "1xv100-32g") == slow
    slow = "text with turbomind on cards without tensor cores"
    assert kind("qwen2.5-1.5b-awq", "gtx1660super:total=6GiB") == slow
    slow = "text with turbomind on cards whose rates nobody knows"
    assert kind("qwen2.5-1.5b-awq", "rtxa5500:total=24GiB") == slow


def test_a_word_is_of_its_kind_and_cards(monkeypatch: pytest.MonkeyPatch) -> None:
    def errors(times: float, *cards: str) -> Errors:
        return Errors(figures=9, median=0.1, p90=0.2, times=times, worst=times, cards=cards)

    known = {
        "fitted": errors(1.2, "NVIDIA L4"), "both": errors(1.2, "NVIDIA L4"),
        f"both, {UNSEEN}": errors(1.4, "NVIDIA A10", "Tesla T4"),
        f"one, {UNSEEN}": errors(1.9, "Tesla T4"), "far": errors(2.1, "NVIDIA L4"),
    }  # fmt: skip
    monkeypatch.setattr(throughput, "errors_of", lambda: known)

    def word(kind: str, on: str) -> str:
        return surety_of(kind, parse_spec(on).gpus).word

    assert [word("fitted", on) for on in ("1xl4", "1xa10")] == ["good", "fair"]
    assert [word("both", on) for on in ("1xl4", "1xa10", "1xa40")] == ["good", "fair", "fair"]
    assert [word("one", on) for on in ("1xt4", "1xl4")] == ["rough", "order"]
    assert [word("far", on) for on in ("1xl4", "1xt4")] == ["order", "order"]
    assert word("none", "1xl4") == "unknown"


def test_why_no_speed_is_told() -> None:
    model, gpus = preset_model("qwen3-30b-a3b"), parse_spec("1xa100-80g").gpus
    why = surety_of_speed(model, "turbomind", gpus, images=False).why
    assert why == "nobody has measured text of experts with turbomind"
    dense, cards = preset_model("qwen2.5-1.5b-awq"), parse_spec("gtx1660super:total=6GiB").gpus
    why = surety_of_speed(dense, "turbomind", cards, images=False).why
    assert "on cards without tensor cores" in why
    assert "too far off" in why
    assert "gave 20.6 to 217 tokens/s, 1 to 32 at once" in why
    other = parse_spec("1xrtx3090").gpus
    assert "gave" not in surety_of_speed(model, "pytorch", other, images=False).why  # other cards


def figures_of(plan: Plan) -> Iterator[tuple[float | None, Surety]]:
    """All forecasts of a plan, each with the surety of its kind."""
    speed = plan.throughput
    assert speed is not None
    rate, among, alone = speed.surety, speed.first_token, speed.first_token_alone
    assert rate is not None
    assert among is not None
    assert alone is not None
    yield from ((speed.requests_per_second, rate), (speed.output_tokens_per_second, rate))
    yield from ((speed.seconds_to_first_token, among), (speed.seconds_to_first_token_alone, alone))
    if plan.promise.limits.vision_unit:
        assert speed.first_token_of_text is not None
        yield speed.seconds_to_first_token_of_text, speed.first_token_of_text
    if speed.host:
        yield speed.host.gpu_images_per_second, rate
    if usual := plan.usual_image:
        yield usual.requests_per_second, rate
        yield usual.seconds_to_first_token, among
        yield usual.seconds_to_first_token_alone, alone
    for cost in plan.limit_costs:
        yield from ((cost.requests_per_second, rate), (cost.seconds_to_first_token, alone))
    yield from ((candidate.score, rate) for candidate in plan.considered[:1])


def tells_what_is_known(plan: Plan) -> None:
    speed = plan.throughput
    assert speed is not None
    for figure, sure in figures_of(plan):
        assert (figure is not None) == sure.known, (plan.title, figure, sure)
    short, whole = (
        " ".join(paint(plan_view(plan), short=short).split()) for short in (True, False)
    )
    if not speed.surety.known:
        assert speed.surety.why in short
        for text in (short, whole):
            assert not re.search(
                r"\d requests/s|output tokens/s|times the requests|% of a step", text
            )
    else:
        assert re.search(r"requests/s[^()]*\((\w+)\)", short)[1] == speed.surety.word
    images = plan.promise.limits.vision_unit is not None
    of_text = speed.first_token_of_text if images else speed.first_token_alone
    assert re.findall(r" s of text \((\w+)\)", short) == [of_text.word] * of_text.known
    of_image = re.findall(r" s of (?:\d+x\d+|the largest images) \((\w+)\)", short)
    assert of_image == [speed.first_token_alone.word] * (images and speed.first_token_alone.known)


def pairs() -> list[tuple[str, str]]:
    return sweep(product(sorted(known_presets()), preset_names()), _STEP)


@pytest.mark.parametrize("part", range(_PARTS))
def test_no_figure_of_a_refused_kind_and_no_other_word(part: int) -> None:
    seen = set()
    for model, card in pairs()[part::_PARTS]:
        try:
            plan = turbofit.plan(model, on=f"1x{card}")
        except TurbofitError:  # no engine runs it on this card
            continue
        if plan.fits and plan.throughput is not None:
            tells_what_is_known(plan)
            seen.add(plan.throughput.surety.known)
    assert seen


@pytest.mark.parametrize(
    ("model", "on", "told"),
    [
        ("qwen3-30b-a3b", "1xa100-80g", False),
        ("qwen3.6-35b-a3b-awq", "1xv100-32g", False),
        ("internvl2-2b", "1xt4,cores=4", False),
        ("internvl2-8b", "1xrtx3090,cores=4", True),
        ("llava-1.5-7b", "4xrtx3090", False),
        ("qwen2.5-7b", "2xrtx4090", True),
        ("qwen2.5-7b", "1xrtx2080ti-22g", True),
    ],
)
def test_these_are_told_and_those_are_not(model: str, on: str, *, told: bool) -> None:
    plan = turbofit.plan(model, on=on)
    assert plan.fits
    tells_what_is_known(plan)
    assert plan.throughput.surety.known == told
