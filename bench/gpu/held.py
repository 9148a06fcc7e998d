"""Writes the stored runs on real cards beside their forecasts, by term and constant."""

from __future__ import annotations

from collections.abc import Sequence

from bench.gpu.implied import Implied, implied, readings
from bench.gpu.results import Trial
from bench.gpu.terms import cases, sums
from bench.page import table
from turbofit.core.units import MIB

_HEAD = """# Real cards beside forecasts

Sizes in MiB; over is forecast less measured, a minus is memory that no plan paid for."""


def hold(trials: Sequence[Trial]) -> str:
    """Return the report as Markdown."""
    parts = [_HEAD]
    for one in trials:
        rows = [(row["phase"], row["forecast"], row["measured"], row["over"]) for row in one.phases]
        rows += [(what, *pair, pair[0] - pair[1]) for what, *pair in (*sums(one), *cases(one))]
        told = [(what, *(f"{size / MIB:,.1f}" for size in sizes)) for what, *sizes in rows]
        parts.append(f"## {one.name}\n\n{table('what | forecast | measured | over', told)}")
        if one.preset is None:
            parts.append("No preset knows this card: docs/adding.md tells how one is made.")
    found = implied(reading for one in trials for reading in readings(one))
    parts.append(f"## Constants that this implies\n\n{_constants(found)}")
    changed = [
        f"- `presets/{one.preset}`: `{one.key}` {_figure(one.now)} → {_figure(one.value)}"
        f" ({one.meaning})"
        for one in found
        if one.changes
    ]
    parts.append("## Presets that would change\n\n" + ("\n".join(changed) or "None."))
    return "\n\n".join(parts) + "\n"


def _constants(found: Sequence[Implied]) -> str:
    rows = [
        (one.preset, one.key, _figure(one.now), _figure(one.value), _figure(one.lowest),
         one.meaning, ", ".join(one.trials))
        for one in found
    ]  # fmt: skip
    return table("preset | constant | now | implied | lowest | so it | from", rows)


def _figure(value: float | None) -> str:
    if value is None:
        return "none"
    return f"{int(value):,}" if float(value).is_integer() else f"{value:.4g}"
