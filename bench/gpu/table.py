"""The table of measured cards in docs/accuracy.md: a row a run, and cards that nobody measured."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from bench.gpu.held import table
from bench.gpu.results import OBSERVATIONS, RESULTS, Results, load, observed
from turbofit.core.plan import Plan
from turbofit.core.units import MIB
from turbofit.machine.presets import preset_names

PAGE = Path(__file__).parents[2] / "docs" / "accuracy.md"
_BEGIN = "<!-- measured cards: python -m bench.gpu table -->"
_END = "<!-- end of measured cards -->"
_HEAD = ("card", "model", "engine", "peak: forecast less measured", "LMDeploy", "driver", "day")
#: Its account was corrected by the other folder.
_FIRST = "h200-first"


def every() -> list[Results]:
    """All that is kept of real cards."""
    raw = [one for one in load(RESULTS) if one.folder.name != _FIRST]
    return raw + [observed(file) for file in sorted(OBSERVATIONS.glob("*.json"))]


def page(found: Sequence[Results]) -> str:
    """docs/accuracy.md with the table of these results."""
    text = PAGE.read_text(encoding="utf-8")
    before, _, rest = text.partition(_BEGIN)
    after = rest.partition(_END)[2]
    rows = [row for key in preset_names() for row in _card(key, found)]
    rows += [row for one in found if one.preset is None for row in _rows(one.gpu.name, one)]
    body = "\n".join(table(_HEAD, rows))
    return f"{before}{_BEGIN}\n\n{body}\n{_END}{after}"


def write() -> None:
    """Renew the page."""
    PAGE.write_text(page(every()), encoding="utf-8")


def _card(key: str, found: Sequence[Results]) -> list[tuple[str, ...]]:
    rows = [row for one in found if one.preset == key for row in _rows(key, one)]
    return rows or [(key, "nobody yet", *[""] * (len(_HEAD) - 2))]


def _rows(card: str, one: Results) -> Iterator[tuple[str, ...]]:
    for name, plan in one.plans.items():
        yield (
            card, plan.model.name, plan.engine.name, _peak(one.documents[name], plan),
            str(one.packages.get("lmdeploy")), str(one.machine.driver), one.day,
        )  # fmt: skip


def _peak(document: dict[str, Any], plan: Plan) -> str:
    """Forecast less measured at the most that was in use, of the card that is furthest off."""
    over = max(_over(document.get("phases", []), plan), key=abs, default=None)
    if over is None:
        return "no calibration in it"
    return f"{over / MIB:+.0f} MiB, {abs(over) / plan.gpus[0].total:.2%} of the card"


def _over(rows: Sequence[dict[str, Any]], plan: Plan) -> Iterator[int]:
    for gpu in plan.gpus:
        measured = [
            row["measured"]
            for row in rows
            if row["gpu"] == gpu.index and row["phase"] not in ("context and weights", "cache")
        ]
        if measured:
            yield gpu.peak - max(measured)
