"""Whatever a log or a page of metrics says: events, facts or nothing."""

from __future__ import annotations

from contextlib import suppress

from tests.hostile import hostile
from turbofit.core.errors import UsageError
from turbofit.core.struct import to_json
from turbofit.diagnose.explain import diagnose
from turbofit.observe.forecast import cached_tokens
from turbofit.observe.live import now_of
from turbofit.observe.log_events import CacheBudget, Slab
from turbofit.observe.log_reader import read_line


@hostile("logs")
def test_lines_become_events_or_nothing(data: bytes) -> None:
    budget: CacheBudget | None = None
    for text in data.decode("utf-8", "replace").splitlines():
        event = read_line(text)
        budget = event if isinstance(event, CacheBudget) else budget
        if budget and isinstance(event, Slab):
            assert cached_tokens(budget.budget, event, 64) >= 0
    with suppress(UsageError):
        now_of(data.decode("utf-8", "replace"))


@hostile("diagnose", examples=40)
def test_there_is_always_an_answer(data: bytes) -> None:
    with suppress(UsageError):  # a model or a machine that cannot be meant
        to_json(diagnose([data]))
