"""Makes the table of docs/accuracy.md that says how far to trust a forecast, of what was measured.

It has a row for each measured card (memory by bench/gpu, images by bench/speed), one for cards of
published figures (bench/accuracy, bench/speed), one for all others, and one for a calibrated card.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from bench.accuracy.rows import read_rows as memory_rows
from bench.accuracy.score import score as memory_score
from bench.gpu.results import Trial
from bench.page import table
from bench.speed.forecast import setup_of
from bench.speed.rows import read_rows
from bench.speed.score import Score, score
from turbofit.core.units import MIB
from turbofit.planning.speed import rates
from turbofit.planning.throughput import UNSEEN, errors_of

#: The bands: memory is over, by at most this share of the card; speed is within this share.
MEMORY, SPEED = 0.005, 0.25
#: Why figures lie outside, by preset and engine, or by the name of a row of bench/speed.
REASONS = {
    "h100 pytorch": "torch keeps what it once reserved",
    "h100-internvl2-2b-threads-8": "the host prepares fewer images than its cores could",
}
_UNKNOWN = "why is not known"
_ENGINES = {"turbomind": "TurboMind", "pytorch": "PyTorch engine"}
_TEXT, _INTERNVL2 = "text with turbomind", "internvl2.0/deployment"
_CLOCK = Path(__file__).parents[1] / "clock" / "results.jsonl"
_ANY_OTHER = (
    "any other", "formulas, with contexts and libraries at their upper end: not measured",
    "the word beside each figure ([by kind](speed.md#how-sure-by-kind)); `null`: nobody knows",
)  # fmt: skip
_CALIBRATED = (
    "yours, after `turbofit calibrate MODEL`", "what your card took, and a margin of 64 MiB",
)  # fmt: skip


def trusted(found: Sequence[Trial]) -> str:
    """Return the table; ``found`` are the runs on real cards."""
    images = [score(setup_of(row), rates()) for row in read_rows() if row.sizes]
    keys = sorted({one.preset for one in found if one.preset is not None})
    rows = [(key, _memory(key, found), _images(key, images)) for key in keys]
    rows += [("one of which others published figures", _published(), _text()), _ANY_OTHER]
    return table("your card | memory | speed", [*rows, (*_CALIBRATED, _calibrated())])


def peaks_of(trial: Trial) -> list[tuple[int, float]]:
    """Return by how many bytes the forecast peak of each read card is over, and their share."""
    most: dict[int, int] = {}
    for row in trial.phases:
        if row["phase"] not in ("context and weights", "cache"):
            most[row["gpu"]] = max(most.get(row["gpu"], 0), row["measured"])
    overs = ((gpu.peak - most[gpu.index], gpu) for gpu in trial.plan.ledgers if gpu.index in most)
    return [(over, over / gpu.total) for over, gpu in overs]


def _memory(key: str, found: Sequence[Trial]) -> str:
    """Return what lies inside and outside the band of memory, by engine."""
    parts = []
    for engine, name in _ENGINES.items():
        of_card = (one for one in found if (one.preset, one.plan.backend.name) == (key, engine))
        peaks = [peak for one in of_card for peak in peaks_of(one)]
        inside = sorted(over / MIB for over, share in peaks if 0 <= share <= MEMORY)
        if inside:
            ends = dict.fromkeys(f"{over:+.0f}" for over in (inside[0], inside[-1]))
            sizes = f"{' to '.join(ends)} MiB"
            parts.append(f"{name}: inside in {len(inside)} of {len(peaks)}, {sizes}")
        parts += [
            f"{name}: outside, {over / MIB:+.0f} MiB ({REASONS.get(f'{key} {engine}', _UNKNOWN)})"
            for over, share in peaks
            if not 0 <= share <= MEMORY
        ]
    return "; ".join(parts)


def _images(key: str, scores: Sequence[Score]) -> str:
    """Return what lies inside and outside the band of speed, of images with TurboMind."""
    of_card = ("turbomind", f"1x{key}")
    here = [one for one in scores if (one.setup.row.engine, one.setup.row.on) == of_card]
    outside = [one for one in here if abs(one.error) > SPEED]
    text = f"images: inside in {len(here) - len(outside)} of [{len(here)} figures](speed.md#images)"
    reasons = (f"{one.error:+.1%} ({REASONS.get(one.setup.row.id, _UNKNOWN)})" for one in outside)
    return "; ".join((text, *(f"outside, {reason}" for reason in reasons)))


def _published() -> str:
    """Return how far the memory of InternVL2's table is off, by engine."""
    rows = [row for row in memory_rows() if _INTERNVL2 in row.source]
    errors: dict[str, list[float]] = {}
    for one in memory_score(rows)[0]:
        used = [figure.percent_of_card or 0.0 for figure in one.scores if figure.figure == "used"]
        errors.setdefault(one.row.engine, []).extend(used)
    spans = [f"{_ENGINES[name]} {min(of):+.2f} to {max(of):+.2f} %" for name, of in errors.items()]
    return (
        f"InternVL2's table, older LMDeploy: {', '.join(spans)} of the card;"
        " single runs further off ([which](#what-the-forecast-rests-on))"
    )


def _text() -> str:
    """Return how far texts are off where a fit saw the card, and where none did."""
    seen, unseen = errors_of()[_TEXT], errors_of()[f"{_TEXT}, {UNSEEN}"]
    return (
        f"text, nine of ten: of {seen.figures} figures within {seen.p90:.1%} where a fit saw the"
        f" card, of {unseen.figures} within {unseen.p90:.1%} where none did, so some are outside"
    )


def _calibrated() -> str:
    """Return how well steps are found on pretend GPUs, whose table is known."""
    lines = (json.loads(line) for line in _CLOCK.read_text().splitlines())
    steps = [one for one in lines if one["group"] == "calibrated" and one["table"]]
    worst = max(abs(one["clock"] / one["table"] - 1) for one in steps)
    return (
        "this model's own steps, and for others the rates that they show"
        f" ([how](bench.md#calibration)): {len(steps)} steps of pretend GPUs were found within"
        f" {worst:.1%}; no real card has shown it yet"
    )
