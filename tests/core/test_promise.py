"""What clients may count on, and whether a later plan keeps it."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
from msgspec.structs import replace

import turbofit
from tests.support.gateway import PATCHES, TILES, limits_for, promise_for
from turbofit.core.errors import UsageError
from turbofit.core.plan import Plan

_TURBOFIT = Path(turbofit.__file__).parent


def test_a_promise_is_kept_by_no_less_context_images_and_size() -> None:
    promise = promise_for(limits_for(TILES, limit=6, images=2), 8192)
    assert promise.keeps(promise, TILES)
    more = promise_for(limits_for(TILES, limit=12, images=3), 16_384)
    assert more.keeps(promise, TILES)
    for less, why in (
        (replace(promise, context=8191), "holds 8,191 tokens"),
        (promise_for(limits_for(TILES, limit=5, images=2), 8192), "images of 5 tiles at most"),
        (promise_for(limits_for(TILES, limit=6, images=1), 8192), "1 of 2 images"),
    ):
        assert not less.keeps(promise, TILES)
        assert why in promise.why_broken(less, TILES)


def test_how_many_run_at_once_is_no_promise_to_a_client() -> None:
    promise = promise_for(limits_for(TILES), 8192)
    assert replace(promise, requests=0).keeps(promise, TILES)


def test_the_words_have_the_context_that_is_promised() -> None:
    promise = promise_for(limits_for(TILES, limit=12, images=1), 21_504)
    assert promise.words(TILES).endswith("21,504 tokens in all")
    assert "13 tiles" in promise.words(TILES)
    assert "1920x1080" in promise.words(TILES, "1920x1080")
    text = promise_for(limits_for(TILES, vision_unit=None), 4096)
    assert text.words(None) == "4,096 tokens a request, with its answer"
    pixels = promise_for(limits_for(PATCHES, limit=1_003_520, images=1), 32_768)
    assert "1 MP" in pixels.words(PATCHES)


def test_an_image_of_one_token_is_counted_in_the_singular() -> None:
    plan = turbofit.plan("llama-3.2-11b-vision", on="v100-32g")
    assert "(1 token)" in plan.promise.words(plan.model.image_rule)


def test_the_largest_image_leaves_a_token_of_the_context_for_text() -> None:
    limits = limits_for(TILES, limit=12, images=1)
    units, tokens = promise_for(limits, 2048).largest_image(TILES)
    assert units < 13
    assert tokens < 2048
    assert promise_for(limits, 32_768).largest_image(TILES)[0] == 13


def test_figures_that_stand_twice_in_a_document_are_equal() -> None:
    plan = turbofit.plan("internvl2-2b", on="1xl4")
    for name, wrong in (("images", 2), ("image_limit", 1)):
        document = plan.to_dict()
        document["promise"][name] = wrong
        with pytest.raises(UsageError, match="those of its limits"):
            Plan.from_json(json.dumps(document))


def _lines(pattern: str, *, but: tuple[str, ...]) -> list[str]:
    found = []
    for path in _TURBOFIT.rglob("*.py"):
        name = path.relative_to(_TURBOFIT).as_posix()
        if not name.startswith(but):
            found += [
                f"{name}: {line.strip()}"
                for line in path.read_text(encoding="utf-8").splitlines()
                if re.search(pattern, line)
            ]
    return found


def test_no_engine_speaks_for_all_outside_planning() -> None:
    told: dict[str, Any] = {"core/plan.py": "a hint", "api.py": "an example"}
    assert not _lines(r"\.smallest\b|engines\[0\]", but=("planning/", *told))


def test_one_function_makes_promises() -> None:
    (made,) = _lines(r"(?<!class )\bPromise\(", but=("core/promise.py",))
    assert made.startswith("planning/plan_document.py")
