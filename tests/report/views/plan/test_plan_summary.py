from __future__ import annotations

import msgspec
import pytest

import turbofit
from tests.support.plans import plausible_plan
from turbofit.core.messages import BEYOND, OWN_CODE, QUEUED
from turbofit.core.plan import Plan
from turbofit.report.painters.terminal import paint
from turbofit.report.views.plan_view import plan_view

SPECS = (
    ("internvl2-8b", "4xrtx3090"),
    ("qwen2-vl-7b", "2xrtx4090"),
    ("internvl2-8b", "rtx3090+rtx4090"),
    ("llava-1.5-7b", "1xl4:free=19GiB"),
    ("qwen2.5-7b", "1xrtx3090"),
    ("internvl2-26b", "1xrtx3060"),
)


@pytest.mark.parametrize(("model", "on"), SPECS)
def test_it_fits_a_terminal_and_has_the_verdict_the_promise_and_one_command(
    model: str, on: str
) -> None:
    plan = turbofit.plan(model, on=on)
    text = paint(plan_view(plan), short=True)
    lines = text.splitlines()
    assert len(lines) <= 26
    assert max(map(len, lines)) <= 80
    assert plan.verdict in " ".join(text.split())
    assert f"{plan.settings.session_len:,} tokens with the answer" in text
    queued = QUEUED in plan.warnings
    assert text.count("lmdeploy serve api_server") == (1 if plan.fits and not queued else 0)
    assert text.count("LMDeploy alone") == (1 if plan.fits else 0)
    assert text.count("turbofit serve ") == (1 if plan.fits else 0)
    if plan.fits and not queued:
        places = [text.index(one) for one in ("turbofit serve", "LMDeploy alone", "api_server")]
        assert places == sorted(places)
    assert lines[-1].startswith("more: --full")


def told(plan: Plan) -> str:
    return " ".join(paint(plan_view(plan), short=True).split())


def test_a_plan_that_holds_only_in_a_queue_hands_out_no_command_without_one() -> None:
    plan = turbofit.plan("qwen2-vl-7b", on="2xrtx4090")
    assert QUEUED in plan.warnings
    text = told(plan)
    assert "turbofit serve qwen2-vl-7b --images 1 --context 32768" in text
    assert "LMDeploy alone does not keep this plan" in text
    assert "api_server" not in text
    assert "api_server" in paint(plan_view(plan))
    assert not any(one.holds_limits for one in plan.commands)
    asked = turbofit.predict("qwen2-vl-7b", on="1xa100-80g", queue_images=True)
    assert "api_server" not in told(asked)


def test_what_was_assumed_of_the_machine_is_said_first_and_what_is_always_so_never() -> None:
    plan = turbofit.plan("internvl2-2b", on="1xV100")
    assert "- assumed: v100 was read as V100 SXM2 16 GB" in told(plan)
    assert OWN_CODE in plan.warnings
    assert OWN_CODE not in told(plan)
    assert "more warning" not in told(plan)
    both = turbofit.plan("qwen2-vl-2b", on="rtx4090+rtx3080")
    assert "rtx4090 was read as the 24 GB card" in told(both)
    assert "rtx3080 was read as the 10 GB card" in told(both)
    assert any(BEYOND in text for text in both.warnings)
    assert BEYOND not in told(both)
    alone = turbofit.plan("qwen2-vl-2b", on="1xrtx3090")
    assert [BEYOND in text for text in alone.warnings] == [True]
    assert "more warning" not in told(alone)


def test_of_several_warnings_the_plans_first_is_shown_and_the_others_are_counted() -> None:
    plan = plausible_plan()
    machine = msgspec.structs.replace(plan.machine, warnings=("of the machine",))
    plan = msgspec.structs.replace(
        plan, machine=machine, warnings=("of the machine", "of the plan", "of it too")
    )
    said = told(plan)
    assert "- of the plan (and 2 more warnings)" in said
    assert "of the machine" not in said


def test_the_largest_image_and_a_usual_one_stand_one_below_the_other() -> None:
    plan = turbofit.plan("qwen2-vl-7b", on="1xv100-32g")
    usual = plan.usual_image
    assert usual
    assert usual.image_tokens < plan.limits.image_tokens_per_request
    assert plan.throughput is not None
    assert usual.requests_per_second > plan.throughput.requests_per_second
    lines = paint(plan_view(plan), short=True).splitlines()
    (place,) = (i for i, line in enumerate(lines) if line.startswith("  worst size"))
    assert lines[place + 1].startswith(f"  1920x1080   {usual.requests_at_once:,} at once")
    assert "median error" not in told(plan)  # no figure of a vision model is published


@pytest.mark.parametrize(
    ("on", "said"),
    [("24GB", "assumed: 24GB has no preset"), ("a100-80g:mig=3g.40gb", "42 of 108 SMs")],
)
def test_what_all_figures_rest_on_is_in_the_short_text(on: str, said: str):
    text = " ".join(paint(plan_view(turbofit.plan("internvl2-2b", on=on)), short=True).split())
    assert said in text
    assert "assumed" not in paint(
        plan_view(turbofit.plan("internvl2-2b", on="1xrtx3090")), short=True
    )
