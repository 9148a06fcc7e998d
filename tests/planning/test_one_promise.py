"""All that tells or holds how long a request may be says one length: that of the promise."""

from __future__ import annotations

import random
from collections.abc import Iterator
from typing import Any

import pytest
from msgspec.structs import replace

import turbofit
from tests.sweep import part
from turbofit.core.cluster import Cluster, Node
from turbofit.core.errors import TurbofitError
from turbofit.core.plan import Plan
from turbofit.gateway.http.about import about_plan, limits_in_words
from turbofit.gateway.http.refusals import Refusal
from turbofit.gateway.limits.ranges import scope_of
from turbofit.gateway.limits.request_limits import LimitedImage, check_request
from turbofit.machine.source import machine_from
from turbofit.measure.load.spec import LoadSpec
from turbofit.measure.tune_space import choices
from turbofit.planning.plan import plan, plan_cluster
from turbofit.planning.request import PlanRequest, WhichRequest
from turbofit.planning.resolve import resolve
from turbofit.planning.which import empty_row, serving
from turbofit.report.views.plan_view import promise_facts
from turbofit.serving.plan_gateway import bounds_of

_MODELS = (
    "internvl2-8b", "qwen2-vl-7b", "internvl2-2b", "qwen2.5-vl-7b", "internvl3-8b", "qwen2.5-7b",
    "gemma-3-12b", "llava-onevision-7b",
)  # fmt: skip
_CARDS = ("l4", "rtx3090", "rtx4090", "a10", "t4", "a100")


def drawn(seed: int, count: int) -> Iterator[tuple[PlanRequest, Plan]]:
    """Drawn plans that fit, many of which hold less than the context that was asked for."""
    draw = random.Random(seed)
    while count:
        on = f"{draw.choice((1, 1, 2))}x{draw.choice(_CARDS)}"
        on += draw.choice(("", f":free={draw.randint(8, 22)}GiB", f"+1x{draw.choice(_CARDS)}"))
        asked: dict[str, Any] = {}
        if draw.random() < 0.6:
            name = draw.choice(("session_len", "session_len", "context"))
            asked[name] = draw.choice((4096, 8192, 16_384, 32_768, 65_536))
        request = PlanRequest.of(model=draw.choice(_MODELS), on=on, **asked)
        try:
            found = plan(request, compares_limits=False)
        except TurbofitError:
            continue
        if found.fits:
            count -= 1
            yield request, found


def refused_from(found: Plan) -> int:
    """The least tokens of a prompt and an answer that the gateway refuses."""
    bounds = bounds_of(found)
    lengths = range(found.promise.context - 2, found.promise.context + 3)

    def refuses(tokens: int) -> bool:
        text = LimitedImage(knobs={}, units=0, tokens=0, text_tokens=tokens - 1)
        try:
            check_request(bounds, [text])
        except Refusal:
            return True
        return False

    return next(tokens for tokens in lengths if refuses(tokens))


@pytest.mark.slow
def test_a_request_may_be_as_long_everywhere() -> None:
    for request, found in drawn(130, part(200, 40)):
        context, words = found.promise.context, f"{found.promise.context:,} tokens"
        assert words in found.promise.words(found.model.image_rule)
        assert promise_facts(found)["context"].startswith(words)
        bounds = bounds_of(found)
        assert words in limits_in_words(bounds)[0]
        assert about_plan(found)["context"] == scope_of(bounds).context == context
        if found.takes_videos or found.promise.takes_images:
            assert refused_from(found) == context + 1
        asked = WhichRequest.of(**{**request.given(), "model": request.model})
        resolved = resolve(asked)
        row = serving(asked, resolved, empty_row("", "", resolved.machine))
        assert row.context == context
        machine = machine_from(request.on)
        nodes = tuple(
            Node(id=name, name=name, address=name, machine=machine) for name in ("a", "b")
        )
        whole = plan_cluster(request.changed(on=None), Cluster(source="", nodes=nodes))
        assert {node.promise.context for node in whole.plans} == {context}
        assert whole.promise is not None
        assert whole.promise.context == context


@pytest.mark.parametrize(
    ("model", "asked"),
    [("internvl2-8b", {"session_len": 32_768}), ("qwen2-vl-7b", {"session_len": 32_768})],
)
def test_a_session_that_the_cache_does_not_hold_is_not_promised(
    model: str, asked: dict[str, Any]
) -> None:
    """The report said 32,768 tokens, and the gateway refused above 21,504."""
    found = turbofit.plan(model, on="1xl4:free=19GiB", **asked)
    assert found.promise.context < found.engines[0].settings.session_len
    assert found.promise.context <= found.engines[0].kv.tokens
    assert f"{found.promise.context:,} tokens" in found.promise.words(found.model.image_rule)


def test_no_tuning_promises_less() -> None:
    """A trial with a shorter context was no less, if the option said so."""
    request = PlanRequest.of(model="internvl2-8b", on="1xl4:free=19GiB")
    usual, load = plan(request), LoadSpec(seconds=1, image_size=(1280, 720))
    found = choices(request, usual, load, 16, (0, 8))
    assert len(found) > 1
    rule = usual.model.image_rule
    for choice in found:
        assert choice.plan.promise == replace(usual.promise, requests=choice.plan.promise.requests)
        assert choice.plan.promise.keeps(usual.promise, rule)
        for engine in choice.plan.engines:
            assert engine.kv.tokens >= usual.promise.context


def test_a_later_plan_keeps_the_promise_or_does_not_fit() -> None:
    request = PlanRequest.of(model="internvl2-8b", on="1xl4:free=19GiB")
    first = plan(request)
    assert plan(request, promise=first.promise).promise == first.promise
    less = plan(request.changed(margin=1 << 30), promise=first.promise)
    assert not less.fits
    assert less.verdict.startswith("does not fit")
    assert plan(request.changed(margin=1 << 30)).promise.context < first.promise.context
