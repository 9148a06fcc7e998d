"""Makes `presets/engines/surety.yaml`: how far off each kind of forecast is, as plans show.

A figure of text is judged with its source left out of the fit. Rows of images judge as they are:
one constant of the tower and one of the host were measured in some of them, as RESULTS.md says.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence
from math import ceil

from msgspec.structs import replace

from bench.speed.score import Score, median_of, p90_of
from turbofit.planning.throughput import UNSEEN, Errors

_HEAD = """\
# How far forecasts of speed were off, by kind: the share by which half and nine of ten of the
# figures differ at most, by how many times nine of ten and the worst are off, and their cards.
# Written by `python -m bench.speed --write`; the rows are in bench/speed.
"""


def kinds(
    judged: Sequence[Score], unseen: Sequence[Score], images: Sequence[Score]
) -> dict[str, Errors]:
    """Return the errors of each kind of forecast for LMDeploy, and of all text."""
    groups: dict[str, list[Score]] = defaultdict(list)
    for one in judged:
        groups[one.setup.row.kind].append(one)
        groups["text"].append(one)
    for one in unseen:
        groups[f"{one.setup.row.kind}, {UNSEEN}"].append(one)
    for one in images:
        groups[one.setup.row.kind].append(one)
    for kind, one in first_tokens([*judged, *images]):
        groups[kind].append(one)
    return {kind: _errors(groups[kind]) for kind in sorted(groups)}


def first_tokens(scores: Sequence[Score]) -> Iterator[tuple[str, Score]]:
    """Yield seconds to the first token as scores, by the number of other requests and their start.

    The time of a request of one token that is sent alone counts as well.
    """
    for one in scores:
        row = one.setup.row
        seconds = row.seconds_to_first_token
        if row.sizes and one.setup.at_once == row.output == 1:
            yield f"first token alone, {row.kind}", one
        elif seconds:
            many = "all at once" if row.together else "among others"
            found = replace(one, forecast=one.first_token, published=seconds)
            yield f"first token {'alone' if one.setup.at_once == 1 else many}, {row.kind}", found


def _errors(scores: Sequence[Score]) -> Errors:
    return Errors(
        figures=len(scores),
        median=round(median_of(scores), 3),
        p90=round(p90_of(scores), 3),
        times=round(sorted(one.times_off for one in scores)[ceil(0.9 * len(scores)) - 1], 2),
        worst=round(max(one.times_off for one in scores), 2),
        cards=tuple(sorted({one.setup.machine.gpus[0].name for one in scores})),
    )


def surety_file(errors: dict[str, Errors]) -> str:
    """Return the text of the preset."""
    parts = [_HEAD]
    for kind, one in errors.items():
        parts.append(
            f"{kind}:\n  figures: {one.figures}\n  median: {one.median}\n  p90: {one.p90}\n"
            f"  times: {one.times}\n  worst: {one.worst}\n  cards: [{', '.join(one.cards)}]\n"
        )
    return "".join(parts)
