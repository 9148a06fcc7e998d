"""Results of cards beside forecasts, without a GPU: what they say of each term and constant."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

from bench.gpu.implied import Implied, implied, memory_readings, sums
from bench.gpu.results import Results, engine_log
from bench.gpu.speeds import beside, ceilings, speed_readings
from bench.gpu.terms import cache_of, cases
from turbofit.logs.explain import diagnose

MIB = 1 << 20


class Section(NamedTuple):
    """A table of one card: integers are bytes, fractions seconds or shares."""

    title: str
    head: tuple[str, ...]
    rows: list[tuple[object, ...]]

    def facts(self) -> list[dict[str, object]]:
        """For JSON."""
        return [dict(zip(self.head, row, strict=True)) for row in self.rows]


def hold(every: Sequence[Results], out: Path | None = None) -> str:
    """The report as Markdown; with ``out`` also as ``HELD.md`` and ``held.json`` there."""
    lines = ["# Results beside forecasts", "", "Sizes in MiB; over is forecast less measured,"]
    lines += ["a minus is memory that no plan paid for.", ""]
    cards = []
    for one in every:
        sections = _sections(one)
        cards.append({"name": one.gpu.name, **{part.title: part.facts() for part in sections}})
        lines += _head(one)
        for part in sections:
            lines += _told(part)
        lines += _notes("Pools", _pools(one)) + _notes("Ceilings", _ceilings(one))
    readings = [r for one in every for r in (*memory_readings(one), *speed_readings(one))]
    found = implied(readings)
    lines += _constants(found) + _changes(found)
    text = "\n".join(lines) + "\n"
    if out is not None:
        out.mkdir(parents=True, exist_ok=True)
        (out / "HELD.md").write_text(text)
        facts = [{**asdict(one), "meaning": one.meaning} for one in found]
        whole = {"constants": facts, "cards": cards}
        (out / "held.json").write_text(json.dumps(whole, indent=1) + "\n")
    return text


def _told(part: Section) -> list[str]:
    rows = [[_cell(value) for value in row] for row in part.rows]
    lines = table(part.head, rows)
    return [f"### {part.title}", "", *lines] if lines else []


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """Markdown; nothing where there are no rows."""
    if not rows:
        return []
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    return [*lines, *("| " + " | ".join(row) + " |" for row in rows), ""]


def _head(one: Results) -> list[str]:
    packages = ", ".join(f"{name} {found}" for name, found in one.packages.items() if found)
    lines = [f"## {one.gpu.name}", "", f"Driver {one.machine.driver}; {packages}.", ""]
    if one.preset is None:
        lines += [_new_card(one), ""]
    return lines


def _sections(one: Results) -> list[Section]:
    return [
        Section(
            "Phases", ("stage", "phase", "forecast", "measured", "over"), list(_phases(one)),
        ),
        Section(
            "Terms that only a card shows", ("stage", "terms", "charged", "measured", "over"),
            list(_terms(one)),
        ),
        Section(
            "What worst cases add", ("stage", "case", "forecast", "measured", "over"),
            list(_cases(one)),
        ),
        Section(
            "Speed", ("stage", "part", "forecast s", "measured s", "measured / forecast"),
            [(*row, row[3] / row[2]) for row in beside(one)],
        ),
        Section(
            "Who lived", ("stage", "forecast", "it", "as forecast", "ended as", "diagnosed as"),
            list(_lives(one)),
        ),
    ]  # fmt: skip


def _notes(title: str, lines: Iterator[str]) -> list[str]:
    found = list(lines)
    return [f"### {title}", "", *found, ""] if found else []


def _new_card(one: Results) -> str:
    gpu = one.gpu
    return (
        f"No preset knows this card: docs/adding.md tells how one is made. Total {_cell(gpu.total)}"
        f" MiB, reserved {_cell(gpu.reserved)} MiB, {gpu.sm_count} SMs, compute capability"
        f" {gpu.compute_capability}."
    )


def _phases(one: Results) -> Iterator[tuple[object, ...]]:
    for name, document, _ in one.trials():
        for row in document["phases"]:
            yield name, row["phase"], row["forecast"], row["measured"], row["over"]


def _terms(one: Results) -> Iterator[tuple[object, ...]]:
    for name, what, charged, measured in sums(one):
        yield name, what, charged, measured, charged - measured
    for name, document, plan in one.trials():
        found = cache_of(plan, document)
        if found is not None:
            forecast, measured = found
            ratio = f"kv_cache: {plan.settings.cache_max_entry_count:.3f} of what was free"
            yield name, ratio, forecast, measured, forecast - measured
    parts = one.documents.get("a-context", {})
    torch, turbomind = (_first(parts.get(f"{name}_eager")) for name in ("torch", "turbomind"))
    if torch is not None and turbomind is not None:
        what = "all kernels of TurboMind at once, beside torch's"
        yield "a-context", what, None, turbomind - torch, None


def _first(part: dict[str, Any] | None) -> int | None:
    marks = {m["mark"]: m for m in (part or {}).get("marks", [])}
    used = marks.get("first", {}).get("used")
    return None if used is None else int(used)


def _cases(one: Results) -> Iterator[tuple[object, ...]]:
    for name, document, _ in one.trials():
        for case, forecast, measured in cases(document):
            yield name, case, forecast, measured, forecast - measured


def _pools(one: Results) -> Iterator[str]:
    """When freed memory is free decides over the temporaries of loading."""
    found = one.documents.get("a-pool", {}).get("pool", {}).get("marks", [])
    marks = [m for m in found if m["mark"].startswith("default_")] or [
        m for m in one.documents.get("a-constants", {}).get("marks", [])
        if m["mark"].startswith("pool_") and "taken" in m
    ]  # fmt: skip
    if not marks:
        return
    if all(m["kept_after_wait"] > 0 for m in marks):
        yield "- The default pool keeps what is freed even when its stream was waited for:"
        yield "  `load_temporaries.returned` takes back what stays (under: it kills)."
    elif any(m["kept_at_once"] > 0 for m in marks):
        yield "- What is freed is free when its stream was waited for, as the account has it."
    else:
        yield "- What is freed is free at once: temporaries of loading do not lower the cache,"
        yield "  which is then larger than planned (under: it kills)."


def _ceilings(one: Results) -> Iterator[str]:
    found = ceilings(one)
    if found:
        yield f"Of the card's own peak a copy reached {found['copy']:.0%}, a product"
        yield f"{found['product']:.0%}."


def _lives(one: Results) -> Iterator[tuple[object, ...]]:
    for name, document in one.documents.items():
        if document.get("as_forecast") is None:
            continue
        ended, said = document.get("ending", {}).get("kind", ""), ""
        log = engine_log(one.folder, name) if ended else None
        if log is not None:
            said = diagnose([log.encode()]).kind
        forecast = "lives" if document["forecast_lives"] else "dies"
        right = "yes" if document["as_forecast"] else "**no**"
        yield name, forecast, document["outcome"], right, ended, said


def _constants(found: Sequence[Implied]) -> list[str]:
    head = ("preset", "constant", "now", "implied", "lowest", "so it", "from")
    rows = [
        (one.preset, one.key, _figure(one.now), _figure(one.value), _figure(one.lowest),
         one.meaning, ", ".join(one.documents))
        for one in found
    ]  # fmt: skip
    return ["## Constants that this implies", "", *table(head, rows)] if rows else []


def _changes(found: Sequence[Implied]) -> list[str]:
    lines = ["## Presets that would change", ""]
    changed = [one for one in found if one.changes and not one.impossible]
    lines += [
        f"- `presets/{one.preset}`: `{one.key}` {_figure(one.now)} → {_figure(one.value)}"
        f" ({one.meaning})"
        for one in changed
    ]
    return lines if changed else [*lines, "None."]


def _figure(value: float | None) -> str:
    if value is None:
        return "none"
    if float(value).is_integer():
        return f"{int(value):,}"
    return f"{value:.4g}"


def _cell(value: object) -> str:
    """As a table shows it."""
    if isinstance(value, int):
        return f"{value / MIB:,.1f}"
    return f"{value:.4g}" if isinstance(value, float) else str(value or "")
