"""Writes RESULTS.md, and computes the errors that plans show."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from datetime import date
from statistics import median
from typing import Any

from bench.page import table
from bench.speed.fit import FITTED, fit
from bench.speed.forecast import Setup
from bench.speed.rows import Row
from bench.speed.score import Score, curves, median_of, order, p90_of
from bench.speed.sureties import kinds
from turbofit.planning.speed import rates
from turbofit.planning.throughput import Errors

#: The bars of the issue: median, nine of ten, curves within a factor of two, pairs in order.
_MEDIAN, _P90, _PAIRS = 0.25, 0.6, 0.9
#: Rows that are off by more are named.
_FAR = 0.15
#: The bar of each row of images.
_TIMES = 1.5


class Results:
    """Scores of rows: with their source left out, as shipped, and of rows that fit nothing."""

    def __init__(
        self,
        left_out: Sequence[Score],
        shipped: Sequence[Score],
        unseen: Sequence[Score] = (),
        images: Sequence[Score] = (),
    ) -> None:
        self.left_out, self.shipped, self.unseen, self.images = left_out, shipped, unseen, images
        self.judged = [one for one in left_out if one.setup.row.of_lmdeploy]
        self.shipped_judged = [one for one in shipped if one.setup.row.of_lmdeploy]

    @property
    def setups(self) -> list[Setup]:
        """The setups of all scored rows."""
        return [one.setup for one in self.left_out]

    @property
    def kinds(self) -> dict[str, Errors]:
        """The errors of each kind of forecast for LMDeploy."""
        images = [one for one in self.images if one.setup.row.of_lmdeploy]
        return kinds(self.judged, self.unseen, images)


HEAD = """\
# The forecast of speed beside published figures

{day}. Made by `python -m bench.speed --write` from `rows.jsonl`;
computed, no GPU. An error is forecast over published, less one: plus is too
fast (over). *Left out*: under constants that were fitted without the row's source. *As
shipped*: under those of `presets/engines/throughput.yaml`. The bars are of LMDeploy's
engines with the source left out.

{bars}

## By kind

What a plan tells of its own kind (`presets/engines/surety.yaml`), and by the nine of ten whether
it prints a figure at all: within a factor of two. *Other cards*: rows that no constant was fitted
to. First tokens under load of LMDeploy before 0.5 are of schedulers that are gone, and in no kind.

{kinds}

## Images

