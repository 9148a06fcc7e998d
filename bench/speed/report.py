"""RESULTS.md, and the errors that plans tell people."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from datetime import date

from bench.speed.fit import FITTED, fit
from bench.speed.forecast import Setup
from bench.speed.score import Score, curves, median_of, order, p90_of
from turbofit.tuner.speed.rates import Rates, rates

__all__ = ["Results", "published_errors", "report", "with_errors"]

#: The bars of the issue: median, nine of ten, curves within a factor of two, pairs in order.
_MEDIAN, _P90, _PAIRS = 0.25, 0.6, 0.9
#: Rows that are off by more are named.
_FAR = 0.15


class Results:
    """Every row with its source left out of the fit, and as shipped."""

    def __init__(self, left_out: Sequence[Score], shipped: Sequence[Score]) -> None:
        self.left_out, self.shipped = left_out, shipped
        self.judged = [one for one in left_out if one.setup.row.of_lmdeploy]
        self.shipped_judged = [one for one in shipped if one.setup.row.of_lmdeploy]

    @property
    def setups(self) -> list[Setup]:
        """Of all rows that are scored."""
        return [one.setup for one in self.left_out]


def published_errors(results: Results) -> dict[str, float]:
    """What a plan says of its forecast, by the names of the constants."""
    return {
        "median_error": round(median_of(results.judged), 3),
        "p90_error": round(p90_of(results.judged), 3),
        "error_figures": len(results.judged),
        "error_cards": len({_card(one) for one in results.judged}),
    }


def with_errors(text: str, errors: dict[str, float]) -> str:
    """The constants' file with these errors in it."""
    for name, value in errors.items():
        text, count = re.subn(rf"(?m)^({name}:\n  value: ).*$", rf"\g<1>{value}", text)
        if count != 1:
            raise ValueError(f"the constants have no entry {name}")
    return text


def report(results: Results, day: date) -> str:
    """The whole of RESULTS.md."""
    judged, shipped = results.judged, results.shipped_judged
    lines = [
        "# The forecast of speed beside published figures",
        "",
        f"{day}. Made by `python -m bench.speed --write` from `rows.jsonl`;",
        "computed, no GPU. An error is forecast over published, less one: plus is too",
        "fast (over). *Left out*: under constants that were fitted without the row's source. *As",
        "shipped*: under those of `presets/engines/throughput.yaml`. The bars are of LMDeploy's",
        "engines with the source left out.",
        "",
        *_bars(results),
        "",
        "No table of a vision model's throughput with LMDeploy is published: the seconds that",
        "images take rest on an assumption (`vision_efficiency`), and nothing here judges them.",
        "",
        "## By source and engine",
        "",
        *_groups(results, lambda one: f"{_source(one)}, {one.setup.row.engine}"),
        "",
        "## By version of the engine",
        "",
        "A factor for a version would be the inverse of one plus its signed median. There is none:",
        "the engines before 0.3 are within some percent of the forecast, and those after it lie on",
        "both sides. lmdeploy#4953 has two versions of one model on one card, 26 % apart: no",
        "forecast can be right of both; 0.17 is the slower one (over).",
        "",
        *_groups(results, _version),
        "",
        "## Constants",
        "",
        *_constants(results),
        "",
        "## Best batch of a curve",
        "",
        "| curve | published | left out | within a factor of two |",
        "|---|---|---|---|",
        *(f"| {c.name} | {c.published} | {c.forecast} | {'yes' if c.held else '**no**'} |"
          for c in curves(results.left_out)),
        "",
        "## Rows of LMDeploy that are off by more than 15 %",
        "",
        "| row | left out | as shipped |",
        "|---|---|---|",
        *_far(judged, shipped),
        "",
        "## Seconds to the first token",
        "",
        "Not fitted, no bar. Where requests start together, all wait for all prefills.",
        "",
        *_first_tokens(results),
        "",
        "## What is assumed",
        "",
        *_assumed(results),
    ]  # fmt: skip
    return "\n".join(lines) + "\n"


