"""What a plan promises together is possible together: its images fit its context."""

from __future__ import annotations

import pytest

import turbofit
from tests.sweep import sweep
from turbofit.core.errors import TurbofitError
from turbofit.core.images import CrossRule
from turbofit.model.presets import known_presets, load_preset, preset_model

pytestmark = pytest.mark.slow

#: A template, a question and the answer of the request that readiness asks.
TEXT = 256


def seen() -> list[str]:
    """Every preset with images that is not another one's quantisation."""
    found = []
    for name in known_presets():
        try:
            model = preset_model(name)
        except TurbofitError:
            continue
        if model.image_rule is not None and load_preset(name).base is None:
            found.append(name)
    return found


@pytest.mark.parametrize("name", sweep(seen()))
def test_images_fit_the_context_or_are_refused_by_name(name: str) -> None:
    for images in (2, 8):
        plan = turbofit.plan(name, on="8xb200", images=images)
        limits, context = plan.limits, plan.settings.session_len
        if not plan.fits:
            assert f"{images} images of the largest size are" in plan.verdict
            continue
        assert limits.images_per_request == images
        assert limits.units_per_request == images * limits.units_per_image
        assert limits.image_tokens_per_request + TEXT <= context
        assert isinstance(plan.model.image_rule, CrossRule) or images <= (
            limits.image_tokens_per_request
        )


def test_the_limit_is_lowered_as_far_as_the_context_asks_and_said() -> None:
    plan = turbofit.plan("qwen2-vl-2b", on="1xrtx3090", images=4)
    assert plan.settings.session_len == 32_768
    assert 31_000 < plan.limits.image_tokens_per_request <= 32_768 - 1024
    said = next(reason for reason in plan.reasons if reason.startswith("max_pixels"))
    assert "4 images fit the context: at the model's own limit they take 65,536 tokens" in said


def test_what_both_were_set_is_refused_with_what_would_do() -> None:
    plan = turbofit.plan("qwen2-vl-2b", on="1xrtx3090", images=4, max_pixels=12_845_056)
    assert not plan.fits
    assert "4 images of the largest size are 65,536 tokens" in plan.verdict
    changes = [remedy.change for remedy in plan.remedies if remedy.effect.startswith("fits")]
    assert changes[:2] == ["--images 1", "leave --max-pixels to turbofit"]
    assert not any("GPU" in remedy.change or "GeForce" in remedy.change for remedy in plan.remedies)


@pytest.mark.parametrize("engine", ["turbomind", "pytorch", "transformers"])
def test_a_context_that_is_asked_for_is_kept_and_images_give_way(engine: str) -> None:
    plan = turbofit.plan("qwen2-vl-2b", on="1xa100-80g", images=2, context=4096, engine=engine)
    assert plan.fits
    assert plan.settings.session_len == 4096
    assert plan.limits.image_tokens_per_request + TEXT <= 4096