Requests a second; of a tower, images. *Fit*: a constant was measured in that run, with others.
*Past*: of code that 0.18 has no more (its tower ran in Transformers' code), and in no kind. All
others judge. LMDeploy's other rows are of two cards that we had for a quarter of an hour each:
nobody has published the speed of a vision model with today's LMDeploy, image size and host told.
{of_images}

{images}

## Cards that no fit has seen

These rows judge and fit nothing. The forecast is as shipped.

{unseen}

## By source and engine

{sources}

## By version of the engine

A factor for a version would be the inverse of one plus its signed median. There is none:
the engines before 0.3 are within some percent of the forecast, and those after it lie on
both sides. lmdeploy#4953 has two versions of one model on one card, 26 % apart: no
forecast can be right of both; 0.17 is the slower one (over).

{versions}

## Constants

{constants}

## Best batch of a curve

{curves}

## Rows of LMDeploy that are off by more than 15 %

{far}

## Seconds to the first token

Not fitted, no bar. Where requests start together, all wait for all prefills.

{first_tokens}

## What is assumed

{assumed}
"""


def report(results: Results, day: date) -> str:
    """Return the whole of RESULTS.md."""
    far = [
        (one.setup.row.id, f"{one.error:+.1%}", f"{also.error:+.1%}")
        for one, also in zip(results.judged, results.shipped_judged, strict=True)
        if max(abs(one.error), abs(also.error)) > _FAR
    ]
    best = [
        (c.name, c.published, c.forecast, "yes" if c.held else "**no**")
        for c in curves(results.left_out)
    ]
    return HEAD.format(
        day=day, bars=_bars(results), constants=_constants(results),
        sources=_groups(results, lambda row: f"{row.source}, {row.engine}"),
        versions=_groups(results, lambda row: f"{row.engine} {row.version}"),
        curves=table("curve | published | left out | within a factor of two", best),
        far=table("row | left out | as shipped", far),
        first_tokens=_first_tokens(results), assumed=_assumed(results),
        kinds=_kinds(results), images=_images(results), unseen=_unseen(results.unseen),
        of_images=_of_images(results),
    )  # fmt: skip


def _bars(results: Results) -> str:
    def reached(scores: Sequence[Score]) -> tuple[Any, ...]:
        held = [one.held for one in curves(scores)]
        right, pairs = order(scores)
        told = (f"{sum(held)} of {len(held)}", f"{right} of {pairs}")
        return median_of(scores), p90_of(scores), *told, all(held), right >= _PAIRS * pairs

    median, p90, held, right, all_held, in_order = reached(results.judged)
    also = reached(results.shipped_judged)
    bars = (
        (f"median error at most {_MEDIAN:.0%}", f"{median:.1%}", median <= _MEDIAN,
         f"{also[0]:.1%}"),
        (f"nine of ten within {_P90:.0%}", f"{p90:.1%}", p90 <= _P90, f"{also[1]:.1%}"),
        ("best batch of every curve within a factor of two", held, all_held, also[2]),
        (f"{_PAIRS:.0%} of pairs of settings in order", right, in_order, also[3]),
    )  # fmt: skip
    rows = [(bar, seen, "met" if met else "**missed**", too) for bar, seen, met, too in bars]
    sources = {one.setup.row.source for one in results.judged}
    told = f"{len(results.judged)} figures of LMDeploy, {len(sources)} sources, "
    told += f"{len({_card(one) for one in results.judged})} cards."
    return f"{told}\n\n{table('bar | left out | | as shipped', rows)}"


def _kinds(results: Results) -> str:
    rows = [
        (kind, one.figures, f"{one.median:.1%}", f"{one.p90:.1%}", f"{one.worst:.2f} times",
         f"{one.times:.2f} times", len(one.cards))
        for kind, one in results.kinds.items()
    ]  # fmt: skip
    return table("kind | figures | median | p90 | worst | nine of ten | cards", rows)


def _of_images(results: Results) -> str:
    """Say whether TurboMind's images are within the goals for each row and the median."""
    ours = [
        one
        for one in results.images
        if one.setup.row.engine == "turbomind" and not one.setup.row.past
    ]
    if not ours:
        return ""
    worst, middle = max(one.times_off for one in ours), median_of(ours)
    met = "met" if worst <= _TIMES and middle <= _MEDIAN else "**missed**"
    return (
        f"TurboMind's {len(ours)}: median {middle:.1%}, worst {worst:.2f} times; each within"
        f" {_TIMES:g} times and the median within {_MEDIAN:.0%} is {met}."
    )


def _images(results: Results) -> str:
    rows = [
        (one.setup.row.id, f"{one.setup.row.engine} {one.setup.row.version}", _card(one),
         _part(one.setup.row), f"{one.published:.3g}", f"{one.forecast:.3g}",
         f"{one.error:+.0%}", f"{one.setup.row.source}: {one.setup.row.why}")
        for one in results.images
    ]  # fmt: skip
    return table("row | engine | card | | seen | forecast | error | source", rows)


def _part(row: Row) -> str:
    """Return the use of a row of images: no use today, a fit, or (empty) a judgement."""
    if row.past:
        return "past"
    return "" if row.judges else "fit"


def _unseen(scores: Sequence[Score]) -> str:
    """Return errors by card, model and bits of keys and values, also of the first and last row."""
    groups: dict[tuple[str, ...], list[Score]] = {}
    for one in scores:
        row = one.setup.row
        bits = f"{row.quant_policy or 16} bits"
        if ratio := row.settings.get("cache_max_entry_count"):
            bits += f", ratio {ratio:g}"
        groups.setdefault((row.card, row.name, bits), []).append(one)
    groups["all", "", ""] = list(scores)
    rows = [
        (*name, len(group), f"{median_of(group):.1%}", f"{p90_of(group):.1%}",
         *(f"{errors[i]:+.1%}" for i in (0, -1)), f"{max(errors, key=abs):+.1%}")
        for name, group in groups.items()
        if (errors := [one.error for one in group])
    ]  # fmt: skip
    head = "card | model | keys and values | figures | median | p90 | first | last | worst"
    return table(head, rows) if scores else ""


def _groups(results: Results, name: Callable[[Row], str]) -> str:
    shipped = {one.setup.row.id: one for one in results.shipped}
    rows = []
    for each in sorted({name(one.setup.row) for one in results.left_out}):
        group = [one for one in results.left_out if name(one.setup.row) == each]
        same = [shipped[one.setup.row.id] for one in group]
        errors = [one.error for one in group]
        rows.append(
            (each, len(group), f"{median_of(group):.1%}", f"{p90_of(group):.1%}",
             f"{max(errors, key=abs):+.1%}", f"{median(errors):+.1%}", f"{median_of(same):.1%}",
             f"{median(one.error for one in same):+.1%}")
        )  # fmt: skip
    head = "| figures | median | p90 | worst | signed median | as shipped: median | signed"
    return table(head, rows)


def _constants(results: Results) -> str:
    setups = [one for one in results.setups if one.row.of_lmdeploy]
    fits = {
        "before any fit": rates(FITTED),
        "as shipped": rates(),
        "fitted to all": fit(setups, rates(FITTED)),
    }
    for source in dict.fromkeys(one.row.source for one in setups):
        others = [one for one in setups if one.row.source != source]
        fits[f"without {source}"] = fit(others, rates(FITTED))
    return table(
        f"| {' | '.join(FITTED)}",
        [(name, *(f"{getattr(made, one):.3g}" for one in FITTED)) for name, made in fits.items()],
    )


def _first_tokens(results: Results) -> str:
    rows = []
    for together, name in ((True, "all start together"), (False, "requests follow each other")):
        ratios = sorted(
            one.first_token / one.setup.row.seconds_to_first_token
            for one in results.left_out
            if one.setup.row.seconds_to_first_token and one.setup.row.together is together
        )
        if ratios:
            shown = (ratios[len(ratios) // 2], ratios[0], ratios[-1])
            rows.append((name, len(ratios), *(f"{ratio:.2f}" for ratio in shown)))
    return table("| rows | forecast over published, median | least | most", rows)


def _assumed(results: Results) -> str:
    said: dict[str, list[str]] = {}
    for one in results.left_out:
        row = one.setup.row
        spread = "lengths of answers spread as an exponential distribution's" if row.spread else ""
        text = "; ".join(filter(None, (row.why, spread)))
        said.setdefault(f"{row.source}: {text}", []).append(row.id)
    return "\n".join(
        f"- {text} ({ids[0]}{' …' if len(ids) > 1 else ''})." for text, ids in said.items()
    )


def _card(one: Score) -> str:
    return one.setup.machine.gpus[0].name
