"""Reasons name limits where there are any, and count in whole words."""

from __future__ import annotations

import turbofit
from turbofit.report.painters.markdown import paint
from turbofit.report.views.plan.plan_view import plan_view


def test_a_model_whose_images_have_no_limit_is_said_to_have_none() -> None:
    plan = turbofit.plan("llava-1.5-7b", on="1xrtx3090")
    assert not [why for why in plan.reasons if why.startswith("max_dynamic_patch")]
    text = paint(plan_view(plan))
    assert "max_dynamic_patch" not in text
    assert "1 image a request" in text
    for wrong in ("(s)", "1 tiles", "1 replicas", "1 images"):
        assert wrong not in text


def test_what_a_client_may_ask_beyond_a_plan_is_explained_in_both() -> None:
    plan = turbofit.plan("internvl2-8b", on="1xrtx3090")
    assert plan.limits.max_dynamic_patch == 12
    (why,) = (why for why in plan.reasons if why.startswith("max_dynamic_patch"))
    assert why.startswith("max_dynamic_patch 12: the model's own")
    assert "detail: high is 24" in why
    told = turbofit.predict("internvl2-8b", on="1xrtx3090")
    assert told.limits.max_dynamic_patch == 24
    assert any("up to 24 tiles" in why and "own max_dynamic_patch is 12" in why
               for why in told.reasons)  # fmt: skip
    own = turbofit.predict("internvl2-8b", on="1xrtx3090", max_dynamic_patch=12)
    assert not any("detail: high" in why for why in own.reasons)
