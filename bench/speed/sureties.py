"""Makes `presets/engines/surety.yaml`: how far off each kind of forecast is, as plans show.

A figure of text is judged with its source left out of the fit. Rows of images judge as they are:
one constant of the tower and one of the host were measured in some of them, as RESULTS.md says.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence
from math import ceil
from typing import Final

from msgspec.structs import replace
from packaging.version import Version

from bench.speed.score import Score, median_of, p90_of
from turbofit.core.units import three_digits
from turbofit.planning.throughput import TIMES, UNSEEN, Errors

_HEAD = """\
# How far forecasts of speed were off, by kind: the share by which half and nine of ten of the
# figures differ at most, by how many times nine of ten and the worst are off, and their cards.
# Written by `python -m bench.speed --write`; the rows are in bench/speed.
"""


#: First tokens under load depend on the scheduler, and older schedulers are gone: 0.2.0 read
#: all prompts of a batch before any first token, 0.4.0 prepared no step ahead.
_SCHEDULER: Final = Version("0.5")


def kinds(
    judged: Sequence[Score], unseen: Sequence[Score], images: Sequence[Score]
) -> dict[str, Errors]:
    """Return the errors of each kind of forecast for LMDeploy."""
    groups: dict[str, list[Score]] = defaultdict(list)
    for scores, suffix in ((judged, ""), (images, ""), (unseen, f", {UNSEEN}")):
        current = [one for one in scores if not one.setup.row.past]
        for one in current:
            groups[f"{one.setup.kind}{suffix}"].append(one)
        for kind, one in first_tokens(current):
            groups[f"{kind}{suffix}"].append(one)
    errors = {kind: _errors(groups[kind]) for kind in sorted(groups)}
    return {
        kind: replace(one, measured=_measured(groups[kind]))
        if one.times > TIMES[1] and not kind.startswith("first token")
        else one
        for kind, one in errors.items()
    }


def first_tokens(scores: Sequence[Score]) -> Iterator[tuple[str, Score]]:
    """Yield seconds to the first token as scores, by the number of other requests and their start.

    The time of a request of one token that is sent alone counts as well. Of requests among others,
    only those of today's scheduler count.
    """
    for one in scores:
        row, kind = one.setup.row, one.setup.kind
        seconds, alone = row.seconds_to_first_token, one.setup.at_once == 1
        if row.sizes and alone and row.output == 1:
            yield f"first token alone, {kind}", one
        elif seconds and (alone or Version(row.version) >= _SCHEDULER):
            many = "all at once" if row.together else "among others"
            found = replace(one, forecast=one.first_token, published=seconds)
            yield f"first token {'alone' if alone else many}, {kind}", found


def _errors(scores: Sequence[Score]) -> Errors:
    return Errors(
        figures=len(scores),
        median=round(median_of(scores), 3),
        p90=round(p90_of(scores), 3),
        times=round(sorted(one.times_off for one in scores)[ceil(0.9 * len(scores)) - 1], 2),
        worst=round(max(one.times_off for one in scores), 2),
        cards=tuple(sorted({one.setup.machine.gpus[0].name for one in scores})),
    )


def _measured(scores: Sequence[Score]) -> str:
    """Say in words what was measured: tokens a second of the setting with the most figures."""
    settings: dict[str, list[Score]] = defaultdict(list)
    for one in scores:
        row, gpus = one.setup.row, one.setup.machine.gpus
        settings[f"{row.name} on {len(gpus)} x {gpus[0].name}"].append(one)
    name, most = max(settings.items(), key=lambda item: len(item[1]))
    per_answer = [one.setup.row.output_tokens_per_second is None for one in most]
    rates = [
        one.published * (one.setup.row.output if each else 1.0)
        for one, each in zip(most, per_answer, strict=True)
    ]
    at_once = [float(one.setup.at_once) for one in most]
    return f"{name} gave {_range(rates)} tokens/s, {_range(at_once)} at once"


def _range(values: Sequence[float]) -> str:
    least, most = three_digits(min(values)), three_digits(max(values))
    return least if least == most else f"{least} to {most}"


def surety_file(errors: dict[str, Errors]) -> str:
    """Return the text of the preset."""
    parts = [_HEAD]
    for kind, one in errors.items():
        parts.append(
            f"{kind}:\n  figures: {one.figures}\n  median: {one.median}\n  p90: {one.p90}\n"
            f"  times: {one.times}\n  worst: {one.worst}\n  cards: [{', '.join(one.cards)}]\n"
        )
        parts += [f"  measured: {one.measured}\n"] if one.measured else []
    return "".join(parts)
