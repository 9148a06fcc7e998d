"""The page of a tuning: what was best, its curve, the Pareto front, every trial."""

from __future__ import annotations

from typing import TYPE_CHECKING

from turbofit.report.page.blocks import paint, table
from turbofit.report.page.curve import Series, curve
from turbofit.report.page.frame import framed, tiles
from turbofit.report.page.tag import Markup, join, tag
from turbofit.report.views.run.load_view import seconds_text
from turbofit.report.views.run.tune_view import (
    curve_table,
    pareto,
    settings_text,
    trial_table,
    tune_notes,
)

if TYPE_CHECKING:
    from turbofit.core.tuning import Tuning

__all__ = ["tune_page"]


def tune_page(result: Tuning) -> str:
    """A tuning as HTML."""
    best = [place for place, one in enumerate(result.trials) if one.number == result.best]
    chosen = best[0] if best else None
    parts = [
        ("found", "What was found", paint(tune_notes(result))),
        ("curve", "The best over requests at once", _curve(result)),
        ("pareto", "Requests a second against the first token", _front(result)),
        ("trials", "Every trial beside its forecast",
         table(trial_table(result), sortable=True, chosen=chosen)),
    ]  # fmt: skip
    return framed(
        title=f"{result.model} tuned - turbofit",
        head=_head(result),
        sections=[part for part in parts if part[2]],
        made=f"turbofit {result.turbofit_version}, LMDeploy {result.lmdeploy}, measured "
        f"{result.created}.",
        document=result,
    )


def _head(result: Tuning) -> Markup:
    winner = result.winner
    cards = " + ".join(result.gpus)
    title = tag("h1", result.model, tag("small", f" on {cards}"))
    if winner is None or winner.measured is None:
        return join(title, tag("p", "Nothing was found.", class_="verdict bad"))
    seen = winner.measured
    return join(
        title,
        tag("p", settings_text(winner), class_="verdict"),
        tiles(
            [
                ("requests/s", f"{seen.requests_per_second:.2f}",
                 f"forecast {winner.forecast.requests_per_second:.2f}"),
                ("tokens/s", f"{seen.output_tokens_per_second:,.0f}", "of answers"),
                ("first token, median", seconds_text(seen.ttft_p50),
                 f"p90 {seconds_text(seen.ttft_p90)}"),
                ("a token, median", seconds_text(seen.tpot_p50),
                 f"p90 {seconds_text(seen.tpot_p90)}"),
            ]
        ),
    )  # fmt: skip


def _curve(result: Tuning) -> Markup:
    if not result.curve:
        return Markup()
    rate = [(float(one.concurrency), one.measured.requests_per_second) for one in result.curve]
    ends = [(float(one.concurrency), one.measured.e2e_p50) for one in result.curve]
    firsts = [(float(one.concurrency), one.measured.ttft_p50) for one in result.curve]
    times = [Series("whole answer", tuple(ends)), Series("first token", tuple(firsts))]
    return join(
        curve([Series("requests/s", tuple(rate))], x="requests at once", y="requests a second"),
        curve(times, x="requests at once", y="seconds, median"),
        paint([curve_table(result)]),
    )


def _front(result: Tuning) -> Markup:
    """Trials as points; a line through those that no other beats."""
    seen = [one for one in result.trials if one.measured is not None]
    best = pareto(result)
    points = {
        one.number: (one.measured.ttft_p90, one.measured.requests_per_second)
        for one in seen
        if one.measured is not None
    }
    names = {one.number: f"{one.number}: {settings_text(one)}" for one in seen}
    front = sorted((number for number in points if number in best), key=lambda n: points[n])
    others = [number for number in points if number not in best]
    series = [
        Series(
            "Pareto front", tuple(points[n] for n in front),
            names=tuple(names[n] for n in front),
        ),
        Series(
            "other trials", tuple(points[n] for n in others), joined=False,
            names=tuple(names[n] for n in others),
        ),
    ]  # fmt: skip
    return curve(series, x="TTFT p90, seconds", y="requests a second")
