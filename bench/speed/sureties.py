"""How far off each kind of forecast is: `presets/engines/surety.yaml`, which plans tell.

A figure of text is judged with its source left out of the fit. Rows of images judge as they are:
one constant of the tower and one of the host were measured in some of them, as RESULTS.md says.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence

from bench.speed.score import Score, median_of, p90_of
from turbofit.tuner.surety import UNSEEN, Errors

_HEAD = """\
# How far forecasts of speed were off, by kind: the share by which half and nine of ten of the
# figures differ at most, by how many times the worst does, and the cards of these figures. Written
# by `python -m bench.speed --write`; the rows are in bench/speed.
"""


def kinds(judged: Sequence[Score], judging: Sequence[Score]) -> dict[str, Errors]:
    """The errors of each kind of LMDeploy's: of text that was judged, and of rows that judge."""
    groups: dict[str, list[Score]] = defaultdict(list)
    for one in judged:
        groups[one.setup.row.kind].append(one)
    for one in judging:
        kind = one.setup.row.kind
        groups[kind if one.setup.row.sizes else f"{kind}, {UNSEEN}"].append(one)
    for kind, one in first_tokens(judged):
        groups[kind].append(one)
    return {kind: _errors(groups[kind]) for kind in sorted(groups)}


def first_tokens(scores: Sequence[Score]) -> Iterator[tuple[str, Score]]:
    """Seconds to the first token as scores of their own, by how many others there are, and when."""
    for one in scores:
        row = one.setup.row
        if row.seconds_to_first_token:
            many = "all at once" if row.together else "among others"
            yield (
                f"first token {'alone' if one.setup.at_once == 1 else many}, {row.engine}",
                Score(
                    setup=one.setup,
                    forecast=one.first_token,
                    published=row.seconds_to_first_token,
                    first_token=one.first_token,
                ),
            )


def _errors(scores: Sequence[Score]) -> Errors:
    return Errors(
        figures=len(scores),
        median=round(median_of(scores), 3),
        p90=round(p90_of(scores), 3),
        worst=round(max(one.times_off for one in scores), 2),
        cards=tuple(sorted({one.setup.machine.gpus[0].name for one in scores})),
    )


def surety_file(errors: dict[str, Errors]) -> str:
    """The preset's text."""
    parts = [_HEAD]
    for kind, one in errors.items():
        parts.append(
            f"{kind}:\n  figures: {one.figures}\n  median: {one.median}\n  p90: {one.p90}\n"
            f"  worst: {one.worst}\n  cards: [{', '.join(one.cards)}]\n"
        )
    return "".join(parts)