def _bars(results: Results) -> list[str]:
    median, p90 = median_of(results.judged), p90_of(results.judged)
    right, pairs = order(results.judged)
    found = curves(results.judged)
    held = sum(one.held for one in found)
    shipped = results.shipped_judged
    shipped_right, _ = order(shipped)
    shipped_held = sum(one.held for one in curves(shipped))
    rows = [
        (f"median error at most {_MEDIAN:.0%}", f"{median:.1%}", median <= _MEDIAN,
         f"{median_of(shipped):.1%}"),
        (f"nine of ten within {_P90:.0%}", f"{p90:.1%}", p90 <= _P90, f"{p90_of(shipped):.1%}"),
        ("best batch of every curve within a factor of two", f"{held} of {len(found)}",
         held == len(found), f"{shipped_held} of {len(found)}"),
        (f"{_PAIRS:.0%} of pairs of settings in order", f"{right} of {pairs}",
         right >= _PAIRS * pairs, f"{shipped_right} of {pairs}"),
    ]  # fmt: skip
    return [
        f"{len(results.judged)} figures of LMDeploy, "
        f"{len({one.setup.row.source for one in results.judged})} sources, "
        f"{len({_card(one) for one in results.judged})} cards.",
        "",
        "| bar | left out | | as shipped |",
        "|---|---|---|---|",
        *(f"| {bar} | {reached} | {'met' if met else '**missed**'} | {also} |"
          for bar, reached, met, also in rows),
    ]  # fmt: skip


def _groups(results: Results, name: Callable[[Score], str]) -> list[str]:
    lines = [
        "| | figures | median | p90 | worst | signed median | as shipped: median | signed |",
        "|---|---|---|---|---|---|---|---|",
    ]
    shipped = {one.setup.row.id: one for one in results.shipped}
    for each in sorted({name(one) for one in results.left_out}):
        group = [one for one in results.left_out if name(one) == each]
        same = [shipped[one.setup.row.id] for one in group]
        worst = max(group, key=lambda one: abs(one.error))
        lines.append(
            f"| {each} | {len(group)} | {median_of(group):.1%} | {p90_of(group):.1%}"
            f" | {worst.error:+.1%} | {_signed(group):+.1%} | {median_of(same):.1%}"
            f" | {_signed(same):+.1%} |"
        )
    return lines


def _constants(results: Results) -> list[str]:
    setups = [one for one in results.setups if one.row.of_lmdeploy]
    lines = [
        "| | " + " | ".join(FITTED) + " |",
        "|---|" + "---|" * len(FITTED),
        _figures("before any fit", rates(FITTED)),
        _figures("as shipped", rates()),
        _figures("fitted to all", fit(setups, rates(FITTED))),
    ]
    for source in dict.fromkeys(one.row.source for one in setups):
        others = [one for one in setups if one.row.source != source]
        lines.append(_figures(f"without {source}", fit(others, rates(FITTED))))
    return lines


def _figures(name: str, figures: Rates) -> str:
    return f"| {name} | " + " | ".join(f"{getattr(figures, one):.3g}" for one in FITTED) + " |"


def _far(left_out: Sequence[Score], shipped: Sequence[Score]) -> list[str]:
    return [
        f"| {one.setup.row.id} | {one.error:+.1%} | {also.error:+.1%} |"
        for one, also in zip(left_out, shipped, strict=True)
        if max(abs(one.error), abs(also.error)) > _FAR
    ]


def _first_tokens(results: Results) -> list[str]:
    lines = ["| | rows | forecast over published, median | least | most |", "|---|---|---|---|---|"]
    for together in (True, False):
        ratios = sorted(
            one.first_token / one.setup.row.seconds_to_first_token
            for one in results.left_out
            if one.setup.row.seconds_to_first_token and one.setup.row.together is together
        )
        if ratios:
            name = "all start together" if together else "requests follow each other"
            lines.append(
                f"| {name} | {len(ratios)} | {ratios[len(ratios) // 2]:.2f} | {ratios[0]:.2f}"
                f" | {ratios[-1]:.2f} |"
            )
    return lines


def _assumed(results: Results) -> list[str]:
    said: dict[str, list[str]] = {}
    for one in results.left_out:
        row = one.setup.row
        spread = "lengths of answers spread as an exponential distribution's" if row.spread else ""
        text = "; ".join(filter(None, (row.why, spread)))
        said.setdefault(f"{one.setup.row.source}: {text}", []).append(one.setup.row.id)
    return [f"- {text} ({ids[0]}{' …' if len(ids) > 1 else ''})." for text, ids in said.items()]


def _signed(scores: Sequence[Score]) -> float:
    errors = sorted(one.error for one in scores)
    middle = len(errors) // 2
    return errors[middle] if len(errors) % 2 else (errors[middle - 1] + errors[middle]) / 2


def _source(one: Score) -> str:
    return one.setup.row.source


def _version(one: Score) -> str:
    return f"{one.setup.row.engine} {one.setup.row.version}"


def _card(one: Score) -> str:
    return one.setup.machine.gpus[0].name
