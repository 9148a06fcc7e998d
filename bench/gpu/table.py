"""Writes both tables of docs/accuracy.md: how far to trust a forecast, and the measured cards.

The second has a row for each run; cards that nobody has measured are counted in a sentence.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from bench.gpu.results import Trial, trials
from bench.gpu.trust import peaks_of, trusted
from bench.page import table
from turbofit.core.units import MIB
from turbofit.machine.presets import preset_names

PAGE = Path(__file__).parents[2] / "docs" / "accuracy.md"
_TRUST, _CARDS = "how far to trust", "measured cards"
_HEAD = "card | model | engine | peak: forecast less measured | LMDeploy | driver | day"


def page(found: Sequence[Trial]) -> str:
    """Return the text of docs/accuracy.md with both tables of these trials."""
    names = preset_names()
    rows = [_row(key, one) for key in names for one in found if one.preset == key]
    rows += [_row(one.gpu.name, one) for one in found if one.preset is None]
    others = len(names) - len({one.preset for one in found if one.preset is not None})
    said = f"Nobody has measured the other {others} cards that have a preset."
    text = _with_block(PAGE.read_text(encoding="utf-8"), _TRUST, trusted(found))
    return _with_block(text, _CARDS, f"{table(_HEAD, rows)}\n\n{said}")


def _with_block(text: str, name: str, block: str) -> str:
    """Return a page with another block between the two marks of this name."""
    begin, end = f"<!-- {name}: python -m bench.gpu table -->", f"<!-- end of {name} -->"
    before, _, rest = text.partition(begin)
    return f"{before}{begin}\n\n{block}\n\n{end}{rest.partition(end)[2]}"


def write() -> None:
    """Write docs/accuracy.md with the tables of all stored trials."""
    PAGE.write_text(page(trials()), encoding="utf-8")


def _row(card: str, one: Trial) -> tuple[str, ...]:
    plan, run = one.plan, one.document.run
    driver = str(plan.machine.driver)
    return card, plan.model.name, plan.backend.name, _peak(one), run.lmdeploy, driver, run.started


def _peak(one: Trial) -> str:
    """Return the forecast peak less the measured one, of the card where they differ most."""
    peaks = peaks_of(one)
    if not peaks:
        return "no calibration in it"
    over, share = max(peaks, key=lambda peak: abs(peak[0]))
    return f"{over / MIB:+.0f} MiB, {abs(share):.2%} of the card"
