"""A plan in short."""

from __future__ import annotations

import msgspec

from tests.report.documents import planned
from turbofit.core.errors import UsageError
from turbofit.report.fit_site.tables import SiteTexts, answer_of, refused
from turbofit.report.views.plan.memory_view import KINDS


def test_the_bar_adds_up() -> None:
    texts = SiteTexts()
    answer = answer_of(planned("fits"), texts)
    assert answer.memory is not None
    assert len(answer.memory.pieces) == len(KINDS)
    assert sum(answer.memory.pieces) == answer.memory.total
    assert answer.kv_tokens == planned("fits").kv.total_tokens
    assert texts.all()[answer.verdict] == planned("fits").verdict


def test_a_plan_that_never_starts_holds_nothing() -> None:
    plan = msgspec.structs.replace(planned("fits"), fits=False)
    answer = answer_of(plan, SiteTexts())
    assert (answer.kv_tokens, answer.requests_at_once, answer.speed) == (0, 0, None)


def test_a_refusal_says_its_hint() -> None:
    texts = SiteTexts()
    answer = refused(UsageError("no", hint="do this"), texts)
    assert texts.all()[answer.verdict] == "no; do this"
    assert answer.memory is None
