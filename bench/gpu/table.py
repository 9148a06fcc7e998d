"""Writes the table of measured cards in docs/accuracy.md, with a row for each run.

Cards that nobody has measured are counted in a sentence.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from bench.gpu.results import Trial, trials
from bench.page import table
from turbofit.core.units import MIB
from turbofit.machine.presets import preset_names

PAGE = Path(__file__).parents[2] / "docs" / "accuracy.md"
_BEGIN = "<!-- measured cards: python -m bench.gpu table -->"
_END = "<!-- end of measured cards -->"
_HEAD = "card | model | engine | peak: forecast less measured | LMDeploy | driver | day"


def page(found: Sequence[Trial]) -> str:
    """Return the text of docs/accuracy.md with the table of these trials."""
    text = PAGE.read_text(encoding="utf-8")
    before, _, rest = text.partition(_BEGIN)
    names = preset_names()
    rows = [_row(key, one) for key in names for one in found if one.preset == key]
    rows += [_row(one.gpu.name, one) for one in found if one.preset is None]
    others = len(names) - len({one.preset for one in found if one.preset is not None})
    said = f"Nobody has measured the other {others} cards that have a preset."
    text = f"{table(_HEAD, rows)}\n\n{said}"
    return f"{before}{_BEGIN}\n\n{text}\n\n{_END}{rest.partition(_END)[2]}"


def write() -> None:
    """Write docs/accuracy.md with the table of all stored trials."""
    PAGE.write_text(page(trials()), encoding="utf-8")


def _row(card: str, one: Trial) -> tuple[str, ...]:
    plan, run = one.plan, one.document.run
    driver = str(plan.machine.driver)
    return card, plan.model.name, plan.backend.name, _peak(one), run.lmdeploy, driver, run.started


def _peak(one: Trial) -> str:
    """Return the forecast peak less the measured one, of the card where they differ most."""
    most: dict[int, int] = {}
    for row in one.phases:
        if row["phase"] not in ("context and weights", "cache"):
            most[row["gpu"]] = max(most.get(row["gpu"], 0), row["measured"])
    over = [gpu.peak - most[gpu.index] for gpu in one.plan.ledgers if gpu.index in most]
    if not over:
        return "no calibration in it"
    furthest = max(over, key=abs)
    share = abs(furthest) / one.plan.ledgers[0].total
    return f"{furthest / MIB:+.0f} MiB, {share:.2%} of the card"
