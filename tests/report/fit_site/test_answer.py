"""A plan in short."""

from __future__ import annotations

import msgspec

from tests.report.documents import planned
from turbofit.core.errors import UsageError
from turbofit.report.fit_site.site import answer_of, refused


def test_a_plan_that_never_starts_holds_nothing() -> None:
    plan = msgspec.structs.replace(planned("fits"), fits=False)
    answer = answer_of(plan)
    assert (answer.kv_tokens, answer.requests_at_once, answer.throughput) == (0, 0, None)


def test_a_refusal_says_its_hint() -> None:
    answer = refused(UsageError("no", hint="do this"))
    assert answer.verdict == "no; do this"
    assert answer.memory is None
