"""The tables of the site: each point is planned as `turbofit plan` would."""

from __future__ import annotations

import os
import signal
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from typing import TYPE_CHECKING

from turbofit.core.errors import TurbofitError
from turbofit.planning.plan import plan
from turbofit.report.fit_site.answer import SiteAnswer, SiteTable, SiteTexts, answer_of, refused
from turbofit.report.fit_site.choices import points

if TYPE_CHECKING:
    from collections.abc import Iterator

    from turbofit.report.fit_site.choices import SiteChoices, SitePoint

__all__ = ["table_of", "tables"]


def tables(choices: SiteChoices, jobs: int | None = None) -> Iterator[SiteTable]:
    """A table for each model on each card, in processes beside each other.

    Args:
        choices: of the site.
        jobs: processes; by default one for each CPU.
    """
    pairs = [(model.name, card.name) for model in choices.models for card in choices.cards]
    processes = min(jobs or os.cpu_count() or 1, len(pairs))
    if processes == 1:
        yield from (table_of(choices, *pair) for pair in pairs)
        return
    # Ctrl-C reaches all of a terminal's processes: each ends at once, without a traceback.
    with ProcessPoolExecutor(
        processes,
        get_context("spawn"),
        initializer=signal.signal,
        initargs=(signal.SIGINT, signal.SIG_DFL),
    ) as pool:
        yield from pool.map(table_of, [choices] * len(pairs), *zip(*pairs, strict=True))


def table_of(choices: SiteChoices, model: str, card: str) -> SiteTable:
    """The answers for one model on one card."""
    texts = SiteTexts()
    numbers: dict[SiteAnswer, int] = {}
    order = [
        numbers.setdefault(_answer(point, model, card, texts), len(numbers))
        for point in points(choices)
    ]
    return SiteTable(
        model=model, card=card, texts=texts.all(), answers=tuple(numbers), order=tuple(order)
    )


def _answer(point: SitePoint, model: str, card: str, texts: SiteTexts) -> SiteAnswer:
    try:
        return answer_of(plan(point.request(model, card)), texts)
    except TurbofitError as exc:
        return refused(exc, texts)
