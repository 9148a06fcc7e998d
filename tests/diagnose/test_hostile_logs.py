"""Whatever a log or a page of metrics says: events, facts or nothing."""

from __future__ import annotations

from contextlib import suppress

from tests.hostile import hostile
from turbofit.core.errors import UsageError
from turbofit.core.struct import to_json
from turbofit.diagnose.explain import diagnose
from turbofit.observe.live import now_of
from turbofit.observe.pytorch_log import parse_pytorch_line
from turbofit.observe.transformers_log import fallback_line
from turbofit.observe.turbomind_log import CacheBudget, Slab, cached_tokens, parse_line


@hostile("logs")
def test_lines_become_events_or_nothing(data: bytes) -> None:
    budget: CacheBudget | None = None
    for text in data.decode("utf-8", "replace").splitlines():
        for parse in (parse_line, parse_pytorch_line, fallback_line):
            event = parse(text)
            budget = event if isinstance(event, CacheBudget) else budget
            if budget and isinstance(event, Slab):
                assert cached_tokens(budget.budget, event, 64) >= 0
    with suppress(UsageError):
        now_of(data.decode("utf-8", "replace"))


@hostile("diagnose", examples=40)
def test_there_is_always_an_answer(data: bytes) -> None:
    with suppress(UsageError):  # a model or a machine that cannot be meant
        to_json(diagnose([data]))
